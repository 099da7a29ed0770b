"""Trainer killed while it writes a checkpoint: the half one is passed over, and the run ends as if undisturbed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from test_trainers_transformers import rows, tiny_llama, trainer_of  # noqa: E402

from alr_kernels.integrations.transformers import last_checkpoint  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")]
OPTIONS = {"lr": 3e-3, "weight_decay": 0.1, "record": True}
STEPS = {"save_strategy": "steps", "save_steps": 2}


def train(folder, resume=None, seed=0):
    trainer = trainer_of(tiny_llama(seed), rows(json.__doc__ * 4), folder, dict(OPTIONS), callback={}, **STEPS)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def killed_in_the_second_checkpoint(folder):
    """Run by a process of its own, which ends itself between the optimizer's state and Trainer's."""
    import os

    save, calls = transformers.Trainer._save_rng_state, []

    def last_words(self, path):
        calls.append(path)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, path)

    transformers.Trainer._save_rng_state = last_words
    train(Path(folder))


def test_half_a_checkpoint_is_passed_over(tmp_path):
    code = f"import test_trainers_killed as t; t.killed_in_the_second_checkpoint({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert (tmp_path / "checkpoint-4" / "optimizer.pt").exists(), "it was killed elsewhere: this tests nothing"
    assert transformers.trainer_utils.get_last_checkpoint(str(tmp_path)).endswith("checkpoint-4")
    found = last_checkpoint(tmp_path)
    assert found == str(tmp_path / "checkpoint-2")
    resumed, whole = train(tmp_path, found, seed=1), train(tmp_path / "undisturbed")
    for param, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(param, other)
    recorded = [trainer.optimizer.optimizer.recorded_importance(xi=1e-3) for trainer in (resumed, whole)]
    assert all(torch.equal(recorded[0][name], recorded[1][name]) for name in recorded[1])
    assert int(Path(last_checkpoint(tmp_path)).name.split("-")[1]) > 4
