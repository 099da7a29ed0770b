"""Steps of LoRA pairs within backward: a pair moves once the gradients of both factors are there."""

from __future__ import annotations

import pytest
import torch
from backward_cases import follow
from cases import members
from lora_models import adapted, llama
from torch import nn

from alr_kernels import AlrAdamW, DynamicCoeffs, layer_coefficients, lora_pairs

TOKENS = torch.arange(48).view(3, 16) % 32


def lora_loss(model, seed):
    tokens = TOKENS.roll(seed, 1)
    return model(input_ids=tokens, labels=tokens).loss


def lora_twins(estimator="tangent", **options):
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = adapted(llama(), ["q_proj", "v_proj"])
        pairs = lora_pairs(model, estimator=estimator)
        generator = torch.Generator().manual_seed(1)
        importance = {pair.name: torch.rand(pair.shape, generator=generator) for pair in pairs}
        options = {"lr": 1e-2, "weight_decay": 0.1, "reg_lambda": 0.5} | options
        models.append(model)
        optimizers.append(AlrAdamW(model.named_parameters(), importance, lora=pairs, **options))
    return models, optimizers


LORA = {
    "proximal": {"record": True, "stats": True},
    "coupled": {"mode": "coupled", "record": True, "stats": True},
    "dynamic": {"coeffs": DynamicCoeffs("uniform", every=2), "record": True},
    "lambda 0": {"reg_lambda": 0.0, "record": True},
    "factored": {"estimator": "factored", "record": True},
    "exact": {"estimator": "exact", "record": True},
}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_pairs_are_stepped_once_both_gradients_are_there(options):
    follow(*lora_twins(**options), lora_loss)


def test_a_pair_at_a_time_is_in_memory():
    (_, model), (_, optimizer) = lora_twins(record=True)
    params = [param for param in members(optimizer) if param.requires_grad]
    live = []
    for param in params:
        param.register_post_accumulate_grad_hook(lambda _: live.append(sum(p.grad is not None for p in params)))
    with optimizer.attach_to_backward():
        lora_loss(model, 0).backward()
        optimizer.step()
    assert max(live) == 2
    assert len(live) == len(params) > 4


def test_a_frozen_factor_and_one_that_took_no_part():
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.ParameterDict({name: torch.randn(4, 4) for name in ("a1", "b1", "a2", "b2")})
        model["a1"].requires_grad_(False)
        pairs = lora_pairs([("w1", model["a1"], model["b1"], 1.0), ("w2", model["a2"], model["b2"], 2.0)])
        importance = {"w1": torch.rand(4, 4), "w2": torch.rand(4, 4)}
        models.append(model)
        optimizers.append(AlrAdamW(model.named_parameters(), importance, lora=pairs, record=True, stats=True, lr=0.1))

    def loss(model, seed):
        total = (model["b1"] @ model["a1"]).square().sum() + (model["a2"] * (seed + 1)).square().sum()
        return total if seed else total + (model["b2"] @ model["a2"]).square().sum()

    follow(models, optimizers, loss)


def chain(model, seed):
    """Gradients of all Bs come first, so that the last pair waits while the first is stepped."""
    product = model["b0"] @ model["b1"] @ model["b2"] @ (model["a0"] * model["a1"] * model["a2"])
    plain = sum((model[f"plain{i}"] * (i + 1)).sin().square().sum() for i in range(5))
    return (product * (seed + 1)).square().mean() + plain


@pytest.mark.parametrize("mode", ["proximal", "coupled"])
def test_a_pair_that_waits_is_left_alone(mode):
    """Layers are blocks: what pairs and plain vectors report is added up in the order of a whole step."""
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        names = [f"layers.0.{letter}.weight" for letter in "qvk"]
        factors = {f"{letter}{i}": torch.randn(4, 4) for i in range(3) for letter in "ab"}
        model = nn.ParameterDict(factors | {f"plain{i}": torch.randn(i + 3) for i in range(5)})
        model["a1"].requires_grad_(False)
        pairs = lora_pairs([(name, model[f"a{i}"], model[f"b{i}"], 1.0) for i, name in enumerate(names)])
        importance = {name: torch.rand(4, 4) for name in names}
        named = [(f"layers.0.{name}", param) for name, param in model.items()]
        coeffs = layer_coefficients(importance, by="block")
        options = {"lora": pairs, "record": True, "stats": True, "lr": 0.1, "mode": mode}
        models.append(model)
        optimizers.append(AlrAdamW(named, importance, coeffs, **options))
    follow(models, optimizers, chain)
