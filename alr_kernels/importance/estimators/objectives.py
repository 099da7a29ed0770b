"""The number of each sample whose gradient counts: its own loss (Fisher), or the size of its output (MAS)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ... import _validate_estimators
from .per_sample import NotBatchable

IGNORED = -100  # label of a token that has no loss, as in torch and transformers

Batch = Mapping[str, Any]


class Objective(Protocol):
    """What the estimators differentiate."""

    def of_samples(self, model: nn.Module, batch: Batch, samples: int) -> Tensor:
        """Return one number a sample, [n]. Raises NotBatchable when a batch gives only one number."""

    def of_one(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the number of a batch of one sample, 0-dim."""

    def another(self) -> bool:
        """Give up the rule by which a batch is taken apart; whether there is another to try."""


class NotYet(NotBatchable):
    """This batch cannot tell how batches are taken apart; the next one may."""


def _token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum of cross-entropies [n], number of labels [n]) of logits [n, t, classes] and labels [n, t]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = nn.functional.cross_entropy(
        wide.reshape(-1, wide.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape).sum(1), (labels != IGNORED).sum(1)


def _causal(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        return None
    # Labels move, not logits: slicing those would copy them.
    return _token_losses(logits, nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED))


def _per_token(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    return _token_losses(logits, labels) if logits.dim() == 3 and labels.shape == logits.shape[:2] else None


def _per_sequence(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        return None
    return _token_losses(logits[:, None], labels[:, None])


Rule = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor] | None"]
RULES: dict[str, Rule] = {
    "cross-entropy of the next token": _causal,
    "cross-entropy of each token": _per_token,
    "cross-entropy of each sequence": _per_sequence,
}


class OwnLoss:
    """The model's own loss of each sample alone: the mean over the sample's labels other than −100."""

    def __init__(self) -> None:
        self._rule: Rule | None = None
        self._refuted: set[Rule] = set()
        self._left = 0  # rules that the last choice left over

    def of_samples(self, model: nn.Module, batch: Batch, samples: int) -> Tensor:
        outputs = model(**batch)
        loss = _validate_estimators.own_loss(outputs)
        logits, labels = _get(outputs, "logits"), batch.get("labels")
        if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or labels.is_floating_point():
            raise NotBatchable("the model's loss is not that of `logits` and integer `labels`")
        if self._rule is None:
            return self._chosen(logits, labels, float(loss.detach()))
        found = self._rule(logits, labels)
        if found is None:
            raise NotBatchable("`logits` or `labels` have another shape than in the batches before")
        return found[0] / found[1]

    def _chosen(self, logits: Tensor, labels: Tensor, own: float) -> Tensor:
        """Return each sample's loss by the rule whose mean over all labels is nearest to the model's own."""
        close = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 2e-2
        fitting = []
        for rule in RULES.values():
            found = None if rule in self._refuted else rule(logits, labels)
            if found is not None:
                apart = abs(float(found[0].detach().sum() / found[1].sum()) - own)
                if not apart > close * abs(own):  # NaN fits everything
                    fitting.append((apart, rule, found[0] / found[1]))
        if not fitting:
            raise NotBatchable(f"the model's loss is none of these: {'; '.join(RULES)}")
        if own != own:
            raise NotYet("the model's loss is not finite")
        _, self._rule, losses = min(fitting, key=lambda entry: entry[0])
        self._left = len(fitting) - 1
        return losses

    def another(self) -> bool:
        if self._rule is None or not self._left:
            return False
        self._refuted.add(self._rule)
        self._rule = None
        return True

    def of_one(self, model: nn.Module, batch: Batch) -> Tensor:
        return _validate_estimators.own_loss(model(**batch))


class UserLoss:
    """A function of (model, batch) that gives one number a sample, or one in all."""

    def __init__(self, loss: Callable[[nn.Module, Batch], Tensor]) -> None:
        self._loss = loss

    def of_samples(self, model: nn.Module, batch: Batch, samples: int) -> Tensor:
        values = _validate_estimators.numbers("loss", self._loss(model, batch))
        if values.dim() == 0:
            raise NotBatchable("loss(model, batch) returned one number for the whole batch, not one a sample")
        _validate_estimators.one_a_sample("loss", values, samples)
        return values

    def of_one(self, model: nn.Module, batch: Batch) -> Tensor:
        values = _validate_estimators.numbers("loss", self._loss(model, batch))
        if values.dim():
            _validate_estimators.one_a_sample("loss", values, 1)
        return values.reshape(())

    def another(self) -> bool:
        return False


class OutputSize:
    """‖f(x_n)‖²: Σ over the outputs, and its mean over a sequence's tokens whose attention mask is not 0."""

    def __init__(self, output: Callable[[nn.Module, Batch], Tensor] | None) -> None:
        self._output = output

    def of_samples(self, model: nn.Module, batch: Batch, samples: int) -> Tensor:
        if self._output is not None:
            values = _validate_estimators.numbers("output", self._output(model, batch))
            _validate_estimators.rows_of_samples(values, samples)
            return values.square().reshape(samples, -1).sum(1)
        outputs = model(**batch)
        logits = _get(outputs, "logits")
        if logits is None:
            logits = outputs
        logits = _validate_estimators.numbers("output", logits)
        _validate_estimators.rows_of_samples(logits, samples)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        sizes = wide.square().sum(-1) if wide.dim() > 1 else wide.square()  # [n] or [n, tokens]
        decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # outputs are the decoder's
        for key in ("decoder_attention_mask",) if decodes else ("decoder_attention_mask", "attention_mask"):
            mask = batch.get(key)
            if sizes.dim() == 2 and isinstance(mask, Tensor) and mask.shape == sizes.shape:
                kept = (mask != 0).to(sizes.dtype)
                return (sizes * kept).sum(1) / kept.sum(1)
        return sizes.reshape(samples, -1).mean(1)

    def of_one(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.of_samples(model, batch, 1).reshape(())

    def another(self) -> bool:
        return False


def _get(outputs: Any, key: str) -> Any:
    return outputs.get(key) if isinstance(outputs, Mapping) else getattr(outputs, key, None)
