"""The claim "20 times faster, 10-15 % of the storage", measured: what importance costs beyond training, and its bytes.

The path integral is recorded in the optimizer's own pass, so that its cost is what the step takes longer, and one
finalisation. A Fisher needs a pass over the data of its own: sample by sample, as it is usually written, or batched, as
``fisher_importance`` does it. All are measured on the same model and samples and brought to the paper's 20,000 samples.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import AlrAdamW
from ..demo.models import VOCABULARY, build_model
from ..importance.files import ImportanceWriter
from .estimators import SHAPES, compare, token_batches
from .timing import Sample, in_rounds, spread, synchronize

STEPS = 10  # timed together
SAMPLES = 20_000  # of the paper's Fisher
Shape = tuple[int, int, int]
SHORT = ((16, 128, 4), (16, 16, 8))  # as SHAPES, for a quick look
LEAN = {"state_dtype": "int8", "master": "split"}  # of the published models' optimizer
TARGETS = ("q_proj.weight", "v_proj.weight")  # what the paper's LoRA keeps importance of
RANK = 16  # of the LoRA whose factors are the anchor
DTYPES = ("fp32", "bf16", "int8", "int4", "rank1")
WRITTEN = ("int4", "rank1")  # to real files: half a gigabyte at most


def config_of(name: str) -> Any:
    """Return the transformers config of a published model, by its shapes alone."""
    import transformers

    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
    llama: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, **rope}
    if name == "llama-3.2-3b":
        return transformers.LlamaConfig(
            **llama, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
            tie_word_embeddings=True,
        )  # fmt: skip
    if name == "llama-3.1-8b":
        return transformers.LlamaConfig(
            **llama, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32
        )
    if name == "gptj-6b":
        return transformers.GPTJConfig()
    raise ValueError(f"model: expected 'llama-3.2-3b', 'llama-3.1-8b' or 'gptj-6b', got {name!r}")


MODELS = ("llama-3.2-3b", "gptj-6b", "llama-3.1-8b")


def shapes_of_model(name: str) -> dict[str, tuple[int, ...]]:
    """Return name → shape of every parameter, tied ones once; nothing is allocated."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(name))
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def storage(
    models: Sequence[str] = MODELS,
    dtypes: Sequence[str] = DTYPES,
    written: Sequence[str] = WRITTEN,
    tick: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Compare the files of the importance of q_proj and v_proj, in every form, with a Fisher's of all weights.

    Args:
        models: of :data:`MODELS`.
        dtypes: forms of storage.
        written: those of which real files are written, of random values; of the others, as of the Fisher, the size is
            taken that a file has before a value is written.
        tick: is told what is looked at.

    Returns:
        per model and form: bytes of the file, of an fp32 Fisher of all weights, and their quotient; bytes of EWC, which
        keeps an fp32 anchor of all weights beside it, of our anchor (LoRA's factors in fp32 at rank :data:`RANK`), and
        the quotient of both with their anchors.
    """
    rows = []
    for name in models:
        tick(name)
        shapes = shapes_of_model(name)
        chosen = {key: shape for key, shape in shapes.items() if key.endswith(TARGETS)}
        elements, total = (sum(map(math.prod, some.values())) for some in (chosen, shapes))
        fisher = _file_bytes(shapes, "fp32", write=False)
        anchor = sum(4 * RANK * sum(shape) for shape in chosen.values())
        for dtype in dtypes:
            tick(f"{name}, {dtype}")
            size = _file_bytes(chosen, dtype, write=dtype in written)
            rows.append(
                {
                    "model": name,
                    "parameters": total,
                    "tensors": len(chosen),
                    "elements": elements,
                    "dtype": dtype,
                    "file_bytes": size,
                    "written": dtype in written,
                    "fisher_bytes": fisher,
                    "share": size / fisher,
                    "share_fp32": 4 * elements / fisher,  # the paper's figure
                    "rank": RANK,
                    "anchor_bytes": anchor,
                    "ewc_bytes": fisher + 4 * total,
                    "share_of_ewc": (size + anchor) / (fisher + 4 * total),
                }
            )
    return rows


def _file_bytes(shapes: dict[str, tuple[int, ...]], dtype: str, write: bool) -> int:
    """Return the size of an importance file of these tensors; ``write``: of one that is written, and removed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "importance.safetensors"
        writer = ImportanceWriter(path, shapes, dtype=dtype, method="path_integral", xi=1e-6)
        if not write:
            writer.abort()
            return writer.nbytes
        with writer:
            for key, shape in shapes.items():
                writer.add(key, torch.randn(shape).mul_(2.0).exp_())
        return path.stat().st_size


DEMO_MODELS = ("demo-llama", "demo-gptj")


def models_for(device: str) -> tuple[str, ...]:
    """Return what is measured there: the demo's models on a CPU, published shapes on a GPU."""
    return DEMO_MODELS if device == "cpu" else MODELS


def run_model(name: str, device: str, *, rounds: int = 7, shapes: Sequence[Shape] = SHAPES) -> dict[str, Any]:
    """Build a randomly initialised model and measure it; one that does not fit is skipped with the reason."""
    import transformers

    try:
        if name in DEMO_MODELS:
            model = build_model(name.removeprefix("demo-"), 0, context=max(tokens for _, tokens, _ in shapes)).to(
                device
            )
            found = run_claim(model.eval(), VOCABULARY, shapes, rounds=rounds)
        else:
            with torch.device(device):
                config = config_of(name)
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            found = run_claim(model.eval(), config.vocab_size, shapes[:1], rounds=rounds, optimizer_options=LEAN)
    except torch.OutOfMemoryError:
        return {"model": name, "skipped": "it does not fit into the device's memory"}
    return {"model": name, **found}


def run_claim(
    model: nn.Module,
    vocabulary: int,
    shapes: Sequence[Shape] = SHAPES,
    *,
    rounds: int = 7,
    optimizer_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure what each importance costs on one model, beside a training step.

    Args:
        model: a causal language model of transformers.
        vocabulary: of the random token ids.
        shapes: (samples a batch, tokens a sample, batches) of the Fisher passes; the first is also the training's.
        rounds: of each timing.
        optimizer_options: of AlrAdamW, for both steps.

    Returns:
        ``fisher``: ``estimators.compare`` of each shape. Seconds of a training step, of the optimizer's step without
        and with recording, of finalising to int4; and what these make for :data:`SAMPLES` samples.
    """
    kind = next(model.parameters()).device.type
    fisher = [compare(model, vocabulary, *shape[:2], count=shape[2], rounds=min(rounds, 5)) for shape in shapes]
    batch, length, _ = shapes[0]
    data = token_batches(batch, length, 1, vocabulary)[0]
    data = {key: ids.to(kind) for key, ids in data.items()}
    result: dict[str, Any] = {
        "parameters": sum(param.numel() for param in model.parameters()),
        "batch": batch,
        "length": length,
        "fisher": fisher,
        **_recording(model, data, kind, rounds, optimizer_options or {}),
    }
    steps = SAMPLES / batch
    extra = steps * max(result["recording_s"][0], 0.0) + result["finalise_s"]
    result["samples"] = SAMPLES
    result["training_s"] = steps * result["training_step_s"][0]
    result["path_integral_s"] = extra
    result["path_integral_share_of_training"] = extra / result["training_s"]
    for way in ("loop", "batched"):
        seconds = SAMPLES * fisher[0][f"{way}_s"] / (batch * fisher[0]["batches"])
        result[f"{way}_s"] = seconds
        result[f"{way}_over_path_integral"] = seconds / extra
    return result


def _repeated(step: Callable[[], Any]) -> Callable[[], None]:
    """Return :data:`STEPS` steps in a row: of a small model, one is over before its time can be told from noise."""

    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def _recording(
    model: nn.Module, data: dict[str, Tensor], kind: str, rounds: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Time the optimizer's step without and with recording, and a whole training step."""
    optimizers: dict[str, AlrAdamW] = {}
    samples: dict[str, list[Sample]] = {}

    def train() -> None:
        model.zero_grad()
        model(**data).loss.backward()
        optimizers["plain"].step()

    for name in ("plain", "recording"):
        optimizers[name] = AlrAdamW(model.named_parameters(), lr=1e-5, record=name == "recording", **options)
        model(**data).loss.backward()
        optimizers[name].step()
        if kind != "cpu":  # steady times, and not the memory for both
            runs = {name: _repeated(optimizers[name].step)} | ({"training": train} if name == "plain" else {})
            samples |= in_rounds(runs, rounds, kind)
            if name == "plain":
                optimizers.clear()
    if kind == "cpu":
        train()
        blocks = {name: _repeated(optimizer.step) for name, optimizer in optimizers.items()}
        samples = in_rounds({**blocks, "training": train}, 5 * rounds, kind)
    plain, recording = ([sample.device_s / STEPS for sample in samples[name]] for name in ("plain", "recording"))
    begin = time.perf_counter()
    optimizers["recording"].recorded_importance(dtype="int4", allow_nonfinite=True)
    synchronize(kind)
    return {
        "training_step_s": spread([sample.device_s for sample in samples["training"]]),
        "step_s": spread(plain),
        "recording_step_s": spread(recording),
        "recording_s": spread([a - b for a, b in zip(recording, plain, strict=True)]),
        "finalise_s": time.perf_counter() - begin,
    }
