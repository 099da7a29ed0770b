"""A model's tensors by name, shape and dtype, from a Hugging Face config, a table of shapes, or a module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import _validate_planning
from ..codecs.storage import NAMES

KINDS = ("linear", "transposed", "other")


class Weight(NamedTuple):
    """One parameter.

    ``kind``: how LoRA's factors would lie: ``"linear"`` [out, in, *kernel], ``"transposed"`` [in, out] (transformers'
    Conv1D, embeddings), or ``"other"``: not adaptable.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "fp32"
    kind: str = "other"


class Model(NamedTuple):
    """The parameters of a model, tied ones once."""

    name: str
    weights: tuple[Weight, ...]


def read_model(source: str | PathLike[str] | Mapping[str, Any] | nn.Module) -> Model:
    """Return a model's tensors; nothing is allocated or downloaded.

    Args:
        source: the path of a JSON file or what is in it: a Hugging Face ``config.json`` (needs transformers), or
            {parameter name: [sizes]}, all float32, of which those with two or more sizes are taken as linear
            weights [out, in, ...]; or a module, on the meta device as well.

    Raises:
        ValueError: neither of these, or a model that transformers cannot build.
        ImportError: a config, and transformers is not installed.
        OSError: the file cannot be read.

    >>> read_model({"head.weight": [2, 8], "head.bias": [2]}).weights[1].shape
    (2,)
    """
    if isinstance(source, nn.Module):
        return Model(type(source).__name__, _of_module(source))
    if isinstance(source, Mapping):
        return _of_mapping("the mapping", source)
    path = Path(source)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        _validate_planning.no_json(path, error)
    return _of_mapping(path.name, content)


def _of_mapping(name: str, content: Any) -> Model:
    _validate_planning.config(name, content)
    if "model_type" in content:
        model = _built(dict(content))
        return Model(f"{name}, {type(model).__name__}", _of_module(model))
    weights = []
    for key, shape in content.items():
        _validate_planning.shape(key, shape)
        weights.append(Weight(key, tuple(shape), kind="linear" if len(shape) > 1 else "other"))
    return Model(name, tuple(weights))


def _built(content: dict[str, Any]) -> nn.Module:
    """Build the model of a config on the meta device: the class it names, else the causal LM, else the bare model."""
    try:
        import transformers
    except ImportError as missing:
        _validate_planning.no_transformers(missing)
    kind = content.pop("model_type")
    content.pop("quantization_config", None)  # weights are counted in their own dtype
    try:
        config = transformers.AutoConfig.for_model(kind, **content)
    except (ValueError, TypeError) as error:
        _validate_planning.unbuildable(kind, error)
    named = next((getattr(transformers, name, None) for name in content.get("architectures") or ()), None)
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    try:
        with torch.device("meta"):
            return auto.from_config(config) if named is None else named._from_config(config)  # in the config's dtype
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        _validate_planning.unbuildable(kind, error)


def _of_module(model: nn.Module) -> tuple[Weight, ...]:
    modules = [module for module in model.modules() if hasattr(module, "weight")]
    kinds = {id(module.weight): _kind(module) for module in reversed(modules)}  # a tied weight is called as the first
    found = []
    for name, param in model.named_parameters():
        dtype = NAMES.get(str(param.dtype), str(param.dtype))
        _validate_planning.weight_dtype(name, dtype)
        kind = kinds.get(id(param), "other")
        found.append(Weight(name, tuple(param.shape), dtype, kind))
    _validate_planning.some_weights(found)
    return tuple(found)


def _kind(module: nn.Module) -> str:
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1
    if isinstance(module, nn.Linear) or convolution:
        return "linear"
    transposed = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"  # transformers'
    return "transposed" if transposed else "other"
