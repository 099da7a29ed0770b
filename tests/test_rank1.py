"""Importance as row sums times column sums: what it keeps of Ω, its bytes, its files, and what is made of it."""

from __future__ import annotations

import json
import math

import pytest
import safetensors.torch
import torch
from cases import BF16, F32, F64, same_bits
from safetensors import safe_open

from alr_kernels import AlrAdamW, Importance, ImportanceFileError, _ops
from alr_kernels.codecs import reference as codecs
from alr_kernels.codecs.encoded import Encoded
from alr_kernels.codecs.storage import fitting
from alr_kernels.importance import ImportanceWriter, TensorStats

SHAPES = [(64, 128), (129, 50), (2, 3000), (5000, 1), (1, 4096), (16, 8, 3, 3, 4), (8, 32, 100)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def spread(shape, seed=0, decades=8.0):
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (decades * (torch.rand(shape, generator=generator, dtype=F64) - 0.5))
    return values.masked_fill_(torch.rand(shape, generator=generator) < 0.1, 0.0).float()


def outer(shape, seed=0):
    """Return Ω of rank 1 in float64."""
    rows, columns = spread(shape[:1], seed).double(), spread(shape[1:], seed + 1).double()
    return torch.outer(rows, columns.reshape(-1)).reshape(shape)


def rank1(dense):
    (found,), *_ = _ops.merge([Encoded.dense(dense)], [None], ["rank1"], (1.0, 0.0))
    return found


def as_matrix(dense):
    return dense.double().reshape(len(dense), -1)


def formula(dense):
    matrix = as_matrix(dense)
    return (matrix.sum(1)[:, None] * matrix.sum(0) / matrix.sum()).reshape(dense.shape)


# ---------------------------------------------------------------- what it keeps


@shapes
def test_it_is_the_formula_and_keeps_both_sums(shape):
    dense = spread(shape)
    found = rank1(dense)
    assert (found.format, found.shape, found.numel) == ("rank1", dense.shape, dense.numel())
    assert (found.values.dtype, found.values.shape) == (F32, shape[:1])
    assert (found.scales.dtype, found.scales.shape) == (F32, shape[1:])
    assert found.nbytes == 4 * (shape[0] + math.prod(shape[1:]))
    decoded = found.decoded()
    assert (decoded.dtype, decoded.is_contiguous()) == (F32, True)
    torch.testing.assert_close(decoded.double(), formula(dense), rtol=2e-7, atol=1e-45)
    for dim in (0, 1):
        torch.testing.assert_close(as_matrix(decoded).sum(dim), as_matrix(dense).sum(dim), rtol=2e-7, atol=1e-45)
    assert same_bits(_ops.decoded(found), decoded)


@shapes
def test_it_is_exact_where_importance_has_rank_1(shape):
    dense = outer(shape)
    torch.testing.assert_close(rank1(dense.float()).decoded().double(), dense, rtol=4e-7, atol=0)


@shapes
def test_zeros_stay_zeros(shape):
    found = rank1(torch.zeros(shape))
    assert not found.values.any()
    assert not found.scales.any()
    dense = spread(shape)
    dense[0] = 0
    assert not rank1(dense).decoded()[0].any()


def test_sums_are_in_float64():
    """Added in float32, ones beside 1e8 would be lost."""
    dense = torch.ones(64, 2**12)
    dense[:, 0] = 1e8
    assert rank1(dense).values.tolist() == [1e8 + 2**12] * 64
    assert rank1(dense.t()).scales.unique().tolist() == [1 / 64]
    assert rank1(dense.t()).values[0] == 64e8


def test_what_a_sum_cannot_hold_becomes_the_largest_number():
    dense = torch.full((2, 4), 3e38)
    found = rank1(dense)
    assert found.values.tolist() == [torch.finfo(F32).max] * 2
    assert bool(torch.isfinite(found.decoded()).all())
    tiny = rank1(torch.full((64, 64), 1e-44))
    assert float(tiny.decoded().max()) < 3e-44


@pytest.mark.parametrize("given", ["channels last", "transposed", "expanded", "conjugate view"])
def test_any_strides_are_read(given):
    dense = {
        "channels last": spread((16, 8, 4, 8)).contiguous(memory_format=torch.channels_last),
        "transposed": spread((50, 129)).t(),
        "expanded": spread((1, 128)).expand(64, 128),
        "conjugate view": -torch.view_as_complex(spread((64, 128, 2))).conj().imag,
    }[given]
    found, expected = rank1(dense), rank1(dense.resolve_neg().contiguous().clone())
    assert same_bits(found.values, expected.values)
    assert same_bits(found.scales, expected.scales)


def test_parts_of_it():
    found = rank1(spread((64, 128)))
    part = found.rows(slice(10, 30))
    assert part.shape == (20, 128)
    assert same_bits(part.decoded(), found.decoded()[10:30])
    moved = found.to("cpu")
    assert same_bits(moved.decoded(), found.decoded())
    empty = Encoded.empty(torch.Size((16, 8, 3, 3)), "rank1", torch.device("cpu"))
    assert (empty.shape, empty.nbytes) == ((16, 8, 3, 3), 4 * (16 + 72))
    assert "rank1, (64, 128), 768 bytes" in repr(found)
    assert codecs.decode_rank1(torch.empty(0), torch.empty(3)).shape == (0, 3)


@pytest.mark.parametrize("shape", [(4096,), (4095, 1), (), (1, 4095)], ids=str)
def test_vectors_and_small_tensors_stay_wide(shape):
    assert fitting("rank1", shape) == "fp32"
    kept = Importance({"w": spread(shape)}).astype("rank1").encoded("w")
    assert kept.format == "fp32"


# ---------------------------------------------------------------- finalising and merging


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_finalising_is_encoding_what_is_finalised(dtype):
    """In one call with other forms, in the order of the rows, with the statistics of Ω itself."""
    sizes, kept = [(64, 128), (32, 128), (16, 8, 4, 8), (7,)], ["rank1", "int4", "rank1", "fp32"]
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, F32)
    omega, params, starts = (
        [torch.randn(size, generator=generator).to(each) for size in sizes] for each in (wide, dtype, dtype)
    )
    omega[0][0, 0] = torch.nan
    found, stats, counts = _ops.finalise(omega, params, starts, kept, 1e-3)
    dense, expected, histograms = _ops.finalise(omega, params, starts, ["fp32"] * 4, 1e-3)
    assert torch.equal(stats, expected)
    assert torch.equal(counts, histograms)
    assert [x.format for x in found] == kept
    for i in (0, 2):
        again = rank1(dense[i].values)
        assert same_bits(found[i].values, again.values)
        assert same_bits(found[i].scales, again.scales)
    assert same_bits(found[3].values, dense[3].values)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.25, 0.75), (0.9, 1.0), None], ids=str)
@pytest.mark.parametrize("other", ["fp32", "fp64", "int4", "rank1", "none"])
def test_merging_is_encoding_what_is_merged(other, weights):
    first, second = rank1(spread((64, 128))), Encoded.dense(spread((64, 128), 3))
    if other != "fp32":
        form = "fp32" if other == "none" else other
        (second,), *_ = _ops.merge([second], [None], [form], (1.0, 0.0))
    second = None if other == "none" else second
    dense = [None if x is None else Encoded.dense(_ops.decoded(x)) for x in (first, second)]
    for pair, plain in (((first, second), dense), ((second, first), dense[::-1])):
        for kept in ("rank1", "fp32", "bf16", "int8"):
            found, stats, counts = _ops.merge([pair[0]], [pair[1]], [kept], weights)
            (wide,), expected, histograms = _ops.merge([plain[0]], [plain[1]], ["fp32"], weights)
            (again,), *_ = _ops.merge([wide], [None], [kept], (1.0, 0.0))
            assert torch.equal(stats, expected)
            assert torch.equal(counts, histograms)
            assert same_bits(found[0].values, again.values)
            assert again.scales is None or same_bits(found[0].scales, again.scales)


def test_one_dense_temporary_at_a_time(monkeypatch):
    reasons = _ops.importance_backends("cpu", F32)
    backend = _ops._IMPORTANCE[next(name for name, reason in reasons.items() if not reason)]
    run, sizes = backend.merge, []

    def merge(first, second, formats, weights):
        sizes.append((len(first), list(formats)))
        return run(first, second, formats, weights)

    monkeypatch.setattr(backend, "merge", merge)
    entries = [Encoded.dense(spread((64, 128), i)) for i in range(5)]
    kept = ["rank1", "int4", "rank1", "int8", "fp32"]
    found, *_ = _ops.merge(entries, [None] * 5, kept, (1.0, 0.0))
    assert sorted(sizes) == [(1, ["fp32"])] * 2 + [(3, ["int4", "int8", "fp32"])]
    sizes.clear()
    _ops.merge(found, [None] * 5, ["fp32"] * 5, (1.0, 0.0))
    assert sorted(number for number, _ in sizes) == [1, 1, 3]


@pytest.mark.parametrize("weights", [[0.5, 2.0], None], ids=str)
def test_opcheck_rank1(weights):
    formats = ["rank1", "int8", "rank1"]
    lists = [[torch.randn(shape) for shape in ((3, 256), (2, 128), (5, 2, 3))] for _ in range(3)]
    torch.library.opcheck(torch.ops.alr_kernels.finalise.default, (*lists, formats, 1e-3, False))
    values, scales, *_ = torch.ops.alr_kernels.finalise(*lists, formats, 1e-3)
    absent = ([torch.empty(0), values[1].clone(), values[2].clone()], [torch.empty(0), *scales[1:]])
    arguments = (values, scales, formats, *absent, ["", "int8", "rank1"], ["fp32", "rank1", "bf16"], weights)
    torch.library.opcheck(torch.ops.alr_kernels.merge.default, arguments)


def test_compiled_it_is_the_same():
    omega, params, starts = (torch.randn(32, 128) for _ in range(3))

    def run(omega, params, starts):
        found, stats, counts = _ops.finalise([omega], [params], [starts], ["rank1"], 1e-3)
        (both,), *_ = _ops.merge(found, [None], ["rank1"], (2.0, 1.0))
        return found[0].values, both.values, both.scales, stats, counts

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(omega, params, starts)
    assert all(map(torch.equal, compiled, run(omega, params, starts)))


# ---------------------------------------------------------------- the artifact


def artifact(**options):
    tensors = {"a.w": spread((64, 128)), "b.w": spread((16, 8, 4, 8), 1), "b.bias": spread((16,), 2)}
    return Importance(tensors, **options)


def test_statistics_are_those_of_importance_itself():
    wide = artifact()
    kept = wide.astype("rank1")
    assert kept.stats == wide.stats
    assert kept.layer_stats() == wide.layer_stats()
    assert kept.nbytes == 4 * (64 + 128 + 16 + 256 + 16)
    assert "bytes in rank1, fp32" in repr(kept)
    assert kept.fingerprint == wide.fingerprint
    assert kept.content_fingerprint != wide.content_fingerprint
    back = kept.astype("fp32")
    assert all(same_bits(back[name], kept[name]) for name in wide)
    assert back.stats == wide.stats


def test_a_part_and_a_scaled_one_keep_the_form():
    kept = artifact().astype("rank1")
    chosen = kept.select(["a.w"]).to("cpu")
    assert (list(chosen), chosen.encoded("a.w").format) == (["a.w"], "rank1")
    normal = kept.normalized()
    assert [normal.encoded(name).format for name in normal] == ["rank1", "rank1", "fp32"]
    assert TensorStats.pooled(normal.stats.values()).mean == pytest.approx(1.0, rel=1e-6), "sums are kept, hence means"
    mean = TensorStats.pooled(kept.stats.values()).mean
    for name in kept:
        torch.testing.assert_close(normal[name], kept[name] / mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -1.0])
def test_what_is_no_importance_is_refused(broken):
    dense = spread((64, 128))
    dense[3, 5] = broken
    with pytest.raises(ValueError, match="importance of 'w'"):
        Importance({"w": dense}).astype("rank1")
    good = rank1(spread((64, 128)))
    for side in ("values", "scales"):
        tensor = getattr(good, side).clone()
        tensor[7] = broken
        entry = good._replace(**{side: tensor})
        with pytest.raises(ValueError, match="importance of 'w'"):
            Importance({"w": entry})
        given = Importance({"w": entry}, stats={"w": TensorStats.of(good)})
        with pytest.raises(ValueError, match="importance of 'w'"):
            AlrAdamW([("w", torch.nn.Parameter(torch.zeros(64, 128)))], given)


# ---------------------------------------------------------------- files


def test_its_file(tmp_path):
    path, wide = tmp_path / "i.safetensors", artifact(method="mine", steps=3)
    kept = wide.astype("rank1")
    kept.save(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format_version"] == "3"
        assert json.loads(file.metadata()["layout"])[1] == ["b.w", "rank1", [16, 8, 4, 8]]
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys() if "b.w" in name} == {  # noqa: SIM118
            "b.w": (16,), "b.w:scales": (8, 4, 8),
        }  # fmt: skip
        assert set(file.keys()) == {*kept, "a.w:scales", "b.w:scales", ":statistics", ":histogram"}
    loaded = Importance.load(path)
    assert loaded.stats == wide.stats
    assert (repr(loaded), loaded.content_fingerprint) == (repr(kept), kept.content_fingerprint)
    assert all(same_bits(loaded[name], kept[name]) for name in kept)
    with ImportanceWriter(path, {"w": (64, 128)}, dtype="rank1") as writer:
        writer.add("w", wide["a.w"])
        assert writer.nbytes < 3000
    assert same_bits(Importance.load(path)["w"], kept["a.w"])
    with ImportanceWriter(path, {"w": (64, 128)}) as writer:
        writer.add("w", kept.encoded("a.w"))
    assert same_bits(Importance.load(path)["w"], kept["a.w"])


def test_other_files_stay_readable_by_older_versions(tmp_path):
    artifact().astype("int4").save(tmp_path / "i.safetensors")
    with safe_open(tmp_path / "i.safetensors", framework="pt") as file:
        assert file.metadata()["format_version"] == "2"


def test_a_form_of_the_future_is_named(tmp_path):
    path = tmp_path / "i.safetensors"
    artifact().astype("rank1").save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["layout"] = metadata["layout"].replace("rank1", "rank2")
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(ImportanceFileError, match=r"expected tensors in the forms .*rank1.*got 'rank2'.*upgrade"):
        Importance.load(path)
