"""What options, configurations and models' folders are refused for: part of the table of tests/test_validation.py."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from unittest import mock

from alr_kernels import _validate_finetune, _validate_values
from alr_kernels.finetune import card, config_file
from alr_kernels.finetune.lora_spec import LoraSpec
from alr_kernels.finetune.settings import resolve

LEAST = {"record": {"out": "i.safetensors"}, "tune": {"reg_lambda": 0}, "run": {"general": "g.txt"}}


def of(verb, **flags):
    """Resolve the fewest flags that a verb needs, and these."""
    return resolve(verb, {"model": "m", "data": "d.txt", "out": "o", **LEAST[verb], **flags})


def given(verb, **flags):
    return lambda c: of(verb, **flags)


def in_file(text, verb="tune", name="tune.yaml", **flags):
    """Resolve a configuration with this text (bytes as they are), and flags."""

    def call(c):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            resolve(verb, {"model": "m", "data": "d.txt", "out": "o", **LEAST[verb], **flags}, path)

    return call


def in_folder(files, call):
    """Call with a folder that has these files."""

    def within(c):
        with tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                (Path(folder) / name).write_text(text, "utf-8")
            call(Path(folder))

    return within


def repeated(option, now, **flags):
    """Repeat a run of which the card knows other data."""

    def call(folder):
        path = card.write(
            folder / "run.yaml", of("tune"), importance={"fingerprint": "1" * 64},
            data={"data": {"fingerprint": "a" * 64, "source": "d.txt"}},
        )  # fmt: skip
        settings = resolve("tune", {"out": "o", **flags}, path)
        if option == "importance":
            settings.same_importance(now)
        else:
            settings.same_data(option, {"fingerprint": now, "source": "d.txt"})

    return in_folder({}, call)


def resumed(folder):
    path = card.write(folder / "begun.yaml", of("tune", lr=1e-4))
    card.same_run(path, of("tune", lr=1e-3))


def without_yaml(c):
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
        config_file.yaml()


def lora(text):
    return lambda c: LoraSpec.parse(text)


CARD = "alr_kernels_card: 1\nverb: {verb}\n"
ADAPTER = {"adapter_config.json": "{}"}
REFUSED = {
    "option unknown": (given("tune", lamda=1), ValueError, "--lamda: tune has no such setting"),
    "option missing": (
        lambda c: resolve("tune", {"model": "m"}), ValueError,
        "--out, --data: needed, as a flag or in the file of --config. .*alr-kernels tune --help",
    ),
    "option missing of run": (lambda c: of("run", general=None), ValueError, "--general: needed"),
    "option missing of a card": (
        in_folder({}, lambda f: resolve("tune", {}, card.write(f / "c.yaml", of("tune")))),
        ValueError, "--out: needed.*the run of this card wrote to /",
    ),
    "option below": (given("tune", batch=0), ValueError, "--batch: expected an integer ≥ 1, got 0"),
    "option below of length": (given("tune", max_length=1), ValueError, "--max-length: expected an integer ≥ 2, got 1"),
    "option empty": (given("tune", model=" "), ValueError, "--model: expected some text, got an empty one"),
    "option choice": (given("tune", mode="explicit"), ValueError, "--mode: expected one of 'proximal', 'coupled'"),
    "option number": (given("tune", lr=0.0), ValueError, r"--lr: expected a number in \(0"),
    "option number nan": (given("tune", lr=float("nan")), ValueError, "--lr: expected a number"),
    "option share": (
        given("tune", held_out=1.0), ValueError, r"--held-out: expected a number in \[0.0, 1.0\), got 1.0",
    ),
    "option warmup": (given("tune", warmup=1.5), ValueError, r"--warmup: expected a number in \[0.0, 1.0"),
    "option seed": (given("tune", seed=-1), ValueError, "--seed: expected an integer in"),
    "option number of nothing": (lambda c: _validate_values.number("x", None), TypeError, "x: expected a number"),
    "option lambda": (
        given("tune", reg_lambda=-1.0), ValueError, "--lambda: expected a number ≥ 0, got -1.0: λ weighs",
    ),
    "option lambda inf": (
        given("tune", reg_lambda=float("inf")), ValueError, "--lambda: expected a number ≥ 0, got inf",
    ),
    "option temperature": (
        given("run", temperature="hot"), ValueError, "--temperature: expected 'auto' or a number > 0, got 'hot'",
    ),
    "option betas": (given("tune", betas="0.9"), ValueError, r"--betas: expected two numbers in \[0, 1\).*got '0.9'"),
    "option betas one": (given("tune", betas="0.9,1.0"), ValueError, "--betas: expected two numbers"),
    "option template": (
        given("tune", chat_template="/no.jinja"), FileNotFoundError, "--chat-template: /no.jinja: no such file",
    ),
    "lora part": (lora("rank=8"), ValueError, "--lora: 'rank' is no part of it.*Expected 'default', or such as r=8"),
    "lora part near": (lora("target=q_proj"), ValueError, "'target' is no part of it; did you mean 'targets'"),
    "lora no value": (lora("r"), ValueError, "--lora: 'r' has no value"),
    "lora twice": (lora("r=8,r=4"), ValueError, "--lora: 'r' is given twice"),
    **{
        f"lora {part}": (lora(part), ValueError, f"--lora: {part.partition('=')[0]}: expected {expected}")
        for part, expected in {
            "r=0": "an integer ≥ 1", "r=8.5": "an integer", "alpha=0": "a number > 0", "alpha=inf": "a number > 0",
            "dropout=1": "a number in", "rslora=maybe": "true or false", "targets=a++b": "names of modules",
        }.items()
    },
    "steps and epochs": (given("tune", steps=3, epochs=1.0), ValueError, "--steps and --epochs exclude each other"),
    "record steps and epochs": (
        given("run", record_steps=3, record_epochs=1.0), ValueError, "--record-steps and --record-epochs exclude",
    ),
    "held-out twice": (
        given("record", held_out=0.1, held_out_data="h.txt"), ValueError, "--held-out and --held-out-data exclude",
    ),
    "quantize alone": (given("tune", quantize="nf4"), ValueError, "--quantize: a base model in nf4.*--lora default"),
    "lora on an adapter": (
        in_folder(ADAPTER, lambda folder: of("tune", model=str(folder), lora="default")),
        ValueError, "--lora: it has no effect, because .* is an adapter",
    ),
    "master of fp32": (
        given("tune", master="split", dtype="fp32"), ValueError, "--master: it has no effect.*no weight is bf16",
    ),
    "temperature of uniform": (
        given("run", temperature="2", coeffs="uniform"), ValueError, "--temperature: it has no effect.*'uniform'",
    ),
    **{
        f"{name} without a pull": (
            given("tune", **{name: value}), ValueError, f"--{name.replace('_', '-')}: it has no effect.*λ is 0",
        )
        for name, value in {"mode": "coupled", "normalize": False, "layers_by": "block", "anchor_dtype": "fp32"}.items()
    },
    "columns of no general": (
        given("tune", general_columns="text=a"), ValueError, "--general-columns: it has no effect.*no --general",
    ),
    **{
        f"{name} of fisher": (
            given("record", method="fisher", **{name: value}),
            ValueError, f"--{name.replace('_', '-')}: it has no effect.*'fisher' takes one pass",
        )
        for name, value in {"xi": 0.1, "steps": 3, "lr": 1e-3, "save_model": "s", "betas": "0.9,0.9"}.items()
    },
    "start of fisher": (
        given("run", method="fisher", start_from="recorded"), ValueError, "--start-from: it has no effect.*'fisher'",
    ),
    "measuring nothing": (
        given("record", held_out=0.0, eval_every=3), ValueError, "--eval-every: it has no effect.*nothing is held out",
    ),
    "tune without importance": (
        given("tune", reg_lambda=0.1), ValueError, "--importance: needed.*alr-kernels record --model m.*--lambda 0",
    ),
    "importance not there": (
        given("tune", importance="/no.safetensors"), FileNotFoundError, "--importance: /no.safetensors: no such file",
    ),
    "importance folder": (given("tune", importance="/"), FileNotFoundError, "--importance: /: is a folder"),
    "run without a pull": (
        given("run", reg_lambda=0.0), ValueError, "--lambda: run records.*tune --lambda 0.*--baseline",
    ),
    "nothing held out": (given("tune", held_out=0.0), ValueError, "--held-out: with 0 nothing.*--held-out-data"),
    "nothing general held out": (
        given("run", held_out=0.0, held_out_data="h"), ValueError, "--held-out: with 0.*--general-held-out-data",
    ),
    "record out": (given("record", out="o.bin"), ValueError, r"--out: expected a file name that ends in .safetensors"),
    "record out folder": (
        in_folder({}, lambda f: ((f / "a.safetensors").mkdir(), of("record", out=str(f / "a.safetensors")))),
        ValueError, "--out: .*a.safetensors is a folder",
    ),
    "tune out": (given("tune", out=__file__), ValueError, "--out: .*refusals_finetune.py is a file; expected a folder"),
    "yaml unknown": (
        in_file("lr: 1e-3\nlamda: 0.1\n"), ValueError,
        "tune.yaml, line 2: lamda: tune has no such setting; did you mean 'lambda'",
    ),
    "yaml unknown and far": (
        in_file("zzz: 1\n"), ValueError, "zzz: tune has no such setting. `alr-kernels tune --help`",
    ),
    "yaml of others": (in_file("method: mas\n"), ValueError, "line 1: method: tune has no such.*only record and run"),
    "yaml flag": (
        in_file("resume: true\n"), ValueError, "line 1: resume: it is no setting.*--resume on the command line",
    ),
    "yaml int": (in_file("batch: 1.5\n"), TypeError, "batch: expected an integer, got 1.5"),
    "yaml bool": (in_file("tensorboard: maybe\n"), TypeError, "tensorboard: expected true or false, got 'maybe'"),
    "yaml bool as int": (in_file("batch: true\n"), TypeError, "batch: expected an integer, got True"),
    "yaml number": (in_file("lr: fast\n"), TypeError, "line 1: lr: expected a number, got 'fast'"),
    "yaml text": (in_file("tokenizer: 3\n"), TypeError, "tokenizer: expected text, got 3"),
    "yaml yes": (
        in_file("tokenizer: no\n"), TypeError, "tokenizer: expected text, got False; YAML reads no and off so",
    ),
    "yaml mapping": (in_file("lora:\n  r: 8\n"), TypeError, "lora: expected text, got dict"),
    "yaml nothing": (in_file("batch:\n"), TypeError, "batch: expected an integer, got nothing"),
    "yaml value": (in_file("lr: 0.1\n\nbatch: 0\n"), ValueError, "tune.yaml, line 3: batch: expected an integer ≥ 1"),
    "yaml twice": (in_file("lr: 0.1\nlr: 0.2\n"), ValueError, "line 2: lr: given twice"),
    "yaml twice by another name": (
        in_file("lambda: 0\nreg-lambda: 0\n"), ValueError, "line 2: reg-lambda: given twice",
    ),
    "yaml broken": (in_file("lr: 0.1\nbatch: [1\nseed: 2\n"), ValueError, "tune.yaml, line 3: no YAML: .*'seed: 2'"),
    "yaml tag": (in_file("lr: !!python/name:os.system\n"), ValueError, "tune.yaml, line 1: no YAML: .*constructor"),
    "yaml list": (in_file("- 1\n"), TypeError, "tune.yaml: expected lines such as `lr: 2e-5`, got a list"),
    "yaml empty": (in_file("# nothing\n"), TypeError, "tune.yaml: expected lines.*got nothing"),
    "yaml encoding": (
        in_file(b"lr: 0.1 # \xff\n"), ValueError, "tune.yaml is not UTF-8: byte 0xff at offset 10.*iconv",
    ),
    "yaml not there": (
        lambda c: resolve("tune", {}, "/no.yaml"), FileNotFoundError, "--config: /no.yaml: no such file",
    ),
    "yaml folder": (lambda c: resolve("tune", {}, "/"), OSError, "--config: /: Is a directory"),
    "yaml idle in the file": (
        in_file("coeffs: uniform\ntemperature: 2\n", "run", coeffs="proportional"),
        ValueError, "line 2: temperature: it has no effect",
    ),
    "yaml library": (without_yaml, ImportError, r'PyYAML: pip install "alr-kernels\[train\]"'),
    "card with another shape": (
        in_file(CARD.format(verb="tune") + "options: {lr: 1.0e-3}\ngiven: 5\n"),
        TypeError, "given: expected a list, got 5; was the card edited",
    ),
    "card with data of another shape": (
        in_file(CARD.format(verb="tune") + "options: {}\ndata: {data: 7}\n"),
        TypeError, "data: data: expected a mapping, got 7",
    ),
    "card of a later version": (
        in_file("alr_kernels_card: 2\n"), ValueError, "run card of version 2, this package reads 1",
    ),
    "card of nothing": (
        in_folder({"a": "lr: 1\n"}, lambda f: config_file.read_card(f / "a")), ValueError, "a is no run card",
    ),
    "card of another verb": (
        in_file(CARD.format(verb="record") + "options: {lr: 0.1}\n"),
        ValueError, "is the card of record, not of tune; `alr-kernels record --config",
    ),
    "card without options": (in_file(CARD.format(verb="tune")), ValueError, "a run card needs 'options'"),
    "card of other data": (
        repeated("data", "b" * 64), ValueError,
        "--data: d.txt is not what it was in the run of .*run.yaml.*aaaa, now bbbb.*give --data",
    ),
    "card of other importance": (
        repeated("importance", "2" * 64), ValueError, "--importance: the file is not what it was",
    ),
    "resume with others": (in_folder({}, resumed), ValueError, "--resume:.*--lr was 0.0001, now 0.001.*--overwrite"),
    "model file": (
        lambda c: _validate_finetune.model_folder("--model", __file__), ValueError, "--model: .*is a file.*folder",
    ),
    "text path": (
        lambda c: _validate_finetune.text_there("--general", "gone.txt"), FileNotFoundError, "--general: there is no",
    ),
    "model not there": (
        lambda c: _validate_finetune.model_folder("--model", "./no"), FileNotFoundError, "--model: ./no: no such",
    ),
    "model empty": (
        in_folder({}, lambda folder: _validate_finetune.model_folder("--model", str(folder))),
        FileNotFoundError, "holds no model: neither config.json nor adapter_config.json",
    ),
    "model of the hub": (
        lambda c: _validate_finetune.model_not_loaded("--model", "no/such", OSError("offline\nmore")),
        ValueError, r"--model: 'no/such' is no folder here, and.*hub either \(offline\)",
    ),
    "model broken": (
        in_folder({}, lambda f: _validate_finetune.model_not_loaded("--model", str(f), OSError("no weights"))),
        ValueError, "--model: transformers cannot load .*: no weights",
    ),
    "device": (
        lambda c: _validate_finetune.device("--device", "cuda", False, True),
        ValueError, "--device: a GPU was asked for, but this torch is built for the CPU only; use --device cpu",
    ),
    "padding": (
        lambda c: _validate_finetune.no_padding("m"), ValueError, "--tokenizer: that of m has neither a pad token",
    ),
    "package": (
        lambda c: _validate_finetune.missing_package(["peft"], "peft", "LoRA"),
        ImportError, r'LoRA needs peft: pip install "alr-kernels\[peft\]"',
    ),
    "there already": (
        lambda c: _validate_finetune.exists("--out", "o"), FileExistsError, "--out: o is there already.*--overwrite",
    ),
    "nothing to resume": (lambda c: _validate_finetune.nothing_to_resume("o"), FileNotFoundError, "--resume: no whole"),
}  # fmt: skip
