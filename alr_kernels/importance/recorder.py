"""The path integral for any torch optimizer, through its step hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _ops, _validate, _validate_distributed, _validate_importance
from .._dtensor import Sharding, local, place_gradient
from ..codecs.storage import fitting, parse
from ..names import unwrap
from . import sharded
from .artifact import Importance
from .files import About, ImportanceWriter
from .statistics import TensorStats

if TYPE_CHECKING:
    from torch.optim import Optimizer

SMALLEST_XI = 1e-30  # below, ω/ξ leaves float32 and weights that did not move lose their rank


class Recording(NamedTuple):
    """Recorded ω with what finalising it needs. A weight may have to be put together first: that is done when asked."""

    names: list[str]
    path_integrals: list[Tensor]
    end: Callable[[int], Tensor]  # θ_end of the i-th
    start: Callable[[int], Tensor]
    steps: int
    method: str = "path_integral"
    cut: float | None = None
    whole: bool = True  # finalise all in one call; False: one after the other, as each end is made when asked for
    shardings: Sequence[Sharding | None] = ()  # of each, where any is sharded: the tensors are then what is here

    def finalised(self, xi: float, relative: bool, allow_nonfinite: bool, dtype: str | torch.dtype) -> Importance:
        """Return the importance."""
        about, formats = self._about(xi, relative), self._formats(dtype)
        numbers = range(len(self.names))
        entries: dict[str, Any] = {}
        stats: dict[str, TensorStats] = {}
        for part in [numbers] if self.whole else [range(i, i + 1) for i in numbers]:
            omegas, kept = ([values[i] for i in part] for values in (self.path_integrals, formats))
            ends, starts = ([*map(each, part)] for each in (self.end, self.start))
            placed = [self._sharding(i) for i in part]
            found, table, counts = sharded.finalise(omegas, ends, starts, kept, xi, relative, placed)
            names = [self.names[i] for i in part]
            entries |= zip(names, map(sharded.wrapped, found, placed), strict=True)
            stats |= zip(names, map(TensorStats.of_row, table, counts), strict=True)
        _validate_importance.finite_recording({name: row.nonfinite for name, row in stats.items()}, allow_nonfinite)
        return Importance(entries, stats=stats, **about._asdict())

    def save(
        self,
        path: str | PathLike[str],
        xi: float,
        relative: bool,
        allow_nonfinite: bool,
        dtype: str | torch.dtype,
    ) -> None:
        """Finalise into a file, tensor by tensor: memory holds the importance of one."""
        about, formats = self._about(xi, relative), self._formats(dtype)
        shapes = [tuple(self._shape(i)) for i in range(len(self.names))]
        layout = dict(zip(self.names, zip(formats, shapes, strict=True), strict=True))
        nonfinite = {}
        with ImportanceWriter.of_layout(path, layout, about, self.shardings) as writer:
            for i, name in enumerate(self.names):
                lists = [self.path_integrals[i]], [self.end(i)], [self.start(i)], [formats[i]]
                placed = self._sharding(i)
                (entry,), table, counts = sharded.finalise(*lists, xi, relative, [placed])
                entry = sharded.wrapped(entry, placed)
                del lists
                stats = TensorStats.of_row(table[0], counts[0])
                nonfinite[name] = stats.nonfinite
                writer.add(name, entry, stats)
            _validate_importance.finite_recording(nonfinite, allow_nonfinite)

    def _about(self, xi: float, relative: bool) -> About:
        xi = _validate.number("xi", xi, low=SMALLEST_XI)
        return About(self.method, xi, relative, self.steps, cut=self.cut)

    def _formats(self, dtype: str | torch.dtype) -> list[str]:
        kept = parse("dtype", dtype)
        formats = [fitting(kept, self._shape(i), omega.dtype) for i, omega in enumerate(self.path_integrals)]
        sharded.check_rows(self.names, formats, [self._sharding(i) for i in range(len(formats))])
        return formats

    def _sharding(self, i: int) -> Sharding | None:
        return self.shardings[i] if self.shardings else None

    def _shape(self, i: int) -> Sequence[int]:
        """Return the shape of the whole tensor."""
        placed = self._sharding(i)
        return self.path_integrals[i].shape if placed is None else placed.shape


class ImportanceRecorder:
    """Integrate ω += −g · (θ_after − θ_before) around every ``optimizer.step()``.

    Works with any ``torch.optim.Optimizer``. It keeps three float tensors a parameter: ω (float32), the weights
    at the start, and the weights after the last step. ``AlrAdamW(record=True)`` does the same inside its own
    pass and keeps two.

    Gradients are read after the step: they must be those of the task loss (no penalty added), unscaled. If they
    were clipped before the step, ω is scaled by the clip factor. Steps that a ``GradScaler`` skips are skipped.
    Weights that something else moves between two steps are noticed by their version counter; after writing through
    ``param.data``, which has none, call :meth:`resync`.

    Args:
        optimizer: the optimizer that steps the parameters.
        named_parameters: (name, tensor) pairs, all stepped by ``optimizer``.

    Raises:
        ValueError: a tensor is not one of the optimizer's, or comes twice.
        RuntimeError: gradients reach the step still multiplied by a loss scale, or are released within it.

    Source: arXiv 2501.13669, eq. 3; Zenke et al. 2017, eq. 3.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> with ImportanceRecorder(optimizer, layer.named_parameters()) as recorder:
    ...     layer(torch.ones(1, 2)).square().sum().backward()
    ...     _ = optimizer.step()
    >>> sorted(recorder.finalise(xi=1e-6))
    ['bias', 'weight']
    """

    def __init__(self, optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        pairs = [(unwrap(name), param) for name, param in named_parameters]
        _validate.distinct_names(name for name, _ in pairs)
        _validate.no_duplicates(pairs)
        _validate_importance.recorder_members(
            dict(pairs), (p for group in optimizer.param_groups for p in group["params"])
        )
        for name, param in pairs:
            _validate_distributed.not_flattened(name, param)
        self._params = dict(pairs)
        self._maximize = {id(p): bool(g.get("maximize")) for g in optimizer.param_groups for p in g["params"]}
        self._starts: dict[str, Tensor] = {}
        self._previous: dict[str, Tensor] = {}
        self._path_integrals: dict[str, Tensor] = {}
        self._versions: dict[str, tuple[int, int, int]] = {}
        self._had_grads = False
        self.steps = 0
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def __enter__(self) -> ImportanceRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks; what was recorded stays and can still be finalised."""
        for hook in self._hooks:
            hook.remove()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("ImportanceRecorder hangs on its optimizer's hooks and cannot be copied; make a new one.")

    def resync(self) -> None:
        """Measure the next step from the weights as they are now; needed after writing through ``param.data``."""
        self._versions.clear()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        _validate_importance.recorder_scaling(getattr(optimizer, "grad_scale", None))
        self._had_grads = any(param.grad is not None for param in self._params.values())
        for name, param in self._params.items():
            if param.grad is not None:
                place_gradient(name, param, Sharding.of(name, param))
            if name not in self._starts:
                if param.grad is None and not param.requires_grad:
                    continue  # frozen; recorded from its first gradient on
                here = local(param).detach()
                self._starts[name] = here.clone()
                self._previous[name] = self._starts[name].clone()
                compute = torch.promote_types(param.dtype, torch.float32)
                self._path_integrals[name] = torch.zeros_like(here, dtype=compute)
            elif self._versions.get(name) != _version(param):
                self._previous[name].copy_(local(param))  # moved between two steps: that move is not the optimizer's

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        live = [name for name in self._starts if self._params[name].grad is not None]
        _validate_importance.recorder_grads(self._had_grads, bool(live))
        if found_inf is None or not bool(found_inf):
            for maximize in (False, True):
                names = [name for name in live if self._maximize.get(id(self._params[name]), False) is maximize]
                if names:
                    _ops.accumulate_(
                        [self._path_integrals[name] for name in names],
                        [local(self._params[name].grad) for name in names],
                        [local(self._params[name]) for name in names],
                        [self._previous[name] for name in names],
                        maximize=maximize,
                    )
            self.steps += 1
        for name, param in self._params.items():
            self._versions[name] = _version(param)

    def finalise(
        self,
        xi: float = 1e-6,
        *,
        relative: bool = False,
        allow_nonfinite: bool = False,
        dtype: str | torch.dtype = "fp32",
    ) -> Importance:
        """Return Ω = max(ω, 0) / ((θ_end − θ_start)² + ξ); a pure read, recording may go on.

        Args: as ``AlrAdamW.recorded_importance``.

        Raises:
            RuntimeError: no step was recorded.
            ValueError: ξ ≤ 0, or non-finite ω without ``allow_nonfinite``.
        """
        return self._recording().finalised(xi, relative, allow_nonfinite, dtype)

    def save(
        self,
        path: str | PathLike[str],
        xi: float = 1e-6,
        *,
        relative: bool = False,
        allow_nonfinite: bool = False,
        dtype: str | torch.dtype = "fp32",
    ) -> None:
        """Finalise into a file, tensor by tensor; as :meth:`finalise` and ``Importance.save``."""
        self._recording().save(path, xi, relative, allow_nonfinite, dtype)

    def _recording(self) -> Recording:
        _validate_importance.recording(True, bool(self._starts))
        names = list(self._starts)
        placed = [Sharding.of(name, self._params[name]) for name in names]
        return Recording(
            names,
            [self._path_integrals[name] for name in names],
            lambda i: local(self._params[names[i]]),
            lambda i: self._starts[names[i]],
            self.steps,
            shardings=placed if any(placed) else (),
        )


def _version(param: Tensor) -> tuple[int, int, int]:
    """Return what changes when a weight is replaced or written to: by way of a DTensor, or of what is here of it."""
    here = local(param)
    return here.data_ptr(), here._version, param._version
