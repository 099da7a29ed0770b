"""What the runs amount to: which of a family validation chooses, and what is compared on the test texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .frontier import general_at, shared_level
from .settings import OURS

if TYPE_CHECKING:
    from .frontier import Point
    from .training import Run


def families(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return family → its runs, in the order of the runs."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.arm.family, []).append(run)
    return found


def level_of(runs: Sequence[Run]) -> float:
    """Return the best domain NLL on validation that all runs reached."""
    return shared_level([run.points["validation"] for run in runs])


def best(runs: Sequence[Run], level: float) -> int:
    """Return the index of the run with the least general NLL on validation at this domain NLL."""
    found = [general_at(run.points["validation"], level) for run in runs]
    return min(range(len(runs)), key=lambda i: (found[i] is None, found[i] or 0.0))


def choose(runs: Sequence[Run]) -> tuple[dict[str, str], float]:
    """Return family → label of the run that validation chooses, and the domain NLL at which they were compared.

    It is the best that every family reached.
    """
    members = families(runs)
    level = shared_level([_pooled(family, "validation") for family in members.values()])
    return {name: family[best(family, level)].arm.label for name, family in members.items()}, level


def _pooled(runs: Sequence[Run], split: str) -> list[Point]:
    return [point for run in runs for point in run.points[split]]


def compare(runs: Sequence[Run], chosen: dict[str, str]) -> dict[str, Any]:
    """Compare on the test texts, at the best domain NLL that all the chosen runs reached.

    What a run forgot is the rise of its general NLL since its own start. Arms that start elsewhere differ there, so
    that the general NLL itself decides.

    ``chosen``: family → label of the run that validation chose.
    """
    by_label = {run.arm.label: run for run in runs}
    level = shared_level([by_label[label].points["test"] for label in chosen.values()])
    rows = [_row(run, chosen[run.arm.family] == run.arm.label, level) for run in runs]
    at_level = {row["family"]: row for row in rows if row["chosen"]}
    pooled = {family: general_at(_pooled(members, "test"), level) for family, members in families(runs).items()}
    return {
        "shared_level": level,
        "rows": rows,
        "general_at_shared_level": {family: row["general_at_level"] for family, row in at_level.items()},
        "at_shared_level": {family: row["forgetting_at_level"] for family, row in at_level.items()},
        "frontier_at_shared_level": {family: _rise(pooled[family], row) for family, row in at_level.items()},
        "verdict": verdict(rows),
        "runs": [
            {"arm": asdict(run.arm), "label": run.arm.label, "steps": run.steps, "points": run.points} for run in runs
        ],
    }


def _row(run: Run, chosen: bool, level: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "arm": run.arm.label,
        "family": run.arm.family,
        "chosen": chosen,
        "start": run.arm.start,
        "general_before": run.before["general test"],
        "general_after": run.final["general test"],
        "forgetting": run.final["general test"] - run.before["general test"],
        "domain": run.final["domain test"],
        "general_at_level": general_at(run.points["test"], level),
        "optimizer_ms": run.optimizer_ms,
        "step_ms": run.step_ms,
        "extra_bytes": run.extra_bytes,
    }
    return row | {"forgetting_at_level": _rise(row["general_at_level"], row)}


def _rise(general: float | None, row: dict[str, Any]) -> float | None:
    return None if general is None else general - row["general_before"]


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say whether each chosen ALR arm has less general NLL than every rival's arm that reached the shared level."""
    rivals = [row for row in rows if row["family"] not in OURS and row["general_at_level"] is not None]
    ours = [row for row in rows if row["family"] in OURS and row["chosen"]]
    return {
        row["family"]: {
            "holds": all(row["general_at_level"] < rival["general_at_level"] for rival in rivals),
            "beaten_by": [rival["arm"] for rival in rivals if rival["general_at_level"] <= row["general_at_level"]],
        }
        for row in ours
    }
