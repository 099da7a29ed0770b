"""What AlrAdamW refuses of LoRA pairs: part of the table of tests/test_validation.py."""

from __future__ import annotations

import copy

import torch
from lora_models import adapted, llama
from refusals import p

from alr_kernels import AlrAdamW, lora_pairs
from alr_kernels.lora import paper

A, B = ("a", p(2, 3)), ("b", p(4, 2))


def optimizer(params=None, importance=None, **options):
    pairs = [("w.weight", A[1], B[1], 1.0)]
    return AlrAdamW([A, B] if params is None else params, importance, **{"lora": pairs} | options)


def with_exact():
    model = adapted(llama(num_hidden_layers=1), ["q_proj"])
    return AlrAdamW(model.named_parameters(), lora=lora_pairs(model, estimator="exact"), record=True)


def stepped_past_the_hooks():
    exact = with_exact()
    for param in exact.param_groups[0]["params"]:
        param.grad = torch.ones_like(param) if param.requires_grad else None
    exact.step()


def not_recording():
    model = adapted(llama(num_hidden_layers=1), ["q_proj"])
    return AlrAdamW(model.named_parameters(), lora=lora_pairs(model, estimator="exact"))


def another_gradient():
    model = adapted(llama(num_hidden_layers=1), ["q_proj"])
    exact = AlrAdamW(model.named_parameters(), lora=lora_pairs(model, estimator="exact"), record=True)
    tokens = torch.arange(8).view(1, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    for param in model.parameters():
        param.grad = None if param.grad is None else torch.randn_like(param)
    exact.step()


def half_of_the_adapters():
    model = adapted(llama(num_hidden_layers=1), ["q_proj"])
    model.add_adapter("other", model.peft_config["default"])
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    return AlrAdamW(model.named_parameters(), lora=lora_pairs(model, "default"))


def stepped(**options):
    recording = optimizer(record=True, **options)
    for _, param in (A, B):
        param.grad = torch.ones_like(param)
    recording.step()
    return recording.state_dict()


def elementwise_into_pairs():
    optimizer(record=True).load_state_dict(stepped(lora=None))


def another_estimator():
    factored = lora_pairs([("w.weight", A[1], B[1], 1.0)], estimator="factored")
    optimizer(record=True).load_state_dict(stepped(lora=factored))


def resumed_without():
    AlrAdamW([A, B], record=True).load_state_dict(stepped())


REFUSED = {
    "a factor that is not the optimizer's": (
        lambda c: optimizer([A]), ValueError, "B of 'w.weight' is not among the optimizer's parameters; pass both",
    ),
    "factors in two groups": (
        lambda c: optimizer([{"params": [A]}, {"params": [B]}]),
        ValueError, "B of 'w.weight' is in param group 1, A in group 0; put both",
    ),
    "importance of a factor": (
        lambda c: optimizer(importance={"a": torch.ones(2, 3)}),
        ValueError, "importance of 'a'.*factor of the LoRA pair 'w.weight'.*U = s·B·A",
    ),
    "importance of a pair, of another shape": (
        lambda c: optimizer(importance={"w.weight": torch.ones(3, 4)}),
        ValueError, r"importance of 'w.weight': expected shape \(4, 3\).*got \(3, 4\)",
    ),
    "importance of no pair": (
        lambda c: optimizer(importance={"v.weight": torch.ones(4, 3)}), ValueError, r"select\(pairs.importance_names",
    ),
    "recording in a graph": (
        lambda c: optimizer(record=True, capturable=True), ValueError, "record: the tangent estimator.*CUDA graph",
    ),
    "a copy of hooks": (lambda c: copy.deepcopy(with_exact()), TypeError, "cannot be copied; build the optimizer anew"),
    "resuming without the pairs": (
        lambda c: resumed_without(), ValueError, "parameter 1 was saved as B of a LoRA pair.*B of none.*same lora",
    ),
    "a gradient that no hook saw": (
        lambda c: stepped_past_the_hooks(), RuntimeError, "self_attn.q_proj.weight' have gradients, but no",
    ),
    "exact without recording": (
        lambda c: not_recording(), ValueError, "estimator='exact' gathers dense gradients.*does not record",
    ),
    "gradients of elsewhere": (lambda c: another_gradient(), RuntimeError, "are not those that the gathered dense"),
    "a factor without its pair": (lambda c: half_of_the_adapters(), ValueError, "lora_A.other.weight' is a trainable"),
    "resuming element by element": (
        lambda c: elementwise_into_pairs(), ValueError, "was recorded element by element, here it is a factor",
    ),
    "resuming with another estimator": (
        lambda c: another_estimator(), ValueError, "with estimator='factored'.*with estimator='tangent'",
    ),
    "epochs without the preset": (
        lambda c: paper.add_epoch(optimizer(record=True)), ValueError, "add_epoch: expected.*preset='paper'.*'tangent'",
    ),
    "pairs of nothing": (lambda c: optimizer(lora=3), TypeError, "lora_pairs: expected a model"),
}  # fmt: skip
