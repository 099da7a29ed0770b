"""record, tune and run on two processes: the results of one, to rounding, under DDP and FSDP2, whole and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import finetune_cases as cases
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from safetensors.torch import load_file

from alr_kernels import Importance
from alr_kernels.finetune import phases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]

TESTS = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip
LORA = "r=4,targets=q_proj+v_proj+up_proj"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and texts, and what one process makes of them, with all weights and with LoRA."""
    folder = tmp_path_factory.mktemp("launched")
    cases.model_folder(folder / "llama", attention_dropout=0.0)
    cases.texts(folder)
    torch.set_num_threads(1)
    for name, more in (("full", {}), ("lora", {"lora": LORA})):
        phases.run(cases.settings("run", **given(folder), out=str(folder / name), batch=8, **more))
    return folder


def given(home):
    return {"model": str(home / "llama"), "data": str(home / "domain.jsonl"), "general": str(home / "general.jsonl")}


def launch(*command, more=None):
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    launcher = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *command], cwd=TESTS.parent, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": paths, **(more or {})},
    )  # fmt: skip


def result(process):
    said, wrong = process.communicate(timeout=300)
    assert process.returncode == 0, wrong[-4000:]
    return json.loads(said)


def same_to_rounding(found, out, home, kind, model=None):
    """Compare measurements, importance and weights with those of one process; ``model``: where that is, if alone."""
    whole = home / kind
    one = json.loads((whole / "results.json").read_text())
    for when in ("before", "after"):
        for text in ("domain", "general"):
            assert found[when][text]["tokens"] == one[when][text]["tokens"]
            assert found[when][text]["nll"] == pytest.approx(one[when][text]["nll"], abs=1e-5)
    if model is None:
        importance, expected = (Importance.load(folder / "importance.safetensors") for folder in (out, whole))
        assert list(importance) == list(expected)
        for name in expected:
            largest = float(expected[name].max())
            torch.testing.assert_close(importance[name], expected[name], rtol=2e-2, atol=1e-3 * largest)
    file = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    weights, others = (load_file(folder / file) for folder in (model or out / "tuned", whole / "tuned"))
    assert weights.keys() == others.keys()
    for name in others:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-3, atol=1e-5)
    config = "adapter_config.json" if kind == "lora" else "config.json"
    folders = model or out / "tuned", whole / "tuned"
    first, second = (json.loads((folder / config).read_text()) for folder in folders)
    assert in_order(first) == in_order(second)


def in_order(config):
    return {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}


def test_sharded(home, tmp_path):
    """FSDP2; the run with LoRA is interrupted in both phases, on one of the ranks, and ends as if it had not been."""
    kinds = {"full": ([], {}), "lora": ([["record", 4], ["tune", 2]], {"lora": LORA})}
    runs = [
        ["run", stops, {**given(home), "out": str(tmp_path / kind), "batch": 4, **more}]
        for kind, (stops, more) in kinds.items()
    ]
    process = launch(str(TESTS / "phases_script.py"), json.dumps(runs), more=FSDP2)
    for kind, found in zip(kinds, result(process), strict=True):
        same_to_rounding(found, tmp_path / kind, home, kind)
        assert found["cost"]["bytes"]["moments"] < 0.6 * 8 * found["model"]["trained_parameters"]


def test_the_command_under_ddp(home, tmp_path):
    """``torchrun -m alr_kernels``: rank 0 alone writes and prints."""
    flags = {**given(home), "out": tmp_path / "out", "device": "cpu", "lr": "3e-3", **cases.SHORT, "batch": 4}
    flags["importance"] = home / "full" / "importance.safetensors"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    found = result(launch("-m", "alr_kernels", "tune", *options, "--json"))
    same_to_rounding(found, tmp_path / "out", home, "full", model=tmp_path / "out")
