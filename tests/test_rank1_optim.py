"""Importance as rank1 beside optimizers: recorded in it, and decoded for steps."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, F32, F64, random_importance, same_bits
from forms import ALPHAS, LARGE, mixed_model, new, steps
from test_rank1 import rank1, spread

from alr_kernels import AlrAdamW, Importance, ImportanceRecorder


def recording(dtype=F32):
    optimizer = AlrAdamW(mixed_model(dtype).named_parameters(), lr=1e-2, record=True)
    steps(optimizer, 0, 3)
    return optimizer


def test_a_recorder_keeps_it_too(tmp_path):
    model = mixed_model()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-2)
    with ImportanceRecorder(sgd, model.named_parameters()) as recorder:
        steps(sgd, 0, 2)
    recorder.save(tmp_path / "i.safetensors", 1e-4, dtype="rank1")
    loaded, kept = Importance.load(tmp_path / "i.safetensors"), recorder.finalise(1e-4, dtype="rank1")
    wide = recorder.finalise(1e-4)
    assert {name for name in kept if kept.encoded(name).format == "rank1"} == set(LARGE)
    for name in kept:
        assert same_bits(loaded[name], kept[name])
        assert same_bits(kept[name], rank1(wide[name]).decoded() if name in LARGE else wide[name])
    assert loaded.stats == wide.stats


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("asked", [None, "bf16", "int8"])
def test_an_optimizer_decodes_it(dtype, asked):
    """Its steps are those with the decoded Ω, in every form that it may be asked to keep."""
    kept = random_importance(mixed_model())
    kept = Importance(kept).astype("rank1")
    plain = Importance({name: kept[name] for name in kept}, stats=kept.stats)
    assert set(LARGE) == {name for name in kept if kept.encoded(name).format == "rank1"}
    options = {} if asked is None else {"importance_dtype": asked}
    results = []
    for given in (kept, plain):
        model = mixed_model(dtype)
        optimizer = AlrAdamW(model.named_parameters(), given, ALPHAS, lr=1e-2, **options)
        before = optimizer.penalty()
        steps(optimizer, 0, 2)
        results.append((list(model.parameters()), optimizer.importance_tensors(), float(optimizer.penalty())))
        assert float(before) == 0.0
    for got, expected in zip(*(result[:2] for result in results), strict=True):
        assert all(map(torch.equal, got, expected))
    assert results[0][2] == results[1][2] > 0
    if asked is None and dtype is not F64:
        assert {tensor.dtype for tensor in results[0][1]} == {F32}


def test_an_optimizer_decodes_it_into_its_weights_layout():
    weight = torch.nn.Parameter(spread((16, 8, 4, 8)).contiguous(memory_format=torch.channels_last))
    kept = Importance({"w": spread(weight.shape, 5)}).astype("rank1")
    optimizer = AlrAdamW([("w", weight)], kept)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    (held,) = optimizer.importance_tensors()
    assert held.stride() == weight.stride()
    assert torch.equal(held, kept["w"])


def test_curvature_is_checked_by_its_largest_product():
    weight = torch.nn.Parameter(torch.ones(64, 128))
    dense = torch.full((64, 128), 1e-20)
    dense[0, 0] = 1.0
    optimizer = AlrAdamW([("w", weight)], {"w": dense}, normalize=False, reg_lambda=1e38)
    assert optimizer._penalty.largest["w"] == 1.0
    kept = Importance({"w": dense}).astype("rank1")
    optimizer = AlrAdamW([("w", weight)], kept, normalize=False, reg_lambda=1e38)
    assert optimizer._penalty.largest["w"] == pytest.approx(float(kept["w"].max()))


def test_a_phase_may_begin_with_it():
    optimizer = recording()
    optimizer.start_phase(optimizer.recorded_importance(dtype="rank1"))
    steps(optimizer, 3, 5)
    merged = optimizer.recorded_importance(dtype="rank1").merged(recording().recorded_importance(), "decayed", 0.9)
    assert {merged.encoded(name).format for name in LARGE} == {"rank1"}
    assert float(optimizer.penalty()) > 0


def test_saved_state_belongs_to_it():
    kept = Importance(random_importance(mixed_model())).astype("rank1")
    saved = AlrAdamW(mixed_model().named_parameters(), kept).state_dict()
    AlrAdamW(mixed_model().named_parameters(), kept).load_state_dict(saved)
    entry = kept.encoded(LARGE[0])
    changed = entry._replace(scales=entry.scales.flip(-1))
    other = Importance({name: changed if name == LARGE[0] else kept.encoded(name) for name in kept})
    with pytest.raises(ValueError, match="same importance file"):
        AlrAdamW(mixed_model().named_parameters(), other).load_state_dict(saved)


def test_an_optimizer_does_not_keep_it():
    with pytest.raises(ValueError, match=r"importance_dtype.*got 'rank1': .*a step reads elements.*astype\('rank1'\)"):
        new(mixed_model(), importance_dtype="rank1")
