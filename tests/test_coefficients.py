"""Layer coefficients against the oracle, what a user may hand in, and the penalty that they weigh: value and scale."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import oracle
import pytest
import torch
from cases import (
    ALPHAS,
    F64,
    MODES,
    assert_same_state,
    layer,
    random_importance,
    same_bits,
    tiny_model,
    tiny_optimizer,
    train,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from alr_kernels import AlrAdamW, Importance, layer_coefficients
from alr_kernels.coefficients import RULES

modes = pytest.mark.parametrize("mode", MODES)


def of_norms(norms):
    """Return an importance whose layers have these norms, spread over two tensors each."""
    tensors = {}
    for i, norm in enumerate(norms):
        tensors[f"layers.{i}.a.weight"] = torch.full((1,), norm * 0.6, dtype=torch.float64)
        tensors[f"layers.{i}.b.weight"] = torch.full((4,), norm * 0.4, dtype=torch.float64)
    return tensors


@pytest.mark.parametrize("wrap", [dict, Importance], ids=("mapping", "artifact"))
@pytest.mark.parametrize("temperature", ["auto", 0.5, 30.0])
def test_softmax_matches_oracle(wrap, temperature):
    importance = random_importance(tiny_model())
    got = layer_coefficients(wrap(importance), temperature=temperature)
    oracles = oracle.softmax_coefficients(
        importance, lambda name: name.rpartition(".")[0], None if temperature == "auto" else temperature
    )
    assert dict(got) == pytest.approx(oracles, rel=1e-6)
    assert got.rule == "softmax"
    mean = sum(got.norms.values()) / len(got.norms)
    assert got.temperature == (pytest.approx(mean) if temperature == "auto" else temperature)


@pytest.mark.parametrize("by", ["block", "module"])
@pytest.mark.parametrize("rule", RULES)
@given(norms=st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=12))
def test_every_rule_sums_to_one(rule, by, norms):
    coeffs = layer_coefficients(of_norms(norms), rule, by=by)
    assert len(coeffs) == len(norms) * (1 if by == "block" else 2)
    assert math.fsum(coeffs.values()) == pytest.approx(1.0, rel=1e-12)
    assert all(alpha >= 0 for alpha in coeffs.values())
    assert 1 - 1e-9 <= coeffs.effective_layers <= len(coeffs) * (1 + 1e-9)


@pytest.mark.parametrize("temperature", ["auto", 1.0, 1e-3])
def test_softmax_does_not_overflow(temperature):
    coeffs = layer_coefficients(of_norms([1e6, 2e6, 3e6]), temperature=temperature)
    assert math.fsum(coeffs.values()) == pytest.approx(1.0)
    assert coeffs["layers.2"] == max(coeffs.values())
    if temperature != "auto":  # taken literally the paper's softmax degenerates
        assert dict(coeffs) == {"layers.0": 0.0, "layers.1": 0.0, "layers.2": 1.0}
        assert coeffs.effective_layers == 1.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_rules_do_not_depend_on_the_scale_of_importance(rule, scale):
    norms = [0.5, 1.0, 4.0]
    plain, scaled = (layer_coefficients(of_norms([n * s for n in norms]), rule) for s in (1.0, scale))
    assert dict(plain) == pytest.approx(dict(scaled), rel=1e-9)


def test_rules_by_hand():
    norms = [1.0, 3.0]
    pieces = of_norms(norms)
    lengths = [math.sqrt(0.6**2 + 4 * 0.4**2) * n for n in norms]
    assert dict(layer_coefficients(pieces, "uniform")) == {"layers.0": 0.5, "layers.1": 0.5}
    assert layer_coefficients(pieces, "proportional")["layers.1"] == pytest.approx(0.75)
    softmax = layer_coefficients(pieces, temperature=2.0)
    assert softmax["layers.1"] == pytest.approx(1 / (1 + math.exp((lengths[0] - lengths[1]) / 2)))
    assert softmax.norms == pytest.approx({"layers.0": lengths[0], "layers.1": lengths[1]})
    module = layer_coefficients(pieces, "proportional", by="module")
    assert set(module) == {f"layers.{i}.{part}" for i in range(2) for part in "ab"}
    assert module["layers.1.a"] == pytest.approx(3 * 0.6 / (4 * 0.6 + 4 * 0.8))


def test_effective_layers_is_the_exponential_of_the_entropy():
    assert layer_coefficients(of_norms([1.0] * 7), "uniform").effective_layers == pytest.approx(7)
    quarter = layer_coefficients(of_norms([1.0, 3.0]), "proportional")
    assert quarter.effective_layers == pytest.approx(math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))))


def test_a_layer_of_zeros_gets_no_proportional_weight():
    coeffs = layer_coefficients(of_norms([0.0, 1.0]), "proportional")
    assert dict(coeffs) == {"layers.0": 0.0, "layers.1": 1.0}
    assert coeffs.effective_layers == 1.0


def test_copies_keep_what_they_were_made_from():
    coeffs = layer_coefficients(of_norms([1.0, 2.0]), temperature=3.0, by="module")
    for other in (copy.deepcopy(coeffs), pickle.loads(pickle.dumps(coeffs))):
        assert other == coeffs
        assert (other.rule, other.by, other.temperature, other.norms) == ("softmax", "module", 3.0, coeffs.norms)


def test_optimizer_takes_rules_mappings_and_results():
    model = tiny_model()
    importance = random_importance(model)
    named = list(model.named_parameters())
    assert AlrAdamW(named, importance).coeffs == layer_coefficients(importance)
    for coeffs in (
        layer_coefficients(importance, "softmax", 7.0),
        layer_coefficients(importance, "proportional", by="module"),
        dict.fromkeys(("embed", "layers.0", "layers.1", "head"), 1.0),
    ):
        optimizer = AlrAdamW(named, importance, coeffs)
        assert optimizer.coeffs == coeffs
        assert set(optimizer.penalty_by_layer()) == set(coeffs)
    assert AlrAdamW(named).coeffs is None


def test_user_mapping_by_module():
    importance = of_norms([1.0, 2.0])
    named = [(name, torch.nn.Parameter(torch.zeros_like(t))) for name, t in importance.items()]
    coeffs = {name.removesuffix(".weight"): float(i) for i, name in enumerate(importance)}
    optimizer = AlrAdamW(named, importance, coeffs)
    assert optimizer.coeffs.by == "module"
    assert optimizer.coeffs.rule == "user"


@pytest.mark.parametrize(
    ("coeffs", "error", "message"),
    [
        ({"embed": 1.0}, ValueError, "missing 'head', 'layers.0', 'layers.1'"),
        ({"embed": 1, "head": 1, "layers.0": 1, "layers.1": 1, "layers.2": 1}, ValueError, "unknown 'layers.2'"),
        ({"embed": 1, "head": 1, "layers.0": 1, "layers.1": -1}, ValueError, r"coeffs\['layers.1'\].*got -1"),
        ({"embed": 1, "head": 1, "layers.0": 1, "layers.1": "x"}, TypeError, "expected a number, got str 'x'"),
        ({"embed": 1, "head": 1, "layers.0": 1, "layers.1": math.nan}, ValueError, "got nan"),
        ({"embed": 0, "head": 0, "layers.0": 0, "layers.1": 0}, ValueError, "zero everywhere"),
        ("softmin", ValueError, "expected one of 'softmax', 'uniform', 'proportional', got 'softmin'"),
        ([1.0, 2.0], TypeError, "rule's name or a mapping"),
    ],
)
@pytest.mark.parametrize("where", ["constructor", "set_coeffs"])
def test_user_coefficients_that_do_not_fit(coeffs, error, message, where):
    model = tiny_model()
    importance = random_importance(model)
    optimizer = AlrAdamW(model.named_parameters(), importance)
    before = dict(optimizer.coeffs)
    constructor = partial(AlrAdamW, model.named_parameters(), importance)
    with pytest.raises(error, match=message):
        (constructor if where == "constructor" else optimizer.set_coeffs)(coeffs)
    assert optimizer.coeffs == before


@modes
def test_set_coeffs_takes_effect_from_the_next_step(mode):
    model, other = tiny_model(), tiny_model()
    optimizer = tiny_optimizer(model, mode=mode)
    train(model, optimizer, 2)
    optimizer.set_coeffs(ALPHAS)
    assert optimizer.coeffs == ALPHAS
    train(model, optimizer, 2, first=2)

    expected = tiny_optimizer(other, mode=mode)
    train(other, expected, 2)
    rebuilt = tiny_optimizer(other, mode=mode, coeffs=ALPHAS)
    saved = expected.state_dict()
    for group in saved["param_groups"]:
        group["coeffs"] = None  # else the saved ones would replace those of the constructor
    rebuilt.load_state_dict(saved)
    train(other, rebuilt, 2, first=2)
    assert_same_state(optimizer, rebuilt)


# ---------------------------------------------------------------- the penalty's value and scale


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rule", ["softmax", "proportional", "uniform", "mapping"])
def test_penalty_is_the_oracles(rule, normalize):
    model = tiny_model()
    importance = random_importance(model)
    coeffs = ALPHAS if rule == "mapping" else rule
    optimizer = tiny_optimizer(model, coeffs=coeffs, reg_lambda=0.7, normalize=normalize)
    anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 3)
    weights = oracle.weights(importance, {name: optimizer.coeffs[layer(name)] for name in importance}, 0.7, normalize)
    expected = {}
    for name, param in model.named_parameters():
        value = oracle.penalty(
            param.detach().double(), anchors[name].double(), importance[name].double(), weights[name]
        )
        expected[layer(name)] = expected.get(layer(name), 0.0) + float(value)
    assert {k: float(v) for k, v in optimizer.penalty_by_layer().items()} == pytest.approx(expected, rel=1e-9)
    assert float(optimizer.penalty()) == pytest.approx(sum(expected.values()), rel=1e-9)


class NoSync(TorchDispatchMode):
    """Refuse what reads a value back to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "reads a value back to the host"
        return func(*args, **(kwargs or {}))


def test_penalty_stays_on_the_device():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    train(model, optimizer)
    with NoSync():
        values = [optimizer.penalty(), *optimizer.penalty_by_layer().values()]
    assert all(value.shape == () and value.dtype == F64 for value in values)
    with pytest.raises(AssertionError, match="host"), NoSync():
        values[0].item()
    assert AlrAdamW(model.parameters()).penalty().shape == ()


@pytest.mark.parametrize("rule", ["softmax", "uniform", "proportional", "mapping"])
@pytest.mark.parametrize("covered", [8, 5], ids=("all", "some"))
def test_normalized_mean_curvature_is_two_lambda(rule, covered):
    """With every weight 1 from its anchor the penalty is Σ k/2, which is λ times the number of entries."""
    model = tiny_model()
    importance = {n: 1e-9 * t for n, t in list(random_importance(model).items())[:covered]}
    coeffs = {name: a for name, a in ALPHAS.items() if name in {layer(n) for n in importance}}
    optimizer = AlrAdamW(
        model.named_parameters(), importance, coeffs if rule == "mapping" else rule, reg_lambda=0.3, lr=0.0,
        anchor={name: p.detach() + 1 for name, p in model.named_parameters() if name in importance},
    )  # fmt: skip
    train(model, optimizer)  # lr 0: nothing moves
    numel = sum(t.numel() for t in importance.values())
    assert float(optimizer.penalty()) == pytest.approx(0.3 * numel, rel=1e-6)  # anchors are float32: p + 1 rounds


def test_scaling_importance_changes_nothing_when_normalized():
    results = []
    for scale in (1.0, 2.0**40):
        model = tiny_model()
        importance = {name: t * scale for name, t in random_importance(model).items()}
        train(model, AlrAdamW(model.named_parameters(), importance, lr=1e-2), 3)
        results.append(model)
    assert all(map(same_bits, results[0].parameters(), results[1].parameters()))


@modes
def test_k_is_linear_in_lambda_and_importance(mode):
    """normalize=False: doubling λ is doubling Ω is doubling α, bit for bit."""
    results = []
    for factors in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        model = tiny_model()
        importance = {name: t * factors[1] for name, t in random_importance(model).items()}
        alphas = {name: a * factors[2] for name, a in ALPHAS.items()}
        optimizer = AlrAdamW(
            model.named_parameters(),
            importance,
            alphas,
            lr=1e-2,
            reg_lambda=0.1 * factors[0],
            normalize=False,
            mode=mode,
        )
        train(model, optimizer, 3)
        results.append(list(model.parameters()))
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))
