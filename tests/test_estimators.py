"""Estimators of importance against one sample at a time in float64, in batches and where a batch will not do."""

from __future__ import annotations

import warnings

import estimator_cases as cases
import pytest
import torch
from cases import same_bits
from estimator_cases import (
    CASES,
    SIZES,
    Scale,
    assert_close,
    batches_of,
    frozen,
    mlp,
    own_loss,
    plain_loop,
    points,
    squared,
    wide,
)
from torch import nn

from alr_kernels import fisher_importance, magnitude_gradient_importance, mas_importance


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# ---- exact per-sample gradients


@pytest.mark.parametrize("name", list(CASES))
def test_fisher_is_that_of_each_sample_alone(name):
    case = CASES[name]
    model, batches = case.build(), batches_of(case)
    importance = fisher_importance(model, batches, progress=False)
    assert importance.method == "fisher"
    assert importance.steps == sum(SIZES)
    assert all(tensor.dtype == torch.float32 for tensor in importance.values())
    assert_close(importance, plain_loop(model, batches, own_loss(case)))


@pytest.mark.parametrize("order", [(1, 4), (4, 1), (1,), (2, 2)], ids=str)
def test_every_sample_weighs_the_same(order):
    model, batches = mlp(), points(order)
    assert_close(fisher_importance(model, batches, squared), plain_loop(model, batches, wide(squared)))


@pytest.mark.parametrize("words", [("embed", "norm"), ("q_proj", "layers.1"), ("lm_head", "layers.0")], ids=str)
def test_frozen_parameters_have_no_entry(words):
    case = CASES["padded llama"]
    model, batches = frozen(case.build(), *words), batches_of(case)
    importance = fisher_importance(model, batches)
    assert set(importance) == {name for name, param in model.named_parameters() if param.requires_grad}
    assert_close(importance, plain_loop(model, batches, own_loss(case)))


def test_frozen_ends_of_a_tied_model():
    model, case = CASES["tied llama"].build(), CASES["tied llama"]
    frozen(model, "embed_tokens")
    batches = batches_of(case)
    assert_close(fisher_importance(model, batches), plain_loop(model, batches, own_loss(case)))


@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2"])
def test_bf16_models(name):
    case = CASES[name]
    model, batches = case.build().bfloat16(), batches_of(case)
    importance = fisher_importance(model, batches)
    assert all(tensor.dtype == torch.float32 for tensor in importance.values())
    assert_close(importance, plain_loop(model, batches, own_loss(case)), rtol=0.2, elementwise=2.0)


def test_float64_models():
    model, batches = mlp().double(), [{k: v.double() for k, v in batch.items()} for batch in points()]
    importance = fisher_importance(model, batches, squared)
    assert_close(importance, plain_loop(model, batches, wide(squared)), rtol=1e-12, elementwise=1e-10)


def test_inputs_that_need_no_embedding_and_keyword_calls():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x, y):
            hidden = self.first(input=x)
            hidden += 1  # writes to what the layer returned
            return (self.second(hidden.relu()) - y).square().sum(1)

    torch.manual_seed(0)
    model, batches = Named(), points()

    def loss(model, batch):
        return model(**batch)

    assert_close(fisher_importance(model, batches, loss), plain_loop(model, batches, wide(loss)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), mlp()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.second, self.first(x), use_reentrant=reentrant)

    torch.manual_seed(0)
    model, batches = Checkpointed(), points()
    grads = [torch.ones_like(param) for param in model.parameters()]
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = grad
    expected = fisher_importance(nn.Sequential(model.first, model.second), batches, squared)
    importance = fisher_importance(model, batches, squared)
    for name, omega in expected.items():
        other = importance[name.replace("0.", "first.", 1) if name[0] == "0" else name.replace("1.", "second.", 1)]
        torch.testing.assert_close(other, omega)
    assert all(param.grad is grad for param, grad in zip(model.parameters(), grads, strict=True))


def test_dropout_is_off_and_modes_come_back():
    case = CASES["gpt2"]
    model, batches = case.build().train(), batches_of(case)
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    assert_close(fisher_importance(model, batches), plain_loop(model, batches, own_loss(case)))
    assert [module.training for module in model.modules()] == modes


# ---- one by one


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


# ---- MAS


def output_size(model, batch):
    logits = model(**{key: item for key, item in batch.items() if key != "labels"}).logits.double()
    kept = batch.get("attention_mask")
    sizes = logits.square().sum(-1)[0]
    return sizes.mean() if kept is None or logits.dim() == 2 else sizes[kept[0] != 0].mean()


@pytest.mark.parametrize("name", ["llama", "padded llama", "tied llama", "gpt2", "bert classifier"])
def test_mas_is_that_of_each_sample_alone(name):
    case = CASES[name]
    model, batches = case.build(), batches_of(case)
    unlabelled = [{key: item for key, item in batch.items() if key != "labels"} for batch in batches]
    importance = mas_importance(model, unlabelled)
    assert importance.method == "mas"
    assert_close(importance, plain_loop(model, unlabelled, output_size, power=1), power=1)


def test_mas_of_a_users_output():
    model, batches = mlp(), points()
    importance = mas_importance(model, batches, lambda model, batch: model(batch["x"]))
    value = wide(lambda model, batch: model(batch["x"]).square().sum(1))
    assert_close(importance, plain_loop(model, batches, value, power=1), power=1)


def test_mas_refuses_an_output_without_samples():
    with pytest.raises(ValueError, match=r"first dimension is the batch of 3, got \(9, 1\)"):
        mas_importance(mlp(), points(), lambda model, batch: model(batch["x"]).reshape(-1, 1))


# ---- magnitude against gradient


def test_magnitude_gradient_is_a_ratio_of_ranks():
    case = CASES["llama"]
    model, batches = case.build(), batches_of(case)
    importance = magnitude_gradient_importance(model, batches)
    assert importance.method == "magnitude_gradient"
    params = dict(model.named_parameters())
    sums = {name: torch.zeros_like(param) for name, param in params.items()}
    for batch in batches:
        for name, grad in zip(params, torch.autograd.grad(model(**batch).loss, list(params.values())), strict=True):
            sums[name] += grad.abs()

    def ranks(values):  # counted pair by pair
        flat = values.detach().flatten()
        below = (flat[None] < flat[:, None]).sum(1) + ((flat[None] == flat[:, None]).sum(1) + 1) / 2
        return (below.double() / len(flat)).view_as(values)

    for name, param in params.items():
        size, pull = ranks(param.abs()), ranks(sums[name])
        torch.testing.assert_close(importance[name].double(), size / (size + pull), rtol=1e-6, atol=0)
        assert 0 < float(importance[name].min()) <= float(importance[name].max()) < 1


def test_magnitude_gradient_with_a_users_loss_of_either_shape():
    model, batches = mlp(), points()
    first = magnitude_gradient_importance(model, batches, squared)
    second = magnitude_gradient_importance(model, batches, lambda model, batch: squared(model, batch).mean())
    assert all(same_bits(first[name], second[name]) for name in first)


# ---- the benchmark


def test_benchmark_compares_the_same_numbers():
    from alr_kernels.benchmark.estimators import compare

    found = compare(CASES["padded llama"].build(), 16, 2, 6, count=2, rounds=1)
    assert found["largest_relative_difference"] < 1e-5
    assert found["ratio"][0] > 0
    assert (found["samples"], found["tokens"], found["batches"]) == (2, 6, 2)
