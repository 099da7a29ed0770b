"""Hugging Face's Trainer: both phases, the optimizer factory, the callback, and resuming from a checkpoint."""

from __future__ import annotations

import inspect
import json
import logging
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch
from cases import random_importance
from torch import nn
from trainer_cases import OPTIONS, Shadow, assert_same_run

from alr_kernels import AlrAdamW, DynamicCoeffs, Importance, lora_pairs
from alr_kernels.integrations import param_groups

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from alr_kernels.integrations.transformers import AlrCallback, alr_optimizer  # noqa: E402

LENGTH = 48


def rows(text, count=48):
    """Cut text into rows of bytes; a byte is a token."""
    data = text.encode("ascii", "replace")[: LENGTH * count]
    chunks = [list(data[i : i + LENGTH]) for i in range(0, len(data) - LENGTH + 1, LENGTH)]
    return [{"input_ids": chunk, "labels": chunk} for chunk in chunks]


def tiny_llama(seed=0, width=32, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def loss_on(model, data):
    tokens = torch.tensor([row["input_ids"] for row in data])
    with torch.no_grad():
        return float(model.eval()(input_ids=tokens, labels=tokens).loss)


def tune(model, optimizer, data, folder, max_grad_norm):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=8, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no", max_grad_norm=max_grad_norm, seed=0,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None)).train()


# coupled steps explicitly and oscillates where lr·k/D > 2: it needs a smaller λ
@pytest.mark.parametrize(("mode", "strength"), [("proximal", 100.0), ("coupled", 1.0)])
def test_both_phases(tmp_path, mode, strength):
    general, domain = rows(inspect.getsource(textwrap)), rows(inspect.getsource(json) + inspect.getsource(logging))
    model = tiny_llama()
    names = [name for name, _ in model.named_parameters()]

    # max_grad_norm=0: Trainer clips before the step, and ω would then hold clipped gradients times real moves.
    optimizer = AlrAdamW(model.named_parameters(), lr=3e-3, record=True)
    before = loss_on(model, general)
    tune(model, optimizer, general, tmp_path, max_grad_norm=0)
    after = loss_on(model, general)
    assert after < before - 0.2
    recorded = optimizer.recorded_importance(xi=1e-5)
    assert list(recorded) == names
    assert recorded.steps == 6
    drop = sum(row.path_integral_sum for row in recorded.stats.values())
    assert 0.3 * (before - after) < drop < 3 * (before - after)  # steps are large here: the order of magnitude
    recorded.save(tmp_path / "importance.safetensors")

    importance = Importance.load(tmp_path / "importance.safetensors")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = []
    for reg_lambda in (0.0, strength):
        model.load_state_dict(start, strict=False)
        optimizer = AlrAdamW(model.named_parameters(), importance, lr=3e-3, mode=mode, reg_lambda=reg_lambda)
        before = loss_on(model, domain)
        tune(model, optimizer, domain, tmp_path, max_grad_norm=1.0)
        assert loss_on(model, domain) < before
        assert (float(optimizer.penalty()) > 0) is (reg_lambda > 0)
        moved.append(
            sum(
                float((importance[name].double() * (p.detach() - start[name]).double() ** 2).sum())
                for name, p in model.named_parameters()
            )
        )
    assert moved[1] < 0.5 * moved[0], "important weights moved as far with the penalty as without"


def trainer_of(model, data, folder, optimizer, callback=None, **options):
    """Return a Trainer; ``optimizer``: an optimizer, or the keywords of the factory."""
    defaults = {"per_device_train_batch_size": 8, "report_to": "none", "max_grad_norm": 0.0, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=1, use_cpu=True, disable_tqdm=True, seed=3, **defaults | options
    )
    factory = {"optimizer_cls_and_kwargs": (alr_optimizer, optimizer)}
    given = factory if isinstance(optimizer, dict) else {"optimizers": (optimizer, None)}
    trainer = transformers.Trainer(model, arguments, train_dataset=data, **given)
    if callback is not None:
        trainer.add_callback(AlrCallback(trainer, **callback))
    return trainer


def stepped(trainer):
    """Return (model, AlrAdamW) of a trainer, without accelerate's wrapper."""
    return trainer.model, trainer.optimizer.optimizer


# ---------------------------------------------------------------- groups and factory


def gpt2():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40
    )
    return transformers.BertModel(config)


@pytest.mark.parametrize("make", [tiny_llama, gpt2, bert], ids=lambda make: make.__name__)
def test_groups_are_split_as_trainer_splits_them(make, tmp_path):
    model = make()
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)
    groups = param_groups(model, weight_decay=0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    split = [{name for name, _ in group["params"]} for group in groups]
    assert split[0] == {name for name, _ in model.named_parameters() if name in decayed}
    assert split[0] | split[1] == {name for name, _ in model.named_parameters()}
    assert not split[0] & split[1]


def test_groups_know_norms_by_type_and_vectors_by_shape_and_leave_out_what_is_frozen_or_empty():
    model = nn.Sequential(nn.LayerNorm((3, 4)), nn.Linear(4, 2), nn.Linear(2, 2), nn.PReLU(2))
    model[2].weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    model.register_parameter("position_bias", nn.Parameter(torch.ones(2, 2)))
    named = [[name for name, _ in group["params"]] for group in param_groups(model)]
    assert named == [["1.weight"], ["position_bias", "0.weight", "0.bias", "1.bias", "2.bias", "3.weight"]]
    assert len(param_groups(nn.Linear(2, 2, bias=False))) == 1


def test_the_factory_builds_what_trainer_asks_for(tmp_path):
    """Names, decay groups, an importance from a file; every other option reaches the optimizer."""
    model, data = tiny_llama(), rows(inspect.getsource(textwrap), 16)
    importance = Importance(random_importance(model))
    importance.save(tmp_path / "i.safetensors")
    options = {"lr": 2e-3, "importance": tmp_path / "i.safetensors", "weight_decay": 0.2, "mode": "coupled", "seed": 7}
    trainer = trainer_of(model, data, tmp_path, options)
    trainer.train()
    _, optimizer = stepped(trainer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert optimizer.mode == "coupled"
    assert sum(len(group["param_names"]) for group in optimizer.param_groups) == len(importance)
    assert optimizer.state_dict()["param_groups"][0]["importance_fingerprint"] == importance.content_fingerprint
    assert float(optimizer.penalty()) > 0


def test_the_factory_finds_lora_pairs(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    made = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    for how in (True, "given"):
        model = peft.get_peft_model(tiny_llama(), made)
        options = {"lr": 1e-3, "record": True, "lora": True if how is True else lora_pairs(model)}
        trainer = trainer_of(model, rows(inspect.getsource(textwrap), 8), tmp_path, options)
        trainer.train()
        _, optimizer = stepped(trainer)
        assert list(optimizer.recorded_importance()) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    assert "lora_A" in alr_optimizer()(model, lr=1e-3).param_groups[0]["param_names"][0]  # without: element by element


# ---------------------------------------------------------------- what the steps see


class Witness(transformers.TrainerCallback):
    """Takes the shadow along, with the gradients as they are before the step and the scheduler's lr."""

    def __init__(self, model, optimizer, shadow, max_norm):
        self.model, self.optimizer, self.shadow, self.max_norm, self.lrs = model, optimizer, shadow, max_norm, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.lrs.append(self.optimizer.param_groups[0]["lr"])
        self.shadow.adam.param_groups[0]["lr"] = self.lrs[-1]
        grads = {name: param.grad.clone() for name, param in self.model.named_parameters()}
        self.shadow.step(grads, self.max_norm)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_under_warm_up_and_clipping_inside(tmp_path, accumulate):
    model, data = tiny_llama(), rows(inspect.getsource(textwrap))
    importance = random_importance(model)
    optimizer = AlrAdamW(
        model.named_parameters(), importance, "uniform", normalize=False, mode="coupled", record=True,
        max_grad_norm=0.1, **OPTIONS,
    )  # fmt: skip
    shadow = Shadow(model, importance)
    trainer = trainer_of(
        model, data, tmp_path, optimizer, callback={}, warmup_steps=3, lr_scheduler_type="linear",
        gradient_accumulation_steps=accumulate, per_device_train_batch_size=8 // accumulate,
    )  # fmt: skip
    witness = Witness(model, optimizer, shadow, 0.1)
    trainer.add_callback(witness)
    trainer.train()
    assert len(set(witness.lrs)) > 3
    assert witness.lrs[0] < max(witness.lrs) > witness.lrs[-1]
    shadow.check(model, optimizer)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_micro_batches_are_one_step(tmp_path, checkpointing):
    runs = []
    for accumulate in (1, 4):
        model = tiny_llama()
        if checkpointing and accumulate > 1:
            model.gradient_checkpointing_enable()
        optimizer = AlrAdamW(
            model.named_parameters(), random_importance(model), lr=1e-3, eps=1e-3, record=True, reg_lambda=0.5
        )
        options = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
        trainer_of(model, rows(inspect.getsource(textwrap)), tmp_path, optimizer, **options).train()
        runs.append((model, optimizer))
    (model, optimizer), (expected, other) = runs
    assert optimizer.recorded_steps == other.recorded_steps == 6
    assert float(other.penalty()) > 0
    assert float(optimizer.penalty()) == pytest.approx(float(other.penalty()), rel=1e-3)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        for got, wanted in ((a, b), (optimizer.state[a]["path_integral"], other.state[b]["path_integral"])):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.detach().abs().max()))


# ---------------------------------------------------------------- resuming


PHASES = {
    "record": {"record": True},
    "tune": {"reg_lambda": 0.3, "stats": True, "state_dtype": "int8", "importance_dtype": "int8"},
    "tune, balanced": {"coeffs": DynamicCoeffs("uniform", every=2), "mode": "coupled", "reg_lambda": 0.01},
    "tune and record": {"record": True, "anchor_dtype": "bf16", "max_grad_norm": 0.5},
    "LoRA, record": {"lora": True, "record": True},
    "LoRA, tune": {"lora": True, "stats": True, "reg_lambda": 0.3},
}


def model_of(phase, seed=0):
    """Of a LoRA model the base is the same in every run, as a checkpoint holds adapters only."""
    if "LoRA" not in phase:
        return tiny_llama(seed, width=128, attention_dropout=0.2)
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_llama(width=128)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2))


def importance_of(phase):
    model = model_of(phase)
    if "LoRA" not in phase:
        return Importance(random_importance(model))
    return Importance(random_importance((name, torch.empty(128, 128)) for name in lora_pairs(model).importance_names))


@pytest.mark.parametrize("phase", PHASES)
def test_resuming_from_a_checkpoint_is_bit_exact(tmp_path, phase):
    """The second run starts from other weights and takes everything from the checkpoint, in the middle of an epoch."""
    data = rows(inspect.getsource(textwrap))
    options = {"lr": 3e-3, "weight_decay": 0.1} | PHASES[phase]
    if "tune" in phase:
        importance_of(phase).save(tmp_path / "importance.safetensors")
        options["importance"] = tmp_path / "importance.safetensors"
    trainers = []
    for seed, resume in ((0, None), (1, str(tmp_path / "checkpoint-3"))):
        model = model_of(phase, seed)
        trainer = trainer_of(
            model, data, tmp_path, dict(options), callback={"dtype": "int8"}, save_strategy="steps", save_steps=3,
            logging_steps=1, warmup_steps=2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        trainers.append(trainer)
    assert_same_run(stepped(trainers[1]), stepped(trainers[0]))
    history = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in trainers]
    assert [entry["step"] for entry in history[1]] == [1, 2, 3, 4, 5, 6]
    names = [name for name in history[0][-1] if name.startswith("alr/")]
    assert [[entry[name] for name in names] for entry in history[1]] == [
        [entry[name] for name in names] for entry in history[0]
    ]
    if "record" in phase and "tune" not in phase:
        saved = Importance.load(tmp_path / "checkpoint-6" / "importance.safetensors")
        recorded = stepped(trainers[0])[1].recorded_importance(dtype="int8")
        assert saved.steps == 6
        assert all(torch.equal(saved[name], recorded[name]) for name in recorded)


# ---------------------------------------------------------------- the callback


def test_every_report_gets_the_numbers(tmp_path, monkeypatch):
    """TensorBoard's own files hold what the optimizer says of its last step; so does the trainer's log."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model, data = tiny_llama(), rows(inspect.getsource(textwrap))
    options = {"lr": 3e-3, "importance": random_importance(model), "stats": True, "reg_lambda": 0.5}
    trainer = trainer_of(model, data, tmp_path, options, {}, report_to=["tensorboard"], logging_steps=2)
    trainer.train()
    _, optimizer = stepped(trainer)
    time.sleep(0.1)
    found = events.EventAccumulator(str(tmp_path / "events")).Reload()
    logged = {name.removeprefix("train/"): found.Scalars(name) for name in found.Tags()["scalars"]}
    stats = optimizer.stats()
    layers = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    expected = {
        "alr/penalty": sum(float(row["penalty"]) for row in stats.values()),
        "alr/stiffness": max(float(row["stiffness"]) for row in stats.values()),
        "alr/effective_layers": optimizer.coeffs.effective_layers,
        "alr/task_loss": logged["loss"][-1].value,
        **{f"alr/anchor_drift/{layer}": float(stats[layer]["drift_sq"]) ** 0.5 for layer in layers},
    }
    numel = sum(param.numel() for param in model.parameters())
    steps = 4 * len(list(model.parameters()))
    expected["alr/state_bytes"] = 16 * numel + steps  # two moments, anchor, importance, and step counts
    assert {name for name in logged if name.startswith("alr/")} == set(expected)
    for name, value in expected.items():
        assert [entry.step for entry in logged[name]] == [2, 4, 6]
        assert logged[name][-1].value == pytest.approx(value, rel=1e-5)
    assert expected["alr/penalty"] > 0
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert all(last[name] == pytest.approx(value, rel=1e-5) for name, value in expected.items())


def test_without_statistics_the_callback_logs_what_is_known(tmp_path):
    model, data = tiny_llama(), rows(inspect.getsource(textwrap), 16)
    for importance, known in (
        (random_importance(model), {"alr/penalty", "alr/effective_layers", "alr/state_bytes", "alr/task_loss"}),
        (None, {"alr/state_bytes", "alr/task_loss"}),
    ):
        optimizer = AlrAdamW(model.named_parameters(), importance, lr=1e-3)
        trainer = trainer_of(model, data, tmp_path, optimizer, {}, logging_steps=1, max_grad_norm=1.0)
        trainer.train()
        last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
        assert {name for name in last if name.startswith("alr/")} == known
        if importance is not None:
            assert last["alr/penalty"] == float(optimizer.penalty())


def test_only_the_process_that_saves_writes(tmp_path):
    """Under DDP every rank holds the same ω; one writes."""
    model, data = tiny_llama(), rows(inspect.getsource(textwrap), 8)
    trainer = trainer_of(model, data, tmp_path, {"lr": 1e-3, "record": True}, callback={})
    trainer.train()
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, AlrCallback))
    (tmp_path / "checkpoint-1").mkdir()
    file = tmp_path / "checkpoint-1" / "importance.safetensors"
    for should_save in (False, True):
        arguments = SimpleNamespace(output_dir=str(tmp_path), should_save=should_save)
        callback.on_save(arguments, trainer.state, trainer.control)
        assert file.exists() is should_save


def test_steps_within_backward(tmp_path):
    """Trainer's loop and its LR scheduler as they are: the same weights, with one gradient in memory at a time."""
    data, models = rows(inspect.getsource(textwrap)), [tiny_llama(), tiny_llama()]
    for model, attached in zip(models, (False, True), strict=True):
        optimizer = AlrAdamW(model.named_parameters(), lr=3e-3, record=True)
        if attached:
            optimizer.attach_to_backward()
        tune(model, optimizer, data, tmp_path, max_grad_norm=0)
        assert optimizer.recorded_steps == 6
        assert optimizer.param_groups[0]["lr"] == 0
    columns = (model.parameters() for model in (*models, tiny_llama()))
    for param, other, start in zip(*columns, strict=True):
        assert torch.equal(param, other)
        assert not torch.equal(param, start)
