"""lora_pairs reads PEFT's models: every kind of layer reproduces its delta weight, under the base model's names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from lora_models import MIXED, PREFIX, Mixed, adapted, bert, config, filled, gpt2, llama  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

import alr_kernels  # noqa: E402
from alr_kernels.lora import LoraPair, LoraPairs, lora_pairs  # noqa: E402
from alr_kernels.lora.reference import Product  # noqa: E402

Q = "model.layers.0.self_attn.q_proj.weight"


def base(name):
    return name.partition("@")[0].removesuffix(".weight")


def check_deltas(model, pairs, adapter="default"):
    """Hold s·left·right of every pair to PEFT's own delta weight, and its shape and name to the bare model's."""
    modules = dict(model.named_modules())
    for pair in pairs:
        layer = modules[PREFIX + base(pair.name)]
        expected = layer.get_delta_weight(adapter)
        assert pair.shape == expected.shape == layer.get_base_layer().weight.shape
        factors = pair.factors(pair.up, pair.down)
        assert isinstance(factors, Product)
        assert factors.left.shape == (pair.matrix_shape[0], pair.rank)
        assert factors.right.shape == (pair.rank, pair.matrix_shape[1])
        got = pair.scaling * (factors.left @ factors.right).view(pair.shape)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_llama(rslora):
    original = llama()
    shapes = {name: param.shape for name, param in original.named_parameters()}
    model = adapted(
        original, ["q_proj", "v_proj", "down_proj"], use_rslora=rslora, rank_pattern={"v_proj": 3},
        alpha_pattern={"down_proj": 5},
    )  # fmt: skip
    pairs = lora_pairs(model)
    assert [pair.name for pair in pairs] == [
        f"model.layers.{i}.{name}.weight"
        for i in range(2)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]  # fmt: skip
    check_deltas(model, pairs)
    assert all(pair.shape == shapes[pair.name] and not pair.transposed for pair in pairs)
    assert [pair.rank for pair in pairs[:3]] == [2, 3, 2]
    root = math.sqrt if rslora else float
    assert [pair.scaling for pair in pairs[:3]] == pytest.approx([6 / root(2), 6 / root(3), 5 / root(2)])
    assert pairs.names == {}
    assert (pairs.estimator, pairs.clamp, pairs.origin) == ("tangent", "end", "start")


def test_gpt2_keeps_its_weights_transposed():
    model = adapted(gpt2(), ["c_attn", "c_fc"], fan_in_fan_out=True)
    pairs = lora_pairs(model)
    assert [(pair.name, pair.transposed, tuple(pair.shape)) for pair in pairs] == [
        ("transformer.h.0.attn.c_attn.weight", True, (16, 48)),
        ("transformer.h.0.mlp.c_fc.weight", True, (16, 64)),
    ]
    check_deltas(model, pairs)


def test_every_kind_of_layer():
    model = adapted(Mixed(), MIXED)
    pairs = lora_pairs(model)
    assert [pair.name for pair in pairs] == [f"{name}.weight" for name in MIXED]
    assert [pair.transposed for pair in pairs] == [True] + [False] * 5
    assert pairs[2].matrix_shape == (5, 18)
    check_deltas(model, pairs)


@pytest.mark.parametrize(
    "make", [lambda: adapted(Mixed(), MIXED), lambda: adapted(gpt2(), ["c_attn", "c_fc"], fan_in_fan_out=True)]
)
def test_gradients_of_the_factors_are_those_of_the_weight_as_a_matrix(make):
    """With dL/dU = G: dL/dleft = s·G·rightᵀ and dL/dright = s·leftᵀ·G."""
    model = make()
    modules = dict(model.named_modules())
    for pair in lora_pairs(model):
        delta = modules[PREFIX + base(pair.name)].get_delta_weight("default")
        g = torch.randn_like(delta)
        (delta * g).sum().backward()
        left, right = pair.factors(pair.up, pair.down)
        grad_left, grad_right = pair.factors(pair.up.grad, pair.down.grad)
        g = g.reshape(pair.matrix_shape)
        torch.testing.assert_close(grad_left, pair.scaling * g @ right.T)
        torch.testing.assert_close(grad_right, pair.scaling * left.T @ g)


def test_factors_are_views_and_as_kept_is_their_inverse():
    model = adapted(Mixed(), MIXED)
    for pair in lora_pairs(model):
        left, right = pair.factors(pair.up.detach(), pair.down.detach())
        at = {pair.up.data_ptr(), pair.down.data_ptr()}
        assert {left.data_ptr(), right.data_ptr()} == at
        up, down = pair.as_kept(left, right)
        assert torch.equal(up, pair.up)
        assert torch.equal(down, pair.down)
        assert {up.data_ptr(), down.data_ptr()} == at
        half = pair.factors(pair.up, None)
        assert type(half) is tuple
        assert [side is None for side in half] == ([True, False] if pair.transposed else [False, True])
        assert [side is None for side in pair.as_kept(*half)] == [False, True]
        assert pair.factors(None, None) == pair.as_kept(None, None) == (None, None)


def test_a_classifier_is_called_as_in_the_bare_model():
    original = bert()
    known = {name for name, _ in original.named_parameters()}
    model = peft.get_peft_model(original, config(["query", "dense"], task_type="SEQ_CLS"))
    names = lora_pairs(model).names
    assert names == {
        f"{PREFIX}classifier.modules_to_save.default.weight": "classifier.weight",
        f"{PREFIX}classifier.modules_to_save.default.bias": "classifier.bias",
    }
    assert {*names.values(), *(pair.name for pair in lora_pairs(model))} <= known
    assert set(names) == {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}


def test_norms_biases_and_loras_own_bias_keep_distinct_names():
    original = bert()
    known = {name for name, _ in original.named_parameters()}
    model = adapted(original, ["query"], bias="all", lora_bias=True, modules_to_save=["LayerNorm", "classifier"])
    names = lora_pairs(model).names
    query = "bert.encoder.layer.0.attention.self.query"
    assert names[f"{PREFIX}{query}.base_layer.bias"] == f"{query}.bias"
    assert names[f"{PREFIX}{query}.lora_B.default.bias"] == f"{query}.lora_B.default.bias"
    assert (
        names[f"{PREFIX}bert.embeddings.LayerNorm.modules_to_save.default.weight"] == "bert.embeddings.LayerNorm.weight"
    )
    assert len(set(names.values())) == len(names)
    assert set(names.values()) - known == {f"{query}.lora_B.default.bias"} | {
        n for n in names.values() if "original_module" in n
    }


def test_several_adapters():
    model = adapted(bert(), ["query", "key"], modules_to_save=["classifier"])
    model.add_adapter("second", config(["query"], r=3, modules_to_save=["classifier"]))
    filled(model)
    assert len(lora_pairs(model)) == 2
    assert [p.rank for p in lora_pairs(model)] == [2, 2]
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(["default", "second"])
    for name, param in model.named_parameters():
        if "classifier.modules_to_save" in name:
            param.requires_grad_(True)
    pairs = lora_pairs(model)
    part = "bert.encoder.layer.0.attention.self"
    assert [p.name for p in pairs] == [
        f"{part}.query.weight@default",
        f"{part}.query.weight@second",
        f"{part}.key.weight",
    ]
    check_deltas(model, [pairs[0], pairs[2]])
    check_deltas(model, [pairs[1]], "second")
    assert sorted(pairs.names.values()) == [
        f"classifier.{kind}@{a}" for kind in ("bias", "weight") for a in ("default", "second")
    ]
    (only,) = lora_pairs(model, "second")
    assert only.name == f"{part}.query.weight"
    assert only.down is pairs[1].down
    assert len(lora_pairs(model, ["default", "second"])) == 3
    assert not any("lora_" in name for name in lora_pairs(model, "second").names)


def test_trainable_tokens_are_an_ordinary_tensor():
    model = adapted(llama(), ["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    (name,) = lora_pairs(model).names.values()
    assert name == "model.embed_tokens.token_adapter.trainable_tokens_delta.default"


def test_one_factor_may_be_frozen():
    model = adapted(llama(), ["q_proj"])
    for name, param in model.named_parameters():
        if "lora_A" in name or "layers.1" in name:
            param.requires_grad_(False)
    (pair,) = lora_pairs(model)
    assert (pair.name, pair.up.requires_grad, pair.down.requires_grad) == (Q, True, False)


def injected(model):
    return peft.inject_adapter_in_model(config(["q_proj"]), model)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.llm = inner


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda model: nn.DataParallel(adapted(model, ["q_proj"])), Q),
        (lambda model: torch.compile(adapted(model, ["q_proj"])), Q),
        (lambda model: nn.DataParallel(torch.compile(adapted(model, ["q_proj"]))), Q),
        (lambda model: adapted(torch.compile(model), ["q_proj"]), Q),
        (lambda model: adapted(model, ["q_proj"]).base_model, Q),
        (injected, Q),
        (lambda model: Outer(adapted(model, ["q_proj"])), f"llm.{Q}"),
        (lambda model: peft.get_peft_model(model, config(["q_proj"]), mixed=True), Q),
    ],
    ids=["parallel", "compiled", "both", "compiled within", "tuner", "injected", "part of a model", "mixed"],
)  # fmt: skip
def test_wrappers_leave_no_trace_in_names(wrap, name):
    model = wrap(llama())
    for key, param in model.named_parameters():
        if key.endswith("model.norm.weight"):
            param.requires_grad_(True)
    pairs = lora_pairs(model)
    assert [pair.name for pair in pairs] == [name, name.replace("layers.0", "layers.1")]
    (entry,) = pairs.names.items()
    assert entry[0] in dict(model.named_parameters())
    assert entry[1] == name.replace("layers.0.self_attn.q_proj", "norm")


def test_a_base_modules_own_name_may_look_like_pefts():
    outer = Outer(nn.ModuleDict({"base_model": nn.ModuleDict({"model": llama()})}))
    pairs = lora_pairs(injected(outer))
    assert pairs[0].name == f"llm.base_model.model.{Q}"


class Linear4bit(nn.Module, LoraLayer):
    """As PEFT's for bitsandbytes: no fan_in_fan_out but False, and a base layer whose weight is packed."""

    def __init__(self, base_layer):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = "default"
        self.update_layer("default", 2, lora_alpha=4, config=config(["x"]))


def test_packed_weights_are_not_read():
    class Packed(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} of a packed weight")

    layer = Linear4bit(nn.Linear(8, 6))
    kept = torch.zeros(24, 1, dtype=torch.uint8).as_subclass(Packed)
    layer.base_layer._parameters["weight"] = None
    layer.base_layer.__dict__["weight"] = kept
    del layer.base_layer._parameters["weight"]
    model = nn.ModuleDict({"proj": layer})
    (pair,) = lora_pairs(model, estimator="exact")
    assert (pair.name, tuple(pair.shape), pair.scaling) == ("proj.weight", (6, 8), 2.0)


def test_tuples():
    def factor(*shape, grad=True):
        return nn.Parameter(torch.randn(*shape), requires_grad=grad)

    rows = [
        ("module.a.weight", factor(2, 8), factor(4, 2), 0.5),
        ("b.weight", factor(1, 3, grad=False), factor(5, 1, grad=False), 1),
        ["c.weight", factor(3, 5), factor(6, 3, grad=False), torch.tensor(2.0)],
    ]
    pairs = alr_kernels.lora_pairs(iter(rows))
    assert [(p.name, tuple(p.shape), p.scaling, p.rank) for p in pairs] == [
        ("a.weight", (4, 8), 0.5, 2), ("c.weight", (6, 5), 2.0, 3)
    ]  # fmt: skip
    assert (pairs[0].down, pairs[0].up) == (rows[0][1], rows[0][2])
    assert pairs.names == {}
    assert pairs[-1] in pairs
    assert pairs[:1] == (pairs[0],)
    assert pairs[0].take_gradient() is None
    pairs[0].drop_gradient()
    pairs.close()


def test_the_papers_preset():
    rows = [("a", nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(2, 1)), 1.0)]
    pairs = lora_pairs(rows, preset="paper")
    assert (pairs.estimator, pairs.clamp, pairs.origin) == ("factored", "step", "zero")
    assert repr(pairs) == "LoraPairs(1 pairs, 0 other tensors, estimator='factored', clamp='step', origin='zero')"
    assert lora_pairs(rows, estimator="factored").clamp == "end"


def test_dtypes():
    model = adapted(llama(), ["q_proj"]).bfloat16()
    assert lora_pairs(model)[0].up.dtype == torch.bfloat16
    pair = LoraPair("w", torch.ones(4, 2), torch.ones(2, 3), 1.0, False, torch.Size([4, 3]))
    assert LoraPairs([pair])[0] is pair
