"""`alr-kernels convert`: files made of others are those that `Importance` makes in memory, tensor by tensor."""

from __future__ import annotations

import json

import importance_files
import numpy as np
import pytest
import torch
from importance_files import FORMS, Largest, importance
from typer.testing import CliRunner

from alr_kernels import Importance
from alr_kernels.cli import app
from alr_kernels.importance import conversion, files
from alr_kernels.importance.conversion import convert
from alr_kernels.importance.statistics import TensorStats

read = importance_files.plain_reader()


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def converted(tmp_path, given, **options):
    """Convert what lies in files, and return what was written and what was said."""
    paths = [tmp_path / f"in{i}.safetensors" for i in range(len(given))]
    for path, each in zip(paths, given, strict=True):
        each.save(path)
    done = convert([Importance.load(path) for path in paths], tmp_path / "out.safetensors", **options)
    return Importance.load(tmp_path / "out.safetensors"), done


def assert_same(got, expected):
    assert set(got) == set(expected)
    assert got.about == expected.about
    for name in expected:
        mine, theirs = got.encoded(name), expected.encoded(name)
        assert mine.format == theirs.format, name
        assert torch.equal(mine.values, theirs.values), name
        assert mine.scales is theirs.scales is None or torch.equal(mine.scales, theirs.scales), name
        assert got.stats[name] == expected.stats[name], name


# ---------------------------------------------------------------- one file


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "rank1"])
def test_encoding(tmp_path, dtype):
    got, done = converted(tmp_path, [importance()], dtype=dtype)
    assert_same(got, importance().astype(dtype))
    original, kept = importance(), read(tmp_path / "out.safetensors")[0]
    apart = {n: np.abs(kept[n].astype(np.float64) - original[n].numpy()) for n in done.losses}
    assert set(done.losses) == {name for name in got if got.encoded(name).format == dtype}
    squares = sum((x**2).sum() for x in apart.values()), sum(float(original[n].double().square().sum()) for n in apart)
    assert done.loss.rms == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
    assert done.loss.worst == pytest.approx(max(x.max() / float(original[n].max()) for n, x in apart.items()), rel=1e-4)
    assert done.nbytes == (tmp_path / "out.safetensors").stat().st_size
    assert done.tensor_bytes == got.nbytes


@pytest.mark.parametrize("form", ["int4", "rank1"])
def test_decoding_loses_nothing_more(tmp_path, form):
    given = importance().astype(form)
    got, done = converted(tmp_path, [given], dtype="fp32")
    assert_same(got, given.astype("fp32"))
    assert done.loss.rms == 0.0


def test_selecting_and_renaming(tmp_path):
    got, done = converted(
        tmp_path, [importance().astype("int4")], select=["*.q_proj.*", "model.experts*"],
        rename=["model.=m.", "m.layers.=blocks."],
    )  # fmt: skip
    whole = importance().astype("int4")
    kept = whole.select(name for name in whole if "q_proj" in name or "experts" in name)
    assert_same(got, kept.renamed("model.", "m.").renamed("m.layers.", "blocks."))
    assert done.losses == {}
    assert done.loss is None


@pytest.mark.parametrize("form", ["fp32", "int8", "rank1"])
def test_normalizing(tmp_path, form):
    given = importance().astype(form)
    got, _ = converted(tmp_path, [given], normalize=True)
    assert_same(got, given.normalized())


def test_normalizing_is_over_what_was_selected(tmp_path):
    got, _ = converted(tmp_path, [importance()], select=["*.up.*"], normalize=True)
    assert TensorStats.pooled(got.stats.values()).mean == pytest.approx(1.0)
    assert got.is_normalized


# ---------------------------------------------------------------- several


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rule", "weight"), [("sum", None), ("max", None), ("weighted", 0.3), ("decayed", 0.6)])
def test_merging_two_is_what_merged_does(tmp_path, form, rule, weight):
    first = importance().astype(form)
    second = importance(seed=1).select(name for name in importance() if name != "scale").astype("int8")
    second = Importance(
        {name: second.encoded(name) for name in second} | {"new.weight": torch.rand(64, 128)}, **second.about._asdict()
    )
    got, _ = converted(tmp_path, [first, second], merge=rule, weights=[] if weight is None else [weight])
    assert_same(got, first.merged(second, rule, weight))


RULES = {
    "sum": ([], lambda a, b, c: a + b + c),
    "max": ([], lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "weighted": ([0.5, 0.2, 0.3], lambda a, b, c: 0.5 * a + 0.2 * b + 0.3 * c),
    "decayed": ([0.9], lambda a, b, c: 0.9 * (0.9 * a + b) + c),
}


@pytest.mark.parametrize("rule", RULES)
def test_merging_three_against_numpy(tmp_path, rule):
    weights, formula = RULES[rule]
    given = [importance(seed=seed, steps=10 * seed) for seed in (1, 2, 3)]
    got, done = converted(tmp_path, given, merge=rule, weights=weights)
    for name in given[0]:
        values = [x[name].double().numpy() for x in given]
        expected = formula(*values)
        np.testing.assert_allclose(got[name].numpy(), expected, rtol=5e-7)
        assert got.stats[name].l2 == pytest.approx(np.linalg.norm(expected), rel=1e-6)
        signed = [x.stats[name].path_integral_sum for x in given]
        dropped = [x.stats[name].negative_mass for x in given]
        if rule == "max":
            assert got.stats[name].path_integral_sum is None
        else:
            assert got.stats[name].path_integral_sum == pytest.approx(formula(*signed))
            assert got.stats[name].negative_mass == pytest.approx(formula(*dropped))
    assert (got.steps, got.method, got.xi, done.about.relative) == (60, "path_integral", 0.01, True)
    if rule in ("sum", "max"):
        assert_same(got, given[0].merged(given[1], rule).merged(given[2], rule))


@pytest.mark.parametrize(("rule", "weights"), [("weighted", [0.25]), ("sum", []), ("max", [])])
def test_estimators_of_different_units_merge_once_they_are_normalized(tmp_path, rule, weights):
    first, second = importance(), importance(seed=1, scale=1e-4, method="fisher", xi=None, relative=False)
    got, _ = converted(tmp_path, [first, second], merge=rule, weights=weights, normalize=True)
    expected = first.normalized().merged(second.normalized(), rule, *weights)
    assert got.about == expected.about
    assert (got.method, got.xi, got.is_normalized) == ("path_integral+fisher", None, True)
    for name in expected:
        np.testing.assert_allclose(got[name].numpy(), expected[name].numpy(), rtol=5e-7)
        assert got.stats[name].path_integral_sum == expected.stats[name].path_integral_sum
    assert first.is_normalized is False


def test_merged_and_encoded_at_once(tmp_path):
    given = [importance(seed=seed) for seed in (1, 2)]
    got, done = converted(tmp_path, given, merge="sum", dtype="int4")
    whole = given[0].merged(given[1])
    assert_same(got, whole.astype("int4"))
    assert 0.01 < done.loss.rms < 0.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats(tmp_path, dtype):
    given = [Importance({"a.w": torch.rand(64, 128).to(dtype)}) for _ in range(2)]
    got, _ = converted(tmp_path, given, merge="sum")
    assert_same(got, given[0].merged(given[1]))
    assert got["a.w"].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)


# ---------------------------------------------------------------- files


def test_an_input_may_be_replaced(tmp_path):
    path = tmp_path / "i.safetensors"
    importance().save(path)
    done = run(path, "--dtype", "int4", "--out", path)
    assert done.exit_code == 2
    assert "exists; add --overwrite" in done.output
    assert run(path, "--dtype", "int4", "--out", path, "--overwrite").exit_code == 0
    assert_same(Importance.load(path), importance().astype("int4"))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_conversion_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "i.safetensors"
    importance().save(path)
    before = path.read_bytes()
    written = files.ImportanceWriter._put

    def full(writer, name, tensor):
        if name == "head.weight":
            raise OSError(28, "No space left on device", str(path))
        written(writer, name, tensor)

    monkeypatch.setattr(files.ImportanceWriter, "_put", full)
    done = run(path, "--dtype", "int4", "--out", path, "--overwrite")
    assert done.exit_code == 2
    assert "no space left on the device" in done.output
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_one_tensor_at_a_time(tmp_path):
    shapes = {f"layers.{i}.w": (400, 512) for i in range(6)}
    for number in range(2):
        whole = Importance({name: torch.rand(shape) for name, shape in shapes.items()})
        whole.save(tmp_path / f"{number}.safetensors")
    given = [Importance.load(tmp_path / f"{number}.safetensors") for number in range(2)]
    alive, done = [], []
    original = conversion._encoded

    def watched(entry, form):
        alive.append(sum(x.numel() for x in _living() if x.numel() >= 400 * 512))
        return original(entry, form)

    conversion._encoded = watched
    try:
        with Largest() as seen:
            convert(given, tmp_path / "out.safetensors", merge="sum", dtype="int8", tick=done.append)
    finally:
        conversion._encoded = original
    assert seen.elements <= 400 * 512
    assert max(alive) - alive[0] <= 2 * 400 * 512, "tensors pile up"
    assert sum(done) == 6 * 400 * 512


def _living():
    import gc

    return [x for x in gc.get_objects() if type(x) is torch.Tensor]


# ---------------------------------------------------------------- the command


def test_the_command_prints_what_was_written(tmp_path):
    importance().save(tmp_path / "a.safetensors")
    importance(seed=1).save(tmp_path / "b.safetensors")
    inputs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    options = ["--merge", "weighted", "--weight", "0.25", "--weight", "0.75", "--dtype", "int8", "--select", "*weight"]
    options += ["--rename", "model.=", "--out", tmp_path / "o.safetensors"]
    done = run(*inputs, *options, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    got = Importance.load(tmp_path / "o.safetensors")
    assert said["bytes"] == (tmp_path / "o.safetensors").stat().st_size
    assert said["inputs"] == [{"path": str(x), "bytes": x.stat().st_size, "tensors": 13} for x in inputs]
    assert said["forms"] == {"int8": 8, "fp32": 1}
    assert said["tensors"] == len(got) == 9
    assert (said["method"], said["steps"], said["normalized"]) == ("path_integral", 60, False)
    assert said["encoding"]["tensors"] == 8
    expected = [importance(seed=seed) for seed in (0, 1)]
    name = "layers.0.attn.q_proj.weight"
    whole = 0.25 * expected[0][f"model.{name}"] + 0.75 * expected[1][f"model.{name}"]
    assert (got[name] - whole).abs().max() < 0.02 * whole.max()
    table = run(*inputs, *options, "--overwrite").output
    assert f"{said['bytes']:,} bytes" in table
    assert "encoding 8 tensors: RMS error" in table


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "nothing would change"),
        (["--weight", "0.5"], "weight: it has no effect"),
        (["--merge", "sum"], "merge: 'sum' has no effect"),
        (["--rename", "no.=x"], "rename: no name begins with 'no.'"),
        (["--select", "q_proj"], "select: 'q_proj' matches no name"),
        (["--dtype", "fp32"], "dtype: 'fp32' has no effect"),
    ],
)
def test_refusals_have_exit_code_2_and_write_nothing(tmp_path, options, says):
    importance().save(tmp_path / "i.safetensors")
    done = run(tmp_path / "i.safetensors", *options, "--out", tmp_path / "o.safetensors")
    assert done.exit_code == 2
    assert f"alr-kernels convert: {says}" in done.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["i.safetensors"]


def test_why_tensors_stay_fp32(tmp_path):
    shapes = {"a": (64, 128), "b": (64, 127), "c": (10, 128), "d": (5000,), "e": (), "f": (8, 8)}
    Importance({name: torch.rand(shape) for name, shape in shapes.items()}).save(tmp_path / "i.safetensors")
    options = (tmp_path / "i.safetensors", "--out", tmp_path / "o.safetensors", "--overwrite", "--dtype")
    said = run(*options, "int4").output
    assert "5 of 6 tensors stay fp32: 1 with rows no multiple of 128, 2 under 4096 elements, 2 vectors or" in said
    assert "4 of 6 tensors stay fp32: 2 under 4096 elements, 2 vectors or scalars" in run(*options, "bf16").output
    reasons = json.loads(run(*options, "int8", "--json").output)["stay_fp32"]
    assert reasons == {"with rows no multiple of 128": 1, "under 4096 elements": 2, "vectors or scalars": 2}


def test_estimators_that_do_not_merge_are_told_the_flag(tmp_path):
    importance().save(tmp_path / "a.safetensors")
    importance(method="fisher", xi=None, relative=False).save(tmp_path / "b.safetensors")
    options = (
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "--merge",
        "sum",
        "--out",
        tmp_path / "o.safetensors",
    )
    done = run(*options)
    assert done.exit_code == 2
    assert "Add --normalize" in done.output
    assert ".merged(" not in done.output
    assert run(*options, "--normalize").exit_code == 0


def test_a_folder_that_is_not_there(tmp_path):
    importance().save(tmp_path / "i.safetensors")
    done = run(tmp_path / "i.safetensors", "--dtype", "int4", "--out", tmp_path / "no" / "o.safetensors")
    assert done.exit_code == 2
    assert "there is no folder" in done.output
