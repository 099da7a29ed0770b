"""Importance in every form of storage: kept, written and read tensor by tensor, and taken by the optimizer as it is."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from cases import BF16, F16, F32, F64, same_bits
from forms import ALPHAS, BLOCKS, fitting, mixed_model, new, steps

from alr_kernels import AlrAdamW, Importance, ImportanceRecorder, _ops, state
from alr_kernels.importance import ImportanceWriter, TensorStats, scratch

KINDS = ("fp32", "bf16", "int8", "int4")
kinds = pytest.mark.parametrize("kind", KINDS)
stored = pytest.mark.parametrize("kind", [*KINDS, "rank1"])  # what steps do not read too


def recording(dtype=F32, **options):
    optimizer = AlrAdamW(mixed_model(dtype).named_parameters(), lr=1e-2, record=True, **options)
    steps(optimizer, 0, 3)
    return optimizer


def assert_same_entries(got, expected):
    assert list(got) == list(expected)
    for name in expected:
        a, b = got.encoded(name), expected.encoded(name)
        assert a.format == b.format, name
        assert same_bits(a.values, b.values) if a.scales is None else torch.equal(a.values, b.values), name
        assert (a.scales is None) is (b.scales is None)
        assert a.scales is None or same_bits(a.scales, b.scales), name
        assert got[name].shape == expected[name].shape
    assert got.stats == expected.stats
    assert (got.fingerprint, repr(got)) == (expected.fingerprint, repr(expected))
    assert got.content_fingerprint == expected.content_fingerprint


@stored
def test_recorded_in_a_form_is_the_form_of_what_is_recorded(kind):
    optimizer = recording()
    wide, kept = optimizer.recorded_importance(), optimizer.recorded_importance(dtype=kind)
    assert kept.stats == wide.stats, "statistics are of Ω before it is encoded"
    for name, entry in ((name, kept.encoded(name)) for name in kept):
        form = fitting(name, kind, "fp32")
        assert entry.format == form, name
        if form in ("int8", "int4"):
            codes = oracle.unpack(entry.values) if form == "int4" else entry.values
            scale_kind = f"importance {form[3:]}"
            assert same_bits(entry.scales.double(), oracle.code_scales(wide[name], scale_kind)), name
            off = codes.double() - oracle.encode(wide[name], scale_kind)[0]
            assert off.abs().max() <= 1, name
            assert off.count_nonzero() < 5, f"{name}: more than ties differ"
        elif form == "rank1":
            rows, columns = (wide[name].double().flatten(1).sum(dim) for dim in (1, 0))
            expected = torch.outer(rows, columns / rows.sum()).view(wide[name].shape)
            torch.testing.assert_close(kept[name].double(), expected, rtol=2e-7, atol=0)
        else:
            assert same_bits(kept[name], wide[name].to(F32 if form == "fp32" else BF16)), name
    assert_same_entries(wide.astype(kind), kept)


@stored
@pytest.mark.parametrize("how", ["save", "writer", "optimizer"])
def test_every_form_survives_its_file(tmp_path, kind, how):
    optimizer = recording()
    kept, path = optimizer.recorded_importance(dtype=kind), tmp_path / "i.safetensors"
    if how == "save":
        kept.save(path)
    elif how == "optimizer":
        optimizer.save_importance(path, dtype=kind)
    else:
        wide, about = optimizer.recorded_importance(), {"method": "path_integral", "xi": 1e-6, "steps": 3}
        shapes = {name: tensor.shape for name, tensor in wide.items()}
        with ImportanceWriter(path, shapes, dtype=kind, **about) as writer:
            for name in reversed(shapes):  # any order
                writer.add(f"module.{name}", wide[name], wide.stats[name])
    assert_same_entries(Importance.load(path), kept)
    assert Importance.load(path).nbytes == kept.nbytes
    assert path.stat().st_size - kept.nbytes < 20_000


def test_split_weights_are_put_together_one_at_a_time(tmp_path, monkeypatch):
    """Saving is for models of which no second copy fits: a split weight's float32 is one."""
    optimizer = recording(BF16, master="split")
    expected = optimizer.recorded_importance(dtype="int4")
    order = []
    whole, finalise = state.whole, _ops.finalise
    monkeypatch.setattr(state, "whole", lambda *args: (order.append("whole"), whole(*args))[1])
    monkeypatch.setattr(_ops, "finalise", lambda *args: (order.append("finalise"), finalise(*args))[1])
    optimizer.save_importance(tmp_path / "i.safetensors", dtype="int4")
    assert order == ["whole", "finalise"] * len(expected)
    assert_same_entries(Importance.load(tmp_path / "i.safetensors"), expected)


def test_recorder_writes_what_it_finalises(tmp_path):
    model = mixed_model()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-2)
    with ImportanceRecorder(sgd, model.named_parameters()) as recorder:
        steps(sgd, 0, 2)
    recorder.save(tmp_path / "i.safetensors", 1e-4, relative=True, dtype="int8")
    assert_same_entries(
        Importance.load(tmp_path / "i.safetensors"), recorder.finalise(1e-4, relative=True, dtype="int8")
    )


@pytest.mark.parametrize("way", ["recorded_importance", "save_importance"])
def test_what_is_not_finite_stays_out_and_leaves_the_old_file(tmp_path, way):
    optimizer, path = recording(), tmp_path / "i.safetensors"
    optimizer.save_importance(path)
    before = path.read_bytes()
    optimizer.state[optimizer.param_groups[0]["params"][0]]["path_integral"][0, :3] = torch.tensor(
        [torch.nan, torch.inf, -torch.inf]
    )
    arguments = [path] if way == "save_importance" else []
    with pytest.raises(ValueError, match=r"3 non-finite element\(s\).*allow_nonfinite=True"):
        getattr(optimizer, way)(*arguments, dtype="int4")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    result = getattr(optimizer, way)(*arguments, dtype="int4", allow_nonfinite=True) or Importance.load(path)
    name = next(iter(result))
    assert result.stats[name].nonfinite == 3
    assert result[name][0, :3].tolist() == [0.0, 0.0, 0.0]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in result.values())


@stored
@pytest.mark.parametrize("lost", [torch.nan, torch.inf])
def test_a_lost_weight_leaves_the_others_their_relative_xi(lost, kind):
    importances = []
    for broken in (False, True):
        optimizer = recording()
        param = optimizer.param_groups[0]["params"][0]
        if broken:
            with torch.no_grad():
                param[0, 0] = lost
            optimizer.state[param]["path_integral"][0, 0] = torch.nan
        importances.append(optimizer.recorded_importance(1.0, relative=True, allow_nonfinite=True, dtype=kind))
    name = next(iter(importances[0]))
    assert importances[1].stats[name].nonfinite == 1
    whole, kept = (importance[name].flatten()[1:] for importance in importances)
    assert int((kept > 0).sum()) > len(kept) // 4
    assert (kept - whole).abs().mean() < 0.01 * whole.mean()  # a code may round the other way


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@stored
def test_any_form_of_any_dtype(tmp_path, kind, dtype):
    """float64 parameters stay wide, as in the optimizer."""
    optimizer = recording(dtype)
    optimizer.save_importance(tmp_path / "i.safetensors", dtype=kind)
    loaded = Importance.load(tmp_path / "i.safetensors")
    assert_same_entries(loaded, optimizer.recorded_importance(dtype=kind))
    formats = {loaded.encoded(name).format for name in BLOCKS}
    assert formats == {"fp64" if dtype is F64 else kind}


@kinds
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_optimizer_takes_what_is_encoded_as_it_is(kind, dtype, monkeypatch):
    importance = recording().recorded_importance()
    results = []
    for given, options in ((importance, {"importance_dtype": kind}), (importance.astype(kind), {})):
        model = mixed_model(dtype)
        optimizer = AlrAdamW(model.named_parameters(), given, ALPHAS, lr=1e-2, **options)
        steps(optimizer, 0, 2)
        results.append((list(model.parameters()), optimizer.importance_tensors(), float(optimizer.penalty())))
    if dtype is F64:  # float64 steps decode
        pairs = zip(results[0][1], results[1][1], strict=True)
        assert all(a.dtype == b.dtype == F64 for a, b in pairs)
        return
    assert all(map(same_bits, results[0][0], results[1][0]))
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert results[0][2] == results[1][2] > 0
    codes = importance.astype(kind)
    optimizer = AlrAdamW(model.named_parameters(), codes)
    held = {tensor.data_ptr() for tensor in optimizer.importance_tensors()}
    assert {codes.encoded(name).values.data_ptr() for name in codes} <= held, "used, not copied"


@pytest.mark.parametrize("given", ["bf16", "int8", "int4", "rank1"])
@kinds
def test_a_form_that_is_asked_for_wins(given, kind):
    importance = recording().recorded_importance(dtype=given)
    optimizer = AlrAdamW(mixed_model().named_parameters(), importance, importance_dtype=kind)
    steps(optimizer, 0, 1)
    expected = importance.astype(kind)
    wanted = [t for name in expected for t in expected.encoded(name)[:2] if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(optimizer.importance_tensors(), wanted, strict=True))


def test_codes_are_part_of_the_importance_that_a_state_belongs_to():
    importance = recording().recorded_importance(dtype="int4")
    saved = new(mixed_model()).state_dict()
    optimizer = AlrAdamW(mixed_model().named_parameters(), importance)
    steps(optimizer, 0, 1)
    saved = optimizer.state_dict()
    AlrAdamW(mixed_model().named_parameters(), importance).load_state_dict(saved)
    name = BLOCKS[0]
    entry = importance.encoded(name)
    for change in (entry._replace(values=entry.values.flip(0)), entry._replace(scales=entry.scales * 2)):
        other = Importance({n: change if n == name else importance.encoded(n) for n in importance})
        with pytest.raises(ValueError, match="same importance file"):
            AlrAdamW(mixed_model().named_parameters(), other).load_state_dict(saved)


def test_select_and_device_keep_the_form():
    importance = recording().recorded_importance(dtype="int4")
    chosen = importance.select(BLOCKS).to("cpu")
    assert {chosen.encoded(name).format for name in chosen} == {"int4"}
    assert chosen.stats == {name: importance.stats[name] for name in BLOCKS}


def test_normalized_keeps_the_form():
    importance = recording().recorded_importance(dtype="int8")
    normal = importance.normalized()
    rows = list(normal.stats.values())
    assert TensorStats.pooled(rows).mean == pytest.approx(1.0, rel=1e-2)  # of what int8 codes decode to
    scale = 1 / TensorStats.pooled(importance.stats.values()).mean
    for name in normal:
        assert normal.encoded(name).format == importance.encoded(name).format
        largest = float(normal[name].max())
        torch.testing.assert_close(normal[name], importance[name] * scale, rtol=2e-2, atol=1e-6 * largest)


STREAMED = """
import sys, torch
from alr_kernels import Importance
from alr_kernels.importance import ImportanceWriter
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))
path, dtype, count = sys.argv[1], sys.argv[2], 24
shapes = {f"layers.{i}.weight": (2048, 2048) for i in range(count)}  # 16 MiB each in float32
with ImportanceWriter(path, {"warm": (64, 128)}, dtype=dtype) as writer:
    writer.add("warm", torch.ones(64, 128))
before, peak = anonymous(), 0
with ImportanceWriter(path, shapes, dtype=dtype) as writer:
    for i, name in enumerate(shapes):
        writer.add(name, torch.full((2048, 2048), float(i + 1)))
        peak = max(peak, anonymous())
print("written", peak - before)
importance, before, peak = Importance.load(path), anonymous(), 0
for i, (name, tensor) in enumerate(importance.items()):
    assert bool((tensor / (i + 1) - 1).abs().max() < 1e-6), name
    peak = max(peak, anonymous())
print("read", peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: memory is read from Linux's")
@pytest.mark.parametrize("kind", ["fp32", "int4", "rank1"])
def test_memory_holds_one_tensor_at_a_time(tmp_path, kind):
    root = Path(__file__).parent.parent
    arguments = [sys.executable, "-c", STREAMED, str(tmp_path / "i.safetensors"), kind]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    # MiB, of 384 in all: one tensor, what is made of it, and what the allocator keeps
    assert used["written"] < 150, used
    assert used["read"] < 200, used  # three of them are the check's own


def test_a_file_may_be_replaced_while_it_is_read(tmp_path):
    path = tmp_path / "i.safetensors"
    Importance({"w": torch.full((64, 128), 2.0)}).save(path)
    old = Importance.load(path)
    Importance({"w": torch.full((64, 128), 3.0)}).save(path)
    gc.collect()
    assert float(old["w"].max()) == 2.0
    assert float(Importance.load(path)["w"].max()) == 3.0


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def write():
        with ImportanceWriter(tmp_path / "i.safetensors", {"w": (2,)}) as writer:
            writer.add("w", torch.tensor([1.0, -1.0]))

    with pytest.raises(ValueError, match="≥ 0"):
        write()
    assert not list(tmp_path.iterdir())
    with ImportanceWriter(tmp_path / "i.safetensors", {}) as writer:
        writer.abort()
    assert not list(tmp_path.iterdir()), "aborted by hand"


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path, shapes = tmp_path / "i.safetensors", {"w": (64, 128), "v": (64, 128)}
    first, second = ImportanceWriter(path, shapes), ImportanceWriter(path, shapes)
    for name in shapes:
        first.add(name, torch.ones(64, 128))
        second.add(name, torch.full((64, 128), 2.0))
    for writer, value in ((first, 1.0), (second, 2.0)):
        writer.close()
        loaded = Importance.load(path)
        assert {(float(loaded[name].max()), loaded.stats[name].max) for name in shapes} == {(value, value)}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_scratch_file_that_is_taken_for_abandoned_is_made_again(tmp_path, monkeypatch):
    lock, taken = scratch._lock, []

    def late(handle, wait=False):
        if not taken:
            taken.extend(tmp_path.glob(".*.partial"))
            taken[0].unlink()
        return lock(handle, wait)

    monkeypatch.setattr(scratch, "_lock", late)
    with ImportanceWriter(tmp_path / "i.safetensors", {"w": (2,)}) as writer:
        writer.add("w", torch.ones(2))
    assert Importance.load(tmp_path / "i.safetensors")["w"].tolist() == [1.0, 1.0]
    assert taken


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks writers")
def test_many_writers_of_one_file_do_not_take_each_others_for_abandoned(tmp_path):
    """Each looks for what killed writers left while others have just begun."""
    code = f"""
import os, pathlib, sys
from alr_kernels.importance.scratch import Scratch
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        children = []
        break
    children.append(child)
for _ in range(300):
    scratch = Scratch(pathlib.Path({str(tmp_path / "x.safetensors")!r}))
    scratch.publish()
    scratch.discard()
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
