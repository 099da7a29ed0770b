"""Negative log-likelihood of text in nats a token: summed in float64, padding never counts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from .. import _validate_choices
from ..importance.estimators.objectives import IGNORED

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

CHUNK_BYTES = 64 << 20  # of float32 logits that exist at a time


@dataclass(frozen=True)
class Nll:
    """Mean negative log-likelihood of ``tokens`` predicted tokens.

    >>> Nll(1.0, 7).perplexity == math.e
    True
    """

    nll: float  # nats a token
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where that is more than a float holds."""
        return math.exp(self.nll) if not self.nll > 709 else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Return nll, perplexity and tokens for JSON; what is not finite is None."""
        numbers = {"nll": self.nll, "perplexity": self.perplexity}
        return {name: x if math.isfinite(x) else None for name, x in numbers.items()} | {"tokens": self.tokens}


@dataclass(frozen=True)
class Losses:
    """What each row of a data set adds up to, in the data set's order."""

    sums: np.ndarray  # [rows] float64, nats
    counts: np.ndarray  # [rows] int64, predicted tokens

    @property
    def total(self) -> Nll:
        """The mean over all tokens of all rows: long rows weigh more than short ones.

        Raises:
            ValueError: no token counts.
        """
        tokens = int(self.counts.sum())
        _validate_choices.counted(tokens, len(self.counts))
        return Nll(math.fsum(self.sums) / tokens, tokens)


@torch.no_grad()
def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of each row, in nats, and the number of tokens it is of.

    The logits at t predict the label at t + 1, as in transformers; the model is not asked for a loss of its own. A
    token counts if its label is not -100 and ``attention_mask``, where there is one, takes in both it and the token
    before: neither padding nor what follows left padding is ever predicted. float32 copies of logits are made for
    a few tokens at a time.

    Args:
        model: a causal language model of transformers, wrapped (PEFT, DDP, FSDP, torch.compile) or not.
        batch: "input_ids" and "labels", [rows, tokens] int64; "attention_mask" and more of the model's inputs. On the
            model's device.

    Returns:
        [rows] float64 sums and [rows] int64 counts.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if _takes(model, "use_cache"):
        inputs["use_cache"] = False  # keys and values of the whole batch would be kept for nothing
    logits = model(**inputs).logits
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == batch["labels"].shape:
        counted &= (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    row, place = counted.nonzero(as_tuple=True)
    found = torch.zeros(labels.shape, dtype=torch.float64, device=logits.device)
    size = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    wide = torch.promote_types(logits.dtype, torch.float32)
    for r, p in zip(row.split(size), place.split(size), strict=True):
        found[r, p] = functional.cross_entropy(logits[r, p].to(wide), labels[r, p], reduction="none").double()
    return found.sum(1), counted.sum(1)


def losses(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, Tensor]],
    batch: int,
    tick: Callable[[], None] | None = None,
) -> Losses:
    """Measure every row of a data set in this process; the model is in eval mode meanwhile, and then as before.

    Rows of like length share a batch, the longest first: what does not fit into memory fails at once.

    Args:
        model: as in `token_losses`.
        dataset: a sequence of rows with "input_ids" (``len`` and integer indices suffice).
        collate: makes a padded batch of a list of rows, labels included.
        batch: rows in a batch.
        tick: called after each of the ``ceil(len(dataset) / batch)`` batches.

    Returns:
        Sums and counts in the order of the data set, whatever the batches were.
    """
    import numpy as np

    lengths = [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    sums, counts = np.zeros(len(order)), np.zeros(len(order), dtype=np.int64)
    with evaluating(model):
        for places in _cut(order, batch):
            rows = collate([dataset[index] for index in places])
            added, tokens = token_losses(model, on_device(model, rows))
            sums[places], counts[places] = added.cpu().numpy(), tokens.cpu().numpy()
            if tick is not None:
                tick()
    return Losses(sums, counts)


def nll(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, Tensor]],
    batch: int,
    tick: Callable[[], None] | None = None,
) -> Nll:
    """Return the mean negative log-likelihood over all tokens of a data set; arguments as in `losses`.

    Raises:
        ValueError: no token of the data set counts.
    """
    return losses(model, dataset, collate, batch, tick).total


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode; afterwards each of its modules is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def on_device(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch's tensors on the device of the model's first parameter."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def _cut(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def _takes(model: nn.Module, option: str) -> bool:
    """Say whether the model's own forward takes an option, whatever wraps the model."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), torch.nn.Module):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), torch.nn.Module):  # DDP, FSDP
            inner = inner.module
        else:
            break
    known = inspect.signature(inner.forward).parameters
    return option in known or any(entry.kind is entry.VAR_KEYWORD for entry in known.values())
