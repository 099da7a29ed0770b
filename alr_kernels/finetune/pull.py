"""From options and an importance file to AlrAdamW's options for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import _validate_models
from ..coefficients import DynamicCoeffs, layer_coefficients
from ..importance import Importance
from ..lora import lora_pairs
from ..names import unwrap
from .options import OptimizerOptions, PullOptions, TrainOptions

if TYPE_CHECKING:
    from .models import Loaded
    from .settings import Settings

LORA_METHODS = ("path_integral_",)  # how importance of U = s·B·A is called


def stepping(settings: Settings, loaded: Loaded, lr: float) -> dict[str, Any]:
    """Return AlrAdamW's options in every phase, as ``alr_optimizer`` takes them."""
    options = settings.of(OptimizerOptions)
    trained = [param for param in loaded.model.parameters() if param.requires_grad]
    halves = any(param.dtype is torch.bfloat16 for param in trained)
    return {
        "lr": lr,
        "betas": settings.betas,
        "eps": options.eps,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm or None,
        "state_dtype": options.state_dtype,
        "master": ("split" if halves else "none") if options.master == "auto" else options.master,
        "precise": options.precise,
        "backend": options.backend,
        "seed": settings.of(TrainOptions).seed,
        "lora": loaded.has_adapter,
    }


def pulling(settings: Settings, importance: Importance | None) -> dict[str, Any]:
    """Return the options that make the pull, besides :func:`stepping`; none without importance."""
    if importance is None:
        return {}
    pull = settings.of(PullOptions)
    by: Any = pull.layers_by
    temperature: Any = "auto" if pull.temperature == "auto" else float(pull.temperature)
    coeffs: Any = layer_coefficients(importance, pull.coeffs, temperature, by=by)
    if pull.rebalance_every is not None:
        coeffs = DynamicCoeffs(coeffs, every=pull.rebalance_every)
    return {
        "importance": importance,
        "coeffs": coeffs,
        "reg_lambda": pull.reg_lambda,
        "mode": pull.mode,
        "normalize": pull.normalize,
        "importance_dtype": pull.tune_importance_dtype,
        "anchor_dtype": pull.anchor_dtype,
        "stats": settings.of(OptimizerOptions).stats,
    }


def fitting(path: Path, loaded: Loaded) -> tuple[Importance, str]:
    """Return the importance of a file for what is trained of a model, and a remark where that is not all of it.

    Importance of all weights serves LoRA, too: the entries of the adapted weights are taken.

    Raises:
        FileNotFoundError, ImportanceFileError: there is none, or no whole one.
        ValueError: it is of another model, or of LoRA where all weights are trained.
    """
    importance = Importance.load(path)
    whole = {unwrap(name): param.shape for name, param in loaded.base.named_parameters()}
    trained: Mapping[str, Sequence[int]] = whole
    by_lora = importance.method.startswith(LORA_METHODS)
    remark = ""
    if loaded.has_adapter:
        pairs = lora_pairs(loaded.model)
        shapes = {name: param.shape for name, param in loaded.model.named_parameters()}
        trained = {pair.name: pair.shape for pair in pairs} | {own: shapes[name] for name, own in pairs.names.items()}
        rest = [name for name in importance if name not in trained]
        if rest and not by_lora and len(rest) < len(importance):
            importance = importance.select(trained)
            remark = f"--importance: of all weights; the {len(importance)} tensors that have an adapter are taken"
    entries = {name: importance.encoded(name).shape for name in importance}
    _validate_models.importance_fits(
        str(path), loaded.facts["name"], entries, trained, by_lora=by_lora, lora=loaded.has_adapter
    )
    if len(entries) < len(trained):
        remark = f"--importance: it covers {len(entries)} of {len(trained)} trained tensors; the others are not held"
    return importance, remark


def facts_of(path: Path, importance: Importance) -> dict[str, Any]:
    """Return what results say of an importance and its file."""
    sizes: dict[str, int] = {}
    for name in importance:
        entry = importance.encoded(name)
        sizes[entry.format] = sizes.get(entry.format, 0) + entry.numel
    return {
        "method": importance.method,
        "steps": importance.steps,
        "xi": importance.xi,
        "relative": importance.relative,
        "bytes": path.stat().st_size,
        "file": str(path),
        "fingerprint": importance.content_fingerprint,
        "dtype": max(sizes, key=lambda kept: sizes[kept]),
    }
