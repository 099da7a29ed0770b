"""What reaches the terminal besides results: warnings of this package alone, progress, what numbers say in words."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from alr_kernels.cli import _errors, _output, _summary
from alr_kernels.cli._summary import findings


def test_warnings_of_this_package_are_shown_and_others_are_not(capsys, monkeypatch):
    ours = compile("import warnings\nwarnings.warn('ours')", str(Path(_output.PACKAGE) / "somewhere.py"), "exec")
    before = warnings.showwarning
    with _output.quiet("tune"):
        warnings.warn("theirs", stacklevel=1)
        exec(ours, {"__name__": "alr_kernels.somewhere"})
    assert capsys.readouterr().err == "alr-kernels tune: warning: ours\n"
    assert warnings.showwarning is before
    with _output.quiet("tune", main=False):
        exec(ours, {"__name__": "alr_kernels.somewhere"})
    assert capsys.readouterr().err == ""


def test_errors_that_this_package_raises_are_known_by_their_statement():
    from alr_kernels.importance import Importance

    with pytest.raises(FileNotFoundError) as missing:
        Importance.load("no.safetensors")
    assert "no.safetensors" in _errors.message(missing.value)
    with pytest.raises(ValueError, match="could not convert") as accident:
        float("x")
    assert _errors.message(accident.value) is None


def test_what_a_baseline_showed_is_said_with_its_sign():
    summary = {"domain_gain": 0.5, "forgetting": 0.25, "plain_domain_gain": 0.75, "plain_forgetting": 1.5}
    plain = {"domain": {"nll": 1.0}, "general": {"nll": 2.0}}
    assert list(findings({"verb": "run", "summary": summary, "plain": plain})) == [
        "Learnt: 0.5000 nats per token of the domain.",
        "Forgot: 0.2500 nats per token of the general text.",
        "Without the pull, NLL changed by -0.7500 on the domain and +1.5000 on the general text.",
    ]


def test_nothing_learnt_and_nothing_forgotten_is_said_so():
    summary = {"domain_gain": -0.5, "forgetting": -0.25}
    assert list(findings({"verb": "tune", "summary": summary, "importance": {}})) == [
        "Learnt nothing: NLL of the domain rose by 0.5000 nats per token.",
        "Forgot nothing: NLL of the general text fell by 0.2500 nats per token.",
    ]


def test_forgetting_under_a_pull_says_how_to_forget_less():
    results = {"verb": "tune", "summary": {"domain_gain": 0.5, "forgetting": 0.25}, "importance": {"bytes": 1}}
    *_, hint = findings(results)
    assert hint.startswith("To forget less, raise --lambda; `run --baseline`")
    assert len(list(findings(results | {"importance": None}))) == 2, "there is no pull to make stronger"


def test_the_end_of_a_baseline_has_the_sentence_of_the_report():
    report_cases = pytest.importorskip("report_cases")
    from alr_kernels.report.run_words import at_equal_learning

    results = report_cases.run()
    said = list(findings(results | {"verb": "run"}))
    assert said[-1] == at_equal_learning(results)
    assert said[-1].startswith("At the same domain NLL of ")
    results["summary"]["plain_forgetting"] = -0.1
    assert at_equal_learning(results) == ""


def test_the_sentence_needs_no_matplotlib():
    code = "import sys; import alr_kernels.report.run_words; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_pull_stands_beside_after_in_a_table_with_its_unit():
    report_cases = pytest.importorskip("report_cases")
    table = _summary._table(report_cases.run())
    assert "nats per token" in table.title
    heads = [column.header for column in table.columns]
    assert heads[3:6] == ["NLL after", "NLL without the pull", "change"]
    results = report_cases.run()
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[3:5] == [f"{results[side]['domain']['nll']:.4f}" for side in ("after", "plain")]


def test_a_model_that_was_only_read_has_no_before_and_after(capsys):
    found = {"nll": 2.0, "perplexity": 7.389, "tokens": 1200}
    results = {
        "verb": "record", "options": {"method": "fisher", "model": "m", "data": "g.txt", "out": "i.safetensors"},
        "before": {"general": found}, "after": {"general": found}, "model": {"space": "full"}, "files": {},
    }  # fmt: skip
    _summary.show(results)
    shown = capsys.readouterr().out
    assert "Nothing was trained: --method fisher only reads the model." in shown
    assert "NLL 2.0000 nats per token, perplexity 7.39 (1,200 tokens)" in shown
    assert "NLL after" not in shown
    results["options"]["method"] = "path-integral"
    _summary.show(results)
    assert "NLL after" in capsys.readouterr().out


def lines_of(monkeypatch, ticks, *, seconds, total=100, done=0):
    """Return what is printed where no bar can be drawn, with so many seconds between two ticks."""
    now = [0.0]
    monkeypatch.setattr(_output.time, "monotonic", lambda: now[0])
    text = io.StringIO()
    with _output.Shown("tune", Console(file=text)) as shown:
        tick = shown.phase("tune", total, done)
        for step, note in ticks:
            now[0] += seconds
            tick(step, note)
    return text.getvalue().splitlines()


def test_a_log_gets_a_line_a_tenth_and_no_more(monkeypatch):
    ticks = [(step, f"loss {step}") for step in range(1, 101)]
    lines = lines_of(monkeypatch, ticks, seconds=2)
    assert lines[0] == "tune: 100 steps"
    assert lines[1] == "tune: 10 of 100, 3 min left, loss 10"
    assert lines[-1] == "tune: 100 steps in 3 min"
    assert len(lines) == 1 + 9 + 1
    assert lines_of(monkeypatch, ticks, seconds=0.1) == ["tune: 100 steps", "tune: 100 steps in 10 s"]


def test_a_run_that_goes_on_says_from_where(monkeypatch):
    lines = lines_of(monkeypatch, [(70, ""), (100, "loss 1"), (100, "general 2")], seconds=20, done=60)
    expected = ["tune: 100 steps, from step 60 on", "tune: 70 of 100, 60 s left", "tune: 40 steps in 40 s, 100 in all"]
    assert lines == expected


def test_a_terminal_gets_a_bar(monkeypatch):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with _output.Shown("tune", console) as shown:
        tick = shown.phase("tune", 10)
        tick(10, "loss 2.5")
        shown.say("one remark [of a kind]")
    assert "10/10" in text.getvalue()
    assert "loss 2.5" in text.getvalue()
    assert "one remark [of a kind]" in text.getvalue()


FACTS = {
    "source": "texts/qa.jsonl", "held_out_source": None, "format": "prompt/completion", "unit": "row", "rows": 1400,
    "train_rows": 1380, "train_tokens": 10507, "held_out_rows": 20, "held_out_tokens": 568, "dropped": 0,
    "truncated": 3, "overlap": 0,
}  # fmt: skip


def test_what_was_read_is_one_line_and_what_was_left_out_another():
    job = pytest.importorskip("alr_kernels.finetune.job")
    assert list(job._read("domain", "data", FACTS, True)) == [
        "domain: qa.jsonl, prompts and completions, 1,400 rows: 1,380 to learn (10,507 tokens), "
        "20 held out (568 tokens)",
        "--data: 3 rows cut to the length of a sequence (--max-length)",
    ]
    few = FACTS | {"held_out_rows": 2, "unit": "file", "truncated": 0, "rows": 30, "format": "text", "source": "texts/"}
    assert list(job._read("general", "general", few, False)) == [
        "general: texts, plain text, 30 files: 2 held out (568 tokens)",
        "--general: 2 files held out: few, so that what is measured is uncertain; a larger --held-out helps",
    ]
    elsewhere = FACTS | {"held_out_source": "b/test.jsonl", "truncated": 0}
    assert next(job._read("domain", "data", elsewhere, True)).endswith("20 held out of test.jsonl (568 tokens)")
    nothing = FACTS | {"held_out_rows": None, "truncated": 0}
    assert next(job._read("domain", "data", nothing, True)).endswith("1,380 to learn (10,507 tokens)")
