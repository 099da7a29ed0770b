"""Where a run's files are, and how they come there: a file or model folder is whole, or it is not there.

``record`` leaves NAME.safetensors, and beside it NAME.run.yaml, NAME.metrics.jsonl and, while it is not done,
NAME.work/. ``tune`` and ``run`` leave a folder with run.yaml, metrics.jsonl and results.json, and, while they are not
done, checkpoints/. What says that a run is done is written last.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _validate_finetune, _validate_models
from .._files import replaced, to_disk
from .._plain import plain
from . import config_file
from .ownership import (
    BEGUN,
    CONFIGS,
    FACTS,
    MODEL_FILES,
    STAGE,
    clear,
    clear_model,
    clear_work,
    is_card,
    is_importance,
    remove_empty,
    taken,
)

OF_TUNE = ("results.json", "run.yaml", "metrics.jsonl", "checkpoints", "report", "tensorboard")
OF_RUN = (*OF_TUNE, "importance.safetensors", "tuned", "recorded", "plain")


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

    def check(self, model: str, *, resume: bool, overwrite: bool, save_model: Path | None = None) -> bool:
        """Return whether a run that may begin here goes on from what is there; nothing is changed.

        Args:
            model: that the run starts from, which is never touched.
            resume: go on with what is there.
            overwrite: delete what an earlier run left.
            save_model: another folder that a model comes to.

        Raises:
            ValueError, OSError: there is a result, or the beginning of one, and neither ``resume`` nor ``overwrite``
                was asked for; there is nothing to resume; the model is in the folder, or something that no run left.
        """
        owned = [self.home / name for name in self.owned] + ([self.out] if self.out == self.home else [])
        for option, out, folders in (("--out", self.out, owned), ("--save-model", save_model, [save_model])):
            if Path(model).is_dir() and any(folder and _holds(folder, Path(model)) for folder in folders):
                _validate_models.model_in_the_way(option, str(out), model)
        if resume:
            if not self.is_begun:
                _validate_finetune.nothing_to_resume(self.out)
            return True
        if not self.is_ours:
            self._refuse_foreign()
        if save_model is not None:
            found = [] if self._left_model(save_model) else taken(save_model, (STAGE, *MODEL_FILES))
            if found:
                _validate_models.foreign_files("--save-model", str(save_model), found)
        if not overwrite:
            if self.is_begun and not self.is_done:
                _validate_models.unfinished(str(self.out))
            if self.is_done or (self.out.exists() and not self.out.is_dir()):
                _validate_finetune.exists("--out", self.out)
            if save_model is not None and is_model(save_model):
                _validate_finetune.exists("--save-model", save_model)
        if self.out.is_file() and not is_importance(self.out):
            _validate_models.foreign_files("--out", str(self.home), [self.out.name])
        return False

    @property
    def is_ours(self) -> bool:
        """Whether a run left what is there, or began here."""
        return self.is_begun or is_card(self.card)

    def _refuse_foreign(self) -> None:
        """Refuse a place where something has the name of what a run writes, and no run left it."""
        names = [name for name in self.owned if name != self.out.name]
        if self.out == self.home:
            if self.out.is_dir() and is_model(self.out):
                _validate_models.foreign_model(str(self.out))
            names += [STAGE, *(MODEL_FILES if "tuned" not in self.owned else ())]
        if found := taken(self.home, names):
            _validate_models.foreign_files("--out", str(self.out), found)

    def _left_model(self, folder: Path) -> bool:
        """Whether the run whose card is here saved its model in this folder."""
        for path in (self.work / BEGUN, self.card):
            if is_card(path):
                files = config_file.read_card(path).get("files")
                saved = files.get("save_model") if isinstance(files, dict) else None
                if isinstance(saved, str) and Path(saved).resolve() == folder.resolve():
                    return True
        return False

    def clear(self) -> None:
        """Delete what an earlier run left here: first what makes it a result, last what says that it was a run's."""
        if self.out == self.home:
            self.done.unlink(missing_ok=True)
            clear_model(self.out)
        else:
            self.out.unlink(missing_ok=True)
        for path in map(self.home.joinpath, self.owned):
            if path not in (self.card, self.work):
                clear(path)
        clear_work(self.work, keep=True)
        clear(self.card)

    def tidy_empty(self) -> None:
        """Delete the folder of a run that came to nothing, if nothing else is in it."""
        if self.out == self.home:
            remove_empty(self.out)

    def tidy(self, keep_checkpoints: bool) -> None:
        """Delete what is needed only until the run is done; what says that it is unfinished goes first."""
        for name in (BEGUN, FACTS):
            (self.work / name).unlink(missing_ok=True)
        if not keep_checkpoints:
            clear_work(self.work)


def write_json(path: Path, value: Any) -> None:
    """Write plain JSON, whole or not at all; what is not finite becomes null."""
    text = json.dumps(plain(value), indent=1, allow_nan=False) + "\n"
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")


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
