"""Moves by importance against float64 sums in numpy, and what a heat map of the coefficients is drawn from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from alr_kernels import AlrAdamW, Importance, layer_coefficients, lora_pairs
from alr_kernels.finetune.movement import EDGES, Movement, coefficient_rows, module_of
from alr_kernels.lora import reference as lora_reference

SHAPES = {"layers.0.up.weight": (40, 256), "layers.0.up.bias": (40,), "layers.1.kernel": (5, 4, 3), "scale": ()}


def wide(tensor):
    return tensor.detach().to(torch.float64).numpy()


def table(omegas, moves):
    """Return counts and sums of squared moves by bin, from the definition: 4^b · 2^-63 ≤ Ω, ends open."""
    count, square = np.zeros(64), np.zeros(64)
    for omega, moved in zip(omegas, moves, strict=True):
        _, exponent = np.frexp(omega)
        bins = np.where(omega > 0, np.clip((exponent - 1 + 63) // 2, 0, 63), 0)
        np.add.at(count, bins.ravel(), 1)
        np.add.at(square, bins.ravel(), np.square(moved).ravel())
    return count, square


def assert_is(movement, omegas, moves):
    count, square = table(omegas, moves)
    assert movement.count == tuple(count)
    np.testing.assert_allclose(movement.square, square, rtol=1e-12, atol=0)
    assert sum(count) == sum(omega.size for omega in omegas)
    assert np.count_nonzero(square) > 3


def members(model):
    return [model.get_parameter(name) for name in SHAPES]


class Weights(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        for i, (name, shape) in enumerate(SHAPES.items()):
            *path, last = name.split(".")
            module = self
            for part in path:
                module = module._modules.setdefault(part, nn.Module())
            value = torch.randn(shape, generator=torch.Generator().manual_seed(i))
            value = value.T.contiguous().T if value.ndim == 2 else value  # rows that do not lie one after another
            module.register_parameter(last, nn.Parameter(value.to(dtype)))


def spread(shapes):
    """Return importance over many powers of 4, zeros and what passes both ends included."""
    generator = torch.Generator().manual_seed(5)
    tensors = {name: 10 ** (torch.rand(shape, generator=generator) * 12 - 8) for name, shape in shapes.items()}
    first = next(iter(tensors.values())).view(-1)
    first[:4] = torch.tensor([0.0, 1e-30, 1e-40, 3e38])
    return Importance(tensors)


def train(model, optimizer, steps=2):
    generator = torch.Generator().manual_seed(9)
    for _ in range(steps):
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.fixture(params=[None, 100], ids=["one block", "many blocks"], autouse=True)
def blocks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(lora_reference, "ELEMENTS", request.param)


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int4"])
def test_of_an_optimizer_with_its_own_importance_and_anchors(form):
    model = Weights()
    start = {name: wide(param) for name, param in model.named_parameters()}
    given = spread(SHAPES)
    optimizer = AlrAdamW(model.named_parameters(), given, lr=1e-2, reg_lambda=0.1, importance_dtype=form)
    assert set(Movement.of_optimizer(optimizer).square) == {0.0}  # nothing has moved yet
    train(model, optimizer)
    kept = given.astype(form)
    moves = [wide(model.get_parameter(name)) - start[name] for name in SHAPES]
    assert_is(Movement.of_optimizer(optimizer), [wide(kept[name]) for name in SHAPES], moves)
    assert_is(Movement.of_optimizer(optimizer, given), [wide(given[name]) for name in SHAPES], moves)


def test_of_a_plain_run_against_given_importance_and_anchors():
    model = Weights()
    start = {f"module.{name}": param.detach().clone() for name, param in model.named_parameters()}
    optimizer = AlrAdamW(model.named_parameters(), lr=1e-2)
    train(model, optimizer)
    given = spread({name: shape for name, shape in SHAPES.items() if name != "layers.0.up.bias"}).astype("rank1")
    moves = [wide(model.get_parameter(name)) - wide(start[f"module.{name}"]) for name in given]
    assert_is(Movement.of_optimizer(optimizer, given, start), [wide(given[name]) for name in given], moves)


def test_given_anchors_go_before_the_optimizers_own():
    model = Weights()
    optimizer = AlrAdamW(model.named_parameters(), spread(SHAPES), lr=1e-2)
    anchor = {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}
    moves = [wide(param) - 0.5 for param in members(model)]
    omegas = [wide(omega) for omega in spread(SHAPES).values()]
    assert_is(Movement.of_optimizer(optimizer, anchor=anchor), omegas, moves)
    train(model, optimizer)
    moves = [wide(param) - 0.5 for param in members(model)]
    assert_is(Movement.of_optimizer(optimizer, anchor=anchor), omegas, moves)


def test_anchors_of_the_constructor_count_before_the_first_step():
    model = Weights()
    anchor = {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}
    optimizer = AlrAdamW(model.named_parameters(), spread(SHAPES), lr=1e-2, anchor=anchor)
    moves = [wide(param) - 0.5 for param in members(model)]
    assert_is(Movement.of_optimizer(optimizer), [wide(omega) for omega in spread(SHAPES).values()], moves)


def test_what_a_split_weight_keeps_beside_bf16_counts():
    model = Weights(torch.bfloat16)
    start = [wide(param) for param in members(model)]
    optimizer = AlrAdamW(model.named_parameters(), spread(SHAPES), lr=1e-5, master="split", anchor_dtype="bf16")
    train(model, optimizer)
    masters = [
        (param.detach().view(torch.int16).int() << 16) + optimizer.state[param]["remainder"].int()
        for param in members(model)
    ]
    moves = [wide(bits.view(torch.float32)) - begun for bits, begun in zip(masters, start, strict=True)]
    omegas = [wide(omega) for omega in spread(SHAPES).values()]
    assert_is(Movement.of_optimizer(optimizer), omegas, moves)
    assert any(np.any((wide(p) == s) & (m != 0)) for p, s, m in zip(members(model), start, moves, strict=True))


# ---- LoRA


def adapted(**options):
    pytest.importorskip("peft", reason="peft is not installed")
    from lora_models import MIXED, Mixed
    from lora_models import adapted as with_adapters

    return with_adapters(Mixed(), [name for name in MIXED if name != "line"], modules_to_save=["line"], **options)


def dense(pair, up, down):
    """Return U = s·B·A in float64, shaped as the base weight."""
    product = pair.scaling * wide(up).reshape(up.shape[0], -1) @ wide(down).reshape(down.shape[0], -1)
    return (product.T if pair.transposed else product).reshape(pair.shape)


@pytest.mark.parametrize("plain", [False, True])
def test_of_lora_it_is_the_move_of_the_products(plain):
    model = adapted()
    pairs = lora_pairs(model)
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    start = {name: param.detach().clone() for name, param in trained}
    before = {pair.name: dense(pair, pair.up, pair.down) for pair in pairs}
    before |= {"line.weight": wide(model.base_model.model.line.modules_to_save["default"].weight)}
    given = spread({pair.name: pair.shape for pair in pairs} | {"line.weight": before["line.weight"].shape})
    optimizer = AlrAdamW(trained, None if plain else given, lora=pairs, lr=1e-2)
    train(model, optimizer)
    after = {pair.name: dense(pair, pair.up, pair.down) for pair in pairs}
    after |= {"line.weight": wide(model.base_model.model.line.modules_to_save["default"].weight)}
    asked = (given, start) if plain else ()
    omegas, moves = [wide(given[name]) for name in given], [after[name] - before[name] for name in given]
    assert_is(Movement.of_optimizer(optimizer, *asked), omegas, moves)


# ---- what is refused, and the form of the results


def test_runs_without_importance_or_anchors_are_refused():
    model = Weights()
    optimizer = AlrAdamW(model.named_parameters(), lr=1e-2)
    with pytest.raises(ValueError, match=r"Movement.of_optimizer.*no importance; pass importance"):
        Movement.of_optimizer(optimizer)
    assert set(Movement.of_optimizer(optimizer, spread(SHAPES)).square) == {0.0}
    train(model, optimizer)
    with pytest.raises(ValueError, match=r"anchor: .*missing 'layers.0.up.bias', 'layers.0.up.weight'"):
        Movement.of_optimizer(optimizer, spread(SHAPES))
    with pytest.raises(ValueError, match=r"anchor: .*missing 'layers.1.kernel'"):
        Movement.of_optimizer(
            optimizer, spread(SHAPES), {n: p for n, p in model.named_parameters() if "kernel" not in n}
        )
    with pytest.raises(ValueError, match=r"importance: .* match no parameter: 'other'"):
        Movement.of_optimizer(optimizer, Importance({"other": torch.ones(2)}))


def test_the_dictionary_has_no_nan():
    count, square = [0] * 64, [0.0] * 64
    count[3], square[3], count[5], square[5] = 4, 2.0, 1, float("inf")
    found = Movement(tuple(count), tuple(square)).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["mean_square_move"][2:6] == [None, 0.5, None, None]
    assert found["edges"] == list(EDGES)
    assert EDGES[0] == 2.0**-63
    assert EDGES[63] == 4.0**63 * 2.0**-63


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "model.layers.3.self_attn.q_proj.weight": ("model.layers.3", "self_attn.q_proj"),
        "module.model.layers.3.mlp.up_proj.bias": ("model.layers.3", "mlp.up_proj.bias"),
        "model.layers.3.self_attn.q_proj.weight@second": ("model.layers.3", "self_attn.q_proj@second"),
        "transformer.h.11.ln_1.weight": ("transformer.h.11", "ln_1"),
        "layers.0.weight": ("layers.0", "0"),
        "model.embed_tokens.weight": ("model.embed_tokens", "embed_tokens"),
        "model.norm.weight": ("model.norm", "norm"),
        "lm_head.bias": ("lm_head", "lm_head.bias"),
        "scale": ("(root)", "scale"),
        "weight": ("(root)", "weight"),
    }.items(),
)  # fmt: skip
def test_every_tensor_has_a_place_in_the_heat_map(name, expected):
    assert module_of(name) == expected


@pytest.mark.parametrize("by", ["block", "module"])
def test_rows_of_coefficients(by):
    names = [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.bias",
        "model.layers.1.mlp.up_proj.weight",
    ]
    tensors = {name: torch.rand(8, 3) for name in names}
    importance = Importance(tensors)
    coeffs = layer_coefficients(importance, "softmax", by=by)
    found = coefficient_rows(importance, coeffs)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["rule"], found["by"], found["values"]) == ("softmax", by, dict(coeffs))
    assert (found["temperature"], found["effective_layers"]) == (coeffs.temperature, coeffs.effective_layers)
    assert [row["name"] for row in found["modules"]] == names
    assert len({(row["layer"], row["module"]) for row in found["modules"]}) == 3
    layer = {"block": "model.layers.1", "module": "model.layers.1.mlp.up_proj"}[by]
    assert found["modules"][2]["alpha"] == coeffs[layer]
    mass = [float(tensor.double().sum()) for tensor in tensors.values()]
    np.testing.assert_allclose([row["mass"] for row in found["modules"]], mass, rtol=1e-12)
    weighted = [row["alpha"] * row["mass"] for row in found["modules"]]
    np.testing.assert_allclose([row["share"] for row in found["modules"]], np.array(weighted) / sum(weighted))


def test_coefficients_of_another_model_are_refused():
    importance, other = Importance({"a.weight": torch.ones(2)}), Importance({"b.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"coeffs: .*missing 'a'.*unknown 'b'"):
        coefficient_rows(importance, layer_coefficients(other))
