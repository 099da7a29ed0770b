"""Commands whose flags are the options of finetune/options.py: one statement of each, for flags, YAML and cards."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..finetune.options import FILES, PANELS, REQUIRED, fields_of

FIRST, ADVANCED = "Begin with these", "Advanced"
KINDS = {"str": str, "int": int, "float": float, "bool": bool}
FORMS = {"str": "TEXT", "int": "N", "float": "NUMBER", "bool": " "}  # what stands for the value in the help
NO = "no_"


@dataclass(frozen=True)
class Call:
    """What a command was called with.

    Args:
        verb: its name.
        flags: name of the option → value, of the flags that were given.
        config: a YAML file of options, or a card.
        resume: go on with an unfinished run.
        overwrite: replace what is there.
        as_json: print one JSON object.
        debug: show tracebacks and other libraries' warnings.
    """

    verb: str
    flags: dict[str, Any]
    config: Path | None = None
    resume: bool = False
    overwrite: bool = False
    as_json: bool = False
    debug: bool = False


def command(body: Callable[[Call], None]) -> Callable[..., None]:
    """Return the typer command of a verb: named and described as ``body``, which it calls."""
    verb = body.__name__

    def called(ctx: typer.Context, **values: Any) -> None:
        own = {name: values.pop(name) for name in _OWN}
        given = {name: value for name, value in values.items() if _was_given(ctx, name)}
        body(Call(verb, dict(_flag(name, value) for name, value in given.items()), **own))

    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += [_parameter(entry, FIRST, entry.name in REQUIRED.get(verb, ())) for entry in _firsts(verb)]
    others = [_parameter(entry, PANELS[part]) for part, entry in _others(verb, rare=False)]
    of_files = [parameter for parameter in others if parameter.name in _outputs(verb)]
    parameters += [*of_files, *map(_own, _OWN), *(parameter for parameter in others if parameter not in of_files)]
    parameters += [_parameter(entry, ADVANCED) for _, entry in _others(verb, rare=True)]
    parameters += [_hidden(entry) for _, entry in fields_of(verb) if isinstance(entry.default, bool)]
    called.__name__, called.__doc__ = verb, _unwrapped(inspect.getdoc(body) or "")
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # a function has any
    return called


def _was_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"  # of click's enumeration, or of typer's own copy


def _flag(name: str, value: Any) -> tuple[str, Any]:
    """Return option and value; --no-x is x, false."""
    if name.startswith(NO):
        return name.removeprefix(NO), not value
    return name, value.value if isinstance(value, Enum) else value


def _firsts(verb: str) -> list[Field[Any]]:
    found = [entry for _, entry in fields_of(verb) if entry.metadata["first"]]
    return sorted(found, key=lambda entry: entry.metadata["first"])


def _others(verb: str, rare: bool) -> list[tuple[type[Any], Field[Any]]]:
    return [
        (part, entry)
        for part, entry in fields_of(verb)
        if not entry.metadata["first"] and entry.metadata["rare"] == rare
    ]


def _outputs(verb: str) -> set[str]:
    return {entry.name for part, entry in fields_of(verb) if PANELS[part] == FILES}


def _parameter(entry: Field[Any], panel: str, required: bool = False) -> inspect.Parameter:
    """Return the parameter of one option, from which typer makes its flag."""
    facts = entry.metadata
    if isinstance(entry.default, bool):  # the help shows the side that changes something
        return _switch(entry, not entry.default, help=_said(entry), rich_help_panel=panel, metavar=FORMS["bool"])
    kind = str(entry.type).partition(" | ")[0]
    default = None if entry.default is MISSING else entry.default
    annotation: Any = KINDS[kind]
    if facts["choices"]:
        annotation = _words(entry)
        default = default and annotation(default)
    dashed = entry.name.replace("_", "-")
    form = facts["form"] or ("NAME" if facts["choices"] else FORMS[kind])
    made = typer.Option(
        *(facts["names"] or (f"--{dashed}/--no-{dashed}" if kind == "bool" else f"--{dashed}",)),
        help=_said(entry, required),
        metavar=form,
        rich_help_panel=panel,
        show_default=default is not None,
    )
    return _keyword(entry.name, default, annotation | None if default is None else annotation, made)


def _said(entry: Field[Any], required: bool = False) -> str:
    """Return an option's help, with what is not to be seen in the flag."""
    text, choices = entry.metadata["help"], entry.metadata["choices"]
    if required or entry.default is MISSING:
        return f"{text} (required)"
    if entry.default is True:
        return f"Without {text}"
    said, start, default = text.partition(" (default")
    return f"{said} ({', '.join(choices)}){start}{default}" if choices else text


def _words(entry: Field[Any]) -> Any:
    """Return the enumeration by which typer checks a choice."""
    words: Any = Enum
    return words(entry.name, {word.replace("-", "_"): word for word in entry.metadata["choices"]}, type=str)


def _switch(entry: Field[Any], on: bool, **said: Any) -> inspect.Parameter:
    """Return the flag that turns an option on, or off."""
    name = entry.name if on else NO + entry.name
    return _keyword(name, False, bool, typer.Option(f"--{name.replace('_', '-')}", show_default=False, **said))


def _hidden(entry: Field[Any]) -> inspect.Parameter:
    """Return the side of a switch that is the default: it puts back what the file of --config has set."""
    return _switch(entry, entry.default is True, hidden=True)


_OWN: dict[str, tuple[Any, Any, str, str]] = {
    "config": (
        *(Path | None, None, "--config"),
        "YAML file with these options, such as `lr: 2e-5`; flags go before it. The card of an earlier run "
        "(run.yaml) repeats that run.",
    ),
    "resume": (bool, False, "--resume", "Go on with a run that was interrupted, from its last whole checkpoint."),
    "overwrite": (bool, False, "--overwrite", "Replace what an earlier run wrote to --out."),
    "as_json": (bool, False, "--json", "Print one JSON object on standard output instead of tables."),
    "debug": (bool, False, "--debug", "Show tracebacks, and warnings of other libraries."),
}


def _own(name: str) -> inspect.Parameter:
    annotation, default, option, text = _OWN[name]
    form = "FILE" if name == "config" else FORMS["bool"]
    made = typer.Option(option, help=text, metavar=form, rich_help_panel=FILES, show_default=False)
    return _keyword(name, default, annotation, made)


def _keyword(name: str, default: Any, annotation: Any, made: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[annotation, made])


def _unwrapped(text: str) -> str:
    """Return paragraphs as one line each, which the help wraps to the terminal; indented ones stay."""
    parts = text.split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else " ".join(part.split()) for part in parts)
