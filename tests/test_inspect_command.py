"""How `alr-kernels inspect` and its siblings read in a terminal: widths, words, missing files, help."""

from __future__ import annotations

import os
import subprocess
import sys

import importance_files
import pytest
import torch
from importance_files import saved
from typer.testing import CliRunner

from alr_kernels import Importance
from alr_kernels.cli import app
from alr_kernels.importance.inspection import inspect


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture
def file(tmp_path):
    return saved(tmp_path / "i.safetensors")[0]


@pytest.mark.parametrize("form", ["fp32", "int4"])
def test_tables_fit_the_terminal_and_say_what_they_leave_out(tmp_path, form, monkeypatch):
    path, _ = saved(tmp_path / "i.safetensors", form)
    printed = {}
    for width in (80, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = run(path, "--by", "module").output.splitlines()
        begin = next(i for i, line in enumerate(lines) if not line.strip())
        end = max(i for i, line in enumerate(lines) if not line.strip())
        assert max(map(len, lines[begin:end])) <= width
        printed[width] = "\n".join(lines)
    assert "Left out at a width of 80: " in printed[80]
    assert "--json shows them" in printed[80]
    assert "near 0" in printed[80].partition("Left out")[2]
    assert "Left out" not in printed[200]


def test_what_is_needed_stays_however_narrow_it_is(file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    lines = run(file).output.splitlines()
    for row in inspect(file).layers:
        line = next(line for line in lines if line.split()[:1] == [row.name])
        assert f"{100 * row.share:.1f}" in line or f"{100 * row.share:.2f}" in line or f"{100 * row.share:.3f}" in line


def test_a_layer_with_most_of_the_pull_is_told(tmp_path):
    path = tmp_path / "i.safetensors"
    Importance({"layers.0.w": torch.full((4, 4), 3.0), "layers.1.w": torch.ones(4, 4)}).save(path)
    # ‖Ω‖ 12 and 4: softmax at T = 8 gives 1.5 and 0.5, so shares 3·e and 1 of their sum
    said = run(path).output
    assert "Verdict: layers.0 has 89.1 % of the pull" in said
    assert "--coeffs uniform (largest share 75.0 %) or a --temperature above 8" in said
    assert "proportional (" not in said, "9 to 1 is no better"
    assert "other coefficients do not spread it" in run(path, "--coeffs", "uniform").output
    Importance({"layers.0.w": torch.ones(4, 4), "layers.1.w": torch.ones(4, 4)}).save(path)
    assert "Verdict" not in run(path).output


@pytest.mark.parametrize(("form", "says"), [("fp32", "values agree"), ("int4", "differs from the statistics")])
def test_agreement_with_the_statistics_is_said_in_words(tmp_path, form, says):
    path, _ = saved(tmp_path / "i.safetensors", form)
    assert says in run(path).output


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "gone.safetensors"],
        ["compare", "gone.safetensors", "gone.safetensors"],
        ["convert", "gone.safetensors", "--dtype", "int4", "--out", "o.safetensors"],
        ["eval", "--model", "./gone"],
        ["eval", "--model", "name", "--general", "gone.txt"],
        ["eval", "--model", "name", "--domain-choices", "gone.jsonl"],
    ],
)
def test_a_missing_file_is_told_before_torch_is_imported(tmp_path, arguments):
    code = (
        "import sys\nfrom alr_kernels.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"PYTHONPATH": str(importance_files.ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert "gone" in done.stderr


@pytest.mark.parametrize("verb", ["inspect", "compare", "convert", "eval"])
def test_the_help_breaks_no_word(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = CliRunner().invoke(app, [verb, "--help"]).output
    lines = [line for line in options.splitlines() if "--" in line and "--help" not in line]
    assert lines
    assert not [line for line in lines if "<" in line]
    assert not [line for line in options.splitlines() if "|" in line], "choices are in the text"
