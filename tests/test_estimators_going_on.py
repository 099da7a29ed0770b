"""Estimators of importance: how they go on after an interrupt, fail, and leave the model."""

from __future__ import annotations

import signal
import warnings

import pytest
import torch
from cases import same_bits
from estimator_cases import CASES, Scale, assert_close, batches_of, frozen, mlp, plain_loop, points, squared, wide
from torch import nn

from alr_kernels import fisher_importance, magnitude_gradient_importance, mas_importance
from alr_kernels.importance.estimators import sweep as sweep_module
from alr_kernels.importance.estimators.per_sample import PerSample


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


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


@pytest.fixture
def ctrl_c():
    """Python's own handler: a shell that starts the tests in the background has the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_the_batch(tmp_path):
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

    def again(model, batch):
        seen.append(batch)
        return squared(model, batch)

    with pytest.raises(ValueError, match=r"expected objective '.*again', it was written with '.*loss'"):
        fisher_importance(model, batches, again, checkpoint=path)
    again.__qualname__ = loss.__qualname__
    resumed = fisher_importance(model, batches, again, checkpoint=path)
    assert [batch is batches[2] for batch in seen].count(True) == 1
    assert not any(batch is other for batch in seen for other in batches[:2])
    assert all(same_bits(resumed[name], whole[name]) for name in whole)


def checkpoint_of(tmp_path, model, batches, estimate=fisher_importance):
    path = tmp_path / "p.safetensors"
    with pytest.raises(KeyboardInterrupt):
        estimate(model, interrupted(batches, 2), squared, checkpoint=path)
    return path


def test_a_finished_importance_is_not_taken_for_a_checkpoint(tmp_path):
    path = tmp_path / "importance.safetensors"
    fisher_importance(mlp(), points(), squared).save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a finished importance; choose another path"):
        fisher_importance(mlp(), points(), squared, checkpoint=path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="every: it has no effect without checkpoint"):
        fisher_importance(mlp(), points(), squared, every=5)


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
    with pytest.raises(ValueError, match=r"batch 2: the loss \(or output\) of sample 1 is nan"):
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
    with pytest.raises(ValueError, match=r"batch 1: the loss \(or output\) of sample 0 is nan.*-100"):
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
        (lambda model, batch: model(batch["x"]), ValueError, r"one number a sample, shape \(3,\), got \(3, 3\)"),
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
