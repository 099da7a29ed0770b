"""`alr-kernels doctor`: its report, its exit code, and that it notices a backend that steps wrongly."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alr_kernels import _environment, _ops
from alr_kernels.cli import app
from alr_kernels.step import native, reference

doctor_module = importlib.import_module("alr_kernels.cli.doctor")  # the package's attribute is the command


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the interpreter's child process: it takes seconds and has tests of its own."""
    monkeypatch.setattr(doctor_module, "_check_interpreted", list)


@pytest.mark.usefixtures("no_interpreter")
def test_json_names_versions_backends_and_checks() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["ok"]
    assert report["versions"]["torch"]
    assert report["backends"]["cpu"]["step"]["reference"] == ""
    assert "TRITON_INTERPRET" in report["backends"]["cpu"]["step"]["triton"] or "Triton" in str(report["backends"])
    assert [check["largest_relative_error"] for check in report["checks"] if check["op"] == "step"] == [0.0]


@pytest.mark.usefixtures("no_interpreter")
def test_tables_name_every_backend() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    for word in ("native", "reference", "triton", "everything that is here works"):
        assert word in result.stdout


@pytest.mark.usefixtures("no_interpreter")
def test_exit_code_is_1_when_a_backend_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available()[0]:
        pytest.skip(native.available()[1])

    def wrong(*operands: Any, **options: Any) -> None:
        reference.step_(*operands, **options)
        operands[0].params[0].mul_(1.0001)

    monkeypatch.setitem(_ops._STEP, "native", wrong)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["ok"]


def test_interpreted_kernel_is_checked_in_a_child_process() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    (check,) = doctor_module._check_interpreted()
    assert check["ok"], check
    assert check["largest_relative_error"] == 0.0


# ---- what else is installed


@pytest.fixture
def few_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """No datasets and no matplotlib, an old transformers, an accelerate that is just new enough, a PEFT of tomorrow."""
    versions = {"transformers": "4.57.1", "accelerate": "1.1.0", "pyyaml": "6.0.2", "peft": "1.0.0.dev0"}

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.usefixtures("few_packages")
def test_what_an_extra_lacks_is_named_with_what_is_there() -> None:
    assert _environment.lacking("train") == ["transformers>=5.2 (4.57.1 is installed)", "datasets>=4.7"]
    assert _environment.lacking("demo") == ["matplotlib>=3.8"]
    assert _environment.lacking("peft") == []


@pytest.mark.usefixtures("few_packages")
def test_which_commands_work() -> None:
    found = _environment.commands()
    assert found["plan"] == {
        "works": True, "lacks": [], "install": "",
        "without": {"a model's config.json": 'pip install "alr-kernels[train]"'},
    }  # fmt: skip
    assert not found["run"]["works"]
    assert found["run"]["install"] == 'pip install "alr-kernels[train,report]"'
    assert found["run"]["lacks"] == ["datasets>=4.7", "matplotlib>=3.8", "transformers>=5.2 (4.57.1 is installed)"]
    assert set(found["tune"]["without"]) == {"--quantize", "--tensorboard", "--report"}  # PEFT is there


@pytest.mark.usefixtures("few_packages", "no_interpreter")
def test_tables_tell_which_commands_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_environment, "openmp_runtimes", lambda: ["/usr/lib/libgomp.so.1", "/torch/lib/libgomp.so.1"])
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("│ tune ")]
    assert "│ no " in lines[0]
    assert 'pip install "alr-kernels[train]"' in lines[0]
    assert "peft: complete" in result.stdout
    assert "several OpenMP runtimes" in result.stdout


def test_every_command_is_known() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert commands <= set(_environment.COMMANDS)
    extras = {extra for needed, options in _environment.COMMANDS.values() for extra in (*needed, *options.values())}
    assert extras <= set(_environment.EXTRAS)


def test_extras_are_those_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads(Path(__file__).parent.parent.joinpath("pyproject.toml").read_text(encoding="utf-8"))
    written = project["project"]["optional-dependencies"]
    for extra, packages in _environment.EXTRAS.items():
        assert sorted(written[extra]) == sorted(f"{name}>={oldest}" for name, oldest in packages.items())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system has no /proc/self/maps")
def test_openmp_runtimes_of_a_process() -> None:
    """The extension alone binds to the system's, after torch to torch's: see csrc's link in setup.py."""
    code = "import json; from alr_kernels import _environment as e; {}; print(json.dumps(e.openmp_runtimes()))"
    for loaded, count in (("pass", 0), ("e.extension_error()", 1)):
        done = subprocess.run([sys.executable, "-c", code.format(loaded)], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        assert len(found) == count
        assert all("omp" in Path(file).name for file in found)
