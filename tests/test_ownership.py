"""What no run left stays, whatever a run is asked to do; a run that came to nothing leaves nothing."""

from __future__ import annotations

from pathlib import Path

import finetune_cases as cases
import pytest
import report_cases

from alr_kernels.finetune import phases
from alr_kernels.finetune.outcome import OF_TUNE, Place
from alr_kernels.finetune.ownership import alone, clear, clear_work
from alr_kernels.report import page, run_page

MINE = (
    *("notes.txt", "checkpoints/mine.txt", "checkpoints/checkpoint-best/weights", "report/thesis.tex"),
    *("tensorboard/events.mine", "model-backup.safetensors", "plain/mine.gguf"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    cases.model_folder(folder / "llama")
    cases.texts(folder)
    return folder


def tune(home, out, how=None, **options):
    given = {"model": str(home / "llama"), "data": str(home / "domain.jsonl"), "out": str(out), "reg_lambda": 0.0}
    return phases.tune(cases.settings("tune", **given | options), **how or {})


def record(home, out, how=None, **options):
    given = {"model": str(home / "llama"), "data": str(home / "general.jsonl"), "out": str(out)}
    return phases.record(cases.settings("record", **given | options), **how or {})


def put(folder, names=MINE):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")


def still(folder, names=MINE):
    return all((folder / name).read_text() == f"mine: {name}" for name in names)


def test_what_is_put_beside_a_result_outlives_the_next_run(home, tmp_path):
    out = tmp_path / "t"
    tune(home, out, keep_checkpoints=True)
    before = set(out.glob("checkpoints/checkpoint-*"))
    put(out)
    tune(home, out, how={"overwrite": True})
    assert still(out)
    assert before
    assert not any(path.exists() for path in before)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["checkpoints/mine.txt", "report/index.html", "metrics.jsonl", "vocab.txt"])
def test_a_folder_of_the_users_is_refused_untouched(name, overwrite, home, tmp_path):
    put(tmp_path, [name])
    with pytest.raises(FileExistsError, match=f"'{name.partition('/')[0]}' there, which no run left"):
        tune(home, tmp_path, how={"overwrite": overwrite})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert still(tmp_path, [name])


def test_a_card_of_something_else_makes_no_folder_ours(home, tmp_path):
    put(tmp_path, ["run.yaml", "checkpoints/mine.txt"])
    with pytest.raises(FileExistsError, match=r"'checkpoints', 'run\.yaml' there"):
        tune(home, tmp_path, how={"overwrite": True})
    assert still(tmp_path, ["run.yaml", "checkpoints/mine.txt"])


def test_a_linked_folder_is_not_followed(home, tmp_path):
    put(tmp_path / "elsewhere", ["tokenizer.json"])
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="'checkpoints'"):
        tune(home, tmp_path / "t", how={"overwrite": True})
    assert still(tmp_path / "elsewhere", ["tokenizer.json"])


def test_a_model_is_saved_over_only_where_the_same_recording_left_it(home, tmp_path):
    out, saved = tmp_path / "i.safetensors", tmp_path / "saved"
    record(home, out, save_model=str(saved))
    record(home, out, save_model=str(saved), how={"overwrite": True})
    with pytest.raises(FileExistsError, match=r"--save-model .*'config\.json'"):
        record(home, tmp_path / "other.safetensors", save_model=str(saved), how={"overwrite": True})
    assert (saved / "config.json").is_file()


def test_weights_are_not_overwritten_by_importance(home, tmp_path):
    cases.model_folder(tmp_path / "m")
    before = cases.bytes_of(tmp_path / "m")
    with pytest.raises(FileExistsError, match=r"model\.safetensors"):
        record(home, tmp_path / "m" / "model.safetensors", how={"overwrite": True})
    assert cases.bytes_of(tmp_path / "m") == before


def test_a_run_that_came_to_nothing_is_not_in_the_way(home, tmp_path):
    with pytest.raises(FileNotFoundError):
        tune(home, tmp_path / "t", data=str(tmp_path / "nowhere.jsonl"))
    assert not (tmp_path / "t").exists()
    tune(home, tmp_path / "t")


def test_a_run_in_progress_is_let_alone(home, tmp_path):
    put(tmp_path, ["checkpoints/begun.yaml"])
    with alone(tmp_path / "checkpoints", tmp_path):
        for how in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(RuntimeError, match="another run is writing there now"):
                tune(home, tmp_path, how=how)
    assert still(tmp_path, ["checkpoints/begun.yaml"])


def test_beginning_anew_keeps_the_lock(tmp_path):
    place = Place.of_folder(tmp_path, OF_TUNE)
    with alone(place.work, place.out):
        put(tmp_path, ["checkpoints/begun.yaml"])
        place.clear()
        with pytest.raises(RuntimeError, match="another run"), alone(place.work, place.out):
            pass


def test_what_a_killed_writer_left_goes_with_its_file(tmp_path):
    put(tmp_path, [".results.json.12.part", ".run.yaml.123.part", "checkpoints/.begun.yaml.7.part", "results.json.bak"])
    clear(tmp_path / "results.json")
    clear(tmp_path / "run.yaml")
    clear_work(tmp_path / "checkpoints")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json.bak"]


def test_a_page_of_a_report_goes_and_other_files_stay(tmp_path):
    folder = tmp_path / "report"
    page.write(run_page.page(report_cases.run()), folder)
    put(folder, ["thesis.tex"])
    (folder / "cost.png").write_text("mine: cost.png")
    clear(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["cost.png", "thesis.tex"]
    with pytest.raises(ValueError, match=r"'cost\.png' that no report left"):
        page.write(run_page.page(report_cases.run()), folder)


def test_a_page_whose_writer_was_killed_is_written_anew(tmp_path):
    written = page.write(run_page.page(report_cases.run()), tmp_path)
    Path(written[0]).unlink()
    assert page.write(run_page.page(report_cases.run()), tmp_path) == written


def test_a_phase_that_took_no_step_once_resumed_has_a_page(tmp_path):
    results = report_cases.run()
    results["cost"]["step_ms"]["tune"] = {"optimizer": None, "whole": None}
    assert page.write(run_page.page(results), tmp_path)
