"""What phases measure and hold beyond the plain case: other encodings, other trained weights, losses that broke."""

from __future__ import annotations

import time
from types import SimpleNamespace

import finetune_cases as cases
import pytest
import torch
from finetune_cases import record, tune
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
pytest.importorskip("datasets", reason="datasets is not installed")

from alr_kernels import AlrAdamW, Importance
from alr_kernels.finetune import phases

pytestmark = pytest.mark.filterwarnings("ignore:.*")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("measures")
    cases.model_folder(folder / "llama", tie_word_embeddings=False)
    cases.texts(folder)
    return folder


def wide(**more):
    """A model with tensors that are large enough to be encoded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=cases.WORDS, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=0, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_moves_with_and_without_the_pull_are_binned_by_the_same_importance(home, tmp_path):
    model = cases.model_folder(tmp_path / "wide", wide)
    given = {"model": model, "data": str(home / "domain.jsonl"), "general": str(home / "general.jsonl"), "steps": 1}
    settings = cases.settings(
        "run", **given, out=str(tmp_path / "run"), baseline=True, tune_importance_dtype="int4", eval_every=1
    )
    moved = phases.run(settings)["movement"]
    assert sum(moved["tune"]["count"]) == sum(param.numel() for param in wide().parameters())
    assert moved["tune"]["count"] == moved["plain"]["count"]


def test_weights_that_an_adapter_trains_whole_are_held(home, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(home / "llama")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    model = str(tmp_path / "adapter")
    record(home, tmp_path / "lora.safetensors", model=model, steps=2)
    record(home, tmp_path / "full.safetensors", steps=2)
    held = set(Importance.load(tmp_path / "lora.safetensors"))
    assert "lm_head.weight" in held
    for name in ("lora", "full"):
        given = {"model": model, "importance": str(tmp_path / f"{name}.safetensors"), "steps": 1}
        found = tune(home, tmp_path / name, **given)
        assert {row["name"] for row in found["coefficients"]["modules"]} == held, name


def test_a_model_that_the_last_step_broke_is_not_published(home, tmp_path, monkeypatch):
    from alr_kernels.finetune import trainer

    whole = trainer.token_losses

    def broken(model, batch):
        sums, counts = whole(model, batch)
        return sums * float("nan"), counts

    record(home, tmp_path / "i.safetensors", steps=1)
    monkeypatch.setattr(trainer, "token_losses", broken)
    with pytest.raises(RuntimeError, match="tune: expected a finite loss, got nan by step 0"):
        tune(home, tmp_path / "out", importance=str(tmp_path / "i.safetensors"))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "accumulate", "processes", "steps"),
    [
        (10, 1.0, 4, 1, 1, 3),
        (10, 1.0, 4, 2, 1, 2),
        (10, 3.0, 4, 2, 1, 6),  # each pass ends with a step, of fewer batches
        (10, 0.5, 1, 1, 1, 5),
        (10, 0.01, 4, 1, 1, 1),
        (10, 1.0, 2, 1, 2, 3),
    ],
)
def test_steps_of_passes_over_the_data(rows, epochs, batch, accumulate, processes, steps):
    from alr_kernels.finetune.trainer import _steps

    options = SimpleNamespace(batch=batch, accumulate=accumulate)
    phase = SimpleNamespace(steps=None, train=range(rows), epochs=epochs, options=options)
    assert _steps(phase, processes) == steps


def test_time_of_measuring_is_no_time_of_training(home, tmp_path, monkeypatch):
    from alr_kernels.finetune import trainer

    whole = trainer.token_losses

    def slow(model, batch):
        time.sleep(0.5)
        return whole(model, batch)

    monkeypatch.setattr(trainer, "token_losses", slow)
    found = record(home, tmp_path / "i.safetensors", steps=2, eval_every=1, eval_batch=2)
    assert found["seconds"]["evaluate"] > 3 * 0.5
    apart = [line["seconds"] for line in found["curves"]["record"]]
    whole_run = found["seconds"]["record"] + found["seconds"]["evaluate"]
    assert max(apart) <= found["seconds"]["record"] < whole_run - 3 * 0.5


def test_a_run_of_one_step_takes_it(home, tmp_path):
    found = record(home, tmp_path / "i.safetensors", steps=1, eval_every=1)
    with pytest.raises(ValueError, match=r"--lr was 0\.003, now 0\.001"):  # those results are of another run
        record(home, tmp_path / "i.safetensors", steps=1, eval_every=1, lr=1e-3, how={"resume": True})
    assert found["log"]["record"][0]["lr"] == 3e-3
    assert found["after"]["general"]["nll"] < found["before"]["general"]["nll"]


def test_recording_has_its_own_length_and_rate(home, tmp_path):
    given = {"model": str(home / "llama"), "data": str(home / "domain.jsonl"), "general": str(home / "general.jsonl")}
    own = {"record_steps": 3, "record_lr": 1e-3, "schedule": "constant", "warmup": 0.0}
    settings = cases.settings("run", **given, **own, out=str(tmp_path / "run"), steps=1)
    log = phases.run(settings)["log"]
    assert [(entry["step"], entry["lr"]) for entry in log["record"]] == [(1, 1e-3), (2, 1e-3), (3, 1e-3)]
    assert [(entry["step"], entry["lr"]) for entry in log["tune"]] == [(1, 3e-3)]


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [0, 1 / 2, 1, 2 / 3, 1 / 3]),
        ("constant", [0, 1 / 2, 1, 1, 1]),
        ("cosine", [0, 1 / 2, 1, 3 / 4, 1 / 4]),
    ],
)
def test_the_learning_rate_rises_then_falls(home, tmp_path, monkeypatch, schedule, shares):
    """Of five steps two are warm-up, from 0; the cosine of the rest passes 60° and 120°."""
    taken, step = [], AlrAdamW.step

    def watched(self, closure=None):
        taken.append(self.param_groups[0]["lr"])
        return step(self, closure)

    monkeypatch.setattr(AlrAdamW, "step", watched)
    record(home, tmp_path / "i.safetensors", steps=5, warmup=0.4, schedule=schedule, lr=2e-3)
    assert taken == pytest.approx([2e-3 * share for share in shares])


def test_accumulated_batches_make_the_step_of_one_large_batch(home, tmp_path):
    """Tokens weigh the same in whichever micro-batch they are, where dropout does not tell the two apart."""
    model = cases.model_folder(tmp_path / "still", attention_dropout=0.0)
    options = {"model": model, "steps": 3, "weight_decay": 0.1, "loss_on": "all", "packing": False}

    def trained(name, **batches):
        record(home, tmp_path / f"{name}.safetensors", save_model=str(tmp_path / name), **batches, **options)
        return torch.cat([t.flatten() for t in load_file(tmp_path / name / "model.safetensors").values()])

    large, small = trained("large", batch=6), trained("small", batch=2, accumulate=3)
    assert (large - small).norm() < 1e-3 * (large - trained("other", batch=2)).norm()


@pytest.mark.parametrize(("given", "reaches"), [(None, 1.0), (0.25, 0.25), (0, None)])
def test_gradients_are_clipped_within_the_step(home, tmp_path, monkeypatch, given, reaches):
    seen, step = [], AlrAdamW.step

    def watched(self, closure=None):
        seen.append(self.max_grad_norm)
        return step(self, closure)

    monkeypatch.setattr(AlrAdamW, "step", watched)
    record(home, tmp_path / "i.safetensors", steps=2, max_grad_norm=given)
    assert seen == [reaches] * 2
