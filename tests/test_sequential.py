"""Five tasks one after the other on scikit-learn's digits (bench/sequential.py): forgetting, and who forgets less."""

from __future__ import annotations

import statistics

import pytest
import sequential
import torch

from alr_kernels import AlrAdamW, Importance

LAMBDA = {"split": 0.03, "permuted": 0.01}
SEEDS = (11, 12)  # not those of the results


@pytest.fixture(scope="module")
def runs():
    """All arms in both settings; the permuted tasks with half of the epochs."""
    found = {}
    for setting in sequential.SETTINGS:
        for arm in sequential.ARMS:
            rows = [sequential.run(setting, arm, LAMBDA[setting], seed, epochs=10) for seed in SEEDS]
            found[setting, arm] = {
                key: statistics.fmean(row[key] for row in rows) for key in ("average", "bwt", "learned")
            }
    return found


@pytest.mark.parametrize("arm", sequential.ARMS[1:])
def test_permuted_digits_are_forgotten_less(runs, arm):
    plain, regularized = runs["permuted", "none"], runs["permuted", arm]
    assert plain["bwt"] < -0.25, "without a penalty the first tasks are lost: else there is nothing to show"
    assert regularized["bwt"] > plain["bwt"] + 0.1
    assert regularized["average"] > plain["average"] + 0.05
    assert regularized["learned"] > plain["learned"] - 0.1, "and each task is still learned"


@pytest.mark.parametrize("arm", sequential.ARMS[1:])
def test_split_digits_are_not_forgotten_more(runs, arm):
    """With an output for every pair little is forgotten anyway."""
    plain, regularized = runs["split", "none"], runs["split", arm]
    assert regularized["bwt"] >= plain["bwt"] - 0.01
    assert regularized["average"] >= plain["average"] - 0.01


def test_path_integral_keeps_most_of_what_a_pass_over_the_data_would(runs):
    averages = {arm: runs["permuted", arm]["average"] for arm in sequential.ARMS}
    gains = {arm: average - averages["none"] for arm, average in averages.items()}
    assert gains["path_integral"] > 0.6 * max(gains["fisher"], gains["mas"]), averages


def test_tasks_are_what_they_say():
    images, digits = sequential.digits()
    split, permuted = (sequential.tasks_of(setting, 0) for setting in sequential.SETTINGS)
    for number, task in enumerate(split):
        for part in task[:3]:
            assert set(part.digits.tolist()) == {2 * number, 2 * number + 1}
    assert sum(len(part.digits) for task in split for part in task[:3]) == len(digits)
    first, second = permuted[0].train.images, permuted[1].train.images
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(1).values, second.sort(1).values), "the same pixels in another order"
    assert len(images) > 1700


def test_lambda_is_chosen_on_validation():
    rows = [
        {"setting": "split", "arm": "mas", "reg_lambda": 1.0, "validation": 0.9, "average": 0.1},
        {"setting": "split", "arm": "mas", "reg_lambda": 2.0, "validation": 0.8, "average": 0.9},
        {"setting": "permuted", "arm": "mas", "reg_lambda": 3.0, "validation": 1.0, "average": 0.9},
    ]
    assert sequential.chosen_lambda("split", "mas", rows) == 1.0


def test_recording_under_a_penalty_sees_the_task_alone():
    """Σω of a phase is the drop of the task's loss, also while the penalty pulls: its gradient is not in ω."""
    torch.manual_seed(0)
    task, model = sequential.tasks_of("permuted", 0)[0], sequential.build(0)
    batch = {"images": task.train.images[:256], "digits": task.train.digits[:256]}
    anchor = {name: param.detach().clone() for name, param in model.named_parameters()}
    importance = {name: torch.rand_like(param) for name, param in model.named_parameters()}
    with torch.no_grad():  # away from the anchor, so that the pull is at work
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.02)
    options = {"lr": 1e-4, "reg_lambda": 0.05, "weight_decay": 0.0, "record": True}
    optimizer = AlrAdamW(model.named_parameters(), importance, anchor=anchor, **options)
    first = float(sequential.losses(model, batch, task).mean().detach())
    for _ in range(30):
        optimizer.zero_grad()
        sequential.losses(model, batch, task).mean().backward()
        optimizer.step()
    last = float(sequential.losses(model, batch, task).mean().detach())
    recorded = optimizer.recorded_importance()
    total = sum(row.path_integral_sum for row in recorded.stats.values())
    assert float(optimizer.penalty()) > 0.1 * first, "the pull is at work"
    assert total == pytest.approx(first - last, rel=0.02)


@pytest.mark.parametrize("arm", sequential.ARMS[1:])
def test_every_task_is_remembered(arm, monkeypatch):
    """The importance of a task joins that of the tasks before it."""
    merged, seen = Importance.merged, []

    def watched(self, other, *rule):
        seen.append((self.steps, other.steps, rule))
        return merged(self, other, *rule)

    monkeypatch.setattr(Importance, "merged", watched)
    sequential.run("split", arm, 0.01, 0, epochs=1)
    assert len(seen) == sequential.TASKS - 1
    assert all(rule == ("decayed", sequential.DECAY) for *_, rule in seen)
    assert [past for past, *_ in seen[1:]] == [past + new for past, new, _ in seen[:-1]]
