"""Fisher importance in batches against the loop over samples that one would write without it."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from ..importance import fisher_importance
from .timing import Step, in_rounds

SHAPES = ((16, 128, 16), (16, 16, 32))  # samples a batch, tokens a sample, batches


def token_batches(samples: int, tokens: int, count: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of random tokens with labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (count, samples, tokens), generator=generator)
    return [{"input_ids": batch, "labels": batch.clone()} for batch in ids]


def plain_loop(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return mean squared gradients, one sample at a time."""
    sums = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    samples = 0
    for batch in batches:
        for n in range(len(batch["input_ids"])):
            model(**{key: value[n : n + 1] for key, value in batch.items()}).loss.backward()
            for name, param in model.named_parameters():
                if param.grad is not None:
                    sums[name] += param.grad**2
            model.zero_grad()
            samples += 1
    return {name: total / samples for name, total in sums.items()}


def compare(
    model: torch.nn.Module, vocabulary: int, samples: int, tokens: int, *, count: int = 16, rounds: int = 3
) -> dict[str, Any]:
    """Time both ways on a causal language model of transformers, in turn, and say how far apart they are.

    Returns:
        seconds of each way over ``count`` batches (medians of ``rounds``; the comparison with which an estimate begins
        takes as long as a batch or two and is in them), of one forward and backward pass a batch alone, the ratio of
        the first two (median, least, most), and the largest difference relative to each tensor's maximum.
    """
    device = next(model.parameters()).device
    batches = token_batches(samples, tokens, count, vocabulary)
    batches = [{key: ids.to(device) for key, ids in batch.items()} for batch in batches]

    def passes() -> None:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()

    def batched() -> Any:
        return fisher_importance(model, batches, progress=False)

    expected, got = plain_loop(model, batches), batched()
    apart = [float((got[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()]
    del expected, got
    steps: dict[str, Step] = {"loop": lambda: plain_loop(model, batches), "batched": batched, "passes": passes}
    times = in_rounds(steps, rounds, device.type)
    seconds = {name: [sample.device_s for sample in found] for name, found in times.items()}
    ratios = [a / b for a, b in zip(seconds["loop"], seconds["batched"], strict=True)]
    return {
        "samples": samples,
        "tokens": tokens,
        "batches": count,
        "loop_s": statistics.median(seconds["loop"]),
        "batched_s": statistics.median(seconds["batched"]),
        "forward_backward_s": statistics.median(seconds["passes"]),
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        "largest_relative_difference": max(apart),
    }
