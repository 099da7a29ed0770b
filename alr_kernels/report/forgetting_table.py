"""The demo's table and what it says in plain words, from a results dict (``alr_kernels.demo.study``)."""

from __future__ import annotations

from typing import Any

from rich.table import Table

OURS = ("ALR coupled", "ALR proximal")


def table(result: dict[str, Any]) -> Table:
    """Return the table of all arms on the test texts, at most 110 columns wide."""
    level = result["shared_level"]
    shown = Table(
        title=f"{result['options']['arch']}, seed {result['options']['seed']}: "
        f"{result['parameters']:,} parameters, NLL in nats per byte, test texts",
        caption=f"{verdict_line(result)}\n"
        "→ the run of its family that validation chose.  "
        f"forgot at: where the run's domain NLL was {level:.3f} (— not reached).  "
        "step ms: optimizer.step() / whole step, medians.  "
        "extra B: bytes a parameter beyond AdamW's moments (importance and anchor).",
        caption_justify="left",
    )
    shown.add_column("arm", no_wrap=True)
    for heading in ("general\nbefore", "general\nafter", "forgot", "domain\nNLL", f"forgot at\n{level:.3f}"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for heading in ("step ms\nopt/whole", "extra B\na param", "artifact\nbytes"):
        shown.add_column(heading, justify="right", no_wrap=True)
    family = None
    for row in result["rows"]:
        if family not in (None, row["family"]):
            shown.add_section()
        family = row["family"]
        shown.add_row(*_cells(row, result), style="bold" if row["chosen"] else None)
    return shown


def few_bytes(result: dict[str, Any]) -> Table:
    """Return the table of the chosen proximal run in fewer bytes."""
    shown = Table(
        title="The chosen proximal run in fewer bytes: same batches, same λ",
        caption="bytes: all that the optimizer holds beside weights and gradients (AdamW in fp32 holds 8).  "
        "training loss: largest difference of one step from the fp32 run.",
        caption_justify="left",
    )
    shown.add_column("importance / anchor / moments", no_wrap=True)
    for heading in ("bytes\na param", "general\nafter", "domain\nNLL", "training\nloss", "optimizer\nms"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in result["few_bytes"]:
        kept = (row["storage"].get(option, "fp32") for option in ("importance_dtype", "anchor_dtype", "state_dtype"))
        shown.add_row(
            " / ".join(kept),
            f"{row['held_bytes']:.2f}",
            f"{row['general']:.4f}",
            f"{row['domain']:.4f}",
            f"{100 * row['loss_apart']:.2f} %",
            f"{row['optimizer_ms']:.1f}",
        )
    return shown


def _cells(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    at_level = row["forgetting_at_level"]
    return [
        ("→ " if row["chosen"] else "  ") + row["arm"],
        f"{row['general_before']:.3f}",
        f"{row['general_after']:.3f}",
        f"{row['forgetting']:+.3f}",
        f"{row['domain']:.3f}",
        "—" if at_level is None else f"{at_level:+.3f}",
        f"{row['optimizer_ms']:.1f} / {row['step_ms']:.0f}",
        f"{row['extra_bytes']:.2f}",
        f"{result['importance']['artifact_bytes']:,}" if row["family"] in OURS else "—",
    ]


def verdict_line(result: dict[str, Any]) -> str:
    """Say in one line whether ALR forgot less than every rival, and which rivals it did not beat."""
    failing = {family: entry["beaten_by"] for family, entry in result["verdict"].items() if not entry["holds"]}
    if not failing:
        return "Both chosen ALR arms forgot less than every AdamW and L2-SP arm that reached this domain NLL."
    parts = (f"{family} forgot no less than {'; '.join(names)}" for family, names in failing.items())
    return f"ALR does NOT win everywhere here: {'. '.join(parts)}."


def explanation(result: dict[str, Any], fast: bool = False) -> list[str]:
    """Return the closing paragraphs: what was compared, what came out, and how it was chosen."""
    at_level, level = result["at_shared_level"], result["shared_level"]
    forgot = ", ".join(f"{family} {value:.3f}" for family, value in at_level.items())
    frontier = ", ".join(f"{family} {value:.3f}" for family, value in result["frontier_at_shared_level"].items())
    said = [
        f"At the same domain NLL of {level:.3f} nats a byte (the best that every family's chosen run reached), the "
        f"general NLL had risen by: {forgot} nats. " + " ".join(_less(result, family) for family in OURS),
        f"On the lower envelope of each family's three runs together, at the same domain NLL: {frontier} nats.",
        "How this was chosen: AdamW's learning rate, λ, the coefficient rule "
        f"({result['selection']['rule']}) and each family's run (→) on validation texts only; every number above is "
        "from test texts, disjoint by file. Between evaluations the lower envelope of a run is read linearly.",
    ]
    if fast:
        said.append("--fast is too short to compare arms: it shows that all of it runs.")
    return said


def _less(result: dict[str, Any], family: str) -> str:
    """Say how the family compares with AdamW and L2-SP, in per cent where that makes sense."""
    at_level = result["at_shared_level"]
    ours = at_level[family]
    parts = []
    for rival in ("AdamW", "L2-SP"):
        theirs = at_level[rival]
        if theirs > 0:
            share = 100 * (1 - ours / theirs)
            parts.append(f"{abs(share):.0f} % {'less' if share >= 0 else 'more'} than {rival}")
        else:
            parts.append(f"{ours - theirs:+.3f} nats against {rival}")
    return f"{family} forgot {' and '.join(parts)}."
