"""Checks on options, configurations and what a run finds on disk, and their messages; see ``_validate.py``.

Nothing heavy is imported: a wrong flag is told at once.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ._validate_values import nearest, number
from .finetune.endings import TABLES, TEXT

LORA_FORM = "'default', or such as r=8,alpha=32,targets=q_proj+v_proj,dropout=0.05,rslora=true"
KINDS = {"str": "text", "int": "an integer", "float": "a number", "bool": "true or false"}
LAMBDA_0 = "is 0, plain AdamW"


def unknown_option(said: str, name: str, verb: str, known: Iterable[str], elsewhere: Iterable[str]) -> NoReturn:
    """Refuse a key of a configuration; ``elsewhere``: verbs that have it."""
    verbs = list(elsewhere)
    if verbs:
        raise ValueError(f"{said}: {verb} has no such setting, only {' and '.join(verbs)}; leave it out.")
    raise ValueError(
        f"{said}: {verb} has no such setting{nearest(name, known)} `alr-kernels {verb} --help` lists them."
    )


def flag_only(said: str, name: str) -> NoReturn:
    raise ValueError(f"{said}: it is no setting but says what to do now; give --{name} on the command line.")


def option_type(said: str, value: Any, annotation: str, hint: str = "") -> NoReturn:
    expected = KINDS[annotation.partition(" ")[0]]
    got = "nothing" if value is None else f"{value!r}" if not isinstance(value, (dict, list)) else type(value).__name__
    raise TypeError(f"{said}: expected {expected}, got {got}{hint}.")


def missing_option(verb: str, flags: Iterable[str], hint: str = "") -> NoReturn:
    raise ValueError(
        f"{', '.join(flags)}: needed, as a flag or in the file of --config{hint}. `alr-kernels {verb} --help` has an "
        "example."
    )


def at_least(said: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{said}: expected an integer ≥ {low}, got {value!r}.")


def not_empty(said: str, value: str) -> None:
    if not value.strip():
        raise ValueError(f"{said}: expected some text, got an empty one.")


def reg_lambda(said: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(
            f"{said}: expected a number ≥ 0, got {value!r}: λ weighs the pull back to what mattered; 0 is plain AdamW."
        )


def temperature(said: str, value: str) -> None:
    if value == "auto":
        return
    try:
        number(said, value, open_low=True)
    except (TypeError, ValueError):
        raise ValueError(f"{said}: expected 'auto' or a number > 0, got {value!r}.") from None


def betas(said: str, value: str) -> tuple[float, float]:
    """Return the two numbers of "0.9,0.999"."""
    try:
        first, second = (number(said, part, high=1.0) for part in value.split(","))
    except (TypeError, ValueError):
        raise ValueError(f"{said}: expected two numbers in [0, 1), such as 0.9,0.999, got {value!r}.") from None
    return first, second


def lora_part(said: str, part: str) -> tuple[str, str]:
    """Return name and value of one part of the LoRA text."""
    name, sign, value = (text.strip() for text in part.partition("="))
    known = ("r", "alpha", "targets", "dropout", "rslora")
    if name not in known:
        raise ValueError(f"{said}: {name!r} is no part of it{nearest(name, known)} Expected {LORA_FORM}.")
    if not sign or not value:
        raise ValueError(f"{said}: {name!r} has no value; expected {LORA_FORM}.")
    return name, value


def lora_twice(said: str, name: str) -> NoReturn:
    raise ValueError(f"{said}: {name!r} is given twice; leave one out.")


def lora_value(said: str, name: str, value: str) -> Any:
    """Return the value of a part of the LoRA text in its own type."""
    try:
        if name == "r" and int(value) >= 1:
            return int(value)
        if name == "alpha" and 0 < float(value) < float("inf"):
            return float(value)
        if name == "dropout" and 0 <= float(value) < 1:
            return float(value)
        if name == "rslora":
            return {"true": True, "false": False}[value.lower()]
        if name == "targets" and all(value.split("+")):
            return tuple(value.split("+"))
    except (ValueError, KeyError):
        pass
    expected = {
        "r": "an integer ≥ 1",
        "alpha": "a number > 0",
        "dropout": "a number in [0, 1)",
        "rslora": "true or false",
        "targets": "names of modules joined by +, such as q_proj+v_proj",
    }[name]
    raise ValueError(f"{said}: {name}: expected {expected}, got {value!r}.")


def exclusive(said: str, other: str) -> NoReturn:
    raise ValueError(f"{said} and {other} exclude each other; leave one out.")


def no_effect(said: str, why: str, remedy: str = "leave it out") -> NoReturn:
    raise ValueError(f"{said}: it has no effect, because {why}; {remedy}.")


def needs_lora(said: str, value: str) -> NoReturn:
    raise ValueError(
        f"{said}: a base model in {value} is not trained itself; add --lora default, start from an adapter's folder, "
        "or leave it out."
    )


def needs_importance(model: str) -> NoReturn:
    raise ValueError(
        f"--importance: needed to hold what mattered. `alr-kernels record --model {model} --data GENERAL --out "
        "importance.safetensors` makes it; --lambda 0 is plain AdamW without it."
    )


def run_without_pull() -> NoReturn:
    raise ValueError(
        "--lambda: run records importance, which nothing would use with λ = 0; use `alr-kernels tune --lambda 0`, or "
        "--baseline to see both."
    )


def nothing_held_out(said: str, other: str) -> NoReturn:
    raise ValueError(f"{said}: with 0 nothing is left to measure on; expected a share in (0, 1), or give {other}.")


def file_name(said: str, value: str) -> None:
    if Path(value).suffix != ".safetensors":
        raise ValueError(f"{said}: expected a file name that ends in .safetensors, got {value!r}.")
    if Path(value).is_dir():
        raise ValueError(f"{said}: {value} is a folder; expected a file such as {value}/importance.safetensors.")


def folder_name(said: str, value: str) -> None:
    if Path(value).is_file():
        raise ValueError(f"{said}: {value} is a file; expected a folder, which is made if it is not there.")


def file_there(said: str, value: str, what: str) -> None:
    if not Path(value).is_file():
        kind = "is a folder" if Path(value).is_dir() else "no such file"
        raise FileNotFoundError(f"{said}: {value}: {kind}; expected {what}.")


def text_there(said: str, name: str) -> None:
    """Refuse a text that can only be a file or folder, and is not there; else it may be a pattern or a hub id."""
    is_path = looks_like_a_folder(name) or Path(name).suffix.lower() in (*TEXT, *TABLES)
    if is_path and not glob.has_magic(name) and not Path(name).expanduser().exists():
        raise FileNotFoundError(
            f"{said}: there is no file or folder {name!r} (looked from {Path.cwd()}); check the path."
        )


def unreadable(said: str, path: Path, error: OSError) -> NoReturn:
    reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
    raise type(error)(f"{said}: {path}: {reason}.") from error


def not_utf8(said: str, path: Path, error: UnicodeDecodeError) -> NoReturn:
    raise ValueError(
        f"{said}: {path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; convert it, for "
        "example with `iconv -t UTF-8`."
    ) from error


def not_yaml(path: Path, line: int, problem: str, text: str) -> NoReturn:
    raise ValueError(f"--config: {path}, line {line}: no YAML: {problem}: {text.strip()[:80]!r}.")


def yaml_mapping(path: Path, what: str) -> NoReturn:
    raise TypeError(f"--config: {path}: expected lines such as `lr: 2e-5`, got {what}.")


def yaml_twice(said: str) -> NoReturn:
    raise ValueError(f"{said}: given twice; leave one out.")


def card_version(path: Path, version: Any) -> NoReturn:
    if version is None:
        raise ValueError(f"{path} is no run card: it has no alr_kernels_card.")
    raise ValueError(f"--config: {path}: it is a run card of version {version!r}, this package reads 1; update it.")


def card_of_another_verb(path: Path, its: Any, verb: str) -> NoReturn:
    raise ValueError(
        f"--config: {path} is the card of {its}, not of {verb}; `alr-kernels {its} --config {path} --out ...` repeats "
        "that run."
    )


def card_unfinished(path: Path, key: str) -> NoReturn:
    raise ValueError(f"--config: {path}: a run card needs {key!r}, which this one has not; was it edited?")


def card_section(path: Path, key: str, kind: str, value: Any) -> NoReturn:
    expected = {"list": "a list", "dict": "a mapping"}[kind]
    raise TypeError(f"--config: {path}: {key}: expected {expected}, got {value!r:.60}; was the card edited?")


def changed_data(option: str, source: str, was: str, now: str, card: str) -> NoReturn:
    raise ValueError(
        f"--{option}: {source} is not what it was in the run of {card} (fingerprint {was[:16]}, now {now[:16]}), so "
        f"the run cannot be repeated; restore it, or give --{option} to run with what is there now."
    )


def changed_importance(was: str, now: str, card: str) -> NoReturn:
    raise ValueError(
        f"--importance: the file is not what it was in the run of {card} (fingerprint {was[:16]}, now {now[:16]}); "
        "restore it, or give --importance to run with what is there now."
    )


def same_options(path: Path, differing: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse to resume a run with other options: flag → (what it was, what it is now)."""
    if differing:
        listed = "; ".join(f"{flag} was {was!r}, now {now!r}" for flag, (was, now) in differing.items())
        raise ValueError(
            f"--resume: the run to go on with ({path}) had other options: {listed}. Give the same, or begin anew with "
            "--overwrite."
        )


def looks_like_a_folder(name: str) -> bool:
    """Whether a model's name can only mean a folder: hub ids are "name" or "owner/name"."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name


def model_folder(said: str, name: str) -> None:
    """Refuse a model's name that is no folder, or one of something else, before transformers is asked."""
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{said}: {name} is a file; expected the model's folder, or an id on the Hugging Face hub.")
    if not folder.is_dir():
        if looks_like_a_folder(name):
            raise FileNotFoundError(
                f"{said}: {name}: no such folder; expected one with a model (config.json and weights), or an id on the "
                "Hugging Face hub such as owner/name."
            )
        return
    if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(
            f"{said}: the folder {name} holds no model: neither config.json nor adapter_config.json is in it. Was "
            "writing it interrupted?"
        )


def model_not_loaded(said: str, name: str, error: BaseException) -> NoReturn:
    """Say in one line why transformers could not load a model or tokenizer."""
    if not Path(name).is_dir():
        raise ValueError(
            f"{said}: {name!r} is no folder here, and it cannot be had from the Hugging Face hub either "
            f"({_first_line(error)}). Check the name; a private model needs `hf auth login`."
        ) from error
    raise ValueError(f"{said}: transformers cannot load {name}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def device(said: str, asked: str, available: bool, cpu_build: bool) -> None:
    if asked == "cuda" and not available:
        why = "this torch is built for the CPU only" if cpu_build else "torch finds no GPU it can use"
        raise ValueError(
            f"{said}: a GPU was asked for, but {why}; use --device cpu or auto. `alr-kernels doctor` shows what is "
            "there."
        )


def no_padding(name: str) -> NoReturn:
    raise ValueError(
        f"--tokenizer: that of {name} has neither a pad token nor an end-of-sequence token, so that texts of different "
        "length cannot be put into one batch; set tokenizer.pad_token and save it, or give another with --tokenizer."
    )


def missing_package(packages: Iterable[str], extra: str, what: str) -> NoReturn:
    raise ImportError(f'{what} needs {" and ".join(packages)}: pip install "alr-kernels[{extra}]"')


def exists(said: str, path: Path | str) -> NoReturn:
    raise FileExistsError(f"{said}: {path} is there already; choose another name, or give --overwrite to replace it.")


def nothing_to_resume(path: Path | str) -> NoReturn:
    raise FileNotFoundError(f"--resume: no whole checkpoint in {path}; leave --resume out to begin the run.")
