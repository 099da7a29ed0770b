"""Which files a source names: one, those of a folder, those of a pattern; or a data set by its id."""

from __future__ import annotations

import glob
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from ... import _validate_data as validate
from ..endings import TABLES, TEXT
from .source import Source

_ABOUT = re.compile(r"(readme|license|licence|changelog)\b", re.IGNORECASE)
_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w\[\]:%+-]+))?")  # owner/name:split


@dataclass(frozen=True)
class Found:
    """What a source names: files in a fixed order, or the id of a data set, or the folder of a saved one."""

    files: tuple[Path, ...] = ()
    ignored: int = 0  # files of a folder that are not data
    dataset: str | None = None  # a hub id
    split: str = "train"
    saved: Path | None = None  # a folder that Dataset.save_to_disk left


def find(source: Source) -> Found:
    """Return what ``source.source`` names: a file or folder goes before a hub id, and an id before a pattern.

    Raises:
        FileNotFoundError, ValueError: when it names nothing, or a folder without data or with two sorts of them.
    """
    named, path = _ID.fullmatch(source.source), Path(source.source).expanduser()
    if not is_local(source.source) and named:
        return Found(dataset=named[1], split=named[2] or source.split)
    if path.is_dir():
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            return Found(saved=path, split=source.split)
        found = _of_folder(source, path)
    elif path.exists():
        found = Found(files=(path,))
    elif glob.has_magic(source.source):
        names = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        validate.matched(source, names)
        found = Found(files=tuple(map(Path, names)))
    else:
        validate.no_such_file(source)
    validate.hub_options_unused(source)
    return found


def is_local(name: str) -> bool:
    """Return whether a name is no hub id: it is there, or is not written as ids are, or ends as files of data do."""
    if Path(name).exists() or not _ID.fullmatch(name):
        return True
    return name.startswith(".") or Path(name).suffix.lower() in (*TEXT, *TABLES)


def held_out_source(source: Source) -> Source:
    """Return ``source.held_out_data`` as a source of which every row is measured on; the split is its own."""
    name = str(source.held_out_data)
    flag = source.flag("held-out-data")
    named = replace(source, source=name, held_out=1.0, held_out_data=None, max_rows=None, split="train", option=flag)
    return replace(named, subset=None) if is_local(name) else named


def _of_folder(source: Source, folder: Path) -> Found:
    """Take the files with known endings; hidden ones and what a table's folder says of itself are no data."""
    inside = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    seen = [path for path in inside if not any(part.startswith(".") for part in path.parts)]
    texts = [path for path in seen if path.suffix.lower() in TEXT]
    tables = [path for path in seen if path.suffix.lower() in TABLES]
    if tables:
        texts = [path for path in texts if not _ABOUT.match(path.name)]
    endings = Counter(path.suffix.lower() or path.name for path in seen)
    validate.folder(source, texts, tables, [ending for ending, _ in endings.most_common()])
    files = texts or tables
    return Found(files=tuple(folder / path for path in files), ignored=len(inside) - len(files))
