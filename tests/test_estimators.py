"""Estimators of importance against one sample at a time in float64, in batches and where a batch will not do."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import same_bits
from estimator_cases import (
    CASES,
    SIZES,
    assert_close,
    batches_of,
    frozen,
    mlp,
    own_loss,
    plain_loop,
    points,
    squared,
    wide,
)
from torch import nn

from alr_kernels import fisher_importance, magnitude_gradient_importance, mas_importance


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# ---- exact per-sample gradients


@pytest.mark.parametrize("name", list(CASES))
def test_fisher_is_that_of_each_sample_alone(name):
    case = CASES[name]
    model, batches = case.build(), batches_of(case)
    importance = fisher_importance(model, batches, progress=False)
    assert importance.method == "fisher"
    assert importance.steps == sum(SIZES)
    assert all(tensor.dtype == torch.float32 for tensor in importance.values())
    assert_close(importance, plain_loop(model, batches, own_loss(case)))


@pytest.mark.parametrize("order", [(1, 4), (4, 1), (1,), (2, 2)], ids=str)
def test_every_sample_weighs_the_same(order):
    model, batches = mlp(), points(order)
    assert_close(fisher_importance(model, batches, squared), plain_loop(model, batches, wide(squared)))


@pytest.mark.parametrize("words", [("embed", "norm"), ("q_proj", "layers.1"), ("lm_head", "layers.0")], ids=str)
def test_frozen_parameters_have_no_entry(words):
    case = CASES["padded llama"]
    model, batches = frozen(case.build(), *words), batches_of(case)
    importance = fisher_importance(model, batches)
    assert set(importance) == {name for name, param in model.named_parameters() if param.requires_grad}
    assert_close(importance, plain_loop(model, batches, own_loss(case)))


def test_frozen_ends_of_a_tied_model():
    model, case = CASES["tied llama"].build(), CASES["tied llama"]
    frozen(model, "embed_tokens")
    batches = batches_of(case)
    assert_close(fisher_importance(model, batches), plain_loop(model, batches, own_loss(case)))


@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2"])
def test_bf16_models(name):
    case = CASES[name]
    model, batches = case.build().bfloat16(), batches_of(case)
    importance = fisher_importance(model, batches)
    assert all(tensor.dtype == torch.float32 for tensor in importance.values())
    assert_close(importance, plain_loop(model, batches, own_loss(case)), rtol=0.2, elementwise=2.0)


def test_float64_models():
    model, batches = mlp().double(), [{k: v.double() for k, v in batch.items()} for batch in points()]
    importance = fisher_importance(model, batches, squared)
    assert_close(importance, plain_loop(model, batches, wide(squared)), rtol=1e-12, elementwise=1e-10)


def test_inputs_that_need_no_embedding_and_keyword_calls():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x, y):
            hidden = self.first(input=x)
            hidden += 1  # writes to what the layer returned
            return (self.second(hidden.relu()) - y).square().sum(1)

    torch.manual_seed(0)
    model, batches = Named(), points()

    def loss(model, batch):
        return model(**batch)

    assert_close(fisher_importance(model, batches, loss), plain_loop(model, batches, wide(loss)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), mlp()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.second, self.first(x), use_reentrant=reentrant)

    torch.manual_seed(0)
    model, batches = Checkpointed(), points()
    grads = [torch.ones_like(param) for param in model.parameters()]
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = grad
    expected = fisher_importance(nn.Sequential(model.first, model.second), batches, squared)
    importance = fisher_importance(model, batches, squared)
    for name, omega in expected.items():
        other = importance[name.replace("0.", "first.", 1) if name[0] == "0" else name.replace("1.", "second.", 1)]
        torch.testing.assert_close(other, omega)
    assert all(param.grad is grad for param, grad in zip(model.parameters(), grads, strict=True))


def test_dropout_is_off_and_modes_come_back():
    case = CASES["gpt2"]
    model, batches = case.build().train(), batches_of(case)
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    assert_close(fisher_importance(model, batches), plain_loop(model, batches, own_loss(case)))
    assert [module.training for module in model.modules()] == modes


# ---- MAS


def output_size(model, batch):
    logits = model(**{key: item for key, item in batch.items() if key != "labels"}).logits.double()
    kept = batch.get("attention_mask")
    sizes = logits.square().sum(-1)[0]
    return sizes.mean() if kept is None or logits.dim() == 2 else sizes[kept[0] != 0].mean()


@pytest.mark.parametrize("name", ["llama", "padded llama", "tied llama", "gpt2", "bert classifier"])
def test_mas_is_that_of_each_sample_alone(name):
    case = CASES[name]
    model, batches = case.build(), batches_of(case)
    unlabelled = [{key: item for key, item in batch.items() if key != "labels"} for batch in batches]
    importance = mas_importance(model, unlabelled)
    assert importance.method == "mas"
    assert_close(importance, plain_loop(model, unlabelled, output_size, power=1), power=1)


def test_mas_of_a_users_output():
    model, batches = mlp(), points()
    importance = mas_importance(model, batches, lambda model, batch: model(batch["x"]))
    value = wide(lambda model, batch: model(batch["x"]).square().sum(1))
    assert_close(importance, plain_loop(model, batches, value, power=1), power=1)


def test_mas_of_a_decoder_does_not_take_the_encoders_mask():
    """Their lengths may coincide."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.config = SimpleNamespace(is_encoder_decoder=True)

        def forward(self, x, attention_mask=None, decoder_attention_mask=None):
            return self.layer(x)

    torch.manual_seed(0)
    model, x, mask = Decoder(), torch.randn(2, 4, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    plain, encoders, decoders = (
        mas_importance(model, [{"x": x, **masks}], progress=False)["layer.weight"]
        for masks in ({}, {"attention_mask": mask}, {"decoder_attention_mask": mask})
    )
    assert torch.equal(plain, encoders)
    assert not torch.equal(plain, decoders)


def test_mas_refuses_an_output_without_samples():
    with pytest.raises(ValueError, match=r"first dimension is the batch of 3, got \(9, 1\)"):
        mas_importance(mlp(), points(), lambda model, batch: model(batch["x"]).reshape(-1, 1))


# ---- magnitude against gradient


def test_magnitude_gradient_is_a_ratio_of_ranks():
    case = CASES["llama"]
    model, batches = case.build(), batches_of(case)
    importance = magnitude_gradient_importance(model, batches)
    assert importance.method == "magnitude_gradient"
    params = dict(model.named_parameters())
    sums = {name: torch.zeros_like(param) for name, param in params.items()}
    for batch in batches:
        for name, grad in zip(params, torch.autograd.grad(model(**batch).loss, list(params.values())), strict=True):
            sums[name] += grad.abs()

    def ranks(values):  # counted pair by pair
        flat = values.detach().flatten()
        below = (flat[None] < flat[:, None]).sum(1) + ((flat[None] == flat[:, None]).sum(1) + 1) / 2
        return (below.double() / len(flat)).view_as(values)

    for name, param in params.items():
        size, pull = ranks(param.abs()), ranks(sums[name])
        torch.testing.assert_close(importance[name].double(), size / (size + pull), rtol=1e-6, atol=0)
        assert 0 < float(importance[name].min()) <= float(importance[name].max()) < 1


def test_magnitude_gradient_with_a_users_loss_of_either_shape():
    model, batches = mlp(), points()
    first = magnitude_gradient_importance(model, batches, squared)
    second = magnitude_gradient_importance(model, batches, lambda model, batch: squared(model, batch).mean())
    assert all(same_bits(first[name], second[name]) for name in first)


# ---- the benchmark


def test_benchmark_compares_the_same_numbers():
    from alr_kernels.benchmark.estimators import compare

    found = compare(CASES["padded llama"].build(), 16, 2, 6, count=2, rounds=1)
    assert found["largest_relative_difference"] < 1e-5
    assert found["ratio"][0] > 0
    assert (found["samples"], found["tokens"], found["batches"]) == (2, 6, 2)
