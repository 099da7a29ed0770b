"""From a source to tokenised sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ... import _validate_data as validate
from ...importance.estimators.objectives import IGNORED
from . import packing as sequences
from .formats import TEXT
from .rows import BATCH_CHARACTERS, BATCH_ROWS
from .sides import Side, divide
from .source import Progress, Source, Texts
from .store import Store
from .tokens import Document, Encoder

JOINED_CHARACTERS = 2**20  # of neighbouring paragraphs, at which a document ends


def load(
    source: Source,
    tokenizer: Any,
    *,
    max_length: int,
    packing: bool | None = None,
    loss_on: str = "answers",
    train: bool = True,
    progress: Progress | None = None,
) -> Texts:
    """Read a source, draw what is held out, and tokenise both.

    Rows pass through a batch at a time; rows and tokens are kept in memory while they are few and in files of this
    process otherwise (see ``store.py``), with 24 bytes of hashes for each row. A text file of a folder is read whole,
    and so is a ``.json`` file that holds one array. Every process of a job does all of it for itself, without the
    others: the same rows, drawn by the seed, in the same order.

    Args:
        source: what to read.
        tokenizer: of transformers.
        max_length: tokens of a sequence, at most.
        packing: join texts into sequences of that length; None: where the format is plain text.
        loss_on: "answers" (completions and what the assistant says) or "all" tokens; in plain text all are.
        train: tokenise what is not held out, too.
        progress: told "reading" or "tokenising", and how many rows so far.

    Returns:
        The sets and what is known of them.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: naming file, row and what to do.
    """
    validate.how(max_length, loss_on)
    validate.library()
    validate.wanted(source, train)
    sides = divide(source, train, progress)

    def made(side: Side | None) -> _Sequences | None:
        if side is None:
            return None
        packed = side.rows.kind == TEXT if packing is None else packing
        done = _Sequences(max_length, packed, int(side.mask.sum()))
        done.fill(side, Encoder(tokenizer, side.rows.kind, loss_on, side.rows.place), progress)
        return done

    learnt, measured = made(sides.train if train else None), made(sides.held_out)
    for rows in sides.read():
        rows.discard()
    if learnt:
        validate.something_to_learn(source, learnt.count, learnt.why())
    if measured:
        validate.something_to_measure(source, measured.count, measured.why())
    facts = {"source": source.source, "held_out_source": source.held_out_data, **sides.facts()}
    return Texts(
        learnt.store.dataset() if learnt else None,
        measured.store.dataset() if measured else None,
        facts | _facts(learnt, measured, sum(rows.blank for rows in sides.read())),
    )


def _facts(learnt: _Sequences | None, measured: _Sequences | None, blank: int) -> dict[str, Any]:
    both = [done for done in (learnt, measured) if done]
    return {
        "train_sequences": learnt and learnt.count,
        "held_out_sequences": measured and measured.count,
        "train_tokens": learnt and learnt.tokens,
        "held_out_tokens": measured and measured.tokens,
        "loss_tokens": learnt and learnt.in_loss,
        "held_out_loss_tokens": measured and measured.in_loss,
        "dropped": blank + sum(done.dropped for done in both),
        "truncated": sum(done.truncated for done in both),
        "packed": both[0].packed,
    }


def documents(side: Side, join: bool) -> Iterator[Document]:
    """Yield the rows of a side; ``join``: paragraphs that are neighbours in their file as one document."""
    last: Document | None = None
    parts: list[str] = []
    at = before = -1
    length = 0
    for batch in side.rows.table.to_batches():
        for row in batch.to_pylist():
            at += 1
            if not side.mask[at]:
                continue
            document = Document(**row)
            if last and (not join or last.ends or at != before + 1 or length > JOINED_CHARACTERS):
                yield _joined(last, parts)
                last, parts, length = None, [], 0
            last = last or document
            last.ends = document.ends
            parts.append(document.text)
            length += len(document.text)
            before = at
    if last:
        yield _joined(last, parts)


def _joined(first: Document, parts: list[str]) -> Document:
    first.text = "".join(parts)
    return first


@dataclass
class _Sequences:
    """Makes sequences of documents and counts what becomes of them."""

    limit: int
    packed: bool
    rows: int
    count: int = 0
    tokens: int = 0
    in_loss: int = 0
    dropped: int = 0
    truncated: int = 0
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        import pyarrow as pa

        ids = pa.list_(pa.int32())
        self.store = Store(pa.schema([("input_ids", ids), ("labels", ids)]))

    def fill(self, side: Side, encoder: Encoder, progress: Progress | None) -> None:
        """Tokenise a side into the store."""
        text = side.rows.kind == TEXT
        encoded = self._encoded(documents(side, join=text and self.packed), encoder, progress)
        if text:
            made = (sequences.stream if self.packed else sequences.windows)(encoded, self.limit)
        else:
            made = self._in_loss(self._short(encoded))
            made = sequences.joined(made, self.limit) if self.packed else made
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        waiting = 0
        for ids, labels in self._in_loss(made):
            batch["input_ids"].append(ids)
            batch["labels"].append(labels)
            self.count += 1
            self.tokens += len(ids)
            self.in_loss += len(labels) - labels.count(IGNORED)
            waiting += len(ids)
            if waiting > BATCH_CHARACTERS // 4:  # about as many tokens
                self.store.append(batch)
                batch, waiting = {"input_ids": [], "labels": []}, 0
        self.store.append(batch)

    def why(self) -> str:
        """Return what became of the rows when no sequence came of them."""
        cut = f", {self.truncated} of them cut to {self.limit} tokens" if self.truncated else ""
        return f"{self.rows} rows{cut}, none with a token in the loss"

    def _encoded(
        self, found: Iterator[Document], encoder: Encoder, progress: Progress | None
    ) -> Iterator[sequences.Sequence]:
        done = 0
        for chunk in _chunks(found):
            yield from encoder(chunk)
            done += len(chunk)
            if progress:
                progress("tokenising", done)

    def _short(self, rows: Iterable[sequences.Sequence]) -> Iterator[sequences.Sequence]:
        for row, longer in sequences.truncated(rows, self.limit):
            self.truncated += longer
            yield row

    def _in_loss(self, made: Iterable[sequences.Sequence]) -> Iterator[sequences.Sequence]:
        for ids, labels in made:
            if labels.count(IGNORED) < len(labels):
                yield ids, labels
            else:
                self.dropped += 1


def _chunks(found: Iterator[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in found:
        chunk.append(document)
        characters += len(document.text) + len(document.completion or "")
        if len(chunk) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
