"""Both phases under Hugging Face's Trainer: record on general text, save, load, tune a domain with the penalty on."""

from __future__ import annotations

import inspect
import json
import logging
import textwrap

import pytest
import torch

from alr_kernels import AlrAdamW, Importance

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

LENGTH = 48


def rows(text, count=48):
    """Cut text into rows of bytes; a byte is a token."""
    data = text.encode("ascii", "replace")[: LENGTH * count]
    chunks = [list(data[i : i + LENGTH]) for i in range(0, len(data) - LENGTH + 1, LENGTH)]
    return [{"input_ids": chunk, "labels": chunk} for chunk in chunks]


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=True,
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
