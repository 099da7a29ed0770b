"""How a model comes to its folder: whole, and nothing of an older one stays; test_ownership.py has what runs delete."""

from __future__ import annotations

from pathlib import Path

from alr_kernels.finetune.outcome import is_model, publish, stage_of


def test_the_configuration_comes_last_and_nothing_of_an_older_model_stays(tmp_path, monkeypatch):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"older")
    (tmp_path / "config.json").write_text("older")
    stage = stage_of(tmp_path)
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors", "model.safetensors", "z.json"):
        (stage / name).write_text("newer")
    moved = []
    rename = Path.replace

    def watched(path, target):
        assert moved or not is_model(tmp_path), "the older configuration would go with newer weights"
        moved.append(path.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    publish(tmp_path)
    assert set(moved[-2:]) == {"config.json", "adapter_config.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(moved)
    assert (tmp_path / "config.json").read_text() == "newer"
