"""Sequences of several lengths as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _validate_data as validate
from ...importance.estimators.objectives import IGNORED


class Collator:
    """Pad to the longest sequence of a batch, on the right; padding is masked and never counts in the loss.

    Padding is told by lengths, not by the token, for a tokenizer may pad with its end of text.

    Args:
        tokenizer: gives ``pad_token_id``, or ``eos_token_id`` where it has none.
        multiple: lengths are rounded up to a multiple of this (tensor cores like 8), but not beyond ``limit``.
        limit: tokens that the model takes, at most; None: what the tokenizer says of it.

    Raises:
        ValueError: when the tokenizer has neither token, or a number is not ≥ 1.
    """

    def __init__(self, tokenizer: Any, multiple: int = 8, limit: int | None = None) -> None:
        self.pad = validate.padding(tokenizer)
        validate.lengths(multiple, limit)
        self.multiple = multiple
        self.limit = limit or tokenizer.model_max_length  # a very large number where nothing is known

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``: [rows, longest] int64."""
        longest = max(len(row["input_ids"]) for row in rows)
        length = max(longest, min(-(-longest // self.multiple) * self.multiple, self.limit))
        ids = torch.full((len(rows), length), self.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            labels[i, :n] = torch.as_tensor(row["labels"], dtype=torch.int64)
            mask[i, :n] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
