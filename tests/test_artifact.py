"""The importance file: bit-exact round trips, one error for whatever is not one, writes that cannot half happen."""

from __future__ import annotations

import ast
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cases import BF16, F16, F32, F64, same_bits, tiny_model, train
from safetensors import safe_open

import alr_kernels
from alr_kernels import AlrAdamW, Importance, ImportanceFileError
from alr_kernels.importance import TensorStats, files


def recorded(xi=1e-5, **options):
    model = tiny_model()
    optimizer = AlrAdamW(model.named_parameters(), lr=1e-3, record=True)
    train(model, optimizer, 3)
    return optimizer.recorded_importance(xi, **options)


def assert_same_importance(got, expected):
    assert list(got) == sorted(expected) or list(got) == list(expected)
    assert set(got) == set(expected)
    for name in expected:
        assert same_bits(got[name], expected[name]), name
        assert got[name].shape == expected[name].shape
    assert got.stats == expected.stats
    for field in ("method", "xi", "relative", "steps", "is_normalized", "fingerprint"):
        assert getattr(got, field) == getattr(expected, field), field


@pytest.fixture
def saved(tmp_path):
    importance = recorded()
    path = tmp_path / "importance.safetensors"
    importance.save(path)
    return importance, path


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("make", [recorded, lambda: recorded(relative=True), lambda: recorded().normalized()])
def test_round_trip_keeps_everything(tmp_path, make):
    importance = make()
    importance.save(tmp_path / "i.safetensors")
    loaded = Importance.load(tmp_path / "i.safetensors")
    assert_same_importance(loaded, importance)
    assert repr(loaded) == repr(importance)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_round_trip_of_a_users_own_importance(tmp_path, dtype):
    tensors = {
        "module.layers.0.w": torch.rand(3, 4).to(dtype),
        "layers.1.w": torch.rand(4, 3).to(dtype).t(),  # strides differ
        "scalar": torch.tensor(2.0).to(dtype),
        "empty": torch.empty(0, 3).to(dtype),
    }
    importance = Importance(tensors, method="mine")
    importance.save(str(tmp_path / "i.safetensors"))
    loaded = Importance.load(str(tmp_path / "i.safetensors"))
    assert_same_importance(loaded, importance)
    assert set(loaded) == {"layers.0.w", "layers.1.w", "scalar", "empty"}
    assert loaded["layers.0.w"].dtype == dtype


@pytest.mark.parametrize("shared", ["same tensor", "views"])
def test_tensors_that_share_memory_can_be_saved(tmp_path, shared):
    base = torch.rand(2, 4)
    other = base if shared == "same tensor" else base[1:]
    importance = Importance({"a.w": base, "b.w": other})
    importance.save(tmp_path / "i.safetensors")
    assert_same_importance(Importance.load(tmp_path / "i.safetensors"), importance)


def test_file_is_plain_safetensors_with_named_metadata(saved):
    importance, path = saved
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {*importance, ":statistics", ":histogram"}
        assert file.get_tensor(":statistics")[:, 5].tolist() == [t.numel() for t in importance.values()]
        assert file.get_tensor(":histogram").sum(1).tolist() == [t.numel() for t in importance.values()]
    assert metadata["format"] == "alr_kernels.importance"
    assert metadata["format_version"] == "2"
    assert metadata["package_version"] == alr_kernels.__version__
    assert metadata["method"] == "path_integral"
    assert json.loads(metadata["about"]) == {"xi": 1e-5, "relative": False, "steps": 3, "normalized": False}
    assert json.loads(metadata["layout"]) == [[name, "fp32", list(t.shape)] for name, t in importance.items()]


@pytest.mark.parametrize("extra", range(8))
def test_tensors_are_aligned_to_their_width(tmp_path, extra):
    """Whatever the length of the names, for readers that map the file."""
    path = tmp_path / "i.safetensors"
    Importance({"w" * (extra + 1): torch.rand(3), "b": torch.rand(5).to(BF16), "d": torch.rand(1).double()}).save(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    widths = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2}
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    for entry in header.values():
        assert (8 + length + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0


def test_saving_over_an_older_file(saved):
    importance, path = saved
    newer = importance.normalized()
    newer.save(path)
    assert_same_importance(Importance.load(path), newer)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_loaded_importance_steers_as_the_recorded_one(saved):
    results = []
    for importance in (saved[0], Importance.load(saved[1])):
        model = tiny_model()
        optimizer = AlrAdamW(model.named_parameters(), importance, lr=1e-2)
        train(model, optimizer, 3)
        results.append((list(model.parameters()), float(optimizer.penalty())))
    assert all(map(same_bits, results[0][0], results[1][0]))
    assert results[0][1] == results[1][1] > 0


# ---------------------------------------------------------------- files that are none


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        Importance.load(tmp_path / "nowhere.safetensors")


def test_truncated_at_any_length(saved):
    _, path = saved
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, *range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ImportanceFileError, match="importance"):
            Importance.load(path)
    path.write_bytes(whole)
    Importance.load(path)


@pytest.mark.parametrize("size", [0, 3, 8, 500, 5000])
def test_random_bytes(tmp_path, size):
    path = tmp_path / "noise.safetensors"
    generator = torch.Generator().manual_seed(size)
    path.write_bytes(bytes(torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).tolist()))
    with pytest.raises(ImportanceFileError, match=r"noise\.safetensors"):
        Importance.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=("none", "weights"))
def test_safetensors_of_something_else(tmp_path, metadata):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(ImportanceFileError, match="something else"):
        Importance.load(tmp_path / "model.safetensors")


def rewritten(path, **changes):
    """Write the file again with other metadata; a value of None removes the key."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata()) | changes
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    metadata = {key: value for key, value in metadata.items() if value is not None}
    safetensors.torch.save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("version", ["1", "4", "99", "x", "", "-1"])
def test_newer_or_unreadable_format_version(saved, version):
    rewritten(saved[1], format_version=version)
    with pytest.raises(ImportanceFileError, match={"1": "record it again"}.get(version, "upgrade alr_kernels")):
        Importance.load(saved[1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, None) for key in ("method", "fingerprint", "about", "layout")),
        *((key, value) for key in ("about", "layout") for value in ("", "{", "[]", "[1]", "1", "null", '"text"')),
        ("about", '{"unknown": 1}'),
        ("layout", '[["embed.weight", "fp32", [1]]]'),
        ("layout", '[["embed.weight", "fp31", [11, 4]]]'),
        ("layout", '[["embed.weight", "int4", []]]'),
        ("layout", '[["embed.weight", "rank1", []]]'),
        ("layout", '[["embed.weight", "rank1", [11, 4]]]'),
        ("layout", '[["embed.weight", ["fp32"], [11, 4]]]'),
        ("layout", '{"embed.weight": {"a": 1}}'),
        ("fingerprint", "0123456789abcdef"),
    ],
)
def test_damaged_metadata_is_one_error(saved, key, value):
    rewritten(saved[1], **{key: value})
    with pytest.raises(ImportanceFileError, match=r"importance\.safetensors"):
        Importance.load(saved[1])


def test_a_changed_file_says_which_names_differ(saved):
    _, path = saved
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["other.weight"] = tensors.pop("embed.weight")
    tensors["head.bias"] = torch.ones(9)
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(ImportanceFileError, match=r"'embed\.weight', 'head\.bias', 'other\.weight' differ"):
        Importance.load(path)


def test_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises((FileNotFoundError, ImportanceFileError)):
        Importance.load(tmp_path / "folder.safetensors")


def test_name_must_say_safetensors(tmp_path):
    with pytest.raises(ValueError, match=r"ending in \.safetensors, got '.*i\.pt'"):
        recorded().save(tmp_path / "i.pt")


# ---------------------------------------------------------------- writes


def test_write_that_fails_midway_leaves_the_old_file(saved, monkeypatch):
    importance, path = saved
    before = path.read_bytes()

    written = files.ImportanceWriter._put

    def fails(writer, name, tensor):
        if name == "head.bias":
            raise OSError("disk full")
        written(writer, name, tensor)

    monkeypatch.setattr(files.ImportanceWriter, "_put", fails)
    with pytest.raises(OSError, match="disk full"):
        importance.normalized().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a partial file was left behind"


KILLED = """
import os, signal, sys, torch
from alr_kernels.importance import ImportanceWriter
writer = ImportanceWriter(sys.argv[1], {"one": (2,), "two": (3,)})
writer.add("one", torch.ones(2))
if sys.argv[2] == "whole":
    writer.add("two", torch.ones(3))
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    writer.close()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["half", "whole"])
def test_write_that_is_killed_leaves_the_old_file(saved, when):
    importance, path = saved
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), when], cwd=root, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_same_importance(Importance.load(path), importance)
    assert len(list(path.parent.iterdir())) == 2, "what the killed writer left"
    importance.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "the next writer of the file clears it away"


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        recorded().save(tmp_path / "nowhere" / "i.safetensors")


def test_nothing_in_the_package_unpickles():
    """An importance file comes from others: reading it must not be able to run code."""
    for source in Path(alr_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [f"{node.value.id}.{node.attr}"]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), source
            banned = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"} & set(names)
            assert not banned, f"{source}: {banned}"


# ---------------------------------------------------------------- the mapping


def counts(importance):
    """Count Ω by powers of 4 from 2^-63, ends open: the artifact's histogram, by logarithms."""
    bins = [0] * 64
    for value in importance.double().flatten().tolist():
        bins[0 if value == 0 else min(63, max(0, math.floor((math.log2(value) + 63) / 2)))] += 1
    return tuple(bins)


def test_histogram_counts_every_element_in_its_bin():
    edges = [4.0**b * 2.0**-63 for b in range(64)]
    values = torch.tensor([0.0, 1e-45, 1e-38, 3e38, *edges, *(edge * 1.0000001 for edge in edges)])
    values = torch.cat([values, torch.rand(1000) ** 20, torch.nextafter(values[4:68], torch.tensor(0.0))])
    found = Importance({"w": values}).stats["w"].histogram
    assert found == counts(values)
    assert sum(found) == values.numel()


def test_it_is_read_only():
    importance = recorded()
    with pytest.raises(TypeError):
        importance["embed.weight"] = torch.ones(8, 4)
    with pytest.raises(TypeError):
        del importance["embed.weight"]
    importance.stats.clear()
    assert len(importance.stats) == len(importance) == 8
    with pytest.raises(AttributeError):
        importance.fingerprint = "other"


def test_names_may_be_wrapped_when_asked_for():
    importance = recorded()
    assert importance["module._orig_mod.embed.weight"] is importance["embed.weight"]
    with pytest.raises(KeyError):
        importance["nothing"]


def test_select_keeps_what_is_trained():
    importance = recorded()
    kept = importance.select(["module.embed.weight", "head.bias", "lora.extra"])
    assert list(kept) == ["embed.weight", "head.bias"]
    assert kept["embed.weight"] is importance["embed.weight"]
    assert kept.stats == {name: importance.stats[name] for name in kept}
    assert (kept.xi, kept.steps, kept.method) == (importance.xi, importance.steps, importance.method)
    assert kept.fingerprint != importance.fingerprint
    with pytest.raises(ValueError, match="no entry matches"):
        importance.select(["nothing"])


def test_normalized_has_mean_one():
    importance = recorded()
    normal = importance.normalized()
    numel = sum(t.numel() for t in normal.values())
    assert sum(float(t.double().sum()) for t in normal.values()) / numel == pytest.approx(1.0, rel=1e-6)
    assert normal.is_normalized
    assert not importance.is_normalized
    for name, row in normal.stats.items():
        fresh = TensorStats.of(normal[name])
        assert (row.l2, row.max, row.mean) == pytest.approx((fresh.l2, fresh.max, fresh.mean), rel=1e-6)
        assert row.path_integral_sum == importance.stats[name].path_integral_sum
    with pytest.raises(ValueError, match="zero everywhere"):
        Importance({"w": torch.zeros(3)}).normalized()


@pytest.mark.parametrize("by", ["block", "module"])
def test_layer_stats_are_those_of_the_layers_elements(by):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{i}.{part}.weight": torch.rand(i + 1, 5, generator=generator)
        for i in range(2)
        for part in ("q", "mlp")
    }
    tensors["head"] = torch.rand(3, generator=generator)
    members = {}
    for name, tensor in tensors.items():
        layer = "(root)" if name == "head" else ".".join(name.split(".")[: 2 if by == "block" else 3])
        members.setdefault(layer, []).append(tensor.double().flatten())
    found = Importance(tensors).layer_stats(by)
    assert found.keys() == members.keys()
    for layer, parts in members.items():
        whole = torch.cat(parts)
        expected = (None, None, float(whole.norm()), float(whole.max()), float(whole.mean()), whole.numel(), 0)
        assert tuple(found[layer])[:-1] == pytest.approx(expected)
        assert found[layer].histogram == counts(whole)


def test_pooled_statistics_add_up():
    once, twice = (1,) + (0,) * 63, (2, 1) + (0,) * 62
    rows = [TensorStats(1.0, 0.5, 3.0, 2.0, 1.0, 4, 1, once), TensorStats(-2.0, 0.25, 4.0, 5.0, 3.0, 12, 2, twice)]
    assert TensorStats.pooled(rows) == (-1.0, 0.75, 5.0, 5.0, 2.5, 16, 3, (3, 1) + (0,) * 62)
    assert TensorStats.pooled([]) == (None, None, 0.0, 0.0, 0.0, 0, 0, (0,) * 64)
    assert math.isclose(Importance({"w": torch.tensor([3.0, 4.0])}).stats["w"].l2, 5.0)


def test_fingerprint_is_of_names_and_shapes():
    first = Importance({"a": torch.ones(2), "b": torch.ones(3)})
    assert first.fingerprint == Importance({"b": torch.zeros(3), "module.a": torch.rand(2)}).fingerprint
    assert first.fingerprint != Importance({"a": torch.ones(3), "b": torch.ones(2)}).fingerprint
    assert first.fingerprint != Importance({"a": torch.ones(2), "c": torch.ones(3)}).fingerprint
