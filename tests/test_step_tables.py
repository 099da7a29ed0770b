"""Tables of addresses: what is in them, when they are uploaded, what is refused. No Triton needed."""

from __future__ import annotations

import pytest
import torch
from cases import Case, formed, numbers_of

from alr_kernels.codecs import rounding
from alr_kernels.step import tables
from alr_kernels.step.plan import Numbers, Operands

CHUNK = 1024
FEW_BYTES = Case("split", "bf16", "int8", "int4", "bf16")


def inputs(case=FEW_BYTES, shapes=((1, 128), (9, 256), (3, 128)), keys=None):
    columns = formed(case, shapes)
    return Operands(**columns), numbers_of(columns, [float(i + 1) for i in range(len(shapes))], keys)


def test_a_row_holds_what_its_programs_need():
    o, numbers = inputs(keys=[7, 0, 5])
    rows = tables.Cache().find(o, numbers, 3, CHUNK).rows
    assert rows.shape == (3, len(tables.COLUMNS))
    for i in range(3):
        row = dict(zip(tables.COLUMNS, rows[i].tolist(), strict=True))
        for role, tensors in zip(o._fields, o, strict=True):
            assert row[role] == (tensors[i].data_ptr() if tensors else 0), role
        assert row["step"] == numbers.steps[i].data_ptr()
        assert row["numel"] == o.params[i].numel()
        assert rounding.mix(row["key"] ^ 11) == rounding.noise_key(3, numbers.keys[i], 11)
        assert row["offset"] == 0
    offsets = [5 * 2**32, 0, 128]
    rows = tables.Cache().find(o, numbers._replace(offsets=offsets), 3, CHUNK).rows
    assert rows[:, tables.OFFSET].tolist() == offsets


def test_every_element_is_in_one_chunk():
    o, numbers = inputs(Case(), ((0,), (1,), (1024,), (1025,), (5000,)))
    table = tables.Cache().find(o, numbers, 0, CHUNK)
    found = [divmod(entry, 2**32) for entry in table.chunks.map.tolist()]
    assert found == [(1, 0), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1), (4, 2), (4, 3), (4, 4)]
    assert table.rows[:, tables.FIRST_PROGRAM].tolist() == [0, 0, 1, 2, 4]
    assert table.rows[:, tables.PROGRAMS].tolist() == [0, 1, 1, 2, 5]
    assert table.chunks.aligned == 9


@pytest.mark.parametrize("role", ["params", "grads", "exp_avgs", "importances", "anchors", "remainders"])
def test_unaligned_tensors_come_last(role):
    o, numbers = inputs()
    tensors = getattr(o, role)
    tensors[1] = torch.zeros(tensors[1].numel() + 1, dtype=tensors[1].dtype)[1:].view(tensors[1].shape)
    table = tables.Cache().find(o, numbers, 0, CHUNK)
    assert [entry >> 32 for entry in table.chunks.map.tolist()] == [0, 2, 1, 1, 1]
    assert table.chunks.aligned == 2
    assert table.rows[:, tables.FIRST_PROGRAM].tolist() == [0, 2, 1]


def test_scales_need_no_alignment():
    o, numbers = inputs()
    o.exp_avg_scales[1] = torch.zeros(19)[1:].view(9, 2)
    assert tables.Cache().find(o, numbers, 0, CHUNK).chunks.aligned == 5


def test_a_table_is_uploaded_only_when_something_moved():
    cache, (o, numbers) = tables.Cache(), inputs()
    first = cache.find(o, numbers, 0, CHUNK)
    assert cache.upload.count == 2, "addresses and chunks"
    assert cache.find(o, numbers, 0, CHUNK) is first
    again = Operands(*map(list, o))  # other lists, as the optimizer makes in each step
    assert cache.find(again, numbers, 0, CHUNK) is first
    assert cache.upload.count == 2

    o.grads[1] = o.grads[1].clone(memory_format=torch.contiguous_format)
    second = cache.find(o, numbers, 0, CHUNK)
    assert second is not first
    assert second.rows[1, Operands._fields.index("grads")] == o.grads[1].data_ptr()
    assert first.rows[1, Operands._fields.index("grads")] == again.grads[1].data_ptr(), "a launch may be reading it"
    assert cache.upload.count <= 4, "chunks only if the clone is not aligned"
    count = cache.upload.count
    assert cache.find(again, numbers, 0, CHUNK) is first
    assert cache.find(o, numbers, 0, CHUNK) is second
    assert cache.upload.count == count


def test_other_numbers_take_another_table():
    cache, (o, numbers) = tables.Cache(), inputs()
    first = cache.find(o, numbers, 0, CHUNK)
    assert cache.find(o, numbers, 1, CHUNK) is not first, "seed"
    assert cache.find(o, numbers._replace(keys=[4, 5, 6]), 0, CHUNK) is not first
    assert cache.find(o, numbers._replace(offsets=[0, 128, 0]), 0, CHUNK) is not first
    steps = [*numbers.steps[:2], torch.tensor(3.0)]
    assert cache.find(o, numbers._replace(steps=steps), 0, CHUNK) is not first
    assert cache.find(o._replace(path_integrals=[]), numbers, 0, CHUNK) is not first
    assert cache.find(o, numbers, 0, CHUNK) is first


def test_the_cache_is_bounded():
    cache, (o, numbers) = tables.Cache(), inputs()
    first = cache.find(o, numbers, 0, CHUNK)
    for seed in range(1, tables.KEPT):
        cache.find(o, numbers, seed, CHUNK)
    assert cache.find(o, numbers, 0, CHUNK) is first, "the last used stay"
    for seed in range(1, tables.KEPT + 1):
        cache.find(o, numbers, seed, CHUNK)
    assert cache.find(o, numbers, 0, CHUNK) is not first
    assert len(cache._tables) == tables.KEPT


def test_what_would_reach_beyond_a_tensor_is_refused():
    o, numbers = inputs()
    cases = {
        "grads": torch.zeros(9, 128, dtype=torch.bfloat16),
        "importances": torch.zeros(9, 64, dtype=torch.uint8),
        "exp_avg_scales": torch.zeros(17),
    }
    for role, wrong in cases.items():
        tensors = [*getattr(o, role)]
        tensors[1] = wrong
        with pytest.raises(ValueError, match=role):
            tables.Cache().find(o._replace(**{role: tensors}), numbers, 0, CHUNK)
    with pytest.raises(ValueError, match="grads"):
        tables.Cache().find(o._replace(grads=o.grads[:2]), numbers, 0, CHUNK)
    o, numbers = inputs(Case(), ((100,),))
    with pytest.raises(ValueError, match="whole blocks of 128"):
        tables.Cache().find(o._replace(exp_avg_scales=[torch.zeros(0)]), numbers, 0, CHUNK)


def test_addresses_with_the_upper_bit_fit():
    columns = tables._rows(Operands(["p"], [], [], []), (2**64 - 16, 2**63), (5,), Numbers(None, [], None, [0]), 0)
    assert columns[0, 0] == -16
    assert columns[0, tables.STEP] == -(2**63)
