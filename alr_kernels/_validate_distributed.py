"""Checks on sharded parameters and on what launchers do to parameters, and their messages; see ``_validate.py``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from . import _ranks
from ._validate import listed

if TYPE_CHECKING:
    from torch import Tensor

RECIPE = (
    "shard with torch.distributed.fsdp.fully_shard(model) (FSDP2), which keeps parameters apart, and build the "
    "optimizer afterwards; with Accelerate: FullyShardedDataParallelPlugin(fsdp_version=2)"
)


def placements(name: str, placed: Sequence[Any]) -> None:
    if any(placement.is_partial() for placement in placed):
        raise RuntimeError(
            f"parameter {name!r}: expected a DTensor that is sharded or replicated, got {tuple(placed)}: its value "
            "is a sum not yet made; call redistribute() first."
        )


REMEDIES = {  # by the last word of what cannot be sharded so
    "state": "state_dtype='fp32'",
    "rounding": "master='split' or 'none'",
    "importance": "fp32 for it (importance_dtype, or dtype when saving; given codes: importance.astype('fp32'))",
    "factor": "fully_shard(), which shards by rows",
}


def rows_alone(name: str, what: str, placed: Sequence[Any], by_rows: bool) -> None:
    """Refuse codes, random rounding and LoRA factors of what is not a range of rows."""
    if not by_rows:
        raise RuntimeError(
            f"parameter {name!r}: expected it sharded by rows, once, as Shard(0), for {what}, got {tuple(placed)}; use "
            f"{REMEDIES[what.rpartition(' ')[2]]}, or Shard(0)."
        )


def sharded_alike(name: str, got: tuple[Any, Any], expected: tuple[Any, Any] | None) -> None:
    """Refuse a sharded value of a parameter that is not sharded, or is in another way."""
    if expected is None:
        raise ValueError(
            f"{name!r}: expected an unsharded tensor as the parameter is, got a DTensor with {got[1]} on {got[0]}; "
            "pass value.full_tensor(), or for importance save it to a file, which every layout loads."
        )
    if got != expected:
        raise ValueError(
            f"{name!r}: expected a tensor sharded as the parameter, {expected[1]} on {expected[0]}, got {got[1]} on "
            f"{got[0]}; pass value.full_tensor(), or for importance save it to a file, which every layout loads."
        )


def gradient_sharding(name: str, got: Any, expected: Any) -> NoReturn:
    """Refuse a gradient that is on another mesh than its parameter (None: unsharded)."""
    if got is None or expected is None:
        forms = ["a DTensor" if placed else "an unsharded tensor" for placed in (expected, got)]
        raise RuntimeError(
            f"parameter {name!r}: expected {forms[0]} as gradient, as the parameter is, got {forms[1]}; was the model "
            "sharded or gathered between backward and step?"
        )
    raise RuntimeError(
        f"parameter {name!r}: expected its gradient on the parameter's mesh, {expected}, got {got}; shard the model "
        "before the forward pass, and nothing between backward and step."
    )


def not_flattened(name: str, param: Tensor) -> None:
    """Refuse what FSDP1 and DeepSpeed ZeRO make of parameters: pieces of one flat tensor, without rows or names."""
    if getattr(param, "_fsdp_flattened", False) or type(param).__name__ == "FlatParameter" or "_flat_param" in name:
        raise RuntimeError(
            f"parameter {name!r} was flattened by FSDP1 (FullyShardedDataParallel): its shards have neither rows nor "
            f"layers, to which importance and coefficients belong; {RECIPE}."
        )
    if hasattr(param, "ds_id"):
        raise RuntimeError(
            f"parameter {name!r} was partitioned by DeepSpeed ZeRO-3: its shards have neither rows nor layers, to "
            f"which importance and coefficients belong; {RECIPE}."
        )


def in_memory(name: str, param: Tensor) -> None:
    """Refuse what FSDP2 had gathered for a forward pass when the optimizer was built, and has released since."""
    if param.numel() and not param.is_meta and param.untyped_storage().nbytes() == 0:
        raise RuntimeError(
            f"parameter {name!r} has no memory any more: it was whole when the optimizer was built, as fully_shard() "
            "leaves the root's after a forward pass without backward; call model.reshard() first, or build the "
            "optimizer before such a pass."
        )


def same_parameters(shapes: Mapping[str, Sequence[int]], now: Sequence[Tensor]) -> None:
    """Refuse a group whose parameters (name → shape) were exchanged for others since the optimizer was built."""
    if len(now) != len(shapes):
        raise RuntimeError(
            f"parameters: expected the {len(shapes)} that the optimizer was built with ({listed(shapes, 3)}), got "
            f"{len(now)} in their place: DeepSpeed ZeRO and the like put one flat tensor there; {RECIPE}."
        )
    for (name, shape), param in zip(shapes.items(), now, strict=True):
        not_flattened(name, param)
        if tuple(param.shape) != tuple(shape):
            raise RuntimeError(
                f"parameter {name!r}: expected shape {tuple(shape)} as when the optimizer was built, got "
                f"{tuple(param.shape)}: it was re-created or flattened since; build the optimizer afterwards. For many "
                f"devices, {RECIPE}."
            )


def no_gradient(names: Sequence[str]) -> None:
    """Say that a first step has nothing to do: raise in a job of many processes, whose launchers replace parameters."""
    message = (
        f"step: none of the {len(names)} parameters ({listed(names, 3)}) has ever had a gradient. Were they re-created "
        "after the optimizer was built (fully_shard(), FSDP1, to_empty(), a quantised or copied model)? Build the "
        "optimizer from the model as it is trained, and call backward() before step()."
    )
    if _ranks.in_job():
        raise RuntimeError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=7)  # the caller of step(), behind torch's two wrappers


def no_zero_redundancy() -> None:
    """Refuse to be the inner optimizer of ZeroRedundancyOptimizer: a rank would hold a part of all names."""
    zero = getattr(sys.modules.get("torch.distributed.optim"), "ZeroRedundancyOptimizer", None)
    its_code = getattr(getattr(zero, "_init_local_optimizer", None), "__code__", None)
    frame = sys._getframe(1) if its_code is not None else None
    for _ in range(8):
        if frame is None:
            return
        if frame.f_code is its_code:  # looking at its locals would keep those of every caller alive
            raise TypeError(
                "ZeroRedundancyOptimizer hands each rank some of the parameters, unnamed: importance and the mean over "
                f"all of it need them all; {RECIPE}."
            )
        frame = frame.f_back


def whole_entry(name: str, sharding: Any) -> None:
    """Refuse, for a file that one process writes, a tensor of which other processes hold parts."""
    if sharding is not None and sharding.splits:
        raise ValueError(
            f"importance of {name!r}: expected a whole tensor for a file that this process writes alone, got a DTensor "
            f"with {sharding.placements} on {sharding.mesh}; pass tensor.full_tensor(), or save an Importance of them."
        )


def whole_job(mesh_size: int, world_size: int) -> None:
    if mesh_size != world_size:
        raise RuntimeError(
            f"importance: expected tensors sharded over all {world_size} processes, got a mesh of {mesh_size}: the "
            "file is written by all of them together; save one file from each part of the model."
        )


def shared_folder(path: str, missing: Sequence[int]) -> None:
    if missing:
        raise FileNotFoundError(
            f"importance file {path!r}: expected a folder that every process sees, but ranks {list(missing)} do not "
            "find the file that rank 0 began; save to a shared file system."
        )


def several_writers_failed(path: str, reasons: Sequence[str]) -> NoReturn:
    raise OSError(
        f"importance file {path!r}: expected every rank to write its part, got {listed(reasons)}; nothing was changed."
    )


def factors_alike(name: str, up: Any, down: Any) -> None:
    """Refuse a LoRA pair of which one factor is sharded, or the two differently, or not by rows."""
    placed = [None if factor is None else (factor.mesh, factor.placements) for factor in (up, down)]
    if placed[0] != placed[1]:
        raise RuntimeError(
            f"LoRA pair {name!r}: expected both factors sharded alike, got {placed[0]} for B and {placed[1]} for A; "
            "apply fully_shard() to a module that holds both."
        )
    if up is not None:
        rows_alone(name, "a LoRA factor", up.placements, up.by_rows)


def same_checkpoints(folder: str, seen: Sequence[Sequence[str]]) -> None:
    """Refuse to load where processes see different checkpoints: each would go on from its own."""
    if any(names != seen[0] for names in seen):
        each = "; ".join(f"rank {rank}: {listed(names) or 'none'}" for rank, names in enumerate(seen))
        raise ValueError(
            f"checkpoints in {folder!r}: expected the same ones on every process, got {each}; "
            "use a folder on a shared file system."
        )


def checkpoint_failed(path: str, reason: str, cause: Any) -> NoReturn:
    raise RuntimeError(
        f"checkpoint {path!r}: expected rank 0 to read and write it, got {reason}; earlier checkpoints stay."
    ) from (cause if isinstance(cause, BaseException) else None)
