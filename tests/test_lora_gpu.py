"""LoRA in effective space on a CUDA device, against float64 there; `make gpu` runs these."""

from __future__ import annotations

import pytest
import torch
from cases import F32, F64
from lora_cases import case, check_pull, check_record, dense

from alr_kernels import _ops_lora
from alr_kernels.codecs.encoded import Encoded
from alr_kernels.lora import triton_kernel
from alr_kernels.lora.penalty import SIDES
from alr_kernels.lora.reference import Product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make gpu` on one"),
]
# Attention and its key of a Llama, both directions of an MLP, an embedding's odd width, high ranks, nothing aligned.
SHAPES = [
    ((4096, 4096, 8), "int8"),
    ((4096, 1024, 16), "fp32"),
    ((14336, 4096, 8), "int4"),
    ((1024, 4096, 16), "bf16"),
    ((1000, 1536, 64), "int8"),
    ((768, 768, 256), "int8"),
    ((515, 1333, 8), "fp32"),
    ((1, 37, 1), "fp16"),
]
shapes = pytest.mark.parametrize(("shape", "kept"), SHAPES, ids=lambda value: str(value).replace(" ", ""))


def on_gpu(c):
    """Return the case on the device."""
    moved = [Product(*(side.cuda() for side in value)) for value in (c.gradient, c.move, c.drift, c.factors)]
    return c._replace(
        path_integral=c.path_integral.cuda(), gradient=moved[0], move=moved[1],
        importance=c.importance.to("cuda"), drift=moved[2], factors=moved[3],
    )  # fmt: skip


def record(cases, clamp=False, gradients=None, backend="triton"):
    omegas = [c.path_integral.clone() for c in cases]
    gradients = [c.gradient for c in cases] if gradients is None else gradients
    _ops_lora.lora_record_(omegas, gradients, [c.move for c in cases], clamp, backend)
    return omegas


def arguments(cases):
    scales = torch.tensor([c.scale for c in cases], dtype=F64, device="cuda")
    return [c.importance for c in cases], scales, [c.drift for c in cases], [c.factors for c in cases]


def pull(cases, sides="both", curvature=False, backend="triton"):
    return _ops_lora.lora_pull(*arguments(cases), sides, curvature, backend)


def builds():
    """Return how many kernels Triton has compiled or loaded."""
    kernels = (triton_kernel.record_kernel, triton_kernel.pull_kernel)
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def test_auto_serves_cuda_with_triton():
    assert _ops_lora.choose_lora_backend("auto", torch.device("cuda"), F32) == "triton"


@pytest.mark.parametrize("clamp", [False, True])
@shapes
def test_recording_equals_the_dense_formula(shape, kept, clamp):
    c = on_gpu(case(shape))
    check_record(*record([c], clamp), c, clamp=clamp)
    gradient = dense(c.gradient).float()
    check_record(*record([c], clamp, [gradient]), c, gradient, clamp)


@pytest.mark.parametrize("curvature", [False, True])
@shapes
def test_the_pull_equals_the_dense_formula(shape, kept, curvature):
    c = on_gpu(case(shape, kept) if kept != "fp16" else case(shape))
    if kept == "fp16":
        c = c._replace(importance=Encoded.dense(c.importance.values.half()))
    check_pull(*pull([c], curvature=curvature), c, curvature=curvature)


@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("sides", SIDES)
def test_sides_formats_and_ranks_in_one_call(sides, curvature):
    """Several classes, several pairs of each."""
    kinds = [((300, 512, 8), kept) for kept in ("fp32", "bf16", "int8", "int4")]
    kinds += [((257, 640, rank), "int8") for rank in (1, 5, 16, 20, 32, 40, 64)] + [((130, 129, 12), "fp32")]
    cases = [on_gpu(case(*kind, seed=seed)) for seed in range(2) for kind in kinds]
    for got, c in zip(pull(cases, sides, curvature), cases, strict=True):
        check_pull(got, c, sides, curvature)
    for omega, c in zip(record(cases), cases, strict=True):
        check_record(omega, c)


def test_two_runs_give_the_same_bits():
    cases = [on_gpu(case((2048, 1024, 8), "int8", seed=seed)) for seed in range(3)]
    assert all(map(torch.equal, record(cases), record(cases)))
    runs = [pull(cases, curvature=True) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert all(map(torch.equal, first, second))


def test_operands_off_alignment():
    c = on_gpu(case((300, 512, 8), "int8"))
    expected = c.path_integral.clone()
    storage = torch.full((300 * 512 + 9,), 7.0, device="cuda")
    omega = storage[5:-4].view(300, 512).copy_(expected)
    _ops_lora.lora_record_([omega], [c.gradient], [c.move], backend="triton")
    check_record(omega, c)
    assert bool((storage[:5] == 7).all())
    assert bool((storage[-4:] == 7).all())
    codes = torch.empty(300 * 512 + 3, dtype=torch.uint8, device="cuda")[3:].view(300, 512)
    c = c._replace(importance=c.importance._replace(values=codes.copy_(c.importance.values)))
    check_pull(*pull([c]), c)


def test_sizes_never_recompile():
    """Rows, columns, pairs and ranks of one class share a kernel."""
    first = [on_gpu(case((256, 256, 8), "int8"))]
    record(first)
    pull(first)
    found = builds()
    for shape, pairs in (((1024, 512, 8), 3), ((100, 128, 3), 1), ((33, 384, 1), 2), ((128, 16 * 128, 7), 1)):
        cases = [on_gpu(case(shape, "int8", seed=seed)) for seed in range(pairs)]
        record(cases)
        pull(cases)
    assert builds() == found


def test_nothing_is_read_on_the_host():
    """Neither op waits for the device, whatever changed since the last call but ω and Ω themselves."""
    cases = [on_gpu(case((512, 512, rank), "int8", seed=rank)) for rank in (8, 8, 16, 100)]
    dense_gradients = [dense(c.gradient).float() for c in cases]
    omegas, lists = [c.path_integral.clone() for c in cases], arguments(cases)
    moves = [c.move for c in cases]

    def both():
        _ops_lora.lora_record_(omegas, [c.gradient for c in cases], moves, backend="triton")
        _ops_lora.lora_record_(omegas, dense_gradients, moves, True, backend="triton")
        return _ops_lora.lora_pull(*lists, "both", True, "triton")

    both()
    both()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, c in zip(got, cases, strict=True):
        check_pull(result, c, curvature=True)


def test_a_captured_graph_replays_with_other_factors():
    c = on_gpu(case((512, 384, 8), "int8"))
    omega, lists = c.path_integral.clone(), arguments([c])

    def both():
        _ops_lora.lora_record_([omega], [c.gradient], [c.move], backend="triton")
        return _ops_lora.lora_pull(*lists, "both", False, "triton")

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (got,) = both()
    other = on_gpu(case((512, 384, 8), "int8", seed=1))
    for mine, theirs in zip((c.gradient, c.move, c.drift, c.factors),
                            (other.gradient, other.move, other.drift, other.factors), strict=True):  # fmt: skip
        for side, new in zip(mine, theirs, strict=True):
            side.copy_(new)
    omega.copy_(c.path_integral)
    graph.replay()
    check_record(omega, c)
    check_pull(got, c)


def test_a_side_stream_is_respected():
    c = on_gpu(case((512, 512, 8)))
    omega = c.path_integral.clone()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        omega.copy_(c.path_integral * 2)
        _ops_lora.lora_record_([omega], [c.gradient], [c.move], backend="triton")
    stream.synchronize()
    check_record(omega, c._replace(path_integral=c.path_integral * 2))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_pairs_on_another_device():
    c = on_gpu(case((512, 512, 8)))
    gradient, move = (Product(*(side.to("cuda:1") for side in p)) for p in (c.gradient, c.move))
    omega = c.path_integral.to("cuda:1")
    _ops_lora.lora_record_([omega], [gradient], [move], backend="triton")
    check_record(omega.to("cuda:0"), c)
