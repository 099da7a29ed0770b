"""The report of ``tune`` and ``run``, from their results (``results.json``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from . import charts, drawing
from .drawing import Series, duration
from .page import Absent, Cell, Chart, Number, Page, Table, shown
from .palette import BLACK, BLUE, VERMILLION
from .run_words import NATS, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# phase of the results → what the page calls it, colour, marker
STYLE = {
    "tune": ("tuned", VERMILLION, "D"),
    "plain": ("baseline (no pull)", BLACK, "o"),
    "record": ("recording", BLUE, "^"),
}
NO_GENERAL = "No general text was measured, so nothing is known of what was forgotten: give one with `--general`."
NO_IMPORTANCE = "Tuned without importance or with λ 0: nothing was pulled, so there is nothing to show."
NO_BASELINE = (
    "Without a baseline there is nothing to compare with: `alr-kernels run --baseline` tunes once more without."
)
_KINDS = {  # of cost.bytes, as the chart names them
    "weights": "weights",
    "moments": "AdamW's moments",
    "importance": "importance",
    "anchor": "anchors",
    "other": "other",
}


def page(results: Mapping[str, Any]) -> Page:
    """Return the page of a results dict of kind ``tune`` or ``run``.

    Raises:
        KeyError: a part that every results file has is not there.
    """
    model, data, options = results["model"], results["data"], results["options"]
    whole = model["trained_parameters"] == model["parameters"]
    what = "LoRA adapters on " if model["space"] == "lora" else ""
    return Page(
        title=f"{_last(model['name'])}, tuned on {_last(data['domain']['source'])}",
        subtitle=f"alr-kernels {results['verb']}: {what}{model['architecture']}, {model['parameters']:,} parameters, "
        + ("all trained" if whole else f"{model['trained_parameters']:,} of them trained")
        + (f", λ {options['reg_lambda']:g}" if options.get("reg_lambda") is not None else ""),
        summary=summary(results),
        charts=[
            _curves(results),
            _tradeoff(results),
            _losses(results),
            _coefficients(results),
            _movement(results),
            _cost(results),
        ],
        details=_details(results),
        numbers=_numbers(results),
        data=results,
    )


def _last(name: str) -> str:
    """Return a folder's or file's own name; what a hub calls owner/name stays.

    >>> _last("/models/tiny/"), _last("owner/tiny")
    ('tiny', 'owner/tiny')
    """
    path = PurePath(name)
    return path.name if path.is_absolute() or name.startswith((".", "~")) else name


def _numbers(results: Mapping[str, Any]) -> list[Number]:
    said, before, after = results["summary"], results["before"], results["after"]
    numbers = [Number("learnt", said["domain_gain"], NATS, "summary.domain_gain", True, _fall("domain", before, after))]
    if said["forgetting"] is not None:
        note = _fall("general", before, after)
        numbers.append(Number("forgotten", said["forgetting"], NATS, "summary.forgetting", True, note))
    if said.get("plain_forgetting") is not None:
        path = "summary.plain_forgetting"
        numbers.append(
            Number("forgotten without the pull", said["plain_forgetting"], NATS, path, True, "the baseline of this run")
        )
    step = dict(_timed(results)).get("tune")
    if step is not None:
        note = f"{drawing.shown_ms(step['optimizer'])} of it in the optimizer"
        numbers.append(Number("a tuning step", step["whole"], "ms", "cost.step_ms.tune.whole", note=note))
    return numbers


def _timed(results: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (phase, times of a step) where any was timed: none of an estimator, and of a run resumed at its end."""
    phases = _phases(results["cost"]["step_ms"])
    return [(phase, entry) for phase, entry in phases if None not in (entry["optimizer"], entry["whole"])]


def _fall(kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    return f"{kind} NLL {before[kind]['nll']:.3f} → {after[kind]['nll']:.3f}"


def _phases(part: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (phase, its entries) of those that have any, in the order of ``STYLE``."""
    return [(phase, part[phase]) for phase in STYLE if part.get(phase)]


def _series(phase: str, entries: Sequence[Mapping[str, Any]], x: str, y: str) -> Series:
    label, colour, marker = STYLE[phase]
    return Series(label, [entry[x] for entry in entries], [entry.get(y) for entry in entries], colour, marker)


def _curves(results: Mapping[str, Any]) -> Chart | Absent:
    phases, title = _phases(results["curves"]), "Learning and forgetting"
    if not phases:
        return Absent("curves", title, "Nothing was measured while tuning.")
    shown = [("learning: domain text", "domain NLL", [_series(p, entries, "step", "domain") for p, entries in phases])]
    note = "Loss on held-out text while tuning, lower is better. On the domain text it should fall"
    if results["before"].get("general") is None:
        return charts.learning("curves", title, f"{note}. {NO_GENERAL}", shown, NATS)
    general = [_series(p, entries, "step", "general") for p, entries in phases]
    shown.append(("forgetting: general text", "general NLL", general))
    return charts.learning(
        "curves", title, f"{note}; on the general text each rise is something forgotten.", shown, NATS
    )


def _tradeoff(results: Mapping[str, Any]) -> Chart | Absent:
    phases, title = _phases(results["curves"]), "What learning cost"
    if results["before"].get("general") is None:
        return Absent("tradeoff", title, NO_GENERAL)
    if not phases:
        return Absent("tradeoff", title, "Nothing was measured while tuning.")
    note = "Each point is one measurement while tuning. At the same domain NLL, the lower line paid less for the same"
    series = []
    for phase, entries in phases:
        known = [entry for entry in entries if entry["domain"] is not None and entry["general"] is not None]
        series.append(_series(phase, known, "domain", "general"))
    ends = "learning." if len(phases) > 1 else f"learning. {NO_BASELINE}"
    return charts.tradeoff(
        "tradeoff", title, f"{note} {ends}", series, (f"domain NLL ({NATS})", f"general NLL ({NATS})")
    )


def _losses(results: Mapping[str, Any]) -> Chart | Absent:
    phases, title = _phases(results["log"]), "Training loss"
    if not phases:
        return Absent("loss", title, "The run was too short for its log to have an entry: see `--log-every`.")
    note = "Loss on the batches trained on, as logged. Each phase counts its own steps, and recording has its own text."
    return charts.learning(
        "loss", title, note, [("", "loss", [_series(p, e, "step", "loss") for p, e in phases])], NATS
    )


def _coefficients(results: Mapping[str, Any]) -> Chart | Absent:
    found, title = results["coefficients"], "Where the pull is strong"
    if not found or not found["modules"]:
        return Absent("coefficients", title, NO_IMPORTANCE)
    temperature = "" if found["temperature"] is None else f", T = {shown(found['temperature'])}"
    note = (
        "How the pull is spread over the model: the share of α·ΣΩ that lies on each module, in per cent. Layers are "
        f"weighed by {found['rule']}{temperature}, as if by {found['effective_layers']:.1f} layers of equal weight."
    )
    return charts.pull("coefficients", title, note, found["modules"])


def _movement(results: Mapping[str, Any]) -> Chart | Absent:
    moves, title = results["movement"], "Where weights moved"
    if not moves or not any(sum(entry["count"]) for _, entry in _phases(moves)):
        return Absent("movement", title, NO_IMPORTANCE)
    shown = {STYLE[phase][0]: (*STYLE[phase][1:], entry) for phase, entry in _phases(moves)}
    note = (
        "How far weights are from where they started, by how important they are; below, how many weights there are of "
        "each importance. The pull holds those on the right"
    )
    ends = ": there its line should lie below the baseline's." if len(shown) > 1 else f". {NO_BASELINE}"
    return charts.movement("movement", title, note + ends, shown)


def _cost(results: Mapping[str, Any]) -> Chart | Absent:
    cost, title = results["cost"], "What it cost"
    held = [(_KINDS[kind], size) for kind, size in cost["bytes"].items() if size and kind in _KINDS]
    steps = [(STYLE[phase][0], entry) for phase, entry in _timed(results)]
    if not held and not steps:
        return Absent("cost", title, "Neither bytes nor times were measured.")

    def draw(figure: Figure) -> None:
        axes = drawing.panels(figure, bool(held) + bool(steps))
        if held:
            drawing.bars(axes[0], [(name, size, drawing.as_bytes(size)) for name, size in held])
            axes[0].set_title("bytes held while tuning")
        if steps:
            drawing.step_times(axes[-1], [(name, entry["optimizer"], entry["whole"]) for name, entry in steps])

    rows: list[list[Cell]] = [[f"bytes: {name}", size, None, None] for name, size in held]
    rows += [[f"bytes: {name}", cost[key], None, None] for name, key in _OTHER_BYTES if cost.get(key)]
    rows += [[f"step: {name}", None, entry["optimizer"], entry["whole"]] for name, entry in steps]
    rows += [[f"all of: {name}", None, None, 1e3 * spent] for name, spent in results["seconds"].items() if spent]
    note = (
        "What is held in memory beside gradients and activations, and the median time of a step, the optimizer's "
        "part in another colour."
    )
    columns = ["what", "bytes", "in the optimizer (ms)", "whole (ms)"]
    return Chart("cost", title, note, draw, columns, rows, (2.6, 4.2))


_OTHER_BYTES = (("importance file", "artifact_bytes"), ("peak of the process", "peak_memory_bytes"))


def _details(results: Mapping[str, Any]) -> list[Table]:
    kinds = [kind for kind in ("domain", "general") if results["data"].get(kind)]
    facts = list(dict.fromkeys(name for kind in kinds for name in results["data"][kind]))
    data = [[name, *(cell(results["data"][kind].get(name)) for kind in kinds)] for name in facts]
    measured = [
        [name, kind, *(results[name][kind][key] for key in ("nll", "perplexity", "tokens"))]
        for name in ("before", "after", "plain") if results.get(name)
        for kind in ("domain", "general") if results[name].get(kind)
    ]  # fmt: skip
    tables = [
        Table("Measured", ["when", "text", f"NLL ({NATS})", "perplexity", "tokens"], measured),
        Table("Texts", ["fact", *kinds], data),
        *(pairs(name.capitalize(), results[name]) for name in ("model", "importance") if results.get(name)),
        pairs("Options", results["options"]),
        pairs("Versions and machine", {**results["versions"], **results["machine"]}),
        Table("Time", ["phase", "seconds", ""], [[k, v, None if v is None else duration(v)]
                                                 for k, v in results["seconds"].items()]),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def pairs(title: str, values: Mapping[str, Any]) -> Table:
    """Return a table of names and values."""
    return Table(title, ["name", "value"], [[name, cell(value)] for name, value in values.items()])


def cell(value: Any) -> Cell:
    """Return a value as a cell: what is no number, text or truth value becomes JSON."""
    return (
        value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, ensure_ascii=False)
    )
