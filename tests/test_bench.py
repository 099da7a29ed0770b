"""The benchmark: formulas, shapes, that rivals compute the same step, memory, table, plot and command."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from alr_kernels import AlrAdamW
from alr_kernels.benchmark import candidates, memory, rivals, roofline, shapes, suite, timing
from alr_kernels.benchmark.inputs import LR, Inputs, Source
from alr_kernels.benchmark.roofline import Kept
from alr_kernels.benchmark.table import NARROW, WIDTH, sets_of, show
from alr_kernels.cli import app
from alr_kernels.report import step_plots

ROOT = Path(__file__).parent.parent
SMALL = [(32, 128), (33, 256), (7,)]
FEW = Kept("bf16", moments="int8", importance="int4", anchor="bf16", split=True)


@pytest.mark.parametrize(
    ("kept", "bytes_moved"),
    [
        (Kept(), 28.0),
        (Kept(importance="fp32"), 36.0),
        (Kept(importance="int8", anchor="bf16"), 31.0),
        (Kept(importance="int4", anchor="bf16"), 30.5),
        (FEW, 16.6),
        (Kept(importance="fp32", record=True), 44.0),
        (Kept(record=True), 36.0),
    ],
)
def test_traffic_is_the_method_s_table(kept: Kept, bytes_moved: float) -> None:
    assert kept.traffic() == pytest.approx(bytes_moved, abs=0.05)


def test_separate_passes_move_what_the_method_says() -> None:
    assert roofline.FOREACH_PENALTY == 64.0
    assert roofline.AUTOGRAD_PENALTY >= 100.0


def test_state_of_few_bytes() -> None:
    assert Kept(importance="fp32").state() == 16.0
    assert FEW.state() <= 6.8


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("square", 10, 41_943_040),
        ("llama-layer", 9, 218_112_000),
        ("lora", 448, 41_943_040),
        ("resnet101", 314, 44_549_160),
        ("billion", 15, 1_006_632_960),
    ],
)
def test_sets(name: str, tensors: int, parameters: int) -> None:
    found = shapes.shapes_of(name)
    assert (len(found), shapes.elements(found)) == (tensors, parameters)


def test_scaling_keeps_tensors_and_blocks() -> None:
    found = shapes.shapes_of("llama-layer", 0.01)
    assert len(found) == 9
    assert all(shape[-1] % shapes.BLOCK == 0 for shape in found)
    assert shapes.elements(found) == pytest.approx(2_181_120, rel=0.2)


@pytest.mark.parametrize("rival", [rivals.by_hand, rivals.autograd])
def test_rivals_take_the_same_step(rival: Callable[[Inputs], timing.Step]) -> None:
    assert_same_step(rival)


@pytest.mark.slow
@pytest.mark.parametrize("rival", [rivals.compiled, rivals.compiled_optimizer])
def test_compiled_rivals_take_the_same_step(rival: Callable[[Inputs], timing.Step]) -> None:
    try:
        assert_same_step(rival)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"torch.compile does not work here: {str(error).splitlines()[0]}")


def assert_same_step(rival: Callable[[Inputs], timing.Step]) -> None:
    theirs, mine = (Inputs(Source(SMALL, "cpu")) for _ in range(2))
    step = rival(theirs)
    params = mine.params()
    optimizer = AlrAdamW(params, mine.importance(), coeffs="uniform", mode="coupled", lr=LR)
    for _ in range(3):
        step()
        optimizer.step()
        for theirs_grad, my_grad in zip(theirs.made[1::2], mine.made[1::2], strict=True):
            theirs_grad.copy_(my_grad)  # some rivals add the pull to the task's gradient
    for a, b in zip(theirs.made[::2], params, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-7)


def test_live_bytes_counts_storages_once() -> None:
    with memory.only_new_objects():
        base = torch.zeros(1000)
        param = torch.nn.Parameter(torch.zeros(10))
        param.grad = torch.zeros(10)
        kept = [base.view(10, 100), base[3:], param]
        assert memory.live_bytes("cpu") == 4000 + 40 + 40
        assert memory.nbytes_of(kept[:2], "cpu") == 4000
        del base, kept, param
        assert memory.live_bytes("cpu") == 0


def test_percentiles_and_pairwise_ratios() -> None:
    assert timing.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    samples = [timing.Sample(2.0 * n, 0.0) for n in (1, 5, 3)]
    assert timing.ratio(samples, [timing.Sample(n, 0.0) for n in (1, 5, 3)]) == (2.0, 2.0, 2.0)


def test_rounds_end_at_the_budget() -> None:
    samples = timing.in_rounds({"a": lambda: None, "b": lambda: None}, 1000, "cpu", budget_s=0.0)
    assert {len(values) for values in samples.values()} == {3}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """The short form on small shapes: blocks, rows of no whole block, too small, a vector."""
    odd = [(64, 48), (8, 128), (999,)]
    return suite.run_set("small", [*[(256, 512)] * 3, *odd], "cpu", full=False, compile="none", rounds=2)


def test_rows_hold_what_the_issue_asks(result: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in result["rows"]}
    assert result["copy_bytes_per_s"] > 0
    for row in rows.values():
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["copy_share"] > 0
        assert row["bytes_per_s"] == pytest.approx(row["bytes_per_element"] * result["elements"] / row["median_s"])
    assert rows[candidates.BASELINE]["ratio"][candidates.BASELINE] == (1.0, 1.0, 1.0)


def test_state_is_what_the_formula_says(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if row["state_bytes_formula"] is not None:
            numbers = 0.01  # step counts, hyper-parameters: a few bytes a tensor
            assert row["state_bytes"] == pytest.approx(row["state_bytes_formula"], abs=numbers), row["name"]


def test_few_bytes_add_at_most_six_point_eight() -> None:
    few = [row for row in candidates.candidates() if row.name == candidates.FEW_BYTES]
    run = suite.run_set("matrices", [(1024, 1024)] * 2, "cpu", compile="none", rounds=1, only=few)
    assert run["rows"][-1]["state_bytes"] <= 6.8


def failing(error: Exception) -> Callable[[Inputs], timing.Step]:
    def build(inputs: Inputs) -> timing.Step:
        raise error

    return build


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (
            candidates.Candidate("away", failing(ModuleNotFoundError("no", name="torchao"))),
            'torchao is not installed: pip install "alr-kernels[bench]"',
        ),
        (candidates.Candidate("broken", failing(ValueError("bad\nmore"))), "ValueError: bad"),
        (candidates.Candidate("unfit", failing(ValueError()), why_not=lambda inputs: "too many"), "too many"),
    ],
)
def test_skipped_rival_says_why(candidate: candidates.Candidate, reason: str) -> None:
    own = [row for row in candidates.candidates() if row.name == candidates.PENALTY]
    found = suite.run_set("small", SMALL, "cpu", compile="none", rounds=1, only=[*own, candidate])
    assert found["rows"][-1]["skipped"] == reason
    assert f"skipped: {candidate.name}: {reason}" in printed(found)


def test_our_own_failure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = candidates.Candidate("mine", failing(ValueError("wrong")), ours=True)
    good = [row for row in candidates.candidates() if row.name == candidates.PENALTY]
    found = suite.run_set("small", SMALL, "cpu", compile="none", rounds=1, only=[broken, *good])
    assert suite.failures(found) == ["mine: ValueError: wrong"]
    assert "median_s" in found["rows"][-1]
    monkeypatch.setattr(suite, "run_set", lambda *_, **__: found)
    done = CliRunner().invoke(app, ["bench", "--set", "square"])
    assert done.exit_code == 1
    assert "mine: ValueError: wrong" in done.output


def test_compiling_many_tensors_is_asked_for() -> None:
    compiled = candidates.references()[1]
    many = Inputs(Source([(1,)] * (shapes.MANY + 1), "cpu"))
    assert "--compile all" in compiled.why_not(many)
    assert not candidates.references(compile_many=True)[1].why_not(many)


def printed(result: dict[str, Any], width: int = WIDTH) -> str:
    file = StringIO()
    show(result, Console(width=width, file=file))
    return file.getvalue()


@pytest.mark.parametrize("peak", [None, 123.45])
def test_table_shows_every_row_whole(result: dict[str, Any], peak: float | None) -> None:
    full = next(row for row in result["rows"] if row["name"] == candidates.PENALTY)
    full = copy.deepcopy(full)
    full |= {"median_s": 0.0987, "p20_s": 0.0876, "p80_s": 0.0999, "host_s": 0.0123, "first_step_s": 12.345}
    full |= {"bytes_per_s": 4.321e12, "copy_share": 1.23, "state_bytes": 16.0, "peak_bytes": peak}
    full["ratio"] = dict.fromkeys((candidates.BASELINE, candidates.COMPILED), (12.345, 1.0, 20.0))
    names = [row.name for row in (*candidates.references(), *candidates.candidates())]
    text = printed({**result, "rows": [{**full, "name": name} for name in names]})
    assert "…" not in text
    for name in names:
        assert name in text
    if peak is None:
        assert "…" not in printed({**result, "rows": [full]}, NARROW)


def test_names_leave_room_in_the_table() -> None:
    names = [row.name for row in (*candidates.references(), *candidates.candidates())]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 36


@pytest.mark.parametrize("form", ["bench --json", "pytest-benchmark"])
def test_plot_needs_the_file_alone(result: dict[str, Any], tmp_path: Path, form: str) -> None:
    results = {"sets": [result]} if form == "bench --json" else {"benchmarks": [{"extra_info": result}]}
    source = tmp_path / "results.json"
    source.write_text(json.dumps(results))
    picture = step_plots.write(source, tmp_path / "out.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_results_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="no step benchmark"):
        sets_of({"benchmarks": [{"extra_info": {"rows": {}}}]})


def test_command(tmp_path: Path) -> None:
    file, picture = tmp_path / "results.json", tmp_path / "out.png"
    arguments = ["bench", "--set", "square", "--scale", "0.001", "--rounds", "1", "--compile", "none"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert candidates.PENALTY in done.output
    written = json.loads(file.read_text())
    assert {"versions", "machine", "build", "commit", "datetime"} <= written["alr_kernels"].keys()
    assert written["sets"][0]["set"] == "square"
    drawn = CliRunner().invoke(app, ["bench", "--plot", str(file), str(picture)])
    assert drawn.exit_code == 0, drawn.output
    assert picture.stat().st_size > 1000
    file.write_text("{}")
    assert CliRunner().invoke(app, ["bench", "--plot", str(file), str(picture)]).exit_code == 2


@pytest.mark.parametrize("page", ["docs/performance.md"])
def test_named_result_files_exist(page: str) -> None:
    for name in set(re.findall(r"bench/results/[\w-]+/[\w./-]+\.json", (ROOT / page).read_text(encoding="utf-8"))):
        json.loads((ROOT / name).read_text(encoding="utf-8"))


def test_documented_bytes_are_the_formulas() -> None:
    """The table of docs/performance.md, last two columns."""
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    documented = [(float(a), float(b)) for a, b in re.findall(r"\*\*([\d.]+)\*\* \| ([\d.]+) \|$", text, re.MULTILINE)]
    coded = [Kept(importance=name, anchor="bf16") for name in ("int8", "int4")]
    kept = [Kept(), Kept(importance="fp32"), *coded, FEW, Kept(importance="fp32", record=True)]
    computed = [(row.traffic(), row.state()) for row in kept]
    computed += [(moved, 16.0) for moved in (roofline.FOREACH_PENALTY, roofline.AUTOGRAD_PENALTY)]
    assert documented == [(round(moved, 1), round(state, 1)) for moved, state in computed]
