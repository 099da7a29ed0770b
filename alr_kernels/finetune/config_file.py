"""Read a YAML file of options: one that was written by hand, or the card of a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import _validate_finetune
from .options import PARTS, fields_of

CARD = "alr_kernels_card"
CARD_VERSION = 1
ALIASES = {"lambda": "reg_lambda"}
SECTIONS = {"given": list, "files": dict, "data": dict, "importance": dict}  # of a card, that are read again
FLAGS_ONLY = ("config", "resume", "overwrite", "json", "debug")


@dataclass(frozen=True)
class ConfigFile:
    """Options by name, and for messages where each stands.

    Args:
        path: of the file.
        options: name → value as YAML gives it.
        said: name → how a message calls it: file, line and key.
        card: all of the file, when it is a card.
    """

    path: Path
    options: Mapping[str, Any]
    said: Mapping[str, str]
    card: Mapping[str, Any] | None = field(default=None, repr=False)


def read(verb: str, path: Path | str) -> ConfigFile:
    """Read the options of ``verb`` from a YAML file.

    Raises:
        OSError: it cannot be read. TypeError, ValueError: it is not UTF-8, no YAML, no mapping, has an unknown or
        double key, or is the card of another verb; the message has the line.
    """
    path = Path(path)
    top = _parsed(path)
    values = _mapping(path, top)
    if CARD not in values:
        return ConfigFile(path, *_options(verb, path, top))
    _this_version(path, values)
    if values.get("verb") != verb:
        _validate_finetune.card_of_another_verb(path, values.get("verb"), verb)
    inner = next((node for key, node in top.value if key.value == "options"), None)
    if inner is None or not isinstance(values["options"], dict):
        _validate_finetune.card_unfinished(path, "options")
    for name, kind in SECTIONS.items():
        if values.get(name) is not None and not isinstance(values[name], kind):
            _validate_finetune.card_section(path, name, kind.__name__, values[name])
    for name, facts in (values.get("data") or {}).items():
        if facts is not None and not isinstance(facts, dict):
            _validate_finetune.card_section(path, f"data: {name}", "dict", facts)
    return ConfigFile(path, *_options(verb, path, inner), values)


def read_card(path: Path) -> dict[str, Any]:
    """Return all of a card, whatever its verb."""
    values = _mapping(path, _parsed(path))
    _this_version(path, values)
    return values


def _this_version(path: Path, values: Mapping[str, Any]) -> None:
    if values.get(CARD) != CARD_VERSION:
        _validate_finetune.card_version(path, values.get(CARD))


def yaml() -> Any:
    """Return the yaml module, which only configurations and cards need."""
    if importlib.util.find_spec("yaml") is None:
        _validate_finetune.missing_package(["PyYAML"], "train", "reading and writing YAML")
    import yaml

    return yaml


def _parsed(path: Path) -> Any:
    """Return the tree of a YAML file, which knows its lines."""
    library = yaml()
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        _validate_finetune.not_utf8("--config", path, error)
    except OSError as error:
        _validate_finetune.unreadable("--config", path, error)
    try:
        top = library.compose(text, Loader=library.SafeLoader)
    except library.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else 0
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        lines = text.splitlines()
        _validate_finetune.not_yaml(path, line + 1, problem, lines[min(line, len(lines) - 1)])
    if top is None or not isinstance(top, library.MappingNode) or not top.value:
        kind = {"SequenceNode": "a list", "ScalarNode": "one value"}.get(type(top).__name__, "nothing")
        _validate_finetune.yaml_mapping(path, kind)
    return top


def _mapping(path: Path, node: Any) -> dict[str, Any]:
    """Return the values of a tree."""
    library = yaml()
    loader = library.SafeLoader("")
    try:
        return loader.construct_document(node)
    except library.YAMLError as error:
        mark = error.problem_mark
        _validate_finetune.not_yaml(path, mark.line + 1, error.problem, "")


def _options(verb: str, path: Path, node: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return name → value, and name → where it stands."""
    known = {entry.name for _, entry in fields_of(verb)}
    options: dict[str, Any] = {}
    said: dict[str, str] = {}
    for key, value in _entries(path, node):
        text = str(key.value)
        name = text.replace("-", "_")
        name = ALIASES.get(name, name)
        where = f"{path}, line {key.start_mark.line + 1}: {text}"
        if name in options:
            _validate_finetune.yaml_twice(where)
        if name in FLAGS_ONLY:
            _validate_finetune.flag_only(where, text)
        if name not in known:
            elsewhere = [other for other in PARTS if name in {entry.name for _, entry in fields_of(other)}]
            _validate_finetune.unknown_option(where, text, verb, {*known, *ALIASES}, elsewhere)
        options[name], said[name] = value, where
    return options, said


def _entries(path: Path, node: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in node.value:
        yield key, _mapping(path, value)
