"""What a user names as data, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ... import _validate_data as validate

if TYPE_CHECKING:
    from datasets import Dataset

Progress = Callable[[str, int], None]  # ("reading" or "tokenising", rows so far)


@dataclass(frozen=True)
class Source:
    """Name data, and which of its rows are held out to measure on.

    Args:
        source: a file, a folder (with all below it), a pattern (``'texts/**/*.txt'``) or a hub data set's id.
        columns: which columns hold what, where names do not tell: ``text=body``, ``prompt=question,completion=answer``
            or ``messages=turns``; ``prompt=instruction+input`` joins two.
        split: split of a hub data set.
        subset: configuration of a hub data set.
        max_rows: rows to use, drawn by the seed; None: all.
        held_out: share of the rows in [0, 1] to measure on; 0: none, 1: all, which leaves nothing to train on.
        held_out_data: a source to measure on instead, of the same kind of format.
        seed: draws rows; the same seed draws the same rows of the same data, wherever they stand in it.
        option: the flag that named the data, for messages.

    Raises:
        TypeError, ValueError: for a value that is none of these.

    >>> Source("notes.txt").held_out
    0.05
    """

    source: str
    columns: str | None = None
    split: str = "train"
    subset: str | None = None
    max_rows: int | None = None
    held_out: float = 0.05
    held_out_data: str | None = None
    seed: int = 0
    option: str = "--data"

    def __post_init__(self) -> None:
        validate.source(self)

    def flag(self, name: str) -> str:
        """Return how the command line calls another option of these data.

        >>> Source("notes.txt", option="--general").flag("columns")
        '--general-columns'
        """
        stem = self.option.removesuffix("held-out-data").rstrip("-")
        return f"--{name}" if stem in ("", "--data") else f"{stem}-{name}"


@dataclass(frozen=True)
class Texts:
    """Tokenised sets, and what is known of them.

    ``train`` and ``held_out`` have the columns ``input_ids`` and ``labels``, lists of int32 of one length ≤ max_length.
    Labels stand where their tokens stand, as transformers expects (its models shift them); -100 is not in the loss, and
    the first of each sequence always is -100, so that the labels that are not are the tokens that a loss counts.

    ``facts``: ``source``, ``held_out_source``, ``format``, ``held_out_format``, ``columns``, ``unit`` (what a row is),
    ``fingerprint`` (SHA-256 of the content of all rows in use), ``rows``, ``train_rows``, ``held_out_rows``,
    ``train_sequences``, ``held_out_sequences``, ``train_tokens``, ``held_out_tokens``, ``loss_tokens`` and
    ``held_out_loss_tokens`` (those in the loss), ``dropped`` (rows and sequences without any), ``truncated`` (rows),
    ``overlap`` (rows not trained on because ``held_out_data`` has them), ``packed``, ``files``, ``ignored_files``.
    None: of a side that was not tokenised.
    """

    train: Dataset | None
    held_out: Dataset | None
    facts: dict[str, Any]
