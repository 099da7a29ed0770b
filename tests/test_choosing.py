"""The sweeps of bench/choosing.py: they sweep what they say, and the page shows their figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import choosing
import pytest

pytest.importorskip("transformers", reason="the demo's models need transformers")

ROOT = Path(__file__).parent.parent
TINY = {"pretrain_steps": 40, "tune_steps": 8, "evaluate_every": 4, "windows": 8, "corpus_bytes": 80_000}
PAGE = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
KEPT = json.loads(next((ROOT / "bench/results/amd-epyc-2core").glob("*-choosing.json")).read_text(encoding="utf-8"))


@pytest.fixture
def result(tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "SETTINGS", {**TINY, "width": 32, "layers": 2})
    sweeps = {
        "lr": [{"reg_lambda": 0.0}],
        "reg_lambda": [{"reg_lambda": 0.1}, {"reg_lambda": 300.0}],
        "coeffs": [{"temperature": 1.0}, {"temperature": 0.01}, {"coeffs": "uniform"}],
        "record_share": [{"record_share": 0.5}],
    }
    monkeypatch.setattr(choosing, "SWEEPS", sweeps)
    choosing.main(str(tmp_path / "results.json"), 3)
    return json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))


def test_each_setting_changes_what_it_should(result):
    plain, weak, strong, same, sharp, uniform, longer = result["runs"]
    starts = {tuple(row["points"][0]) for row in result["runs"]}
    assert len(starts) == 1, "every run starts from the same weights"
    assert strong["points"][-1][0] > plain["points"][-1][0], "a strong pull learns less"
    assert weak["points"] != plain["points"]
    assert same["points"] == weak["points"], "T = 1 is the default"
    assert sharp["effective_layers"] < weak["effective_layers"] < uniform["effective_layers"]
    assert longer["points"] != weak["points"]


def test_the_page_shows_the_results():
    """Every row of the page's tables has the figures of a run: domain NLL, forgotten at the end and at the level."""
    assert f"{KEPT['level']:.3f}" in PAGE
    shown = re.findall(r"^\| .*?\| (\d\.\d{3}) \| (0\.\d{3}) \| (0\.\d{3}|-) \|$", PAGE, re.M)
    assert len(shown) > 30
    runs = set()
    for row in KEPT["runs"]:
        domain, general = row["points"][-1]
        level = row["forgot_at_level"]
        forgot = general - row["points"][0][1]
        runs.add((f"{domain:.3f}", f"{forgot:.3f}", "-" if level is None else f"{level:.3f}"))
    assert set(shown) <= runs
