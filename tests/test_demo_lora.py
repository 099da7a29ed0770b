"""`alr-kernels demo --lora` at its smallest: its arms, its rows, and the adapter that plain PEFT reads."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="the demo needs transformers")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
peft = pytest.importorskip("peft", reason="demo --lora needs peft")

ARMS = {
    "plain LoRA": 4, "general phase then LoRA": 4, "L2-SP": 3, "ALR coupled": 3, "ALR proximal": 3
}  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"
BYTES = torch.arange(64).view(2, 32) + 32


def run_demo(folder, *options):
    from alr_kernels.cli import app

    arguments = ["demo", "--lora", "--fast", "--out", str(folder), "--threads", "2", *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output, json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """Run it, and keep the logits of the model whose adapter is saved."""
    from alr_kernels.demo import study

    folder, save, logits = tmp_path_factory.mktemp("demo-lora"), study.save_adapter, []

    def saving(subject, weights, to):
        save(subject, weights, to)
        with torch.no_grad():
            logits.append(subject.model.eval()(input_ids=BYTES, use_cache=False).logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "save_adapter", saving)
        output, result = run_demo(folder)
    return folder, output, result, logits


def test_rows_are_consistent(fast):
    _, output, result, _ = fast
    families = [entry["family"] for entry in result["rows"]]
    assert {family: families.count(family) for family in dict.fromkeys(families)} == ARMS
    level = result["shared_level"]
    for entry, run in zip(result["rows"], result["runs"], strict=True):
        points = run["points"]["test"]
        assert entry["arm"] == run["label"]
        assert entry["arm"] in output
        assert entry["start"] == ("base model" if entry["family"] == "plain LoRA" else "general phase")
        assert entry["general_before"] == result["before"][entry["start"]]["general test"] == points[0][1]
        assert (entry["domain"], entry["general_after"]) == tuple(points[-1])
        assert entry["forgetting"] == pytest.approx(entry["general_after"] - entry["general_before"])
        reached = min(domain for domain, _ in points) <= level
        assert (entry["general_at_level"] is not None) == reached
        if reached:
            assert entry["forgetting_at_level"] == pytest.approx(entry["general_at_level"] - entry["general_before"])
        pulled = entry["family"] not in ("plain LoRA", "general phase then LoRA")
        assert (entry["extra_bytes"] > 0) == pulled
        assert math.isfinite(entry["domain"])
    chosen = [entry for entry in result["rows"] if entry["chosen"]]
    assert [entry["family"] for entry in chosen] == list(ARMS)
    assert {entry["family"]: entry["general_at_level"] for entry in chosen} == result["general_at_shared_level"]


def test_the_general_phase_moves_away_from_the_base_model(fast):
    """A fresh adapter is the base model itself: both starts are evaluated, and differ."""
    _, _, result, _ = fast
    base, general = result["before"]["base model"], result["before"]["general phase"]
    assert base.keys() == general.keys()
    assert base != general


def test_the_json_says_what_lora_was(fast):
    folder, output, result, _ = fast
    facts = result["lora"]
    assert result["space"] == "lora"
    assert (facts["r"], facts["alpha"]) == (8, 32)
    assert set(facts["targets"]) >= {"q_proj", "v_proj"}
    assert result["importance"]["artifact_bytes"] == (folder / "importance.safetensors").stat().st_size
    assert facts["model_bytes"] == 4 * result["parameters"]
    assert facts["artifact_share"] == result["importance"]["artifact_bytes"] / facts["model_bytes"]
    assert f"{result['trained_parameters']:,} trained parameters" in output
    assert all(len(values) == 2 * len(facts["targets"]) for values in result["coefficients"].values())
    assert all(abs(sum(values.values()) - 1) < 1e-9 for values in result["coefficients"].values())


def test_moves_are_those_of_runs_that_start_where_importance_was_recorded(fast):
    _, _, result, _ = fast
    chosen = result["selection"]["chosen"]
    assert set(result["movement"]) == {label for family, label in chosen.items() if family != "plain LoRA"}
    targets = 2 * (2 * 64 * 64 + 2 * 64 * 160)  # layers · (q_proj and v_proj, up_proj and down_proj)
    assert all(sum(moves["count"]) == targets for moves in result["movement"].values())
    assert {row["module"] for row in result["pull"]["modules"]} == {
        "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"
    }  # fmt: skip


def test_output_fits_the_width_and_names_the_files(fast):
    folder, output, _, _ = fast
    assert max(map(len, output.replace(str(folder), "").splitlines())) <= 110
    assert "Warning" not in output
    for name in ("importance.safetensors", "results.json", "report/index.html", "base", "adapter"):
        assert name in output
        assert (folder / name).exists()
    assert (folder / "report" / "forgetting.png").read_bytes().startswith(PNG)


def test_the_artifact_is_in_effective_space(fast):
    from alr_kernels import Importance

    folder, _, result, _ = fast
    importance = Importance.load(folder / "importance.safetensors")
    assert importance.method == "path_integral_tangent"
    assert importance["model.layers.0.self_attn.q_proj.weight"].shape == (64, 64)
    assert importance.steps == result["options"]["adapter"]["steps"]
    assert len(importance) == 2 * len(result["lora"]["targets"])


def test_plain_peft_loads_the_tuned_adapter(fast):
    import transformers

    from alr_kernels.demo import corpus, models
    from alr_kernels.demo.settings import Settings
    from alr_kernels.demo.study import evaluation_sets

    folder, _, result, logits = fast
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=BYTES, use_cache=False).logits, logits[0])
    (chosen,) = (row for row in result["rows"] if row["chosen"] and row["family"] == "ALR proximal")
    settings = Settings.of("llama", 0, lora=True, fast=True)
    found = models.evaluate(model, evaluation_sets(settings, *corpus.build(settings.corpus_bytes)))
    assert found["general test"] == pytest.approx(chosen["general_after"], abs=1e-6)
    assert found["domain test"] == pytest.approx(chosen["domain"], abs=1e-6)


@pytest.mark.slow
def test_gptj(tmp_path):
    _, result = run_demo(tmp_path, "--arch", "gptj")
    assert result["lora"]["targets"] == ["q_proj", "v_proj", "fc_in", "fc_out"]
    assert any(layer.startswith("transformer.h.0.mlp") for layer in result["coefficients"]["softmax"])


def test_missing_peft_is_named_only_for_lora(monkeypatch):
    from alr_kernels.cli import app

    command = sys.modules["alr_kernels.cli.demo"]
    monkeypatch.setattr(command, "LORA_NEEDS", ("no_such_peft",))
    result = CliRunner().invoke(app, ["demo", "--lora"])
    assert result.exit_code == 2
    assert result.output.strip() == 'The demo needs no_such_peft: pip install "alr-kernels[demo]"'
    monkeypatch.setattr(command, "NEEDS", ("no_such_package",))
    result = CliRunner().invoke(app, ["demo"])
    assert result.output.strip() == 'The demo needs no_such_package: pip install "alr-kernels[demo]"'
