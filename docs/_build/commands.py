"""The reference of the command line, as Markdown, from what typer knows of each command."""

from __future__ import annotations

import re
from typing import Any

import typer

MARKER = "<!-- the commands -->"
EXTRA = re.compile(r"\s+\[((?:default: |required|\d*\.?\d*<?=?x)[^\]]*)\]$")  # what typer adds to an option's help
DEFAULT = re.compile(r"\s*[\[(]default: (.*)[\])]$")  # what the help itself says


def reference() -> str:
    """Return a section for each command, with all of its options."""
    from alr_kernels.cli import app

    group = typer.main.get_command(app)
    context = typer.Context(group, info_name=app.info.name)
    return "\n\n".join(_section(name, command, context) for name, command in group.commands.items())


def _section(name: str, command: Any, parent: Any) -> str:
    context = typer.Context(command, info_name=name, parent=parent)
    usage = " ".join(command.get_usage(context).removeprefix("Usage:").split())
    parts = [f"## {name}", _prose(command.help or ""), f"```text\n{usage}\n```"]
    panels: dict[str, list[str]] = {}
    for param in command.params:
        record = param.get_help_record(context)
        if param.param_type_name == "argument":
            row = f"| `{param.metavar or param.name.upper()}` | {_cell(param.help or '')} | **required** |"
            panels.setdefault("Arguments", []).append(row)
        elif record and param.name != "help":
            title = getattr(param, "rich_help_panel", None) or "Options"
            panels.setdefault(title, []).append(_row(*record))
    for title, rows in panels.items():
        if len(panels) > 1:
            parts.append(f"**{title}**")
        parts.append("\n".join(["| option | what it is | default |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _row(flags: str, explained: str) -> str:
    """Return a table's row from what ``--help`` says of an option."""
    default = ""
    if found := EXTRA.search(explained):
        explained, default = explained[: found.start()], found[1]
    if found := DEFAULT.search(explained):
        explained, default = explained[: found.start()], found[1]
    default = default.removeprefix("default: ")
    if explained.endswith(" (required)"):  # by flag or by --config
        explained, default = explained.removesuffix(" (required)"), "required"
    shown = "**required**" if default == "required" else _cell(default)
    names, _, kind = flags.partition(" <")
    kind = f" <{kind}" if kind else ""
    return f"| `{names}`{_cell(kind)} | {_cell(_prose(explained))} | {shown} |"


def _prose(text: str) -> str:
    """Take typer's own line breaks out, and leave paragraphs; indented ones are code."""
    parts = re.split(r"\n\s*?\n(?=\S| )", text.replace("\b", "").replace("\f", "").strip("\n"))
    return "\n\n".join(
        part.strip("\n") if part.startswith("    ") else " ".join(part.split()) for part in parts if part.strip()
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
