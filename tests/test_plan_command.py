"""`alr-kernels plan`: what it prints is what Python returns and the page shows; what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from plan_cases import SIZES
from typer.testing import CliRunner

from alr_kernels.cli import app
from alr_kernels.planning import Device, Lora, Setup, plan
from alr_kernels.report.plan_table import size

ROOT = Path(__file__).parent.parent


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_the_command_prints_what_python_returns(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SIZES}), encoding="utf-8")
    options = ["--config", path, "--gpus", "4,8", "--strategy", "hsdp", "--shard", 4, "--lora", "--rank", 2]
    options += ["--targets", "q_proj,o_proj", "--factor-dtype", "bf16", "--dtype", "bf16", "--grad-dtype", "fp32"]
    options += ["--state-dtype", "int8", "--importance-dtype", "int4", "--anchor-dtype", "bf16", "--master", "split"]
    options += ["--phase", "both", "--mode", "coupled", "--device", "H200", "--memory", 0.001, "--json"]
    done = run(*options)
    assert done.exit_code == 0, done.output
    lora = Lora(2, ("q_proj", "o_proj"), "bf16")
    setup = Setup("hsdp", 4, lora, "bf16", "fp32", "int8", "int4", "bf16", "split", "both", "coupled")
    expected = plan(path, [4, 8], setup, Device("H200", 1e6, 4.8e12)).as_dict()
    assert json.loads(done.output) == json.loads(json.dumps(expected))
    assert expected["columns"][0]["fits"] is True
    device = json.loads(run("--config", path, "--memory", 1, "--bandwidth", 2, "--json").output)["device"]
    assert device == {"name": "your device", "memory": 1e9, "bandwidth": 2e9}


def test_the_table_says_what_fits(tmp_path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"w": [100_000, 1000]}), encoding="utf-8")
    done = run("--config", path, "--gpus", "1,64", "--memory", "1.5")
    assert done.exit_code == 0, done.output
    fits = next(line for line in done.output.splitlines() if line.startswith("fits in 2 GB"))
    assert fits.split()[-2:] == ["NO", "yes"]
    assert "not counted: activations" in done.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpus", "0"], "gpus: expected integers"),
        (["--gpus", "two"], "gpus: expected integers"),
        (["--rank", "4"], "--rank: no effect without --lora"),
        (["--device", "TPU"], "device: expected one of 'A100-40GB'"),
        (["--bandwidth", "0"], "bandwidth: expected a number"),
        (["--state-dtype", "int4"], "state_dtype: expected one of"),
    ],
)
def test_refusals_have_exit_code_2(options, says, tmp_path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"w": [8, 8]}), encoding="utf-8")
    done = run("--config", path, *options)
    assert done.exit_code == 2
    assert f"alr-kernels plan: {says}" in done.output


def test_a_missing_file() -> None:
    done = run("--config", "nowhere.json")
    assert done.exit_code == 2
    assert "nowhere.json" in done.output


PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```console\n\$ alr-kernels (plan (?:[^\n]*\\\n)*[^\n]*)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_page_shows_what_is_printed(number, monkeypatch) -> None:
    monkeypatch.chdir(ROOT / "docs" / "examples")
    command, shown = EXAMPLES[number]
    done = CliRunner().invoke(app, command.replace("\\\n", " ").split())
    assert done.exit_code == 0, done.output
    lines = [line.rstrip() for line in done.output.splitlines()]
    assert lines == shown.splitlines()


def test_the_page_has_examples_of_both() -> None:
    assert len(EXAMPLES) == 2
    assert sum("--lora" in command for command, _ in EXAMPLES) == 1


def test_sizes_have_three_digits() -> None:
    shown = [size(count) for count in (0, 999, 1000, 9_994, 9_996, 99_949, 999_400, 999_600, 16_060_522_496, 2e15)]
    assert shown == [
        "0",
        "999 B",
        "1.00 kB",
        "9.99 kB",
        "10.0 kB",
        "99.9 kB",
        "999 kB",
        "1.00 MB",
        "16.1 GB",
        "2000 TB",
    ]
