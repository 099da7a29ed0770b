"""Flags over a configuration over defaults: what wins, what follows from what, and in which types."""

from __future__ import annotations

from dataclasses import MISSING
from pathlib import Path

import pytest
from refusals_finetune import of

from alr_kernels.finetune.lora_spec import LoraSpec
from alr_kernels.finetune.options import (
    PANELS,
    PARTS,
    DataOptions,
    ModelOptions,
    OptimizerOptions,
    PullOptions,
    RecordOptions,
    RunOptions,
    TrainOptions,
    fields_of,
)
from alr_kernels.finetune.settings import resolve

RUN = {"model": "m", "data": "d.txt", "out": "o", "general": "g.txt"}


def from_file(tmp_path, text, **flags):
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    return resolve("run", {**RUN, **flags}, path)


def test_a_flag_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    settings = from_file(tmp_path, "batch: 3\nlr: 1e-3\nlambda: 2\nmax-length: 77\n", lr=5e-4)
    train, pull = settings.of(TrainOptions), settings.of(PullOptions)
    assert (train.batch, train.lr, pull.reg_lambda, train.accumulate) == (3, 5e-4, 2.0, 1)
    assert settings.as_dict()["max_length"] == 77
    assert settings.explicit == {*RUN, "batch", "lr", "reg_lambda", "max_length"}


def test_a_flag_replaces_the_files_other_measure_of_length(tmp_path):
    assert from_file(tmp_path, "steps: 7\n", epochs=2.0).of(TrainOptions).steps is None
    settings = from_file(tmp_path, "epochs: 2\nrecord_steps: 4\n", steps=7, record_epochs=3.0)
    assert settings.of(TrainOptions).steps == 7
    assert (settings.of(RunOptions).record_steps, settings.of(RunOptions).record_epochs) == (None, 3.0)


def test_a_flag_may_put_aside_what_the_file_says(tmp_path):
    settings = from_file(tmp_path, "temperature: 2\ncolumns: text=a\n", coeffs="uniform")
    assert settings.of(PullOptions).temperature == "2"


def test_values_of_yaml_come_in_the_options_types(tmp_path):
    text = "lr: 2e-5\nepochs: 3\nbetas: [0.8, 0.9]\ntemperature: 1.5\npacking: yes\nlora: default\nrelative: false\n"
    settings = from_file(tmp_path, text)
    values = settings.as_dict()
    assert values["lr"] == 2e-5
    assert type(values["epochs"]) is float
    assert settings.betas == (0.8, 0.9)
    assert values["temperature"] == "1.5"
    assert (values["packing"], settings.of(RecordOptions).relative) == (True, False)
    assert settings.lora == LoraSpec(8, 16.0)


def test_null_is_the_default_of_what_may_be_left_out(tmp_path):
    assert from_file(tmp_path, "max_rows: null\nlora: ~\n").of(DataOptions).max_rows is None


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_file(tmp_path, "chat_template: ~/run.yaml\n").of(ModelOptions).chat_template == f"{tmp_path}/run.yaml"


@pytest.mark.parametrize(
    ("flags", "lr", "reg_lambda", "layers_by"),
    [({}, 2e-5, 0.1, "block"), ({"lora": "default"}, 2e-4, 0.002, "module"), ({"lr": 1e-3}, 1e-3, 0.1, "block")],
)
def test_defaults_follow_from_what_is_trained(flags, lr, reg_lambda, layers_by):
    settings = of("run", **flags)
    train, pull, run = settings.of(TrainOptions), settings.of(PullOptions), settings.of(RunOptions)
    assert (train.lr, pull.reg_lambda, pull.layers_by, run.record_lr) == (lr, reg_lambda, layers_by, lr)
    assert (train.eval_batch, run.record_steps, run.record_epochs) == (8, None, 1.0)


def test_an_adapters_folder_is_trained_as_lora(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    settings = of("run", model=str(tmp_path), quantize="int8")
    assert settings.in_lora_space
    assert settings.lora is None
    assert settings.of(TrainOptions).lr == 2e-4


def test_no_clipping_is_zero_or_nothing():
    assert of("tune", max_grad_norm=0.0).of(OptimizerOptions).max_grad_norm is None
    assert of("tune").of(OptimizerOptions).max_grad_norm == 1.0


def test_zero_is_no_default():
    assert of("tune", reg_lambda=0.0).of(PullOptions).reg_lambda == 0.0
    assert of("tune", reg_lambda=0.0, seed=0).explicit >= {"seed", "reg_lambda"}


def test_held_out_rows_of_general_may_go_with_other_data_of_the_domain():
    """--held-out then says how much of --general is held out."""
    assert of("run", held_out=0.3, held_out_data="h.txt").of(DataOptions).held_out == 0.3


def test_no_importance_is_needed_without_a_pull():
    assert of("tune", reg_lambda=0.0).as_dict()["importance"] is None


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("default", LoraSpec(8, 16.0, None, 0.0, False)),
        ("r=4", LoraSpec(4, 8.0)),
        ("alpha=3", LoraSpec(8, 3.0)),
        (
            " r = 2 , alpha=32,targets=q_proj+v_proj,dropout=0.1,rslora=TRUE",
            LoraSpec(2, 32.0, ("q_proj", "v_proj"), 0.1, True),
        ),
    ],
)
def test_lora_texts(text, spec):
    assert LoraSpec.parse(text) == spec


@pytest.mark.parametrize("verb", PARTS)
def test_options_are_stated_once_and_said(verb):
    names = [entry.name for _, entry in fields_of(verb)]
    assert len(names) == len(set(names))
    for part, entry in fields_of(verb):
        assert part in PANELS
        assert entry.metadata["help"].endswith((".", ")"))
        if entry.metadata["choices"] and entry.default is not None:
            assert entry.default in entry.metadata["choices"]
        if entry.default is MISSING:
            assert entry.metadata["first"]


@pytest.mark.parametrize("verb", PARTS)
def test_every_option_is_checked_in_its_type(verb, tmp_path):
    """A mapping fits none; the message has the line."""
    for _, entry in fields_of(verb):
        path = Path(tmp_path) / "a.yaml"
        path.write_text(f"{entry.name}: {{a: 1}}\n")
        with pytest.raises((TypeError, ValueError), match=f"a.yaml, line 1: {entry.name}: expected"):
            resolve(verb, {}, path)
