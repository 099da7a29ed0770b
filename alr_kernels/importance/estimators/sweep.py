"""One pass over the batches: sums per parameter, in batches where that is exact, resumable, with a progress bar."""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial as bound
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from ... import _validate_estimators
from .objectives import Batch, NotYet, Objective
from .partial import Checkpoint, Partial, batch_digest
from .per_sample import NotBatchable, PerSample
from .reference import raised


class Step(Protocol):
    """Adds one batch to the sums."""

    def __call__(self, index: int, batch: Batch, samples: int, started: Callable[[], None]) -> None:
        """``started`` is called before the first sum is written to."""


def sweep(
    batches: Iterable[Batch],
    step: Step,
    partial: Partial,
    name: str,
    checkpoint: Checkpoint | None,
    *,
    progress: bool,
    allow_nonfinite: bool,
) -> None:
    """Add every batch to ``partial``, from where a checkpoint left off."""
    done, digest, index = partial.batches, "", -1
    whole = True  # whether the sums are those of whole batches, hence fit to be written
    total = len(batches) if isinstance(batches, Sized) else None

    def started() -> None:
        nonlocal whole
        whole = False

    with _bar(progress, name, total) as advance:
        try:
            for index, batch in enumerate(batches):
                samples = _validate_estimators.batch(index, batch)
                if checkpoint is not None:
                    digest = batch_digest(digest, batch)
                if index + 1 == done and checkpoint is not None:
                    _validate_estimators.partial_data(str(checkpoint.path), done, digest, partial.digest)
                if index >= done:
                    with _interrupts_between_batches(checkpoint is not None):
                        step(index, batch, samples, started)
                        if not allow_nonfinite:
                            _validate_estimators.finite_importance(index, _nonfinite(partial.sums))
                        partial.batches, partial.digest = index + 1, digest
                        partial.samples += samples
                        whole = True
                    if checkpoint is not None and partial.batches % checkpoint.every == 0:
                        checkpoint.save(partial)
                advance()
        except BaseException:
            if checkpoint is not None and whole and partial.batches > done:
                checkpoint.save(partial)
            raise
    if checkpoint is not None and index + 1 < done:
        _validate_estimators.partial_length(str(checkpoint.path), done, index + 1)
    if not partial.batches:
        _validate_estimators.no_batches(name)


def _nonfinite(sums: Mapping[str, Tensor]) -> dict[str, int]:
    """Return name → number of elements that are NaN or inf, of tensors that have any; one look at the device."""
    home = next(iter(sums.values()))
    total = torch.stack([tensor.sum().to(home) for tensor in sums.values()]).sum()
    if bool(torch.isfinite(total)):
        return {}
    counts = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in sums.items()}
    return {name: count for name, count in counts.items() if count}


@contextmanager
def _interrupts_between_batches(active: bool) -> Iterator[None]:
    """Hold back the first Ctrl-C until the batch is whole, so that nothing is lost; the second one acts at once."""
    before = signal.getsignal(signal.SIGINT)
    if not active or not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def _bar(wanted: bool, name: str, total: int | None) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal; elsewhere nothing."""
    if wanted:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task(name, total=total)
                yield lambda: bar.advance(task)
            return
    yield lambda: None


def gradients(compute: Callable[[], Tensor], params: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a 0-dim value and name → its gradient, ``.grad`` being left alone; parameters it misses are left out."""
    with torch.enable_grad():
        value = compute()
    if not value.requires_grad:
        return value, {}
    try:
        found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        return _gradients_by_backward(compute, params)  # re-entrant checkpointing refuses autograd.grad
    dense = (grad if grad is None or grad.layout is torch.strided else grad.to_dense() for grad in found)
    return value.detach(), {name: grad for name, grad in zip(params, dense, strict=True) if grad is not None}


def _gradients_by_backward(
    compute: Callable[[], Tensor], params: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    kept = {name: param.grad for name, param in params.items()}
    try:
        for param in params.values():
            param.grad = None
        with torch.enable_grad():
            value = compute()
        value.backward()
        return value.detach(), {name: param.grad for name, param in params.items() if param.grad is not None}
    finally:
        for name, param in params.items():
            param.grad = kept[name]


class SampleStep:
    """Add Σ_n |g_n|^power of a batch: all samples at once where that is exact, else one by one.

    What is taken at once is compared with the samples alone before it counts, on the first batch and on the 9th,
    65th, 513th …: the numbers of a batch with those of its halves, and the sums of two samples that differ with plain
    autograd's of each. Interactions between samples, weights used outside their module, rules that do not fit show
    there. A batch by which nothing can be compared is taken one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        power: int,
        partial: Partial,
        name: str,
        allow_nonfinite: bool,
        batched: bool,
    ) -> None:
        self._model = model
        self._objective = objective
        self._power = power
        self._partial = partial
        self._name = name
        self._check_numbers = not allow_nonfinite
        self._params = {key: param for key, param in model.named_parameters() if param.requires_grad}
        self._batched: PerSample | None = None
        self._compared = False
        if not batched:
            return
        if partial.one_by_one:
            self._one_by_one(NotBatchable(partial.one_by_one))
            return
        try:
            self._batched = PerSample(model, partial.sums, power)
        except NotBatchable as reason:
            self._one_by_one(reason)

    def __call__(self, index: int, batch: Batch, samples: int, started: Callable[[], None]) -> None:
        """Add a batch."""
        if self._batched is not None and self._fits(self._batched, index, batch, samples):
            written = False

            def begin() -> None:
                nonlocal written
                written = True
                started()

            try:
                self._add_batch(self._batched, index, batch, samples, begin)
                self._partial.at_once += samples if samples > 1 else 0
                return
            except NotBatchable as reason:
                if written:  # never seen: what shows in the backward pass shows in the comparison
                    self._refuse(index, reason)
                self._one_by_one(reason)
        self._add_samples(index, batch, samples, self._partial.sums, 1.0, started)

    def _fits(self, batched: PerSample, index: int, batch: Batch, samples: int) -> bool:
        """Whether a batch may be taken at once; compares where that is due."""
        if self._compared and not _is_power_of_8(index):
            return True
        while True:
            try:
                compared = self._compare(batched, index, batch, samples)
                self._compared |= compared and samples > 1  # a single one cannot interact
                return compared
            except NotYet:
                return False
            except NotBatchable as reason:
                if self._objective.another():
                    continue
                if self._partial.at_once:
                    self._refuse(index, reason)
                self._one_by_one(reason)
                return False

    def _refuse(self, index: int, reason: NotBatchable) -> NoReturn:
        raise RuntimeError(
            f"{self._name}, batch {index}: {reason}. Earlier batches did not show it, and their sums may be wrong: "
            "start again with batched=False."
        ) from reason

    def _one_by_one(self, reason: NotBatchable) -> None:
        self._batched = None
        self._partial.one_by_one = str(reason)
        warnings.warn(f"{self._name} takes the samples one at a time (slower, exact): {reason}.", stacklevel=2)

    def _add_batch(
        self, batched: PerSample, index: int, batch: Batch, samples: int, started: Callable[[], None]
    ) -> Tensor:
        seen = []

        def look(values: Tensor) -> None:
            if self._check_numbers:
                _validate_estimators.finite_numbers(index, 0, values)
            seen.append(values)
            started()

        batched.add(lambda: self._objective.of_samples(self._model, batch, samples), samples, look)
        return seen[0]

    def _add_samples(
        self,
        index: int,
        batch: Batch,
        samples: int,
        sums: Mapping[str, Tensor],
        scale: float,
        started: Callable[[], None],
    ) -> Tensor:
        values = []
        for n in range(samples):
            sample = rows_of(batch, samples, [n])
            value, found = gradients(bound(self._objective.of_one, self._model, sample), self._params)
            if self._check_numbers:
                _validate_estimators.finite_numbers(index, n, value)
            started()
            for name, grad in found.items():
                sums[name].add_(raised(grad.to(sums[name].dtype), self._power), alpha=scale)
            values.append(value)
        return torch.stack(values)

    def _compare(self, batched: PerSample, index: int, batch: Batch, samples: int) -> bool:
        """Raise NotBatchable unless a batch gives what its samples give alone; whether anything could be compared."""
        narrow = batched.narrow or any(p.dtype in (torch.bfloat16, torch.float16) for p in self._params.values())
        tolerance, epsilon = (0.2, 2.0**-8) if narrow else (1e-3, 2.0**-23)
        self._compare_numbers(batch, samples, tolerance / 4)
        sums, chosen = self._partial.sums, _two_that_differ(batch, samples)
        kept = {} if self._partial.samples == 0 else {name: tensor.clone() for name, tensor in sums.items()}
        for tensor in sums.values():
            tensor.zero_()
        try:
            self._add_samples(index, rows_of(batch, samples, chosen), len(chosen), sums, -1.0, lambda: None)
            sizes = {name: _largest(tensor) for name, tensor in sums.items()}
            try:
                self._add_batch(batched, index, rows_of(batch, samples, chosen), len(chosen), lambda: None)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as failure:  # one by one it works: what fails is that weights need no gradient here
                raise NotBatchable(f"all at once they fail with {str(failure).splitlines()[0]!r}") from failure
            errors = {name: _largest(tensor) for name, tensor in sums.items()}
        finally:
            for name, tensor in sums.items():
                tensor.copy_(kept[name]) if kept else tensor.zero_()
        largest = max(sizes.values(), default=0.0)
        if not all(map(math.isfinite, errors.values())) or not largest:
            return False
        # A gradient that is zero but for rounding differs freely: measured by the largest of all.
        floor = (8 * epsilon) ** self._power * largest
        for name, error in errors.items():
            if not error <= tolerance * sizes[name] + floor:
                raise NotBatchable(f"per-sample gradients of {name!r} differ from those of each sample alone")
        return True

    def _compare_numbers(self, batch: Batch, samples: int, tolerance: float) -> None:
        """Raise NotBatchable when a batch's numbers are others in the company of half of the samples, or alone."""
        middle = (samples + 1) // 2
        parts = [range(samples), range(middle), range(middle, samples)]
        with torch.enable_grad():  # a loss may differentiate
            numbers = [
                self._objective.of_samples(self._model, rows_of(batch, samples, part), len(part)).detach().double()
                for part in parts
                if part
            ]
        apart = (numbers[0] - torch.cat(numbers[1:])).abs().nan_to_num(0.0)
        if float(apart.max()) > tolerance * max(float(numbers[0].abs().nan_to_num(0.0).max()), 1e-6):
            raise NotBatchable(
                "samples of a batch do not have the losses that they have in another one: they interact, or the loss "
                "of one sample is not its part of the batch's"
            )


def _is_power_of_8(index: int) -> bool:
    return index >= 8 and index & (index - 1) == 0 and index.bit_length() % 3 == 1


def _two_that_differ(batch: Batch, samples: int) -> list[int]:
    """Return the first sample and the first that differs from it in any tensor, else the last one."""
    if samples == 1:
        return [0]
    rows = [value.reshape(samples, -1) for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    other = torch.stack([(row != row[:1]).any(1).cpu() for row in rows]).any(0).nonzero().flatten().tolist()
    return [0, other[0] if other else samples - 1]


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def rows_of(batch: Batch, samples: int, rows: Sequence[int]) -> dict[str, Any]:
    """Return copies of some of a batch's samples; lists and tuples with an entry a sample are taken apart as well."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            return value[list(rows)]
        if isinstance(value, (list, tuple)) and len(value) == samples:
            return type(value)([value[row] for row in rows])
        return value

    return {key: part(value) for key, value in batch.items()}
