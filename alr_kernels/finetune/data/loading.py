"""From a source to tokenised sets."""

from __future__ import annotations

from typing import Any

from .source import Progress, Source, Texts


def load(
    source: Source,
    tokenizer: Any,
    *,
    max_length: int,
    packing: bool | None = None,
    loss_on: str = "answers",
    train: bool = True,
    progress: Progress | None = None,
) -> Texts:
    """Read, split and tokenise. (Interface only, for now.)"""
    raise NotImplementedError("the interface comes first; the code follows on this branch")
