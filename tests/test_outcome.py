"""Where a run puts its files: what it may take away before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from alr_kernels.finetune.outcome import OF_RUN, OF_TUNE, Place, is_model, publish, stage_of


@pytest.mark.parametrize("owned", [OF_TUNE, OF_RUN])
@pytest.mark.parametrize("name", ["report/thesis.txt", "checkpoints/mine.pt", "tensorboard/a/b", "metrics.jsonl"])
def test_what_no_run_left_is_not_deleted_unasked(tmp_path, name, owned):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name.partition('/')[0]} is there already"):
        Place.of_folder(tmp_path, owned).begin("owner/name", resume=False, overwrite=False)
    assert (tmp_path / name).read_text() == "mine"
    Place.of_folder(tmp_path, owned).begin("owner/name", resume=False, overwrite=True)
    assert not (tmp_path / name).exists()


def test_an_importance_that_lies_in_the_folder_of_a_run_stays(tmp_path):
    (tmp_path / "importance.safetensors").write_bytes(b"recorded for hours")
    with pytest.raises(FileExistsError, match=r"importance\.safetensors is there already"):
        Place.of_folder(tmp_path, OF_RUN).begin("owner/name", resume=False, overwrite=False)
    Place.of_folder(tmp_path, OF_TUNE).begin("owner/name", resume=False, overwrite=False)
    assert (tmp_path / "importance.safetensors").read_bytes() == b"recorded for hours"


def test_what_is_beside_an_importance_file_stays(tmp_path):
    (tmp_path / "i.work").mkdir()
    (tmp_path / "i.work" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match=r"i\.work is there already"):
        Place.of_file(tmp_path / "i.safetensors").begin("owner/name", resume=False, overwrite=False)


def test_an_empty_folder_or_one_of_a_run_killed_as_it_began_is_no_obstacle(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".begun.yaml.123").write_text("alr")
    (tmp_path / "report").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    place = Place.of_folder(tmp_path, OF_TUNE)
    assert place.begin("owner/name", resume=False, overwrite=False) is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "notes.txt"]
    assert not list(place.work.iterdir())


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
