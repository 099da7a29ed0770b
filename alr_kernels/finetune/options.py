"""Every option of record, tune and run: one statement each, from which flags, YAML keys and run cards are made.

Nothing heavy is imported here: the command line reads this file for its help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any


def option(
    default: Any = MISSING, help: str = "", *, names: tuple[str, ...] = (), choices: tuple[str, ...] = ()
) -> Any:
    """Return a dataclass field with what the command line says of it.

    ``names``: flags other than the field's own; ``choices``: of a string.
    """
    return field(default=default, metadata={"help": help, "names": names, "choices": choices})


@dataclass(frozen=True)
class ModelOptions:
    """Which model, in which precision, and what of it is trained."""

    model: str = option(
        help="Model to start from: a folder, or an id on the Hugging Face hub. An adapter's folder works."
    )
    tokenizer: str | None = option(None, "Folder or hub id of another tokenizer than the model's.")
    chat_template: str | None = option(None, "File with a chat template, for a tokenizer that has none.")
    dtype: str = option("auto", "Of the weights; auto: as they are saved.", choices=("auto", "fp32", "bf16", "fp16"))
    quantize: str = option(
        "none", "Keep the base model in 8 or 4 bits (bitsandbytes); needs --lora.", choices=("none", "int8", "nf4")
    )
    lora: str | None = option(
        None,
        "Train LoRA adapters instead of all weights: r=8,alpha=32,targets=q_proj+v_proj; 'default' for r=8,alpha=16.",
    )
    attention: str | None = option(None, "Attention implementation of transformers, such as sdpa or eager.")
    trust_remote_code: bool = option(False, "Run code that comes with a model from the hub.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    device: str = option("auto", "auto takes a GPU where there is one.", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class DataOptions:
    """What is learnt."""

    data: str = option(
        help="Text to train on: a .txt, .md, .jsonl, .csv or .parquet file, a folder of such, or a hub data set's id."
    )
    columns: str | None = option(
        None, "Which columns hold what, where names do not tell: text=body, or prompt=question,completion=answer, "
        "or messages=turns."
    )  # fmt: skip
    split: str = option("train", "Split of a hub data set.")
    subset: str | None = option(None, "Configuration of a hub data set.")
    max_rows: int | None = option(None, "Use only so many rows, drawn by the seed.")
    held_out: float = option(0.05, "Share of the rows that is held out to measure on, drawn by the seed.")
    held_out_data: str | None = option(None, "File, folder or id to measure on instead; --held-out is then 0.")


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
    epochs: float = option(1.0, "Passes over the data.")
    batch: int = option(8, "Sequences in a step on each device.")
    accumulate: int = option(1, "Batches that make one optimizer step.")
    lr: float | None = option(None, "Learning rate. (default: 2e-5, LoRA 2e-4)")
    schedule: str = option("cosine", "Of the learning rate.", choices=("cosine", "linear", "constant"))
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises.")
    seed: int = option(
        0, "Fixes data order, held-out rows, adapters and rounding: the same run twice, bit for bit on a CPU."
    )
    save_every: int | None = option(None, "Steps between checkpoints. (default: a tenth of the run)")
    keep: int = option(2, "Checkpoints that stay.")
    eval_every: int | None = option(None, "Steps between measurements. (default: a tenth of the run)")
    eval_batch: int | None = option(None, "Sequences in a batch while measuring. (default: --batch)")
    log_every: int = option(10, "Steps between entries of the log.")
    workers: int = option(0, "Processes that load data.")
    tensorboard: bool = option(False, "Write TensorBoard logs, too.")


@dataclass(frozen=True)
class OptimizerOptions:
    """AlrAdamW's own, in every phase."""

    betas: str = option("0.9,0.999", "Of AdamW.")
    eps: float = option(1e-8, "Of AdamW.")
    weight_decay: float = option(0.0, "Of matrices; biases and norms never decay.")
    max_grad_norm: float | None = option(
        1.0, "Clip the task gradient inside the step; 0: no clipping. Recording sees all of it."
    )
    state_dtype: str = option("fp32", "Of the moments.", choices=("fp32", "bf16", "int8"))
    master: str = option("auto", "Of bf16 weights; auto: split.", choices=("auto", "none", "split", "stochastic"))
    precise: bool = option(True, "IEEE division and square root.")
    stats: bool = option(True, "Log stiffness and drift of every layer.")
    backend: str = option("auto", "What serves the step.", choices=("auto", "native", "triton", "reference"))


@dataclass(frozen=True)
class RecordOptions:
    """How importance is made."""

    method: str = option(
        "path-integral", "path-integral trains on the data and integrates; the others take one pass, weights at rest.",
        choices=("path-integral", "fisher", "mas", "magnitude-gradient"),
    )  # fmt: skip
    xi: float = option(0.01, "ξ of the denominator.")
    relative: bool = option(True, "ξ in units of each tensor's mean squared move.")
    importance_dtype: str = option("fp32", "How importance is kept.", choices=("fp32", "bf16", "int8", "int4", "rank1"))
    record_after: float = option(0.0, "Share of the steps after which recording begins.")


@dataclass(frozen=True)
class PullOptions:
    """How hard what mattered is held."""

    reg_lambda: float | None = option(
        None, "λ ≥ 0: more forgets less and learns less; 0 is AdamW. (default: 0.1, LoRA 0.002)", names=("--lambda",)
    )
    coeffs: str = option("softmax", "How layers are weighed.", choices=("softmax", "proportional", "uniform"))
    temperature: str = option("auto", "T of the softmax: auto, or a number in units of the norm.")
    layers_by: str | None = option(None, "What a layer is. (default: block, LoRA module)", choices=("block", "module"))
    rebalance_every: int | None = option(None, "Re-balance the layers every so many steps (DynamicCoeffs).")
    mode: str = option("proximal", "How the penalty acts.", choices=("proximal", "coupled"))
    normalize: bool = option(True, "Divide importance by its mean, so that λ carries over.")
    tune_importance_dtype: str | None = option(
        None, "How importance is kept while tuning. (default: as in the file)", choices=("fp32", "bf16", "int8", "int4")
    )
    anchor_dtype: str | None = option(None, "Of the anchors. (default: as the weights)", choices=("fp32", "bf16"))


@dataclass(frozen=True)
class MeasureOptions:
    """What is known already: measured before, during and after tuning."""

    general: str | None = option(
        None, "Text that the model should not forget: measured on its held-out rows, never trained on."
    )
    general_columns: str | None = option(None, "As --columns, of --general.")
    general_split: str = option("train", "As --split, of --general.")
    general_subset: str | None = option(None, "As --subset, of --general.")
    general_held_out_data: str | None = option(None, "As --held-out-data, of --general.")


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


PARTS = {
    "record": (ModelOptions, DataOptions, TokenOptions, TrainOptions, OptimizerOptions, RecordOptions),
    "tune": (ModelOptions, DataOptions, MeasureOptions, TokenOptions, TrainOptions, OptimizerOptions, PullOptions),
    "run": (
        *(ModelOptions, DataOptions, MeasureOptions, TokenOptions, RunOptions, TrainOptions, OptimizerOptions),
        *(RecordOptions, PullOptions),
    ),
}  # verb → its parts, in the order of its help


def fields_of(verb: str) -> Iterator[tuple[type, Field[Any]]]:
    """Yield (part, field) of all options of a verb."""
    for part in PARTS[verb]:
        for entry in fields(part):
            yield part, entry
