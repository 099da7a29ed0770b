"""The run card: what was run, on what, with which result, as YAML; as a configuration it repeats the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _environment, _validate_finetune
from .._files import replaced
from .._plain import plain
from . import config_file
from .config_file import CARD, CARD_VERSION, yaml
from .options import fields_of

if TYPE_CHECKING:
    from .settings import Settings

OUTPUTS = ("out", "save_model", "report")  # named anew when a run is repeated
FREE = frozenset(
    {"save_every", "keep", "eval_every", "eval_batch", "log_every", "workers", "tensorboard", "keep_checkpoints"}
    | {"device", *OUTPUTS}
)  # may change when a run goes on: no number of the result hangs on them
HEAD = "# Repeats the run: alr-kernels {verb} --config {name} --out ...\n"


def write(
    path: Path | str,
    settings: Settings,
    *,
    data: Mapping[str, Any] | None = None,
    importance: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    started: datetime | None = None,
    seconds: Any = None,
) -> Path:
    """Write a card; whole or not at all.

    Args:
        path: of the card.
        settings: of the run; paths are kept absolute, so that the card works from any folder of this machine.
        data: "data" and "general" → facts with "source" and "fingerprint".
        importance: facts with "fingerprint".
        metrics: what came out.
        model: facts.
        started: when, with a time zone.
        seconds: how long, or by phase.

    Raises:
        OSError: it cannot be written. ImportError: PyYAML is missing.
    """
    path = Path(path)
    options = portable(settings)
    content = {
        CARD: CARD_VERSION,
        "verb": settings.verb,
        "started": (started or datetime.now(timezone.utc)).isoformat(timespec="seconds"),
        "seconds": seconds,
        "files": {name: options.pop(name) for name in OUTPUTS if name in options},
        "options": options,
        "given": sorted(settings.explicit - set(OUTPUTS)),
        "model": model,
        "data": data,
        "importance": importance,
        "metrics": metrics,
        "versions": _environment.versions(),
        "machine": _environment.machine(),
    }
    text = yaml().safe_dump(plain(content), sort_keys=False, allow_unicode=True, width=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as beside:
        beside.write_text(HEAD.format(verb=settings.verb, name=path.name) + text, encoding="utf-8")
    return path


def portable(settings: Settings) -> dict[str, Any]:
    """Return all options by name, with paths of what is there, and of what is written, made absolute."""
    options = settings.as_dict()
    for _, entry in fields_of(settings.verb):
        value = options[entry.name]
        if value is not None and entry.metadata["path"] and (entry.name in OUTPUTS or Path(value).exists()):
            options[entry.name] = os.path.abspath(value)
    return options


def same_run(path: Path | str, settings: Settings) -> None:
    """Refuse to go on with a run whose card has other options than these, where numbers hang on them.

    Raises:
        ValueError: which differ, and what they were.
    """
    from .settings import flag

    then = config_file.read(settings.verb, path).options
    now = plain(portable(settings))
    differing = {
        flag(name): (then[name], value)
        for name, value in now.items()
        if name not in FREE and name in then and then[name] != value
    }
    _validate_finetune.same_options(Path(path), differing)
