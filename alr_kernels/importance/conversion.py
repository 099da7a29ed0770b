"""Importance files made of others: selected, renamed, normalized, merged, encoded anew, one tensor at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .. import _validate_importance, _validate_inspection
from ..codecs.encoded import Encoded
from ..codecs.storage import fitting, parse, why_wide
from .artifact import MAXIMUM, MERGE_RULES, Importance
from .chunks import Loss, loss
from .files import About, ImportanceWriter
from .statistics import TensorStats

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Converted:
    """What :func:`convert` wrote."""

    path: str
    nbytes: int
    tensor_bytes: int
    about: About
    forms: dict[str, str]  # by tensor
    losses: dict[str, Loss]  # of tensors whose form changed, in this conversion alone
    wide: dict[str, int]  # tensors that stay fp32 though another form was asked for, by the reason

    @property
    def loss(self) -> Loss | None:
        """Of all tensors whose form changed; None where none did."""
        return Loss.pooled(self.losses.values()) if self.losses else None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        encoding = None
        if self.loss is not None:
            encoding = {**self.loss.as_dict(), "tensors": len(self.losses)}
        return {
            "path": self.path,
            "bytes": self.nbytes,
            "tensor_bytes": self.tensor_bytes,
            "tensors": len(self.forms),
            "forms": {form: list(self.forms.values()).count(form) for form in dict.fromkeys(self.forms.values())},
            **{key: value for key, value in self.about._asdict().items() if key != "cut"},
            "encoding": encoding,
            "stay_fp32": self.wide,
        }


def convert(
    inputs: Sequence[Importance],
    target: str | os.PathLike[str],
    *,
    select: Sequence[str] = (),
    rename: Sequence[str] = (),
    normalize: bool = False,
    merge: str | None = None,
    weights: Sequence[float] = (),
    dtype: str | None = None,
    tick: Tick | None = None,
) -> Converted:
    """Write one importance file from one or several, in the order of the arguments below; see ``docs/inspecting.md``.

    Loaded files stay on disk; memory holds one tensor in float32 and as it is written. The file appears whole or not at
    all, and may replace one of the inputs.

    Args:
        inputs: what is converted, as :meth:`Importance.load` maps it.
        target: ends in ``.safetensors``.
        select: patterns such as ``"*.q_proj.weight"`` of the names to keep; one of them has to match.
        rename: ``"OLD=NEW"``: names that begin with OLD begin with NEW, one after the other.
        normalize: scale each input to mean 1 over what was selected.
        merge: ``"sum"``, ``"max"``, ``"weighted"`` or ``"decayed"``, for two inputs or more, as
            :meth:`Importance.merged` does from left to right.
        weights: for ``"weighted"`` one an input, of sum 1 (of two inputs the first is enough); for ``"decayed"`` one.
        dtype: ``"fp32"``, ``"bf16"``, ``"int8"``, ``"int4"``, ``"rank1"``; None keeps each form.
        tick: called with the elements of each tensor once it is written.

    Raises:
        ValueError: an option that has no effect, names that do not match, importances that do not merge.
        OSError: the file cannot be written; one that was there stays.

    >>> import tempfile, torch
    >>> path = tempfile.mkdtemp() + "/i.safetensors"
    >>> done = convert([Importance({"layers.0.w": torch.ones(64, 128)})], path, rename=["=model."], dtype="int4")
    >>> done.tensor_bytes, done.forms, done.loss.rms
    (4224, {'model.layers.0.w': 'int4'}, 0.0)
    """
    kept = None if dtype is None else parse("dtype", dtype)
    _validate_inspection.rule_choice("merge", merge, MERGE_RULES)
    _validate_inspection.merging(len(inputs), merge)
    factors = _validate_inspection.merge_weights(merge, weights, len(inputs))
    renames = [_validate_inspection.renaming(value) for value in rename]
    whole = sum(map(len, inputs))
    given = _renamed(_selected(inputs, select), renames)
    means = [1.0] * len(given)
    if normalize:
        means = _means(given)
        for importance in given:
            importance.is_normalized = True  # the copy's: selecting made it
    for other in given[1:]:
        _validate_importance.mergeable(given[0], other, "merge", "Add --normalize (in Python: normalize=True).")
    before = _forms(given, merge is not None or normalize)
    changes = bool(merge or normalize or renames or kept or sum(map(len, given)) < whole)
    _validate_inspection.some_change(changes, "--select, --rename, --normalize, --merge or --dtype")
    shapes = {name: tuple(x.encoded(name).shape) for x in given for name in x}
    forms = before if kept is None else {name: fitting(kept, shapes[name]) for name in before}
    if kept is not None:
        _validate_inspection.dtype_changes(kept, before, forms)
    reasons = [why_wide(kept, shapes[name]) for name in forms] if kept is not None else []
    wide = Counter(reason for reason in reasons if reason is not None)
    return _written(Path(target), given, forms, shapes, means, factors, dict(wide), tick or (lambda elements: None))


def _selected(inputs: Sequence[Importance], patterns: Sequence[str]) -> list[Importance]:
    if not patterns:
        return [importance.select(importance) for importance in inputs]
    known = [name for importance in inputs for name in importance]
    for pattern in patterns:
        _validate_inspection.selected_some(pattern, sum(fnmatchcase(name, pattern) for name in known), known)
    found = []
    for importance in inputs:
        names = [name for name in importance if any(fnmatchcase(name, pattern) for pattern in patterns)]
        _validate_inspection.selected_some(" ".join(patterns), len(names), importance)
        found.append(importance.select(names))
    return found


def _renamed(inputs: list[Importance], renames: Sequence[tuple[str, str]]) -> list[Importance]:
    for old, new in renames:
        matched = [any(name.startswith(old) for name in importance) for importance in inputs]
        _validate_inspection.renamed_some(old, sum(matched), [name for importance in inputs for name in importance])
        pairs = zip(inputs, matched, strict=True)
        inputs = [importance.renamed(old, new) if found else importance for importance, found in pairs]
    return inputs


def _means(inputs: Sequence[Importance]) -> list[float]:
    means = [TensorStats.pooled(importance.stats.values()).mean for importance in inputs]
    _validate_inspection.not_normalized_yet([importance.is_normalized for importance in inputs], means)
    for mean in means:
        _validate_importance.some_importance({"mean": mean})
    return means


def _forms(inputs: Sequence[Importance], computed: bool) -> dict[str, str]:
    """Return how each tensor is kept where nothing is asked for: as in the first input, or as that keeps most."""
    first = inputs[0]
    sizes: dict[str, int] = {}
    for name in first:
        entry = first.encoded(name)
        sizes[entry.format] = sizes.get(entry.format, 0) + entry.numel
    common = max(sizes, key=lambda form: sizes[form])
    forms = {}
    for name in dict.fromkeys(name for importance in inputs for name in importance):
        owner = next(importance for importance in inputs if name in importance)
        entry = owner.encoded(name)
        form = entry.format if owner is first else fitting(common, entry.shape)
        forms[name] = "fp32" if computed and form == "fp16" else form  # sums may pass what float16 holds
    return forms


def _written(
    target: Path, given: Sequence[Importance], forms: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]],
    means: Sequence[float], factors: tuple[float, ...] | None, wide: dict[str, int], tick: Tick,
) -> Converted:  # fmt: skip
    about = given[0].about
    for other in given[1:]:
        about = about.merged(other.about)
    losses, nbytes = {}, 0
    layout = {name: (form, shapes[name]) for name, form in forms.items()}
    with ImportanceWriter.of_layout(target, layout, about) as writer:
        for name, form in forms.items():
            entries = [importance.encoded(name) if name in importance else None for importance in given]
            known = [importance.stats.get(name) for importance in given]
            entry, stats = _combined(name, entries, known, means, factors)
            kept = _encoded(entry, form)
            if kept.format != entry.format:
                losses[name] = loss(name, entry, kept)
            writer.add(name, kept, stats)
            nbytes += kept.nbytes
            tick(kept.numel)
    return Converted(str(target), writer.nbytes, nbytes, about, dict(forms), losses, wide)


def _combined(
    name: str, entries: Sequence[Encoded | None], known: Sequence[TensorStats | None], means: Sequence[float],
    factors: tuple[float, ...] | None,
) -> tuple[Encoded, TensorStats]:  # fmt: skip
    """Return Ω of one tensor in all inputs and its statistics: as it is kept of a single one, else floats."""
    from .. import _ops

    if len(entries) == 1 and means[0] == 1.0:
        (entry,), (row,) = entries, known
        assert entry is not None
        assert row is not None
        return entry, row
    wide = "fp64" if any(entry is not None and entry.format == "fp64" for entry in entries) else "fp32"
    scales = [factor / mean for factor, mean in zip(factors or [1.0] * len(means), means, strict=True)]
    here = [(entry, scale) for entry, scale in zip(entries, scales, strict=True) if entry is not None]
    (whole, scale), *others = here
    if not others or factors is None:
        (whole,), table, counts = _ops.merge([whole], [None], [wide], (scale, 0.0))
        scale = 1.0
    for entry, other in others:
        if factors is None:
            scaled = entry if other == 1.0 else _ops.merge([entry], [None], [wide], (other, 0.0))[0][0]
            (whole,), table, counts = _ops.merge([whole], [scaled], [wide], None)
        else:
            (whole,), table, counts = _ops.merge([whole], [entry], [wide], (scale, other))
            scale = 1.0
    _validate_importance.importance_range(name, float(table[0][MAXIMUM]))
    return whole, TensorStats.of_row(table[0], counts[0], False).after(known, factors)


def _encoded(entry: Encoded, form: str) -> Encoded:
    from .. import _ops

    return entry if entry.format == form else _ops.merge([entry], [None], [form], (1.0, 0.0))[0][0]
