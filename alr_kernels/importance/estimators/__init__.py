"""Importance estimated on data with the weights at rest: Fisher information, MAS, magnitude against gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ... import _validate_estimators
from ..artifact import Importance
from ..statistics import TensorStats
from .objectives import Batch, Objective, OutputSize, OwnLoss, UserLoss
from .partial import Checkpoint, Partial, evaluated
from .sweep import SampleStep, gradients
from .sweep import sweep as sweep_over

if TYPE_CHECKING:
    from os import PathLike

    from torch import Tensor, nn

EVERY = 100  # batches between two writings of a checkpoint
Loss = Callable[["nn.Module", Batch], "Tensor"]


def fisher_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    loss: Loss | None = None,
    *,
    batched: bool = True,
    progress: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    every: int | None = None,
    allow_nonfinite: bool = False,
) -> Importance:
    """Estimate Ω = mean_n g_n², g_n the gradient of sample n's own loss: the diagonal of the empirical Fisher (EWC).

    The gradient of each sample alone is squared, never that of a batch. A batch takes one forward and one backward
    pass; Linear, Embedding, LayerNorm, RMSNorm and Conv1D layers (shared and tied ones too) give Σ_n g_n² from their
    inputs and output gradients, exactly. Batches are compared with their samples alone, by plain autograd, before they
    count: the first one, and the 9th, 65th, 513th. Models with trainable parameters elsewhere, or whose samples
    interact, are taken one sample at a time, with a warning that says why. The model is run in evaluation mode; its
    parameters, gradients and modes are left as they are.

    Args:
        model: its parameters with ``requires_grad`` get an entry, float32, named and shaped as they are.
        batches: dicts of tensors whose first dimension is the sample; the model is called with ``model(**batch)``.
            All samples weigh the same, whatever batches they come in.
        loss: ``loss(model, batch)`` returns one number a sample, [n], or 0-dim: then samples are taken one at a time.
            None: the model's own loss of each sample, the mean over its labels other than -100.
        batched: False takes the samples one at a time, whatever the model.
        progress: show a bar when standard error is a terminal.
        checkpoint: a file (.safetensors) of the sums so far, written every ``every`` batches and when the estimate is
            interrupted. Calling again with the same file, model and batches goes on from there, to the same bits; the
            file is deleted at the end.
        every: batches between two writings, 100 unless given.
        allow_nonfinite: give importance 0 to elements whose gradient was NaN or inf (counted in ``stats``).

    Raises:
        RuntimeError: a later batch shows that batches are not what their samples are alone: use ``batched=False``.
        TypeError, ValueError: no batches, no trainable parameters, a batch that is not a dict of tensors with one first
            dimension; a loss or gradient that is not finite (which batch); a checkpoint of something else.

    Source: Kirkpatrick et al. 2017 (EWC), eq. 3, with the labels given (Kunstner et al. 2019 on what that means).

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> batches = [{"x": torch.tensor([[1.0], [3.0]])}]
    >>> fisher_importance(model, batches, lambda model, batch: model(batch["x"]).sum(1))["weight"]
    tensor([[5.]])
    """
    objective = OwnLoss() if loss is None else UserLoss(loss)
    options = (batched, progress, checkpoint, every, allow_nonfinite)
    return _per_sample(model, batches, objective, loss, 2, "fisher", *options)


def mas_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    output: Loss | None = None,
    *,
    batched: bool = True,
    progress: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    every: int | None = None,
    allow_nonfinite: bool = False,
) -> Importance:
    """Estimate Ω = mean_n |d‖f(x_n)‖² / dθ|: how much the output moves with each weight (MAS). Labels play no part.

    f(x_n) are the model's ``logits`` of sample n (or the tensor that it returns). For sequences, [n, t, classes],
    ‖f‖² is the sum over classes and the mean over those tokens t whose ``attention_mask`` is not 0
    (``decoder_attention_mask`` where there is one, and for models with a decoder nothing else), or over all tokens
    without a mask of shape [n, t].

    Args:
        output: ``output(model, batch)`` returns f, [n, ...]; ‖f(x_n)‖² is then the sum over all but the first
            dimension. None: as above.
        model, batches, batched, progress, checkpoint, every, allow_nonfinite: as in :func:`fisher_importance`.

    Raises:
        TypeError, ValueError: as :func:`fisher_importance`.

    Source: Aljundi et al. 2018, Memory Aware Synapses, eq. 2-4 with the squared l2 norm.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 2.0)
    >>> mas_importance(model, [{"input": torch.tensor([[1.0], [3.0]])}])["weight"]
    tensor([[20.]])
    """
    options = (batched, progress, checkpoint, every, allow_nonfinite)
    return _per_sample(model, batches, OutputSize(output), output, 1, "mas", *options)


def magnitude_gradient_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    loss: Loss | None = None,
    *,
    progress: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    every: int | None = None,
    allow_nonfinite: bool = False,
) -> Importance:
    """Estimate Ω = r_θ / (r_θ + r_g) in (0, 1): large weights that the new data hardly pull at matter to the old task.

    r_θ is the rank of |θ| within its tensor and r_g that of Σ |g| over the batches, both divided by the number of
    elements, ties sharing their mean rank. ``batches`` are of the data that is going to be trained on, not of the data
    to be remembered. SPIDER compares the same two quantities to choose and weigh the elements that each step updates;
    here they become an importance once, before training, by rank, because Ω must be comparable between tensors.

    Args:
        loss: ``loss(model, batch)`` returns the batch's loss, or one number a sample, of which the mean is taken.
            None: the model's own loss. g is the gradient of the whole batch.
        model, batches, progress, checkpoint, every, allow_nonfinite: as in :func:`fisher_importance`.

    Raises:
        TypeError, ValueError: as :func:`fisher_importance`.

    Source: Huang et al. 2025, SPIDER, arXiv 2411.10928 (the idea; the formula is ours, see above).

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[5.0, 1.0]]))
    >>> batches = [{"input": torch.tensor([[1.0, 4.0]])}]
    >>> magnitude_gradient_importance(model, batches, lambda model, batch: model(**batch).mean())["weight"]
    tensor([[0.6667, 0.3333]])
    """
    name = "magnitude_gradient_importance"
    _validate_estimators.model(name, model)
    _validate_estimators.batches(name, batches)
    partial = Partial.of(model)
    params = {key: param for key, param in model.named_parameters() if param.requires_grad}

    def step(index: int, batch: Batch, samples: int, started: Callable[[], None]) -> None:
        def value() -> Tensor:
            if loss is None:
                return _validate_estimators.own_loss(model(**batch))
            return _validate_estimators.numbers("loss", loss(model, batch)).mean()

        found_value, found = gradients(value, params)
        if not allow_nonfinite:
            _validate_estimators.finite_numbers(index, 0, found_value)
        started()
        for key, grad in found.items():
            partial.sums[key].add_(grad.abs())

    file = _resumed(checkpoint, every, "magnitude_gradient", model, loss, partial)
    with evaluated(model):
        sweep_over(batches, step, partial, name, file, progress=progress, allow_nonfinite=allow_nonfinite)
    nonfinite = _cleared(partial.sums)
    for key, total in partial.sums.items():
        size, pull = _ranks(params[key].detach().abs()), _ranks(total)
        total.copy_((size / (size + pull)).view_as(total))
    return _built("magnitude_gradient", partial, nonfinite, file)


def _per_sample(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    objective: Objective,
    of: Loss | None,
    power: int,
    method: str,
    batched: bool,
    progress: bool,
    checkpoint: str | PathLike[str] | None,
    every: int | None,
    allow_nonfinite: bool,
) -> Importance:
    name = f"{method}_importance"
    _validate_estimators.model(name, model)
    _validate_estimators.batches(name, batches)
    partial = Partial.of(model)
    file = _resumed(checkpoint, every, method, model, of, partial)
    step = SampleStep(model, objective, power, partial, name, allow_nonfinite, batched)
    with evaluated(model):
        sweep_over(batches, step, partial, name, file, progress=progress, allow_nonfinite=allow_nonfinite)
    nonfinite = _cleared(partial.sums)
    for total in partial.sums.values():  # a tied weight's correction may leave −1e-8 of what was added
        total.div_(partial.samples).clamp_(min=0.0)
    return _built(method, partial, nonfinite, file)


def _resumed(
    path: str | PathLike[str] | None,
    every: int | None,
    method: str,
    model: nn.Module,
    of: Loss | None,
    partial: Partial,
) -> Checkpoint | None:
    """Return the checkpoint, having read into ``partial`` what it holds."""
    if path is None:
        if every is not None:
            _validate_estimators.every_without_checkpoint()
        return None
    checkpoint = Checkpoint(path, EVERY if every is None else every, method, model, of)
    checkpoint.load(partial)
    return checkpoint


def _cleared(sums: Mapping[str, Tensor]) -> dict[str, int]:
    """Set elements that are NaN or inf to 0, and return how many each tensor had."""
    counts = {}
    for name, total in sums.items():
        bad = ~torch.isfinite(total)
        counts[name] = int(bad.sum())
        total.masked_fill_(bad, 0.0)
    return counts


def _ranks(values: Tensor) -> Tensor:
    """Return each element's rank among all, in (0, 1]; equal ones share the mean of theirs."""
    _, place, counts = torch.unique(values.reshape(-1), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean = (last - (counts - 1) / 2) / max(values.numel(), 1)
    return mean[place]


def _built(method: str, partial: Partial, nonfinite: Mapping[str, int], checkpoint: Checkpoint | None) -> Importance:
    """Turn finished sums into the artifact; ``steps`` is the number of samples."""
    stats = {
        name: TensorStats.of(total, name)._replace(nonfinite=nonfinite[name]) for name, total in partial.sums.items()
    }
    importance = Importance(partial.sums, method=method, steps=partial.samples, stats=stats)
    if checkpoint is not None:
        checkpoint.remove()
    return importance
