"""The benchmark of importance: what its rows are, and its tables, drawn from results alone."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from alr_kernels.benchmark import claim, importance, importance_table
from alr_kernels.cli import app

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "bench" / "results").glob("*/*-importance.json"))
SHAPES = [(32, 128), (33, 256), (7,)]


def printed(results):
    console = Console(file=StringIO(), width=140)
    importance_table.show(results, console)
    return console.file.getvalue()


def test_passes_compute_what_they_are_compared_with():
    operands = importance.Recorded.of([(64, 128), (32, 256)], "cpu")
    rows = {row.name: row for row in importance._finalise_rows(operands)}
    for kept in ("fp32", "bf16"):
        entries, *_ = rows[f"finalise, {kept}"].run()
        for entry, (stored, *_) in zip(entries, rows[f"eager formula, {kept}"].run(), strict=True):
            torch.testing.assert_close(entry.values, stored, rtol=1e-6 if kept == "fp32" else 1e-2, atol=0)
    for kept in ("int8", "int4"):
        entries, *_ = rows[f"finalise, {kept}"].run()
        for entry, ((codes, scales), *_) in zip(entries, rows[f"eager formula, {kept}"].run(), strict=True):
            assert (entry.values != codes).float().mean() < 1e-3
            assert torch.equal(entry.scales, scales)
    first = [tensor.clone() for tensor in operands.path_integrals]
    rows = {row.name: row for row in importance._accumulate_rows(operands)}
    results = []
    for name in ("accumulate", "torch._foreach, with temporaries", "torch._foreach, in place"):
        fresh = importance.Recorded.of([(64, 128), (32, 256)], "cpu")
        {row.name: row for row in importance._accumulate_rows(fresh)}[name].run()
        assert all(map(torch.equal, fresh.previous, fresh.params)), name
        results.append(fresh.path_integrals)
    for got in results[1:]:
        for a, b, before in zip(got, results[0], first, strict=True):
            torch.testing.assert_close(a, b)
            assert not torch.equal(a, before)


def test_run_passes_reports_every_row():
    result = importance.run_passes(SHAPES, "cpu", rounds=3)
    assert result["elements"] == 32 * 128 + 33 * 256 + 7
    names = [row["name"] for row in result["rows"]]
    assert len(set(names)) == len(names) == 18, "without the eager merge: not all of these shapes can be codes"
    for row in result["rows"]:
        assert row["median_s"] > 0
        assert (row["share"] is None) == row["name"].startswith(("eager", "torch"))
        assert (row["ratio"] is None) == (row["beside"] is None)
    assert "finalise, int4" in printed({"passes": [{"set": "small", **result}], "claim": []})


def test_claim_adds_up():
    found = claim.run_model("demo-llama", "cpu", rounds=1, shapes=[(2, 8, 1)])
    steps = claim.SAMPLES / found["batch"]
    assert found["training_s"] == pytest.approx(steps * found["training_step_s"][0])
    assert found["loop_s"] == pytest.approx(claim.SAMPLES * found["fisher"][0]["loop_s"] / 2)
    assert found["path_integral_s"] >= found["finalise_s"] > 0
    assert found["fisher"][0]["largest_relative_difference"] < 1e-5
    with pytest.raises(ValueError, match=r"expected 'llama-3\.2-3b'"):
        claim.config_of("gpt-5")


@pytest.mark.parametrize(
    ("name", "parameters", "share"),
    [
        ("llama-3.2-3b", 3_212_749_824, 0.110),
        ("gptj-6b", 6_050_882_784, 0.155),
        ("llama-3.1-8b", 8_030_261_248, 0.084),
    ],
)
def test_published_models_have_their_sizes(name, parameters, share):
    """And q_proj and v_proj the share of them that the method's notes give."""
    shapes = claim.shapes_of_model(name)
    assert sum(map(math.prod, shapes.values())) == parameters
    chosen = sum(math.prod(shape) for key, shape in shapes.items() if key.endswith(claim.TARGETS))
    assert chosen / parameters == pytest.approx(share, abs=5e-4)


def test_storage_is_of_files(monkeypatch):
    """A size that is foretold is that of the file which is written."""
    shapes = {f"layers.{i}.{part}_proj.weight": (64, 128) for i in range(2) for part in "qkv"} | {"norm": (128,)}
    monkeypatch.setattr(claim, "shapes_of_model", lambda name: shapes)
    rows = claim.storage(["llama-3.2-3b"], written=claim.DTYPES)
    foretold = claim.storage(["llama-3.2-3b"], written=())
    assert [{**row, "written": False} for row in rows] == foretold
    data = {"fp32": 4 * 8192, "bf16": 2 * 8192, "int8": 8192 + 128, "int4": 4096 + 128, "rank1": 4 * (64 + 128)}
    assert [row["dtype"] for row in rows] == list(data)
    for row in rows:
        assert (row["parameters"], row["elements"]) == (6 * 8192 + 128, 4 * 8192)
        assert 0 < row["file_bytes"] - 4 * data[row["dtype"]] < 8000
        assert 0 < row["fisher_bytes"] - 4 * row["parameters"] < 8000
        assert row["share"] == row["file_bytes"] / row["fisher_bytes"]
        assert row["anchor_bytes"] == 4 * 4 * 16 * (64 + 128)
        assert row["ewc_bytes"] == row["fisher_bytes"] + 4 * row["parameters"]
        assert row["share_of_ewc"] == (row["file_bytes"] + row["anchor_bytes"]) / row["ewc_bytes"]


@pytest.mark.parametrize(
    ("name", "gigabytes", "percent"),
    [
        ("llama-3.2-3b", (1.409, 0.705, 0.358, 0.182), (10.97, 5.48, 2.78, 1.41)),
        ("gptj-6b", (3.758, 1.879, 0.954, 0.484), (15.53, 7.76, 3.94, 2.00)),
        ("llama-3.1-8b", (2.684, 1.342, 0.682, 0.346), (8.36, 4.18, 2.12, 1.08)),
    ],
)
def test_storage_of_published_models(name, gigabytes, percent):
    """Elements and scales by the shapes' formulas; what a header adds is the rest."""
    rows = claim.storage([name], written=())
    for row, size, share in zip(rows, gigabytes, percent, strict=False):
        assert row["file_bytes"] / 1e9 == pytest.approx(size, abs=6e-4)
        assert 100 * row["share"] == pytest.approx(share, abs=6e-3)
    chosen = [shape for key, shape in claim.shapes_of_model(name).items() if key.endswith(claim.TARGETS)]
    assert rows[-1]["dtype"] == "rank1"
    header = rows[-1]["file_bytes"] - sum(4 * sum(shape) for shape in chosen) - 8 * len(chosen) * (7 + 64)
    assert 0 < header < 300 * len(chosen)
    assert rows[-1]["share"] < 2e-4
    assert rows[-1]["share_of_ewc"] < 1e-3
    text = printed({"passes": [], "claim": [], "storage": rows})
    for words in ("rank1", "MB *", f"{percent[3]:.2f} %", "it was not written", "rank 16"):
        assert words in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_drawn(path):
    text = printed(json.loads(path.read_text(encoding="utf-8")))
    for words in ("finalise, int4", "× faster than", "× as long as", "demo-llama", "q_proj and v_proj", "1.41 %"):
        assert words in text


def test_command_writes_results(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "SHORT", ((2, 8, 1),))
    target = tmp_path / "results.json"
    options = ["bench", "--importance", "--scale", "0.0001", "--rounds", "1", "--device", "cpu", "--json", str(target)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    results = json.loads(target.read_text(encoding="utf-8"))
    assert [row["model"] for row in results["claim"]] == ["demo-llama"]
    assert results["passes"][0]["rows"]
    pairs = [(row["model"], row["dtype"]) for row in results["storage"]]
    assert pairs == [(model, dtype) for model in claim.MODELS for dtype in claim.DTYPES]
    assert not any(row["written"] for row in results["storage"])
    assert "rank1" in done.output
