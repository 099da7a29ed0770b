"""Help that teaches, that answers at once, and flags that are the options: nothing is stated twice."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from alr_kernels.cli import VERBS, _options, app
from alr_kernels.finetune.options import PARTS, fields_of
from alr_kernels.finetune.settings import flag

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "datasets", "yaml", "numpy", "safetensors", "matplotlib", "peft", "accelerate")
LIMIT = 1.0  # seconds; 0.25 measured on two cores, and 0.5 is promised


def helped(*arguments, columns="80"):
    done = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": columns, "TERMINAL_WIDTH": columns})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("arguments", [[], ["record"], ["tune"], ["run"]], ids=str)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom alr_kernels.cli import app\n"
        f"sys.argv = ['alr-kernels', *{arguments!r}, '--help']\n"
        "try: app()\nexcept SystemExit as end: assert not end.code\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_help_answers_at_once():
    """In processor time, which other processes of the machine do not lengthen."""

    def took():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "alr_kernels", "--help"], capture_output=True, cwd=ROOT, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(took() for _ in range(3)) < LIMIT


def test_a_wrong_flag_is_told_without_torch():
    code = (
        "import sys\nfrom alr_kernels.cli import app\n"
        "sys.argv = 'alr-kernels run --model m --general g --data d --out o --lambda -1'.split()\n"
        "try: app()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith("alr-kernels run: --lambda: expected a number ≥ 0, got -1.0")
    assert done.stderr.count("\n") == 1


def test_the_verbs_stand_in_the_order_of_use():
    text = helped()
    listed = [line.split()[1] for line in text.splitlines() if re.match(r"│ [a-z]+ ", line)]
    assert listed == [verb.__name__ for _, verb in VERBS]
    assert [name for name in listed if name in PARTS] == ["record", "tune", "run"]
    assert "alr-kernels run --help" in " ".join(text.split())


@pytest.mark.parametrize("verb", PARTS)
def test_every_option_is_in_the_help_whole_and_once(verb):
    text = helped(verb)
    assert "…" not in text
    for _, entry in fields_of(verb):
        shown = flag(entry.name) if entry.default is not True else f"--no-{flag(entry.name)[2:]}"
        assert len(re.findall(rf"│ {shown} ", text)) == 1, shown
    assert re.search(rf"Example:\s+alr-kernels {verb} --model \S+ ", text)
    panels = re.findall(r"╭─ ([A-Z][^─]*) ─", text)
    assert panels[:2] == ["Options", "Begin with these"]
    assert panels[-1] == "Advanced"


@pytest.mark.parametrize("verb", PARTS)
def test_the_example_of_the_help_needs_nothing_more(verb, tmp_path, monkeypatch):
    from alr_kernels.finetune.settings import resolve

    monkeypatch.chdir(tmp_path)
    (tmp_path / "importance.safetensors").write_bytes(b"")
    example = re.search(r"Example:\s+alr-kernels \w+ (.*?)\n \n", helped(verb, columns="200") + "\n \n", re.DOTALL)[1]
    example = re.split(r"\n\s*\n", example)[0].replace("\\", " ")
    call = called(verb, *example.split())
    resolve(verb, call.flags)


def called(verb, *arguments):
    """Return what a command's body is called with."""
    calls = []

    def body(call):
        """Nothing."""
        calls.append(call)

    body.__name__ = verb
    one = typer.Typer()
    one.command()(_options.command(body))
    done = CliRunner().invoke(one, list(arguments))
    assert done.exit_code == 0, done.output
    return calls[0]


VALUES = {"str": "a", "int": 3, "float": 0.25}


@pytest.mark.parametrize("verb", PARTS)
def test_every_flag_is_its_option(verb):
    expected, words = {}, []
    for _, entry in fields_of(verb):
        kind = str(entry.type).partition(" | ")[0]
        if kind == "bool":
            expected[entry.name] = entry.default is not True
            words.append(flag(entry.name) if entry.default is not True else f"--no-{flag(entry.name)[2:]}")
        else:
            value = entry.metadata["choices"][-1] if entry.metadata["choices"] else VALUES[kind]
            expected[entry.name] = value
            words += [flag(entry.name), str(value)]
    call = called(verb, *words)
    assert call.flags == expected
    assert {name: type(value) for name, value in call.flags.items()} == {k: type(v) for k, v in expected.items()}
    assert (call.config, call.resume, call.overwrite, call.as_json, call.debug) == (None, False, False, False, False)


def test_only_flags_that_were_given_count():
    """One that repeats the default does: it goes before the configuration."""
    assert called("tune").flags == {}
    assert called("tune", "--batch", "8", "--mode", "proximal").flags == {"batch": 8, "mode": "proximal"}
    negatives = ("--no-tensorboard", "--normalize", "--no-packing")
    assert called("tune", *negatives).flags == {"tensorboard": False, "normalize": True, "packing": False}
    call = called("tune", "--config", "a.yaml", "--resume", "--overwrite", "--json", "--debug")
    assert call == _options.Call("tune", {}, Path("a.yaml"), True, True, True, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--mode", "explicit"], "proximal"), (["--batch", "two"], "--batch"), (["--lamda", "1"], "No such option")],
)
def test_what_the_parser_refuses_has_exit_code_2(arguments, says):
    done = CliRunner().invoke(app, ["tune", *arguments])
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output


def test_the_module_is_the_command():
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "alr_kernels", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert re.fullmatch(r"alr-kernels \d+\.\d+\S*\n", done.stdout)


def test_general_is_required_of_run_alone():
    """Of what has no default in Python, the help says so by itself; run needs the general text besides."""

    def said(verb):
        text = " ".join(helped(verb, columns="200").split())
        return text[text.index(" --general DATA ") :].partition("│ --")[0]

    assert "(required)" in said("run")
    assert "(required)" not in said("tune")
    done = CliRunner().invoke(app, ["run", "--model", "m", "--data", "d", "--out", "o"])
    assert done.exit_code == 2
    assert "--general" in done.stderr
