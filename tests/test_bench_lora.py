"""The benchmark of LoRA in effective space: what its rows compute, and its tables, drawn from results alone."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from alr_kernels.benchmark import lora, lora_model, lora_table, memory
from alr_kernels.cli import app

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "bench" / "results").glob("*/*-lora.json"))
SHAPE = (64, 256)


def printed(result):
    console = Console(file=StringIO(), width=140)
    lora_table.show(result, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def result():
    return lora.run(SHAPE, "cpu", ranks=(8, 16), rounds=3, budget_s=0.5)


def test_recordings_compute_the_same():
    found = []
    for run in (lora.record, lora.eager_record, lambda x: lora._record_rows(x)[1].run()):
        x = lora.Operands.of(SHAPE, 8, 2, "cpu")
        before = [omega.clone() for omega in x.path_integrals]
        run(x)
        found.append([omega - old for omega, old in zip(x.path_integrals, before, strict=True)])
    for other in found[1:]:
        for got, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
            assert expected.abs().max() > 0


def test_pulls_compute_the_same():
    x = lora.Operands.of(SHAPE, 8, 2, "cpu")
    rows = {row.name: row for row in lora._pull_rows(x)}
    for kept, rival in (("fp32", lora.READY), ("int8", lora.DECODED)):
        coupled, proximal = (rows[name].run() for name in (lora.coupled_name(kept), f"pull, {kept} Ω, proximal"))
        for i, (up, down) in enumerate(rows[rival].run()):
            torch.testing.assert_close(coupled[i].grad_up, up, rtol=1e-4, atol=1e-4 * float(up.abs().max()))
            torch.testing.assert_close(coupled[i].grad_down, down, rtol=1e-4, atol=1e-4 * float(down.abs().max()))
            assert torch.equal(proximal[0][i].grad_down, coupled[i].grad_down)
            assert torch.equal(proximal[1][i].grad_up, coupled[i].grad_up)
            assert proximal[1][i].curvature_up is not None


def test_every_row_is_reported(result):
    assert [entry["rank"] for entry in result["passes"]] == [8, 16]
    for entry in result["passes"]:
        assert (entry["shape"], entry["pairs"], entry["elements"]) == ([64, 256], 1, 64 * 256)
        names = [row["name"] for row in entry["rows"]]
        assert len(set(names)) == len(names) == 3 + 2 + 2 * len(lora.FORMATS)
        for row in entry["rows"]:
            ours = not row["name"].startswith(("eager", "autograd"))
            assert row["median_s"] > 0
            assert (row["share"] is not None) == (row["bytes_per_s"] is not None) == bool(row["ratios"]) == ours
            assert (row["over_record"] is not None) == row["name"].startswith("pull")
            assert row["extra_share"] is None or row["extra_share"] >= 0
    model = result["model"]
    assert (model["pairs"], model["whole_model"], model["share_of_training"]) == (4, False, None)
    assert model["elements"] == 2 * (64 * 256 + 16 * 256)
    for rows in (model["rows"], result["host"]["rows"]):
        assert [row["name"] for row in rows] == [lora_model.PLAIN, lora_model.OURS, *lora_model.VARIANTS]
        assert rows[0]["ratio"] == (1.0, 1.0, 1.0)
    assert result["bars"] == [], "of the full shape only"


def test_tables_are_of_the_result_alone(result):
    found = json.loads(json.dumps({**result, "bars": lora.bars(result)}))
    text = printed(found)
    for words in ("record, with tangent factors", "× faster than", "a few pairs", "skipped: a training step", "Bars"):
        assert words in text
    row = found["passes"][1]["rows"][-1]
    row["over_record"] = [123.45, 0, 0]
    row["ratios"] = {"something": [678.9, 0, 0]}
    found["bars"][0] |= {"got": None, "holds": None}
    whole = {"batch": 4, "length": 2048, "checkpointing": True, "seconds": 1.5}
    found["model"] |= {"training": whole, "share_of_training": 0.0042, "whole_model": True, "elements": 671_088_640}
    text = printed(found)
    for words in ("123.45", "678.9 × faster than something", "not measured", "8,192 tokens, checkpointing", "0.42 %"):
        assert words in text
    assert "all pairs (4, 671.1 M elements" in text.replace("\n", " ")


def test_bars(result):
    found = {bar["name"]: bar for bar in lora.bars(result)}
    assert len(found) == 3
    for bar in found.values():
        assert set(bar) == {"name", "wanted", "at_least", "got", "holds"}
        if bar["got"] is not None:
            assert bar["holds"] == (bar["got"] >= bar["wanted"] if bar["at_least"] else bar["got"] <= bar["wanted"])
    rows = {row["name"]: row for row in result["passes"][0]["rows"]}
    faster = found["recording, r = 8: times faster than the eager formula"]
    assert faster["got"] == rows[lora.RECORD_WHOLE]["ratios"][lora.EAGER][0]
    on_gpu = {bar["name"]: bar for bar in lora.bars({**result, "device": "cuda"})}
    assert len(on_gpu) == 7
    assert [bar["wanted"] for bar in on_gpu.values()] == [0.75, 1.2, 0.05, 0.5, 1.2, 0.05, 0.01]
    assert list(on_gpu.values())[-1]["holds"] is None


def test_extra_memory_is_what_a_call_takes():
    megabytes = 2**20

    def run():
        return [torch.ones(32 * megabytes // 4) for _ in range(2)]

    found = memory.extra_of(run, "cpu")
    assert found is None or 60 * megabytes < found < 80 * megabytes


def test_sizes_of_the_model():
    sizes = lora_model.sizes_of(lora.SHAPE, "cuda")
    assert len(sizes) == 64
    assert sum(m * n for m, n in sizes) == 671_088_640
    assert set(sizes) == {(4096, 4096), (1024, 4096)}


def test_training_step_of_a_small_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    found = lora_model.training_step(config, "cpu", batch=2, length=8)
    assert found["seconds"] > 0
    assert not found["checkpointing"]
    assert (found["batch"], found["length"]) == (2, 8)


def test_training_step_falls_back_to_checkpointing(monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    measured, seconds = lora_model._seconds, iter([None])
    monkeypatch.setattr(lora_model, "_seconds", lambda step, device: next(seconds, measured(step, device)))
    assert lora_model.training_step(config, "cpu", batch=2, length=8)["checkpointing"]
    monkeypatch.setattr(lora_model, "_seconds", lambda step, device: None)
    assert "does not fit" in lora_model.training_step(config, "cpu", batch=2, length=8)["skipped"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_drawn(path):
    text = printed(json.loads(path.read_text(encoding="utf-8"))["lora"])
    for words in ("record, with tangent factors", "× faster than", "q_proj and v_proj", "Bars"):
        assert words in text


def test_command_writes_results(tmp_path):
    target = tmp_path / "results.json"
    options = ["bench", "--lora", "--scale", "0.001", "--rounds", "1", "--device", "cpu", "--json", str(target)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    found = json.loads(target.read_text(encoding="utf-8"))
    assert [entry["rank"] for entry in found["lora"]["passes"]] == list(lora.RANKS)
    assert found["alr_kernels"]["commit"]
    assert "record, with tangent factors" in done.output
