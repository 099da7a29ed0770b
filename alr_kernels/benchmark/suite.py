"""Runs one set of shapes: each candidate in turn, in the same rounds as a copy and the references."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from . import memory
from .candidates import Candidate, candidates, references
from .inputs import Inputs, Source
from .shapes import MANY, Shape, elements
from .timing import Sample, Step, copier, in_rounds, ratio, spread, synchronize

COPY = "copy"
COPY_BYTES = 2**30  # of each buffer, at most; otherwise as much as the float32 parameters take
COMPILE = ("none", "few", "all")  # compiled rivals: not at all, for sets of at most MANY tensors, or for every set
WARMUP = 2  # steps after the first


def run_set(
    name: str,
    shapes: Sequence[Shape],
    device: str,
    *,
    full: bool = True,
    compile: str = "few",
    only: Sequence[Candidate] | None = None,
    rounds: int = 15,
    budget_s: float = 10.0,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Time every candidate on the shapes; at most the references and one more are in memory at a time.

    Args:
        name: of the set, for the result.
        shapes: of the parameters.
        device: ``"cpu"`` or ``"cuda"``.
        full: every row, or the short form's.
        compile: one of :data:`COMPILE`.
        only: these rows beside the references.
        rounds: of every pairing; fewer, but 3 at least, where they would take over ``budget_s`` seconds.
        tick: is called with a row's name before that row is measured.

    Returns:
        the set's facts and ``rows``. A row has either ``skipped``, the reason (with ``failed`` where it is a row of
        ours that raised), or: times in seconds; ``ratio``, per
        reference (median, p20, p80) over rounds; bytes an element by formula, bytes per second and their share of
        the copy's in the same round; bytes an element kept, and at the peak of a step, beyond weights and gradients.
    """
    run = _Run(shapes, device, rounds, budget_s)
    compiles = compile == "all" or (compile == "few" and len(shapes) <= MANY)
    with _cold_compiler(), memory.only_new_objects():
        for candidate in references(compile == "all", with_compiled=compile != "none"):
            tick(candidate.name)
            run.add_reference(candidate)
        rows = candidates(full, compile == "all", with_compiled=compiles) if only is None else only
        for candidate in rows:
            tick(candidate.name)
            run.measure(candidate)
    return {
        "set": name,
        "device": device,
        "elements": elements(shapes),
        "tensors": len(shapes),
        "copy_bytes_per_s": run.copy_bytes / spread([sample.device_s for sample in run.copies])[0],
        "rows": run.finished_rows(),
    }


@contextmanager
def _cold_compiler() -> Iterator[None]:
    """Forget compiled code and leave its caches on disk alone: first steps cost what they cost a new model."""
    import torch._inductor.config as config

    before = config.force_disable_caches
    torch._dynamo.reset()
    config.force_disable_caches = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
            yield
    finally:
        config.force_disable_caches = before


class _Run:
    """The rows of one set as they come in."""

    def __init__(self, shapes: Sequence[Shape], device: str, rounds: int, budget_s: float) -> None:
        self.shapes, self.device, self.rounds, self.budget_s = shapes, device, rounds, budget_s
        buffer = min(COPY_BYTES, 4 * elements(shapes))
        self.copy, self.copy_bytes = copier(device, buffer), 2 * buffer
        self.source = Source(shapes, device)
        self.copies: list[Sample] = []
        self.references: dict[str, tuple[Candidate, Step]] = {}
        self.reference_samples: dict[str, list[Sample]] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def add_reference(self, candidate: Candidate) -> None:
        """Build what every later row is compared with; it stays in memory."""
        step = self._build(candidate)
        if step is not None:
            self.references[candidate.name] = candidate, step
            self.reference_samples[candidate.name] = []

    def measure(self, candidate: Candidate) -> None:
        """Build the candidate, time it beside the references, and let it go."""
        step = self._build(candidate)
        if step is not None:
            steps = {name: step for name, (_, step) in self.references.items()}
            samples = in_rounds(
                {COPY: self.copy, **steps, candidate.name: step}, self.rounds, self.device, self.budget_s
            )
            copies, own = samples.pop(COPY), samples[candidate.name]
            self.copies += copies
            others = {name: samples[name] for name in self.references}
            for name, values in others.items():
                self.reference_samples[name] += values
            self.rows[candidate.name] |= self._timed(candidate, own, copies, others)
            del steps
        del step
        _release(self.device)

    def _build(self, candidate: Candidate) -> Step | None:
        """Build and take the first steps; on a reason not to, or when it raises, note that and return None."""
        inputs = Inputs(self.source)
        row: dict[str, Any] = {"name": candidate.name, "ours": candidate.ours}
        self.rows[candidate.name] = row
        reason = candidate.why_not(inputs)
        if not reason:
            try:
                return self._first_steps(candidate, inputs, row)
            except torch.OutOfMemoryError:
                reason = "it does not fit into the device's memory"
            except Exception as error:  # in any way; the other rows are still worth having
                reason = _reason(error)
                if candidate.ours:
                    row["failed"] = True
        row["skipped"] = reason
        return None

    def _first_steps(self, candidate: Candidate, inputs: Inputs, row: dict[str, Any]) -> Step:
        live, allocated = memory.live_bytes(self.device), memory.allocated(self.device)
        begin = time.perf_counter()
        step = candidate.build(inputs)
        synchronize(self.device)
        constructed = time.perf_counter()
        step()
        synchronize(self.device)
        stepped = time.perf_counter()
        peak = memory.peak_of([step] * WARMUP, self.device, allocated)
        given = memory.nbytes_of(inputs.made, self.device)
        row |= {
            "construction_s": constructed - begin,
            "first_step_s": stepped - constructed,
            "state_bytes": (memory.live_bytes(self.device) - live - given) / self.source.elements,
            "state_bytes_formula": candidate.state(self.shapes),
            "peak_bytes": None if peak is None else (peak - given) / self.source.elements,
        }
        return step

    def _timed(
        self, candidate: Candidate, own: list[Sample], copies: list[Sample], others: dict[str, list[Sample]]
    ) -> dict[str, Any]:
        median, p20, p80 = spread([sample.device_s for sample in own])
        traffic = candidate.traffic(self.shapes) or 0.0
        moved = traffic * elements(self.shapes)
        share = [(moved / a.device_s) / (self.copy_bytes / b.device_s) for a, b in zip(own, copies, strict=True)]
        return {
            "rounds": len(own),
            "median_s": median,
            "p20_s": p20,
            "p80_s": p80,
            "host_s": spread([sample.host_s for sample in own])[0],
            "ratio": {name: ratio(own, samples) for name, samples in others.items()},
            "bytes_per_element": traffic,
            "bytes_per_s": moved / median,
            "copy_share": spread(share)[0],
        }

    def finished_rows(self) -> list[dict[str, Any]]:
        """Return all rows, the references' from the rounds of all pairings together."""
        for name, (candidate, _) in self.references.items():
            self.rows[name] |= self._timed(candidate, self.reference_samples[name], self.copies, self.reference_samples)
        return list(self.rows.values())


def failures(result: dict[str, Any]) -> list[str]:
    """Return our own rows that raised, with the reason."""
    return [f"{row['name']}: {row['skipped']}" for row in result["rows"] if row.get("failed")]


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f'{error.name} is not installed: pip install "alr-kernels[bench]"'
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160] if lines else 'no message'}"


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
