"""What plans refuse: part of the table of tests/test_validation.py."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from alr_kernels.cli.plan import _lora
from alr_kernels.planning import Lora, Setup, plan, read_model

SHAPES = {"a.q_proj.weight": [8, 16], "a.norm.weight": [8]}


def written(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(text, encoding="utf-8")
        return read_model(path)


def without_transformers(c):
    with mock.patch.dict(sys.modules, {"transformers": None}):
        read_model({"model_type": "llama"})


def scalar():
    return nn.ParameterDict({"scale": nn.Parameter(torch.ones(()))})


REFUSED = {
    "plan json": (lambda c: written("{"), ValueError, r"config: .*config\.json is no JSON.*model_type.*sizes"),
    "plan json list": (lambda c: written("[1]"), ValueError, "config: expected.*model_type.*got list of length 1"),
    "plan json empty": (lambda c: written("{}"), ValueError, "config: expected.*got dict of length 0"),
    "plan config": (
        lambda c: written(json.dumps({"hidden_size": 8})), ValueError, r'config\.json has no "model_type".*no table',
    ),
    "plan size": (lambda c: plan({"w": [8, 0]}), ValueError, r"parameter 'w': .*sizes ≥ 1, got \[8, 0\]"),
    "plan size type": (lambda c: plan({"w": [8.0]}), ValueError, r"parameter 'w'.*got \[8.0\]"),
    "plan without transformers": (without_transformers, ImportError, r"needs transformers: pip install.*sizes"),
    "plan model_type": (
        lambda c: read_model({"model_type": "no-such-model"}),
        ValueError, "cannot build model_type 'no-such-model'.*sizes",
    ),
    "plan config that does not build": (
        lambda c: read_model({"model_type": "gpt2", "n_embd": 10, "n_head": 3}),
        ValueError, "cannot build model_type 'gpt2': .*divisible",
    ),
    "plan dtype of a module": (
        lambda c: plan(nn.Linear(2, 2).double()),
        ValueError, "parameter 'weight': expected fp32, bf16 or fp16, got fp64",
    ),
    "plan nothing": (lambda c: plan(nn.ReLU()), ValueError, "no parameters"),
    "plan shard": (lambda c: Setup("hsdp"), ValueError, "shard: hsdp needs.*got None"),
    "plan shard unused": (lambda c: Setup("fsdp2", 4), ValueError, "shard: it has no effect.*'fsdp2'.*'hsdp'"),
    "plan importance_dtype": (
        lambda c: Setup(phase="record", importance_dtype="int8"), ValueError, "importance_dtype: .*no effect.*'record'",
    ),
    "plan anchor_dtype": (
        lambda c: Setup(phase="plain", anchor_dtype="bf16"), ValueError, "anchor_dtype: .*no effect.*'plain'.*'tune'",
    ),
    "plan bucket_view": (lambda c: Setup(bucket_view=True), ValueError, "bucket_view: .*no effect.*'fsdp2'.*'ddp'"),
    "plan strategy": (lambda c: Setup("fsdp"), ValueError, "strategy: .*'single', 'ddp', 'fsdp2', 'hsdp'.*got 'fsdp'"),
    "plan phase": (lambda c: Setup(phase="train"), ValueError, "phase: .*'plain', 'record', 'tune', 'both'"),
    "plan rank": (lambda c: Setup(lora=Lora(0)), ValueError, "rank: expected an integer ≥ 1, got 0"),
    "plan master": (
        lambda c: plan(SHAPES, setup=Setup(master="split")),
        ValueError, "master: .*no effect.*'fp32'.*set dtype to 'bf16'",
    ),
    "plan master of factors": (
        lambda c: plan(SHAPES, setup=Setup(master="split", dtype="bf16", lora=Lora(2, ("q_proj",)))),
        ValueError, "master: .*no effect.*factors' dtype",
    ),
    "plan gpus": (lambda c: plan(SHAPES, [4, 0]), ValueError, r"gpus: expected integers ≥ 1, got \[4, 0\]"),
    "plan no gpus": (lambda c: plan(SHAPES, []), ValueError, r"gpus: expected integers ≥ 1, got \[\]"),
    "plan single": (lambda c: plan(SHAPES, [2], Setup("single")), ValueError, r"'single' is one device, got \[2\]"),
    "plan hsdp": (lambda c: plan(SHAPES, [4, 6], Setup("hsdp", 4)), ValueError, r"multiples of shard=4, got \[4, 6\]"),
    "plan scalar": (lambda c: plan(scalar(), [2]), ValueError, r"FSDP2 cannot shard.*'scale'.*shape \(1,\).*ddp"),
    "plan targets": (
        lambda c: plan(SHAPES, setup=Setup(lora=Lora(2, ("q_proj", "v_proj")))),
        ValueError, "targets: .*such as 'q_proj'; got 'v_proj'",
    ),
    "plan no targets": (lambda c: plan(SHAPES, setup=Setup(lora=Lora(2, ()))), ValueError, "targets: .*got none"),
    "plan target that cannot": (
        lambda c: plan(SHAPES, setup=Setup(lora=Lora(2, ("norm",)))), ValueError, "targets: .*'q_proj'; got 'norm'",
    ),
    "plan rank without lora": (
        lambda c: _lora(False, 4, None, "bf16"), ValueError, "--rank, --factor-dtype: no effect without --lora",
    ),
}  # fmt: skip
