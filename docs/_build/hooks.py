"""What mkdocs does besides: formulas become MathML, and the page of commands is made from the commands themselves."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs runs this file by its path

import commands

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the reference of the commands."""
    return markdown.replace(commands.MARKER, commands.reference()) if commands.MARKER in markdown else markdown


def on_page_content(content: str, **_: Any) -> str:
    """Replace each formula by MathML, which browsers draw themselves."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    tag, formula = found.groups()
    drawn = convert(html.unescape(formula).strip(), display="inline" if tag == "span" else "block")
    return f'<{tag} class="formula">{drawn}</{tag}>'
