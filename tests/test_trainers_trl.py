"""TRL's SFTTrainer: the callback's numbers stand in the same entry as its own."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch
from cases import random_importance
from test_trainers_transformers import rows, tiny_llama

from alr_kernels import Importance

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

from alr_kernels.integrations.transformers import AlrCallback, alr_optimizer  # noqa: E402


def tokenizer_of_bytes():
    """A byte is a token; nothing is downloaded."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), key=ord)
    vocab = {character: index for index, character in enumerate(alphabet[:126])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def test_numbers_and_files_under_sft(tmp_path):
    """Rows are tokens already; gradients are checkpointed, which is TRL's default."""
    model = tiny_llama()
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows(inspect.getsource(textwrap))])
    arguments = trl.SFTConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, max_grad_norm=0.0,
        logging_steps=2, save_steps=3, max_steps=6, per_device_train_batch_size=8,
    )  # fmt: skip
    options = {"lr": 1e-3, "importance": random_importance(model), "stats": True, "record": True}
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=data, processing_class=tokenizer_of_bytes(),
        optimizer_cls_and_kwargs=(alr_optimizer, options),
    )  # fmt: skip
    trainer.add_callback(AlrCallback(trainer))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    optimizer = trainer.optimizer.optimizer
    for entry in entries:
        assert {"mean_token_accuracy", "alr/penalty", "alr/stiffness", "alr/effective_layers"} <= set(entry)
        assert entry["alr/task_loss"] == entry["loss"]
    penalty = sum(float(row["penalty"]) for row in optimizer.stats().values())
    assert entries[-1]["alr/penalty"] == pytest.approx(penalty)
    assert penalty > 0
    saved = Importance.load(tmp_path / "checkpoint-6" / "importance.safetensors")
    recorded = optimizer.recorded_importance()
    assert all(torch.equal(saved[name], recorded[name]) for name in recorded)
    assert (saved.steps, Importance.load(tmp_path / "checkpoint-3" / "importance.safetensors").steps) == (6, 3)
