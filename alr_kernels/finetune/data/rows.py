"""Rows of a source in one form, whatever they came from, each with hashes of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ... import _validate_data as validate
from . import formats, readers
from .files import Found, find
from .formats import CHAT, PAIRS, Format
from .source import Progress, Source
from .store import Store

DIGEST = 16  # bytes of a row's hash
BATCH_ROWS, BATCH_CHARACTERS = 1000, 2**20  # of a batch, whichever is reached first; tokens take some 200 bytes each


@dataclass
class Rows:
    """All rows of a source: ``text`` (a text, a prompt, or messages as JSON), ``completion``, and where they stand.

    ``keys``: [rows] uint64, equal for rows of the same content, and an order that the seed draws;
    ``digests``: [rows, 16] uint8, of the exact content.
    """

    kind: str
    unit: str
    columns: dict[str, list[str]]
    names: list[tuple[str, str]]  # of the tables: (name, what its numbers count)
    files: int
    ignored: int
    blank: int  # rows without any content, left out
    store: Store
    keys: np.ndarray = field(repr=False)
    digests: np.ndarray = field(repr=False)
    table: Any = field(repr=False)

    def place(self, table: int, number: int) -> str:
        """Return where a row stands, for messages."""
        name, unit = self.names[table]
        return f"{name}, {unit} {number}"

    def discard(self) -> None:
        """Give back what the rows take on disk."""
        self.table = None
        self.store.discard()


def read(source: Source, progress: Progress | None = None) -> Rows:
    """Read every row of a source, one batch of them in memory at a time.

    Raises:
        FileNotFoundError, ValueError, TypeError: naming file and row, when there is nothing to read or a row is not as
            its columns promise.
    """
    import pyarrow as pa

    found = find(source)
    names = ("text", "string"), ("completion", "string"), ("table", "int32"), ("number", "int64"), ("ends", "bool")
    store = Store(pa.schema([(name, pa.type_for_alias(kind)) for name, kind in names]))
    reading = _Reading(source, found, store, progress)
    for table in _tables(source, found):
        reading.table(table)
    return reading.done()


def _tables(source: Source, found: Found) -> Iterator[readers.Table]:
    if found.dataset is not None or found.saved is not None:
        yield readers.of_dataset(source.source, _dataset(source, found))
        return
    whole = rows_are_files(source, found)
    for path in found.files:
        table = readers.open_table(path, whole)
        if table is not None:
            yield table
        else:
            validate.not_empty(str(path), alone=len(found.files) == 1)


def rows_are_files(source: Source, found: Found) -> bool:
    """Return whether each text file is one row: when there are so many that a share of them can be held out.

    Otherwise each paragraph is one; so it is in a single file.
    """
    return len(found.files) > 1 and (source.held_out in (0, 1) or source.held_out * len(found.files) >= 1)


def _dataset(source: Source, found: Found) -> Any:
    import datasets

    if found.saved is not None:
        loaded = datasets.load_from_disk(str(found.saved))
        if isinstance(loaded, datasets.DatasetDict):
            validate.hub_options_unused(replace(source, split="train"))
            validate.split_there(source, found.split, list(loaded))
            return loaded[found.split]
        validate.hub_options_unused(source)
        return loaded
    try:
        return datasets.load_dataset(found.dataset, source.subset, split=found.split)
    except Exception as error:
        validate.not_loaded(source, found.split, error)


class _Reading:
    """Gathers rows into a store."""

    def __init__(self, source: Source, found: Found, store: Store, progress: Progress | None) -> None:
        self.source, self.found, self.store, self.progress = source, found, store, progress
        self.given = formats.parse(source)
        self.format: Format | None = None
        self.first = ""  # table that told the format
        self.unit = ""
        self.names: list[tuple[str, str]] = []
        self.keys, self.digests = bytearray(), bytearray()
        self.rows = self.blank = 0
        self.key = source.seed.to_bytes(8, "little")
        self._start_batch()

    def _start_batch(self) -> None:
        self.batch: dict[str, list[Any]] = {name: [] for name in self.store.schema.names}
        self.characters = 0

    def table(self, table: readers.Table) -> None:
        """Take in all rows of a table."""
        flag = self.source.flag("columns")
        if table.columns is None:
            if not self.source.option.endswith("held-out-data"):  # there --columns is for the other data
                validate.columns_unused(flag, self.source.columns, table.name)
            form = Format(formats.TEXT, {"text": ("text",)})
            self.unit = "file" if rows_are_files(self.source, self.found) else "paragraph"
        else:
            form = formats.recognise(table.name, table.columns, self.given, flag)
            self.unit = "row"
        if self.format is not None:
            validate.same_format(self.first, self.format.kind, table.name, form.kind)
        else:
            self.format, self.first = form, table.name
        self.names.append((table.name, table.unit))
        for number, record in table.rows(form.used):
            place = f"{table.name}, {table.unit} {number}"
            text, completion = normal(form, record, place)
            if not (text if completion is None else completion).strip():
                self.blank += 1
            else:
                self._row(text, completion, number, record.get("ends") is True or table.columns is not None, place)

    def _row(self, text: str, completion: str | None, number: int, ends: bool, place: str) -> None:
        content = f"{len(text)}:{text}{completion or ''}"
        same = content if completion is not None else text.strip()  # a paragraph keeps the blank lines after it
        self.digests += hashlib.blake2b(validate.encodable(content, place), digest_size=DIGEST).digest()
        self.keys += hashlib.blake2b(same.encode(), digest_size=8, key=self.key).digest()
        values = (text, completion, len(self.names) - 1, number, ends)
        for column, value in zip(self.batch.values(), values, strict=True):
            column.append(value)
        self.rows += 1
        self.characters += len(content)
        if len(self.batch["text"]) == BATCH_ROWS or self.characters > BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        self.store.append(self.batch)
        self._start_batch()
        if self.progress:
            self.progress("reading", self.rows)

    def done(self) -> Rows:
        """Return what was gathered."""
        validate.some_rows(self.source, self.rows, self.blank)
        self._flush()
        form = self.format
        assert form is not None
        return Rows(
            kind=form.kind,
            unit=self.unit,
            columns={part: list(names) for part, names in form.columns.items()} if self.unit == "row" else {},
            names=self.names,
            files=len(self.found.files),
            ignored=self.found.ignored,
            blank=self.blank,
            store=self.store,
            keys=np.frombuffer(bytes(self.keys), dtype="<u8"),
            digests=np.frombuffer(bytes(self.digests), dtype=np.uint8).reshape(-1, DIGEST),
            table=self.store.table(),
        )


def normal(form: Format, record: dict[str, Any], place: str) -> tuple[str, str | None]:
    """Return a row as (text, None), (prompt, completion) or (messages as JSON, None); ("", None) for no messages."""
    if form.kind == CHAT:
        name = form.columns["messages"][0]
        messages = _messages(validate.cell(record, name, place), f"{place}: {name}")
        return (json.dumps(messages, ensure_ascii=False, default=str) if messages else ""), None
    parts = {}
    for part, names in form.columns.items():
        values = [validate.string(validate.cell(record, name, place), f"{place}: {name}") for name in names]
        parts[part] = "\n\n".join(value for value in values if value) if len(values) > 1 else values[0]
    if form.kind == PAIRS:
        prompt, completion = parts["prompt"], parts["completion"]
        open_seam = prompt and completion and not prompt[-1].isspace() and not completion[0].isspace()
        return prompt + ("\n" if form.seam and open_seam else ""), completion
    return parts["text"], None


ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # of from/value


def _messages(value: Any, place: str) -> list[dict[str, Any]]:
    """Check a conversation; keys that a file format fills with null are left out, other keys are the template's."""
    found = []
    for turn, message in enumerate(validate.conversation(value, place), 1):
        there = {key: part for key, part in message.items() if part is not None}
        if "from" in there and "value" in there and "role" not in there:
            there = {"role": ROLES.get(there["from"], there["from"]), "content": there["value"]}
        validate.message(there, f"{place}: message {turn}")
        found.append(there)
    return found
