"""`alr-kernels compare`: every measure against numpy, ties and zeros included, a piece at a time."""

from __future__ import annotations

import json
import math

import importance_files
import numpy as np
import pytest
import torch
from importance_files import Largest, cut_into, importance
from typer.testing import CliRunner

from alr_kernels import Importance
from alr_kernels.cli import app
from alr_kernels.importance import chunks, comparison
from alr_kernels.importance.comparison import compare
from alr_kernels.importance.ranking import (
    Moments,
    Selection,
    bits_of,
    overlap,
    rank_correlation,
    ranks,
    sampled,
    upper_counts,
)


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def oracle(first, second, top):
    """Return the measures of two arrays, in numpy and float64."""
    a, b = (np.concatenate([values.ravel() for values in side]).astype(np.float64) for side in (first, second))
    both = (a > 0) & (b > 0)

    def pearson(x, y):
        return np.corrcoef(x, y)[0, 1]

    return {
        "elements": a.size,
        "rank_correlation": pearson(importance_files.ranks(a), importance_files.ranks(b)),
        "log_correlation": pearson(np.log(a[both]), np.log(b[both])),
        "both_positive": int(both.sum()),
        "cosine": (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()),
        "overlap": importance_files.overlap(a, b, top),
        "scale_ratio": b.sum() / a.sum(),
    }


def differing(kind):
    """Return two importances of the same model that differ in some way."""
    first = importance()
    if kind == "another":
        return first, importance(seed=1)
    if kind == "noise":
        draw = torch.Generator().manual_seed(5)
        return first, Importance({n: x * torch.rand(x.shape, generator=draw) for n, x in first.items()})
    if kind == "ties":  # a few values alone
        return tuple(Importance({n: (x * 4).round().clamp(max=9) for n, x in importance(s).items()}) for s in (0, 1))
    return first, first.astype(kind)


@pytest.mark.parametrize("top", [0.01, 0.3])
@pytest.mark.parametrize("kind", ["another", "noise", "ties", "bf16", "int8", "int4", "rank1"])
def test_every_measure_against_numpy(kind, top, monkeypatch):
    first, second = differing(kind)
    with cut_into(monkeypatch, comparison, elements=3000):
        found = compare(first, second, top=top)
    values = [{name: x[name].float().numpy() for name in x} for x in (first, second)]
    layers = {row.name: row for row in found.layers}
    members = {
        "model.layers.1": [n for n in first if ".1." in n],
        "model.embed": ["model.embed.weight"],
        "all": list(first),
    }
    for layer, names in members.items():
        row = found.total if layer == "all" else layers[layer]
        expected = oracle([values[0][n] for n in names], [values[1][n] for n in names], top)
        got = row.as_dict()
        assert {key: got[key] for key in expected} == pytest.approx(expected, rel=1e-5), layer
        assert row.tensors == len(names)
        assert got["exact"]


def test_a_file_agrees_with_itself():
    for form in ("fp32", "int4", "rank1"):
        kept = importance().astype(form)
        for row in (compare(kept, kept).total, *compare(kept, kept).layers):
            assert row.overlap == pytest.approx(1.0, abs=1e-12)
            if row.elements > 1:
                assert (row.rank_correlation, row.cosine, row.scale_ratio) == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)


def test_the_opposite_order():
    a = torch.arange(1.0, 101.0)
    row = compare(Importance({"w": a}), Importance({"w": 1 / a}), top=0.1).total
    assert (row.rank_correlation, row.log_correlation, row.overlap) == pytest.approx((-1.0, -1.0, 0.0))


def test_measures_that_mean_nothing_are_none():
    row = compare(Importance({"w": torch.ones(300)}), Importance({"w": torch.rand(300)})).total
    assert row.rank_correlation is row.log_correlation is None
    row = compare(Importance({"w": torch.zeros(300)}), Importance({"w": torch.rand(300)})).total
    assert row.cosine is row.scale_ratio is row.log_correlation is None
    row = compare(Importance({"w": torch.zeros(0), "v": torch.rand(9)}), Importance({"w": torch.zeros(0)})).total
    assert (row.elements, row.rank_correlation) == (0, None)
    scale = compare(Importance({"w": torch.tensor(2.0)}), Importance({"w": torch.tensor(3.0)})).total
    assert (scale.rank_correlation, scale.overlap, scale.scale_ratio) == (None, 1.0, 1.5)


# ---------------------------------------------------------------- order


def test_ranks_share_ties():
    for seed in range(5):
        values = torch.randint(0, 30, (200,), generator=torch.Generator().manual_seed(seed)).float()
        assert ranks(values).tolist() == importance_files.ranks(values.numpy()).tolist()
    assert rank_correlation(torch.ones(4), torch.rand(4)) is None
    assert rank_correlation(torch.ones(1), torch.ones(1)) is None


@pytest.mark.parametrize("seed", range(6))
def test_selection_finds_the_bound_that_sorting_finds(seed):
    draw = torch.Generator().manual_seed(seed)
    values = torch.rand(5000, generator=draw).log().mul(-9).exp() - 1
    values = torch.cat([values, values[:1000], torch.zeros(500), torch.tensor([1e-45, 3.4e38, -0.0])])
    for count in (1, 2, 65, 600, 5999, values.numel()):
        selection = Selection(count)
        for part in values.split(777):
            selection.count_upper(upper_counts(bits_of(part)))
        selection.narrow()
        for part in values.split(1000):
            selection.count_lower(bits_of(part))
        bound = selection.bound()
        expected = values.sort().values[-count]
        assert torch.tensor(bound.bits, dtype=torch.int32).view(torch.float32) == expected
        above, there = int((values > expected).sum()), int((values == expected).sum())
        assert bound.part == pytest.approx((count - above) / there)
        assert overlap(bits_of(values), bits_of(values), (bound, bound)) == pytest.approx(count)


def test_moments_of_pieces_are_those_of_the_whole():
    draw = torch.Generator().manual_seed(0)
    x, y = 1e6 + torch.rand(999, generator=draw).double(), torch.rand(999, generator=draw).double() * 1e-6
    y += 1e-7 * x
    moments = Moments()
    for a, b in zip(x.split(100), y.split(100), strict=True):
        moments.add(Moments.of(a, b))
    moments.add(Moments())
    assert moments.count == 999
    assert moments.correlation == pytest.approx(np.corrcoef(x.numpy(), y.numpy())[0, 1], rel=1e-9)


@pytest.mark.parametrize("count", [0, 1, 7, 1000, 9_999, 10_000])
def test_a_sample_is_spread_and_repeats(count):
    places = sampled(10_000, count, "key")
    assert torch.equal(places, sampled(10_000, count, "key"))
    assert places.numel() == count
    assert torch.equal(places.unique(), places)
    if 1 < count < 5000:
        assert not torch.equal(places, sampled(10_000, count, "other"))
        for k in range(count):
            assert k * 10_000 // count <= int(places[k]) < (k + 1) * 10_000 // count


def test_ranks_of_a_sample_are_near_those_of_all(monkeypatch):
    first, second = differing("noise")
    whole = compare(first, second)
    with cut_into(monkeypatch, comparison, elements=1000):
        part = compare(first, second, sample=4000)
    again = compare(first, second, sample=4000, seed=1)
    assert part.total.ranked == again.total.ranked == 4000
    assert not part.total.as_dict()["exact"]
    for other in (part, again):
        assert other.total.rank_correlation != whole.total.rank_correlation
        assert other.total.rank_correlation == pytest.approx(whole.total.rank_correlation, abs=5 / math.sqrt(4000))
        assert other.total.overlap == whole.total.overlap
        assert other.total.log_correlation == pytest.approx(whole.total.log_correlation)
    assert part.total.rank_correlation != again.total.rank_correlation


def test_no_tensor_is_ever_whole_in_memory(tmp_path):
    for form in ("fp32", "int4"):
        Importance({"w": torch.rand(3000, 1024)}).astype(form).save(tmp_path / f"{form}.safetensors")
    files = [Importance.load(tmp_path / f"{form}.safetensors") for form in ("fp32", "int4")]
    done = []
    with Largest() as seen:
        compare(*files, sample=2**18, tick=done.append)
    assert seen.elements <= chunks.ELEMENTS
    assert sum(done) == comparison.PASSES * 3000 * 1024


# ---------------------------------------------------------------- what is compared


def test_what_one_alone_has_is_told():
    first, second = importance(), importance()
    found = compare(first.select(n for n in first if n != "scale"), second.select(n for n in second if "layers" in n))
    assert set(found.only_first) == {"model.embed.weight", "model.experts.weight", "head.weight"}
    assert found.only_first["head.weight"] == 4500
    assert found.only_second == {}
    assert {row.name for row in found.layers} == {f"model.layers.{i}" for i in range(3)}


def test_units_are_told():
    first = importance()
    assert compare(first, importance()).notes == []
    assert "different units (path_integral; fisher)" in compare(first, importance(method="fisher")).notes[0]
    assert "normalized" in compare(first, first.normalized()).notes[0]
    assert "different ξ" in compare(first, importance(xi=1.0)).notes[0]


def test_values_that_no_file_has_are_refused():
    first = importance()
    second = Importance(dict(first))
    second["model.embed.weight"].view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=r"'model\.embed\.weight': expected finite values"):
        compare(first, second)


# ---------------------------------------------------------------- the command


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b")]
    importance().save(paths[0])
    importance(seed=1, method="fisher").astype("int4").save(paths[1])
    return paths


def test_the_command_prints_what_python_returns(files):
    done = run(*files, "--by", "module", "--top", "0.1", "--sample", "2000", "--seed", "3", "--json")
    assert done.exit_code == 0, done.output
    loaded = [Importance.load(path) for path in files]
    names = (str(files[0]), str(files[1]))
    expected = compare(*loaded, by="module", top=0.1, sample=2000, seed=3, names=names).as_dict()
    assert json.loads(done.output) == json.loads(json.dumps(expected))


def test_the_table(files):
    done = run(*files, "--sample", "5000")
    assert done.exit_code == 0, done.output
    found = compare(*map(Importance.load, files), sample=5000)
    lines = {line.split()[0]: line.split() for line in done.output.splitlines() if line.strip()}
    for row in (*found.layers, found.total):
        assert lines[row.name][1] == f"{row.elements:,}"
        shown = lines[row.name][2]
        if row.rank_correlation is not None:
            assert shown == f"{'~' if row.ranked < row.elements else ''}{row.rank_correlation:.4f}"
        assert f"{100 * row.overlap:.1f}" in lines[row.name]
    assert "different units" in done.output
    assert "~: ranks of a sample of 5,000 elements" in done.output


def test_exit_codes(tmp_path, files):
    importance().renamed("model.", "base.").save(tmp_path / "renamed.safetensors")
    only = Importance.load(tmp_path / "renamed.safetensors")
    only.select(name for name in only if name.startswith("base.")).save(tmp_path / "renamed.safetensors")
    done = run(files[0], tmp_path / "renamed.safetensors")
    assert done.exit_code == 1
    assert "--rename model.=base." in done.output
    Importance({"head.weight": torch.ones(3)}).save(tmp_path / "other.safetensors")
    done = run(files[0], tmp_path / "other.safetensors")
    assert done.exit_code == 2
    assert "expected the same shape" in done.output
    assert run(files[0], tmp_path / "nowhere.safetensors").exit_code == 2
    assert run(*files, "--top", "0.9").exit_code == 2
