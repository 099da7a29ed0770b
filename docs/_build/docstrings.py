"""Docstrings as mkdocstrings wants them: doctests in fences, no Sphinx roles, an entry for each parameter."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")
TOGETHER = re.compile(
    r"^(?P<indent> +)(?P<first>\w+)(?P<others>(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +\S.*)*)", re.MULTILINE
)  # an entry of Args that speaks of several parameters
DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)\S.*)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrite every docstring once it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            value = ROLE.sub(r"`\1`", obj.docstring.value)
            if obj.is_function or obj.is_class:
                value = TOGETHER.sub(_apart, value)
            obj.docstring.value = DOCTEST.sub(_fenced, value)


def _fenced(found: re.Match[str]) -> str:
    indent = found["indent"]
    return f"{indent}```python\n{found[0]}\n{indent}```"


def _apart(found: re.Match[str]) -> str:
    """Give each of several parameters an entry of its own; exceptions that are named together stay so."""
    if found["first"][0].isupper():
        return found[0]
    indent, first, others = found["indent"], found["first"], found["others"].removeprefix(", ").split(", ")
    entries = [f"{indent}{first}: {found['text']}", *(f"{indent}{other}: with ``{first}``." for other in others)]
    return "\n".join(entries)
