"""Checks on importance, recordings, mergers and files, and their messages; see ``_validate.py``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ._validate import FLOAT_DTYPES, listed, number

if TYPE_CHECKING:
    from os import PathLike


def importance_form(importance: Any) -> None:
    if isinstance(importance, str) or not isinstance(importance, (Mapping, Sequence)):
        raise TypeError(
            "importance: expected an Importance, a mapping name → tensor, a sequence aligned with the parameters, "
            f"or None, got {type(importance).__name__}; a file is read with Importance.load(path)."
        )


def importance_tensor(name: str, importance: Any) -> None:
    if not isinstance(importance, Tensor) or importance.dtype not in FLOAT_DTYPES:
        got = importance.dtype if isinstance(importance, Tensor) else type(importance).__name__
        raise TypeError(
            f"importance of {name!r}: expected a floating-point tensor (float32, bfloat16, float16, float64), "
            f"got {got}."
        )


def importance_values(name: str, importance: Tensor) -> float:
    """Refuse negative and non-finite importance, and return its maximum. One pass over the tensor."""
    if importance.numel() == 0:
        return 0.0
    low, high = (float(bound) for bound in torch.aminmax(importance.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"importance of {name!r}: expected finite values, got min {low}, max {high}; record it again or mask them."
        )
    if low < 0:
        raise ValueError(
            f"importance of {name!r}: expected values ≥ 0, got min {low:.3g}; "
            "signed path integrals are finalised with recorded_importance(), which clamps once."
        )
    return high


def importance_fits(
    entries: Mapping[str, Sequence[int]], params: Mapping[str, Sequence[int]], pairs: bool = False
) -> None:
    """Refuse an importance whose names and shapes are not those of parameters and LoRA pairs, saying which differ."""
    unmatched = [name for name in entries if name not in params]
    if unmatched and (found := _other_prefix(entries, params, unmatched)):
        old, new, fitting = found
        raise ValueError(
            f"importance: {len(unmatched)} of its entries match no parameter: {listed(unmatched)}; {fitting} of "
            f"{len(entries)} fit with {new!r} before their names in place of {old!r}: pass "
            f"importance.renamed({old!r}, {new!r})."
        )
    if unmatched:
        raise ValueError(
            f"importance: {len(unmatched)} of its entries match no parameter: {listed(unmatched)}; parameters are "
            f"{listed(params, 3)}. If only some parameters are trained, pass importance.select("
            f"{'pairs.importance_names' if pairs else 'name for name, _ in named_parameters'})."
        )
    differing = [name for name, shape in entries.items() if tuple(shape) != tuple(params[name])]
    if differing:
        name = min(differing)
        others = f"; so do {listed(set(differing) - {name})}" if len(differing) > 1 else ""
        raise ValueError(
            f"importance of {name!r}: expected shape {tuple(params[name])} as the parameter, "
            f"got {tuple(entries[name])}{others}; was it recorded on another model?"
        )


def _other_prefix(
    entries: Mapping[str, Sequence[int]], params: Mapping[str, Sequence[int]], unmatched: Sequence[str]
) -> tuple[str, str, int] | None:
    """Return (old, new, how many entries fit) when most entries are parameters once ``old`` is ``new``, or None."""
    by_last: dict[str, list[str]] = {}
    for name in params:
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    candidates = set()
    for probe in {unmatched[0], unmatched[len(unmatched) // 2], unmatched[-1]}:
        for name in by_last.get(probe.rpartition(".")[2], ()):
            here, there = probe.split("."), name.split(".")
            while here and there and here[-1] == there[-1]:
                here.pop()
                there.pop()
            candidates.add(("".join(f"{part}." for part in here), "".join(f"{part}." for part in there)))

    def fits(old: str, new: str) -> int:
        moved = {name: new + name.removeprefix(old) for name in entries if name.startswith(old)}
        return sum(to in params and tuple(params[to]) == tuple(entries[name]) for name, to in moved.items())

    counted = [(fits(old, new), old, new) for old, new in sorted(candidates)]
    most, old, new = max(counted, default=(0, "", ""))
    told = most > 1 or not (old and new)  # one entry and two prefixes: any two names would do
    return (old, new, most) if told and 2 * most > len(entries) else None


def prefix(old: str, names: Iterable[str]) -> None:
    if not any(name.startswith(old) for name in names):
        raise ValueError(f"importance.renamed: no name begins with {old!r}; it has {listed(names, 3)}.")


def needs_importance(what: str) -> NoReturn:
    raise ValueError(
        f"{what}: it has no effect, because this optimizer has no importance; pass importance or leave it out."
    )


def finite_norm(layer: str, norm: float) -> None:
    if not math.isfinite(norm):
        raise ValueError(f"importance: expected a finite norm in layer {layer!r}, got {norm}; rescale the importance.")


def some_importance(norms: Mapping[str, float]) -> None:
    if not norms or not any(norm > 0 for norm in norms.values()):
        raise ValueError(
            "importance: expected at least one positive value, got zero everywhere; "
            "was it recorded (record=True, at least one step) before it was finalised? For no penalty pass None."
        )


def finite_recording(nonfinite: Mapping[str, float], allow: bool) -> None:
    bad = {name: int(count) for name, count in nonfinite.items() if count}
    if bad and not allow:
        raise ValueError(
            f"path integral: {sum(bad.values())} non-finite element(s) in {listed(bad)}: a gradient was NaN or inf "
            "while recording, or ω/ξ passed float32 (raise ξ). They would be given importance 0; pass "
            "allow_nonfinite=True to accept that."
        )


def recording(recorded: bool, has_state: bool) -> None:
    if not recorded:
        raise RuntimeError("recorded_importance: this optimizer does not record; construct it with record=True.")
    if not has_state:
        raise RuntimeError("recorded_importance: no step has been taken yet, so there is nothing to finalise.")


def recorder_grads(had: bool, has: bool) -> None:
    if had and not has:
        raise RuntimeError(
            "ImportanceRecorder: the optimizer released every gradient during step(), so −g·Δθ cannot be formed; "
            "record with AlrAdamW(record=True) instead."
        )


def recorder_scaling(grad_scale: object) -> None:
    if grad_scale is not None:
        raise RuntimeError(
            "ImportanceRecorder: this optimizer receives gradients that are still multiplied by the loss scale; "
            "call scaler.unscale_(optimizer) before scaler.step(optimizer)."
        )


def recorder_members(named: Mapping[str, Tensor], optimizer_params: Iterable[Tensor]) -> None:
    stepped = {id(param) for param in optimizer_params}
    strangers = [name for name, param in named.items() if param.requires_grad and id(param) not in stepped]
    if strangers or not named:
        raise ValueError(
            f"ImportanceRecorder: expected parameters of the optimizer, got {listed(strangers) or 'none'}; "
            "pass the named parameters that this optimizer steps."
        )


def file_names(names: Iterable[str]) -> None:
    bad = [name for name in names if ":" in name or name == "__metadata__"]
    if bad:
        raise ValueError(
            f"importance file: expected names without a colon, got {listed(bad)}; the file's own tensors have one."
        )


def closed_writer() -> NoReturn:
    raise ValueError("importance file: this writer was closed or aborted; begin a new one.")


def importance_range(name: str, largest: float) -> None:
    if not math.isfinite(largest):
        raise ValueError(
            f"importance of {name!r}: the result passes what float32 holds (max {largest}); merge smaller or "
            "normalized() ones."
        )


def expected_entry(name: str, expected: Iterable[str], written: Iterable[str]) -> None:
    if name not in expected:
        raise ValueError(
            f"importance file: {name!r} is not one of the tensors it was begun with, which are {listed(expected, 3)}."
        )
    if name in written:
        raise ValueError(f"importance file: {name!r} was added before; each tensor comes once.")


def entry_shape(name: str, got: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(got) != tuple(expected):
        raise ValueError(f"importance of {name!r}: expected shape {tuple(expected)}, got {tuple(got)}.")


def complete_file(path: str, expected: Iterable[str], written: Iterable[str]) -> None:
    missing = set(expected) - set(written)
    if missing:
        raise ValueError(
            f"importance file {path!r}: expected all its tensors, {listed(missing)} missing; add them first."
        )


def unknown_entry(name: str, known: Iterable[str]) -> NoReturn:
    near = difflib.get_close_matches(name, list(known), n=3)
    raise KeyError(f"{name!r} has no importance here" + (f"; did you mean {listed(near)}?" if near else "."))


def merge_weight(rule: str, weight: Any) -> float:
    if rule in ("sum", "max"):
        if weight is not None:
            raise ValueError(
                f"weight: it has no effect with rule={rule!r}; leave it out, or use 'weighted' or 'decayed'."
            )
        return 1.0
    if weight is None:
        raise ValueError(f"weight: rule={rule!r} needs one, 0 ≤ weight ≤ 1.")
    return number("weight", weight, high=1.0, closed=True)


def mergeable(
    first: Any, second: Any, said: str = "merged", remedy: str = "Use a.normalized().merged(b.normalized(), ...)."
) -> None:
    """Refuse two importances whose values do not compare: raw Ω of different estimators, or of different models.

    ``said``: what is complained of; ``remedy``: how its user makes different estimators comparable.
    """
    if not hasattr(second, "encoded"):
        raise TypeError(f"merged: expected an Importance, got {type(second).__name__}.")
    if first.is_normalized != second.is_normalized or (first.method != second.method and not first.is_normalized):
        forms = [f"{x.method}{', normalized' if x.is_normalized else ''}" for x in (first, second)]
        raise ValueError(
            f"{said}: expected the same estimator, or both normalized, got {forms[0]} and {forms[1]}: raw importances "
            f"of different estimators have different units. {remedy}"
        )
    shapes = {name: tuple(second.encoded(name).shape) for name in second if name in first}
    differing = [name for name, shape in shapes.items() if tuple(first.encoded(name).shape) != shape]
    if differing:
        name = min(differing)
        raise ValueError(
            f"{said}: expected the shapes of fingerprint {first.fingerprint}, got another model: {listed(differing)} "
            f"differ ({name!r}: {tuple(first.encoded(name).shape)} and {shapes[name]})."
        )


def importance_path(path: str | PathLike[str]) -> Path:
    """Return where to write, once the name says what it is."""
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"importance file: expected a name ending in .safetensors, got {str(path)!r}.")
    return target


def importance_folder(target: Path) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"importance file: there is no folder {str(target.parent)!r}; create it first.")
