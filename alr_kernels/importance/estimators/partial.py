"""Sums that are not complete yet: what an estimator has added up, and the file from which it goes on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _validate, _validate_estimators, _validate_importance
from ..artifact import content_fingerprint
from ..files import FORMAT as IMPORTANCE_FORMAT
from ..scratch import Scratch

FORMAT = "alr_kernels.importance.partial"
FORMAT_VERSION = "1"


@dataclass
class Partial:
    """Sums over the batches so far."""

    sums: dict[str, Tensor]  # parameter's name → Σ |g|^power, float32 (float64 of float64 parameters)
    batches: int = 0
    samples: int = 0
    digest: str = ""  # of all batches so far
    at_once: int = 0  # samples that were added together with others
    one_by_one: str = ""  # why samples are taken one by one, or '' while they are not

    @classmethod
    def of(cls, model: nn.Module) -> Partial:
        """Return empty sums for the trainable parameters."""
        return cls(
            {
                name: torch.zeros(
                    param.shape, dtype=torch.promote_types(param.dtype, torch.float32), device=param.device
                )
                for name, param in model.named_parameters()
                if param.requires_grad
            }
        )


def batch_digest(previous: str, batch: Mapping[str, Any]) -> str:
    """Return the digest of all batches up to this one."""
    digest = hashlib.sha256(previous.encode())
    for key in sorted(batch):
        value = batch[key]
        if isinstance(value, Tensor):
            dense = value.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(dense.view(torch.uint8).numpy())
        else:
            digest.update(f"{key}{value!r}".encode())
    return digest.hexdigest()


class Checkpoint:
    """The file of partial sums: written atomically, and read again only by the same estimate on the same data."""

    def __init__(self, path: str | os.PathLike[str], every: int, method: str, model: nn.Module, of: Any) -> None:
        _validate.count("every", every)
        self.path = _validate_importance.importance_path(path)
        _validate_importance.importance_folder(self.path)
        self.every = every
        self._about = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "method": method,
            "objective": getattr(of, "__qualname__", type(of).__name__),
            "weights": content_fingerprint(dict(model.named_parameters())),
        }

    def load(self, partial: Partial) -> None:
        """Read the file into ``partial``, when there is one."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return
        path = str(self.path)
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            _validate_estimators.partial_damaged(path, error)
        if about.get("format") == IMPORTANCE_FORMAT:
            _validate_estimators.is_importance(path)
        for key in ("format", "format_version", "method", "objective"):
            _validate_estimators.partial_field(path, key, about.get(key), self._about[key])
        shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (sums, partial.sums)]
        _validate_estimators.partial_names(path, *shapes)
        _validate_estimators.partial_field(path, "a model of weights", about.get("weights"), self._about["weights"])
        for name, tensor in partial.sums.items():
            tensor.copy_(sums[name])
        partial.batches, partial.samples = int(about["batches"]), int(about["samples"])
        partial.digest, partial.one_by_one = about["digest"], about["one_by_one"]
        partial.at_once = int(about["at_once"])

    def save(self, partial: Partial) -> None:
        """Write the sums; a reader sees the old file or the whole new one."""
        from safetensors.torch import save

        state = {key: str(getattr(partial, key)) for key in ("batches", "samples", "digest", "at_once", "one_by_one")}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in partial.sums.items()}
        scratch = Scratch(self.path)
        try:
            scratch.file.write(save(tensors, metadata=self._about | state))
            scratch.publish()
        finally:
            scratch.discard()

    def remove(self) -> None:
        """Delete the file once the estimate is whole."""
        Path(self.path).unlink(missing_ok=True)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode (no dropout), and every module back to what it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
