"""What comes out of a run, as one dictionary: what results.json holds and the report page reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import _environment
from .._plain import plain

if TYPE_CHECKING:
    from .job import Job

KINDS = ("domain", "general")


def about(job: Job) -> dict[str, Any]:
    """Return what all results begin with."""
    return {
        "kind": job.settings.verb,
        "verb": job.settings.verb,
        "versions": _environment.versions(),
        "machine": _environment.machine(),
        "options": job.settings.as_dict(),
    }


def measured(job: Job, phase: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the first and the last measurement of a phase, by "domain" and "general"; None where nothing was."""
    lines = job.metrics.evaluations(phase)
    ends = (lines[0], lines[-1]) if lines else ({}, {})
    first, last = ({kind: line.get("evaluation", {}).get(kind) for kind in KINDS} for line in ends)
    return first, last


def of_record(job: Job, texts: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return the results of ``record``."""
    before, after = measured(job, "record")
    return plain(
        about(job)
        | {
            "seconds": _seconds(job, {"record": found}),
            "data": {"general": texts},
            "model": found["model"],
            "importance": found["importance"],
            "before": {"general": before["general"]},
            "after": {"general": after["general"]},
            "log": {"record": job.metrics.log("record")},
            "curves": {"record": job.metrics.curve("record")},
            "cost": _cost({"record": found}),
            "files": found["files"],
        }
    )


def of_tuning(job: Job, data: dict[str, Any], phases: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    """Return the results of ``tune`` and ``run``.

    Args:
        data: facts of "domain" and "general" text.
        phases: what "tune" found, and "record" and "plain" where there are such.
        files: what → path.
    """
    tune = phases["tune"]
    before, after = measured(job, "tune")
    unheld = measured(job, "plain")[1] if "plain" in phases else None
    trained = [name for name in ("tune", "plain") if name in phases]
    return plain(
        about(job)
        | {
            "seconds": _seconds(job, phases),
            "data": data,
            "model": tune["model"],
            "importance": tune["importance"],
            "coefficients": tune["coefficients"],
            "before": before,
            "after": after,
            "plain": unheld,
            "summary": _summary(before, after, unheld),
            "curves": {name: job.metrics.curve(name) for name in trained},
            "log": {name: job.metrics.log(name) for name in ("record", *trained) if name in phases},
            "movement": {name: phases[name]["movement"] for name in trained} if tune["movement"] else None,
            "cost": _cost(phases),
            "files": files,
        }
    )


def _seconds(job: Job, phases: dict[str, Any]) -> dict[str, float]:
    """Return seconds by phase, measurements apart."""
    lines = [line for name in phases for line in job.metrics.evaluations(name)]
    spent = {name: found["seconds"] for name, found in phases.items()}
    return spent | {"evaluate": round(sum(line.get("seconds", 0.0) for line in lines), 3)}


def _cost(phases: dict[str, Any]) -> dict[str, Any]:
    """Return times of a step by phase, bytes of the last that has a pull, and the peak over all of them."""
    last = phases.get("tune") or phases["record"]
    importance = last["importance"]
    return {
        "step_ms": {name: found["step_ms"] for name, found in phases.items()},
        "bytes": last["bytes"],
        "artifact_bytes": importance["bytes"] if importance else None,
        "peak_memory_bytes": max(found["peak_memory_bytes"] for found in phases.values()),
    }


def _summary(before: dict[str, Any], after: dict[str, Any], unheld: dict[str, Any] | None) -> dict[str, float | None]:
    forgetting, gain = _rise(before, after, "general"), _rise(after, before, "domain")
    return {
        "forgetting": forgetting,
        "domain_gain": gain,
        "backward_transfer": None if forgetting is None else -forgetting,
        "plain_forgetting": _rise(before, unheld, "general"),
        "plain_domain_gain": _rise(unheld, before, "domain"),
    }


def _rise(first: dict[str, Any] | None, second: dict[str, Any] | None, kind: str) -> float | None:
    """Return by how much NLL is larger in the second, in nats a token; None where one of them is not known."""
    ends = [(point or {}).get(kind) or {} for point in (first, second)]
    low, high = (end.get("nll") for end in ends)
    return None if low is None or high is None else high - low
