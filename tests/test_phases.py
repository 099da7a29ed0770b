"""record, tune and run in one process: what they leave, what it says, and that it is the same every time."""

from __future__ import annotations

import json
import math
import os
import signal

import finetune_cases as cases
import pytest
import torch
import yaml
from finetune_cases import record, tune

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
pytest.importorskip("datasets", reason="datasets is not installed")

from alr_kernels import Importance
from alr_kernels.finetune import models, phases
from alr_kernels.finetune.data import Collator, Source, load
from alr_kernels.finetune.evaluation import nll
from alr_kernels.finetune.options import ModelOptions
from alr_kernels.finetune.progress import Progress, Stopped

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")
LORA = "r=4,alpha=8,targets=q_proj+v_proj+up_proj"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a LLaMA, its texts, its importance and that of a LoRA run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("phases")
    cases.model_folder(folder / "llama")
    cases.texts(folder)
    record(folder, folder / "importance.safetensors", save_model=str(folder / "recorded"))
    record(folder, folder / "of-lora.safetensors", lora=LORA)
    return folder


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def no_nan(value):
    json.dumps(value, allow_nan=False)
    return True


# ---------------------------------------------------------------- record


def test_record_leaves_importance_card_and_metrics(home, tmp_path):
    out = tmp_path / "new" / "i.safetensors"
    found = record(home, out, importance_dtype="int8", xi=0.1)
    assert names(tmp_path) == ["new/i.metrics.jsonl", "new/i.run.yaml", "new/i.safetensors"]
    importance = Importance.load(out)
    assert set(importance) == {name for name, _ in cases.llama().named_parameters()}
    assert (importance.method, importance.steps, importance.xi, importance.relative) == ("path_integral", 6, 0.1, True)
    assert found["importance"]["fingerprint"] == importance.content_fingerprint
    assert found["importance"]["bytes"] == out.stat().st_size
    assert no_nan(found)
    assert found["after"]["general"]["nll"] < found["before"]["general"]["nll"]
    assert [entry["step"] for entry in found["log"]["record"]] == [1, 2, 3, 4, 5, 6]
    said = yaml.safe_load(out.with_name("i.run.yaml").read_text())
    assert said["verb"] == "record"
    assert said["metrics"]["after"] == found["after"]
    assert said["data"]["data"]["fingerprint"] == found["data"]["general"]["fingerprint"]


def test_the_same_command_writes_the_same_bytes(home, tmp_path):
    for name in "ab":
        record(home, tmp_path / f"{name}.safetensors")
        tune(home, tmp_path / name)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == (home / "importance.safetensors").read_bytes()
    assert cases.bytes_of(tmp_path / "a") == cases.bytes_of(tmp_path / "b")
    other = tune(home, tmp_path / "c", seed=1)
    assert other["model"]["name"] == str(home / "llama")
    assert cases.bytes_of(tmp_path / "a")["model.safetensors"] != cases.bytes_of(tmp_path / "c")["model.safetensors"]


def test_measuring_and_logging_change_nothing(home, tmp_path):
    """There is dropout: a random number drawn by a measurement would show."""
    tune(home, tmp_path / "often", eval_every=1, log_every=1, save_every=1)
    tune(home, tmp_path / "never", eval_every=100, log_every=5, general=None, save_every=100, stats=False)
    often, never = (cases.bytes_of(tmp_path / name) for name in ("often", "never"))
    assert often["model.safetensors"] == never["model.safetensors"]


def test_recording_may_begin_later(home, tmp_path):
    record(home, tmp_path / "late.safetensors", record_after=0.5)
    late = Importance.load(tmp_path / "late.safetensors")
    assert late.steps == 3
    assert late.content_fingerprint != Importance.load(home / "importance.safetensors").content_fingerprint


@pytest.mark.parametrize("method", ["fisher", "mas", "magnitude-gradient"])
def test_other_methods_go_on_where_they_were_interrupted(home, tmp_path, method):
    given = {"model": str(home / "llama"), "data": str(home / "general.jsonl"), "method": method, "device": "cpu"}
    given |= {"batch": 8, "max_length": 32, "held_out": 0.2}

    def settings(name):
        return cases.resolve("record", {**given, "out": str(tmp_path / f"{name}.safetensors")})

    found = phases.record(settings("whole"))
    assert found["importance"]["method"] == method.replace("-", "_")
    assert found["before"] == found["after"]
    assert found["after"]["general"]["tokens"] > 100
    with pytest.raises(KeyboardInterrupt):
        phases.record(settings("again"), progress=cases.Interrupting(**{f"{method} importance": 3}))
    assert not (tmp_path / "again.safetensors").exists()
    progress = cases.Interrupting()
    phases.record(settings("again"), resume=True, progress=progress)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not (tmp_path / "again.work").exists()


# ---------------------------------------------------------------- tune


def test_tune_leaves_a_plain_model_and_results(home, tmp_path):
    out = tmp_path / "tuned"
    found = tune(home, out)
    assert names(out) == [
        *("config.json", "generation_config.json", "metrics.jsonl", "model.safetensors", "results.json", "run.yaml"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert json.loads((out / "results.json").read_text()) == found
    assert no_nan(found)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (home / "llama", out))
    assert before == after, "training must not change the configuration"
    texts, tokenizer = {}, cases.tokenizer()
    for kind in ("domain", "general"):
        texts[kind] = load(
            Source(str(home / f"{kind}.jsonl"), held_out=0.2), tokenizer, max_length=32, train=False
        ).held_out
    for when, folder in (("before", home / "llama"), ("after", out)):
        for kind, rows in texts.items():
            measured = nll(loaded(folder), rows, Collator(tokenizer), 3)
            assert found[when][kind]["nll"] == pytest.approx(measured.nll, rel=1e-6)
            assert found[when][kind]["tokens"] == measured.tokens
    curve = found["curves"]["tune"]
    assert [point["step"] for point in curve] == [0, 3, 6]
    assert [curve[0]["domain"], curve[-1]["general"]] == [
        found["before"]["domain"]["nll"],
        found["after"]["general"]["nll"],
    ]
    assert found["summary"]["domain_gain"] == found["before"]["domain"]["nll"] - found["after"]["domain"]["nll"]
    assert found["summary"]["forgetting"] == found["after"]["general"]["nll"] - found["before"]["general"]["nll"]


def test_results_say_what_the_pull_did_and_what_it_cost(home, tmp_path):
    found = tune(home, tmp_path / "tuned", reg_lambda=3.0)
    log = found["log"]["tune"]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["penalty"] > 0
    assert log[-1]["stiffness"] > 0
    assert set(log[-1]["drift"]) == {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"}
    assert set(found["coefficients"]["values"]) == set(log[-1]["drift"])
    assert sum(row["share"] for row in found["coefficients"]["modules"]) == pytest.approx(1)
    parameters = found["model"]["parameters"]
    assert found["model"]["trained_parameters"] == parameters == sum(p.numel() for p in cases.llama().parameters())
    assert sum(found["movement"]["tune"]["count"]) == parameters
    weights = 4 * parameters
    held = found["cost"]["bytes"]
    assert [held["importance"], held["anchor"], held["moments"]] == [weights, weights, 2 * weights]
    times = found["cost"]["step_ms"]["tune"]
    assert 0 < times["optimizer"] < times["whole"]
    assert found["cost"]["artifact_bytes"] == (home / "importance.safetensors").stat().st_size
    free = tune(home, tmp_path / "free", reg_lambda=0.0)
    moved = [sum(n * (m or 0) for n, m in zip(x["count"], x["mean_square_move"], strict=True))
             for x in (found["movement"]["tune"], free["movement"]["tune"])]  # fmt: skip
    assert moved[0] < 0.9 * moved[1]


def test_lambda_0_is_adamw(home, tmp_path):
    with_file = tune(home, tmp_path / "file", reg_lambda=0.0)
    without = tune(home, tmp_path / "none", reg_lambda=0.0, importance=None)
    assert with_file["movement"] is not None
    assert (without["movement"], without["importance"], without["coefficients"]) == (None, None, None)
    files = [cases.bytes_of(tmp_path / name)["model.safetensors"] for name in ("file", "none")]
    assert files[0] == files[1]


def test_options_reach_the_optimizer(home, tmp_path, monkeypatch):
    from alr_kernels.finetune import trainer

    seen = {}
    monkeypatch.setattr(trainer.PhaseTrainer, "run", lambda self, resume: seen.update(self.phase.optimizer) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune(
            home, tmp_path / "x", betas="0.8,0.99", eps=1e-7, weight_decay=0.1, max_grad_norm=0, state_dtype="int8",
            precise=False, stats=False, backend="reference", seed=5, coeffs="softmax", temperature="2.5",
            layers_by="module", rebalance_every=7, mode="coupled", normalize=False, tune_importance_dtype="int4",
            anchor_dtype="bf16", reg_lambda=0.5,
        )  # fmt: skip
    coeffs = seen.pop("coeffs")
    assert (coeffs.every, coeffs.rule.by, coeffs.rule.temperature) == (7, "module", 2.5)
    assert list(seen.pop("importance")) == list(Importance.load(home / "importance.safetensors"))
    assert seen == {
        "lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.1, "max_grad_norm": None,
        "state_dtype": "int8", "master": "none", "precise": False, "stats": False, "backend": "reference", "seed": 5,
        "lora": False, "mode": "coupled", "normalize": False, "importance_dtype": "int4", "anchor_dtype": "bf16",
        "reg_lambda": 0.5,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*checkpointing.*")
def test_a_gptj_in_bf16_with_recomputation_and_accumulation(home, tmp_path):
    folder = cases.model_folder(tmp_path / "gptj", cases.gptj, torch.bfloat16)
    file = tmp_path / "gptj" / "generation_config.json"  # one that transformers reads but would not write
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.5}))
    options = {"gradient_checkpointing": True, "batch": 2, "accumulate": 2}
    record(home, tmp_path / "i.safetensors", model=folder, **options)
    found = tune(home, tmp_path / "out", model=folder, importance=str(tmp_path / "i.safetensors"), **options)
    assert (found["model"]["architecture"], found["model"]["dtype"]) == ("GPTJForCausalLM", "bf16")
    assert found["cost"]["bytes"]["other"] > 2 * found["model"]["parameters"]  # the split master's remainders
    assert loaded(tmp_path / "out").dtype is torch.bfloat16
    assert loaded(tmp_path / "out").generation_config.temperature == 0.5
    assert found["after"]["domain"]["nll"] < found["before"]["domain"]["nll"]


def test_nothing_held_out_nothing_measured(home, tmp_path):
    found = record(home, tmp_path / "i.safetensors", held_out=0.0, eval_every=None, steps=2, tensorboard=True)
    assert found["before"] == found["after"] == {"general": None}
    assert found["curves"] == {"record": []}
    assert list((tmp_path / "i.tensorboard" / "record").glob("events*"))


# ---------------------------------------------------------------- LoRA


def test_lora_leaves_an_adapter_that_peft_loads(home, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    of_lora = str(home / "of-lora.safetensors")
    found = tune(home, tmp_path / "adapter", lora=LORA, importance=of_lora, reg_lambda=0.01)
    assert names(tmp_path / "adapter") == [
        *("adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "results.json", "run.yaml"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert found["model"]["space"] == "lora"
    assert found["model"]["lora"] == {
        "r": 4, "alpha": 8, "targets": ["q_proj", "up_proj", "v_proj"], "dropout": 0.0, "rslora": False
    }  # fmt: skip
    assert found["coefficients"]["by"] == "module"
    assert set(Importance.load(of_lora)) == {row["name"] for row in found["coefficients"]["modules"]}
    assert all(name.endswith(("q_proj.weight", "v_proj.weight", "up_proj.weight")) for name in Importance.load(of_lora))
    model = peft.PeftModel.from_pretrained(loaded(home / "llama"), tmp_path / "adapter")
    rows = load(
        Source(str(home / "domain.jsonl"), held_out=0.2), cases.tokenizer(), max_length=32, train=False
    ).held_out
    measured = nll(model, rows, Collator(cases.tokenizer()), 4)
    assert found["after"]["domain"]["nll"] == pytest.approx(measured.nll, rel=1e-6)

    onwards = tune(home, tmp_path / "on", model=str(tmp_path / "adapter"), importance=of_lora, reg_lambda=0.01)
    assert onwards["before"]["domain"]["nll"] == pytest.approx(measured.nll, rel=1e-6)
    assert onwards["model"]["lora"] == found["model"]["lora"]
    on = models.load(ModelOptions(model=str(tmp_path / "on"), device="cpu"), trainable=False)
    assert not any(param.requires_grad for param in on.model.parameters())
    assert nll(on.model, rows, Collator(on.tokenizer), 4).nll == pytest.approx(
        onwards["after"]["domain"]["nll"], rel=1e-6
    )


def test_importance_of_all_weights_serves_lora(home, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    progress = cases.Interrupting()
    found = tune(home, tmp_path / "adapter", lora=LORA, progress=progress)
    assert any("the 6 tensors that have an adapter are taken" in text for text in progress.said)
    assert len(found["coefficients"]["modules"]) == 6


# ---------------------------------------------------------------- run


def test_run_does_all_of_it(home, tmp_path):
    given = {"model": str(home / "llama"), "data": str(home / "domain.jsonl"), "general": str(home / "general.jsonl")}
    found = phases.run(cases.settings("run", **given, out=str(tmp_path / "run"), baseline=True, reg_lambda=2.0))
    out = tmp_path / "run"
    assert sorted(path.name for path in out.iterdir()) == [
        "importance.safetensors", "metrics.jsonl", "plain", "results.json", "run.yaml", "tuned"
    ]  # fmt: skip
    assert (out / "importance.safetensors").read_bytes() == (home / "importance.safetensors").read_bytes()
    tune(home, tmp_path / "tuned", reg_lambda=2.0)
    tune(home, tmp_path / "plain", reg_lambda=0.0, importance=None)
    for name in ("tuned", "plain"):
        assert cases.bytes_of(out / name) == cases.bytes_of(tmp_path / name), name
    assert json.loads((out / "results.json").read_text()) == found
    assert no_nan(found)
    assert set(found["curves"]) == set(found["movement"]) == {"tune", "plain"}
    assert set(found["log"]) == {"record", "tune", "plain"}
    assert set(found["seconds"]) == {"record", "tune", "plain", "evaluate"}
    assert found["movement"]["tune"]["count"] == found["movement"]["plain"]["count"]
    squares = {
        name: math.fsum(m or 0 for m in found["movement"][name]["mean_square_move"]) for name in ("tune", "plain")
    }
    assert 0 < squares["tune"] < squares["plain"]
    assert found["summary"]["plain_domain_gain"] == found["before"]["domain"]["nll"] - found["plain"]["domain"]["nll"]


def test_run_may_tune_what_recording_made(home, tmp_path):
    given = {"model": str(home / "llama"), "data": str(home / "domain.jsonl"), "general": str(home / "general.jsonl")}
    found = phases.run(cases.settings("run", **given, out=str(tmp_path / "run"), start_from="recorded"))
    tune(home, tmp_path / "tuned", model=str(home / "recorded"))
    assert cases.bytes_of(tmp_path / "run" / "recorded") == cases.bytes_of(home / "recorded")
    assert cases.bytes_of(tmp_path / "run" / "tuned") == cases.bytes_of(tmp_path / "tuned")
    assert found["model"]["name"] == str(home / "llama")
    assert found["files"]["recorded"] == str(tmp_path / "run" / "recorded")


# ---------------------------------------------------------------- interrupted


def test_ctrl_c_finishes_the_step_and_resume_ends_with_the_same_bytes(home, tmp_path):
    out = tmp_path / "i.safetensors"
    progress = cases.Interrupting(record=2)
    with pytest.raises(Stopped) as stopped:
        record(home, out, progress=progress)
    assert stopped.value.step == 3
    assert stopped.value.checkpoint == tmp_path / "i.work"
    assert names(tmp_path / "i.work")
    assert not out.exists()
    assert "stopping after this step; once more stops at once" in progress.said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(Stopped):
        record(home, out, how={"resume": True}, progress=cases.Interrupting(record=6))  # measuring, at the end
    found = record(home, out, how={"resume": True})
    assert out.read_bytes() == (home / "importance.safetensors").read_bytes()
    assert not (tmp_path / "i.work").exists()
    whole = [json.loads(line) for line in (home / "importance.metrics.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (tmp_path / "i.metrics.jsonl").read_text().splitlines()]
    timed = ("time", "seconds")
    assert [{k: v for k, v in line.items() if k not in timed} for line in again] == [
        {k: v for k, v in line.items() if k not in timed} for line in whole
    ]
    finished = cases.Interrupting()
    assert record(home, out, how={"resume": True}, progress=finished)["importance"] == found["importance"]
    assert finished.said == [f"{out}: this run is finished; nothing is left to do"]


def test_a_second_ctrl_c_stops_at_once(home, tmp_path):
    class Twice(Progress):
        def say(self, text):
            os.kill(os.getpid(), signal.SIGINT)

        def phase(self, name, total, done=0):
            return lambda step, note="": step == 3 and "loss" in note and os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        record(home, tmp_path / "i.safetensors", progress=Twice())
    assert not isinstance(caught.value, Stopped)
    record(home, tmp_path / "i.safetensors", how={"resume": True})
    assert (tmp_path / "i.safetensors").read_bytes() == (home / "importance.safetensors").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "i.metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6], "what the steps after the checkpoint wrote is written once"


# ---------------------------------------------------------------- what is there already


def test_a_result_is_replaced_only_when_asked(home, tmp_path):
    out = tmp_path / "tuned"
    tune(home, out)
    (out / "notes.txt").write_text("mine")
    first = cases.bytes_of(out)
    with pytest.raises(FileExistsError, match="--overwrite"):
        tune(home, out, seed=1)
    assert cases.bytes_of(out) == first
    tune(home, out, seed=1, how={"overwrite": True})
    assert cases.bytes_of(out)["model.safetensors"] != first["model.safetensors"]
    assert (out / "notes.txt").read_text() == "mine"


def test_an_unfinished_run_is_gone_on_with_or_begun_anew(home, tmp_path):
    with pytest.raises(Stopped):
        tune(home, tmp_path / "t", progress=cases.Interrupting(tune=2))
    with pytest.raises(FileExistsError, match="--resume, or begin anew with --overwrite"):
        tune(home, tmp_path / "t")
    with pytest.raises(ValueError, match=r"--lr was 0\.003, now 0\.001"):
        tune(home, tmp_path / "t", lr=1e-3, how={"resume": True})
    tune(home, tmp_path / "t", how={"overwrite": True})
    assert not (tmp_path / "t" / "checkpoints").exists()
    with pytest.raises(FileNotFoundError, match="leave --resume out"):
        tune(home, tmp_path / "nowhere", how={"resume": True})
