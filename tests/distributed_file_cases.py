"""One importance file whatever the layout, and checkpoints that load on another number of ranks."""

from __future__ import annotations

import builtins
import contextlib
import copy
import os
import resource
import shutil
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import (
    LEAN,
    STATISTICS,
    Weights,
    give,
    gradients,
    importance_of,
    mesh_of,
    part,
    same_state,
    shard,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from alr_kernels import AlrAdamW, DynamicCoeffs, Importance, ImportanceRecorder
from alr_kernels.importance.scratch import Scratch
from alr_kernels.integrations.checkpoints import load_checkpoint as load_latest
from alr_kernels.integrations.checkpoints import save_checkpoint as save_latest

HYPER = {"lr": 1e-2, "weight_decay": 0.1, "reg_lambda": 0.3}


def recorded(model, steps, **options):
    run = AlrAdamW(model.named_parameters(), record=True, **HYPER, **options)
    for step in range(steps):
        give(model, gradients(step, next(model.parameters()).dtype))
        run.step()
    return run


def same_importance(expected, got, exact=True):
    """Both whole, or the second sharded."""
    assert list(got) == list(expected)
    assert got.fingerprint == expected.fingerprint
    assert (got.method, got.xi, got.steps) == (expected.method, expected.xi, expected.steps)
    for name in expected:
        a, b = expected.encoded(name), got.encoded(name)
        assert (a.format, a.shape) == (b.format, b.shape)
        for x, y in ((a.values, b.values), (a.scales, b.scales)):
            if x is None:
                assert y is None
                continue
            if isinstance(y, DTensor):
                x, y = part(x, y).to_local(), y.to_local()
            if exact and a.format != "rank1":
                assert torch.equal(x, y), name
            else:
                torch.testing.assert_close(y, x, rtol=1e-6, atol=0.0)
        x, y = expected[name], got[name]
        assert y.shape == x.shape
        x, y = (part(x, y).to_local(), y.to_local()) if isinstance(y, DTensor) else (x, y)
        torch.testing.assert_close(y, x, rtol=1e-6, atol=0.0)
        row, other = expected.stats[name], got.stats[name]
        assert (row.numel, row.nonfinite, row.max, row.histogram) == (
            other.numel, other.nonfinite, other.max, other.histogram,
        )  # fmt: skip
        torch.testing.assert_close(torch.tensor(other.row()), torch.tensor(row.row()), **STATISTICS, equal_nan=True)


def one_file(kind, dtype, relative, folder):
    """What the ranks write together is what one process writes, and every process loads it."""
    models = Weights(), shard(Weights(), *mesh_of(kind))
    runs = [recorded(model, 3) for model in models]
    paths = [folder / f"{kind}-{dtype}-{relative}-{which}.safetensors" for which in ("whole", "sharded", "kept")]
    options = {"xi": 1e-3, "relative": relative, "dtype": dtype}
    if dist.get_rank() == 0:
        runs[0].save_importance(paths[0], **options)
    runs[1].save_importance(paths[1], **options)
    kept = runs[1].recorded_importance(**options)
    kept.save(paths[2])
    dist.barrier()
    expected = Importance.load(paths[0])
    for got in (kept, Importance.load(paths[1]), Importance.load(paths[2])):
        same_importance(expected, got, exact=not relative)
    assert not list(folder.glob("*.partial"))
    if not relative and dtype != "rank1":
        assert kept.content_fingerprint == expected.content_fingerprint
        assert Importance.load(paths[1]).content_fingerprint == expected.content_fingerprint
    assert expected.nbytes == Importance.load(paths[1]).nbytes


def importance_stays_sharded(folder):
    """What was recorded goes into the next phase, merged, normalised and encoded, without becoming whole."""
    models = Weights(), shard(Weights(), *mesh_of("rows"))
    runs = [recorded(model, 2) for model in models]
    kept = [run.recorded_importance(xi=1e-3) for run in runs]
    earlier = importance_of(models[0], seed=9).normalized()
    for change in (
        lambda x: x.normalized(),
        lambda x: x.normalized().merged(earlier, "decayed", 0.5),
        lambda x: x.normalized().astype("int8").merged(earlier, "max"),
        lambda x: x.astype("int4"),
        lambda x: x.normalized().astype("int4").merged(earlier, "max"),
        lambda x: Importance(dict(x)),
        lambda x: x.select(["layers.1.vector", "layers.0.uneven.weight"]),
    ):
        expected, got = (change(x) for x in kept)
        same_importance(expected, got, exact=False)
    for run, importance in zip(runs, kept, strict=True):
        run.start_phase(importance.normalized().merged(earlier, "decayed", 0.5).astype("int8"))
    assert dict(runs[1].coeffs) == {layer: pytest.approx(alpha, rel=1e-6) for layer, alpha in runs[0].coeffs.items()}
    assert runs[1]._penalty.largest == pytest.approx(runs[0]._penalty.largest, rel=1e-6)
    for model, run in zip(models, runs, strict=True):
        give(model, gradients(7))
        run.step()
    same_state(*runs, models, exact=False)


def recorder(kind, folder):
    """ImportanceRecorder around another optimizer; weights that something else moves between steps are noticed."""
    models = Weights(), shard(Weights(), *mesh_of(kind))
    kept = []
    for which, model in zip(("whole", "sharded"), models, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.125, foreach=False)
        with ImportanceRecorder(optimizer, model.named_parameters()) as found:
            for step in range(3):
                give(model, gradients(step))
                optimizer.step()
                with torch.no_grad():
                    for param in model.parameters():
                        param.mul_(1.5)
        path = folder / f"recorder-{kind}-{which}.safetensors"
        if which == "sharded" or dist.get_rank() == 0:
            found.save(path, xi=1e-3)
        kept.append(found.finalise(xi=1e-3))
        dist.barrier()
        same_importance(kept[0], Importance.load(path))
    same_importance(*kept)


def whole_when_named(folder):
    """When the file gets its name, what every rank wrote is on the disk."""
    run = recorded(shard(Weights(), *mesh_of("rows")), 2)
    path, copy_of_it = folder / "named.safetensors", folder / "as-named.safetensors"
    publish = Scratch.publish

    def copied(self):
        self.file.flush()
        shutil.copy(self.path, copy_of_it)
        publish(self)

    with mock.patch.object(Scratch, "publish", copied):
        run.save_importance(path, xi=1e-3)
    dist.barrier()
    before = path.read_bytes()
    assert copy_of_it.read_bytes() == before


@contextlib.contextmanager
def small_files():
    """What a full disk or a quota does to this process: a write beyond 2 kB is an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def denied(path, mode="r"):
    raise PermissionError(13, "Permission denied", str(path))


FAILURES = {  # what → (rank that it happens to, how, what every rank is told)
    "begins no file": (0, small_files, "rank 0: .*File too large"),
    "cannot write its part": (1, small_files, "rank 1: .*File too large"),
    "cannot open the file": (1, lambda: mock.patch.object(builtins, "open", denied), "rank 1: .*Permission denied"),
    "does not see the folder": (
        1, lambda: mock.patch.object(os.path, "exists", return_value=False), r"every process sees, but ranks \[1\]",
    ),
    "cannot publish it": (0, lambda: mock.patch.object(os, "replace", denied), "rank 0: .*Permission denied"),
}  # fmt: skip


def one_rank_fails(what, folder):
    """All ranks get the error, without waiting for each other for ever; the file that was there stays."""
    rank, failure, message = FAILURES[what]
    run = recorded(shard(Weights(), *mesh_of("rows")), 2)
    place = folder / what
    if dist.get_rank() == 0:
        place.mkdir()
    dist.barrier()
    path = place / "i.safetensors"
    run.save_importance(path, xi=1e-3)
    dist.barrier()
    before = path.read_bytes()
    with failure() if dist.get_rank() == rank else contextlib.nullcontext(), pytest.raises(OSError, match=message):
        run.save_importance(path, xi=1.0)
    dist.barrier()
    assert [*place.iterdir()] == [path]
    assert path.read_bytes() == before
    dist.barrier()
    run.save_importance(path, xi=1.0)  # the next one is not disturbed
    dist.barrier()
    assert path.read_bytes() != before
    assert Importance.load(path).xi == 1.0
    with pytest.raises(OSError, match="there is no folder"):
        run.save_importance(folder / "nowhere" / "i.safetensors", xi=1.0)


VARIANTS = {
    "fp32": ({}, torch.float32),
    "lean": (LEAN, torch.float32),
    "split": (LEAN | {"master": "split", "coeffs": "uniform"}, torch.bfloat16),
}


def fresh(variant, sharded, meta=False, other=False):
    options, dtype = VARIANTS[variant]
    with torch.device("meta" if meta else "cpu"):
        model = Weights(dtype)
    if other:  # other weights: neither they nor the anchors that are made of them may survive a load
        model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    importance = importance_of(Weights(dtype))
    if sharded:
        fully_shard(model)
    if meta:
        model.to_empty(device="cpu")
    return model, AlrAdamW(model.named_parameters(), importance, record=True, **HYPER, **options)


def advance(variant, model, run, steps):
    for step in steps:
        if step == 1 and variant == "split":
            run.start_phase()  # from here on bf16 holds neither anchor nor start
        elif step == 1:
            run.restart_recording()  # from here on the start is not the anchor
        give(model, gradients(step, VARIANTS[variant][1]))
        run.step()


def save_checkpoint(variant, folder):
    model, run = fresh(variant, True)
    advance(variant, model, run, range(3))
    kept = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, run)}
    dcp.save(kept, checkpoint_id=folder.parent / f"dcp-{variant}")


def load_checkpoint(variant, meta, folder):
    """Load what another number of ranks saved (beside ``folder``), and go on as if nothing had happened."""
    sharded = dist.is_initialized()
    model, run = fresh(variant, sharded, meta, other=not meta)
    kept = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, run)}
    dcp.load(kept, checkpoint_id=folder.parent / f"dcp-{variant}")
    set_model_state_dict(model, kept["model"])
    set_optimizer_state_dict(model, run, kept["optim"])
    advance(variant, model, run, range(3, 5))
    whole, straight = fresh(variant, False)
    advance(variant, whole, straight, range(5))
    same_state(straight, run, (whole, model))
    assert run.recorded_steps == straight.recorded_steps == 4


def whole_state(variant, folder):
    """A state that torch gathers on rank 0 loads by way of rank 0, and in one process."""
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, run = fresh(variant, True)
    advance(variant, model, run, range(3))
    kept = get_optimizer_state_dict(model, run, options=gathered)
    weights = get_model_state_dict(model, options=gathered)
    assert bool(kept) == (dist.get_rank() == 0)
    model, run = fresh(variant, True, other=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, copy.deepcopy(weights), options=options)  # it fills the dictionary with shards
    set_optimizer_state_dict(model, run, copy.deepcopy(kept), options=options)
    advance(variant, model, run, range(3, 5))
    whole, straight = fresh(variant, False)
    advance(variant, whole, straight, range(5))
    same_state(straight, run, (whole, model))
    if dist.get_rank() == 0:
        alone, one = fresh(variant, False, other=True)
        alone.load_state_dict(weights)
        set_optimizer_state_dict(alone, one, kept)
        advance(variant, alone, one, range(3, 5))
        same_state(straight, one, (whole, alone))


def checkpoints(folder):
    """The latest whole ones stay, by number; loading takes the last, whatever a killed process left beside it."""
    home = folder / "checkpoints"
    model, run = fresh("lean", True)
    assert load_latest(home, model, run) is None
    for step in (1, 2, 9, 10, 11):
        advance("lean", model, run, [step])
        if step == 11:
            break
        path = save_latest(home, step, model, run, keep=2, half=step / 2)
        assert path == home / f"step-{step}"
        assert path.is_dir()  # on every rank, at once
        if step >= 9 and dist.get_rank() == 0:
            (home / f".step-{step + 1}.partial").mkdir()
            (home / f".step-{step + 1}.partial" / "0_0.distcp").write_bytes(b"half")
        dist.barrier()
    assert {each.name for each in home.iterdir()} == {"step-9", "step-10", ".step-11.partial"}
    again, other = fresh("lean", True, other=True)
    assert load_latest(home, again, other) == {"step": 10, "half": 5.0}
    assert other.recorded_steps == run.recorded_steps - 1 == 4
    advance("lean", again, other, [11])
    same_sharded(run, other, (model, again))
    save_latest(home, 10, model, run, keep=1)
    assert [each.name for each in home.iterdir()] == ["step-10"]
    third, last = fresh("lean", True, other=True)
    assert load_latest(home, third, last) == {"step": 10}
    same_sharded(run, last, (model, third))


def same_sharded(expected, got, models):
    for (name, p), (_, q) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(p.to_local(), q.to_local()), name
    saved = [run.state_dict()["state"] for run in (expected, got)]
    for index, state in saved[0].items():
        for key, value in state.items():
            here, there = (x.to_local() if isinstance(x, DTensor) else x for x in (value, saved[1][index][key]))
            assert torch.equal(here, there), key


def flattened(variant, coeffs, folder):
    """torchtitan's and transformers' form, one key a number: torch keeps of groups the keys that this one's have."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    options = {**VARIANTS[variant][0], "coeffs": coeffs}
    importance = importance_of(Weights())
    runs = []
    for _ in range(2):
        model = Weights()
        fully_shard(model)
        runs.append((model, AlrAdamW(model.named_parameters(), importance, record=True, **HYPER, **options)))
    advance(variant, *runs[0], range(3))
    path = folder / f"flattened-{variant}-{type(coeffs).__name__}"
    dcp.save({"o": get_optimizer_state_dict(*runs[0], options=flat)}, checkpoint_id=path)
    runs[1][0].load_state_dict(runs[0][0].state_dict())
    kept = {"o": get_optimizer_state_dict(*runs[1], options=flat)}
    dcp.load(kept, checkpoint_id=path)
    set_optimizer_state_dict(*runs[1], kept["o"], options=flat)
    assert runs[1][1].recorded_steps == runs[0][1].recorded_steps == 2
    assert dict(runs[1][1].coeffs) == dict(runs[0][1].coeffs)
    for run in runs:
        advance(variant, *run, range(3, 5))
    assert dict(runs[1][1].coeffs) == dict(runs[0][1].coeffs)
    for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
    other = AlrAdamW(model.named_parameters(), importance, mode="coupled", record=True, **HYPER, **options)
    with pytest.raises(ValueError, match=r"mode='proximal'.*mode='coupled'"):
        set_optimizer_state_dict(model, other, kept["o"], options=flat)


def refused_on_every_rank(folder):
    """What rank 0 alone can tell must not leave the others waiting."""
    model, run = fresh("fp32", True)
    advance("fp32", model, run, range(1))
    with pytest.raises(RuntimeError, match=r"rank 0: .*(Weights only|weights_only)"):
        save_latest(folder / "refused", 1, model, run, more=print if dist.get_rank() == 0 else 1)
    assert load_latest(folder / "refused", model, run) is None


FORMATS = [("rows", kept, False) for kept in ("fp32", "bf16", "int8", "int4", "rank1")]
CASES = {
    **{f"file {kind} {kept}{' relative' * rel}": (one_file, kind, kept, rel) for kind, kept, rel in [
        *FORMATS, ("rows", "fp32", True), ("hsdp", "int4", False), ("columns", "fp32", False),
        ("replicate", "int8", False),
    ]},
    "importance stays sharded": (importance_stays_sharded,),
    **{f"recorder {kind}": (recorder, kind) for kind in ("rows", "hsdp", "columns")},
    **{f"a rank {what}": (one_rank_fails, what) for what in FAILURES},
    "checkpoints": (checkpoints,),
    "whole when named": (whole_when_named,),
    "flattened": (flattened, "lean", {"layers.0": 0.7, "layers.1": 0.2, "layers.2": 0.1}),
    "flattened, balanced": (flattened, "fp32", DynamicCoeffs("uniform", every=2)),
    "checkpoint refused": (refused_on_every_rank,),
    **{f"whole state {variant}": (whole_state, variant) for variant in ("fp32", "lean")},
    **{f"save {variant}": (save_checkpoint, variant) for variant in VARIANTS},
}  # fmt: skip
LOADS = {f"load {variant}{' meta' * meta}": (load_checkpoint, variant, meta) for variant, meta in [
    ("fp32", False), ("lean", False), ("split", False), ("lean", True),
]}  # fmt: skip
