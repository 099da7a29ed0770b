"""Importance by an estimator: one pass over the data, weights at rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .. import _ranks, _validate_models
from ..importance.estimators import fisher_importance, magnitude_gradient_importance, mas_importance
from .evaluation import on_device
from .options import RecordOptions
from .progress import Stopped

if TYPE_CHECKING:
    from ..importance import Importance
    from .data import Texts
    from .job import Job
    from .models import Loaded

ESTIMATORS: dict[str, Callable[..., Importance]] = {
    "fisher": fisher_importance,
    "mas": mas_importance,
    "magnitude-gradient": magnitude_gradient_importance,
}
SUMS = "sums.safetensors"


def estimate(job: Job, loaded: Loaded, texts: Texts, collate: Callable[[list[Any]], Any]) -> Importance:
    """Return the importance by ``--method``; interrupted, it goes on from the batches that are done, to the same bits.

    Raises:
        ValueError: several processes, an adapter, or quantised weights.
        Stopped: it was asked to stop.
    """
    options = job.settings.of(RecordOptions)
    _validate_models.estimator_alone(options.method, _ranks.place()[1])
    if loaded.has_adapter:
        _validate_models.estimator_of_all(options.method, "one with an adapter (--lora, or an adapter's folder)")
    train, size = texts.train, job.train_options.batch
    assert train is not None
    total = -(-len(train) // size)
    tick = job.progress.phase(f"{options.method} importance", total)
    place = job.place.work / SUMS
    loaded.model.to(loaded.device)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for index in range(total):
            if job.stop.asked:
                raise Stopped(index, job.place.work)
            rows = [train[i] for i in range(index * size, min((index + 1) * size, len(train)))]
            yield on_device(loaded.model, collate(rows))
            tick(index + 1)

    every = job.train_options.save_every
    found = ESTIMATORS[options.method](loaded.model, batches(), progress=False, checkpoint=place, every=every)
    return found.astype(options.importance_dtype)
