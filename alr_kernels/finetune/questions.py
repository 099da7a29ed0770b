"""Multiple-choice questions from the columns of a file: SciQ's, PIQA's, MedMCQA's, or question, choices, answer.

Prompts are those of lm-eval's tasks sciq, piqa and medmcqa, so that accuracies compare with its own.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import _validate_choices as check

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A prompt, what may follow it, and which of these is right."""

    context: str
    choices: tuple[str, ...]  # a space comes between the context and each of them
    answer: int  # index of the right choice
    where: str = field(default="question", compare=False)  # file and row, for messages


@dataclass(frozen=True)
class Shape:
    """Which columns a kind of file has, and what they become."""

    name: str
    columns: tuple[str, ...]  # in every row
    read: Callable[[Row, str, int], Question]  # row, where it is (for messages), first index of answers
    optional: tuple[str, ...] = ()

    def fits(self, columns: Sequence[str]) -> bool:
        """Say whether a file with these columns is of this shape."""
        return set(self.columns) <= set(columns)


def _sciq(row: Row, where: str, first: int) -> Question:
    support = str(row.get("support") or "").lstrip()
    choices = tuple(_text(row, name, where) for name in ("distractor1", "distractor2", "distractor3", "correct_answer"))
    return Question(f"{support}\nQuestion: {_text(row, 'question', where)}\nAnswer:", choices, 3, where)


def _piqa(row: Row, where: str, first: int) -> Question:
    choices = (_text(row, "sol1", where), _text(row, "sol2", where))
    answer = _indexed(row["label"], "label", where, first, 2)
    return Question(f"Question: {_text(row, 'goal', where)}\nAnswer:", choices, answer, where)


def _medmcqa(row: Row, where: str, first: int) -> Question:
    options = [_text(row, name, where) for name in ("opa", "opb", "opc", "opd")]
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=True))
    answer = _indexed(row["cop"], "cop", where, first, 4)
    context = f"Question: {_text(row, 'question', where)}\nChoices:\n{listed}Answer:"
    return Question(context, ("A", "B", "C", "D"), answer, where)


def _general(row: Row, where: str, first: int) -> Question:
    choices = row["choices"]
    if isinstance(choices, str):  # a cell of a CSV file
        try:
            choices = json.loads(choices)
        except ValueError as error:
            check.no_list(where, row["choices"], error)
    if hasattr(choices, "tolist"):  # an array of a Parquet file
        choices = choices.tolist()
    check.choices(where, choices)
    texts = tuple(str(choice) for choice in choices)
    context = f"Question: {_text(row, 'question', where)}\nAnswer:"
    return Question(context, texts, _answer(row["answer"], texts, where), where)


SHAPES = (
    Shape("SciQ", ("question", "correct_answer", "distractor1", "distractor2", "distractor3"), _sciq, ("support",)),
    Shape("PIQA", ("goal", "sol1", "sol2", "label"), _piqa),
    Shape("MedMCQA", ("question", "opa", "opb", "opc", "opd", "cop"), _medmcqa),
    Shape("general", ("question", "choices", "answer"), _general),
)


def read(path: str | Path) -> tuple[str, list[Question]]:
    """Return the shape's name and the questions of a JSON lines, JSON, CSV, TSV or Parquet file.

    Raises:
        ValueError: as `parse`, and a file that is not there or not what its name says.
    """
    check.file_there("--choices", path)
    from .data import readers

    table = readers.open_table(Path(path), whole=True)
    if table is None:
        return parse((), str(path))  # which refuses it
    shape = _shape(table.name, table.columns or ())
    wanted = [*shape.columns, *(name for name in shape.optional if name in (table.columns or ()))]
    return parse(((f"{table.name}, {table.unit} {number}", row) for number, row in table.rows(wanted)), str(path))


def parse(rows: Iterable[tuple[str, Row]], name: str) -> tuple[str, list[Question]]:
    """Return the shape's name and the questions of a file's rows.

    Args:
        rows: (where the row is, column → value), as JSON, CSV (where all values are text) or Parquet has them. The
            first tells the shape.
        name: of the file, for messages.

    Raises:
        ValueError: no row; columns of no known shape; a row without a column, a question, a choice or an answer.

    >>> row = {"question": "2 + 2?", "choices": ["3", "4", "five"], "answer": "B"}
    >>> parse([("sums.jsonl, line 1", row)], "sums.jsonl")[1][0].answer
    1
    """
    gathered = list(rows)
    check.some_rows(name, len(gathered))
    shape = _shape(name, tuple(gathered[0][1]))
    for where, row in gathered:
        check.columns(where, shape.columns, row)
    first = _first_option([row["cop"] for _, row in gathered], name) if shape.name == "MedMCQA" else 0
    return shape.name, [shape.read(row, where, first) for where, row in gathered]


def _shape(name: str, columns: Sequence[str]) -> Shape:
    shape = next((shape for shape in SHAPES if shape.fits(columns)), None)
    if shape is None:
        check.no_shape(name, columns, {shape.name: shape.columns for shape in SHAPES})
    return shape


def _text(row: Row, column: str, where: str) -> str:
    value = row[column]
    check.text(where, column, value)
    return str(value)


def _whole(value: Any) -> int | None:
    """Return the integer that a value is, as a number or as text."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole and not isinstance(value, bool) else None


def _letter(value: Any) -> int | None:
    """Return 0 for A or a, and so on."""
    if isinstance(value, str) and len(value.strip()) == 1 and value.strip().upper() in string.ascii_uppercase:
        return string.ascii_uppercase.index(value.strip().upper())
    return None


def _indexed(value: Any, column: str, where: str, first: int, count: int) -> int:
    index = _whole(value)
    found = _letter(value) if index is None else index - first
    check.answer_index(where, column, value, found, first, count)
    return found  # type: ignore[return-value]  # checked above


def _first_option(values: Sequence[Any], name: str) -> int:
    """Return the number of option A: the hub's copy of MedMCQA counts from 0, its authors' files from 1."""
    numbers = {number for number in map(_whole, values) if number is not None}
    check.one_numbering(name, numbers)
    return int(4 in numbers)


def _answer(value: Any, choices: Sequence[str], where: str) -> int:
    """Return the index that an answer means: an index from 0, a letter, or the text of a choice."""
    meant = {index for index, choice in enumerate(choices) if choice == str(value)}
    meant = {min(meant)} if meant else meant  # a choice that is there twice
    for index in (_whole(value), _letter(value)):
        if index is not None and 0 <= index < len(choices):
            meant.add(index)
    check.one_answer(where, value, choices, sorted(meant))
    return meant.pop()
