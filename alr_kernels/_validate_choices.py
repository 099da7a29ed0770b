"""What `eval` refuses: texts in which nothing counts, questions that are none, models that do not compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ._validate_values import listed


def counted(tokens: int, rows: int) -> None:
    if not tokens:
        raise ValueError(
            f"no token of the {rows} measured row(s) counts: expected at least one token that has another before it "
            "and is no padding or prompt; measure longer texts, or with loss_on='all'."
        )


def some_rows(name: str, rows: int) -> None:
    if not rows:
        raise ValueError(f"{name}: expected at least one question, got an empty file.")


def no_shape(name: str, columns: Sequence[str], shapes: Mapping[str, Sequence[str]]) -> NoReturn:
    known = "; ".join(f"{shape}: {', '.join(needed)}" for shape, needed in shapes.items())
    raise ValueError(f"{name}: no multiple choice in its columns {listed(columns)}. Expected those of one of {known}.")


def columns(where: str, needed: Sequence[str], row: Mapping[str, Any]) -> None:
    missing = [name for name in needed if name not in row]
    if missing:
        raise ValueError(f"{where}: no {listed(missing)}; expected {', '.join(needed)} in every row.")


def text(where: str, column: str, value: Any) -> None:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool) or not str(value).strip():
        raise ValueError(f"{where}: {column}: expected text, got {value!r}; fill it in, or leave the row out.")


def no_list(where: str, value: str, error: ValueError) -> NoReturn:
    raise ValueError(
        f'{where}: choices: expected a list, in CSV as JSON such as ["first", "second"], got {value!r} ({error}).'
    )


def choices(where: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        raise ValueError(f"{where}: choices: expected a list of two or more, got {value!r}.")
    for choice in value:
        text(where, "choices", choice)


def answer_index(where: str, column: str, value: Any, index: int | None, first: int, count: int) -> None:
    if index is None or not 0 <= index < count:
        raise ValueError(
            f"{where}: {column}: expected the right choice, {first} to {first + count - 1} or its letter, got "
            f"{value!r}; rows without an answer (test splits have -1) cannot be scored: leave them out."
        )


def one_numbering(name: str, numbers: set[int]) -> None:
    if numbers and {0, 4} <= numbers:
        raise ValueError(f"{name}: cop: got both 0 and 4; expected 0 to 3, or 1 to 4, in the whole file.")
    if numbers and not {0, 4} & numbers:
        raise ValueError(
            f"{name}: cop: neither 0 nor 4 is there, so that option A may be 0 or 1; write the letters A to D instead."
        )


def one_answer(where: str, value: Any, choices: Sequence[str], meant: Sequence[int]) -> None:
    if not meant:
        raise ValueError(
            f"{where}: answer: expected an index from 0 to {len(choices) - 1}, a letter from A to "
            f"{chr(ord('A') + len(choices) - 1)}, or the text of a choice ({listed(choices)}), got {value!r}."
        )
    if len(meant) > 1:
        raise ValueError(
            f"{where}: answer: {value!r} may mean any of choices {', '.join(map(str, meant))} (from 0) of "
            f"{listed(choices)}; write it in another of the ways: index, letter or text."
        )


def has_tokens(where: str, choice: str, tokens: int) -> None:
    if not tokens:
        raise ValueError(f"{where}: the tokenizer makes no token of choice {choice!r}; it cannot be scored.")


def short_choice(where: str, choice: str, tokens: int, max_length: int) -> None:
    if tokens >= max_length:
        raise ValueError(
            f"{where}: choice {choice[:40]!r} has {tokens} tokens; expected fewer than max_length={max_length}, "
            "for a part of it would be compared with others; raise it if the model takes more, or leave the row out."
        )


def file_there(flag: str, path: Any) -> None:
    if not Path(path).is_file():
        raise ValueError(
            f"{flag}: expected a .jsonl, .json, .csv, .tsv or .parquet file with questions, and there is none at "
            f"{str(path)!r}."
        )


def something_to_measure(texts: bool, files: Sequence[str]) -> None:
    if not texts and not files:
        raise ValueError("nothing to measure on: give --general, --domain, --choices or --domain-choices.")
    twice = [name for name in dict.fromkeys(files) if files.count(name) > 1]
    if twice:
        raise ValueError(f"--choices, --domain-choices: {listed(twice)} is given twice; leave one out.")


def options_of_texts(given: Mapping[str, Any]) -> None:
    """Refuse options of texts that are not there, and a share that holds out nothing."""
    for name in ("general", "domain"):
        for part in ("columns", "split", "subset"):
            if given[name] is None and given[f"{name}_{part}"] is not None:
                raise ValueError(f"--{name}-{part}: it has no effect without --{name}; add that or leave it out.")
    if given["general"] is None and given["domain"] is None:
        for option in ("held_out", "packing", "loss_on"):
            if given[option] is not None:
                flag = option.replace("_", "-")
                raise ValueError(f"--{flag}: it has no effect without --general or --domain; leave it out.")
    share = given["held_out"]
    if share is not None and not 0 < share <= 1:
        raise ValueError(
            f"--held-out: expected a share in (0, 1] of the rows to measure on, got {share}; leave it out for all."
        )


def result_file(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise ValueError(f"--out: expected a file in a folder that is there, got {str(path)!r}.")
    if path is not None and path.exists() and not _is_of_eval(path):
        raise FileExistsError(
            f"--out: {path} is there, and eval did not write it, so it stays as it is; choose another name."
        )


def _is_of_eval(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("kind") == "eval"
