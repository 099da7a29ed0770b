"""What recording and penalty of LoRA pairs add to a whole model's step, and what they cost the host.

The pairs are those of q_proj and v_proj of LLaMA-3.1-8B at rank 8; on a CPU fewer of them, for one step in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import AlrAdamW
from ..lora import lora_pairs
from .timing import Sample, Step, in_rounds, once, ratio, spread

MODEL, RANK, SCALING = "llama-3.1-8b", 8, 2.0
TARGETS = {"q_proj": (4096, 4096), "v_proj": (1024, 4096)}
LAYERS = {"cpu": 2, "cuda": 32}
BATCH, LENGTH = 4, 2048  # 8k tokens a training step
HOST_PAIRS, HOST_SIDE = 64, 64  # so small that only the number of operations counts

PLAIN = "torch AdamW fused, factors only"
OURS = "AlrAdamW, factors only"
FULL = "recording + penalty (int8 Ω, proximal)"
VARIANTS: dict[str, tuple[bool, dict[str, Any]]] = {  # name → whether there is a penalty, and further options
    "penalty (int8 Ω, proximal)": (True, {}),
    "penalty (int8 Ω, coupled)": (True, {"mode": "coupled"}),
    "recording": (False, {"record": True}),
    FULL: (True, {"record": True}),
    "recording + penalty (int8 Ω, coupled)": (True, {"record": True, "mode": "coupled"}),
}

Sizes = list[tuple[int, int]]


class Factors(NamedTuple):
    """LoRA factors with gradients, by the name of their weight."""

    tuples: list[tuple[str, Tensor, Tensor, float]]  # name, A, B, scaling, as lora_pairs takes them
    named: list[tuple[str, Tensor]]

    @classmethod
    def of(cls, sizes: Sequence[Sequence[int]], rank: int, device: str) -> Factors:
        """Return seeded factors of weights of these sizes."""
        generator = torch.Generator(device).manual_seed(0)

        def factor(*size: int) -> nn.Parameter:
            param = nn.Parameter(torch.randn(size, generator=generator, device=device).mul_(0.02))
            param.grad = torch.randn(size, generator=generator, device=device).mul_(1e-3)
            return param

        tuples = [(f"layers.{i}.weight", factor(rank, n), factor(m, rank), SCALING) for i, (m, n) in enumerate(sizes)]
        return cls(tuples, [(f"{name}.{k}", p) for name, a, b, _ in tuples for k, p in (("A", a), ("B", b))])

    def importance(self) -> dict[str, Tensor]:
        """Return Ω of the weights, uniform on [0, 1)."""
        sizes = {name: (b.shape[0], a.shape[1]) for name, a, b, _ in self.tuples}
        return {name: torch.rand(size, device=self.tuples[0][1].device) for name, size in sizes.items()}


def optimizers(sizes: Sequence[Sequence[int]], rank: int, device: str) -> dict[str, Step]:
    """Return the step of every variant by name, each on factors of its own."""
    plain, ours = (Factors.of(sizes, rank, device).named for _ in range(2))
    steps: dict[str, Step] = {
        PLAIN: torch.optim.AdamW([param for _, param in plain], fused=True).step,
        OURS: AlrAdamW(ours).step,
    }
    for name, (penalised, options) in VARIANTS.items():
        factors = Factors.of(sizes, rank, device)
        importance = factors.importance() if penalised else None
        coded: dict[str, Any] = {"importance_dtype": "int8"} if penalised else {}
        optimizer = AlrAdamW(factors.named, importance, lora=lora_pairs(factors.tuples), **coded, **options)
        steps[name] = optimizer.step
        for _ in range(2):  # encodes Ω, after which the given one can go
            optimizer.step()
        del importance
    return steps


def sizes_of(shape: Sequence[int], device: str) -> Sizes:
    """Return the weights' sizes, shrunk as ``shape`` is to q_proj's."""
    rows, columns = (size / full for size, full in zip(shape, TARGETS["q_proj"], strict=True))
    one = [(max(1, round(m * rows)), max(1, round(n * columns))) for m, n in TARGETS.values()]
    return one * LAYERS[device]


def run_model(device: str, sizes: Sizes, *, rounds: int = 15, budget_s: float = 10.0) -> dict[str, Any]:
    """Time the optimizer's step in every variant, and on a GPU a training step of the model.

    Returns:
        facts and ``rows``: median, p20, p80 in seconds; ``ratio`` to torch's AdamW and ``extra_s`` over it, of the same
        round. ``training``: the training step, or why there is none; ``share_of_training``: what recording and penalty
        add to it, as a share of it, or None.
    """
    steps = optimizers(sizes, RANK, device)
    samples = in_rounds(steps, rounds, device, budget_s)
    rows = [_row(name, times, samples[PLAIN]) for name, times in samples.items()]
    steps.clear()
    _release(device)
    training: dict[str, Any] = {"skipped": "a model of 8 billion parameters is measured on a GPU only"}
    if device == "cuda":
        training = published_training_step(device)
    full = next(row for row in rows if row["name"] == FULL)
    seconds = training.get("seconds")
    return {
        "model": MODEL,
        "rank": RANK,
        "pairs": len(sizes),
        "whole_model": len(sizes) == len(TARGETS) * LAYERS["cuda"],
        "elements": sum(m * n for m, n in sizes),
        "rows": rows,
        "training": training,
        "share_of_training": None if seconds is None else full["extra_s"][0] / seconds,
    }


def run_host(device: str, *, rounds: int = 15, budget_s: float = 10.0) -> dict[str, Any]:
    """Time until ``step()`` returns with many small pairs: what a GPU's host spends, whatever their size.

    On a CPU with one thread, so that no thread waits for another within microseconds of work.
    """
    sizes = [(HOST_SIDE, HOST_SIDE)] * HOST_PAIRS
    steps = optimizers(sizes, RANK, device)
    for step in steps.values():
        step()
    with _one_thread():
        found = in_rounds(steps, rounds, device, budget_s)
    samples = {name: [Sample(sample.host_s, sample.host_s) for sample in times] for name, times in found.items()}
    rows = [_row(name, times, samples[PLAIN]) for name, times in samples.items()]
    return {"pairs": HOST_PAIRS, "side": HOST_SIDE, "rank": RANK, "rows": rows}


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row(name: str, times: Sequence[Sample], plain: Sequence[Sample]) -> dict[str, Any]:
    median, p20, p80 = spread([sample.device_s for sample in times])
    return {
        "name": name,
        "rounds": len(times),
        "median_s": median,
        "p20_s": p20,
        "p80_s": p80,
        "ratio": ratio(times, plain),
        "extra_s": spread([a.device_s - b.device_s for a, b in zip(times, plain, strict=True)]),
    }


# ---- a training step ----


def published_training_step(device: str) -> dict[str, Any]:
    """Time forward and backward of the model with random weights and LoRA; see :func:`training_step`."""
    try:
        from .claim import config_of

        return training_step(config_of(MODEL), device)
    except ImportError as missing:
        return {"skipped": f'{missing.name} is not installed: pip install "alr-kernels[train]"'}


class Adapted(torch.nn.Module):
    """A frozen linear layer with LoRA beside it: what PEFT computes, without needing it where there is no pip."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.down = torch.nn.Linear(base.in_features, RANK, **like)
        self.up = torch.nn.Linear(RANK, base.out_features, **like)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x)) * SCALING


def adapt(model: torch.nn.Module) -> None:
    """Freeze a model and put LoRA beside its target modules."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in TARGETS:
            setattr(model.get_submodule(parent), name, Adapted(module))


def training_step(config: Any, device: str, *, batch: int = BATCH, length: int = LENGTH) -> dict[str, Any]:
    """Time one step, forward and backward, in bf16; with activation checkpointing where it does not fit without."""
    import transformers

    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    parameters = sum(param.numel() for param in model.parameters())
    adapt(model)
    ids = torch.randint(config.vocab_size, (batch, length), device=device)

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    facts = {"batch": batch, "length": length, "parameters": parameters}
    for checkpointing in (False, True):
        if checkpointing:
            _checkpoint(model)
        seconds = _seconds(step, device)
        if seconds is not None:
            return {**facts, "checkpointing": checkpointing, "seconds": seconds}
        model.zero_grad()
        _release(device)
    return {**facts, "skipped": "it does not fit into the device's memory"}


def _seconds(step: Step, device: str) -> float | None:
    """Return the time of the second call, or None where there is no memory for it."""
    try:
        step()
        return once(step, device).device_s
    except torch.OutOfMemoryError:
        return None


def _checkpoint(model: Any) -> None:
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # the new name, or the old
    model.enable_input_require_grads()


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
