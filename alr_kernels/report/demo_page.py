"""The report of ``alr-kernels demo``, from its results (``alr_kernels.demo.study``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..demo.settings import ADAMW, COUPLED, FRESH, L2SP, PROXIMAL, THEN
from . import charts, drawing, forgetting_table
from .drawing import Series
from .page import Absent, Cell, Chart, Number, Page, Table
from .palette import BLACK, BLUE, GREEN, GREY, PURPLE, VERMILLION
from .run_page import pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = {
    ADAMW: (BLACK, "o"),
    FRESH: (GREEN, "v"),
    THEN: (BLACK, "o"),
    L2SP: (PURPLE, "s"),
    COUPLED: (BLUE, "^"),
    PROXIMAL: (VERMILLION, "D"),
}
RULE_COLOURS = {"softmax": BLUE, "proportional": PURPLE, "uniform": GREY}
NATS = "nats per byte"
PROSE = "general NLL on test prose"
CODE = "domain NLL on test code"


def page(results: Mapping[str, Any]) -> Page:
    """Return the page of the demo's results.

    Raises:
        KeyError: a part that every results file of the demo has is not there.
    """
    options, lora = results["options"], results["space"] == "lora"
    adapter = f" with LoRA r {results['lora']['r']}" if lora else ""
    return Page(
        title="Learning code without forgetting prose: the demo",
        subtitle=f"{options['arch']}, {results['parameters']:,} parameters{adapter}, seed {options['seed']}",
        summary=[forgetting_table.verdict_line(results), *forgetting_table.explanation(results)],
        charts=[
            _tradeoff(results),
            _curves(results),
            _rules(results),
            _pull(results),
            _movement(results),
            _cost(results),
        ],
        details=_details(results),
        numbers=_numbers(results),
        data=results,
    )


def _numbers(results: Mapping[str, Any]) -> list[Number]:
    """Return one number for each family: what it forgot, or for LoRA, whose arms start apart, the general NLL."""
    lora = results["space"] == "lora"
    part = "general_at_shared_level" if lora else "at_shared_level"
    label, note = ("{}", "general NLL at domain NLL {:.3f}") if lora else ("{} forgot", "at domain NLL {:.3f}")
    return [
        Number(label.format(family), value, NATS, f"{part}.{family}", not lora, note.format(results["shared_level"]))
        for family, value in results[part].items()
    ]


def _chosen(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (family, the run that validation chose of it)."""
    return [(run["arm"]["family"], run) for run in results["runs"]
            if results["selection"]["chosen"][run["arm"]["family"]] == run["label"]]  # fmt: skip


def _tradeoff(results: Mapping[str, Any]) -> Chart:
    """Draw what was forgotten, or for LoRA the general NLL, against domain NLL; the runs not chosen faintly."""
    lora, rows = results["space"] == "lora", {row["arm"]: row for row in results["rows"]}
    series = []
    for run in results["runs"]:
        origin = 0.0 if lora else rows[run["label"]]["general_before"]
        domain, general = zip(*run["points"]["test"], strict=True)
        cost = [value - origin for value in general]
        colour, marker = STYLE[run["arm"]["family"]]
        series.append(Series(run["label"], domain, cost, colour, marker, rows[run["label"]]["chosen"]))
    lowest = min(value for entry in series for value in entry.y if value is not None)
    highest = max(value for entry in series if entry.strong for value in entry.y if value is not None)
    # Fast runs without a pull would press the rest together.
    top = lowest + 1.15 * (highest - lowest) if highest > lowest else None
    what = f"{PROSE} ({NATS})" if lora else f"rise of {PROSE} ({NATS})"
    note = (
        "Each point is one measurement while tuning. At the same domain NLL, the lower line paid less for the same "
        "learning. Strong: the run of its family that validation chose; faint: the other runs."
    )
    labels = (f"{CODE} ({NATS})", what)
    return charts.tradeoff("forgetting", "What learning the domain cost", note, series, labels,
                           results["shared_level"], top)  # fmt: skip


def _curves(results: Mapping[str, Any]) -> Chart:
    chosen = _chosen(results)

    def panel(place: int) -> list[Series]:
        return [
            Series(run["label"], run["steps"], [point[place] for point in run["points"]["test"]], *STYLE[family])
            for family, run in chosen
        ]

    shown = [("learning: code", "domain NLL", panel(0)), ("forgetting: prose", "general NLL", panel(1))]
    note = (
        "Loss of the chosen runs on test texts while tuning, lower is better. On code it should fall; on prose each "
        "rise is something forgotten."
    )
    return charts.learning("curves", "Learning and forgetting", note, shown, NATS)


def _rules(results: Mapping[str, Any]) -> Chart:
    """Draw the coefficient of each layer under each rule."""
    rules, used = results["coefficients"], results["selection"]["rule"]
    layers = list(next(iter(rules.values())))
    modules = results["space"] == "lora"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        width = 0.8 / len(rules)
        for i, (rule, values) in enumerate(rules.items()):
            places = [layer + (i - (len(rules) - 1) / 2) * width for layer in range(len(layers))]
            label = f"{rule} (used)" if rule == used else rule
            axes.bar(places, list(values.values()), 0.92 * width, color=RULE_COLOURS[rule], label=label)
        turned = modules or drawing.is_narrow(figure)
        axes.set_xticks(range(len(layers)), [_short(name) for name in layers], rotation=90 if turned else 0)
        axes.set_ylabel("coefficient α")
        axes.grid(axis="x", visible=False)
        drawing.legend(figure, axes)

    note = (
        "How the recorded importance weighs the layers, by each rule; each sums to 1. Validation chose the rule "
        f"{used}." + (" A layer is a module of the adapter." if modules else "")
    )
    rows: list[list[Cell]] = [[layer, *(values[layer] for values in rules.values())] for layer in layers]
    title = "Coefficients from the recorded importance"
    return Chart("coefficients", title, note, draw, ["layer", *rules], rows, (3.4, 3.6))


def _short(name: str) -> str:
    """Leave out what all names share: ``model.layers.0.self_attn.q_proj`` → ``0.q_proj``."""
    name = name.removeprefix("model.").removeprefix("transformer.")
    parts = name.split(".")
    return f"{parts[1]}.{parts[-1]}" if len(parts) > 2 else name


def _pull(results: Mapping[str, Any]) -> Chart:
    note = (
        "How the pull of the chosen ALR runs is spread over the model: the share of α·ΣΩ that lies on each module, "
        f"in per cent, with the rule {results['pull']['rule']}."
    )
    return charts.pull("pull", "Where the pull is strong", note, results["pull"]["modules"])


def _movement(results: Mapping[str, Any]) -> Chart | Absent:
    moves = {label: (*STYLE[entry["family"]], entry) for label, entry in results["movement"].items()}
    note = (
        "How far the weights of the chosen runs are from where tuning began, by how important they are; below, how "
        "many weights there are of each importance. The pull of ALR holds those on the right; L2-SP holds all alike."
    )
    return charts.movement("movement", "Where weights moved", note, moves)


def _cost(results: Mapping[str, Any]) -> Chart:
    rows = [row for row in results["rows"] if row["chosen"]]
    numel = results["trained_parameters"]

    def draw(figure: Figure) -> None:
        left, right = drawing.panels(figure, 2)
        held = [(row["family"], row["extra_bytes"] * numel) for row in rows]
        drawing.bars(left, [(family, size, drawing.as_bytes(size)) for family, size in held])
        left.set_title("bytes beyond AdamW's moments")
        drawing.step_times(right, [(row["family"], row["optimizer_ms"], row["step_ms"]) for row in rows])
        if not drawing.is_narrow(figure):
            right.set_yticklabels([])

    note = (
        "What the chosen runs hold in memory beside weights, gradients and AdamW's moments (importance and anchors), "
        "and the median time of a step, the optimizer's part in another colour."
    )
    table: list[list[Cell]] = [
        [row["arm"], row["extra_bytes"], row["extra_bytes"] * numel, row["optimizer_ms"], row["step_ms"]]
        for row in results["rows"]
    ]
    columns = ["run", "extra bytes a parameter", "extra bytes", "in the optimizer (ms)", "step (ms)"]
    return Chart("cost", "What it cost", note, draw, columns, table, (0.9 + 0.34 * len(rows), 1.6 + 0.6 * len(rows)))


_FEW_BYTES = (
    *("kept as", "bytes a parameter", "general NLL", "domain NLL"),
    *("training loss, mean difference (%)", "optimizer (ms)"),
)


def _details(results: Mapping[str, Any]) -> list[Table]:
    compared = ("general_before", "general_after", "forgetting", "domain", "general_at_level", "forgetting_at_level")
    few = [
        [", ".join(f"{k.removesuffix('_dtype')} {v}" for k, v in row["storage"].items()) or "fp32", row["held_bytes"],
         row["general"], row["domain"], 100 * row["loss_apart_mean"], row["optimizer_ms"]]
        for row in results["few_bytes"]
    ]  # fmt: skip
    texts = [[kind, split, facts["bytes"], len(facts["sources"])]
             for kind, splits in results["corpus"].items() for split, facts in splits.items()]  # fmt: skip
    return [
        Table(
            f"All runs, test texts ({NATS}; at: where the domain NLL was {results['shared_level']:.3f})",
            ["run", "chosen", *(name.replace("_", " ") for name in compared)],
            [[row["arm"], row["chosen"], *(row[name] for name in compared)] for row in results["rows"]],
        ),
        Table("The chosen proximal run in fewer bytes", _FEW_BYTES, few),
        Table("Texts", ["text", "split", "bytes", "files or topics"], texts),
        pairs("Importance", results["importance"]),
        pairs("Options", results["options"]),
        pairs("Versions and machine", {**results["versions"], **results["machine"]}),
        pairs("Time (seconds)", results["seconds"]),
    ]
