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
    *(*CONFIGS, "generation_config.json"),
    *("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "spiece.model"),
)  # fmt: skip
OF_TUNE = ("results.json", "run.yaml", "metrics.jsonl", "checkpoints", "report", "tensorboard")
OF_RUN = (*OF_TUNE, "importance.safetensors", "tuned", "recorded", "plain")
STAGE = ".saving"  # in the target folder, so that moving is renaming


@dataclass(frozen=True)
class Place:
    """The files of a run.

    Attributes:
        out: as the user gave it: the importance file, or the folder.
        home: the folder that all of it is in.
        work: checkpoints and what else is needed only until the run is done.
        card, metrics: run.yaml and metrics.jsonl, beside an importance file with its name before them.
        tensorboard: the folder of its logs.
        done: the file that is written last.
        owned: names of files and folders in the home that a run leaves and a new one deletes; models apart.
    """

    out: Path
    home: Path
    work: Path
    card: Path
    metrics: Path
    tensorboard: Path
    done: Path
    owned: tuple[str, ...]

    @classmethod
    def of_file(cls, out: Path) -> Place:
        """Return the place of ``record``."""
        stem = out.name.removesuffix(".safetensors")
        names = [f"{stem}.{ending}" for ending in ("work", "run.yaml", "metrics.jsonl", "tensorboard")]
        work, card, metrics, tensorboard = map(out.with_name, names)
        return cls(out, out.parent, work, card, metrics, tensorboard, card, (*names, out.name))

    @classmethod
    def of_folder(cls, out: Path, owned: tuple[str, ...]) -> Place:
        """Return the place of ``tune`` (:data:`OF_TUNE`) and ``run`` (:data:`OF_RUN`)."""
        card, metrics, done = (out / name for name in ("run.yaml", "metrics.jsonl", "results.json"))
        return cls(out, out, out / "checkpoints", card, metrics, out / "tensorboard", done, owned)

    @property
    def is_done(self) -> bool:
        """Whether a whole result is there."""
        return self.done.is_file() and (self.out.is_dir() or self.out.is_file())

    @property
    def is_begun(self) -> bool:
        """Whether a run began here that is not done."""
        return (self.work / BEGUN).is_file()

    def begin(self, model: str, *, resume: bool, overwrite: bool, save_model: Path | None = None) -> bool:
        """Make the folder ready; return whether the run goes on from what is there.

        Args:
            model: that the run starts from, which is never touched.
            resume: go on with what is there.
            overwrite: delete what an earlier run left.
            save_model: another folder that a model comes to.

        Raises:
            ValueError, OSError: there is a result, or the beginning of one, or something else of a name that a run
                writes to, and neither ``resume`` nor ``overwrite`` was asked for; there is nothing to resume; the model
                is in the folder, or one that is not ours.
            OSError: it cannot be written.
        """
        owned = [self.home / name for name in self.owned] + ([self.out] if self.out == self.home else [])
        for option, out, folders in (("--out", self.out, owned), ("--save-model", save_model, [save_model])):
            if Path(model).is_dir() and any(folder and _holds(folder, Path(model)) for folder in folders):
                _validate_models.model_in_the_way(option, str(out), model)
        if resume:
            if not self.is_begun:
                _validate_finetune.nothing_to_resume(self.out)
            return True
        ours = self.card.is_file() or self.is_begun
        if not ours and self.out.is_dir() and is_model(self.out):
            _validate_models.foreign_model(str(self.out))
        if not overwrite:
            if self.is_begun and not self.is_done:
                _validate_models.unfinished(str(self.out))
            if self.is_done or (self.out.exists() and not self.out.is_dir()):
                _validate_finetune.exists("--out", self.out)
            for path in () if ours else map(self.home.joinpath, self.owned):
                if _holds_anything(path):
                    _validate_finetune.exists("--out", path)
            if save_model is not None and is_model(save_model):
                _validate_finetune.exists("--save-model", save_model)
        self._clear()
        self.work.mkdir(parents=True, exist_ok=True)
        return False

    def _clear(self) -> None:
        """Delete what an earlier run left here, the files that make it a result first."""
        self.done.unlink(missing_ok=True)
        if self.out == self.home:
            clear_model(self.out)
        for path in map(self.home.joinpath, self.owned):
            if path.is_dir():
                clear_model(path)
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

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


def is_model(folder: Path) -> bool:
    """Whether a folder loads as a model or an adapter."""
    return any((folder / name).is_file() for name in CONFIGS)


def _holds(folder: Path, path: Path) -> bool:
    """Whether a path is a folder, or in one that a new run deletes."""
    inside = (path.resolve(), *path.resolve().parents) if folder.name in OF_RUN else (path.resolve(),)
    return folder.resolve() in inside


def _holds_anything(path: Path) -> bool:
    """Whether something would be lost with it; a run that was killed as it began may leave an empty folder."""
    return any(not entry.name.startswith(".") for entry in path.iterdir()) if path.is_dir() else path.exists()


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
