"""Tokenizers, chat templates and files for tests of data."""

from __future__ import annotations

import functools
import json
import os
import pydoc_data.topics
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alr_kernels.finetune.data import Source, load
from alr_kernels.finetune.data.packing import IGNORED

TOPICS = list(pydoc_data.topics.topics.values())
TEXTS = [{"text": text} for text in TOPICS[10:40]]
PAIRS = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(40)]
NONE_HELD = {"held_out": 0.0}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
FORGETFUL = (  # what the assistant thought is written for its last turn only, as some reasoning models' templates do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('a user speaks first') }}{% endif %}" + CHATML


@functools.cache
def _model() -> str:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(TOPICS[:8], trainer)
    return model.to_str()


def tokenizer(template: str | None = None, adds: str = "", eos: bool = True, **more: Any) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; ``adds``: "<s> $A" or "<s> $A </s>", what it puts around a text."""
    model = Tokenizer.from_str(_model())
    if adds:
        model.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 0), ("</s>", 1)])
    marks = {"bos_token": "<s>", "eos_token": "</s>" if eos else None, **more}
    made = PreTrainedTokenizerFast(tokenizer_object=model, **{name: mark for name, mark in marks.items() if mark})
    made.chat_template = template
    return made


def written(folder: Path, files: dict[str, Any]) -> None:
    """Write files: bytes and strings as they are, lists as JSON lines, other things by their own ``write``."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def loaded(
    files: dict[str, Any], name: str, tokens: Any = None, how: dict[str, Any] | None = None, **source: Any
) -> Any:
    """Write files into an empty folder, and load one of them there, ``source`` as of Source."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder), files)
        os.chdir(folder)
        try:
            return load(Source(name, **source), tokens or tokenizer(), **{"max_length": 32, **(how or {})})
        finally:
            os.chdir(before)


def numbered(rows: int, **more: Any) -> list[dict[str, Any]]:
    """Return that many distinct rows of text."""
    return [{"text": f"text number {i}", **more} for i in range(rows)]


def said(tokens: Any, sequence: dict[str, list[int]]) -> tuple[str, str]:
    """Return the text of a sequence, and that of what is in the loss."""
    learnt = [label for label in sequence["labels"] if label != IGNORED]
    return tokens.decode(sequence["input_ids"]), tokens.decode(learnt)


def same(one: Any, other: Any) -> bool:
    """Return whether two data sets hold the same."""
    return one.to_dict() == other.to_dict()


def chat(*said: str) -> dict[str, Any]:
    """Return a conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]}
