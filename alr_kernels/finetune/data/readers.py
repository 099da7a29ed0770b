"""Files as rows: (number, {column: value}), each number the one that a message names.

``datasets`` has builders for these files, too. They are not used here because they type every column of a file, also
those that nothing reads (one with numbers and words in it fails; a CSV cell "NA" is read as missing, "12" as a number),
do not say which row is wrong, and write into one cache for which the processes of a job race.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import _validate_data as validate

Row = tuple[int, dict[str, Any]]
CHUNK = 1000  # rows that are decoded at a time


@dataclass(frozen=True)
class Table:
    """Rows of a file or data set; ``rows(columns)`` decodes these columns where the form can tell them apart."""

    name: str
    unit: str  # what a row's number counts: "line", "row" or "paragraph"
    columns: tuple[str, ...] | None  # None: text without columns
    rows: Callable[[Sequence[str]], Iterator[Row]]


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its end) of a UTF-8 file, with or without a byte order mark."""
    position = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                validate.encoding(str(path), number, position + error.start, raw[error.start])
            if "\0" in line:  # UTF-16 without a mark, or no text at all
                at = raw.index(0)
                validate.encoding(str(path), number, position + at, 0)
            position += len(raw)
            yield number, line


def open_table(path: Path, whole: bool) -> Table | None:
    """Return the rows of a file, None for an empty one; ``whole``: a text file is one row, not its paragraphs.

    An ending that is not known is read as text: the user named the file.
    """
    ending = path.suffix.lower()
    if path.is_file() and not path.stat().st_size:
        return None
    if ending == ".parquet":
        return _parquet(path)
    if ending in (".csv", ".tsv"):
        return _csv(path, "\t" if ending == ".tsv" else None)
    if ending in (".jsonl", ".ndjson", ".json"):
        return _json(path)
    rows = whole_text if whole else paragraphs
    return Table(str(path), "line", None, lambda _: rows(path))


def whole_text(path: Path) -> Iterator[Row]:
    """Yield the text of a file as one row."""
    yield 1, {"text": "".join(line for _, line in lines(path)).replace("\r\n", "\n"), "ends": True}


def paragraphs(path: Path) -> Iterator[Row]:
    """Yield (number of its first line, paragraph with the blank lines after it); the last of the file ``ends``.

    Joined they are the text of the file, but for blank lines before the first.
    """
    gathered: list[str] = []
    start, blank = 1, False
    for number, line in lines(path):
        line = line.replace("\r\n", "\n")
        if line.strip() and (blank or not gathered):
            if gathered:
                yield start, {"text": "".join(gathered), "ends": False}
            gathered, start, blank = [], number, False
        elif not line.strip():
            blank = True
        if gathered or line.strip():
            gathered.append(line)
    if gathered:
        yield start, {"text": "".join(gathered), "ends": True}


def _json(path: Path) -> Table | None:
    """Read JSON lines; a .json file may be one array of objects instead, which is parsed in memory."""
    if (
        path.suffix.lower() == ".json"
        and next((line for _, line in lines(path) if line.strip()), "").lstrip()[:1] == "["
    ):
        rows, unit = _json_array, "row"
    else:
        rows, unit = _json_lines, "line"
    first = next(rows(path), None)
    return first and Table(str(path), unit, tuple(first[1]), lambda _: rows(path))


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            validate.not_json(str(path), number, error)
        except RecursionError:
            validate.too_deep(f"{path}, line {number}")
        except ValueError as error:
            validate.long_number(f"{path}, line {number}", error)
        yield number, validate.json_object(f"{path}, line {number}", value)


def _json_array(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in lines(path))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        validate.not_json(str(path), error.lineno, error)
    except RecursionError:
        validate.too_deep(str(path))
    except ValueError as error:
        validate.long_number(str(path), error)
    for number, value in enumerate(values, 1):
        yield number, validate.json_object(f"{path}, row {number}", value)


def _csv(path: Path, delimiter: str | None) -> Table | None:
    """Read rows under a header; every value is a string. The header tells which of , ; and tab parts the fields."""
    header = next((line for _, line in lines(path) if line.strip()), None)
    if header is None:
        return None
    parts = delimiter or next((mark for mark in ",;\t" if mark in header), ",")
    records = _csv_records(path, parts)
    columns = tuple(name.strip() for name in next(records)[1])
    validate.csv_header(str(path), columns)

    def rows(_: Sequence[str]) -> Iterator[Row]:
        for number, fields in _csv_records(path, parts, skip=1):
            validate.csv_fields(f"{path}, line {number}", len(fields), len(columns))
            yield number, dict(zip(columns, fields, strict=True))

    return Table(str(path), "line", columns, rows)


def _csv_records(path: Path, delimiter: str, skip: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, fields) of every record that is not blank."""
    csv.field_size_limit(2**31 - 1)  # a field is a document; csv's own limit is 128 KiB
    reader = csv.reader((line for _, line in lines(path)), delimiter=delimiter, strict=True)
    before = 0
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            validate.not_csv(f"{path}, line {before + 1}", error)
        if fields and skip:
            skip -= 1
        elif fields:
            yield before + 1, fields
        before = reader.line_num


def _parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        validate.not_parquet(str(path), error)

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        number = 0
        batches = file.iter_batches(CHUNK, columns=list(columns))
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (pa.ArrowInvalid, OSError) as error:
                validate.not_parquet(str(path), error)
            for row in batch.to_pylist():
                number += 1
                yield number, row

    return Table(str(path), "row", tuple(file.schema_arrow.names), rows)


def of_dataset(name: str, dataset: Any) -> Table:
    """Return the rows of a ``datasets.Dataset``."""

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        number = 0
        for chunk in dataset.select_columns(list(columns)).iter(CHUNK):
            for values in zip(*chunk.values(), strict=True):
                number += 1
                yield number, dict(zip(chunk, values, strict=True))

    return Table(name, "row", tuple(dataset.column_names), rows)
