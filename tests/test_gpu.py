"""What only a CUDA device can show; `make gpu` runs these. Formulas are tested on the CPU, on the same kernels."""

from __future__ import annotations

import pytest
import torch

from alr_kernels import AlrAdamW, ImportanceRecorder, _ops
from alr_kernels.importance import native as importance_native
from alr_kernels.importance import reference as importance_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make gpu` on one"),
]
SIZES = (0, 1, 17, 1023, 1024, 1025, 65_537, 1_000_003)
STATE = ("exp_avg", "exp_avg_sq", "path_integral")


def _run(backend: str, mode: str, dtype: torch.dtype, steps: int, device: str = "cuda") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, n, generator=generator) for n in SIZES]
    params = [torch.nn.Parameter(value[0].to(device, dtype)) for value in values]
    importance = [value[1].square().to(device) for value in values]
    optimizer = AlrAdamW(params, importance, mode=mode, record=True, lr=1e-2, weight_decay=0.1, backend=backend)
    for step in range(steps):
        for param, value in zip(params, values, strict=True):
            param.grad = (value[1] * (step + 1)).to(device, dtype)
        optimizer.step()
    return [tensor.cpu() for p in params for tensor in (p.detach(), *(optimizer.state[p][key] for key in STATE))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["proximal", "coupled"])
def test_triton_equals_the_cpu_kernel_bit_for_bit(mode: str, dtype: torch.dtype) -> None:
    """IEEE division and square root, no contraction: the GPU gives the bits that the C++ step gives on the CPU."""
    cpu = "native" if not _ops.step_backends("cpu", dtype)["native"] else "reference"
    for expected, got in zip(_run(cpu, mode, dtype, 3, "cpu"), _run("triton", mode, dtype, 3), strict=True):
        assert torch.equal(expected, got)


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


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_importance_kernels_match_the_reference(dtype: torch.dtype, relative: bool) -> None:
    if reason := importance_native.unavailable_reason("cuda"):
        pytest.fail(f"the CUDA part of the extension is missing: {reason}")
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
        results.append((omega, *module.finalise(omega, params, before, 1e-3, relative=relative)))
    for expected, got in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(expected, got)
    for expected, got in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-10, atol=1e-300)


def test_importance_is_the_same_in_two_runs() -> None:
    torch.manual_seed(2)
    omega, param, start = (torch.randn(3, 1_000_003, device="cuda")).unbind()
    first = importance_native.finalise([omega], [param], [start], 1e-6)
    second = importance_native.finalise([omega], [param], [start], 1e-6)
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[1], second[1])


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
    recorder = ImportanceRecorder(optimizer, model.named_parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
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
