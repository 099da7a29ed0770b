"""The demo's table and what it says in plain words, from a results dict (``alr_kernels.demo.study``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ..demo.settings import FRESH, OURS


def table(result: Mapping[str, Any]) -> Table:
    """Return the table of all arms on the test texts, at most 110 columns wide."""
    level, lora = result["shared_level"], result["space"] == "lora"
    what = f"LoRA r {result['lora']['r']} on a model of " if lora else ""
    shown = Table(
        title=f"{result['options']['arch']}, seed {result['options']['seed']}: {what}"
        f"{result['parameters']:,} parameters, NLL in nats per byte, test texts",
        caption=f"{verdict_line(result)}\n"
        f"→ the run of its family that validation chose.  {_LEGEND[lora].format(level=level)}",
        caption_justify="left",
    )
    shown.add_column("arm", no_wrap=True)
    for heading in _headings(level, lora):
        shown.add_column(heading, justify="right", no_wrap=True)
    family = None
    for row in result["rows"]:
        if family not in (None, row["family"]):
            shown.add_section()
        family = row["family"]
        shown.add_row(*_cells(row, result), style="bold" if row["chosen"] else None)
    return shown


_TIMES = "step ms: optimizer.step() / whole step, medians.  "
_LEGEND = {
    False: "forgot at: where the run's domain NLL was {level:.3f} (— not reached).  " + _TIMES
    + "extra B: bytes a parameter beyond AdamW's moments (importance and anchor).",
    True: "general at: where the run's domain NLL was {level:.3f} (— not reached); arms start from different general "
    "NLL, so this and not the rise is compared.  " + _TIMES
    + "extra kB: beyond AdamW's moments (importance of U = s·B·A, and the factors' anchors).",
}  # fmt: skip


def _headings(level: float, lora: bool) -> tuple[str, ...]:
    first = ("general\nbefore", "general\nafter")
    if lora:
        return (*first, "domain\nNLL", f"general\nat {level:.3f}", "step ms\nopt/whole", "extra\nkB")
    last = (f"forgot at\n{level:.3f}", "step ms\nopt/whole", "extra B\na param", "artifact\nbytes")
    return (*first, "forgot", "domain\nNLL", *last)


def few_bytes(result: Mapping[str, Any]) -> Table:
    """Return the table of the chosen proximal run in fewer bytes."""
    lora = result["space"] == "lora"
    kept = ("importance_dtype",) if lora else ("importance_dtype", "anchor_dtype", "state_dtype")
    held = (
        f"kB: all that the optimizer holds beside weights and gradients (AdamW's moments alone: "
        f"{8 * result['trained_parameters'] / 1e3:,.0f})."
        if lora
        else "bytes: all that the optimizer holds beside weights and gradients (AdamW in fp32 holds 8)."
    )
    shown = Table(
        title="The chosen proximal run in fewer bytes: same batches, same λ",
        caption=f"{held}  training loss: largest difference of one step from the fp32 run.",
        caption_justify="left",
    )
    shown.add_column("importance kept as" if lora else "importance / anchor / moments", no_wrap=True)
    for heading in (
        "kB" if lora else "bytes\na param",
        "general\nafter",
        "domain\nNLL",
        "training\nloss",
        "optimizer\nms",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in result["few_bytes"]:
        bytes_held = row["held_bytes"]
        shown.add_row(
            " / ".join(row["storage"].get(option, "fp32") for option in kept),
            f"{bytes_held * result['trained_parameters'] / 1e3:,.0f}" if lora else f"{bytes_held:.2f}",
            f"{row['general']:.4f}",
            f"{row['domain']:.4f}",
            f"{100 * row['loss_apart']:.2f} %",
            f"{row['optimizer_ms']:.1f}",
        )
    return shown


def _cells(row: dict[str, Any], result: Mapping[str, Any]) -> list[str]:
    first = [
        ("→ " if row["chosen"] else "  ") + row["arm"],
        f"{row['general_before']:.3f}",
        f"{row['general_after']:.3f}",
    ]
    times = f"{row['optimizer_ms']:.1f} / {row['step_ms']:.0f}"
    if result["space"] == "lora":
        at_level, held = row["general_at_level"], row["extra_bytes"] * result["trained_parameters"] / 1e3
        reached = "—" if at_level is None else f"{at_level:.3f}"
        return [*first, f"{row['domain']:.3f}", reached, times, f"{held:,.0f}"]
    at_level = row["forgetting_at_level"]
    return [
        *first,
        f"{row['forgetting']:+.3f}",
        f"{row['domain']:.3f}",
        "—" if at_level is None else f"{at_level:+.3f}",
        times,
        f"{row['extra_bytes']:.2f}",
        f"{result['importance']['artifact_bytes']:,}" if row["family"] in OURS else "—",
    ]


def _rivals(result: Mapping[str, Any]) -> list[str]:
    return [family for family in result["at_shared_level"] if family not in OURS]


def verdict_line(result: Mapping[str, Any]) -> str:
    """Say in one line whether ALR forgot less than every rival, and which rivals it did not beat."""
    lora = result["space"] == "lora"
    failing = {family: entry["beaten_by"] for family, entry in result["verdict"].items() if not entry["holds"]}
    if not failing:
        rivals = ", ".join(_rivals(result)[:-1]) + f" and {_rivals(result)[-1]}"
        if lora:
            return f"Both chosen ALR arms kept a lower general NLL than every arm of {rivals} at this domain NLL."
        return f"Both chosen ALR arms forgot less than every {rivals} arm that reached this domain NLL."
    said = "kept no lower general NLL than" if lora else "forgot no less than"
    parts = (f"{family} {said} {'; '.join(names)}" for family, names in failing.items())
    return f"ALR does NOT win everywhere here: {'. '.join(parts)}."


def explanation(result: Mapping[str, Any]) -> list[str]:
    """Return the closing paragraphs: what was compared, what came out, and how it was chosen."""
    lora, level = result["space"] == "lora", result["shared_level"]
    frontier = _listed(result["frontier_at_shared_level"])
    pooled = "learning rate" if lora else "AdamW's learning rate"
    said = [
        f"At the same domain NLL of {level:.3f} nats a byte (the best that every family's chosen run reached), the "
        "general NLL " + (_lora_outcome(result) if lora else _outcome(result)),
        f"On the lower envelope of each family's runs together it had risen there by: {frontier} nats.",
        f"How this was chosen: {pooled}, λ, the coefficient rule "
        f"({result['selection']['rule']}) and each family's run (→) on validation texts only; every number above is "
        "from test texts, disjoint by file. Between evaluations the lower envelope of a run is read linearly.",
    ]
    missed = [row["arm"] for row in result["rows"] if row["forgetting_at_level"] is None]
    if missed:
        said.append(f"These runs never reached that domain NLL and are not compared there: {'; '.join(missed)}.")
    if lora:
        said.append(_artifact(result))
    if result["options"]["fast"]:
        said.append("--fast is too short to compare arms: it shows that all of it runs.")
    return said


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{family} {value:.3f}" for family, value in values.items())


def _outcome(result: Mapping[str, Any]) -> str:
    said = " ".join(_less(result, family, _rivals(result)) for family in OURS)
    return f"had risen by: {_listed(result['at_shared_level'])} nats. {said}"


def _lora_outcome(result: Mapping[str, Any]) -> str:
    """Compare general NLL with all; how much was forgotten only among arms of one start."""
    before, general = result["before"], result["general_at_shared_level"]
    gaps = ", ".join(f"{family} {general[family] - general[FRESH]:+.3f}" for family in general if family != FRESH)
    same_start = [family for family in _rivals(result) if family != FRESH]
    return (
        f"was: {_listed(general)} nats. Against {FRESH}: {gaps}. "
        f"Risen since each one's own start (the base model, {before['base model']['general test']:.3f}, for {FRESH}; "
        f"the general phase's adapter, {before['general phase']['general test']:.3f}, for all others): "
        f"{_listed(result['at_shared_level'])}. " + " ".join(_less(result, family, same_start) for family in OURS)
    )


def _artifact(result: Mapping[str, Any]) -> str:
    facts, size = result["lora"], result["importance"]["artifact_bytes"]
    return (
        f"LoRA: r {facts['r']}, alpha {facts['alpha']} on {', '.join(facts['targets'])}: "
        f"{result['trained_parameters']:,} trained parameters. The importance of U = s·B·A takes {size:,} bytes in "
        f"fp32, {100 * facts['artifact_share']:.0f} % of the model's {facts['model_bytes']:,}."
    )


def _less(result: Mapping[str, Any], family: str, rivals: list[str]) -> str:
    """Say how the family compares with its rivals, in per cent where that makes sense."""
    at_level = result["at_shared_level"]
    ours = at_level[family]
    parts = []
    for rival in rivals:
        theirs = at_level[rival]
        if theirs > 0:
            share = 100 * (1 - ours / theirs)
            parts.append(f"{abs(share):.0f} % {'less' if share >= 0 else 'more'} than {rival}")
        else:
            parts.append(f"{ours - theirs:+.3f} nats against {rival}")
    return f"{family} forgot {' and '.join(parts)}."
