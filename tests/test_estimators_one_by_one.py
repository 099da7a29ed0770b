"""Estimators of importance: what a batch cannot be trusted with is found out, and taken one sample at a time."""

from __future__ import annotations

import warnings

import estimator_cases as cases
import pytest
import torch
from estimator_cases import (
    CASES,
    Scale,
    assert_close,
    batches_of,
    mlp,
    plain_loop,
    points,
    squared,
    wide,
)
from torch import nn

from alr_kernels import fisher_importance
from alr_kernels.importance.estimators import objectives, sweep


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Centred(nn.Module):
    """Samples that interact."""

    def forward(self, x):
        return x - 0.5 * x.mean(0, keepdim=True)


class Borrowed(nn.Module):
    """A weight used outside its module as well."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(x) + x @ self.layer.weight


class Turned(nn.Module):
    """Layers that see tokens before samples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 5)

    def forward(self, x):
        return self.layer(x.T[..., None]).sum(0)


class Overwritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.layer.weight.requires_grad_(False)

    def forward(self, x):
        x = x * 1.0
        y = self.layer(x)
        with torch.no_grad():
            x.zero_()
        return y


LOOPED = {
    "a layer without a rule": (Scale, "no per-sample rule for '0.scale' of Scale"),
    "samples that interact": (Centred, "losses that they have in another one"),
    "a weight used outside its layer": (Borrowed, "per-sample gradients of '0.layer.weight' differ"),
    "tokens first": (Turned, r"'0.layer' is given \(5, \d, 1\), whose first dimension is not the batch"),
    "an input that is overwritten": (Overwritten, "'0.layer' is overwritten"),
    "batch norm": (lambda: nn.BatchNorm1d(5), "no per-sample rule for '0.weight' of BatchNorm1d"),
}


@pytest.mark.parametrize("name", list(LOOPED))
def test_loop_over_samples_where_a_batch_will_not_do(name):
    build, reason = LOOPED[name]
    torch.manual_seed(0)
    model, batches = nn.Sequential(build(), mlp()), points((3, 2))
    with pytest.warns(UserWarning, match=f"one at a time.*{reason}"):
        importance = fisher_importance(model, batches, squared)
    assert_close(importance, plain_loop(model, batches, wide(squared)))


def test_loop_when_the_loss_gives_one_number():
    model, batches = mlp(), points()
    with pytest.warns(UserWarning, match="one number for the whole batch"):
        importance = fisher_importance(model, batches, lambda model, batch: squared(model, batch).sum())
    assert_close(importance, plain_loop(model, batches, wide(squared)))


def test_loop_when_the_batched_pass_fails():
    """A loss that differentiates by weights itself: they need no gradient while a batch runs."""
    model, batches = mlp(), points((3, 2))

    def loss(model, batch):
        (slope,) = torch.autograd.grad(model[0].weight.square().sum(), model[0].weight, create_graph=True)
        return squared(model, batch) + slope.square().sum()

    with pytest.warns(UserWarning, match="all at once they fail with"):
        importance = fisher_importance(model, batches, loss)
    assert_close(importance, plain_loop(model, batches, wide(loss)))


def test_loop_when_the_models_loss_is_unknown():
    case = CASES["llama"]
    model, batches = case.build(), batches_of(case)
    forward = model.forward

    def smoothed(**batch):
        outputs = forward(**batch)
        outputs.loss = outputs.loss + 0.01 * outputs.logits.square().mean()
        return outputs

    model.forward = smoothed
    with pytest.warns(UserWarning, match="the model's loss is none of these: cross-entropy of the next token"):
        importance = fisher_importance(model, batches)

    def value(model, batch):
        logits = forward.__func__(model, batch["input_ids"]).logits
        return cases.causal_loss(logits.double(), batch["labels"]) + 0.01 * logits.square().mean()

    del model.forward
    assert_close(importance, plain_loop(model, batches, value))


def test_loop_over_a_mixture_of_experts():
    """Experts own their weights in a form of their own, and the loss balances the load over the batch."""
    import transformers

    config = transformers.MixtralConfig(
        **cases.LLAMA, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True
    )
    config._experts_implementation = "eager"  # the other one refuses float64
    model = cases.randomised(transformers.MixtralForCausalLM(config))
    batches = [cases.tokens(3), cases.tokens(2)]
    with pytest.warns(UserWarning, match="one at a time"):
        importance = fisher_importance(model, batches)
    assert_close(importance, plain_loop(model, batches, lambda model, batch: model(**batch).loss), rtol=1e-4)
    for name, param in model.named_parameters():
        param.requires_grad_("experts" not in name and "gate" not in name and "router" not in name)
    with pytest.warns(UserWarning, match="one at a time.*the model's loss is none of these"):
        importance = fisher_importance(model, batches)
    assert_close(importance, plain_loop(model, batches, lambda model, batch: model(**batch).loss), rtol=1e-4)


def test_a_first_batch_of_one_is_looked_at_again():
    """With one sample nothing interacts; the second batch shows it."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(Centred(), mlp()), points((1, 3, 2))
    with pytest.warns(UserWarning, match="losses that they have in another one"):
        importance = fisher_importance(model, batches, squared)
    assert_close(importance, plain_loop(model, batches, wide(squared)))


def weighted(model, batch):
    return batch["w"] * squared(model, batch)


@pytest.mark.parametrize("hidden", ["no gradient", "equal samples"])
def test_interactions_do_not_hide_behind_the_first_samples(hidden):
    torch.manual_seed(0)
    model, batches = nn.Sequential(Centred(), mlp()), points((4, 4))
    for batch in batches:
        batch["w"] = torch.ones(4)
    if hidden == "no gradient":
        batches[0]["w"][:2] = 0.0
    else:
        for key in ("x", "y"):
            batches[0][key][1] = batches[0][key][0]
    with pytest.warns(UserWarning, match="losses that they have in another one"):
        importance = fisher_importance(model, batches, weighted)
    assert_close(importance, plain_loop(model, batches, wide(weighted)))


def test_a_batch_without_any_gradient_is_taken_one_by_one():
    model, batches = mlp(), points((3, 3))
    for batch, weight in zip(batches, (0.0, 1.0), strict=True):
        batch["w"] = torch.full((3,), weight)
    assert_close(fisher_importance(model, batches, weighted), plain_loop(model, batches, wide(weighted)))


def test_what_shows_late_is_an_error_not_a_wrong_number():
    """In the 9th batch a weight is used past its layer; from the second look on nothing is silent."""
    model, batches = mlp(), points((2,) * 9)

    def loss(model, batch):
        values = squared(model, batch)
        return values + (batch["x"] @ model[0].weight.T).square().sum(1) if batch["late"].any() else values

    for index, batch in enumerate(batches):
        batch["late"] = torch.full((2,), float(index == 8))
    with pytest.raises(
        RuntimeError, match=r"batch 8: per-sample gradients of '0\.weight'.*start again with batched=False"
    ):
        fisher_importance(model, batches, loss)
    exact = fisher_importance(model, batches, loss, batched=False)
    assert_close(exact, plain_loop(model, batches, wide(loss)))


def test_lists_of_a_batch_are_taken_apart():
    model, batches = mlp(), points((3, 2))
    listed = [{**batch, "scale": [float(i + 1) for i in range(len(batch["x"]))]} for batch in batches]

    def loss(model, batch):
        return (squared(model, batch) * torch.tensor(batch["scale"]).to(batch["x"].dtype)).sum()

    with pytest.warns(UserWarning, match="one number for the whole batch"):
        importance = fisher_importance(model, listed, loss)
    tensors = [{**batch, "scale": torch.tensor(batch["scale"])} for batch in listed]
    scaled = wide(lambda model, batch: squared(model, batch) * batch["scale"])
    assert_close(importance, plain_loop(model, tensors, scaled))


def test_a_sparse_embedding_takes_the_loop():
    torch.manual_seed(0)
    tables = [nn.Embedding(7, 3, sparse=sparse) for sparse in (True, False)]
    tables[1].load_state_dict(tables[0].state_dict())
    batches = [{"x": torch.tensor([[1, 2, 2], [0, 2, 5]])}]
    results = []
    for table in tables:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(fisher_importance(table, batches, lambda m, b: m(b["x"]).square().sum((1, 2))))
    torch.testing.assert_close(results[0]["weight"], results[1]["weight"])


def test_a_later_batch_may_need_the_loop():
    """A loss that gives one number only for some batches."""
    model, batches = mlp(), points((3, 2, 4))

    def loss(model, batch):
        values = squared(model, batch)
        return values if len(values) != 2 else values.sum()

    with pytest.warns(UserWarning, match="one number for the whole batch"):
        importance = fisher_importance(model, batches, loss)
    assert_close(importance, plain_loop(model, batches, wide(squared)))


def test_the_compared_samples_differ_where_any_do():
    batch = {"x": torch.tensor([[1, 2], [1, 2], [1, 3], [0, 0]]), "y": torch.zeros(4), "all": torch.tensor(3.0)}
    assert sweep._two_that_differ(batch, 4) == [0, 2]
    assert sweep._two_that_differ({"x": torch.ones(4, 2)}, 4) == [0, 3]
    assert sweep._two_that_differ({"x": torch.ones(1, 2)}, 1) == [0]


def test_a_loss_that_is_not_finite_chooses_no_rule():
    """Labels of the next token and of each token fit it alike; the next batch tells, and is taken at once."""
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForTokenClassification(BertConfig(vocab_size=31, num_labels=3, **sizes))
    tokens = torch.randint(31, (4, 6))
    batches = [
        {"input_ids": tokens[:2], "labels": torch.full((2, 6), -100)},
        {"input_ids": tokens[2:], "labels": tokens[2:] % 3},
    ]
    own = objectives.OwnLoss()
    with pytest.raises(objectives.NotYet):
        own.of_samples(model, batches[0], 2)
    own.of_samples(model, batches[1], 2)
    assert own._rule is objectives._per_token
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = fisher_importance(model, batches, progress=False, allow_nonfinite=True)
        second = fisher_importance(model, batches[1:], progress=False)
    for name in second:
        torch.testing.assert_close(both[name] * 2, second[name])
