"""Checks of the model, the importance and the job of a run, and their messages; see ``_validate.py``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from ._validate import listed


def fp16_weights(name: str, dtype: str) -> None:
    """Refuse to train all weights of a model in fp16."""
    if dtype == "fp16":
        raise ValueError(
            f"--dtype: expected bf16 or fp32 weights to train, got fp16 of {name!r}, in which small gradients and "
            "moves are lost; pass --dtype bf16 or --dtype fp32 (or train --lora, which keeps adapters in fp32)."
        )


def whole_weights(name: str, missing: Collection[str]) -> None:
    """Refuse a folder that lacks weights of a causal language model, which would be drawn at random."""
    if missing:
        raise ValueError(
            f"--model: expected a causal language model with all its weights in {name!r}, got one without "
            f"{listed(missing)}; is it a model of another kind, or only a part of one?"
        )


def no_tokenizer(said: str, name: str) -> NoReturn:
    raise FileNotFoundError(
        f"{said}: the folder {name} holds no tokenizer (no tokenizer.json and nothing else of the kind); save it "
        "there, or give that of the base model with --tokenizer."
    )


def vocabulary(tokenizer: str, tokens: int, rows: int) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings."""
    if tokens > rows:
        raise ValueError(
            f"--tokenizer: expected one of at most {rows} tokens, as the model has embeddings, got {tokens} of "
            f"{tokenizer!r}; pass the tokenizer that belongs to the model."
        )


def chat_template(path: str, error: Exception) -> NoReturn:
    raise ValueError(f"--chat-template: expected a text file with a Jinja template, got {path!r}: {error}.") from error


def lora_on_adapter(name: str) -> NoReturn:
    raise ValueError(
        f"--lora: expected none, because {name!r} is an adapter's folder and its own adapter is trained on; leave "
        "--lora out, or pass the base model as --model to begin a new adapter."
    )


def adapter_kind(name: str, kind: str) -> NoReturn:
    raise ValueError(
        f"--model: expected a LoRA adapter in {name!r}, got one of kind {kind}; merge it into its base model "
        "(PEFT's merge_and_unload) and pass the merged folder."
    )


def lora_modules(targets: Collection[str] | None, error: Exception, linear: Collection[str]) -> NoReturn:
    got = "none, and PEFT knows no default for this model" if targets is None else listed(targets)
    raise ValueError(
        f"--lora: expected targets that name modules of the model, got {got}; it has {listed(linear, 12)}: "
        "pass --lora targets=q_proj+v_proj with names of that list."
    ) from error


def quantized_alone(kind: str) -> NoReturn:
    raise ValueError(
        f"--quantize {kind}: expected adapters to train, because quantised weights stand still; add --lora, or leave "
        "--quantize out."
    )


def bitsandbytes_failed(kind: str, name: str, error: Exception) -> NoReturn:
    raise ValueError(f"--quantize {kind}: bitsandbytes could not load {name!r}: {error}.") from error


def importance_fits(
    file: str,
    model: str,
    entries: Mapping[str, Sequence[int]],
    trained: Mapping[str, Sequence[int]],
    *,
    by_lora: bool,
    lora: bool,
) -> None:
    """Refuse an importance that is not of this model, or that a LoRA run made where all weights are trained.

    Args:
        file, model: as the user named them.
        entries: name → shape, of the importance.
        trained: name → shape, of what is trained; of LoRA pairs the base weights.
        by_lora: whether the importance was recorded with LoRA.
        lora: whether adapters are trained.
    """
    unknown = [name for name in entries if name not in trained]
    differing = [name for name, shape in entries.items() if tuple(trained.get(name, shape)) != tuple(shape)]
    if len(unknown) == len(entries) or differing:
        name = differing[0] if differing else unknown[0]
        got = f"{name!r} of shape {tuple(entries[name])}"
        have = f"of shape {tuple(trained[name])} there" if name in trained else "not trained there"
        tried = "adapters are trained" if lora else "all weights are trained"
        raise ValueError(
            f"--importance: expected importance of the model {model!r}, got that of another one in {file!r}: it has "
            f"{got}, which is {have} ({tried}); record it on this model."
        )
    if unknown and by_lora and lora:
        raise ValueError(
            f"--importance: expected importance of adapted modules, got {file!r}, recorded with LoRA, with "
            f"{len(unknown)} that have no adapter now: {listed(unknown)}; pass the --lora targets it was recorded with."
        )
    if unknown:
        raise ValueError(
            f"--importance: expected importance of the model {model!r}, got {file!r} with {len(unknown)} entries more "
            f"than that has: {listed(unknown)}; record it on this model."
        )
    if by_lora and not lora:
        raise ValueError(
            f"--importance: {file!r} was recorded with LoRA and covers {len(entries)} of the {len(trained)} tensors "
            "that are trained without it; add --lora with the same targets, or record without --lora (that fits both)."
        )


def finite_loss(phase: str, step: int, loss: float) -> None:
    if not abs(loss) < float("inf"):
        raise RuntimeError(
            f"{phase}: expected a finite loss, got {loss} by step {step}; lower --lr, raise --warmup, or look for "
            "broken rows in the data. Checkpoints of earlier steps are whole."
        )


def estimator_alone(method: str, processes: int) -> None:
    if processes > 1:
        raise ValueError(
            f"--method {method}: expected one process, got {processes}; start it without a launcher, or record the "
            "path integral (--method path-integral), which uses all of them."
        )


def estimator_of_all(method: str, what: str) -> NoReturn:
    raise ValueError(
        f"--method {method}: expected a model whose own weights are looked at, got {what}; leave that out, or record "
        "the path integral (--method path-integral)."
    )


def model_in_the_way(option: str, folder: str, model: str) -> NoReturn:
    raise ValueError(
        f"{option} {folder}: expected a folder that --model {model} is not in, because that stays as it is; choose "
        "another."
    )


def unfinished(out: str) -> NoReturn:
    raise FileExistsError(
        f"--out {out}: a run that was not finished began there; go on with it by --resume, or begin anew with "
        "--overwrite."
    )


def foreign_model(out: str) -> NoReturn:
    raise ValueError(
        f"--out {out}: expected a new folder or one of an earlier run, got one with a model that none of them left "
        "(config.json without run.yaml); choose another folder."
    )


def foreign_files(option: str, out: str, names: Sequence[str]) -> NoReturn:
    raise FileExistsError(
        f"{option} {out}: expected a place where nothing has the name of what a run writes, got {listed(names)} "
        "there, which no run left and which stays as it is; choose another, or move that away."
    )


def in_use(out: str) -> NoReturn:
    raise RuntimeError(f"--out {out}: another run is writing there now; wait for its end, or choose another place.")


def changed_since(out: str, option: str, what: str) -> NoReturn:
    raise ValueError(
        f"--resume: expected {option} as it was when the run in {out!r} began, got {what}; bring the old one back, or "
        "begin anew with --overwrite."
    )


def reason(error: BaseException) -> str:
    """Return the first sentence of a foreign error, on one line."""
    text: Any = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")
