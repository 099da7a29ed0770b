"""lora_pairs reads PEFT's models: every kind of layer reproduces its delta weight, under the base model's names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from alr_kernels.lora import lora_pairs
from alr_kernels.lora.reference import Product

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

PREFIX = "base_model.model."


def llama(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2} | options
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, **sizes)
    )


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


class Mixed(nn.Module):
    """One layer of every kind that PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.line = nn.Conv1d(3, 4, 3, bias=False)
        self.picture = nn.Conv2d(3, 5, (3, 2), stride=2, padding=1)
        self.point = nn.Conv2d(4, 5, 1)
        self.volume = nn.Conv3d(2, 3, 2)
        self.linear = nn.Linear(7, 5)


MIXED = ["table", "line", "picture", "point", "volume", "linear"]


def adapted(model, targets, filled=True, **options):
    """Return the PEFT model; ``filled``: with B and embeddings' A random instead of zero."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, **options))
    return fill(model) if filled else model


def fill(model):
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.normal_()
    return model


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
        f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
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
