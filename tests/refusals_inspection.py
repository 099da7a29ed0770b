"""What inspect, compare and convert refuse: part of the table of tests/test_validation.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from alr_kernels import Importance, ImportanceFileError, _validate_inspection
from alr_kernels._validate_inspection import NothingInCommonError
from alr_kernels.importance.comparison import compare
from alr_kernels.importance.conversion import convert
from alr_kernels.importance.inspection import inspect


def one(fill=1.0, shape=(64, 128), name="layers.0.w", **options):
    return Importance({name: torch.full(shape, fill)}, **options)


def looked_at(importance=None, **options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "i.safetensors"
        (importance or one()).save(path)
        return inspect(path, **options)


def compared(first=None, second=None, **options):
    return compare(first or one(), second or one(), **options)


def converted(*given, **options):
    with tempfile.TemporaryDirectory() as folder:
        return convert(given or (one(),), Path(folder) / "o.safetensors", **options)


def sharded(c):
    _validate_inspection.whole("w", True)


def merged(rule, *weights, files=2):
    return lambda c: converted(*[one() for _ in range(files)], merge=rule, weights=weights)


REFUSED = {
    "inspect file": (lambda c: inspect("nowhere.safetensors"), FileNotFoundError, r"nowhere\.safetensors.*no such"),
    "inspect other file": (lambda c: inspect(__file__), ImportanceFileError, "whole alr_kernels importance file"),
    "inspect coeffs": (lambda c: looked_at(coeffs="paper"), ValueError, "coeffs: .*'softmax'.*got 'paper'"),
    "inspect by": (lambda c: looked_at(by="tensor"), ValueError, "by: .*'block', 'module', got 'tensor'"),
    "inspect temperature": (lambda c: looked_at(temperature=0), ValueError, r"temperature: .*\(0.0, inf\), got 0"),
    "inspect temperature word": (lambda c: looked_at(temperature="hot"), TypeError, "temperature: .*number.*'hot'"),
    "inspect temperature unused": (
        lambda c: looked_at(coeffs="uniform", temperature=1.0), ValueError, "temperature: .*no effect.*'uniform'",
    ),
    "inspect encodings": (
        lambda c: looked_at(encodings="int8,int2"), ValueError, "encodings: .*auto, all, none.*rank1, kept, got 'int8,",
    ),
    "inspect encodings unused": (
        lambda c: looked_at(one().astype("int4"), encodings="int8,kept"), ValueError,
        "encodings: int8: .*no effect.*'kept' compares",
    ),
    "inspect sharded": (sharded, ValueError, r"'w'.*whole tensor.*sharded; save\(\)"),
    "inspect top": (lambda c: _validate_inspection.top_rows(3, True), ValueError, "top: .*no effect with --json"),
    "inspect plot": (lambda c: _validate_inspection.picture(Path("i.pdf")), ValueError, r"plot: .*\.png, got 'i.pdf'"),
    "inspect plot folder": (
        lambda c: _validate_inspection.picture(Path("no/i.png")), FileNotFoundError, "plot: .*no folder 'no'",
    ),
    "compare nothing": (
        lambda c: compared(one(), one(name="layers.0.v")), NothingInCommonError,
        "nothing in common.*'layers.0.w' and 'layers.0.v'; are they of the same model",
    ),
    "compare prefix": (
        lambda c: compared(one(), one(name="model.layers.0.w")), NothingInCommonError,
        r"with 'model\.' before.*1 of the first.*convert FIRST --rename =model\. --out",
    ),
    "compare shapes": (
        lambda c: compared(one(), one(shape=(128, 64))), ValueError,
        r"'layers.0.w': .*\(64, 128\) and \(128, 64\) \(1 of 1 .*other models|different models",
    ),
    "compare top": (lambda c: compared(top=0.0), ValueError, r"top: .*\(0.0, 0.5\], got 0.0"),
    "compare top above": (lambda c: compared(top=0.6), ValueError, "top: .*got 0.6"),
    "compare sample": (lambda c: compared(sample=1), ValueError, "sample: expected an integer ≥ 2, got 1"),
    "compare by": (lambda c: compared(by="tensor"), ValueError, "by: .*'block', 'module', got 'tensor'"),
    "convert nothing given": (lambda c: convert([], "o.safetensors"), ValueError, "convert: expected one importance"),
    "convert nothing": (lambda c: converted(), ValueError, "nothing would change; give one of --select"),
    "convert select all": (lambda c: converted(select=["*"]), ValueError, "nothing would change"),
    "convert select none": (
        lambda c: converted(select=["q_proj"]), ValueError, r"select: 'q_proj' matches no name.*'layers.0.w'.*q_proj",
    ),
    "convert select leaves nothing": (
        lambda c: converted(one(), one(name="b.w"), select=["b.*"], merge="sum"), ValueError, r"select: .b\.\*. match",
    ),
    "convert rename": (lambda c: converted(rename=["model."]), ValueError, r"rename: expected OLD=NEW.*got 'model\.'"),
    "convert rename to itself": (lambda c: converted(rename=["layers=layers"]), ValueError, "rename: .*two different"),
    "convert rename none": (
        lambda c: converted(rename=["model.="]), ValueError, r"rename: no name begins with 'model\.'.*'layers.0.w'",
    ),
    "convert rename onto another": (
        lambda c: converted(Importance({"a.w": torch.ones(2), "b.w": torch.ones(2)}), rename=["a.=b."]),
        ValueError, "'b.w'",
    ),
    "convert dtype": (lambda c: converted(dtype="int2"), ValueError, "dtype: .*'rank1'.*got 'int2'"),
    "convert dtype unused": (
        lambda c: converted(one(shape=(64, 100)), dtype="int4"), ValueError, "dtype: .int4. has no effect.*fp32.*4096",
    ),
    "convert normalize unused": (
        lambda c: converted(one().normalized(), normalize=True), ValueError, "normalize: .*no effect.*mean is 1",
    ),
    "convert normalize zeros": (lambda c: converted(one(0.0), normalize=True), ValueError, "one positive value"),
    "convert merge": (lambda c: converted(one(), one()), ValueError, "merge: 2 files.*nothing says.*--merge sum"),
    "convert merge one": (lambda c: converted(merge="sum"), ValueError, "merge: 'sum' has no effect on a single file"),
    "convert merge rule": (merged("mean"), ValueError, "merge: .*'decayed', got 'mean'"),
    "convert weight unused": (lambda c: converted(weights=[0.5]), ValueError, "weight: .*no effect without --merge"),
    "convert weight of a sum": (merged("sum", 0.5), ValueError, "weight: .*no effect with --merge sum"),
    "convert weight range": (merged("decayed", 1.5), ValueError, r"weight: .*\[0.0, 1.0\], got 1.5"),
    "convert weight decayed": (merged("decayed"), ValueError, r"weight: 'decayed' needs one number.*got 0"),
    "convert weight weighted": (merged("weighted"), ValueError, "weight: 'weighted' .*first alone.*got none"),
    "convert weights of three": (
        merged("weighted", 0.5, 0.1, 0.1, files=3), ValueError, "weight: .*each of 3 files, of sum 1, got '0.1', ",
    ),
    "convert methods": (
        lambda c: converted(one(method="fisher"), one(method="mas"), merge="sum"), ValueError, "fisher and mas.*normal",
    ),
    "convert shapes": (lambda c: converted(one(), one(shape=(2,)), merge="max"), ValueError, r"\(64, 128\) and \(2,\)"),
    "convert range": (
        lambda c: converted(one(3e38), one(3e38), merge="sum"), ValueError, "'layers.0.w': .*passes what float32",
    ),
    "convert name": (
        lambda c: convert([one()], "o.pt", dtype="int4"), ValueError, r"ending in \.safetensors, got 'o.pt'",
    ),
    "convert onto a file": (
        lambda c: _validate_inspection.free_target(Path(__file__), False), ValueError, "out: .*exists; add --overwrite",
    ),
    "convert onto a folder": (
        lambda c: _validate_inspection.free_target(Path(), True), ValueError, r"out: expected a file.*folder '\.'",
    ),
}  # fmt: skip
