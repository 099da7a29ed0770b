"""Bad input to the commands, as a user gives it: one clear line, exit code 2, no traceback, nothing half written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import finetune_cases as tiny
import pytest
import torch
from typer.testing import CliRunner

from alr_kernels.cli import app
from alr_kernels.finetune import phases
from alr_kernels.finetune.progress import Interrupted, Stopped

ROOT = Path(__file__).parent.parent
LLAMA, OTHER, NO_PAD = "llama", "other", "no-pad"
SHORT = "--steps 2 --batch 2 --max-length 32 --held-out 0.3 --device cpu"
RECORD = f"record --model {LLAMA} --out i.safetensors {SHORT} --data"
TUNE = f"tune --model {LLAMA} --out tuned {SHORT} --importance importance.safetensors --data domain.jsonl"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models, texts, and the importance of one model."""
    folder = tmp_path_factory.mktemp("home")
    tiny.model_folder(folder / LLAMA)
    tiny.model_folder(folder / OTHER, make=tiny.gptj)
    tiny.model_folder(folder / NO_PAD)
    tiny.tokenizer(eos_token=None).save_pretrained(folder / NO_PAD)
    tiny.texts(folder)
    files = {
        "empty.jsonl": b"",
        "rows.jsonl": b'{"text": "one"}\n{"text": "two"\n{"text": "three"}\n',
        "latin.txt": "caf\xe9 ".encode("latin-1") * 20,
        "columns.jsonl": b"".join(b'{"rating": %d, "score": 1}\n' % i for i in range(20)),
        "columns.csv": b"rating,score\n" + b"".join(b"%d,1\n" % i for i in range(20)),
        "broken/config.json": b'{"model_type": "llama"',
        "hollow/config.json": (folder / LLAMA / "config.json").read_bytes(),
        "bare/readme.txt": b"nothing",
        "bad.yaml": b"lr: [1\n",
        "torn.safetensors": b"\x10\0\0\0\0\0\0\0{}",
    }
    tiny.tokenizer().save_pretrained(folder / "broken")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = alr(f"record --model {LLAMA} --data general.jsonl --out importance.safetensors {SHORT}")
        assert done.exit_code == 0, done.output + repr(done.exception)
    return folder


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """An own copy of all that, as the current folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nothing is asked for on the network
    shutil.copytree(home, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def alr(arguments):
    return CliRunner().invoke(app, arguments.split())


def said(done, verb):
    """Return the one line of a refusal, after checking that it is one."""
    assert done.exit_code == 2, done.output + repr(done.exception)
    assert not done.stdout
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("alr-kernels")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"alr-kernels {verb}: ")
    assert done.stderr.splitlines()[-1] == lines[0]
    return lines[0]


# what → (command, all these appear in the message, in order)
REFUSED = {
    "missing column": (f"{RECORD} columns.jsonl", "columns.jsonl.*'rating', 'score'.*--columns"),
    "missing column of CSV": (f"{RECORD} columns.csv", "columns.csv.*'rating', 'score'.*--columns"),
    "column that is not there": (f"{RECORD} general.jsonl --columns text=story", "--columns.*'story'.*'text'"),
    "empty file": (f"{RECORD} empty.jsonl", "empty.jsonl: the file is empty"),
    "row that is not JSON": (f"{RECORD} rows.jsonl", "rows.jsonl, line 2 is not JSON"),
    "wrong encoding": (f"{RECORD} latin.txt", "latin.txt: expected UTF-8.*0xe9.*line 1"),
    "no such data": (f"{RECORD} ./no.jsonl", "--data.*no.jsonl"),
    "no such model": (
        f"{TUNE} --model ./no-such-folder",
        "--model: ./no-such-folder: no such folder; expected one with",
    ),
    "model of a hub out of reach": (f"{TUNE} --model some/model", "'some/model' is no folder here.*Hugging Face hub"),
    "model that is broken": (f"{TUNE} --model broken", "transformers cannot load broken"),
    "model without weights": (f"{TUNE} --model hollow --tokenizer llama", "--model.*hollow"),
    "folder without a model": (f"{TUNE} --model bare", "--model: the folder bare holds no model"),
    "model that is a file": (f"{TUNE} --model domain.jsonl", "--model: domain.jsonl is a file"),
    "tokenizer without padding": (
        f"{TUNE} --model {NO_PAD}",
        "--tokenizer: that of no-pad has neither a pad token nor",
    ),
    "importance of another model": (
        f"{TUNE} --model {OTHER}",
        "--importance: expected importance of the model 'other'",
    ),
    "importance that is torn": (f"{TUNE} --importance torn.safetensors", "torn.safetensors"),
    "importance that is not there": (
        f"{TUNE} --importance no.safetensors",
        "--importance: no.safetensors: no such file",
    ),
    "no importance": (
        f"tune --model {LLAMA} --data domain.jsonl --out tuned",
        "--importance: needed.*alr-kernels record",
    ),
    "lambda": (f"{TUNE} --lambda -1", "--lambda: expected a number ≥ 0, got -1.0: λ weighs"),
    "LoRA modules": (f"{TUNE} --lora targets=query", "--lora.*'query'"),
    "configuration": (f"{TUNE} --config bad.yaml", "--config: bad.yaml, line"),
    "no configuration": (f"{TUNE} --config no.yaml", "--config: no.yaml: no such file"),
    "nothing to resume": (f"{TUNE} --resume", "--resume: no whole checkpoint in tuned"),
    "out is the model": (f"{TUNE} --out {LLAMA} --overwrite", "--out"),
    "out that cannot be": (f"{TUNE} --out domain.jsonl/x", "domain.jsonl"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_has_one_clear_line(what, here):
    command, message = REFUSED[what]
    before = sorted(os.listdir())
    line = said(alr(command), command.split()[0])
    assert re.search(message, line), line
    assert len(line) < 700
    left = [name for name in os.listdir() if name not in before]
    assert not [path for name in left for path in (here / name).rglob("config.json")]
    assert not Path("i.safetensors").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(here):
    line = said(alr(f"{TUNE} --device cuda"), "tune")
    assert "--device: a GPU was asked for, but" in line


def test_what_is_there_already_is_kept(here):
    before = (here / "importance.safetensors").read_bytes()
    line = said(alr(f"{RECORD} general.jsonl --out importance.safetensors"), "record")
    assert "--out: importance.safetensors is there already" in line
    assert "--overwrite" in line
    assert (here / "importance.safetensors").read_bytes() == before


def test_a_full_device(here, monkeypatch):
    """While the tuned model is written: one line, no model, and the run goes on once there is room."""
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        line = said(alr(f"{TUNE} --save-every 1"), "tune")
    assert "no space left on the device" in line
    assert not (here / "tuned" / "config.json").exists()
    done = alr(f"{TUNE} --save-every 1 --resume")
    assert done.exit_code == 0, done.output
    assert (here / "tuned" / "config.json").exists()


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("mount"),
    reason="a small file system can only be mounted by root on Linux",
)
def test_a_device_that_is_really_full(here, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], check=False).returncode:
        pytest.skip("this root may not mount")
    try:
        line = said(alr(f"{TUNE} --out {small}/tuned"), "tune")
        assert re.search("no space (is )?left", line), line
        assert not (small / "tuned" / "config.json").exists()
        line = said(alr(f"record --model {LLAMA} {SHORT} --data general.jsonl --out {small}/i.safetensors"), "record")
        assert "no space left" in line
        assert not (small / "i.safetensors").exists()
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


@pytest.mark.parametrize(
    ("package", "extra", "options"),
    [("transformers", "train", ""), ("peft", "peft", "--lora default"), ("matplotlib", "report", "--report page"),
     ("bitsandbytes", "all", "--lora default --quantize nf4"), ("tensorboard", "all", "--tensorboard")],
)  # fmt: skip
def test_a_package_that_is_missing(package, extra, options, here, monkeypatch):
    from importlib.util import find_spec

    from alr_kernels.cli import _training

    monkeypatch.setattr(_training, "find_spec", lambda name: None if name == package else find_spec("json"))
    line = said(alr(f"{TUNE} {options}"), "tune")
    assert line.endswith(f'needs {package}: pip install "alr-kernels[{extra}]"')


def raising(error):
    def verb(settings, **_):
        raise error

    return verb


SAFETENSORS = "Error while serializing: I/O error: No space left on device (os error 28)"
MENDED = {
    "out of memory on a GPU": (
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3 GiB. More"
        ),
        r"out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. Smaller --batch.*--gradient-checkpointing",
    ),
    "out of memory on the CPU": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        "out of memory: .*Smaller --batch",
    ),
    "out of memory in Python": (MemoryError(), "out of memory: MemoryError. Smaller"),
    "full": (
        OSError(errno.ENOSPC, "No space left on device", "/a/b"),
        "no space left on the device for /a/b: free some",
    ),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left on the device: free"),
    "full by datasets": (OSError("Not enough disk space. Needed: Unknown size"), "no space left on the device"),
    "full by safetensors": (Exception(SAFETENSORS), "no space left on the device"),
    "torch's writer": (
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        "torch could not write a checkpoint; most often no space",
    ),
    "rights": (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied; its owner"),
    "another process": (
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
        "another process of this job ended first",
    ),
    "extra": (
        ModuleNotFoundError("No module named 'peft'", name="peft"),
        r'needs peft: pip install "alr-kernels\[peft\]"',
    ),
    "broken library": (ImportError("libx.so: no such file", name="torchvision"), "libx.so.* Is torchvision installed"),
}


@pytest.mark.parametrize("what", MENDED)
def test_surroundings_that_fail_have_one_clear_line(what, here, monkeypatch):
    error, message = MENDED[what]
    monkeypatch.setattr(phases, "tune", raising(error))
    line = said(alr(TUNE), "tune")
    assert re.search(message, line), line


def test_a_full_disk_behind_another_error(here, monkeypatch):
    """torch says that its file was cut off, and the reason is what it came from."""
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("basic_ios::clear: iostream error")  # noqa: B904 - as torch does
    except RuntimeError as error:
        monkeypatch.setattr(phases, "tune", raising(error))
    assert "no space left on the device" in said(alr(TUNE), "tune")


@pytest.mark.parametrize(
    "error", [ValueError("bad"), KeyError("x"), RuntimeError("shape mismatch"), ZeroDivisionError()]
)
def test_a_bug_shows_its_traceback_and_says_so(error, here, monkeypatch):
    def verb(settings, **_):
        json.loads("{}")
        raise error

    monkeypatch.setattr(phases, "tune", verb)
    done = alr(TUNE)
    assert done.exit_code == 1
    assert "Traceback (most recent call last)" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"alr-kernels tune: {type(error).__name__}: this is a bug in alr_kernels")


def test_with_debug_errors_come_through(here):
    done = alr(f"{TUNE} --lambda -1 --debug")
    assert isinstance(done.exception, ValueError)


@pytest.mark.parametrize(
    ("stopped", "says"),
    [
        (Stopped(7, Path("tuned/checkpoints")), "stopped after step 7, which is saved. The same command with --resume"),
        (Stopped(0, None), "stopped after step 0, before a checkpoint was taken. The same command with --resume"),
        (KeyboardInterrupt(), "interrupted before the run began: nothing was written"),
        (Interrupted("interrupted at once."), "interrupted at once."),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(stopped, says, here, monkeypatch):
    monkeypatch.setattr(phases, "tune", raising(stopped))
    done = alr(TUNE)
    assert done.exit_code == 130
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_other_processes_of_a_job_say_who_speaks_and_not_the_same_again(here, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    done = alr(f"{TUNE} --lambda -1")
    assert (done.exit_code, done.output) == (2, "")
    monkeypatch.setattr(phases, "tune", raising(MemoryError()))
    done = alr(TUNE)
    assert done.stderr.startswith("[rank 3] alr-kernels tune: out of memory")
    monkeypatch.setenv("LOCAL_RANK", "0")  # on another machine, where files may be others
    assert alr(f"{TUNE} --lambda -1").stderr.startswith("[rank 3] alr-kernels tune: --lambda")


def test_a_process_says_so_too(here):
    """Not in this process: what Python itself prints would show."""
    command = [sys.executable, "-m", "alr_kernels", *f"{TUNE} --model ./no-such-folder".split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"alr-kernels tune: --model: ./no-such-folder: no such folder; .*\n", done.stderr), done.stderr


def test_a_whole_run_prints_results_alone_on_standard_output(here):
    done = alr(f"{TUNE} --general general.jsonl --json")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results["kind"] == "tune"
    assert results["summary"]["forgetting"] is not None
    assert results["files"]["model"] == "tuned"
    lines = done.stderr.splitlines()
    assert "tune: 2 steps" in lines
    read = [line for line in lines if not line.startswith("tune: ")]
    assert {line.partition(":")[0] for line in read} <= {"domain", "general", "--data", "--general", "--max-length"}
    for name, facts in results["data"].items():
        line = next(line for line in read if line.startswith(f"{name}: "))
        assert f"{name}.jsonl, plain text, {facts['rows']} rows: " in line
        assert f"{facts['held_out_rows']} held out ({facts['held_out_tokens']:,} tokens)" in line
        learnt = f"{facts['train_rows']} to learn ({facts['train_tokens'] or 0:,} tokens), "
        assert (learnt in line) == (name == "domain"), "general text is measured on alone"


def test_the_end_says_what_came_out_and_what_to_do_next(here):
    done = alr(f"{TUNE} --general general.jsonl")
    assert done.exit_code == 0, done.output
    results = json.loads((here / "tuned" / "results.json").read_text())
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:-1] for line in done.stdout.splitlines() if line.count("│") > 3
    }
    for kind in ("domain", "general"):
        before, after = results["before"][kind], results["after"][kind]
        cells = [cell.strip() for cell in rows[kind]]
        assert cells[1:4] == [f"{before['nll']:.4f}", f"{after['nll']:.4f}", f"{after['nll'] - before['nll']:+.4f}"]
    lost = results["summary"]["forgetting"]
    said = f"Forgot: {lost:.4f}" if lost >= 0 else f"Forgot nothing: NLL of the general text fell by {-lost:.4f}"
    assert said in done.stdout
    assert "AutoModelForCausalLM.from_pretrained('tuned')" in done.stdout


def test_record_says_the_command_that_comes_next(here):
    done = alr(f"{RECORD} general.jsonl")
    assert done.exit_code == 0, done.output
    following = next(line for line in done.stdout.splitlines() if line.startswith("  alr-kernels tune"))
    words = following.replace("DOMAIN", "domain.jsonl").split()[1:]
    done = alr(" ".join([*words, *SHORT.split()]))
    assert done.exit_code == 0, done.output
