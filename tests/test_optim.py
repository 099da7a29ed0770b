"""AlrAdamW's contract: what construction does and does not do, groups, coefficients, phases, the penalty's value."""

from __future__ import annotations

import copy
import gc
import pickle

import oracle
import pytest
import torch
from cases import (
    ALPHAS,
    BF16,
    F32,
    F64,
    HYPER,
    MODES,
    assert_same_state,
    layer,
    members,
    param_error,
    random_importance,
    same_bits,
    set_grads,
    tiny_loss,
    tiny_model,
    tiny_optimizer,
    train,
    ulp,
    within,
)
from torch import nn

from alr_kernels import AlrAdamW, Importance, layer_coefficients

modes = pytest.mark.parametrize("mode", MODES)


def live_bytes():
    """Return the bytes of all tensor storages alive now, each counted once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, nn.Parameter):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# ---------------------------------------------------------------- construction and binding


def test_construction_clones_nothing():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(100, 100) for _ in range(3))})
    importance = random_importance(model)
    before = live_bytes()
    optimizer = AlrAdamW(model.named_parameters(), importance, record=True)
    assert live_bytes() - before < 1000, "tensors were made that outlive construction"
    assert not optimizer.state
    weights = sum(p.numel() * 4 for p in model.parameters())
    set_grads(optimizer, 0)
    gradients = weights
    optimizer.step()
    # two moments, ω, and one buffer that is both anchor and start
    assert live_bytes() - before - gradients == pytest.approx(4 * weights, rel=0.01)


def test_anchor_is_the_weight_at_the_first_step():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    swapped = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, param in model.named_parameters():
        param.data = swapped[name].clone()  # what a checkpoint loaded after construction does
    assert float(optimizer.penalty()) == 0.0
    train(model, optimizer)
    for name, param in model.named_parameters():
        assert same_bits(optimizer.state[param]["anchor"], swapped[name]), name
    assert float(optimizer.penalty()) > 0


def test_importance_follows_group_and_index_when_parameters_are_replaced():
    """Launchers put other Parameter objects into the groups between construction and the first step."""
    model, direct = tiny_model(), tiny_model()
    optimizer, expected = tiny_optimizer(model), tiny_optimizer(direct)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(param.detach().clone()) for param in group["params"]]
    for each in (optimizer, expected):
        for number in range(3):
            set_grads(each, number)
            each.step()
    assert_same_state(optimizer, expected)


@pytest.mark.parametrize("given", [False, True], ids=("anchor is the start", "anchor given"))
def test_anchor_and_start_share_a_buffer_while_equal(given):
    model = tiny_model()
    anchor = {name: torch.randn_like(p) for name, p in model.named_parameters()} if given else None
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = tiny_optimizer(model, record=True, anchor=anchor)
    train(model, optimizer, 2)
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        assert (state["anchor"].data_ptr() == state["start"].data_ptr()) is not given
        assert same_bits(state["start"], start[name])
        assert same_bits(state["anchor"], anchor[name] if given else start[name])


def test_given_anchor_is_copied():
    model = tiny_model()
    anchor = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    optimizer = tiny_optimizer(model, anchor=anchor)
    train(model, optimizer)
    before = float(optimizer.penalty())
    for tensor in anchor.values():
        tensor.zero_()
    assert float(optimizer.penalty()) == before


@pytest.mark.parametrize("form", ["artifact", "mapping", "wrapped names", "sequence", "float64", "bfloat16"])
def test_importance_in_every_form(form):
    model, other = tiny_model(), tiny_model()
    importance = random_importance(model)
    if form == "bfloat16":
        importance = {name: t.to(BF16).float() for name, t in importance.items()}
    given = {
        "artifact": lambda: Importance(importance),
        "mapping": lambda: importance,
        "wrapped names": lambda: {f"module._orig_mod.{name}": t for name, t in importance.items()},
        "sequence": lambda: list(importance.values()),
        "float64": lambda: {name: t.double() for name, t in importance.items()},
        "bfloat16": lambda: {name: t.to(BF16) for name, t in importance.items()},
    }[form]()
    optimizer = AlrAdamW(model.named_parameters(), given, "uniform")
    expected = AlrAdamW(other.named_parameters(), importance, "uniform")
    train(model, optimizer, 3)
    train(other, expected, 3)
    assert_same_state(optimizer, expected)


def test_sequence_serves_unnamed_parameters():
    model, other = tiny_model(), tiny_model()
    importance = random_importance(model)
    names = [name for name in importance if "embed" not in name]
    optimizer = AlrAdamW(model.parameters(), [importance[n] if n in names else None for n in importance], "uniform")
    alphas = {layer(name): 1.0 for name in names}
    expected = AlrAdamW(other.named_parameters(), {n: importance[n] for n in names}, alphas)
    train(model, optimizer, 3)
    train(other, expected, 3)
    assert_same_state(optimizer, expected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_components_of_wrappers_in_parameter_names(prefix):
    model, other = tiny_model(), tiny_model()
    wrapped = [(prefix + name, p) for name, p in model.named_parameters()]
    wrapped = [(name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."), p) for name, p in wrapped]
    optimizer = AlrAdamW(wrapped, random_importance(other), ALPHAS, record=True)
    expected = AlrAdamW(other.named_parameters(), random_importance(other), ALPHAS, record=True)
    train(model, optimizer, 2)
    train(other, expected, 2)
    assert_same_state(optimizer, expected)
    assert list(optimizer.recorded_importance()) == list(dict(other.named_parameters()))


def test_tied_parameters_step_once():
    model = tiny_model()
    model.layers[1].weight = model.layers[0].weight
    optimizer = AlrAdamW(model.named_parameters(), random_importance(model))  # named_parameters() gives it once
    train(model, optimizer, 2)
    assert float(optimizer.state[model.layers[0].weight]["step"]) == 2
    assert model.layers[1].weight is model.layers[0].weight


def test_closure_is_evaluated_with_grad_and_its_loss_returned():
    model, other = tiny_model(), tiny_model()
    optimizer, expected = tiny_optimizer(model), tiny_optimizer(other)

    def closure():
        optimizer.zero_grad()
        loss = tiny_loss(model)
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == train(other, expected)
    assert_same_state(optimizer, expected)


def test_repr_says_how_many_parameters_lack_importance():
    model = tiny_model()
    importance = {name: t for name, t in random_importance(model).items() if "head" not in name}
    text = repr(AlrAdamW(model.named_parameters(), importance))
    assert "6 of 8 parameters" in text
    assert "2 without importance" in text
    assert "importance: none" in repr(AlrAdamW(model.named_parameters()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 2])
def test_deepcopy_and_pickle_of_model_and_optimizer(how, steps):
    model = tiny_model()
    optimizer = tiny_optimizer(model, record=True)
    if steps:
        train(model, optimizer, steps)
    pair = (model, optimizer)
    other, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert members(twin)[0] is other.embed.weight
    train(model, optimizer, 2, first=steps)
    train(other, twin, 2, first=steps)
    assert_same_state(twin, optimizer)
    assert twin.coeffs == optimizer.coeffs
    assert twin.recorded_importance().stats == optimizer.recorded_importance().stats


# ---------------------------------------------------------------- groups and hyper-parameters


@modes
def test_groups_keep_their_own_hyper_parameters(mode):
    model = tiny_model()
    importance, named = random_importance(model), dict(model.named_parameters())
    options = [
        {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3, "reg_lambda": 0.5},
        {"lr": 3e-3, "betas": (0.95, 0.99), "eps": 1e-4, "weight_decay": 0.0, "reg_lambda": 4.0, "maximize": True},
    ]
    halves = [list(named.items())[:3], list(named.items())[3:]]
    groups = [{"params": half, **each} for half, each in zip(halves, options, strict=True)]
    anchor = {name: torch.randn_like(p) for name, p in named.items()}
    optimizer = AlrAdamW(groups, importance, ALPHAS, mode=mode, normalize=False, anchor=anchor)
    for number in range(1, 3):
        set_grads(optimizer, number)
        before = {name: (p.detach().clone(), dict(optimizer.state[p])) for name, p in named.items()}
        before = {
            n: (p, s.get("exp_avg", 0 * p).clone(), s.get("exp_avg_sq", 0 * p).clone()) for n, (p, s) in before.items()
        }
        optimizer.step()
        for half, each in zip(halves, options, strict=True):
            hyper = {key: value for key, value in each.items() if key not in ("betas", "reg_lambda")}
            hyper |= dict(zip(("beta1", "beta2"), each["betas"], strict=True))
            for name, param in half:
                expected, *_ = oracle.step(
                    before[name][0], param.grad, *before[name][1:], number, mode=mode, importance=importance[name],
                    anchor=anchor[name], weight=each["reg_lambda"] * ALPHAS[layer(name)], **hyper,
                )  # fmt: skip
                within(param_error(param.detach(), expected, before[name][0], each["lr"]) / 4, ("param", F32))


def test_schedulers_drive_lr_and_betas():
    ours, theirs = tiny_model(), tiny_model()
    optimizer = AlrAdamW(ours.named_parameters(), lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    largest = [torch.full_like(p, 1e-2).double() for p in ours.parameters()]
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(each, max_lr=2e-2, total_steps=12, cycle_momentum=True)
        for each in (optimizer, reference)
    ]
    seen = set()
    for number in range(10):
        largest = [
            torch.maximum(was, p.detach().double().abs()) for was, p in zip(largest, ours.parameters(), strict=True)
        ]
        for each, scheduler in zip((optimizer, reference), schedulers, strict=True):
            set_grads(each, number)
            each.step()
            scheduler.step()
        seen.add((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
    assert len(seen) == 10
    for got, expected, unit in zip(ours.parameters(), theirs.parameters(), largest, strict=True):
        within(float(((got - expected).detach().double().abs() / ulp(unit, F32)).max()), "torch step 17")


@modes
def test_a_penalised_step_uses_the_scheduled_lr(mode):
    model, other = tiny_model(), tiny_model()
    scheduled, fresh = tiny_optimizer(model, mode=mode), tiny_optimizer(other, mode=mode, lr=5e-3)
    scheduled.param_groups[0]["lr"] = torch.tensor(5e-3, dtype=F64)
    train(model, scheduled, 2)
    train(other, fresh, 2)
    assert_same_state(scheduled, fresh)


def test_added_group_takes_the_plain_step_until_the_next_phase():
    model, plain = tiny_model(), tiny_model()
    named, new = list(model.named_parameters()), list(model.head.parameters())
    importance = {name: t for name, t in random_importance(model).items() if "head" not in name}
    optimizer = AlrAdamW(named[:-2], importance, lr=1e-2, weight_decay=0.1, record=True)
    reference = AlrAdamW(plain.named_parameters(), lr=1e-2, weight_decay=0.1)
    train(model, optimizer)
    plain.load_state_dict(model.state_dict())
    optimizer.add_param_group({"params": named[-2:]})
    set_grads(optimizer, 1)
    set_grads(reference, 1)
    for each in (optimizer, reference):
        each.step()
    assert all(map(same_bits, new, plain.head.parameters()))
    assert set(optimizer.recorded_importance()) == set(dict(named))
    optimizer.start_phase(random_importance(model))
    set_grads(optimizer, 2)
    optimizer.step()
    assert set(optimizer.penalty_by_layer()) == set(ALPHAS)
    assert float(optimizer.penalty_by_layer()["head"]) > 0


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    for bad in ({"lr": -1.0}, {"reg_lambda": -1.0}, {"weight_decya": 0.1}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(2)))], **bad})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer)


# ---------------------------------------------------------------- coefficients and phases


@pytest.mark.parametrize("new_importance", [False, True])
def test_start_phase_moves_the_anchor_and_clears_the_recording(new_importance):
    model, other = tiny_model(), tiny_model()
    optimizer, uninterrupted = tiny_optimizer(model, record=True), tiny_optimizer(other, record=True)
    for each, optimizer_ in ((model, optimizer), (other, uninterrupted)):
        train(each, optimizer_, 3)
    assert float(optimizer.penalty()) > 0
    here = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.start_phase(random_importance(model, 9) if new_importance else None)
    assert float(optimizer.penalty()) == 0
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.recorded_importance()
    for param, same in zip(members(optimizer), members(uninterrupted), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):  # Adam goes on
            assert same_bits(optimizer.state[param][key], uninterrupted.state[same][key])
    train(model, optimizer)
    recorded = optimizer.recorded_importance()
    assert recorded.steps == 1
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        assert same_bits(state["anchor"], here[name])
        omega = oracle.record(torch.zeros_like(param), param.grad, here[name], param)
        assert float((state["path_integral"].double() - omega).abs().max()) < 1e-6 * float(omega.abs().max())
    assert optimizer.coeffs == pytest.approx(layer_coefficients(random_importance(model, 9 if new_importance else 1)))


@pytest.mark.parametrize("argument", [{"temperature": 50.0}, {"by": "module"}], ids=str)
def test_start_phase_keeps_temperature_and_layers_of_the_rule(argument):
    model = tiny_model()
    importance = random_importance(model)
    coeffs = layer_coefficients(importance, "softmax", **argument)
    optimizer = tiny_optimizer(model, coeffs=coeffs)
    train(model, optimizer)
    optimizer.start_phase()
    assert optimizer.coeffs == coeffs
    assert optimizer.coeffs.by == coeffs.by


# ---------------------------------------------------------------- recording


def test_low_precision_state_is_float32():
    model = tiny_model(dtype=BF16)
    optimizer = tiny_optimizer(model, record=True)
    train(model, optimizer, 2)
    for param in members(optimizer):
        kinds = {key: value.dtype for key, value in optimizer.state[param].items()}
        assert kinds == {
            "step": F32, "exp_avg": F32, "exp_avg_sq": F32, "anchor": BF16, "start": BF16, "path_integral": F32,
        }  # fmt: skip
    assert all(t.dtype == F32 for t in optimizer.recorded_importance().values())


def test_defaults_are_torch_adamws():
    ours, theirs = (
        AlrAdamW([nn.Parameter(torch.ones(1))]).defaults,
        torch.optim.AdamW([nn.Parameter(torch.ones(1))]).defaults,
    )
    assert {key: ours[key] for key in ("lr", "betas", "eps", "weight_decay", "maximize")} == {
        key: theirs[key] for key in ("lr", "betas", "eps", "weight_decay", "maximize")
    }
    assert set(HYPER) - {"beta1", "beta2"} <= set(ours)
