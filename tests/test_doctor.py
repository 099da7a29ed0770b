"""`alr-kernels doctor`: its report, its exit code, and that it notices a backend that steps wrongly."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from alr_kernels import _ops
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
