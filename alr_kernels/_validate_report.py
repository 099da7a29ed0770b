"""Checks on results files that a report is drawn from, and their messages; see ``_validate.py``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from ._validate import listed


def no_file(path: Path) -> NoReturn:
    raise FileNotFoundError(
        f"results: there is no {path}; expected the results.json that tune, run or demo left, or the folder it is in."
    )


def no_json(path: Path, error: ValueError) -> NoReturn:
    raise ValueError(f"results: {path} is no JSON ({error}); expected the results.json of tune, run or demo.")


def kind(path: Path, found: Any, known: Collection[str]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"results: {path} holds a {type(found).__name__}, expected the results.json of tune or run.")
    if found.get("kind") not in known:
        raise ValueError(
            f'results: {path} has "kind" {found.get("kind")!r}, expected one of {listed(known)}; '
            "results of older versions have none: run the command again."
        )


def not_whole(path: Path, error: Exception) -> NoReturn:
    raise ValueError(
        f"results: {path} is not whole or was changed by hand ({type(error).__name__}: {error}); run the command again."
    ) from error


def foreign_page(folder: Path, names: Sequence[str]) -> NoReturn:
    raise ValueError(
        f"report: the folder {folder} has {listed(names)} that no report left and that stays as it is; choose another "
        "folder."
    )


def matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise ImportError('A report needs matplotlib: pip install "alr-kernels[report]"')
