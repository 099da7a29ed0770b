"""Estimators of importance against one sample at a time in float64; how they go on, fail, and leave the model."""

from __future__ import annotations

import warnings

import estimator_cases as cases
import pytest
import torch
from cases import same_bits
from estimator_cases import CASES, assert_close, frozen, own_loss, plain_loop
from torch import nn

from alr_kernels import fisher_importance, magnitude_gradient_importance, mas_importance
from alr_kernels.importance import sweep as sweep_module
from alr_kernels.importance.per_sample import PerSample

SIZES = (3, 1, 4)  # of the batches: odd, one sample, another


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def batches_of(case, sizes=SIZES):
    return [case.batch(size) for size in sizes]


def mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))


def squared(model, batch):
    """One number a sample."""
    return (model(batch["x"]) - batch["y"]).square().sum(1)


def points(sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(size, 5, generator=generator), "y": torch.randn(size, 3, generator=generator)}
        for size in sizes
    ]


def wide(loss):
    return lambda model, batch: loss(model, {key: value.double() for key, value in batch.items()}).sum()


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


def test_layers_of_a_user_loss_with_two_dimensions():
    model, batches = mlp(), points()
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


class Scale(nn.Module):
    """A kind of layer without a rule."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((5,), 1.5))

    def forward(self, x):
        return x * self.scale


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
    "samples that interact": (Centred, "losses that they have alone"),
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
    with pytest.warns(UserWarning, match="losses that they have alone"):
        importance = fisher_importance(model, batches, squared)
    assert_close(importance, plain_loop(model, batches, wide(squared)))


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
    with pytest.raises(ValueError, match=r"first dimension is the batch of 1, got \(3, 1\)"):
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


# ---- going on after an interrupt


def interrupted(batches, after, error=KeyboardInterrupt):
    for index, batch in enumerate(batches):
        if index == after:
            raise error
        yield batch


ESTIMATORS = {
    "fisher": fisher_importance,
    "mas": lambda model, batches, loss, **options: mas_importance(
        model, batches, lambda model, batch: model(batch["x"]), **options
    ),
    "magnitude_gradient": magnitude_gradient_importance,
}


@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("method", list(ESTIMATORS))
def test_an_interrupted_estimate_goes_on_to_the_same_bits(tmp_path, method, after):
    estimate, model, batches = ESTIMATORS[method], mlp(), points((1, 3, 2, 4, 1, 3))
    whole = estimate(model, batches, squared)
    path = tmp_path / "partial.safetensors"
    with pytest.raises(KeyboardInterrupt):
        estimate(model, interrupted(batches, after), squared, checkpoint=path)
    assert path.exists()
    resumed = estimate(model, batches, squared, checkpoint=path)
    assert not path.exists()
    assert not list(tmp_path.iterdir())
    assert resumed.steps == whole.steps
    assert all(same_bits(resumed[name], whole[name]) for name in whole)


def test_the_loop_goes_on_too(tmp_path):
    torch.manual_seed(0)
    model, batches, path = nn.Sequential(Scale(), mlp()), points((3, 2, 2)), tmp_path / "partial.safetensors"
    with pytest.warns(UserWarning, match="Scale"):
        whole = fisher_importance(model, batches, squared)
    with pytest.warns(UserWarning, match="Scale"), pytest.raises(OSError, match="disk"):
        fisher_importance(model, interrupted(batches, 2, OSError("disk")), squared, checkpoint=path)
    with pytest.warns(UserWarning, match="Scale"):
        resumed = fisher_importance(model, batches, squared, checkpoint=path)
    assert all(same_bits(resumed[name], whole[name]) for name in whole)


def test_every_so_many_batches_are_written(tmp_path, monkeypatch):
    written = []
    save = sweep_module.Checkpoint.save
    monkeypatch.setattr(
        sweep_module.Checkpoint, "save", lambda self, partial: (written.append(partial.batches), save(self, partial))
    )
    fisher_importance(mlp(), points((2,) * 7), squared, checkpoint=tmp_path / "p.safetensors", every=3)
    assert written == [3, 6]


def test_half_a_batch_is_never_written(tmp_path, monkeypatch):
    """What fails while sums are being written to leaves the file of whole batches."""
    model, batches, path = mlp(), points((2, 2, 2, 2)), tmp_path / "p.safetensors"
    whole = fisher_importance(model, batches, squared)
    finish, calls = PerSample._finish, []

    def failing(self, weight, parts):
        calls.append(weight.name)
        if len(calls) == 5 * 4 + 2:  # the comparison, three batches, and two weights
            raise MemoryError
        finish(self, weight, parts)

    monkeypatch.setattr(PerSample, "_finish", failing)
    with pytest.raises(MemoryError):
        fisher_importance(model, batches, squared, checkpoint=path, every=2)
    monkeypatch.undo()
    resumed = fisher_importance(model, batches, squared, checkpoint=path)
    assert all(same_bits(resumed[name], whole[name]) for name in whole)


def test_ctrl_c_waits_for_the_batch(tmp_path):
    import signal

    model, batches, path = mlp(), points((2, 2, 2)), tmp_path / "p.safetensors"
    whole = fisher_importance(model, batches, squared)
    pressed = []

    def loss(model, batch):
        if batch is batches[1] and not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return squared(model, batch)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fisher_importance(model, batches, loss, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is handler
    seen = []
    resumed = fisher_importance(
        model, batches, lambda model, batch: (seen.append(batch), squared(model, batch))[1], checkpoint=path
    )
    assert len(seen) == 1
    assert all(same_bits(resumed[name], whole[name]) for name in whole)


def checkpoint_of(tmp_path, model, batches, estimate=fisher_importance):
    path = tmp_path / "p.safetensors"
    with pytest.raises(KeyboardInterrupt):
        estimate(model, interrupted(batches, 2), squared, checkpoint=path)
    return path


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model, batches = mlp(), points()
    path = checkpoint_of(tmp_path, model, batches)
    before = path.read_bytes()
    other = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3), nn.Linear(3, 3))
    moved = mlp()
    with torch.no_grad():
        moved[0].weight[0, 0] += 1
    shuffled = [batches[1], batches[0], batches[2]]
    for estimate, wrong_model, wrong_batches, message in (
        (fisher_importance, other, batches, r"lacks '3.bias', '4.bias'.*'0.bias' has shape \(7,\), expected \(6,\)"),
        (fisher_importance, frozen(mlp(), "2."), batches, "it also has '2.bias', '2.weight'"),
        (fisher_importance, moved, batches, "a model of weights"),
        (magnitude_gradient_importance, model, batches, "expected method 'magnitude_gradient', it was written with"),
        (fisher_importance, model, shuffled, "first 2 batches are not those"),
        (fisher_importance, model, batches[:1], "sums of 2 batches, got only 1"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(wrong_model, wrong_batches, squared, checkpoint=path)
        assert path.read_bytes() == before
    path.write_bytes(before[:40])
    with pytest.raises(ValueError, match="truncated or damaged"):
        fisher_importance(model, batches, squared, checkpoint=path)


# ---- what is left as it was


def state_of(model):
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [param.requires_grad for param in model.parameters()],
        "weights": [param.detach().clone() for param in model.parameters()],
        "grads": [None if param.grad is None else param.grad.clone() for param in model.parameters()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for module in model.modules()
        ],
        "types": [type(param) for param in model.parameters()],
    }


def assert_same_model(before, after):
    for key in ("training", "requires_grad", "hooks", "types"):
        assert before[key] == after[key], key
    for key in ("weights", "grads"):
        for a, b in zip(before[key], after[key], strict=True):
            assert (a is None) == (b is None), key
            assert a is None or torch.equal(a, b), key


@pytest.mark.parametrize("failing", [None, "forward", "backward"])
@pytest.mark.parametrize("estimate", [fisher_importance, magnitude_gradient_importance])
def test_the_model_is_left_as_it_was(estimate, failing):
    case = CASES["tied llama"]
    model, batches = frozen(case.build(), "norm").train(), batches_of(case)
    model.model.layers[0].eval()
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.ones_like(param)
    before = state_of(model)

    def loss(model, batch):
        values = model(**batch).logits.square().mean((1, 2))
        if batch is not batches[2]:
            return values
        if failing == "forward":
            raise ArithmeticError
        if failing == "backward":
            values.register_hook(lambda grad: 1 / 0)
        return values

    if failing is None:
        estimate(model, batches, loss)
    else:
        with pytest.raises(ArithmeticError):
            estimate(model, batches, loss)
    assert_same_model(before, state_of(model))


def test_no_gradient_mode_around_it():
    model, batches = mlp(), points()
    with torch.no_grad():
        inside = fisher_importance(model, batches, squared)
    assert_close(inside, plain_loop(model, batches, wide(squared)))


# ---- bad input


def test_a_gradient_that_is_not_finite_names_the_batch(tmp_path):
    model, batches, path = mlp(), points((3, 2, 2)), tmp_path / "p.safetensors"
    batches[2]["x"][1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"batch 2: the loss of sample 1 is nan \(1 of 2"):
        fisher_importance(model, batches, squared, checkpoint=path)
    assert path.exists()

    def root(model, batch):  # finite, with an infinite derivative
        return (squared(model, batch) * (batch["y"][:, 0] != 9)).sqrt()

    batches[2] = {"x": torch.ones(2, 5), "y": torch.tensor([[1.0, 2.0, 3.0], [9.0, 1.0, 1.0]])}
    with pytest.raises(ValueError, match=r"batch 2: a sample's gradient is NaN or inf in \d+ element"):
        fisher_importance(model, batches, root)
    with pytest.raises(ValueError, match="batch 2: a sample's gradient is NaN or inf"):
        magnitude_gradient_importance(model, batches, root)


def test_allow_nonfinite_gives_those_elements_nothing():
    embedding = nn.Embedding(4, 2)
    batches = [{"x": torch.tensor([0, 1, 2])}, {"x": torch.tensor([1, 2, 3])}]

    def loss(model, batch):
        return model(batch["x"]).sum(1) * torch.where(batch["x"] == 3, float("inf"), 1.0)

    importance = fisher_importance(embedding, batches, loss, allow_nonfinite=True)
    torch.testing.assert_close(importance["weight"], torch.tensor([[1.0], [2.0], [2.0], [0.0]]).expand(4, 2) / 6)
    assert importance.stats["weight"].nonfinite == 2


def test_a_sample_without_labels_is_named():
    case = CASES["padded llama"]
    batches = batches_of(case)
    batches[1]["labels"][:] = -100
    with pytest.raises(ValueError, match=r"batch 1: the loss of sample 0 is nan .*-100"):
        fisher_importance(case.build(), batches)


@pytest.mark.parametrize("estimate", [fisher_importance, mas_importance, magnitude_gradient_importance])
@pytest.mark.parametrize(
    ("model", "batches", "error", "message"),
    [
        ("model", [], TypeError, "expected a torch.nn.Module"),
        (mlp(), [], ValueError, "expected at least one batch, got none"),
        (mlp(), iter(()), ValueError, "expected at least one batch, got none"),
        (mlp().requires_grad_(False), [], ValueError, "trainable parameters, got none"),
        (mlp(), {"x": torch.ones(2, 5)}, TypeError, "a single batch goes into a list"),
        (mlp(), 3, TypeError, "expected an iterable of batches"),
        (mlp(), [torch.ones(2, 5)], TypeError, "batch 0: expected a dict of the model's arguments"),
        (mlp(), [{"x": torch.ones(2, 5), "y": torch.ones(3, 3)}], ValueError, r"batch 0: .*x: \(2, 5\), y: \(3, 3\)"),
        (mlp(), [{"x": torch.ones(0, 5)}], ValueError, r"at least 1, got x: \(0, 5\)"),
        (mlp(), [{"x": [1.0]}], ValueError, "got no tensor"),
    ],
)
def test_bad_input(estimate, model, batches, error, message):
    with pytest.raises(error, match=message):
        estimate(model, batches)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda model, batch: 1.0, TypeError, "loss: expected a floating-point tensor, got float"),
        (lambda model, batch: model(batch["x"]), ValueError, r"one number a sample, shape \(1,\), got \(1, 3\)"),
        (None, ValueError, "expected the model to return a loss"),
    ],
)
def test_bad_losses(loss, error, message):
    batches = [{"input": batch["x"], "x": batch["x"]} for batch in points()]
    model = mlp()
    if loss is None:
        batches = [{"input": batch["x"]} for batch in batches]
    with pytest.raises(error, match=message):
        fisher_importance(model, batches, loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "partial.pt"}, "name ending in .safetensors"),
        ({"checkpoint": "p.safetensors", "every": 0}, "every: expected an integer ≥ 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fisher_importance(mlp(), points(), squared, **options)


def test_other_arguments_of_the_model_pass_through():
    case = CASES["llama"]
    model = case.build()
    batches = [batch | {"use_cache": False, "logits_to_keep": 0} for batch in batches_of(case)]
    assert_close(fisher_importance(model, batches), fisher_importance(model, batches_of(case)), rtol=1e-6)


def test_the_bar_is_silent_when_not_on_a_terminal(capsys):
    fisher_importance(mlp(), points(), squared, progress=True)
    assert capsys.readouterr() == ("", "")


def test_importance_can_be_saved_and_used(tmp_path):
    from alr_kernels import AlrAdamW, Importance

    model = mlp()
    fisher_importance(model, points(), squared).save(tmp_path / "fisher.safetensors")
    importance = Importance.load(tmp_path / "fisher.safetensors")
    assert importance.method == "fisher"
    optimizer = AlrAdamW(model.named_parameters(), importance)
    squared(model, points()[0]).sum().backward()
    optimizer.step()
