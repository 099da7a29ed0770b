"""Optimizer state in few bytes: what is kept in which form, what it costs, and that it is the op's."""

from __future__ import annotations

import gc
import weakref

import oracle
import pytest
import torch
from cases import (
    BF16,
    COLUMNS,
    F32,
    F64,
    assert_same_columns,
    assert_same_state,
    encoded,
    members,
    random_importance,
    same_bits,
    set_grads,
    take_step,
)
from forms import FORMS, LARGE, backends, fitting, forms, mixed_model, new, steps
from torch import nn

from alr_kernels import AlrAdamW
from alr_kernels.step.plan import Options

# ---------------------------------------------------------------- forms


@pytest.mark.parametrize("as_dtype", [False, True], ids=("string", "torch dtype"))
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_importance_has_the_promised_form(kind, as_dtype):
    if as_dtype and kind == "int4" and not hasattr(torch, "int4"):
        pytest.skip("torch has no int4")
    given = {"fp32": F32, "bf16": BF16, "int8": torch.int8, "int4": getattr(torch, "int4", None)}[kind]
    model = mixed_model()
    optimizer = new(model, importance_dtype=given if as_dtype else kind)
    steps(optimizer, 0, 1)
    importance = random_importance(model)
    tensors = iter(optimizer.importance_tensors())
    for name, param in model.named_parameters():
        found, form = next(tensors), fitting(name, kind, "fp32")
        if form in ("fp32", "bf16"):
            assert same_bits(found, importance[name].to(F32 if form == "fp32" else BF16)), name
            continue
        scales = next(tensors)
        *rows, last = param.shape
        assert (found.dtype, found.shape) == (torch.uint8, (*rows, last // (2 if form == "int4" else 1))), name
        assert (scales.dtype, scales.shape) == (BF16, (*rows, last // 128)), name
        bits = 4 if form == "int4" else 8
        codes = oracle.unpack(found) if bits == 4 else found
        assert same_bits(scales.double(), oracle.code_scales(importance[name], f"importance {bits}")), name
        off = codes.double() - oracle.encode(importance[name], f"importance {bits}")[0]
        assert off.abs().max() <= 1, name
        assert off.count_nonzero() < 5, f"{name}: more than ties differ"
    assert next(tensors, None) is None


@pytest.mark.parametrize("as_dtype", [False, True], ids=("string", "torch dtype"))
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_moments_have_the_promised_form(kind, dtype, as_dtype):
    model = mixed_model(dtype)
    given = {"fp32": F32, "bf16": BF16, "int8": torch.int8}[kind]
    optimizer = new(model, state_dtype=given if as_dtype else kind, record=True)
    steps(optimizer, 0, 1)
    for name, param in model.named_parameters():
        form = fitting(name, kind, "fp32")
        state = optimizer.state[param]
        wide = {"fp32": F32, "bf16": BF16}.get(form)
        expected = {
            "step": (F32, ()), "anchor": (dtype, param.shape), "start": (dtype, param.shape),
            "path_integral": (F32, param.shape), "exp_avg": (wide or torch.int8, param.shape),
            "exp_avg_sq": (wide or torch.uint8, param.shape),
        }  # fmt: skip
        if form == "int8":
            scales = (F32, (*param.shape[:-1], param.shape[-1] // 128))
            expected |= {"exp_avg_scale": scales, "exp_avg_sq_scale": scales}
        assert {key: (value.dtype, value.shape) for key, value in state.items()} == expected, name
        assert param.dtype == dtype


@pytest.mark.parametrize("given", [None, "fp32", "bf16", F32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_anchors_have_the_promised_form(dtype, given):
    model = mixed_model(dtype)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = new(model, anchor_dtype=given)
    steps(optimizer, 0, 1)
    for name, param in model.named_parameters():
        asked = {None: dtype, "fp32": F32, "bf16": BF16}.get(given, given)
        expected = asked if name in LARGE else dtype
        assert same_bits(optimizer.state[param]["anchor"], start[name].to(expected)), name


@pytest.mark.parametrize("master", ["none", "split", "stochastic"])
def test_a_remainder_stands_beside_split_bf16_parameters_alone(master):
    model = mixed_model(BF16)
    model.layers[1].float()
    optimizer = new(model, master=master)
    steps(optimizer, 0, 2)
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        assert ("remainder" in state) is (master == "split" and param.dtype == BF16), name
        assert all(t.dtype == torch.int16 and t.shape == param.shape for t in [state.get("remainder")] if t is not None)
    assert master != "split" or optimizer.state[model.head.bias]["remainder"].any()


@pytest.mark.parametrize("record", [False, True])
def test_frozen_parameters_get_a_remainder_when_they_first_step(record):
    """A frozen model under LoRA would otherwise pay two bytes a parameter for nothing."""
    models = mixed_model(BF16), mixed_model(BF16)
    optimizers = [AlrAdamW(m.named_parameters(), master="split", record=record, lr=1e-2) for m in models]
    models[0].layers[0].requires_grad_(False)
    for optimizer, model in zip(optimizers, models, strict=True):
        set_grads(optimizer, 0)
        for param in model.layers[0].parameters():
            param.grad = None
        optimizer.step()
    assert not any(optimizers[0].state[param] for param in models[0].layers[0].parameters())
    models[0].layers[0].requires_grad_(True)
    for optimizer in optimizers:
        steps(optimizer, 1, 3)
    assert_same_state(*optimizers)
    assert optimizers[0].state[models[0].layers[0].weight]["remainder"].any()


def test_float64_parameters_stay_float64():
    model = mixed_model(F64)
    optimizer = new(model, importance_dtype="int4", anchor_dtype="bf16", state_dtype="int8", record=True)
    plain = new(twin := mixed_model(F64), record=True)
    for each in (optimizer, plain):
        steps(each, 0, 2)
    assert_same_state(optimizer, plain)
    assert all(value.dtype == F64 for s in optimizer.state.values() for key, value in s.items() if key != "step")
    assert {t.dtype for t in optimizer.importance_tensors()} == {F64}
    assert len(list(twin.parameters())) == len(optimizer.state)


def test_repr_counts_what_stays_wide():
    model = mixed_model(BF16)
    text = repr(new(model, importance_dtype="int4", anchor_dtype="bf16", state_dtype="int8", master="split"))
    assert "importance int4, anchor bf16, moments int8, master split, 5 of 7 moments stay wider" in text
    assert "4 of 7 moments" in repr(new(model, state_dtype=BF16))  # rows need no blocks
    assert "5 of 7 importances" in repr(new(model, importance_dtype="int8"))
    plain = repr(new(model))
    assert "importance as given, anchor as param, moments fp32" in plain
    assert "stay wider" not in plain


# ---------------------------------------------------------------- bytes


def tensors_alive():
    gc.collect()
    return [item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter)]


def nbytes(tensors):
    """Return the bytes of the storages of tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held_by(root):
    """Return the tensors that are reached from an object by way of containers and instances."""
    seen, found, front = set(), [], [root]
    while front:
        item = front.pop()
        if id(item) in seen or isinstance(item, (type, type(gc), type(held_by))):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        else:
            front += gc.get_referents(item)
    return found


@backends
def test_all_that_is_added_to_a_bf16_model_is_less_than_seven_bytes_a_parameter(backend):
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(512, 256) for _ in range(2))}).to(BF16)
    numel = sum(p.numel() for p in model.parameters())
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    before = nbytes(tensors_alive())
    importance = random_importance(model)
    let_go = [weakref.ref(tensor) for tensor in importance.values() if tensor.numel() >= 4096]
    optimizer = AlrAdamW(model.named_parameters(), importance, backend=backend, **FORMS["smallest"][1])
    optimizer.step()
    del importance
    gc.collect()
    assert not any(tensor() is not None for tensor in let_go), "the optimizer keeps the fp32 importance"
    added = nbytes(tensors_alive()) - before
    own = {id(tensor) for param in model.parameters() for tensor in (param, param.grad)}
    held = nbytes(tensor for tensor in held_by(optimizer) if id(tensor) not in own)
    assert 6.5 < held / numel <= 6.8  # 0.5 + 2/128, 2, 2 + 8/128, 2; vectors are wider
    assert held <= added <= 6.8 * numel, "something outlives the step that the optimizer does not hold"
    assert nbytes(optimizer.importance_tensors()) / numel == pytest.approx(0.5 + 2 / 128, rel=0.03)


# ---------------------------------------------------------------- against the op


def op_columns(name, param, importance, form, record):
    """Return one parameter's operands before its first step, as the options of ``form`` promise them."""
    dtype, options = FORMS[form]
    columns = {column: [] for column in COLUMNS}
    columns["params"].append(param.detach().clone())
    moments = fitting(name, options.get("state_dtype", "fp32"), "fp32")
    kinds = {"fp32": (F32, F32), "bf16": (BF16, BF16), "int8": (torch.int8, torch.uint8)}[moments]
    for key, kind in zip(("exp_avg", "exp_avg_sq"), kinds, strict=True):
        columns[f"{key}s"].append(torch.zeros(param.shape, dtype=kind))
        if moments == "int8":
            columns[f"{key}_scales"].append(torch.zeros(*param.shape[:-1], param.shape[-1] // 128))
    kept = fitting(name, options["importance_dtype"], "fp32")
    if kept in ("int8", "int4"):
        codes, scales = encoded(importance, int(kept[3:]))
        columns["importances"].append(codes)
        columns["importance_scales"].append(scales)
    else:
        columns["importances"].append(importance.to(F32 if kept == "fp32" else BF16))
    anchor = {"fp32": F32, "bf16": BF16, None: dtype}[options.get("anchor_dtype")] if name in LARGE else dtype
    columns["anchors"].append(param.detach().to(anchor, copy=True))
    if options.get("master") == "split":
        columns["remainders"].append(torch.zeros(param.shape, dtype=torch.int16))
    if record:
        columns["path_integrals"].append(torch.zeros(param.shape))
    return columns


@backends
@forms
@pytest.mark.parametrize("record", [True, False], ids=("record", "tune"))
def test_two_steps_are_those_of_the_op(form, backend, record):
    dtype, options = FORMS[form]
    model = mixed_model(dtype)
    importance = random_importance(model)
    named = list(model.named_parameters())
    columns = [op_columns(name, param, importance[name], form, record) for name, param in named]
    optimizer = new(model, backend=backend, record=record, mode="coupled", **options)
    for number in (1, 2):
        steps(optimizer, number, number + 1)
        for index, (each, (_, param)) in enumerate(zip(columns, named, strict=True)):
            each["grads"] = [param.grad]
            arguments = Options("coupled", master=options.get("master", "none"), seed=options.get("seed", 0))
            # take_step's own curvature scale of a first tensor, 0.7, is 2·α of ALPHAS
            take_step(each, backend, [float(number)], arguments, keys=[index])
    roles = {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq", "anchors": "anchor", "remainders": "remainder"}
    roles |= {"path_integrals": "path_integral", "exp_avg_scales": "exp_avg_scale"}
    roles |= {"exp_avg_sq_scales": "exp_avg_sq_scale"}
    for each, (_, param) in zip(columns, named, strict=True):
        state = optimizer.state[param]
        got = {column: [state[key]] if key in state else [] for column, key in roles.items()} | {"params": [param]}
        assert_same_columns(got, each, got)


# ---------------------------------------------------------------- random rounding


@backends
def test_the_generator_is_keyed_on_the_seed(backend):
    runs = []
    for seed in (3, 3, 8):
        model = mixed_model(BF16)
        optimizer = new(model, backend=backend, master="stochastic", seed=seed)
        steps(optimizer, 0, 2)
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(map(same_bits, runs[0], runs[1]))
    assert not any(map(same_bits, runs[0], runs[2]))


def test_every_parameter_has_noise_of_its_own():
    """Two equal parameters with equal gradients part ways, whatever groups they are in."""
    values = torch.randn(64, 128).to(BF16)
    pair = [nn.Parameter(values.clone()), nn.Parameter(values.clone())]
    optimizer = AlrAdamW([{"params": [pair[0]]}, {"params": [pair[1]]}], master="stochastic")
    gradient = torch.randn(64, 128).to(BF16)
    for param in members(optimizer):
        param.grad = gradient.clone()
    optimizer.step()
    assert not torch.equal(*pair)
