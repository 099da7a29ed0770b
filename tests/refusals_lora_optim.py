"""What AlrAdamW refuses of LoRA pairs: part of the table of tests/test_validation.py."""

from __future__ import annotations

import copy

import torch
from lora_models import adapted, llama
from refusals import p

from alr_kernels import AlrAdamW, lora_pairs

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
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    exact.step()


def resumed_without():
    recording = optimizer(record=True)
    for _, param in (A, B):
        param.grad = torch.ones_like(param)
    recording.step()
    AlrAdamW([A, B], record=True).load_state_dict(recording.state_dict())


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
        lambda c: optimizer(importance={"v.weight": torch.ones(4, 3)}), ValueError, r"select\(pair.name for pair",
    ),
    "recording in a graph": (
        lambda c: optimizer(record=True, capturable=True), ValueError, "record: the tangent estimator.*CUDA graph",
    ),
    "a copy of hooks": (lambda c: copy.deepcopy(with_exact()), TypeError, "cannot be copied; build the optimizer anew"),
    "resuming without the pairs": (
        lambda c: resumed_without(), ValueError, "parameter 1 was saved as B of a LoRA pair.*same lora",
    ),
    "a gradient that no hook saw": (
        lambda c: stepped_past_the_hooks(), RuntimeError, "self_attn.q_proj.weight' have gradients, but no",
    ),
    "pairs of nothing": (lambda c: optimizer(lora=3), TypeError, "lora_pairs: expected a model"),
}  # fmt: skip
