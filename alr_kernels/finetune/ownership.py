"""Whose the files in a folder are, and who writes there now: what no run left is never deleted.

A run card, or the beginning of one in the work folder, says that a folder is a run's. Even there only what runs write
is deleted, name by name; a folder goes once nothing else is in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from .. import _validate_models
from ..importance.files import FORMAT
from . import config_file

try:
    import fcntl
except ImportError:  # Windows: nothing tells two runs in one folder apart
    fcntl = None  # type: ignore[assignment]  # asked for at each use

BEGUN = "begun.yaml"  # in the work folder: the card of the run while it is not done
FACTS = "begun.json"  # fingerprints of what it began with
STAGE = ".saving"  # in the target folder, so that moving is renaming
CONFIGS = ("config.json", "adapter_config.json")  # without them nothing loads a folder as a model
MODEL_FILES = (
    *(*CONFIGS, "generation_config.json", "model.safetensors", "model-?????-of-?????.safetensors"),
    *("model.safetensors.index.json", "adapter_model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "spiece.model"),
)  # fmt: skip
PHASES = ("record", "tune", "plain")
WORK_FILES = (FACTS, "sums.safetensors", ".sums.safetensors.*.partial", *(f"{name}.json" for name in PHASES))
CHARTS = ("curves", "tradeoff", "loss", "coefficients", "movement", "cost")  # of the page of a run
PARTIAL = (".{}.*.partial", ".{}.*.part")  # what killed writers of a file leave beside it


def is_card(path: Path) -> bool:
    """Whether a file is the card of a run: its beginning is read, not all of it."""
    try:
        with path.open("rb") as file:
            head = file.read(1000).splitlines()
    except OSError:
        return False
    return any(line.startswith(f"{config_file.CARD}:".encode()) for line in head)


def is_importance(path: Path) -> bool:
    """Whether a file begins as one of importance does."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def taken(folder: Path, names: Iterable[str]) -> list[str]:
    """Return which of these files and folders are there with something in them, by name; names may be patterns."""
    found = {path.name for name in names for path in folder.glob(name)} if folder.is_dir() else set()
    return sorted(name for name in found if _has_content(folder / name))


def _has_content(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir() or any(path.iterdir())


def clear_model(folder: Path) -> None:
    """Delete a model's files from a folder, first those without which it does not load."""
    for pattern in MODEL_FILES if folder.is_dir() else ():
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink()


def clear_work(folder: Path, keep: bool = False) -> None:
    """Delete what a run needed only until it was done; what says that it is unfinished goes first.

    ``keep`` the folder itself, which holds the lock of a run that goes on.
    """
    if not folder.is_dir():
        return
    for name in (BEGUN, *WORK_FILES):
        _delete_file(folder, name)
    for home in (folder, *map(folder.joinpath, PHASES)):
        for path in home.glob("checkpoint-*"):
            if path.is_dir() and not path.is_symlink() and path.name.removeprefix("checkpoint-").isdigit():
                shutil.rmtree(path)
        if home != folder:
            remove_empty(home)
    if not keep:
        remove_empty(folder)


def has_progress(folder: Path) -> bool:
    """Whether there is something in a work folder that a run can go on with: a checkpoint, sums, or a phase's end."""
    patterns = ("checkpoint-*", "*/checkpoint-*", "sums.safetensors", *(f"{name}.json" for name in PHASES))
    return any(path for pattern in patterns for path in folder.glob(pattern))


def clear(path: Path) -> None:
    """Delete a file or folder that a run left, by its name; what else is in such a folder stays, and the folder then.

    Args:
        path: in the folder of a run: results.json, run.yaml, checkpoints, report and so on.
    """
    if not path.is_dir():
        _delete_file(path.parent, path.name)
    elif path.name in ("checkpoints",) or path.name.endswith(".work"):
        clear_work(path)
    elif path.name == "report":
        _clear_page(path)
    elif path.name.endswith("tensorboard"):
        for phase in PHASES:
            for log in (path / phase).glob("events.out.tfevents.*"):
                log.unlink()
            remove_empty(path / phase)
    else:
        clear_model(path)
        if (path / STAGE).is_dir() and not (path / STAGE).is_symlink():
            shutil.rmtree(path / STAGE)
    remove_empty(path)


def _clear_page(folder: Path) -> None:
    from ..report.page import INDEX, is_page
    from ..report.svg import is_picture

    if is_page(folder / INDEX):
        _delete_file(folder, INDEX)
    for path in (folder / f"{chart}.png" for chart in CHARTS):
        if is_picture(path):
            path.unlink()


def _delete_file(folder: Path, name: str) -> None:
    for pattern in (name, *(partial.format(name) for partial in PARTIAL)):
        for path in folder.glob(pattern):
            if path.is_file() or path.is_symlink():
                path.unlink()


def remove_empty(folder: Path) -> None:
    """Delete a folder in which nothing is."""
    with contextlib.suppress(OSError):  # something is in it, or it is a link
        folder.rmdir()


@contextlib.contextmanager
def alone(work: Path, out: Path) -> Iterator[None]:
    """Hold the work folder, which is made, against other runs into the same place.

    Raises:
        RuntimeError: another run, which is going on, holds it.
    """
    handle = _hold(work, out)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _hold(work: Path, out: Path) -> int | None:
    while True:
        work.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        handle = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            _validate_models.in_use(str(out))
        except OSError:  # a file system without locks
            return handle
        if work.is_dir() and os.path.samestat(os.fstat(handle), os.stat(work)):
            return handle
        os.close(handle)  # the run that held it has just ended, and deleted it
