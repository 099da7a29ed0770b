"""The demo's texts, all of them from the running Python's own library: nothing is downloaded.

General: prose, from ``pydoc_data.topics`` and the docstrings of the standard library.
Domain:  standard-library source with docstrings and comments removed.

Train, validation and test never share a file (or a topic), and a file has the same place in both corpora.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "validation", "test")
SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
# Tests and data tables are no code to learn from; the topics are read as prose; site-packages is not the library.
SKIPPED_FOLDERS = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "turtledemo",
        "pydoc_data",
        "ensurepip",
        "encodings",
        "__pycache__",
        "__phello__",
        "config",
    ]
)
LARGEST_FILE = 60_000  # bytes; a few huge modules would otherwise fill a split alone
SHORTEST_SPLIT = 2_000  # bytes
SHORTEST_DOCSTRING = 80  # characters; shorter ones are labels rather than prose


class CorpusError(RuntimeError):
    """This Python's library has too little text."""


@dataclass
class Corpus:
    """One kind of text: split → bytes, and split → the sources that went into it, in order."""

    texts: dict[str, bytes]
    sources: dict[str, list[str]]


@dataclass
class _Filling:
    """Collects text for the three splits until each has its share of ``total`` bytes."""

    total: int
    parts: dict[str, list[bytes]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    sources: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def wants(self, split: str) -> bool:
        return sum(map(len, self.parts[split])) < self.total * SHARES[split]

    def add(self, source: str, text: str) -> None:
        split = split_of(source)
        if text.strip() and self.wants(split):
            self.parts[split].append(text.strip().encode(errors="backslashreplace") + b"\n\n")
            self.sources[split].append(source)

    def filled(self) -> int:
        return sum(len(part) for parts in self.parts.values() for part in parts)

    def full(self) -> bool:
        return not any(self.wants(split) for split in SPLITS)

    def corpus(self) -> Corpus:
        return Corpus({split: b"".join(parts) for split, parts in self.parts.items()}, self.sources)


def _digest(source: str) -> int:
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big")


def split_of(source: str) -> str:
    """Return the split of a file or topic: a function of its name alone, the same on every machine.

    >>> split_of("json/decoder.py") == split_of("json/decoder.py")
    True
    """
    place = _digest(source) / 2**64
    return "train" if place < SHARES["train"] else "validation" if place < 1 - SHARES["test"] else "test"


def library_files() -> Iterator[tuple[str, Path]]:
    """Yield (name relative to the library, path) in an order that depends on the names alone."""
    root = Path(sysconfig.get_paths()["stdlib"])
    kept = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]  # site-packages may be huge
        kept += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    for name in sorted(kept, key=lambda name: (_digest(name), name)):
        path = root / name
        if path.stat().st_size <= LARGEST_FILE:
            yield name, path


def docstrings(tree: ast.Module) -> str:
    """Return the docstrings of a module worth reading, in order, blank lines between them."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(inspect.cleandoc(text) for text in found if text and len(text) >= SHORTEST_DOCSTRING)


class _BareStringsOut(ast.NodeTransformer):
    """Takes out every statement that is only a string (docstrings among them); an emptied block gets a ``pass``."""

    def __init__(self) -> None:
        self.cuts: list[tuple[ast.Expr, str]] = []  # the statement, and what takes its place in the text

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(node, block, None)
            if not isinstance(statements, list) or not any(map(_is_bare_string, statements)):
                continue
            kept = [statement for statement in statements if not _is_bare_string(statement)]
            instead = "" if kept or isinstance(node, ast.Module) else "pass"
            for statement in filter(_is_bare_string, statements):
                self.cuts.append((statement, instead))
                kept, instead = (kept or [ast.Pass()]) if instead else kept, ""
            setattr(node, block, kept)
        return super().generic_visit(node)


def _is_bare_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def code_only(source: str, tree: ast.Module) -> str:
    """Return the source without docstrings, other bare strings, comments, and the lines that this left blank.

    ``tree``, what ``ast.parse(source)`` returned, is changed.

    Raises:
        SyntaxError, ValueError: what is left would be another program (a bare string shared its line with other code).
    """
    transformer = _BareStringsOut()
    wanted = transformer.visit(tree)
    lines: list[str | None] = list(source.split("\n"))
    cuts: list[tuple[int, int, int, int, str]] = []  # first row, column, last row, column, what takes its place
    for node, instead in transformer.cuts:
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        start = len((lines[first] or "").encode()[: node.col_offset].decode())  # ast counts bytes
        end = len((lines[last] or "").encode()[: node.end_col_offset].decode())
        cuts.append((first, start, last, end, instead))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            cuts.append((token.start[0] - 1, token.start[1], token.end[0] - 1, token.end[1], ""))
    for first, start, last, end, instead in sorted(cuts, reverse=True):  # from the end: earlier rows stay in place
        rest = ((lines[first] or "")[:start] + instead + (lines[last] or "")[end:]).rstrip()
        lines[first : last + 1] = [rest or None]
    text = re.sub(r"\n{4,}", "\n\n\n", "\n".join(line for line in lines if line is not None)).strip() + "\n"
    if ast.dump(ast.parse(text)) != ast.dump(wanted):
        raise ValueError("code_only: removing the strings changed the program")
    return text


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave the topics out; docstrings remain
        return {}
    return {f"topic:{name}": text for name, text in topics.items()}


def _parsed(path: Path) -> tuple[str, ast.Module] | None:
    """Return (source, tree) of a file, or None when it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            with tokenize.open(path) as file:
                source = file.read()
            return source, ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, OSError):
        return None


def build(total: int, progress: Callable[[float], None] = lambda share: None) -> tuple[Corpus, Corpus]:
    """Read the library until both corpora hold about ``total`` bytes each (or the library ends).

    Returns:
        (general, domain): see the module's docstring.

    Raises:
        CorpusError: a split of either would be nearly empty.
    """
    general, domain = _Filling(total), _Filling(total)
    for name, text in sorted(_topics().items(), key=lambda item: (_digest(item[0]), item[0])):
        if general.filled() < total // 4:  # a quarter topics, the rest docstrings
            general.add(name, text)
    for name, path in library_files():
        if general.full() and domain.full():
            break
        split = split_of(name)
        parsed = _parsed(path) if general.wants(split) or domain.wants(split) else None
        if parsed is not None:
            source, tree = parsed
            if general.wants(split):
                general.add(name, docstrings(tree))
            if domain.wants(split):
                domain.add(name, _code_or_nothing(source, tree))
        progress((general.filled() + domain.filled()) / (2 * total))
    shortest = min(len(b"".join(parts)) for filling in (general, domain) for parts in filling.parts.values())
    if shortest < SHORTEST_SPLIT:
        raise CorpusError(
            f"expected the standard library's source in {sysconfig.get_paths()['stdlib']!r}, got only {shortest} bytes "
            "for one split; use a Python that was installed with its library's .py files."
        )
    return general.corpus(), domain.corpus()


def _code_or_nothing(source: str, tree: ast.Module) -> str:
    try:
        return code_only(source, tree)
    except (SyntaxError, ValueError, tokenize.TokenError):
        return ""


def read_code(path: Path) -> str:
    """Return one file as the domain corpus holds it; empty where it cannot be used."""
    parsed = _parsed(path)
    return _code_or_nothing(*parsed) if parsed else ""
