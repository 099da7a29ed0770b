"""estimator="exact" gathers dL/dU itself: it agrees with autograd's gradient of the weight, and with A's and B's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from lora_models import adapted, config, filled, gpt2, llama  # noqa: E402

from alr_kernels.lora import lora_pairs  # noqa: E402

TOKENS = torch.arange(24).view(2, 12) % 29


def tiny(**options):
    return adapted(llama(attn_implementation="eager"), ["q_proj", "v_proj", "down_proj"], **options).double()


def transposed():
    return adapted(gpt2(), ["c_attn", "c_fc"], fan_in_fan_out=True).double()


def backward(model, tokens=TOKENS):
    model(input_ids=tokens, labels=tokens).loss.backward()


def check(pairs, atol=0.0, rtol=1e-9):
    """Hold sBᵀG to A's gradient and sGAᵀ to B's, and return every G."""
    gradients = []
    for pair in pairs:
        g = pair.take_gradient()
        assert tuple(g.shape) == pair.matrix_shape
        g = g.to(pair.up.dtype)
        left, right = pair.factors(pair.up.detach(), pair.down.detach())
        for got, grad in zip(
            pair.as_kept(pair.scaling * g @ right.T, pair.scaling * left.T @ g),
            (pair.up.grad, pair.down.grad),
            strict=True,
        ):
            assert got.abs().max() > 0
            torch.testing.assert_close(got, grad, rtol=rtol, atol=atol + 1e-12)
        gradients.append(g)
        assert pair.take_gradient() is None
    assert gradients
    return gradients


@pytest.mark.parametrize("make", [tiny, transposed])
def test_it_is_autograds_gradient_of_the_base_weight(make):
    """Without dropout dL/dU is dL/dW."""
    model = make()
    pairs = lora_pairs(model, estimator="exact")
    bases = [param for name, param in model.named_parameters() if name.endswith("base_layer.weight")]
    for param in bases:
        param.requires_grad_(True)
    backward(model)
    for g, param in zip(check(pairs), bases, strict=True):
        torch.testing.assert_close(g, param.grad, rtol=1e-9, atol=1e-12)


def test_micro_batches_add_up_and_are_forgotten_when_taken_or_dropped():
    model = tiny()
    pairs = lora_pairs(model, estimator="exact")
    for part in TOKENS.chunk(2):
        backward(model, part)
    check(pairs)
    backward(model)
    for pair in pairs:
        pair.drop_gradient()
        assert pair.take_gradient() is None
    model.zero_grad()
    backward(model)
    check(pairs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_every_token_once(reentrant):
    model = tiny(lora_dropout=0.3)
    pairs = lora_pairs(model, estimator="exact")
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.base_model.model.model.gradient_checkpointing
    backward(model)
    check(pairs)


def test_inputs_are_kept_as_autograd_keeps_its_own():
    """So that checkpointing drops and recomputes what G needs, and offloading moves it."""
    model = adapted(nn.Sequential(nn.Linear(4, 4)), ["0"])
    (pair,) = lora_pairs(model, estimator="exact")
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    x = torch.randn(3, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).sum()
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in saved) == 2  # for A's gradient, and for G
    assert pair.gatherer._input is None
    loss.backward()
    check([pair], rtol=1e-5)


def test_dropout_is_in_the_inputs():
    model = tiny(lora_dropout=0.5)
    pairs = lora_pairs(model, estimator="exact")
    model.train()
    backward(model)
    check(pairs)


def test_bf16_autocast():
    model = tiny().float()
    pairs = lora_pairs(model, estimator="exact")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()  # within: the sum over tokens must not be rounded either
    for pair in pairs:
        assert pair.gatherer._gradient.dtype == torch.float32
        scale = max(pair.up.grad.abs().max(), pair.down.grad.abs().max())
        check([pair], rtol=0.02, atol=0.02 * float(scale))


def test_bf16_models_are_summed_in_float32():
    model = adapted(nn.Sequential(nn.Linear(2, 1, bias=False)), ["0"], lora_alpha=2).bfloat16()
    (pair,) = lora_pairs(model, estimator="exact")
    for value in (1.0, 2.0**-10):
        model(torch.full((1, 2), value, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(pair.take_gradient(), torch.full((1, 2), 1 + 2.0**-10))


def test_a_layer_that_is_called_twice():
    model = adapted(nn.ModuleDict({"proj": nn.Linear(4, 4)}), ["proj"]).double()
    (pair,) = lora_pairs(model, estimator="exact")
    proj = model.base_model.model["proj"]
    proj(proj(torch.randn(5, 4).double()).tanh()).pow(2).sum().backward()
    check([pair])


@pytest.mark.parametrize("letter", ["lora_A", "lora_B"])
def test_a_frozen_factor(letter):
    model = tiny()
    for name, param in model.named_parameters():
        if letter in name:
            param.requires_grad_(False)
    pairs = lora_pairs(model, estimator="exact")
    backward(model)
    frozen = [pair.take_gradient() for pair in pairs]
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.requires_grad_(True)
    model.zero_grad()
    backward(model)
    for before, after in zip(frozen, check(pairs), strict=True):
        torch.testing.assert_close(before, after)


def test_two_adapters_see_the_same_gradient():
    model = adapted(nn.Sequential(nn.Linear(4, 3)), ["0"])
    model.add_adapter("second", config(["0"], r=1, lora_alpha=1))
    model.base_model.set_adapter(["default", "second"])
    filled(model)
    pairs = lora_pairs(model, estimator="exact")
    assert len(pairs) == 2
    model(torch.randn(5, 4)).pow(2).sum().backward()
    first, second = check(pairs, rtol=1e-4)
    torch.testing.assert_close(first, second)


def test_evaluation_and_closed_pairs_gather_nothing():
    model = tiny()
    pairs = lora_pairs(model, estimator="exact")
    with torch.no_grad():
        model(input_ids=TOKENS)
    assert all(pair.take_gradient() is None for pair in pairs)
    backward(model)
    pairs.close()
    assert all(pair.take_gradient() is None for pair in pairs)
    backward(model)
    assert all(pair.take_gradient() is None for pair in pairs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for n, m in model.named_modules() if "lora_" in n)


@pytest.mark.parametrize("estimator", ["tangent", "factored"])
def test_other_estimators_and_refusals_leave_no_hook(estimator):
    model = adapted(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 2, 1)), ["0", "1"])
    lora_pairs(model, estimator=estimator)
    with pytest.raises(ValueError, match="convolution"):
        lora_pairs(model, estimator="exact")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_compiled_model():
    model = tiny()
    compiled = torch.compile(model, backend="eager")
    pairs = lora_pairs(compiled, estimator="exact")
    backward(compiled)
    check(pairs)
