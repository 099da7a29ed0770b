"""The registered ops and their dispatch: schemas, explicit backends, life without the extension, operands' strides."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import (
    BACKENDS,
    BF16,
    COLUMNS,
    F32,
    F64,
    MODES,
    Case,
    assert_same_columns,
    formed,
    numbers_of,
    operands,
    same_bits,
    take_step,
    tiny_model,
)

from alr_kernels import AlrAdamW, BackendUnavailableError, _ops
from alr_kernels.step.plan import HYPER as HYPER_NAMES
from alr_kernels.step.plan import MUTATED, STATISTICS, Numbers, Operands, Options

ROOT = Path(__file__).parent.parent
modes = pytest.mark.parametrize("mode", MODES)
backends = pytest.mark.parametrize("backend", BACKENDS)


CASES = [
    Case(),
    Case(mode="coupled", statistics=True, clip=0.3, inverse_scale=0.5, maximize=True),
    Case(importance="none", record=False),
    Case("split", "bf16", "int8", "int4", "bf16", statistics=True),
    Case("stochastic", "bf16", "bf16", "int8", "fp16", record=False),
]
OFFSETS = [2**33, 128, 0]  # of shards
cases = pytest.mark.parametrize("case", CASES, ids=["plain", "coupled", "no penalty", "split", "stochastic"])


def step_arguments(case, backend):
    """Return what the registered op takes, in the order of its schema."""
    columns = formed(case, ((3, 256), (1, 128), (0, 128)) if case.coded else ((3, 4), (17,), (0,)))
    lists = [[tensor.clone() for tensor in columns[name]] for name in COLUMNS]
    hyper = {"clip": case.clip, "inverse_scale": case.inverse_scale}
    numbers = numbers_of(columns, [1.0, 2.0, 3.0], offsets=OFFSETS, **hyper)
    statistics = torch.zeros(3, len(STATISTICS), dtype=F64) if case.statistics else None
    rest = (numbers.steps, numbers.hyper, numbers.unit_scales, numbers.keys, numbers.offsets, statistics)
    return (*lists, *rest, *case.options, backend)


def structured(arguments):
    """Return the same for ``_ops.step_``."""
    n = len(COLUMNS)
    steps, hyper, unit_scales, keys, offsets, statistics, *options, backend = arguments[n:]
    numbers = Numbers(hyper, steps, unit_scales, keys, offsets)
    return Operands(*arguments[:n]), numbers, Options(*options), statistics, backend


def assert_same_arguments(arguments, expected):
    for name, got, wanted in zip(COLUMNS, arguments, expected, strict=False):
        assert all(map(same_bits, got, wanted)), name
    statistics, wanted = arguments[len(COLUMNS) + 5], expected[len(COLUMNS) + 5]
    assert wanted is None or torch.equal(statistics, wanted)


@backends
@cases
def test_opcheck_step(backend, case):
    torch.library.opcheck(torch.ops.alr_kernels.step_.default, step_arguments(case, backend))


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_opcheck_importance(dtype):
    columns = operands(dtype, dtype, shapes=((3, 4), (17,)))
    omega, grads, params, starts = (
        [t.clone() for t in columns[name]] for name in ("path_integrals", "grads", "params", "anchors")
    )
    torch.library.opcheck(torch.ops.alr_kernels.accumulate_.default, (omega, grads, params, starts, True))
    formats = ["fp64" if dtype is F64 else "bf16"] * 2
    torch.library.opcheck(torch.ops.alr_kernels.finalise.default, (omega, params, starts, formats, 1e-3, True))


def test_schemas_say_what_is_mutated():
    mutated = {
        op: [a.name for a in getattr(torch.ops.alr_kernels, op).default._schema.arguments if a.alias_info is not None]
        for op in ("step_", "accumulate_", "finalise", "merge")
    }
    assert mutated == {
        "step_": [*MUTATED, "statistics"],
        "accumulate_": ["path_integrals", "previous"],
        "finalise": [],
        "merge": [],
    }


def test_schema_lists_what_plan_declares():
    names = [argument.name for argument in torch.ops.alr_kernels.step_.default._schema.arguments]
    options = ["penalty_mode", *Options._fields[1:]]
    assert names == [*COLUMNS, "steps", "hyper", "unit_scales", "keys", "offsets", "statistics", *options, "backend"]


@backends
@cases
def test_registered_op_is_the_function(backend, case):
    arguments, expected, start = (step_arguments(case, backend) for _ in range(3))
    torch.ops.alr_kernels.step_(*arguments)
    _ops.step_(*structured(expected))
    assert_same_arguments(arguments, expected)
    for name, before, after in zip(COLUMNS, start, arguments, strict=False):
        changed = not all(map(same_bits, before, after))
        assert changed == (name in MUTATED and len(after) > 0), name


def test_backend_may_be_left_out():
    arguments, expected = step_arguments(Case(), "auto"), step_arguments(Case(), "auto")
    torch.ops.alr_kernels.step_(*arguments[:-1])
    _ops.step_(*structured(expected)[:-1])
    assert_same_arguments(arguments, expected)


def test_op_with_nothing_to_do():
    nothing = Numbers(torch.zeros(len(HYPER_NAMES), dtype=F64), [], torch.zeros(0, dtype=F64), [])
    _ops.step_(Operands([], [], [], []), nothing)
    _ops.accumulate_([], [], [], [])
    assert _ops.finalise([], [], [], [], 1e-3)[0] == []
    assert _ops.merge([], [], [])[0] == []


@backends
def test_mutation_is_seen_by_autograd(backend):
    """A weight that changes in place between forward and backward must be an error, not a wrong gradient."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = AlrAdamW([("w", weight)], backend=backend)
    weight.grad = torch.ones(3)
    loss = (weight * weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------- who serves what


def test_explicit_backend_that_cannot_serve_says_why():
    wide = [torch.nn.Parameter(torch.ones(2, dtype=F64))]
    with pytest.raises(
        BackendUnavailableError, match=r"backend='native' cannot step torch\.float64.*reference.*doctor"
    ):
        AlrAdamW(wide, backend="native")
    if reason := _ops.step_backends("cpu", F32)["triton"]:
        with pytest.raises(BackendUnavailableError, match=r"triton.*on cpu") as caught:
            AlrAdamW(tiny_model().parameters(), backend="triton")
        assert reason in str(caught.value)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16, F64], ids=str)
def test_auto_takes_the_best_that_serves(dtype):
    table = _ops.step_backends("cpu", dtype)
    assert list(table) == ["native", "reference", "triton"]
    chosen = _ops.choose_step_backend("auto", torch.device("cpu"), dtype)
    assert chosen == ("reference" if table["native"] else "native")
    assert table["reference"] == ""
    if dtype == F64:
        assert chosen == "reference"


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps", "meta"])
def test_reference_serves_every_device(device):
    for table in (_ops.step_backends(device, F32), _ops.importance_backends(device, F32)):
        assert table["reference"] == ""
        assert all(isinstance(reason, str) for reason in table.values())
    assert device == "cpu" or _ops.step_backends(device, F32)["native"] == f"it serves CPU parameters, not {device}"


def test_mixed_dtypes_in_one_group():
    params = [torch.nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (F32, BF16, F64, torch.float16)]
    optimizer = AlrAdamW(params, [torch.ones(4)] * 4, lr=0.1, record=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert float(params[2].detach()[0]) < 0.95
    for param in params:
        assert torch.allclose(param.detach().double(), params[2].detach(), atol=5e-3)
    assert optimizer.state[params[2]]["exp_avg"].dtype == F64


HIDDEN = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "alr_kernels._C" or name.split(".")[0] == "triton":
            raise ImportError(f"{name} is hidden")
sys.meta_path.insert(0, Blocker())
import torch
import alr_kernels
from alr_kernels import _ops
sys.path.insert(0, sys.argv[1])
from cases import tiny_model, tiny_optimizer, train
table = _ops.step_backends("cpu", torch.float32)
assert table["reference"] == "" and "hidden" in table["native"] and "hidden" in table["triton"], table
assert "pip install" in table["native"] and "doctor" in table["native"], table
model = tiny_model()
optimizer = tiny_optimizer(model, record=True)
train(model, optimizer, 3)
torch.save([p.detach() for p in model.parameters()] + list(optimizer.recorded_importance().values()), sys.argv[2])
for backend in ("native", "triton"):
    try:
        tiny_optimizer(model, backend=backend)
    except alr_kernels.BackendUnavailableError as error:
        assert "hidden" in str(error) and backend in str(error), error
    else:
        raise AssertionError(backend)
"""


def test_without_extension_and_triton_the_reference_serves(tmp_path):
    from cases import tiny_optimizer, train

    path = tmp_path / "results.pt"
    command = [sys.executable, "-c", HIDDEN, str(Path(__file__).parent), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = tiny_model()
    optimizer = tiny_optimizer(model, record=True)
    train(model, optimizer, 3)
    expected = [p.detach() for p in model.parameters()] + list(optimizer.recorded_importance().values())
    assert all(map(same_bits, torch.load(path, weights_only=True), expected))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=["plain", "split"])
def test_compiled_function_calls_the_op(compiler, case):
    """torch.compile traces the op through its fake, without a graph break; both compilers generate no code."""
    arguments, expected = step_arguments(case, "reference"), step_arguments(case, "reference")
    n = len(COLUMNS)
    options, backend = Options(*arguments[n + 6 : -1]), arguments[-1]

    def run(lists, steps, hyper, unit_scales, statistics):
        numbers = Numbers(hyper, steps, unit_scales, [0, 1, 2], OFFSETS)
        _ops.step_(Operands(*lists), numbers, options, statistics, backend)

    torch._dynamo.reset()
    steps, hyper, unit_scales, _, _, statistics = arguments[n : n + 6]
    torch.compile(run, backend=compiler, fullgraph=True)(arguments[:n], steps, hyper, unit_scales, statistics)
    _ops.step_(*structured(expected))
    assert_same_arguments(arguments, expected)


@backends
@cases
def test_poisoned_operands_do_not_leak(backend, case):
    """Each operand is read where it is, not what lies around it."""
    columns = formed(case, ((3, 256),) if case.coded else ((5,),))
    clean = {name: [tensor.clone() for tensor in tensors] for name, tensors in columns.items()}
    for lists in (columns, clean):
        take_step(lists, backend, [1.0], case.options)
    assert_same_columns(columns, clean)
    assert all(bool(torch.isfinite(t).all()) for name in COLUMNS for t in columns[name])


# ---------------------------------------------------------------- strides


def with_holes(values):
    """Return a view with NaN between its elements."""
    storage = torch.full((*values.shape[:-1], values.shape[-1] * 2), math.nan, dtype=values.dtype)
    view = storage[..., ::2]
    return view.copy_(values)


def transposed(values):
    return values.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": transposed,
    "holes": with_holes,
    "row": lambda t: torch.full((t.numel() + 9,), math.nan, dtype=t.dtype)[5 : 5 + t.numel()].view(t.shape).copy_(t),
}


def layout_run(shape, param_layout, grad_layout, backend, mode, dtype=F32):
    """Return everything that three recorded, penalised steps left behind, by name."""
    generator = torch.Generator().manual_seed(5)
    param = torch.nn.Parameter(param_layout(torch.randn(shape, generator=generator).to(dtype)))
    other = torch.nn.Parameter(torch.ones(2))  # an importance without any element is refused
    importance = [torch.exp(torch.randn(shape, generator=generator)), torch.ones(2)]
    optimizer = AlrAdamW([("w", param), ("v", other)], importance, lr=1e-2, mode=mode, backend=backend, record=True)
    grad_layout = grad_layout or (lambda t: t)
    for _ in range(3):
        param.grad = grad_layout(torch.randn(shape, generator=generator).to(dtype))
        optimizer.step()
    recorded = optimizer.recorded_importance()["w"]
    return {"param": param.detach(), "importance": recorded, **optimizer.state[param]}


def assert_same_run(got, expected):
    assert set(got) == set(expected)
    for name, value in got.items():
        assert same_bits(value, expected[name]), name


@backends
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("grads", LAYOUTS)
@pytest.mark.parametrize("params", LAYOUTS)
def test_strides_change_no_bit(backend, params, grads, dtype):
    shape = (6, 4, 3, 5)
    mode = MODES[len(params + grads) % 2]
    expected = layout_run(shape, LAYOUTS["contiguous"], LAYOUTS["contiguous"], backend, mode, dtype)
    got = layout_run(shape, LAYOUTS[params], LAYOUTS[grads], backend, mode, dtype)
    assert_same_run(got, expected)
    storage = torch.empty(0, dtype=dtype).set_(got["param"].untyped_storage())
    outside = {"holes": expected["param"].numel(), "row": 9}.get(params, 0)
    assert int(storage.isnan().sum()) == outside, "memory between or around the elements was written"


@backends
@modes
def test_expanded_gradient_of_a_sum(backend, mode):
    """``loss = w.sum()`` gives a gradient with strides 0."""

    def expanded(t):
        return torch.ones((), dtype=t.dtype).expand(t.shape)

    def dense(t):
        return torch.ones_like(t)

    assert expanded(torch.empty(7, 5)).stride() == (0, 0)
    runs = [layout_run((7, 5), transposed, layout, backend, mode) for layout in (expanded, dense)]
    assert_same_run(*runs)


@backends
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1)], ids=str)
def test_zero_dimensional_and_empty(backend, shape):
    assert_same_run(
        layout_run(shape, torch.clone, None, backend, "proximal"),
        layout_run(shape, torch.clone, None, "reference", "proximal"),
    )


@backends
@pytest.mark.parametrize("layout", ["transposed", "holes", "channels_last"])
def test_importance_and_anchor_in_any_layout(backend, layout):
    """What the user hands in need not be laid out as the parameter, nor in its dtype."""
    shape, results = (6, 4, 3, 5), []
    for arrange in (torch.clone, LAYOUTS[layout]):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(shape))
        importance, anchor = arrange(torch.rand(shape, dtype=F64)), arrange(torch.randn(shape, dtype=F64))
        optimizer = AlrAdamW([("w", param)], {"w": importance}, anchor={"w": anchor}, backend=backend)
        param.grad = torch.randn(shape)
        optimizer.step()
        results.append({"param": param.detach(), **optimizer.state[param]})
    assert_same_run(*results)


@backends
def test_parameter_with_overlapping_elements_is_refused(backend):
    param = torch.nn.Parameter(torch.ones(4).expand(3, 4))
    optimizer = AlrAdamW([("w", param)], backend=backend)
    param.grad = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match=r"'w'.*share memory.*contiguous"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3, 4))
    assert not optimizer.state.get(param)
