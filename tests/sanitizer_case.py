"""A small run of every CUDA kernel, for compute-sanitizer: `make gpu` starts it under memcheck and racecheck."""

import torch

from alr_kernels import AlrAdamW, Importance, ImportanceRecorder, _ops
from alr_kernels.codecs import native as codecs
from alr_kernels.codecs.encoded import Encoded


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        params = [torch.nn.Parameter(torch.randn(n, device="cuda").to(dtype)) for n in (1, 1023, 4099)]
        for mode in ("proximal", "coupled"):
            optimizer = AlrAdamW(params, [p.detach().float().abs() for p in params], mode=mode, record=True)
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
            optimizer.recorded_importance(relative=True)
        few = {"importance_dtype": "int4", "anchor_dtype": "bf16", "state_dtype": "int8", "stats": True}
        matrix = torch.nn.Parameter(torch.randn(65, 128, device="cuda").to(dtype))
        matrix.grad = torch.randn_like(matrix)
        master = "split" if dtype is torch.bfloat16 else "none"
        AlrAdamW(
            [matrix], [torch.ones_like(matrix, dtype=torch.float32)], master=master, max_grad_norm=1.0, **few
        ).step()
        for samples, tokens, rows, columns in ((3, 7, 13, 17), (2, 33, 72, 136), (9, 1, 1536, 1544)):
            deltas = torch.randn(samples, tokens, rows, device="cuda").to(dtype)
            inputs = torch.randn(samples, tokens, columns, device="cuda").to(dtype)
            _ops.fisher_linear_(torch.zeros(rows, columns, device="cuda"), deltas, inputs, 1.0)
        sgd = torch.optim.SGD(params, lr=0.1)
        recorder = ImportanceRecorder(sgd, ((f"w{i}", param) for i, param in enumerate(params)))
        sgd.step()
        recorder.finalise()
        encoded(dtype)
    for kept in ("fp32", "bf16", "int8", "int4", "rank1"):
        for mode in ("proximal", "coupled"):
            lora(kept, mode)
    torch.cuda.synchronize()
    print("every kernel ran")


def lora(kept: str, mode: str) -> None:
    """Record and pull pairs of two shapes in effective space, whole tiles and edges."""
    shapes = [(130, 128, 3), (65, 256, 8), (130, 128, 3)]
    pairs = []
    for number, (m, n, r) in enumerate(shapes):
        down, up = (torch.nn.Parameter(torch.randn(*size, device="cuda")) for size in ((r, n), (m, r)))
        down.grad, up.grad = torch.randn_like(down), torch.randn_like(up)
        pairs.append((f"layers.{number}.weight", down, up, 2.0))
    named = [(f"{name}.{i}", factor) for name, *factors, _ in pairs for i, factor in enumerate(factors)]
    importance = Importance({pair[0]: torch.rand(m, n) for pair, (m, n, _) in zip(pairs, shapes, strict=True)})
    optimizer = AlrAdamW(named, importance.astype(kept), lora=pairs, mode=mode, record=True, stats=True)
    for _ in range(2):
        optimizer.step()
    optimizer.recorded_importance(dtype=kept)


def encoded(dtype: torch.dtype) -> None:
    """Finalise into every format and merge what comes out, whole blocks and a tail."""
    formats = ["fp32", "bf16", "fp16", "int8", "int4"]
    shapes = [(65, 128), (65, 128), (4099,), (65, 128), (129, 128)]
    omega = [torch.randn(shape, device="cuda") for shape in shapes]
    params = [torch.randn_like(w).to(dtype) for w in omega]
    found, *_ = _ops.finalise(omega, params, [torch.zeros_like(p) for p in params], formats, 1e-3, relative=True)
    again = [torch.zeros_like(x.values) for x in found]
    for weights in ((0.5, 1.0), None):
        _ops.merge(found, [x._replace(values=v) for x, v in zip(found, again, strict=True)], formats, weights)
        _ops.merge(found, [None] * len(found), ["bf16", "int4", "fp32", "fp32", "int8"], weights)
    dense = Encoded.dense(torch.rand(65, 128, device="cuda"))
    (coded,), *_ = _ops.merge([dense], [None], ["int4"], (1.0, 0.0))
    codecs.decode_importance(coded.values, coded.scales, 4)


if __name__ == "__main__":
    main()
