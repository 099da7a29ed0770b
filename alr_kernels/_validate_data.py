"""Checks on data that users bring, and their messages: which file, which row, what was expected; see ``_validate.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._validate import count, number

if TYPE_CHECKING:
    from .finetune.data.source import Source


def source(given: Source) -> None:
    number(given.flag("held-out"), given.held_out, high=1.0, closed=True)
    if given.max_rows is not None:
        count(given.flag("max-rows"), given.max_rows)


def padding(tokenizer: Any) -> int:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        raise ValueError(
            "tokenizer: expected a token to pad with, got one that has neither a pad token nor an end-of-text token; "
            "set tokenizer.pad_token to one of its tokens and save it (it is masked and never counts in the loss)."
        )
    return int(pad)


def lengths(multiple: int, limit: int | None) -> tuple[int, int]:
    count("multiple", multiple)
    if limit is not None:
        count("limit", limit)
    return multiple, limit or 0
