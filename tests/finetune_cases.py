"""Tiny models with tokenizers, texts from the standard library, and settings, for tests of record, tune and run."""

from __future__ import annotations

import inspect
import json
import os
import pydoc_data.topics
import signal
import textwrap
from functools import cache
from pathlib import Path

import torch

from alr_kernels.finetune.progress import Progress

WORDS = 300  # of the tokenizer


@cache
def _byte_pairs():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(prose(20), trainer)
    return tokenizer


def tokenizer(**more):
    """A byte-level one with an end of text and without a pad token."""
    from transformers import PreTrainedTokenizerFast

    options = {"eos_token": "<|end|>"} | more
    return PreTrainedTokenizerFast(tokenizer_object=_byte_pairs(), model_max_length=64, **options)


def llama(**more):
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {"tie_word_embeddings": True, "attention_dropout": 0.1} | more
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=0, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gptj(**more):
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=64, bos_token_id=None,
        eos_token_id=0, **more,
    )  # fmt: skip
    return GPTJForCausalLM(config)


def model_folder(folder, make=llama, dtype=torch.float32, seed=0, **more):
    """Save a model with its tokenizer; return its folder as text."""
    torch.manual_seed(seed)
    make(**more).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def prose(count=40):
    """Paragraphs of Python's documentation."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())][:count]


def texts(folder, rows=24):
    """Write general.jsonl (prose) and domain.jsonl (code); return the two paths as text."""
    code = inspect.getsource(textwrap) + inspect.getsource(json)
    made = {
        "general": [text[:240] for text in prose(rows)],
        "domain": [code[i : i + 240] for i in range(0, 240 * rows, 240)],
    }
    for name, found in made.items():
        lines = [json.dumps({"text": text}) for text in found]
        (Path(folder) / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return str(Path(folder) / "general.jsonl"), str(Path(folder) / "domain.jsonl")


SHORT = {"steps": 6, "batch": 4, "max_length": 32, "save_every": 2, "eval_every": 3, "log_every": 1, "held_out": 0.2}


def resolve(verb, flags):
    from alr_kernels.finetune.settings import resolve

    return resolve(verb, flags)


def settings(verb, **options):
    """Return settings of a short run on the CPU; None takes an option of it away."""
    given = {"device": "cpu", "lr": 3e-3, **SHORT, **options}
    return resolve(verb, {name: value for name, value in given.items() if value is not None})


def record(home, out, *, how=(), progress=None, **options):
    given = {"model": str(home / "llama"), "data": str(home / "general.jsonl"), "out": str(out)} | options
    from alr_kernels.finetune import phases

    return phases.record(settings("record", **given), progress=progress, **dict(how))


def tune(home, out, *, how=(), progress=None, **options):
    given = {
        "model": str(home / "llama"), "data": str(home / "domain.jsonl"), "general": str(home / "general.jsonl"),
        "importance": str(home / "importance.safetensors"), "out": str(out),
    }  # fmt: skip
    given = {key: value for key, value in (given | options).items() if value is not None}
    from alr_kernels.finetune import phases

    return phases.tune(settings("tune", **given), progress=progress, **dict(how))


def bytes_of(folder):
    """Return name → bytes of what a folder's model is made of."""
    names = ("*.safetensors", "config.json", "adapter_config.json", "tokenizer*.json")
    return {path.name: path.read_bytes() for name in names for path in Path(folder).glob(name)}


class Interrupting(Progress):
    """Presses Ctrl-C after given steps of given phases, and remembers what is said."""

    def __init__(self, **after):
        self.after, self.said, self.steps = after, [], []

    def phase(self, name, total, done=0):
        def tick(step, note=""):
            self.steps.append((name, step, note))
            if self.after.get(name) == step:
                del self.after[name]
                os.kill(os.getpid(), signal.SIGINT)

        return tick

    def say(self, text):
        self.said.append(text)
