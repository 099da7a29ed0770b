"""Multiple choice by log-likelihood: which of the choices the model finds likeliest after the question."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import _validate_choices as check
from ..importance.estimators.objectives import IGNORED
from .evaluation import losses
from .questions import Question

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Answers:
    """What each question scored: 1 for the right choice, 1/n where it ties with n - 1 others for the best."""

    right: np.ndarray  # [questions] float64, by log-likelihood
    right_norm: np.ndarray  # the same by log-likelihood over characters
    truncated: int = 0  # questions that lost their beginning
    undefined: int = 0  # questions with a likelihood that is NaN; they count as wrong

    def as_dict(self) -> dict[str, Any]:
        """Return accuracies with binomial standard errors, for JSON."""
        found: dict[str, Any] = {"questions": len(self.right)}
        for name, scores in (("accuracy", self.right), ("accuracy_norm", self.right_norm)):
            mean = float(scores.mean())
            found |= {name: mean, f"{name}_stderr": math.sqrt(mean * (1 - mean) / len(scores))}
        return found | {"truncated": self.truncated, "undefined": self.undefined}


@dataclass(frozen=True)
class Encoded:
    """A question as tokens, one sequence a choice; ``scored`` tokens at the end of each belong to the choice."""

    sequences: list[list[int]]
    scored: list[int]
    truncated: bool


def encode(tokenizer: Any, question: Question, max_length: int) -> Encoded:
    """Turn a question and its choices into tokens.

    Each choice is tokenised together with the question, as it would be read, and without it; a choice begins where the
    first of its question's sequences departs from the question alone. A token that spans the seam is thus scored, with
    the same context for all choices. Sequences that are too long lose their beginning.

    Args:
        tokenizer: of transformers. Its token for the beginning of a text is put first if it does so itself.
        question: what to encode.
        max_length: tokens of a sequence, at most.

    Raises:
        ValueError: a choice of no token, or of ``max_length`` or more.
    """
    start = _start(tokenizer)
    context = tokenizer.encode(question.context, add_special_tokens=False)
    whole = [tokenizer.encode(f"{question.context} {choice}", add_special_tokens=False) for choice in question.choices]
    shared = min(_common(context, tokens) for tokens in whole)
    sequences, scored = [], []
    for choice, tokens in zip(question.choices, whole, strict=True):
        count = len(tokens) - shared
        check.has_tokens(question.where, choice, count)
        check.short_choice(question.where, choice, count, max_length)
        sequences.append((start + tokens)[-max_length:])
        scored.append(count)
    longest = len(start) + max(map(len, whole))
    return Encoded(sequences, scored, longest > max_length)


def answer(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_length: int,
    batch: int,
    tick: Callable[[], None] | None = None,
) -> Answers:
    """Let a model choose, and say how often it chose right.

    The log-likelihood of a choice is the sum over its tokens; normalised, it is divided by the characters of the
    choice, as lm-eval's acc_norm does (for ASCII: by its bytes). Choices of the same text tie exactly.

    Args:
        model: a causal language model of transformers.
        tokenizer: its own.
        questions: what to ask.
        max_length: tokens of a question with one choice, at most; the beginning is cut off.
        batch: sequences in a batch; a question makes one for each choice.
        tick: called after each batch.

    Returns:
        Scores in the order of the questions.
    """
    encoded = [encode(tokenizer, question, max_length) for question in questions]
    places: dict[tuple[int, ...], int] = {}
    rows: list[dict[str, list[int]]] = []
    for entry in encoded:
        for tokens, count in zip(entry.sequences, entry.scored, strict=True):
            key = (count, *tokens)
            if key not in places:
                places[key] = len(rows)
                rows.append({"input_ids": tokens, "labels": [IGNORED] * (len(tokens) - count) + tokens[-count:]})
    filler = tokenizer.pad_token_id or 0
    sums = losses(model, rows, lambda chosen: _padded(chosen, filler), batch, tick).sums
    right, right_norm, undefined = np.zeros(len(questions)), np.zeros(len(questions)), 0
    for index, (question, entry) in enumerate(zip(questions, encoded, strict=True)):
        keys = [(count, *tokens) for tokens, count in zip(entry.sequences, entry.scored, strict=True)]
        likelihoods = -sums[[places[key] for key in keys]]
        undefined += bool(np.isnan(likelihoods).any())
        right[index] = score(likelihoods, question.answer)
        right_norm[index] = score(likelihoods / [len(choice) for choice in question.choices], question.answer)
    return Answers(right, right_norm, sum(entry.truncated for entry in encoded), undefined)


def score(likelihoods: np.ndarray, right: int) -> float:
    """Return 1 if the right choice is the likeliest, 1/n if it is one of n that are, else 0.

    >>> score(np.array([-3.0, -1.0, -1.0]), 1)
    0.5
    >>> score(np.array([np.nan, -1.0]), 1)
    0.0
    """
    if np.isnan(likelihoods).any():
        return 0.0
    best = likelihoods == likelihoods.max()
    return float(best[right] / best.sum())


def _start(tokenizer: Any) -> list[int]:
    """Return the token that the tokenizer puts before every text, if it has one."""
    ids = tokenizer.encode("a")
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with together."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _padded(rows: Sequence[Mapping[str, list[int]]], filler: int) -> dict[str, Tensor]:
    """Return a batch that is padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": filled("input_ids", filler), "labels": filled("labels", IGNORED), "attention_mask": mask}
