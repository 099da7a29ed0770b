"""What is refused of importance files and mergers: part of the table of tests/test_validation.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from refusals import p

from alr_kernels import Importance, ImportanceRecorder
from alr_kernels.importance import ImportanceWriter


def of(method, shape=2, value=1.0):
    return Importance({"w": torch.full((shape,), value)}, method=method)


def merged(**options):
    return of("mas").merged(of("mas"), **options)


def writer(shapes):
    return ImportanceWriter(Path(tempfile.mkdtemp()) / "i.safetensors", shapes)


def closed(target):
    target.abort()
    return target


def twice(target):
    for _ in range(2):
        target.add("w", p(2))


REFUSED = {
    "file name": (
        lambda c: Importance(c.importance).save("i.bin"),
        ValueError, r"ending in \.safetensors, got 'i.bin'",
    ),
    "folder": (
        lambda c: Importance(c.importance).save("nowhere/i.safetensors"),
        FileNotFoundError, "no folder 'nowhere'; create it first",
    ),
    "file of something unexpected": (
        lambda c: writer({"w": (2,)}).add("v", p(2)), ValueError, "'v' is not one of the tensors.*'w'",
    ),
    "file with a tensor twice": (lambda c: twice(writer({"w": (2,)})), ValueError, "'w' was added before.*once"),
    "form of an importance": (
        lambda c: Importance(c.importance).astype("rank2"),
        ValueError, "dtype: expected one of 'fp32', 'bf16', 'int8', 'int4', 'rank1' or .*got 'rank2'",
    ),
    "form of a recording": (
        lambda c: c.optimizer.recorded_importance(dtype=torch.float16),
        ValueError, "dtype: expected one of 'fp32', 'bf16', 'int8', 'int4', 'rank1' or .*got torch.float16",
    ),
    "form that steps cannot read": (
        lambda c: c.optimizer.__class__([("w", p(2))], {"w": torch.ones(2)}, importance_dtype="rank1"),
        ValueError, r"importance_dtype: .*got 'rank1': .*a step reads elements; .*astype\('rank1'\).*is decoded",
    ),
    "file with another shape": (
        lambda c: writer({"w": (2,)}).add("w", p(3)), ValueError, r"'w': expected shape \(2,\), got \(3,\)",
    ),
    "file closed too early": (
        lambda c: writer({"w": (2,), "v": (1,)}).close(), ValueError, "'v', 'w' missing; add them",
    ),
    "file with a colon in a name": (
        lambda c: writer({"w:scales": (2,)}), ValueError, "names without a colon, got 'w:scales'",
    ),
    "file that is closed": (lambda c: closed(writer({"w": (2,)})).add("w", p(2)), ValueError, "closed or aborted"),
    "file of integers": (
        lambda c: writer({"w": (2,)}).add("w", torch.ones(2, dtype=torch.int64)), TypeError, "'w'.*got torch.int64",
    ),
    "merge beyond float32": (
        lambda c: of("mas", value=3e38).merged(of("mas", value=3e38)), ValueError,
        r"'w': the result passes what float32 holds \(max inf\)",
    ),
    "merge rule": (lambda c: merged(rule="mean"), ValueError, "rule: expected one of 'sum', 'max', 'weighted'"),
    "merge weight without effect": (lambda c: merged(weight=0.5), ValueError, "no effect with rule='sum'.*'decayed'"),
    "merge without a weight": (lambda c: merged(rule="decayed"), ValueError, "rule='decayed' needs one, 0 ≤ weight"),
    "merge with a weight above 1": (
        lambda c: merged(rule="weighted", weight=1.5), ValueError, r"weight: expected a number in \[0.0, 1.0\]",
    ),
    "an entry that is not there": (
        lambda c: Importance({"w.weight": p(2)})["w.wieght"], KeyError, r"no importance here.*did you mean 'w\.weight'",
    ),
    "merge with a mapping": (lambda c: of("a").merged({"w": p(2)}), TypeError, "expected an Importance, got dict"),
    "merge of two estimators": (
        lambda c: of("fisher").merged(of("mas")), ValueError,
        r"same estimator, or both normalized, got fisher and mas.*a\.normalized\(\)\.merged\(b\.normalized",
    ),
    "merge of a normalized and a raw one": (
        lambda c: of("mas").normalized().merged(of("mas")), ValueError, "got mas, normalized and mas",
    ),
    "merge of two models": (
        lambda c: of("mas").merged(of("mas", shape=3)), ValueError, r"'w' differ \('w': \(2,\) and \(3,\)\)",
    ),
    "recorder strangers": (
        lambda c: ImportanceRecorder(torch.optim.SGD([p()], lr=1), [("w", p())]),
        ValueError, "of the optimizer, got 'w'",
    ),
    "recorder nothing": (lambda c: ImportanceRecorder(torch.optim.SGD([p()], lr=1), []), ValueError, "got none"),
    "recorder twice": (
        lambda c: ImportanceRecorder(c.optimizer, [("a", c.model.head.bias), ("b", c.model.head.bias)]),
        ValueError, "'b'.*'a'",
    ),
}  # fmt: skip
