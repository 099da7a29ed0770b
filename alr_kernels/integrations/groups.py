"""Which parameters decay: param groups of named parameters, split as transformers' Trainer splits them."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from .. import _validate_integrations

# Trainer's rule (Trainer.get_decay_parameter_names): layer norms by type, the rest by these patterns in the name.
UNDECAYED_NAME = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
NORMS = tuple(getattr(nn, name) for name in ("LayerNorm", "RMSNorm") if hasattr(nn, name))


def param_groups(model: nn.Module, weight_decay: float = 1e-2) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups, with and without weight decay, as (name, tensor) pairs.

    No decay for biases, weights of norms and all other vectors; matrices decay, embeddings included. That is how
    transformers' Trainer decides, which decays vectors of other names. Tied weights appear once, by their first name;
    an empty group is left out.

    Args:
        model: whose ``named_parameters()`` are taken, names as they are (the optimizer unwraps them).
        weight_decay: of the first group, ≥ 0.

    Raises:
        ValueError: no parameter is trainable, or a negative decay.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 9))
    >>> [[name for name, _ in group["params"]] for group in param_groups(model, weight_decay=0.1)]
    [['0.weight', '2.weight'], ['1.weight', '1.bias', '2.bias']]
    """
    decay = _validate_integrations.decay(weight_decay)
    of_norms = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters()
    }
    decayed: list[tuple[str, Tensor]] = []
    undecayed: list[tuple[str, Tensor]] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            spared = param.ndim < 2 or name in of_norms or UNDECAYED_NAME.search(name.lower())
            (undecayed if spared else decayed).append((name, param))
    _validate_integrations.trainable(len(decayed) + len(undecayed))
    groups = [{"params": decayed, "weight_decay": decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
