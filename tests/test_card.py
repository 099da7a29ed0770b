"""Run cards: what is in them, that they repeat a run, and that none is ever half written."""

from __future__ import annotations

import errno
import math
import os
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
import yaml
from refusals_finetune import of

from alr_kernels._plain import plain
from alr_kernels.finetune import card, config_file
from alr_kernels.finetune.lora_spec import LoraSpec
from alr_kernels.finetune.options import PARTS
from alr_kernels.finetune.settings import resolve

FACTS = {"data": {"source": "d.txt", "fingerprint": "a" * 64}}


@pytest.mark.parametrize("verb", PARTS)
def test_a_card_as_configuration_repeats_the_run(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    settings = of(verb, steps=7, seed=3, lora="r=2", out="o.safetensors")
    card.write("run.yaml", settings)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = resolve(verb, {"out": "p.safetensors"}, tmp_path / "run.yaml")
    expected = settings.as_dict() | {"out": "p.safetensors", "model": str(tmp_path / "m")}
    assert again.as_dict() == expected
    assert again.explicit == settings.explicit
    hub = yaml.safe_load((tmp_path / "run.yaml").read_text())["options"]["data"]
    assert hub == "d.txt"  # nothing of that name is here: perhaps a hub id


def test_what_a_card_says(tmp_path):
    path = card.write(
        tmp_path / "deep" / "run.yaml", of("tune", lr=1e-3), data=FACTS, importance={"fingerprint": "1"},
        metrics={"after": {"nll": np.float32(1.5), "perplexity": math.inf}}, model={"dtype": torch.bfloat16},
        started=datetime(2026, 1, 2, tzinfo=timezone.utc), seconds={"tune": 1.25},
    )  # fmt: skip
    said = yaml.safe_load(path.read_text("utf-8"))
    assert list(said)[:3] == ["alr_kernels_card", "verb", "started"]
    assert (said["alr_kernels_card"], said["verb"], said["started"]) == (1, "tune", "2026-01-02T00:00:00+00:00")
    assert said["metrics"] == {"after": {"nll": 1.5, "perplexity": None}}
    assert (said["seconds"], said["model"], said["data"]) == ({"tune": 1.25}, {"dtype": "torch.bfloat16"}, FACTS)
    assert said["options"]["lr"] == 1e-3
    assert set(said["given"]) == {"model", "data", "lr", "reg_lambda"}
    assert "out" not in said["options"]
    assert said["files"]["out"] == os.path.abspath("o")
    assert said["versions"]["torch"] == torch.__version__
    assert said["machine"]["cores"]
    assert config_file.read_card(path) == said
    assert path.stat().st_mode & 0o777 == 0o666 & ~_mask()


def _mask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_defaults_of_a_card_conflict_with_nothing(tmp_path):
    """A card lists all options; only those that were given are held against others."""
    path = card.write(tmp_path / "run.yaml", of("run"))
    assert resolve("run", {"out": "p", "coeffs": "uniform"}, path).explicit == {
        *("model", "data", "general", "out", "coeffs"),
    }
    assert resolve("run", {"out": "p", "steps": 3}, path).as_dict()["steps"] == 3


@pytest.mark.parametrize(
    ("given", "flags", "expected"),
    [
        ({"steps": 7}, {"steps": 3}, {"record_steps": 3}),
        ({"steps": 7}, {"epochs": 2.0}, {"record_steps": None, "record_epochs": 2.0}),
        ({"steps": 7, "record_steps": 5}, {"steps": 3}, {"record_steps": 5}),
        ({"lr": 1e-3}, {"lr": 1e-4}, {"record_lr": 1e-4}),
        ({"lr": 1e-3, "record_lr": 1e-2}, {"lr": 1e-4}, {"record_lr": 1e-2}),
        ({"batch": 2}, {"batch": 4}, {"eval_batch": 4}),
        ({}, {"lora": "r=2"}, {"lr": 2e-4, "record_lr": 2e-4, "reg_lambda": 0.002, "layers_by": "module"}),
        ({"lr": 1e-3, "reg_lambda": 0.3}, {"lora": "r=2"}, {"lr": 1e-3, "record_lr": 1e-3, "reg_lambda": 0.3}),
        ({"steps": 7, "batch": 2}, {"seed": 3}, {"record_steps": 7, "eval_batch": 2}),
    ],
)
def test_what_followed_from_an_option_follows_from_a_flag_over_the_card(tmp_path, given, flags, expected):
    path = card.write(tmp_path / "run.yaml", of("run", **given))
    found = resolve("run", {"out": "p", **flags}, path).as_dict()
    assert {name: found[name] for name in expected} == expected


def test_data_that_changed_is_told_unless_it_is_given_anew(tmp_path):
    path = card.write(tmp_path / "run.yaml", of("tune"), data=FACTS, importance={"fingerprint": "1"})
    then, now = {"fingerprint": "a" * 64, "source": "d"}, {"fingerprint": "b" * 64, "source": "d"}
    again = resolve("tune", {"out": "p"}, path)
    again.same_data("data", then)
    again.same_data("general", now)  # the card knows none
    with pytest.raises(ValueError, match="--data: d is not what it was"):
        again.same_data("data", now)
    for flags in ({"data": "e.txt"}, {"columns": "text=a"}, {"max_rows": 9}):
        resolve("tune", {"out": "p", **flags}, path).same_data("data", now)
    with pytest.raises(ValueError, match="--data: d is not"):
        resolve("tune", {"out": "p", "seed": 3}, path).same_data("data", now)
    of("tune").same_data("data", now)
    again.same_importance("1")


def test_a_run_goes_on_with_the_same_options_only(tmp_path):
    path = card.write(tmp_path / "begun.yaml", of("tune", steps=9, batch=2))
    card.same_run(path, of("tune", steps=9, batch=2, log_every=1, keep=5, save_every=2, workers=1, out="p"))
    with pytest.raises(ValueError, match=r"--steps was 9, now 10; --batch was 2, now 3|--batch was 2.*--steps was 9"):
        card.same_run(path, of("tune", steps=10, batch=3))


def test_a_full_disk_leaves_the_card_that_was_there(tmp_path, monkeypatch):
    path = card.write(tmp_path / "run.yaml", of("tune"))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        card.write(path, of("tune", lr=1.0))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.yaml"]


def test_plain_values():
    spec = LoraSpec(2, 4.0, ("a",))
    value = {
        1: (np.int64(2), np.bool_(True), torch.tensor([1.0, math.nan])),
        "set": {"b", "a"}, "spec": spec, "none": None, "true": True, "text": np.str_("x"), "big": -math.inf,
    }  # fmt: skip
    found = plain(value)
    assert found == {
        "1": [2, True, [1.0, None]], "set": ["a", "b"], "none": None, "true": True, "text": "x", "big": None,
        "spec": {"r": 2, "alpha": 4.0, "targets": ["a"], "dropout": 0.0, "rslora": False},
    }  # fmt: skip
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert [type(entry) for entry in found["1"][:2]] == [int, bool]
