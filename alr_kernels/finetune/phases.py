"""record, tune and run: from settings to files and results, on one process or on many, whole or resumed.

Each is called on every process of a job; rank 0 writes. What is done is never repeated: ``resume`` goes on in the phase
that was interrupted, from its last whole checkpoint, and ends with the same bytes on a CPU.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import _ranks
from ..importance import Importance
from . import card, results
from .config_file import yaml
from .cost import bytes_by_kind, peak_memory
from .data import Collator
from .estimating import estimate
from .evaluation import nll
from .job import Job, begun, on_first
from .movement import Movement, coefficient_rows
from .options import MeasureOptions, RecordFiles, RecordOptions, RunFiles, RunOptions, TuneFiles
from .outcome import OF_RUN, OF_TUNE, Place, publish, read_json, stage_of, write_json
from .progress import Progress
from .pull import facts_of, fitting, pulling, stepping

if TYPE_CHECKING:
    from .data import Texts
    from .models import Loaded
    from .options import ModelOptions
    from .settings import Settings
    from .trainer import PhaseTrainer


def record(
    settings: Settings, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Learn ``--data`` and integrate how much each weight mattered (or estimate it) into ``--out``.

    Args:
        settings: of verb "record".
        resume: go on with the run that was interrupted there; a finished one is left as it is.
        overwrite: begin anew where there is a result, or the beginning of one.
        progress: told how far it is.

    Returns:
        the results, with ``files``.

    Raises:
        Stopped: interrupted after a whole step.
        ValueError, TypeError, OSError, ImportError, RuntimeError: what the user can mend, in one sentence.
    """
    progress = progress or Progress()
    files = settings.of(RecordFiles)
    place = Place.of_file(Path(files.out))
    if resume and place.is_done:
        return _finished(settings, place, progress, files.keep_checkpoints)
    save_model = Path(files.save_model) if files.save_model else None
    with begun(settings, place, resume, overwrite, progress, save_model) as job:
        loaded = job.load_model()
        texts = job.texts("data", loaded, train=True)
        found = job.once("record", lambda: _record(job, loaded, texts, place.out, save_model))
        outcome = results.of_record(job, texts.facts, found)
        _finish(job, outcome, {"data": texts.facts}, place.out, files.keep_checkpoints)
        return outcome


def tune(
    settings: Settings, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Learn ``--data``, pulled back to what mattered by ``--importance``, into the folder ``--out``.

    Args, Returns, Raises: as :func:`record`.
    """
    progress = progress or Progress()
    files = settings.of(TuneFiles)
    place = Place.of_folder(Path(files.out), OF_TUNE)
    if resume and place.is_done:
        return _finished(settings, place, progress, files.keep_checkpoints)
    with begun(settings, place, resume, overwrite, progress) as job:
        loaded = job.load_model()
        domain = job.texts("data", loaded, train=True)
        general = job.texts("general", loaded, train=False) if settings.of(MeasureOptions).general else None
        path = Path(files.importance) if files.importance else None
        found = {"tune": job.once("tune", lambda: _tune(job, "tune", loaded, domain, general, path, place.out))}
        data = {"domain": domain.facts, "general": general.facts if general else None}
        where = {"model": str(place.out)} | ({"importance": str(path)} if path else {})
        outcome = results.of_tuning(job, data, found, where | _files(place))
        _finish(job, outcome, {"data": data["domain"], "general": data["general"]}, place.out, files.keep_checkpoints)
        return outcome


def run(
    settings: Settings, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Record on ``--general``, tune on ``--data`` and measure both, into the folder ``--out``.

    Args, Returns, Raises: as :func:`record`.
    """
    progress = progress or Progress()
    files = settings.of(RunFiles)
    place = Place.of_folder(Path(files.out), OF_RUN)
    if resume and place.is_done:
        return _finished(settings, place, progress, files.keep_checkpoints)
    options = settings.of(RunOptions)
    recorded = place.out / "recorded" if options.start_from == "recorded" else None
    path = place.out / "importance.safetensors"
    with begun(settings, place, resume, overwrite, progress) as job:
        loaded: list[Loaded] = [job.load_model()]
        domain = job.texts("data", loaded[0], train=True)
        general = job.texts("general", loaded[0], train=True)
        phases = {"record": job.once("record", lambda: _record(job, loaded.pop(), general, path, recorded))}
        start = job.model_options if recorded is None else replace(job.model_options, model=str(recorded), lora=None)

        def tuned(name: str, folder: str) -> dict[str, Any]:
            loaded.clear()
            _let_go()
            model = job.load_model(start)
            model.facts["name"] = job.model_options.model
            again = start if name == "plain" else None
            return _tune(job, name, model, domain, general, path, place.out / folder, again)

        phases["tune"] = job.once("tune", lambda: tuned("tune", "tuned"))
        if options.baseline:
            phases["plain"] = job.once("plain", lambda: tuned("plain", "plain"))
        where = {"importance": str(path), "model": str(place.out / "tuned")}
        where |= {"recorded": str(recorded)} if recorded else {}
        where |= {"plain": str(place.out / "plain")} if options.baseline else {}
        data = {"domain": domain.facts, "general": general.facts}
        outcome = results.of_tuning(job, data, phases, where | _files(place))
        _finish(job, outcome, {"data": domain.facts, "general": general.facts}, place.out, files.keep_checkpoints)
        return outcome


# ---- phases


def _record(job: Job, loaded: Loaded, texts: Texts, path: Path, save_model: Path | None) -> dict[str, Any]:
    """Record the importance of a model into a file; return what was found."""
    options = job.settings.of(RecordOptions)
    collate = Collator(loaded.tokenizer, limit=job.max_length(loaded))
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.method != "path-integral":
        return _estimate(job, loaded, texts, path, collate)
    lr, steps, epochs = job.train_options.lr, job.train_options.steps, job.train_options.epochs
    if job.settings.has(RunOptions):
        of_run = job.settings.of(RunOptions)
        lr, steps, epochs = of_run.record_lr or lr, of_run.record_steps, of_run.record_epochs or epochs
    assert lr is not None
    optimizer = stepping(job.settings, loaded, lr) | {"record": True}
    measured = {"general": texts.held_out}
    trainer = _trained(job, "record", loaded, texts, measured, (steps, epochs, lr), optimizer, options.record_after)
    _importance_of(trainer, options, path)
    files = {"importance": str(path)}
    if save_model is not None:
        _publish(trainer, save_model)
        files |= {"recorded" if job.settings.has(RunOptions) else "model": str(save_model)}
    if not job.settings.has(RunOptions):
        files |= _files(job.place)
    importance = facts_of(path, Importance.load(path))
    return _facts(job, trainer, "record") | {"importance": importance, "files": files}


def _importance_of(trainer: PhaseTrainer, options: RecordOptions, path: Path) -> None:
    """Write what was recorded: rank 0, or of sharded weights all ranks together."""
    from ..integrations.watching import Saving

    saving = Saving(options.xi, options.relative, options.importance_dtype)
    saving.write(trainer.alr, path, trainer.is_world_process_zero())
    _ranks.wait()


def _estimate(job: Job, loaded: Loaded, texts: Texts, path: Path, collate: Any) -> dict[str, Any]:
    """Estimate the importance of a model that stands still."""
    import time

    begin = time.perf_counter()
    importance = estimate(job, loaded, texts, collate)
    importance.save(path)
    seconds = time.perf_counter() - begin
    if texts.held_out is not None:
        measured = nll(loaded.model, texts.held_out, collate, job.train_options.eval_batch or job.train_options.batch)
        spent = round(time.perf_counter() - begin - seconds, 3)
        job.metrics.add("record", 0, seconds, {"evaluation": {"general": measured.as_dict()}, "seconds": spent})
    weights = sum(param.numel() * param.element_size() for param in loaded.model.parameters())
    return {
        "seconds": round(seconds, 3),
        "model": loaded.facts,
        "step_ms": {"optimizer": None, "whole": None},
        "bytes": {"weights": weights, "moments": 0, "importance": importance.nbytes, "anchor": 0, "other": 0},
        "peak_memory_bytes": peak_memory(torch.device(loaded.device)),
        "importance": facts_of(path, importance),
        "files": {"importance": str(path)} | ({} if job.settings.has(RunOptions) else _files(job.place)),
    }


def _tune(
    job: Job, name: str, loaded: Loaded, domain: Texts, general: Texts | None, path: Path | None, target: Path,
    again: ModelOptions | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Tune a model into a folder; return what was found.

    Args:
        name: "tune", or "plain" for the same without the pull.
        path: of the importance, if there is one.
        again: how to load the model that "plain" starts from once more: its moves are measured against it.
    """
    importance, remark = fitting(path, loaded) if path else (None, "")
    if importance is not None and path is not None:
        facts = facts_of(path, Importance.load(path))
        job.settings.same_importance(facts["fingerprint"])
        job.remember("--importance", facts["fingerprint"])
    if remark and name == "tune":
        job.progress.say(remark)
    held = name == "tune"
    options = job.train_options
    assert options.lr is not None
    optimizer = stepping(job.settings, loaded, options.lr) | pulling(job.settings, importance if held else None)
    measured = {"domain": domain.held_out, "general": general.held_out if general else None}
    duration = (options.steps, options.epochs, options.lr)
    trainer = _trained(job, name, loaded, domain, measured, duration, optimizer)
    found = _facts(job, trainer, name) | {"importance": None, "coefficients": None, "movement": None}
    if importance is not None:
        anchor = None
        if again is not None:
            start = dict(job.load_model(again).model.named_parameters())
            anchor = {key: param.detach() for key, param in start.items() if param.requires_grad}
        # By the file's own values in both: bins of what steps decode would hold other weights than the baseline's.
        found["movement"] = Movement.of_optimizer(trainer.alr, importance, anchor).as_dict()
        if held:
            assert trainer.alr.coeffs is not None
            found |= {"importance": facts, "coefficients": coefficient_rows(importance, trainer.alr.coeffs)}
    _publish(trainer, target)
    return found


def _trained(
    job: Job, name: str, loaded: Loaded, texts: Texts, measured: dict[str, Any],
    duration: tuple[int | None, float, float], optimizer: dict[str, Any], record_after: float = 0.0,
) -> PhaseTrainer:  # fmt: skip
    """Train a phase to its end, from its last checkpoint where the run goes on."""
    from .trainer import Phase, PhaseTrainer

    assert texts.train is not None
    several = job.settings.has(RunOptions)
    steps, epochs, lr = duration
    phase = Phase(
        name, loaded, texts.train, measured, Collator(loaded.tokenizer, limit=job.max_length(loaded)),
        job.train_options, steps, epochs, lr, optimizer, job.place.work / name if several else job.place.work,
        job.metrics, job.stop, job.progress, record_after,
        job.place.tensorboard if job.train_options.tensorboard else None,
    )  # fmt: skip
    phase.work.mkdir(parents=True, exist_ok=True)
    trainer = PhaseTrainer(phase)
    trainer.run(job.resumed)
    return trainer


def _facts(job: Job, trainer: PhaseTrainer, name: str) -> dict[str, Any]:
    """Return what is known of a phase that is done, besides its importance."""
    lines = job.metrics.lines(name)
    return {
        "seconds": max((line["time"] for line in lines), default=round(trainer.seconds, 3)),
        "model": trainer.phase.loaded.facts,
        "step_ms": trainer.phase_callback.clock.medians(),
        "bytes": bytes_by_kind(trainer.model, trainer.alr),
        "peak_memory_bytes": peak_memory(trainer.args.device),
    }


def _publish(trainer: PhaseTrainer, target: Path) -> None:
    """Save the trained model whole; the folder is no model before all of it is there."""
    if trainer.is_world_process_zero():
        stage_of(target)
    _ranks.wait()
    trainer.save_whole(target / ".saving")
    on_first(lambda: publish(target))


# ---- ends


def _files(place: Place) -> dict[str, str]:
    found = {"card": str(place.card), "metrics": str(place.metrics)}
    return found | ({"results": str(place.done)} if place.done != place.card else {})


def _finish(job: Job, outcome: dict[str, Any], data: dict[str, Any], out: Path, keep_checkpoints: bool) -> None:
    """Write card and results, the one that says that all is done last, and delete what is not needed any more."""

    def write() -> None:
        place = job.place
        card.write(
            place.card, job.settings, data=data, importance=outcome["importance"], model=outcome["model"],
            metrics={key: outcome[key] for key in ("before", "after", "plain", "summary") if key in outcome},
            started=job.started, seconds=outcome["seconds"],
        )  # fmt: skip
        if place.done != place.card:
            write_json(place.done, outcome)
        place.tidy(keep_checkpoints)

    on_first(write)


def _finished(settings: Settings, place: Place, progress: Progress, keep_checkpoints: bool) -> dict[str, Any]:
    """Say that a run is done already; return what it found. Results of other options are not passed off as its own."""
    card.same_run(place.card, settings)
    progress.say(f"{place.out}: this run is finished; nothing is left to do")
    found = _of_card(place) if place.done == place.card else read_json(place.done)
    if _ranks.place()[0] == 0:
        place.tidy(keep_checkpoints)
    return found


def _of_card(place: Place) -> dict[str, Any]:
    """Return the results of a recording as far as its card holds them."""
    said = yaml().safe_load(place.card.read_text("utf-8"))
    found = {key: said.get(key) for key in ("verb", "versions", "machine", "options", "seconds", "model", "importance")}
    data = said.get("data") or {}
    metrics = said.get("metrics") or {}
    return {
        "kind": "record",
        **found,
        "data": {"general": data.get("data")},
        **{key: metrics.get(key) for key in ("before", "after")},
        "files": {"importance": str(place.out)} | _files(place),
    }


def _let_go() -> None:
    """Free what the last phase held before the next one loads its model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
