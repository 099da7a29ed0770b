"""What is refused of models, importance and folders of a run: part of the table of tests/test_validation.py."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import finetune_cases as cases
import torch

from alr_kernels import Importance, _validate_models
from alr_kernels.finetune import models
from alr_kernels.finetune.job import Job
from alr_kernels.finetune.options import ModelOptions
from alr_kernels.finetune.outcome import OF_TUNE, Place
from alr_kernels.finetune.ownership import alone


@cache
def home():
    """A folder with a LLaMA, texts, and importance of several kinds."""
    folder = Path(tempfile.mkdtemp())
    cases.model_folder(folder / "llama")
    cases.model_folder(folder / "halves", dtype=torch.float16)
    cases.texts(folder)
    shapes = {name: param.shape for name, param in cases.llama().named_parameters()}
    ones = {name: torch.ones(shape) for name, shape in shapes.items()}
    queries = {name: value for name, value in ones.items() if "q_proj" in name}
    Importance(queries, method="path_integral_tangent").save(folder / "of-lora.safetensors")
    values = {name: value for name, value in ones.items() if "v_proj" in name}
    Importance(queries | values, method="path_integral_tangent").save(folder / "two.safetensors")
    Importance({f"other.{name}": value for name, value in ones.items()}).save(folder / "other.safetensors")
    Importance({name: torch.ones(3, 3) for name in ones}).save(folder / "wider.safetensors")
    Importance(ones | {"score.weight": torch.ones(2, 2)}).save(folder / "more.safetensors")
    return folder


def load(name="llama", *, trainable=True, **options):
    found = ModelOptions(model=str(home() / name), device="cpu", **options)
    return models.load(found, trainable=trainable)


def cut_model():
    """A folder of a model without one of its weights."""
    from safetensors.torch import load_file, save_file

    folder = Path(tempfile.mkdtemp()) / "cut"
    shutil.copytree(home() / "llama", folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def adapter(kind="IA3"):
    folder = Path(tempfile.mkdtemp())
    config = {"peft_type": kind, "base_model_name_or_path": str(home() / "llama"), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def longer_tokenizer():
    folder = Path(tempfile.mkdtemp())
    tokenizer = cases.tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(5)])
    tokenizer.save_pretrained(folder)
    return str(folder)


def file(data=b"\xff\xfe\xfa"):
    path = Path(tempfile.mkdtemp()) / "template.jinja"
    path.write_bytes(data)
    return str(path)


def run(verb, out=None, how=None, **options):
    from alr_kernels.finetune import phases

    folder = Path(tempfile.mkdtemp())
    name = "i.safetensors" if verb == "record" else "out"
    given = {"model": str(home() / "llama"), "data": str(home() / "general.jsonl"), "out": str(out or folder / name)}
    return getattr(phases, verb)(cases.settings(verb, **given | options), **how or {})


def tune(importance, **options):
    return run("tune", importance=str(home() / importance), **options)


@cache
def within():
    """A folder with a model in a subfolder that a run would delete."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(home() / "llama", folder / "report" / "llama")
    return folder


def begun(folder=None):
    """A folder in which a run began."""
    folder = Path(folder or tempfile.mkdtemp())
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "begun.yaml").touch()
    return folder


def remembered():
    """Go on with a run whose data have become others."""
    place = Place.of_folder(begun(), OF_TUNE)
    job = Job(None, place, None, None, None, True, None, True)
    job.remember("--data", "0123456789abcdef0")
    job.remember("--data", "fedcba98765432100")


def one_pass(**options):
    given = {"model": str(home() / "llama"), "data": str(home() / "general.jsonl"), "device": "cpu", "method": "fisher"}
    from alr_kernels.finetune import phases

    out = str(Path(tempfile.mkdtemp()) / "i.safetensors")
    phases.record(cases.resolve("record", given | {"out": out} | options))


def with_file(name, verb="tune", **options):
    """Begin a run in a folder where something of that name is, that no run left."""
    folder = Path(tempfile.mkdtemp())
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    out = {"out": folder / "i.safetensors" if verb == "record" else folder}
    out |= {"reg_lambda": 0.0} if verb == "tune" else {}
    run(verb, **out | options, how={"overwrite": True})


def at_once():
    """Begin a run where another one is going on."""
    folder = Path(tempfile.mkdtemp())
    with alone(folder / "checkpoints", folder):
        run("tune", out=folder, reg_lambda=0.0)


def cut_off(file):
    """A folder of a model of which a file is cut off, or gone."""
    folder = Path(tempfile.mkdtemp()) / "cut-off"
    shutil.copytree(home() / "llama", folder)
    for path in folder.glob(file):
        content = path.read_bytes()
        path.unlink()
        if path.name == "model.safetensors":
            path.write_bytes(content[: len(content) // 2])
    return str(folder)


REFUSED = {
    "weights that are cut off": (
        lambda c: models.load(ModelOptions(model=cut_off("model.safetensors"), device="cpu"), trainable=False),
        ValueError, "--model: transformers cannot load .*cut-off: .*not fully covered",
    ),
    "a folder without a tokenizer": (
        lambda c: models.load(ModelOptions(model=cut_off("token*"), device="cpu"), trainable=False),
        FileNotFoundError, "tokenizer of --model: the folder .*cut-off holds no tokenizer.*--tokenizer",
    ),
    "files that no run left": (
        lambda c: with_file("checkpoints/mine.txt"), FileExistsError, "--out .*'checkpoints' there, which no run left",
    ),
    "a folder called as a run's model": (
        lambda c: with_file("tuned/mine.gguf", "run", general=str(home() / "general.jsonl")),
        FileExistsError, "--out .*'tuned' there, which no run left",
    ),
    "no importance to replace": (
        lambda c: with_file("i.safetensors", "record"), FileExistsError, r"'i\.safetensors' there, which no run left",
    ),
    "a run that goes on there": (
        lambda c: at_once(), RuntimeError, "--out .*: another run is writing there now; wait",
    ),
    "fp16 weights to train": (
        lambda c: load("halves"), ValueError, r"--dtype: expected bf16 or fp32.*got fp16 of .*halves.*--dtype bf16 or",
    ),
    "a model without all its weights": (
        lambda c: models.load(ModelOptions(model=cut_model()), trainable=False),
        ValueError, r"all its weights in .*cut', got one without 'model\.norm\.weight'; is it",
    ),
    "more tokens than embeddings": (
        lambda c: load(tokenizer=longer_tokenizer()),
        ValueError, "--tokenizer: expected one of at most 300 tokens.*got 305.*belongs to the model",
    ),
    "a chat template that is no text": (
        lambda c: load(chat_template=file()), ValueError, "--chat-template: expected a text file.*template.jinja",
    ),
    "--lora on an adapter": (
        lambda c: models.load(ModelOptions(model=adapter("LORA"), lora="default"), trainable=True),
        ValueError, "--lora: expected none.*its own adapter is trained on.*pass the base model",
    ),
    "an adapter of another kind": (
        lambda c: models.load(ModelOptions(model=adapter()), trainable=True),
        ValueError, "expected a LoRA adapter in .*got one of kind IA3; merge",
    ),
    "targets that the model lacks": (
        lambda c: load(lora="targets=query"),
        ValueError, "--lora: expected targets that name modules.*got 'query'; it has .*'q_proj'",
    ),
    "quantised without adapters": (
        lambda c: load(quantize="nf4"), ValueError, "--quantize nf4: expected adapters to train.*add --lora",
    ),
    "what bitsandbytes says": (
        lambda c: models._not_loaded("m", ModelOptions(model="m", quantize="int8"), ValueError("no\nkernel")),
        ValueError, "--quantize int8: bitsandbytes could not load 'm': no.",
    ),
    "importance of other names": (
        lambda c: tune("other.safetensors"),
        ValueError, r"--importance: expected importance of .*llama', got that of another one in .*other\.safe.*"
        r"'other\.model\.embed_tokens\.weight' of shape \(300, 32\), which is not trained there \(all weights",
    ),
    "importance of other shapes": (
        lambda c: tune("wider.safetensors"),
        ValueError, r"that of another one.*of shape \(3, 3\), which is of shape \(300, 32\) there",
    ),
    "importance of more than the model": (
        lambda c: tune("more.safetensors"), ValueError, r"1 entries more than that has: 'score\.weight'; record it",
    ),
    "LoRA's importance for all weights": (
        lambda c: tune("of-lora.safetensors"),
        ValueError, "was recorded with LoRA and covers 2 of the 20 tensors.*add --lora.*or record without --lora",
    ),
    "a loss that is not finite": (
        lambda c: run("record", lr=1e30, schedule="constant", warmup=0.0, max_grad_norm=0),
        RuntimeError, "record: expected a finite loss, got (nan|inf) by step .*lower --lr",
    ),
    "an estimator on several processes": (
        lambda c: _validate_models.estimator_alone("fisher", 2),
        ValueError, "--method fisher: expected one process, got 2; start",
    ),
    "an estimator of an adapter": (
        lambda c: one_pass(lora="default"),
        ValueError, "--method fisher: expected a model whose own weights.*an adapter",
    ),
    "the model's own folder": (
        lambda c: run("tune", out=home() / "llama", reg_lambda=0.0, how={"overwrite": True}),
        ValueError, "--out .*llama: expected a folder that --model .*llama is not in",
    ),
    "the model within the folder": (
        lambda c: run("tune", out=within(), model=within() / "report" / "llama", reg_lambda=0.0),
        ValueError, "--model .*report/llama is not in",
    ),
    "the model's own folder to save to": (
        lambda c: run("record", save_model=home() / "llama", how={"overwrite": True}),
        ValueError, "--save-model .*llama: expected a folder that --model .*llama is not in",
    ),
    "a model's folder to save to": (
        lambda c: run("record", save_model=home() / "halves"), FileExistsError, "--save-model .*halves: .*no run left",
    ),
    "importance of other adapters": (
        lambda c: tune("of-lora.safetensors", lora="targets=v_proj+up_proj"),
        ValueError, "that of another one.*q_proj",
    ),
    "importance of more adapters": (
        lambda c: tune("two.safetensors", lora="targets=q_proj"),
        ValueError, r"recorded with LoRA, with 2 that have no adapter now: .*v_proj.*; pass the --lora targets it",
    ),
    "a folder with a model that no run left": (
        lambda c: run("tune", out=home() / "halves", reg_lambda=0.0, how={"overwrite": True}),
        ValueError, "--out .*halves: expected a new folder.*config.json without run.yaml",
    ),
    "an unfinished run": (
        lambda c: run("tune", out=begun(), reg_lambda=0.0),
        FileExistsError, "a run that was not finished began there; go on with it by --resume, or.*--overwrite",
    ),
    "data that changed since": (
        lambda c: remembered(),
        ValueError, "--resume: expected --data as it was when .* got fedcba9876543210 in place of 0123456789abcdef;",
    ),
}  # fmt: skip
