"""Five tasks one after the other on scikit-learn's digits: what is left of the first ones at the end.

    split      five pairs of digits, told apart one pair after the other; the pair is known (task-incremental)
    permuted   all ten digits, the pixels shuffled anew for each task (domain-incremental)

Arms: AdamW, and AlrAdamW with the importance of the path integral (recorded while the tasks are learned, the penalty
acting), of the Fisher (EWC) and of MAS; importances of all tasks so far are merged, the anchor is the weights after
the last one. λ of each arm is chosen on seed 0's validation accuracy, then read on test over other seeds.

    python bench/sequential.py results.json        both settings, five seeds: about three minutes on two cores
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alr_kernels import AlrAdamW, Importance, fisher_importance, mas_importance
from alr_kernels.benchmark.stamp import stamp

TASKS = 5
ARMS = ("none", "path_integral", "fisher", "mas")
SETTINGS = ("split", "permuted")
LAMBDAS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
CHOOSING_SEED, SEEDS = 0, (1, 2, 3, 4, 5)
DECAY = 1.0  # of what earlier tasks found important
BATCH, LR = 32, 1e-3
EPOCHS = {"split": 20, "permuted": 20}


class Part(NamedTuple):
    """Images [n, 64] in [0, 1] and digits [n]."""

    images: Tensor
    digits: Tensor


class Task(NamedTuple):
    """One task: what it is trained, chosen and judged on, and which outputs belong to it."""

    train: Part
    validation: Part
    test: Part
    outputs: slice


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return all 1,797 images and their digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def tasks_of(setting: str, seed: int) -> list[Task]:
    """Return the five tasks; images are split 60 : 20 : 20, the same for every task."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    cuts = (0, round(0.6 * len(order)), round(0.8 * len(order)), len(order))
    parts = [order[begin:end] for begin, end in itertools.pairwise(cuts)]
    result = []
    for task in range(TASKS):
        if setting == "split":
            chosen = [part[(labels[part] // 2) == task] for part in parts]
            outputs, pixels = slice(2 * task, 2 * task + 2), torch.arange(64)
        else:
            chosen, outputs = parts, slice(0, 10)
            pixels = torch.randperm(64, generator=generator) if task else torch.arange(64)
        result.append(Task(*(Part(images[part][:, pixels], labels[part]) for part in chosen), outputs))
    return result


def build(seed: int) -> nn.Module:
    """Return an untrained multi-layer perceptron."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def logits(model: nn.Module, images: Tensor, task: Task) -> Tensor:
    """Return the outputs of the task's own digits."""
    return model(images)[:, task.outputs]


def losses(model: nn.Module, batch: dict[str, Tensor], task: Task) -> Tensor:
    """Return each sample's loss [n]."""
    targets = batch["digits"] - task.outputs.start
    return nn.functional.cross_entropy(logits(model, batch["images"], task), targets, reduction="none")


@torch.no_grad()
def accuracy(model: nn.Module, part: Part, task: Task) -> float:
    """Return the share of digits that are told."""
    told = logits(model, part.images, task).argmax(1) + task.outputs.start
    return float((told == part.digits).float().mean())


def train(model: nn.Module, optimizer: AlrAdamW, task: Task, epochs: int, generator: torch.Generator) -> None:
    """Learn one task."""
    for _ in range(epochs):
        for rows in torch.randperm(len(task.train.digits), generator=generator).split(BATCH):
            optimizer.zero_grad()
            losses(
                model, {"images": task.train.images[rows], "digits": task.train.digits[rows]}, task
            ).mean().backward()
            optimizer.step()


def importance_of(arm: str, model: nn.Module, optimizer: AlrAdamW, task: Task) -> Importance:
    """Return how much each weight matters for the task that was just learned."""
    if arm == "path_integral":
        return optimizer.recorded_importance(1e-3, relative=False)
    batches = [
        {"images": images, "digits": labels}
        for images, labels in zip(task.train.images.split(256), task.train.digits.split(256), strict=True)
    ]
    if arm == "fisher":
        return fisher_importance(model, batches, lambda net, batch: losses(net, batch, task), progress=False)
    return mas_importance(model, batches, lambda net, batch: logits(net, batch["images"], task), progress=False)


def run(setting: str, arm: str, reg_lambda: float, seed: int, epochs: int | None = None) -> dict[str, Any]:
    """Learn the five tasks one after the other and return what is known of each after each.

    Returns:
        ``accuracy`` and ``validation``: [tasks learned][task] ``average``: over all tasks at the end. ``bwt``: backward
        transfer, the mean of (accuracy at the end − accuracy when it was learned) over all tasks but the last.
    """
    tasks, model = tasks_of(setting, seed), build(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = AlrAdamW(model.named_parameters(), lr=LR, reg_lambda=reg_lambda, record=arm == "path_integral")
    importance: Importance | None = None
    table: dict[str, list[list[float]]] = {"test": [], "validation": []}
    began = time.perf_counter()
    for task in tasks:
        train(model, optimizer, task, epochs or EPOCHS[setting], generator)
        for part in table:
            table[part].append([accuracy(model, getattr(task, part), task) for task in tasks])
        if arm != "none":
            found = importance_of(arm, model, optimizer, task)
            importance = found if importance is None else importance.merged(found, "decayed", DECAY)
            optimizer.start_phase(importance, "uniform")
    last = table["test"][-1]
    return {
        "setting": setting,
        "arm": arm,
        "reg_lambda": reg_lambda,
        "seed": seed,
        "accuracy": table["test"],
        "average": statistics.fmean(last),
        "validation": statistics.fmean(table["validation"][-1]),
        "bwt": statistics.fmean(last[i] - table["test"][i][i] for i in range(TASKS - 1)),
        "learned": statistics.fmean(table["test"][i][i] for i in range(TASKS)),
        "seconds": time.perf_counter() - began,
    }


def chosen_lambda(setting: str, arm: str, searched: list[dict[str, Any]]) -> float:
    """Return the λ of the best average validation accuracy on the choosing seed."""
    rows = [row for row in searched if (row["setting"], row["arm"]) == (setting, arm)]
    return max(rows, key=lambda row: row["validation"])["reg_lambda"]


def main(path: str) -> None:
    """Search, run and write; progress on the terminal."""
    search, runs = [], []
    for setting in SETTINGS:
        for arm in ARMS[1:]:
            search += [run(setting, arm, reg_lambda, CHOOSING_SEED) for reg_lambda in LAMBDAS]
        for arm in ARMS:
            reg_lambda = 0.0 if arm == "none" else chosen_lambda(setting, arm, search)
            rows = [run(setting, arm, reg_lambda, seed) for seed in SEEDS]
            runs += rows
            average, bwt, learned = (
                statistics.fmean(row[key] for row in rows) for key in ("average", "bwt", "learned")
            )
            print(
                f"{setting:9} {arm:14} λ {reg_lambda:<6g} average {average:.3f}  BWT {bwt:+.3f}  learned {learned:.3f}"
            )
    with open(path, "w", encoding="utf-8") as file:
        json.dump(
            {"alr_kernels": stamp(), "decay": DECAY, "epochs": EPOCHS, "search": search, "runs": runs}, file, indent=1
        )


if __name__ == "__main__":
    main(sys.argv[1])
