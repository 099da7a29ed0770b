"""The demo's plots, from a results dict (``alr_kernels.demo.study``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..demo.settings import ADAMW, COUPLED, FRESH, L2SP, PROXIMAL, THEN

# Okabe and Ito's colours (told apart by colour-blind readers), with a marker each.
STYLE = {
    ADAMW: ("#000000", "o"),
    FRESH: ("#009E73", "v"),
    THEN: ("#000000", "o"),
    L2SP: ("#E69F00", "s"),
    COUPLED: ("#56B4E9", "^"),
    PROXIMAL: ("#D55E00", "D"),
}
RULE_STYLE = {"softmax": "#0072B2", "proportional": "#E69F00", "uniform": "#999999"}


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write the PNG files into the folder and return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    return [_tradeoff(result, folder / "forgetting.png"), _coefficients(result, folder / "coefficients.png")]


def _title(result: dict[str, Any]) -> str:
    options = result["options"]
    adapter = f" with LoRA r {result['lora']['r']}" if result["space"] == "lora" else ""
    return f"{options['arch']}, {result['parameters']:,} parameters{adapter}, seed {options['seed']}"


def _drawn(result: dict[str, Any]) -> list[tuple[dict[str, Any], list[float], list[float]]]:
    """Return (run, domain NLL, what it cost): forgetting, or for LoRA, whose arms start apart, the general NLL."""
    lora, rows = result["space"] == "lora", {row["arm"]: row for row in result["rows"]}
    drawn = []
    for run in result["runs"]:
        origin = 0.0 if lora else rows[run["label"]]["general_before"]
        domain, general = zip(*run["points"]["test"], strict=True)
        drawn.append((run, list(domain), [value - origin for value in general]))
    return drawn


def _tradeoff(result: dict[str, Any], path: Path) -> Path:
    """What was forgotten against domain NLL along training: chosen runs strong, the others of the family faint."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), dpi=150)
    chosen, drawn = result["selection"]["chosen"], _drawn(result)
    for run, domain, cost in drawn:
        family = run["arm"]["family"]
        colour, marker = STYLE[family]
        strong = chosen[family] == run["label"]
        axes.plot(
            domain,
            cost,
            color=colour,
            marker=marker,
            markersize=5 if strong else 3,
            linewidth=2 if strong else 0.8,
            alpha=1 if strong else 0.35,
            label=run["label"] if strong else None,
            zorder=3 if strong else 2,
        )
    level = result["shared_level"]
    axes.axvline(level, color="#666666", linestyle=":", linewidth=1.2, zorder=1)
    axes.annotate(
        f"compared at {level:.3f}",
        (level, 0.02),
        xycoords=("data", "axes fraction"),
        rotation=90,
        va="bottom",
        ha="left",
        color="#444444",
        fontsize=8,
    )
    lowest = min(min(cost) for _, _, cost in drawn)
    highest = max(max(cost) for run, _, cost in drawn if run["label"] in chosen.values())
    if highest > lowest:
        axes.set_ylim(top=lowest + 1.3 * (highest - lowest))  # fast runs without a pull would press the rest together
    axes.invert_xaxis()
    axes.set_xlabel("domain NLL on test code (nats per byte): training goes to the right")
    lora = result["space"] == "lora"
    rise = "forgetting: rise of general NLL on test prose (nats per byte)"
    axes.set_ylabel("general NLL on test prose (nats per byte)" if lora else rise)
    axes.set_title(f"What learning the domain cost ({_title(result)})", fontsize=10)
    axes.legend(
        title="chosen on validation\n(faint: the other runs)",
        title_fontsize=9,
        fontsize=9,
        frameon=False,
        loc="upper left",
    )
    return _finish(figure, axes, path)


def _coefficients(result: dict[str, Any], path: Path) -> Path:
    """Coefficient per layer under each rule."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4), dpi=150)
    rules = result["coefficients"]
    width = 0.8 / len(rules)
    for i, (rule, values) in enumerate(rules.items()):
        used = " (used)" if rule == result["selection"]["rule"] else ""
        places = [layer + (i - (len(rules) - 1) / 2) * width for layer in range(len(values))]
        axes.bar(places, list(values.values()), width, color=RULE_STYLE[rule], label=rule + used)
    modules = result["space"] == "lora"
    axes.set_xticks(range(len(next(iter(rules.values())))), [_short(name) for name in next(iter(rules.values()))])
    axes.tick_params(axis="x", labelrotation=90 if modules else 0)
    axes.set_ylabel("coefficient α (sums to 1 over layers)")
    axes.set_xlabel("layer: a module of the adapter" if modules else "layer")
    axes.set_title(f"Coefficients from the recorded importance ({_title(result)})", fontsize=10)
    axes.legend(title="rule", frameon=False)
    return _finish(figure, axes, path)


def _short(name: str) -> str:
    """Leave out what all names share: ``model.layers.0.self_attn.q_proj`` → ``0.q_proj``."""
    name = name.removeprefix("model.").removeprefix("transformer.")
    parts = name.split(".")
    return f"{parts[1]}.{parts[-1]}" if len(parts) > 2 else name


def _finish(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib import pyplot

    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path
