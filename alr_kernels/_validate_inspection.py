"""Checks of `inspect`, `compare` and `convert`, and their messages: expected, got, what to do; see ``_validate.py``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._validate import choice, listed, number
from ._validate_importance import _other_prefix

ENCODED = ("int8", "int4", "rank1")
KEPT = "kept"
WORDS = ("auto", "all", "none")
COMMON = 1e-6  # how far from 1 the mean of what is normalized may be


class NothingInCommonError(ValueError):
    """Two importance files without a tensor of the same name."""


def whole(name: str, is_sharded: bool) -> None:
    if is_sharded:
        raise ValueError(
            f"importance of {name!r}: expected a whole tensor, got one that is sharded; save() it on every rank and "
            "load the file in one process."
        )


def coefficient_options(rule: str, temperature: float | str) -> float | str:
    """Return the temperature, ``"auto"`` or a number, once the rule has one."""
    if temperature == "auto":
        return temperature
    if rule != "softmax":
        raise ValueError(
            f"temperature: it has no effect with coeffs={rule!r}; use 'softmax' or leave it out, got {temperature!r}."
        )
    return number("temperature", temperature, open_low=True)


def encodings(value: str) -> tuple[str, ...] | None:
    """Return the encodings that are asked for; None: ``"auto"``."""
    if value in WORDS:
        return {"auto": None, "all": (*ENCODED, KEPT), "none": ()}[value]
    asked = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
    unknown = [part for part in asked if part not in (*ENCODED, KEPT)]
    if unknown:
        raise ValueError(
            f"encodings: expected {', '.join(WORDS)}, or a list of {', '.join((*ENCODED, KEPT))}, got {value!r}."
        )
    return asked


def encodable(asked: Sequence[str], fitting: Mapping[str, int]) -> None:
    """Refuse an encoding that no tensor of the file would take; ``fitting``: tensors by encoding."""
    without = [form for form in asked if form != KEPT and not fitting[form]]
    if without:
        raise ValueError(
            f"encodings: {', '.join(without)}: it has no effect, because no tensor of this file is kept in floats and "
            "takes it (matrices of 4096 elements or more; for codes, rows of a multiple of 128). 'kept' compares what "
            "is encoded already with the statistics of the original; 'all' takes what there is."
        )


def top_rows(top: int | None, as_json: bool) -> None:
    if top is not None and as_json:
        raise ValueError("top: it has no effect with --json, which has every tensor; leave one of them out.")


def file_in_folder(option: str, target: Path) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{option}: there is no folder {str(target.parent)!r}; create it first.")


def picture(target: Path) -> None:
    if target.suffix != ".png":
        raise ValueError(f"plot: expected a name ending in .png, got {str(target)!r}.")
    file_in_folder("plot", target)


def comparable(first: Mapping[str, Sequence[int]], second: Mapping[str, Sequence[int]], names: Sequence[str]) -> None:
    """Refuse two files without a common tensor (another exception, for another exit code), or with other shapes."""
    if not names:
        found = _other_prefix(first, second, list(first)) if first and second else None
        cure = (
            f"with {found[1]!r} before its names in place of {found[0]!r}, {found[2]} of the first would match: "
            f"alr-kernels convert FIRST --rename {found[0]}={found[1]} --out RENAMED"
            if found
            else "are they of the same model?"
        )
        raise NothingInCommonError(
            f"nothing in common: expected tensors of the same names, got {listed(first, 3) or 'none'} and "
            f"{listed(second, 3) or 'none'}; {cure}"
        )
    differing = [name for name in names if tuple(first[name]) != tuple(second[name])]
    if differing:
        name = min(differing)
        raise ValueError(
            f"importance of {name!r}: expected the same shape in both files, got {tuple(first[name])} and "
            f"{tuple(second[name])} ({len(differing)} of {len(names)} common tensors differ: {listed(differing, 3)}); "
            "they are of different models. Leave such tensors out with alr-kernels convert --select."
        )


def merging(files: int, rule: str | None) -> None:
    if not files:
        raise ValueError("convert: expected one importance or several, got none.")
    if files > 1 and rule is None:
        raise ValueError(
            f"merge: {files} files are given and nothing says how they become one; "
            "add --merge sum, max, weighted or decayed, or convert them one by one."
        )
    if files == 1 and rule is not None:
        raise ValueError(f"merge: {rule!r} has no effect on a single file; give two or more, or leave it out.")


def merge_weights(rule: str | None, given: Sequence[Any], files: int) -> tuple[float, ...] | None:
    """Return the factor of each file; None for a maximum."""
    if rule in (None, "sum", "max"):
        if given:
            what = "without --merge" if rule is None else f"with --merge {rule}"
            raise ValueError(f"weight: it has no effect {what}; leave it out, or use 'weighted' or 'decayed'.")
        return None if rule == "max" else (1.0,) * files
    values = [number("weight", value, high=1.0, closed=True) for value in given]
    if rule == "decayed":
        if len(values) != 1:
            raise ValueError(
                f"weight: 'decayed' needs one number in [0, 1], what is left of earlier files at each later one, "
                f"got {len(values)}."
            )
        return tuple(values[0] ** later for later in reversed(range(files)))
    if len(values) == 1 and files == 2:
        values = [values[0], 1.0 - values[0]]
    if len(values) != files or not math.isclose(math.fsum(values), 1.0, abs_tol=1e-9):
        raise ValueError(
            f"weight: 'weighted' needs one number in [0, 1] for each of {files} files, of sum 1"
            f"{' (or that of the first alone)' if files == 2 else ''}, got {listed(map(str, given)) or 'none'}."
        )
    return tuple(values)


def renaming(value: str) -> tuple[str, str]:
    """Return (old, new) of ``OLD=NEW``."""
    old, sign, new = value.partition("=")
    if not sign or old == new:
        raise ValueError(
            f"rename: expected OLD=NEW, two different beginnings of names of which one may be empty, got {value!r}; "
            "for instance layers.=model.layers. or =model. (before every name)."
        )
    return old, new


def renamed_some(old: str, matched: int, names: Iterable[str]) -> None:
    if not matched:
        raise ValueError(f"rename: no name begins with {old!r}, so it has no effect; there are {listed(names, 3)}.")


def selected_some(pattern: str, matched: int, names: Iterable[str]) -> None:
    if not matched:
        raise ValueError(
            f"select: {pattern!r} matches no name; there are {listed(names, 3)}. * matches any characters, dots "
            "included: '*.q_proj.weight'."
        )


def not_normalized_yet(done: Sequence[bool], means: Sequence[float]) -> None:
    if done and all(done) and all(abs(mean - 1.0) < COMMON for mean in means):
        raise ValueError("normalize: it has no effect, because the mean is 1 already; leave it out.")


def some_change(changes: bool, options: str) -> None:
    if not changes:
        raise ValueError(f"nothing would change; give one of {options}, or copy the file.")


def dtype_changes(dtype: str, before: Mapping[str, str], after: Mapping[str, str]) -> None:
    if dict(before) == dict(after):
        forms = sorted(set(before.values()))
        raise ValueError(
            f"dtype: {dtype!r} has no effect: all is kept as {', '.join(forms)} and stays so (vectors, tensors under "
            " 4096 elements and, for codes, rows of no multiple of 128 stay fp32)."
        )


def free_target(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise ValueError(f"out: expected a file, got the folder {str(target)!r}.")
    if target.exists() and not overwrite:
        raise ValueError(f"out: {str(target)!r} exists; add --overwrite to replace it, or choose another name.")


def comparison_options(top: Any, sample: Any) -> tuple[float, int]:
    """Return the share and the number once they are in range."""
    share = number("top", top, high=0.5, closed=True, open_low=True)
    if isinstance(sample, bool) or not isinstance(sample, int) or sample < 2:
        raise ValueError(f"sample: expected an integer ≥ 2, got {sample!r}.")
    return share, sample


def rule_choice(option: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None:
        choice(option, value, allowed)
