"""What a row is, told by the names of its columns: text, a prompt with its completion, or messages."""

from __future__ import annotations

from dataclasses import dataclass

from ... import _validate_data as validate
from .source import Source

TEXT, PAIRS, CHAT = "text", "prompt/completion", "messages"
SETS: dict[frozenset[str], str] = {
    frozenset({"text"}): TEXT,
    frozenset({"prompt", "completion"}): PAIRS,
    frozenset({"messages"}): CHAT,
}  # what --columns may name → format
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("instruction+input", "output"),
    ("instruction+input", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("input", "target"),
    ("source", "target"),
)
KNOWN: list[tuple[str, dict[str, tuple[str, ...]]]] = []
KNOWN += [(CHAT, {"messages": (name,)}) for name in ("messages", "conversations", "conversation")]
KNOWN += [(PAIRS, {"prompt": tuple(prompt.split("+")), "completion": (completion,)}) for prompt, completion in _PAIRS]
KNOWN += [(TEXT, {"text": (name,)}) for name in ("text", "content", "body", "document")]
PREFERENCES = frozenset({"chosen", "rejected"})


@dataclass(frozen=True)
class Format:
    """The format of rows, and which columns hold each part; several are joined by a blank line."""

    kind: str
    columns: dict[str, tuple[str, ...]]

    @property
    def used(self) -> tuple[str, ...]:
        """Every column that is read."""
        return tuple(name for names in self.columns.values() for name in names)

    @property
    def seam(self) -> bool:
        """Whether a line break goes between prompt and completion where no white space is.

        Columns called prompt and completion are made to be joined; questions and answers are not.
        """
        named = {part: tuple(name.lower() for name in names) for part, names in self.columns.items()}
        return named != {"prompt": ("prompt",), "completion": ("completion",)}


def parse(source: Source) -> Format | None:
    """Return what ``source.columns`` says, None when it says nothing.

    >>> parse(Source("a.csv", columns="prompt=instruction+input, completion=output")).columns["prompt"]
    ('instruction', 'input')
    """
    if source.columns is None:
        return None
    flag = source.flag("columns")
    pairs = [item.partition("=") for item in source.columns.split(",")]
    columns: dict[str, tuple[str, ...]] = {}
    for part, equals, names in pairs:
        found = tuple(name.strip() for name in names.split("+"))
        validate.column_item(flag, source.columns, bool(equals and part.strip() and all(found)))
        columns[part.strip()] = found
    kind = SETS.get(frozenset(columns))
    validate.column_set(flag, source.columns, kind is not None and len(columns) == len(pairs))
    if kind == CHAT:
        validate.column_item(flag, source.columns, len(columns["messages"]) == 1)
    return Format(str(kind), columns)


def recognise(name: str, columns: tuple[str, ...], given: Format | None, flag: str) -> Format:
    """Return the format of rows with these columns.

    Raises:
        ValueError: when a given column is not there, or names fit no format, or more than one.
    """
    if given is not None:
        validate.columns_there(name, given.used, columns, flag)
        return given
    own = {column.lower(): column for column in columns}
    validate.not_preferences(name, columns, own.keys() >= PREFERENCES, flag)
    fits = [
        Format(kind, {part: tuple(own[name] for name in names) for part, names in parts.items()})
        for kind, parts in KNOWN
        if all(name in own for names in parts.values() for name in names)
    ]
    widest = [one for one in fits if not any(set(one.used) < set(other.used) for other in fits)]
    validate.one_format(name, columns, [(one.kind, one.used) for one in widest], flag)
    return widest[0]
