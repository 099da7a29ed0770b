"""Where a run's files are, and how they come there: a file or model folder is whole, or it is not there.

``record`` leaves NAME.safetensors, and beside it NAME.run.yaml, NAME.metrics.jsonl and, while it is not done,
NAME.work/. ``tune`` and ``run`` leave a folder with run.yaml, metrics.jsonl and results.json, and, while they are not
done, checkpoints/. What says that a run is done is written last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .. import _validate_finetune, _validate_models
from .card import plain

BEGUN = "begun.yaml"  # in the work folder: the card of the run while it is not done
FACTS = "begun.json"  # fingerprints of what it began with
CONFIGS = ("config.json", "adapter_config.json")  # without them nothing loads a folder as a model
MODEL_FILES = (
    *CONFIGS, "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "spiece.model"),
)  # fmt: skip
OWN_FILES = ("results.json", "run.yaml", "metrics.jsonl", "importance.safetensors")
OWN_FOLDERS = ("checkpoints", "tuned", "recorded", "plain", "report", "tensorboard")
STAGE = ".saving"  # in the target folder, so that moving is renaming


@dataclass(frozen=True)
class Place:
    """The files of a run.

    Attributes:
        out: as the user gave it: the importance file, or the folder.
        home: the folder that all of it is in.
        work: checkpoints and what else is needed only until the run is done.
        card, metrics: run.yaml and metrics.jsonl, beside an importance file with its name before them.
        done: the file that is written last.
    """

    out: Path
    home: Path
    work: Path
    card: Path
    metrics: Path
    done: Path

    @classmethod
    def of_file(cls, out: Path) -> Place:
        """Return the place of ``record``."""
        stem = out.name.removesuffix(".safetensors")
        card = out.with_name(f"{stem}.run.yaml")
        return cls(out, out.parent, out.with_name(f"{stem}.work"), card, out.with_name(f"{stem}.metrics.jsonl"), card)

    @classmethod
    def of_folder(cls, out: Path) -> Place:
        """Return the place of ``tune`` and ``run``."""
        return cls(out, out, out / "checkpoints", out / "run.yaml", out / "metrics.jsonl", out / "results.json")

    @property
    def is_done(self) -> bool:
        """Whether a whole result is there."""
        return self.done.is_file() and (self.out.is_dir() or self.out.is_file())

    @property
    def is_begun(self) -> bool:
        """Whether a run began here that is not done."""
        return (self.work / BEGUN).is_file()

    def begin(self, model: str, *, resume: bool, overwrite: bool) -> bool:
        """Make the folder ready; return whether the run goes on from what is there.

        Raises:
            ValueError: there is a result, or the beginning of one, and neither ``resume`` nor ``overwrite`` was asked
                for; there is nothing to resume; the folder is the model's, or has a model that is not ours.
            OSError: it cannot be written.
        """
        if self.out.is_dir() and Path(model).is_dir() and self.out.resolve() == Path(model).resolve():
            _validate_models.out_is_model(str(self.out), model)
        if resume:
            if not self.is_begun:
                _validate_finetune.nothing_to_resume(self.out)
            return True
        ours = self.card.is_file() or self.is_begun
        if not ours and self.out.is_dir() and any((self.out / name).exists() for name in CONFIGS):
            _validate_models.foreign_model(str(self.out))
        if not overwrite and (self.is_done or self.is_begun or (self.out.exists() and not self.out.is_dir())):
            if self.is_begun and not self.is_done:
                _validate_models.unfinished(str(self.out))
            _validate_finetune.exists("--out", self.out)
        self._clear()
        self.work.mkdir(parents=True, exist_ok=True)
        return False

    def _clear(self) -> None:
        """Delete what an earlier run left here, the files that make it a result first."""
        self.done.unlink(missing_ok=True)
        if self.out == self.home:
            clear_model(self.out)
            for name in OWN_FOLDERS:
                clear_model(self.out / name)
                shutil.rmtree(self.out / name, ignore_errors=True)
            for name in OWN_FILES:
                (self.out / name).unlink(missing_ok=True)
        else:
            for path in (self.out, self.card, self.metrics):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.work, ignore_errors=True)

    def tidy(self, keep_checkpoints: bool) -> None:
        """Delete what is needed only until the run is done; what says that it is unfinished goes first."""
        for name in (BEGUN, FACTS):
            (self.work / name).unlink(missing_ok=True)
        if not keep_checkpoints:
            shutil.rmtree(self.work, ignore_errors=True)


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its name when all of it is on disk; one that was there stays until then."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain JSON, whole or not at all; what is not finite becomes null."""
    text = json.dumps(plain(value), indent=1, allow_nan=False) + "\n"
    with replaced(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> Any:
    """Return what :func:`write_json` wrote."""
    return json.loads(path.read_text("utf-8"))


def clear_model(folder: Path) -> None:
    """Delete a model's files from a folder, first those without which it does not load."""
    for pattern in MODEL_FILES if folder.is_dir() else ():
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink()


def stage_of(target: Path) -> Path:
    """Return an empty folder to save a model into, for :func:`publish`."""
    stage = target / STAGE
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    return stage


def publish(target: Path) -> None:
    """Move the model that was saved into the stage to its folder, its configuration last.

    Nothing loads the folder as a model before all of it is there and on disk.
    """
    stage = target / STAGE
    clear_model(target)
    for path in [*stage.iterdir(), stage]:
        to_disk(path)
    for path in sorted(stage.iterdir(), key=lambda path: (path.name in CONFIGS, path.name)):
        path.replace(target / path.name)
    to_disk(target)
    shutil.rmtree(stage)


def to_disk(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
