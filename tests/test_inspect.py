"""`alr-kernels inspect` and what is behind it: numbers against numpy, in every form, a piece at a time."""

from __future__ import annotations

import json
import math

import importance_files
import lora_models
import numpy as np
import pytest
import torch
from importance_files import FORMS, Largest, cut_into, importance, saved
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from alr_kernels import AlrAdamW, Importance, lora_pairs
from alr_kernels.cli import app
from alr_kernels.codecs.encoded import Encoded
from alr_kernels.importance import chunks
from alr_kernels.importance.chunks import loss, loss_of
from alr_kernels.importance.inspection import FEW, chosen, inspect, work

read = importance_files.plain_reader()


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture
def file(tmp_path):
    return saved(tmp_path / "i.safetensors")[0]


# ---------------------------------------------------------------- the specification's own reader


@pytest.mark.parametrize("form", FORMS)
def test_the_reader_of_the_specification_agrees_with_ours(tmp_path, form):
    path, kept = saved(tmp_path / "i.safetensors", form)
    omega, statistics, histograms, about = read(path)
    loaded = Importance.load(path)
    assert list(omega) == list(loaded) == list(kept)
    for row, counts, (name, values) in zip(statistics, histograms, omega.items(), strict=True):
        assert values.shape == loaded[name].shape
        np.testing.assert_allclose(values, loaded[name].float().numpy(), rtol=3e-7)
        assert row.tolist() == kept.stats[name].row()
        assert tuple(counts) == kept.stats[name].histogram
    assert about["fingerprint"] == kept.fingerprint
    assert about["format_version"] == ("3" if form == "rank1" else "2")


# ---------------------------------------------------------------- pieces


@pytest.mark.parametrize("form", [*FORMS, "fp16", "fp64"])
@pytest.mark.parametrize("elements", [1, 100, 1000, 2**20])
def test_pieces_are_the_whole(form, elements):
    for name, omega in importance_files.tensors().items():
        entry = Encoded.dense(omega.to(getattr(torch, {"fp16": "float16", "fp64": "float64"}.get(form, "float32"))))
        if form in FORMS:
            entry = Importance({name: omega}).astype(form).encoded(name)
        parts = list(chunks.chunks(entry, elements=elements))
        assert all(part.numel() <= max(elements, part.shape[-1]) for part in parts)
        assert torch.equal(torch.cat(parts).reshape(entry.shape), entry.decoded()), (name, form)


def test_odd_shapes_have_pieces():
    """Nothing of ours writes codes of a vector, but a file may have them."""
    codes = Encoded(torch.arange(256).to(torch.uint8), torch.ones(2).bfloat16(), "int8")
    assert torch.equal(torch.cat(list(chunks.chunks(codes, elements=100))).flatten(), codes.decoded())
    for shape in ((0,), (0, 128), (3, 0)):
        assert sum(part.numel() for part in chunks.chunks(Encoded.dense(torch.empty(shape)))) == 0
    strided = torch.rand(5, 7).t()
    assert torch.equal(torch.cat(list(chunks.chunks(Encoded.dense(strided), elements=11))), strided)


# ---------------------------------------------------------------- numbers


def oracle(values, alphas):
    """Return {layer: (mass, mean, max, l2)} and shares of α·Ω, in numpy."""
    layers = {}
    for name, omega in values.items():
        parts = name.split(".")
        digit = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        layer = ".".join(parts[: digit + 1]) if digit is not None else ".".join(parts[:-1]) or "(root)"
        layers.setdefault(layer, []).append(omega.astype(np.float64).ravel())
    layers = {layer: np.concatenate(parts) for layer, parts in layers.items()}
    norms = {layer: np.sqrt((omega**2).sum()) for layer, omega in layers.items()}
    weights = alphas(norms)
    whole = sum(weights[layer] * omega.sum() for layer, omega in layers.items())
    return {
        layer: (
            weights[layer],
            omega.sum(),
            omega.mean(),
            omega.max(),
            norms[layer],
            weights[layer] * omega.sum() / whole,
        )
        for layer, omega in layers.items()
    }


def softmax(norms, temperature=None):
    powers = {layer: np.exp(norm / (temperature or np.mean(list(norms.values())))) for layer, norm in norms.items()}
    return {layer: power / sum(powers.values()) for layer, power in powers.items()}


RULES = {
    "softmax": ({}, softmax),
    "hot": ({"temperature": 1e4}, lambda norms: softmax(norms, 1e4)),
    "proportional": ({"coeffs": "proportional"}, lambda norms: {k: v / sum(norms.values()) for k, v in norms.items()}),
    "uniform": ({"coeffs": "uniform"}, lambda norms: dict.fromkeys(norms, 1 / len(norms))),
}


@pytest.mark.parametrize("rule", RULES)
def test_layers_against_numpy(file, rule):
    options, alphas = RULES[rule]
    found = inspect(file, encodings="none", **options)
    expected = oracle(read(file)[0], alphas)
    assert [row.name for row in found.layers] == list(expected)
    for row in found.layers:
        got = (row.alpha, row.mass, row.stats.mean, row.stats.max, row.stats.l2, row.share)
        assert got == pytest.approx(expected[row.name], rel=1e-6), row.name
    assert sum(row.share for row in found.tensors) == pytest.approx(1.0)
    assert found.total.share == pytest.approx(1.0)
    assert found.total.stats.numel == sum(omega.size for omega in read(file)[0].values())
    assert found.total.nbytes == sum(row.nbytes for row in found.tensors)


def test_negative_share_is_of_the_absolute_sum(tmp_path):
    """ω of (3, −1): signed 2, dropped 1, so a quarter of Σ|ω| = 4."""
    whole = Importance({"a.w": torch.rand(4), "b.w": torch.rand(4)})
    stats = {"a.w": whole.stats["a.w"]._replace(path_integral_sum=2.0, negative_mass=1.0)}
    Importance(dict(whole), stats=stats).save(tmp_path / "i.safetensors")
    first, second = inspect(tmp_path / "i.safetensors").tensors
    assert first.negative_share == 0.25
    assert second.negative_share is None


def test_by_module_and_the_place_of_a_tensor(file):
    found = inspect(file, by="module", encodings="none")
    assert "model.layers.0.attn.q_proj" in {row.name for row in found.layers}
    places = {row.name: (row.layer, row.block, row.module) for row in found.tensors}
    assert places["model.layers.2.mlp.up.weight"] == ("model.layers.2.mlp.up", "model.layers.2", "mlp.up")
    row = next(row for row in found.as_dict()["modules"] if row["name"] == "model.layers.2.mlp.up.weight")
    assert (row["layer"], row["module"]) == ("model.layers.2", "mlp.up")
    assert "module" not in found.as_dict()["layers"][0]


def test_a_recording_of_lora_is_weighed_by_module(tmp_path):
    model = lora_models.adapted(lora_models.llama(), ["q_proj", "v_proj"])
    optimizer = AlrAdamW(model.named_parameters(), lora=lora_pairs(model), lr=1e-3, record=True)
    tokens = torch.randint(32, (4, 8))
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    optimizer.recorded_importance(allow_nonfinite=False).save(tmp_path / "lora.safetensors")
    found = inspect(tmp_path / "lora.safetensors")
    assert found.coefficients.by == "module"
    assert found.header["method"].startswith("path_integral_")
    assert len(found.layers) == len(found.tensors) == 4
    assert inspect(tmp_path / "lora.safetensors", by="block").coefficients.by == "block"


def test_importance_that_is_zero_has_no_coefficients(tmp_path):
    Importance({"layers.0.w": torch.zeros(64, 128)}).save(tmp_path / "i.safetensors")
    done = run(tmp_path / "i.safetensors", "--json")
    said = json.loads(done.output)
    assert done.exit_code == 0
    assert said["coefficients"] is said["total"]["alpha"] is said["total"]["share"] is None
    assert said["total"]["encodings"]["int4"]["rms"] == 0.0
    assert "no layer can be weighed" in run(tmp_path / "i.safetensors").output


# ---------------------------------------------------------------- encodings


@pytest.mark.parametrize("form", ["int8", "int4", "rank1"])
@pytest.mark.parametrize("elements", [500, 2**20])
def test_errors_of_encodings_against_numpy(tmp_path, file, form, elements, monkeypatch):
    importance().astype(form).save(tmp_path / "encoded.safetensors")
    original, kept = read(file)[0], read(tmp_path / "encoded.safetensors")[0]
    with cut_into(monkeypatch, chunks, elements=elements):
        found = inspect(file, encodings=form)
    taken = [row for row in found.tensors if row.losses]
    assert {row.name for row in taken} == {
        name for name in original if Importance.load(tmp_path / "encoded.safetensors").encoded(name).format == form
    }
    apart = {name: np.abs(original[name].astype(np.float64) - kept[name]) for name in original}
    for row in taken:
        lost, name = row.losses[form], row.name
        norm = np.linalg.norm(original[name].astype(np.float64))
        assert lost.rms == pytest.approx(np.linalg.norm(apart[name]) / norm, rel=1e-4)
        assert lost.worst == pytest.approx(apart[name].max() / original[name].max(), rel=1e-4)
        assert lost.name == name
        assert apart[name][lost.at] == pytest.approx(apart[name].max(), rel=1e-4)
        assert (lost.original, lost.decoded) == pytest.approx((original[name][lost.at], kept[name][lost.at]), rel=1e-6)
        assert lost.nbytes == Importance.load(tmp_path / "encoded.safetensors").encoded(name).nbytes
    names = [row.name for row in taken]
    squares = [sum((values[n].astype(np.float64) ** 2).sum() for n in names) for values in (apart, original)]
    assert found.total.losses[form].rms == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-4)
    worst = max(names, key=lambda n: apart[n].max() / original[n].max())
    assert found.total.losses[form].name == worst


def test_what_would_be_lost_is_what_is_lost():
    entry = Encoded.dense(torch.rand(64, 256) ** 4)
    for form in ("int8", "int4", "rank1"):
        kept = Importance({"w": entry.values}).astype(form).encoded("w")
        assert loss_of("w", entry, form) == loss("w", entry, kept)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_against_the_originals_statistics(tmp_path, form):
    path, _ = saved(tmp_path / "i.safetensors", form)
    found = inspect(path, encodings="kept")
    omega, statistics, *_ = read(path)
    wide = [values.astype(np.float64) for values in omega.values()]
    drift = found.total.drift.against(found.total.stats)
    mass = sum(x.sum() for x in wide) / (statistics[:, 4] * statistics[:, 5]).sum()
    norm = math.sqrt(sum((x**2).sum() for x in wide) / (statistics[:, 2] ** 2).sum())
    top = max(x.max() for x in wide) / statistics[:, 3].max()
    assert list(drift.values()) == pytest.approx([mass - 1, norm - 1, top - 1], abs=2e-7)
    if form == "rank1":
        assert norm < 0.9
    if form == "fp32":
        assert max(map(abs, drift.values())) < 1e-7


def test_an_encoded_file_has_no_more_to_lose(tmp_path):
    path, kept = saved(tmp_path / "i.safetensors", "int4")
    assert chosen(kept, "auto") == chosen(kept, "all") == ("rank1", "kept")  # head.weight has odd rows, and stays fp32
    assert set(inspect(path).total.losses) == {"rank1"}


def test_large_files_are_not_read_unasked(tmp_path, monkeypatch):
    path, _ = saved(tmp_path / "i.safetensors")
    monkeypatch.setattr("alr_kernels.importance.inspection.FEW", 1000)
    found = inspect(path)
    assert found.encodings == ()
    assert found.total.drift is None
    assert "values were not read" in found.left_out
    assert "values were not read" in run(path).output
    assert inspect(path, encodings="all").total.losses
    assert FEW == 2**28


def test_ticks_add_up_to_the_work(file):
    done = []
    for encodings in ("all", "none", "int4,kept"):
        done.clear()
        inspect(file, encodings=encodings, tick=done.append)
        loaded = Importance.load(file)
        assert sum(done) == work(loaded, chosen(loaded, encodings))


def test_no_tensor_is_ever_whole_in_memory(tmp_path):
    shape = (3000, 1024)
    for form in FORMS:
        Importance({"layers.0.w": torch.rand(shape)}).astype(form).save(tmp_path / f"{form}.safetensors")
    for form in FORMS:
        with Largest() as seen:
            inspect(tmp_path / f"{form}.safetensors", encodings="all")
        assert seen.elements <= chunks.ELEMENTS, form
    with Largest() as seen:
        inspect(tmp_path / "int4.safetensors", encodings="none")
    assert seen.elements < 1000


# ---------------------------------------------------------------- files that are not as they should be


def damaged(path, name, value):
    with importance_files.contextlib.suppress(FileNotFoundError):
        metadata = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])[
            "__metadata__"
        ]
    held = {key: tensor.clone() for key, tensor in load_file(path).items()}
    held[name].view(-1)[3] = value
    save_file(held, path, metadata)


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_values_that_no_file_has_are_a_problem(file, value):
    damaged(file, "model.embed.weight", value)
    found = inspect(file)
    assert found.problems == ["model.embed.weight: 1 of 8,960 values are negative or not finite"]
    done = run(file)
    assert done.exit_code == 1
    assert "PROBLEM: model.embed.weight" in done.output
    assert json.loads(run(file, "--json").output)["problems"] == found.problems
    assert run(file, "--encodings", "none").exit_code == 0, "it was not looked at"


def test_statistics_of_something_else_are_a_problem(file):
    damaged(file, ":histogram", 10**6)
    assert "its statistics are of" in inspect(file, encodings="none").problems[0]


# ---------------------------------------------------------------- the command


def test_the_command_prints_what_python_returns(file):
    done = run(file, "--coeffs", "proportional", "--by", "module", "--encodings", "int8,kept", "--json")
    assert done.exit_code == 0, done.output
    expected = inspect(file, coeffs="proportional", by="module", encodings="int8,kept").as_dict()
    assert json.loads(done.output) == json.loads(json.dumps(expected))


@pytest.mark.parametrize("form", FORMS)
def test_the_table_has_every_layer_and_the_largest_tensors(tmp_path, form):
    path, kept = saved(tmp_path / "i.safetensors", form)
    done = run(path, "--top", 2)
    assert done.exit_code == 0, done.output
    layers = {line.split()[0]: line for line in done.output.splitlines() if line.strip()}
    assert {row.name for row in inspect(path).layers} <= set(layers)
    order = sorted(inspect(path).tensors, key=lambda row: -row.share)
    assert order[1].name in layers
    assert order[2].name not in layers
    assert f"format version {3 if form == 'rank1' else 2}" in done.output
    assert kept.fingerprint in done.output
    headed = any("lost" in line and "change" in line for line in done.output.splitlines()[:7])
    assert headed == (form != "fp32"), "what is kept is told where it is not the original"
    assert "…" not in done.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--temperature", "0"], "temperature: expected a number"),
        (["--temperature", "2", "--coeffs", "uniform"], "temperature: it has no effect"),
        (["--encodings", "int3"], "encodings: expected auto"),
        (["--top", "3", "--json"], "top: it has no effect"),
        (["--plot", "i.svg"], "plot: expected a name ending in .png"),
    ],
)
def test_refusals_have_exit_code_2(file, options, says):
    done = run(file, *options)
    assert done.exit_code == 2
    assert f"alr-kernels inspect: {says}" in done.output
    assert "Traceback" not in done.output


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "noise.safetensors").write_bytes(b"\1" * 500)
    for path in (tmp_path / "noise.safetensors", tmp_path / "nowhere.safetensors"):
        done = run(path)
        assert done.exit_code == 2
        assert path.name in done.output
