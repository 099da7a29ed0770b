"""metrics.jsonl: what a run logs and measures, one JSON object a line, and what results make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._files import replaced
from .._plain import plain

DRIFT = "alr/anchor_drift/"


class Metrics:
    """The lines of a run's ``metrics.jsonl``; one process writes, all may read what it has.

    Args:
        path: of the file, whose folder exists.
        writes: whether this process appends to it.

    >>> import tempfile
    >>> metrics = Metrics(Path(tempfile.mkdtemp()) / "metrics.jsonl", writes=True)
    >>> metrics.add("tune", 10, 1.5, {"loss": 2.0, "lr": float("nan")})
    >>> metrics.keep("tune", 5)
    >>> metrics.lines("tune")
    []
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self._path, self._writes = path, writes

    def add(self, phase: str, step: int, seconds: float, values: dict[str, Any]) -> None:
        """Append a line and flush it; numbers that are not finite become null."""
        if not self._writes:
            return
        line = {"phase": phase, "step": step, "time": round(seconds, 3), **plain(values)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def lines(self, phase: str) -> list[dict[str, Any]]:
        """Return the lines of a phase; one that a killed process left half written does not count."""
        return [line for line in self._all() if line.get("phase") == phase]

    def _all(self) -> Iterator[dict[str, Any]]:
        if self._path.is_file():
            for text in self._path.read_text("utf-8").splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue
                if isinstance(line, dict):
                    yield line

    def keep(self, phase: str, step: int) -> None:
        """Forget what a phase wrote after a step (−1: all): it goes on from there."""
        if self._writes and self._path.is_file():
            kept = [line for line in self._all() if line.get("phase") != phase or line.get("step", 0) <= step]
            with replaced(self._path) as beside:
                beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def evaluations(self, phase: str) -> list[dict[str, Any]]:
        """Return the measurements of a phase, in order."""
        return [line for line in self.lines(phase) if "evaluation" in line]

    def curve(self, phase: str) -> list[dict[str, Any]]:
        """Return step, seconds and NLL on domain and general text, of each measurement."""
        return [
            {
                "step": line["step"],
                "seconds": line["time"],
                **{kind: (line["evaluation"].get(kind) or {}).get("nll") for kind in ("domain", "general")},
            }
            for line in self.evaluations(phase)
        ]

    def log(self, phase: str) -> list[dict[str, Any]]:
        """Return what was logged while training: step, loss and lr, and what the pull did where there is one."""
        entries = []
        for line in self.lines(phase):
            if "loss" not in line:
                continue
            entry = {"step": line["step"], "loss": line["loss"], "lr": line.get("lr")}
            if "alr/penalty" in line:
                entry["penalty"], entry["stiffness"] = line["alr/penalty"], line.get("alr/stiffness")
                drifts = {key: value for key, value in line.items() if key.startswith(DRIFT)}
                entry["drift"] = {key.removeprefix(DRIFT): value for key, value in drifts.items()}
            entries.append(entry)
        return entries
