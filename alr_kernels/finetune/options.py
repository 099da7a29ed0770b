"""Every option of record, tune and run: one statement each, from which flags, YAML keys and run cards are made.

Nothing heavy is imported here: the command line reads this file for its help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    names: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    form: str = "",
    first: int = 0,
    rare: bool = False,
    path: bool = False,
) -> Any:
    """Return a dataclass field with what the command line says of it.

    Args:
        default: left out: it has to be given, as a flag or in the configuration.
        help: one sentence or two; what "auto" or None means stands in parentheses.
        names: flags other than the field's own.
        choices: of a string.
        form: what stands for the value in the help.
        first: its place among the options that come first in the help, from 1; 0: in its part's own panel.
        rare: shown under "Advanced".
        path: of a file or folder, where one is there of that name; a card keeps it absolute.
    """
    facts = {"help": help, "names": names, "choices": choices, "form": form, "first": first, "rare": rare, "path": path}
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, in which precision, and what of it is trained."""

    model: str = option(
        help="Model to start from: a folder, or an id on the Hugging Face hub. An adapter's folder works.",
        form="MODEL", first=1, path=True,
    )  # fmt: skip
    tokenizer: str | None = option(
        None, "Folder or hub id of another tokenizer than the model's.", rare=True, path=True
    )
    chat_template: str | None = option(
        None, "File with a chat template, for a tokenizer that has none.", form="FILE", rare=True, path=True
    )
    dtype: str = option(
        "auto", "Precision of the weights; auto: as they are saved.", choices=("auto", "fp32", "bf16", "fp16")
    )
    quantize: str = option(
        "none", "Keep the base model in 8 or 4 bits (bitsandbytes); needs --lora.", choices=("none", "int8", "nf4")
    )
    lora: str | None = option(
        None,
        "Train LoRA adapters instead of all weights: 'default' is r=8,alpha=16; otherwise such as "
        "r=8,alpha=32,targets=q_proj+v_proj, and dropout=0.05, rslora=true. Left out, alpha is 2r, targets PEFT's.",
        form="SPEC", first=6,
    )  # fmt: skip
    attention: str | None = option(None, "Attention implementation of transformers, such as sdpa or eager.", rare=True)
    trust_remote_code: bool = option(False, "Run code that comes with a model from the hub.", rare=True)
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    device: str = option("auto", "Where to train; auto: on a GPU where there is one.", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class DataOptions:
    """What is learnt."""

    data: str = option(
        help="Text to train on: a .txt, .md, .jsonl, .csv or .parquet file, a folder of such, or a hub data set's id.",
        form="DATA", first=2, path=True,
    )  # fmt: skip
    columns: str | None = option(
        None, "Which columns hold what, if names do not tell: text=body, or messages=turns, or prompt=q,completion=a.",
        form="PAIRS",
    )  # fmt: skip
    split: str = option("train", "Split of a hub data set.", rare=True)
    subset: str | None = option(None, "Configuration of a hub data set.", rare=True)
    max_rows: int | None = option(None, "Use only so many rows, drawn by the seed.")
    held_out: float = option(0.05, "Share of the rows that is held out to measure on, drawn by the seed.")
    held_out_data: str | None = option(None, "File, folder or id to measure on instead of held-out rows.", path=True)


@dataclass(frozen=True)
class TokenOptions:
    """How text becomes tokens."""

    max_length: int = option(1024, "Tokens of a sequence, at most; cut down to what the model takes.")
    packing: bool | None = option(
        None, "Join short texts into full sequences, each text's first token left out of the loss. "
        "(default: for plain text)"
    )  # fmt: skip
    loss_on: str = option(
        "answers", "What counts in the loss: answers (completions and assistant turns), or all tokens.",
        choices=("answers", "all"),
    )  # fmt: skip


@dataclass(frozen=True)
class TrainOptions:
    """How long and how fast."""

    steps: int | None = option(None, "Optimizer steps; instead of --epochs.")
    epochs: float = option(1.0, "Passes over the data; a part of one works.")
    batch: int = option(8, "Sequences in a step on each device.")
    accumulate: int = option(1, "Batches that make one optimizer step.")
    lr: float | None = option(None, "Learning rate. (default: 2e-5, LoRA 2e-4)")
    schedule: str = option(
        "cosine", "Of the learning rate, after its warm-up.", choices=("cosine", "linear", "constant")
    )
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises.")
    seed: int = option(
        0, "Fixes data order, held-out rows, adapters and rounding: the same run twice, bit for bit on a CPU."
    )
    save_every: int | None = option(None, "Steps between checkpoints. (default: a tenth of the run)")
    keep: int = option(2, "Checkpoints that stay while the run goes on.", rare=True)
    eval_every: int | None = option(None, "Steps between measurements. (default: a tenth of the run)")
    eval_batch: int | None = option(None, "Sequences in a batch while measuring. (default: --batch)", rare=True)
    log_every: int = option(10, "Steps between entries of the log.", rare=True)
    workers: int = option(0, "Processes that load data, besides the main one.", rare=True)
    tensorboard: bool = option(False, "Write TensorBoard logs, too.", rare=True)


@dataclass(frozen=True)
class OptimizerOptions:
    """AlrAdamW's own, in every phase."""

    betas: str = option("0.9,0.999", "Decay of AdamW's two moments.", rare=True)
    eps: float = option(1e-8, "Of AdamW's denominator.", rare=True)
    weight_decay: float = option(0.0, "Of matrices, as in AdamW; biases and norms never decay.")
    max_grad_norm: float | None = option(
        1.0, "Clip the task gradient's norm inside the step; 0: no clipping. Recording sees all of it."
    )
    state_dtype: str = option("fp32", "How AdamW's moments are kept.", choices=("fp32", "bf16", "int8"))
    master: str = option(
        "auto", "What makes steps on bf16 weights exact; auto: split.",
        choices=("auto", "none", "split", "stochastic"), rare=True,
    )  # fmt: skip
    precise: bool = option(True, "division and square root to the last bit.", rare=True)
    stats: bool = option(True, "logging of stiffness and drift of every layer.", rare=True)
    backend: str = option(
        "auto", "What computes the optimizer's step.", choices=("auto", "native", "triton", "reference"), rare=True
    )


@dataclass(frozen=True)
class RecordOptions:
    """How importance is made."""

    method: str = option(
        "path-integral", "path-integral trains on the data and integrates; the others read it, weights at rest.",
        choices=("path-integral", "fisher", "mas", "magnitude-gradient"),
    )  # fmt: skip
    xi: float = option(0.01, "ξ, which weighs how far a weight moved: Ω = ω / (Δθ² + ξ).", rare=True)
    relative: bool = option(True, "ξ in units of each tensor's mean squared move, so that it carries over.", rare=True)
    importance_dtype: str = option("fp32", "How importance is kept.", choices=("fp32", "bf16", "int8", "int4", "rank1"))
    record_after: float = option(0.0, "Share of the steps after which recording begins.", rare=True)


@dataclass(frozen=True)
class PullOptions:
    """How hard what mattered is held."""

    reg_lambda: float | None = option(
        None, "λ ≥ 0: more forgets less and learns less; 0 is AdamW. (default: 0.1, LoRA 0.002)",
        names=("--lambda",), first=7,
    )  # fmt: skip
    coeffs: str = option(
        "softmax", "How layers share the pull, by their importance.", choices=("softmax", "proportional", "uniform")
    )
    temperature: str = option("auto", "T of the softmax: auto, or a number in units of the norm.")
    layers_by: str | None = option(
        None, "What counts as one layer. (default: block, LoRA module)", choices=("block", "module")
    )
    rebalance_every: int | None = option(None, "Re-balance the layers every so many steps (DynamicCoeffs).", rare=True)
    mode: str = option(
        "proximal",
        "How the penalty acts: implicitly, stable for any λ; or added to the gradient, as published.",
        choices=("proximal", "coupled"),
    )
    normalize: bool = option(True, "division of importance by its mean, so that λ carries over.", rare=True)
    tune_importance_dtype: str | None = option(
        None, "How importance is kept while tuning. (default: as in the file)", choices=("fp32", "bf16", "int8", "int4")
    )
    anchor_dtype: str | None = option(
        None,
        "How the weights that are pulled to are kept. (default: as the weights)",
        choices=("fp32", "bf16"),
        rare=True,
    )


@dataclass(frozen=True)
class MeasureOptions:
    """What is known already: measured before, during and after tuning."""

    general: str | None = option(
        None, "Text that the model should not forget, as --data: measured on its held-out rows (run records on the "
        "others).", form="DATA", first=5, path=True,
    )  # fmt: skip
    general_columns: str | None = option(None, "As --columns, of --general.", rare=True)
    general_split: str = option("train", "As --split, of --general.", rare=True)
    general_subset: str | None = option(None, "As --subset, of --general.", rare=True)
    general_held_out_data: str | None = option(None, "As --held-out-data, of --general.", rare=True, path=True)


@dataclass(frozen=True)
class RunOptions:
    """What only `run` has."""

    start_from: str = option(
        "model", "Tune from the model as it was given, or from what it became while importance was recorded.",
        choices=("model", "recorded"),
    )  # fmt: skip
    record_steps: int | None = option(None, "Optimizer steps of recording. (default: as --steps)")
    record_epochs: float | None = option(None, "Passes over the general text. (default: as --epochs)")
    record_lr: float | None = option(None, "Learning rate of recording. (default: as --lr)")
    baseline: bool = option(False, "Tune once more without the pull, to see what it saves.")


KEEP_CHECKPOINTS = "Keep the checkpoints once the run is done."


@dataclass(frozen=True)
class RecordFiles:
    """What record writes."""

    out: str = option(help="File of the importance, .safetensors.", form="FILE", first=4, path=True)
    save_model: str | None = option(
        None, "Keep the model that recording trained in this folder, to tune from it.", form="DIR", path=True
    )
    keep_checkpoints: bool = option(False, KEEP_CHECKPOINTS, rare=True)


@dataclass(frozen=True)
class TuneFiles:
    """What tune reads besides model and data, and writes."""

    out: str = option(help="Folder of the tuned model or adapter.", form="DIR", first=4, path=True)
    importance: str | None = option(
        None, "Importance of the model's weights, from record. Left out only with --lambda 0.", form="FILE", first=3,
        path=True,
    )  # fmt: skip
    report: str | None = option(None, "Write a page with pictures of the run into this folder.", form="DIR", path=True)
    keep_checkpoints: bool = option(False, KEEP_CHECKPOINTS, rare=True)


@dataclass(frozen=True)
class RunFiles:
    """What run writes."""

    out: str = option(help="Folder of importance, tuned model, results and report.", form="DIR", first=4, path=True)
    keep_checkpoints: bool = option(False, KEEP_CHECKPOINTS, rare=True)


PARTS: dict[str, tuple[type[Any], ...]] = {
    "record": (RecordFiles, ModelOptions, DataOptions, TokenOptions, TrainOptions, OptimizerOptions, RecordOptions),
    "tune": (
        *(TuneFiles, ModelOptions, DataOptions, MeasureOptions, TokenOptions, TrainOptions, OptimizerOptions),
        PullOptions,
    ),
    "run": (
        *(RunFiles, ModelOptions, DataOptions, MeasureOptions, TokenOptions, TrainOptions, RunOptions),
        *(OptimizerOptions, RecordOptions, PullOptions),
    ),
}  # verb → its parts, in the order of its help
FILES = "Files and how to go on"
REQUIRED = {"run": ("general",)}  # by verb, beside the options that have no default
PANELS: dict[type[Any], str] = {
    ModelOptions: "Model",
    DataOptions: "Data",
    MeasureOptions: "Data",
    TokenOptions: "Data",
    TrainOptions: "Training",
    RunOptions: "Training",
    OptimizerOptions: "Optimizer",
    RecordOptions: "Importance",
    PullOptions: "Pull",
    **dict.fromkeys((RecordFiles, TuneFiles, RunFiles), FILES),
}  # part → heading in the help


def fields_of(verb: str) -> Iterator[tuple[type[Any], Field[Any]]]:
    """Yield (part, field) of all options of a verb.

    >>> [field.name for part, field in fields_of("record") if part is RecordFiles]
    ['out', 'save_model', 'keep_checkpoints']
    """
    for part in PARTS[verb]:
        for entry in fields(part):
            yield part, entry
