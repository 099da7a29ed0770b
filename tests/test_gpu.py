"""What only a CUDA device can show; `make gpu` runs these. Formulas are tested on the CPU, on the same kernels."""

from __future__ import annotations

import pytest
import torch

from alr_kernels import AlrAdamW, ImportanceRecorder, _ops
from alr_kernels.codecs import native as codecs_native
from alr_kernels.codecs import reference as codecs_reference
from alr_kernels.codecs.encoded import Encoded
from alr_kernels.importance import native as importance_native
from alr_kernels.importance import reference as importance_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make gpu` on one"),
]
SIZES = (0, 1, 17, 1023, 1024, 1025, 65_537, 1_000_003)
STATE = ("exp_avg", "exp_avg_sq", "path_integral")


MATRICES = ((257, 128), (33, 384), (1024, 1024))  # whose rows can hold block codes
FORMS = {
    "fp32": {},
    "bf16 importance, anchor and moments": {
        "importance_dtype": "bf16", "anchor_dtype": "bf16", "state_dtype": "bf16",
    },
    "int8 importance": {"importance_dtype": "int8", "anchor_dtype": "bf16"},
    "few bytes": {"importance_dtype": "int4", "anchor_dtype": "bf16", "state_dtype": "int8"},
    "clipped": {"max_grad_norm": 0.5},
}  # fmt: skip


def _run(
    backend: str, mode: str, dtype: torch.dtype, steps: int, device: str = "cuda", **options: object
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, *(n if isinstance(n, tuple) else (n,)), generator=generator) for n in (*SIZES, *MATRICES)]
    params = [torch.nn.Parameter(value[0].to(device, dtype)) for value in values]
    importance = [value[1].square().to(device) for value in values]
    optimizer = AlrAdamW(
        params, importance, mode=mode, record=True, lr=1e-2, weight_decay=0.1, backend=backend, **options
    )
    for step in range(steps):
        for param, value in zip(params, values, strict=True):
            param.grad = (value[1] * (step + 1)).to(device, dtype)
        optimizer.step()
    return [t.cpu() for p in params for t in (p.detach(), *optimizer.state[p].values())]


def _assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for expected, got in zip(first, second, strict=True):
        assert expected.dtype is got.dtype
        assert torch.equal(expected, got), f"{int((expected != got).sum())} of {expected.numel()} elements differ"


def _cpu(dtype: torch.dtype) -> str:
    return "native" if not _ops.step_backends("cpu", dtype)["native"] else "reference"


@pytest.mark.parametrize("form", [form for form in FORMS if form != "clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["proximal", "coupled"])
def test_triton_equals_the_cpu_kernel_bit_for_bit(mode: str, dtype: torch.dtype, form: str) -> None:
    """IEEE division and square root, no contraction: the GPU gives the bits that the C++ step gives on the CPU."""
    _assert_same(_run(_cpu(dtype), mode, dtype, 3, "cpu", **FORMS[form]), _run("triton", mode, dtype, 3, **FORMS[form]))


@pytest.mark.parametrize("master", ["split", "stochastic"])
def test_masters_equal_the_cpu_kernel_bit_for_bit(master: str) -> None:
    options = FORMS["few bytes"] | {"master": master}
    dtype = torch.bfloat16
    _assert_same(
        _run(_cpu(dtype), "proximal", dtype, 3, "cpu", **options), _run("triton", "proximal", dtype, 3, **options)
    )


def test_fast_stays_within_its_bound_of_precise() -> None:
    precise = _run("triton", "proximal", torch.float32, 1)
    fast = _run("triton", "proximal", torch.float32, 1, precise=False)
    for expected, got in zip(precise, fast, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", list(FORMS))
def test_graph_replay_equals_eager_bit_for_bit(form: str) -> None:
    """Captured once, replayed with another gradient, learning rate and λ each time."""
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in (*MATRICES, (1000,))]
        lr, reg_lambda = torch.tensor(1e-2, device="cuda"), torch.tensor(1.0, device="cuda")
        optimizer = AlrAdamW(
            params, [p.detach().square() for p in params], lr=lr, reg_lambda=reg_lambda, record=True, capturable=True,
            **FORMS[form],
        )  # fmt: skip
        for param in params:
            param.grad = torch.zeros_like(param)
        graph = torch.cuda.CUDAGraph()

        def feed(step: int, params=params, lr=lr, reg_lambda=reg_lambda) -> None:
            generator = torch.Generator("cuda").manual_seed(step)
            for param in params:
                param.grad.copy_(torch.randn(param.shape, device="cuda", generator=generator))
            lr.fill_(1e-2 / (step + 1))
            reg_lambda.fill_(1.0 + step)

        for step in range(2):
            feed(step)
            optimizer.step()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(2, 6):
            feed(step)
            graph.replay() if captured else optimizer.step()
        assert optimizer.recorded_steps == 6
        results.append([t.cpu() for p in params for t in (p.detach(), *optimizer.state[p].values())])
    _assert_same(*results)


def test_many_tensors_take_one_launch_and_schedules_never_recompile() -> None:
    params = [torch.nn.Parameter(torch.randn(16, 256, device="cuda")) for _ in range(448)]
    optimizer = AlrAdamW(params, [torch.ones_like(p) for p in params])
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    builds = _builds()
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        optimizer.param_groups[0]["reg_lambda"] = 1.0 + step
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        launches = [event for event in profile.events() if "step_kernel" in event.name]
        assert len(launches) == 1
    assert _builds() == builds


def _builds() -> int:
    from alr_kernels.step.triton_kernel import step_kernel

    return sum(len(cache[0]) for cache in step_kernel.device_caches.values())


def test_grad_scaler_skips_and_unscales_without_a_sync() -> None:
    torch.manual_seed(0)
    start = torch.randn(1024, 128, device="cuda")
    grads = [torch.randn_like(start) for _ in range(3)]
    ours, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    scaled = AlrAdamW([ours], [start.square()], record=True, max_grad_norm=1.0)
    unscaled = AlrAdamW([plain], [start.square()], record=True, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.zeros((), device="cuda"))
    for step, grad in enumerate(grads):
        ours.grad = grad * scaler.get_scale()
        if step == 1:
            ours.grad[3, 3] = torch.inf
        else:
            plain.grad = grad.clone()
            unscaled.step()
        scaler.step(scaled)
        scaler.update()
    assert scaled.recorded_steps == 2
    _assert_same([plain.detach(), *unscaled.state[plain].values()], [ours.detach(), *scaled.state[ours].values()])


def test_auto_serves_cuda_with_triton() -> None:
    assert _ops.choose_step_backend("auto", torch.device("cuda"), torch.float32) == "triton"


def test_matches_torch_fused_adamw() -> None:
    torch.manual_seed(0)
    start = torch.randn(100_003, device="cuda")
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = AlrAdamW([ours], lr=1e-2)
    b = torch.optim.AdamW([theirs], lr=1e-2, fused=True)
    for _ in range(17):
        ours.grad = torch.randn_like(start)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    scale = torch.maximum(start.abs(), torch.tensor(1e-2, device="cuda"))
    ulp = torch.finfo(torch.float32).eps * scale
    assert float(((ours - theirs).abs() / ulp).max()) <= 10


def _importance_kernels_are_there() -> None:
    if reason := importance_native.unavailable_reason("cuda"):
        pytest.fail(f"the CUDA part of the extension is missing: {reason}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulate_matches_the_reference(dtype: torch.dtype) -> None:
    _importance_kernels_are_there()
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(n, generator=generator).to("cuda", dtype) for n in SIZES]
    before = [(p.float() + 0.01 * torch.randn(p.shape, generator=generator).cuda()).to(dtype) for p in params]
    grads = [torch.randn(p.shape, generator=generator).to("cuda", dtype) for p in params]
    results = []
    for module in (importance_reference, importance_native):
        omega = [torch.zeros(p.shape, device="cuda") for p in params]
        previous = [b.clone() for b in before]
        module.accumulate_(omega, grads, params, previous, maximize=True)
        assert all(torch.equal(a, b) for a, b in zip(previous, params, strict=True))
        results.append(omega)
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)


KEPT = ("fp32", "bf16", "fp16", "int8", "int4")


def _recording(dtype: torch.dtype) -> tuple[list[torch.Tensor], ...]:
    """Return ω, θ and θ_start, on every shape once a format that it takes, and the formats; some ω are not finite."""
    generator = torch.Generator().manual_seed(1)
    rows = [(n, kept) for n in SIZES for kept in KEPT[:3]] + [(shape, kept) for shape in MATRICES for kept in KEPT]
    columns: tuple[list[torch.Tensor], ...] = ([], [], [])
    for shape, _ in rows:
        draws = torch.randn(4, *(shape if isinstance(shape, tuple) else (shape,)), generator=generator)
        omega = draws[0] * torch.exp(3 * draws[1]) * 1e-14
        if omega.numel() > 8:
            omega.view(-1)[[2, 5, 7]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        for column, values in zip(
            columns, (omega, (draws[2] * 0.02).to(dtype), (draws[3] * 0.02).to(dtype)), strict=True
        ):
            column.append(values.cuda())
    return (*columns, [kept for _, kept in rows])


def _assert_same_importance(first, second, *, exactly: bool = True) -> None:
    for i, (expected, got) in enumerate(zip(first[0], second[0], strict=True)):
        assert expected.format == got.format
        if exactly:
            assert torch.equal(expected.values, got.values), f"tensor {i}, {got.format} {tuple(got.shape)}"
            assert expected.scales is None or torch.equal(expected.scales, got.scales), f"scales of tensor {i}"
    if exactly:
        assert torch.equal(first[2], second[2]), "histograms"
    torch.testing.assert_close(second[1][:, 1:], first[1][:, 1:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finalise_into_each_format_matches_the_reference(dtype: torch.dtype, relative: bool) -> None:
    _importance_kernels_are_there()
    omega, params, starts, formats = _recording(dtype)
    expected, got, again = (
        module.finalise(omega, params, starts, formats, 1e-3, relative=relative)
        for module in (importance_reference, importance_native, importance_native)
    )
    _assert_same_importance(expected, got, exactly=not relative)  # the mean move is summed in another order
    _assert_same_importance(got, again)
    assert torch.equal(got[1], again[1]), "statistics of two runs"


@pytest.mark.parametrize("weights", [(0.3, 1.7), None])
def test_merge_matches_the_reference(weights: tuple[float, float] | None) -> None:
    _importance_kernels_are_there()
    generator = torch.Generator("cuda").manual_seed(5)
    first, second, formats = [], [], []
    for shape in (*MATRICES, (1_000_003,)):
        kinds = KEPT if len(shape) > 1 else KEPT[:3]
        for a in (*kinds, None):
            for b in (*kinds, None):
                for kept in kinds if a or b else ():
                    x, y = torch.rand(2, *shape, device="cuda", generator=generator).pow(8)
                    first.append(a and importance_reference.encoded(x, a))
                    second.append(b and importance_reference.encoded(y, b))
                    formats.append(kept)
        expected, got, again = (
            module.merge(first, second, formats, weights)
            for module in (importance_reference, importance_native, importance_native)
        )
        _assert_same_importance(expected, got)
        _assert_same_importance(got, again)
        assert torch.equal(got[1], again[1])
        first, second, formats = [], [], []


@pytest.mark.parametrize("bits", [4, 8])
def test_encode_and_decode_match_the_reference(bits: int) -> None:
    """Every threshold and its neighbours too: the root that the GPU takes is another one."""
    _importance_kernels_are_there()
    edges = codecs_reference.thresholds(2**bits - 1)
    values = torch.cat([edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(9.0))])
    blocks = [torch.cat([v, torch.zeros(127 - len(v)), torch.ones(1)]) for v in values.split(100)]
    odd = torch.rand(4, 128)
    odd[0, 3], odd[1, 100], odd[2], odd[3] = torch.nan, torch.inf, 0.0, 1e-40
    importance = torch.cat([torch.stack(blocks), odd, torch.rand(4096, 128).pow(12)])
    codes, scales, _ = _ops.merge([Encoded.dense(importance.cuda())], [None], [f"int{bits}"], (1.0, 0.0))[0][0]
    expected = codecs_reference.encode_importance(importance, bits)
    assert torch.equal(codes.cpu(), expected[0])
    assert torch.equal(scales.cpu().nan_to_num(-1.0), expected[1].nan_to_num(-1.0))
    decoded = codecs_native.decode_importance(codes, scales, bits).cpu()
    assert torch.equal(decoded.nan_to_num(-1.0), codecs_reference.decode_importance(*expected, bits).nan_to_num(-1.0))


FISHER_SHAPES = (
    (3, 7, 13, 17),  # nothing aligned
    (3, 40, 64, 128),
    (129, 1, 72, 136),  # one token a sample
    (2, 33, 257, 1000),
    (2, 17, 1536, 1544),  # enough for the large tile
)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", FISHER_SHAPES, ids=str)
def test_fisher_kernel_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, power: int) -> None:
    if reason := importance_native.unavailable_reason("cuda"):
        pytest.fail(f"the CUDA part of the extension is missing: {reason}")
    samples, tokens, rows, columns = shape
    generator = torch.Generator().manual_seed(5)
    deltas = torch.randn(samples, tokens, rows, generator=generator).to("cuda", dtype)
    inputs = torch.randn(samples, tokens, columns, generator=generator).to("cuda", dtype)
    start = torch.rand(rows, columns, generator=generator).cuda()
    expected, size = start.double(), torch.zeros(rows, columns, dtype=torch.float64, device="cuda")
    for delta, x in zip(deltas.double(), inputs.double(), strict=True):
        expected += 0.25 * (delta.T @ x).abs().pow(power)
        size += 0.25 * (delta.abs().T @ x.abs()).pow(power)
    results = []
    for _ in range(2):
        results.append(start.clone())
        _ops.fisher_linear_(results[-1], deltas, inputs, 0.25, power)
    assert bool(((results[0].double() - expected).abs() <= 4e-6 * (1 + size)).all())
    assert torch.equal(results[0], results[1])


def test_fisher_kernel_takes_operands_off_alignment() -> None:
    memory = torch.randn(3, 64 * 64 + 1, device="cuda")
    importance, deltas, inputs = (row[1:].abs().view(64, 64) for row in memory)
    expected = importance.double() + (
        deltas.view(4, 16, 64).double().mT @ inputs.view(4, 16, 64).double()
    ).square().sum(0)
    shifted = [torch.empty(64 * 64 + 1, device="cuda")[1:].view(64, 64).copy_(t) for t in (importance, deltas, inputs)]
    _ops.fisher_linear_(shifted[0], shifted[1].view(4, 16, 64), shifted[2].view(4, 16, 64), 1.0)
    torch.testing.assert_close(shifted[0].double(), expected, rtol=1e-5, atol=0)


def test_fisher_importance_on_a_gpu_equals_the_cpu() -> None:
    from alr_kernels import fisher_importance
    from alr_kernels.demo.models import build_model

    ids = torch.randint(256, (3, 4, 32), generator=torch.Generator().manual_seed(6))
    results = []
    for device in ("cpu", "cuda", "cuda"):
        model = build_model("llama", 0).to(device)
        batches = [{"input_ids": batch.to(device), "labels": batch.to(device)} for batch in ids]
        results.append({name: omega.cpu() for name, omega in fisher_importance(model, batches).items()})
    for name, expected in results[0].items():
        assert float((results[1][name] - expected).abs().max()) <= 1e-3 * float(expected.max()), name
        assert torch.equal(results[1][name], results[2][name]), name


def test_side_stream_is_respected() -> None:
    """Work queued on another stream must be ordered with it, not with the default stream."""
    torch.manual_seed(3)
    param = torch.nn.Parameter(torch.randn(1_000_003, device="cuda"))
    optimizer = AlrAdamW([param], [torch.ones_like(param)], record=True)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        param.grad = torch.full_like(param, 0.5)
        optimizer.step()
        done = optimizer.recorded_importance()
    stream.synchronize()
    assert float(done["params.0"].min()) > 0


def test_recorder_with_a_grad_scaler() -> None:
    torch.manual_seed(4)
    model = torch.nn.Linear(64, 64, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    recorder, scaler = ImportanceRecorder(optimizer, model.named_parameters()), torch.amp.GradScaler("cuda", 2.0**10)
    for scale in (1.0, float("inf"), 1.0):  # the second step overflows and is skipped
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(torch.randn(8, 64, device="cuda")).square().mean() * scale
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert recorder.steps == 2
    assert all(row.nonfinite == 0 for row in recorder.finalise().stats.values())


def test_step_reads_no_device_value_on_the_host() -> None:
    """A step must not wait for the GPU."""
    param = torch.nn.Parameter(torch.randn(4099, device="cuda"))
    optimizer = AlrAdamW([param], [torch.ones_like(param)], record=True)
    param.grad = torch.randn_like(param)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.penalty()
    finally:
        torch.cuda.set_sync_debug_mode("default")
