"""Options that exclude each other, need each other, or would do nothing: told before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _validate_finetune
from .options import (
    DataOptions,
    MeasureOptions,
    ModelOptions,
    OptimizerOptions,
    PullOptions,
    RecordFiles,
    RecordOptions,
    RunOptions,
    TuneFiles,
)

if TYPE_CHECKING:
    from .settings import Settings

EXCLUSIVE = (("steps", "epochs"), ("record_steps", "record_epochs"))
OF_THE_PULL = (
    *("coeffs", "temperature", "layers_by", "rebalance_every", "mode", "normalize", "tune_importance_dtype"),
    "anchor_dtype",
)
OF_GENERAL = ("general_columns", "general_split", "general_subset", "general_held_out_data")
# What only a method that trains has; the others take one pass over the data with the weights at rest.
OF_TRAINING = (
    *("steps", "epochs", "accumulate", "lr", "schedule", "warmup", "eval_every", "keep", "tensorboard"),
    *("betas", "eps", "weight_decay", "max_grad_norm", "state_dtype", "master", "precise", "stats", "backend"),
)
OF_THE_INTEGRAL = ("xi", "relative", "record_after", "save_model", "record_steps", "record_epochs", "record_lr")


def check(settings: Settings, of_flags: frozenset[str], of_file: Settings) -> None:
    """Refuse options that do not go together.

    Args:
        settings: what was given and defaults.
        of_flags: names of flags that were given.
        of_file: as if no flag had been given: a flag may well put aside what the file says.

    Raises:
        ValueError: the first that is found; the message names it, why, and what to do.
    """
    _exclusive(settings)
    _files(settings)
    _space(settings)
    _measuring(settings)
    if settings.has(PullOptions):
        _pull(settings)
    idle, idle_in_file = dict(_idle(settings)), dict(_idle(of_file))
    for name, why in idle.items():
        if name in of_flags or (name in of_file.explicit and name in idle_in_file):
            _validate_finetune.no_effect(settings.said[name], why)


def adapter_folder(model: str) -> bool:
    """Whether a model is the folder of a PEFT adapter."""
    return (Path(model) / "adapter_config.json").is_file()


def _exclusive(settings: Settings) -> None:
    for first, second in EXCLUSIVE:
        if {first, second} <= settings.explicit:
            _validate_finetune.exclusive(settings.said[first], settings.said[second])


def _files(settings: Settings) -> None:
    said = settings.said
    if settings.has(RecordFiles):
        files = settings.of(RecordFiles)
        _validate_finetune.file_name(said["out"], files.out)
        if files.save_model is not None:
            _validate_finetune.folder_name(said["save_model"], files.save_model)
        return
    values = settings.as_dict()
    for name in ("out", "report"):
        if values.get(name) is not None:
            _validate_finetune.folder_name(said[name], values[name])


def _space(settings: Settings) -> None:
    model = settings.of(ModelOptions)
    _validate_finetune.model_folder(settings.said["model"], model.model)
    adapter = adapter_folder(model.model)
    if model.quantize != "none" and model.lora is None and not adapter:
        _validate_finetune.needs_lora(settings.said["quantize"], model.quantize)
    if model.lora is not None and adapter:
        why = f"{model.model} is an adapter, which is trained on as it is"
        _validate_finetune.no_effect(settings.said["lora"], why)
    master = settings.of(OptimizerOptions).master
    if master in ("split", "stochastic") and model.dtype in ("fp32", "fp16"):
        why = f"no weight is bf16 with {settings.said['dtype']} {model.dtype}"
        _validate_finetune.no_effect(settings.said["master"], why)


def _measuring(settings: Settings) -> None:
    said, data = settings.said, settings.of(DataOptions)
    general = settings.of(MeasureOptions) if settings.has(MeasureOptions) else None
    cut_from_general = general is not None and general.general is not None and general.general_held_out_data is None
    if data.held_out_data is not None and "held_out" in settings.explicit and not cut_from_general:
        _validate_finetune.exclusive(said["held_out"], said["held_out_data"])
    if data.held_out == 0 and general is not None:
        if data.held_out_data is None:
            _validate_finetune.nothing_held_out(said["held_out"], "--held-out-data")
        if cut_from_general:
            _validate_finetune.nothing_held_out(said["held_out"], "--general-held-out-data")


def _pull(settings: Settings) -> None:
    reg_lambda = settings.of(PullOptions).reg_lambda
    if settings.verb == "run" and reg_lambda == 0:
        _validate_finetune.run_without_pull()
    if settings.has(TuneFiles):
        importance = settings.of(TuneFiles).importance
        if importance is None and reg_lambda != 0:
            _validate_finetune.needs_importance(settings.of(ModelOptions).model)
        if importance is not None:
            _validate_finetune.file_there(settings.said["importance"], importance, "a file that record made")


def _idle(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield (name, why) of options that would do nothing."""
    values: dict[str, Any] = settings.as_dict()
    if settings.has(PullOptions):
        pull = settings.of(PullOptions)
        if pull.reg_lambda == 0:
            yield from ((name, "λ is 0: nothing is pulled") for name in OF_THE_PULL)
        if pull.coeffs != "softmax":
            yield "temperature", f"coeffs is {pull.coeffs!r}, and only softmax has one"
    if settings.has(MeasureOptions) and settings.of(MeasureOptions).general is None:
        yield from ((name, "there is no --general") for name in OF_GENERAL)
    if settings.has(RecordOptions):
        yield from _idle_in_one_pass(settings)
    if settings.verb == "record" and values["held_out"] == 0 and values["held_out_data"] is None:
        yield from ((name, "nothing is held out to measure on") for name in ("eval_every", "eval_batch"))


def _idle_in_one_pass(settings: Settings) -> Iterator[tuple[str, str]]:
    method = settings.of(RecordOptions).method
    if method == "path-integral":
        return
    why = f"method {method!r} takes one pass over the data and trains nothing"
    yield from ((name, why) for name in OF_THE_INTEGRAL)
    if settings.verb == "record":
        yield from ((name, why) for name in OF_TRAINING)
    if settings.has(RunOptions) and settings.of(RunOptions).start_from == "recorded":
        yield "start_from", why
