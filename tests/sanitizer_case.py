"""A small run of every CUDA kernel, for compute-sanitizer: `make gpu` starts it under memcheck and racecheck."""

import torch

from alr_kernels import AlrAdamW, ImportanceRecorder, _ops


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
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
