"""Rows as tokens and labels: what of a row is in the loss, and where a text begins and ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ... import _validate_data as validate
from ...importance.estimators.objectives import IGNORED
from . import packing
from .formats import CHAT, PAIRS


@dataclass
class Document:
    """What is tokenised as one: a row, or neighbouring paragraphs. ``ends``: the text ends where this does."""

    text: str
    completion: str | None
    ends: bool
    table: int
    number: int


class Encoder:
    """Turn documents into (ids, labels).

    Where a tokenizer must be asked how long a part of a text is, the tokens of the part and of the whole are compared:
    the first that differs belongs to what follows. This needs no offsets, and a token that spans the seam between
    prompt and completion is in the loss.

    Args:
        tokenizer: of transformers.
        kind: the format of the documents.
        loss_on: "answers" or "all".
        place: (table, number) → where a row stands, for messages.

    Raises:
        ValueError: for conversations and a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: Any, kind: str, loss_on: str, place: Callable[[int, int], str]) -> None:
        self.tokenizer, self.all, self.place = tokenizer, loss_on == "all", place
        self._encode = {CHAT: self._chats, PAIRS: self._pairs}.get(kind, self._texts)
        self.eos: int | None = tokenizer.eos_token_id
        self.before, self.after = self._added()
        if kind == CHAT:
            validate.chat_template(tokenizer)
            self.marks = tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})

    def __call__(self, documents: Sequence[Document]) -> list[packing.Sequence]:
        """Return (ids, labels) of each document; the first label of each is -100."""
        encoded = self._encode(documents)
        for _, labels in encoded:
            labels[:1] = [IGNORED] * len(labels[:1])
        return encoded

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Tokenise without anything added."""
        if not texts:
            return []
        flags = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return self.tokenizer(texts, add_special_tokens=False, **flags)["input_ids"]

    def _added(self) -> tuple[list[int], list[int]]:
        """Return what stands before and after a text: what the tokenizer adds, and the end of text."""
        bare, full = self._ids(["a"])[0], list(self.tokenizer("a")["input_ids"])
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        before, after = full[:at], full[at + len(bare) :]
        if self.eos is not None and after[-1:] != [self.eos]:
            after = [*after, self.eos]
        return before, after

    def _closed(self, ids: list[int], ends: bool) -> tuple[list[int], int]:
        """Return the tokens with those that stand around them, none twice, and how many stand before."""
        before = [] if self.before and ids[: len(self.before)] == self.before else self.before
        after = [] if not ends or (ids and ids[-1] == self.eos) else self.after
        return [*before, *ids, *after], len(before)

    def _texts(self, documents: Sequence[Document]) -> list[packing.Sequence]:
        found = []
        for document, bare in zip(documents, self._ids([one.text for one in documents]), strict=True):
            ids, _ = self._closed(bare, document.ends)
            found.append((ids, list(ids)))
        return found

    def _pairs(self, documents: Sequence[Document]) -> list[packing.Sequence]:
        prompts = [document.text for document in documents]
        wholes = [document.text + (document.completion or "") for document in documents]
        found = []
        for prompt, bare in zip(self._ids(prompts), self._ids(wholes), strict=True):
            ids, before = self._closed(bare, ends=True)
            start = 0 if self.all else before + _shared(prompt, bare)
            found.append((ids, [IGNORED] * start + ids[start:]))
        return found

    def _chats(self, documents: Sequence[Document]) -> list[packing.Sequence]:
        chats = [json.loads(document.text) for document in documents]
        places = [self.place(document.table, document.number) for document in documents]
        texts = [self._render(chat, place) for chat, place in zip(chats, places, strict=True)]
        spans = [[] if self.all else self._spans(*one) for one in zip(chats, texts, places, strict=True)]
        encoded = []
        for chat, text, ids, found in zip(chats, texts, self._ids(texts), spans, strict=True):
            labels = list(ids) if self.all else [IGNORED] * len(ids)
            for pair in found:
                start, stop = (_shared(part, ids) for part in self._ids([text[:cut] for cut in pair]))
                labels[start:stop] = ids[start:stop]
            if chat[-1]["role"] == "assistant" and self.eos is not None and not text.rstrip().endswith(self.marks):
                ids, labels = [*ids, self.eos], [*labels, self.eos]
            encoded.append((ids, labels))
        return encoded

    def _spans(self, chat: list[dict[str, Any]], text: str, place: str) -> list[tuple[int, int]]:
        """Return (start, end) in the text of all that the assistant says, with what ends its turn.

        It starts after what the template writes to ask for an answer, which must open the text of the whole
        conversation, as what it writes for the conversation up to the end of the turn must.
        """
        found = []
        for turn, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            start = self._render(chat[:turn], place, asking=True) if turn else ""
            end = text if turn + 1 == len(chat) else self._render(chat[: turn + 1], place)
            validate.opens(text, end, place, turn + 1)
            validate.opens(end, start, place, turn + 1)
            found.append((len(start), len(end)))
        return found

    def _render(self, chat: list[dict[str, Any]], place: str, asking: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asking)
        except ImportError:
            raise
        except Exception as error:  # whatever a template meets: its own raise_exception, a missing key, a wrong type
            validate.template_refuses(place, error)


def _shared(part: list[int], whole: list[int]) -> int:
    """Return how many tokens both begin with."""
    if whole[: len(part)] == part:
        return len(part)
    return next(i for i, token in enumerate(part) if i == len(whole) or token != whole[i])
