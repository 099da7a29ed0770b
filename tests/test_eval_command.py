"""The command eval: its numbers against other ways to them, what it compares and what it refuses to."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import finetune_cases
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from alr_kernels.cli import app
from alr_kernels.finetune import choices, questions
from alr_kernels.finetune.comparison import text_bytes

QUESTIONS = 24


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with base, texts and questions, and what tune leaves: tuned, a whole model, and adapter."""
    from alr_kernels.finetune import phases

    folder = tmp_path_factory.mktemp("eval")
    finetune_cases.model_folder(folder / "base")
    general, domain = finetune_cases.texts(folder)
    same = {"model": str(folder / "base"), "data": domain, "general": general, "reg_lambda": 0}
    for name, more in (("tuned", {}), ("adapter", {"lora": "default", "lr": 0.05})):
        phases.tune(finetune_cases.settings("tune", **same, out=str(folder / name), **more))
    words = [word for text in finetune_cases.prose(30) for word in text.split()]
    rows = [
        {
            "question": " ".join(words[k : k + 5]),
            "choices": [words[k + 5], words[k + 50], words[k + 90]],
            "answer": n % 3,
        }
        for n, k in enumerate(range(0, 12 * QUESTIONS, 12))
    ]
    write(folder / "known.jsonl", rows)
    write(folder / "learnt.jsonl", rows[::-1][:9])
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def run(home, *arguments, code=0):
    """Call eval in ``home``'s files: names that are there become paths."""
    known = {path.name for path in home.iterdir()}
    given = [str(home / argument) if argument in known else str(argument) for argument in arguments]
    result = CliRunner().invoke(app, ["eval", *given, "--device", "cpu"])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def measured(home, *arguments):
    return json.loads(run(home, *arguments, "--json").stdout)


def model_of(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_a_text_against_a_loop_over_its_rows(home):
    """One text a row, unpacked: what the model says of it and its end, without the first token."""
    model, tokenizer = model_of(home / "base")
    found = measured(home, "--model", "base", "--general", "general.jsonl", "--no-packing", "--max-length", "64")
    total, count, size = 0.0, 0, 0
    for line in (home / "general.jsonl").read_text("utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        size += len(text.encode())
        for start in range(0, len(ids), 64):
            window = ids[start : start + 64]
            size -= len(tokenizer.decode(window[:1], skip_special_tokens=True).encode())
            with torch.no_grad():
                scores = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
            total -= sum(float(scores[place, token]) for place, token in enumerate(window[1:]))
            count += len(window) - 1
    general = found["after"]["general"]
    assert general["tokens"] == count
    assert general["nll"] == pytest.approx(total / count, rel=1e-6)
    assert general["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert general["bytes"] == size
    assert general["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-6)
    assert found["before"] is found["summary"] is found["changes"] is None
    assert found["data"]["general"]["held_out_rows"] == 24, "all rows are measured"


@pytest.mark.parametrize("name", ["tuned", "adapter"])
def test_the_held_out_rows_of_a_run_give_the_numbers_of_the_run(home, name):
    results = json.loads((home / name / "results.json").read_text("utf-8"))
    options = ("--held-out", "0.2", "--max-length", "32", "--batch", "3")
    texts = ("--general", "general.jsonl", "--domain", "domain.jsonl")
    found = measured(home, "--model", name, "--before", "base", *texts, *options)
    for when in ("before", "after"):
        for text in ("general", "domain"):
            assert found[when][text]["nll"] == pytest.approx(results[when][text]["nll"], rel=1e-6), (when, text)
            assert found[when][text]["tokens"] == results[when][text]["tokens"]
    assert abs(results["summary"]["domain_gain"]) > 1e-3, "the run has moved the model"
    for key in ("forgetting", "domain_gain", "backward_transfer"):
        assert found["summary"][key] == pytest.approx(results["summary"][key], abs=1e-5)


def test_what_changed_and_how_sure_it_is(home):
    found = measured(
        *(home, "--model", "adapter", "--before", "base", "--general", "general.jsonl", "--domain", "domain.jsonl"),
        *("--choices", "known.jsonl", "--domain-choices", "learnt.jsonl", "--max-length", "64"),
    )
    before, after, summary, intervals = (found[key] for key in ("before", "after", "summary", "intervals"))
    assert summary["forgetting"] == pytest.approx(after["general"]["nll"] - before["general"]["nll"], abs=1e-12)
    assert summary["domain_gain"] == pytest.approx(before["domain"]["nll"] - after["domain"]["nll"], abs=1e-12)
    assert summary["backward_transfer"] == -summary["forgetting"]
    for key, file in (("accuracy_backward_transfer", "known.jsonl"), ("accuracy_domain_gain", "learnt.jsonl")):
        of = [side["choices"][str(home / file)]["accuracy_norm"] for side in (before, after)]
        assert summary[key] == pytest.approx(of[1] - of[0], abs=1e-12)
    assert summary["domain_gain"] > 0
    for key, (low, high) in intervals.items():
        assert low <= summary[key] <= high
    assert intervals["domain_gain"][0] < intervals["domain_gain"][1]
    assert intervals["backward_transfer"] == [-bound for bound in intervals["forgetting"][::-1]]
    assert found["changes"]["domain"]["nll"]["value"] == -summary["domain_gain"]
    assert found["shapes"][str(home / "known.jsonl")] == "general"
    assert after["choices"][str(home / "known.jsonl")]["questions"] == QUESTIONS


def test_questions_are_those_of_the_library(home):
    model, tokenizer = model_of(home / "tuned")
    _, asked = questions.read(home / "known.jsonl")
    own = choices.answer(model, tokenizer, asked[:10], max_length=64, batch=4).as_dict()
    found = measured(home, "--model", "tuned", "--choices", "known.jsonl", "--limit", "10", "--batch", "7")
    assert found["after"]["choices"] == {str(home / "known.jsonl"): own}


def test_a_model_against_itself_has_not_changed(home):
    found = measured(
        home, "--model", "base", "--before", "base", "--general", "general.jsonl", "--choices", "known.jsonl"
    )
    assert {value for value in found["summary"].values() if value is not None} == {0.0}
    assert found["intervals"]["forgetting"] == [0.0, 0.0]
    assert (found["summary"]["domain_gain"], found["intervals"]["domain_gain"]) == (None, None)
    assert found["notes"] == []


def test_limits_and_seeds_draw_rows(home):
    def rows(*more):
        return measured(home, "--model", "base", "--general", "general.jsonl", *more)

    few, other = rows("--limit", "5"), rows("--limit", "5", "--seed", "1")
    assert few["data"]["general"]["held_out_rows"] == 5
    assert rows("--limit", "5")["after"] == few["after"]
    assert few["data"]["general"]["fingerprint"] != other["data"]["general"]["fingerprint"]


def test_rows_that_a_model_was_trained_on_are_told(home):
    def notes(*more):
        return measured(home, "--model", "tuned", "--domain", "domain.jsonl", *more)["notes"]

    told = (
        "domain text: this model was trained on these rows, all but the held-out ones; measure those alone with "
        "--held-out 0.2 --seed 0"
    )
    assert notes() == [told]
    assert notes("--before", "tuned") == [told, told.replace("this model", "the model before")]
    assert notes("--limit", "5") == [told], "the same file, though not the same rows"
    assert notes("--held-out", "0.2") == notes("--held-out", "0.1") == []
    assert notes("--held-out", "0.2", "--seed", "1") == notes("--held-out", "0.4") == [told]
    assert measured(home, "--model", "tuned", "--general", "general.jsonl")["notes"] == [], "it was measured on alone"
    copy = home / "copy.jsonl"
    shutil.copy(home / "domain.jsonl", copy)
    try:
        assert measured(home, "--model", "tuned", "--domain", copy)["notes"] == [told]
    finally:
        copy.unlink()
    assert told in run(home, "--model", "tuned", "--domain", "domain.jsonl").stderr.replace("\n", " ")


def test_a_models_folder_in_a_runs_has_the_card_of_the_run(tmp_path):
    from alr_kernels.finetune import config_file, seen
    from alr_kernels.finetune.data import Source

    card = {"verb": "run", "options": {"held_out": 0.05, "seed": 3, "general": str(tmp_path / "g.txt")}}
    for name in ("tuned", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "run.yaml").write_text(json.dumps({**card, config_file.CARD: config_file.CARD_VERSION}))
    source = Source(str(tmp_path / "g.txt"), held_out=1.0, seed=3)
    found = [list(seen.notes({"it": str(tmp_path / name)}, "general", source, "")) for name in ("tuned", "other")]
    assert found[1] == []
    assert len(found[0]) == 1
    assert found[0][0].endswith("--held-out 0.05 --seed 3")
    (tmp_path / "tuned" / "run.yaml").write_text("- of another program")
    assert list(seen.notes({"it": str(tmp_path / "tuned")}, "general", source, "")) == []


def test_other_tokens_do_not_compare(home, tmp_path):
    """The same model with another tokenizer: bytes are the same text, tokens are not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    other = tmp_path / "other"
    shutil.copytree(home / "base", other)
    letters = {letter: index + 1 for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE({"<|end|>": 0, **letters}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|end|>").save_pretrained(other)
    arguments = (
        "--model",
        other,
        "--before",
        "base",
        "--general",
        "general.jsonl",
        "--no-packing",
        "--max-length",
        "64",
    )
    found = measured(home, *arguments)
    before, after = found["before"]["general"], found["after"]["general"]
    assert found["changes"]["general"]["nll"] is None
    assert found["summary"]["forgetting"] is found["summary"]["backward_transfer"] is None
    assert found["changes"]["general"]["bits_per_byte"] == after["bits_per_byte"] - before["bits_per_byte"]
    assert after["tokens"] > 1.2 * before["tokens"]
    assert after["bytes"] == pytest.approx(before["bytes"], rel=0.02), "but for the first token of each window"
    result = run(home, *arguments)
    assert re.search(r"general text: .*do not compare.*bits per byte", result.stderr.replace("\n", " "))
    assert "forgetting" not in result.stdout


def test_the_table_says_what_the_json_says(home, tmp_path):
    arguments = (
        *("--model", "adapter", "--before", "base", "--general", "general.jsonl", "--choices", "known.jsonl"),
        *("--out", tmp_path / "results.json"),
    )
    result = run(home, *arguments)
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    shown = result.stdout
    for side in (found["before"], found["after"]):
        for key in ("nll", "perplexity", "bits_per_byte"):
            assert f"{side['general'][key]:.4f}" in shown
        answers = side["choices"][str(home / "known.jsonl")]
        assert f"{answers['accuracy']:.4f} ± {answers['accuracy_stderr']:.4f}" in shown
    for key, title in (
        ("forgetting", "forgetting (general NLL"),
        ("accuracy_backward_transfer", "normalised accuracy,"),
    ):
        low, high = found["intervals"][key]
        line = next(line for line in shown.splitlines() if title in line and not line.startswith("│"))
        assert f"{found['summary'][key]:+.4f} [{low:+.4f}, {high:+.4f}]" in line
    printed = measured(home, *arguments)
    assert {**printed, "seconds": 0} == {**found, "seconds": 0}
    assert run(home, "--model", "base", "--general", "general.jsonl").stdout.count("±") == 0


def test_a_model_of_nan_is_told_not_hidden(home, tmp_path):
    model, tokenizer = model_of(home / "base")
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    arguments = (
        "--model",
        tmp_path / "nan",
        "--before",
        "base",
        "--general",
        "general.jsonl",
        "--choices",
        "known.jsonl",
    )
    found = measured(home, *arguments)
    assert found["after"]["general"]["nll"] is found["summary"]["forgetting"] is None
    answers = found["after"]["choices"][str(home / "known.jsonl")]
    assert (answers["accuracy"], answers["undefined"]) == (0.0, QUESTIONS)
    result = run(home, *arguments)
    assert "not finite" in result.stdout
    assert "NLL of the general text is not finite" in result.stderr
    assert f"{QUESTIONS} questions of" in result.stderr


def test_bytes_of_what_counts():
    """Prompts and first tokens are left out; a character that two tokens share counts once."""
    tokenizer = finetune_cases.tokenizer()
    ids = tokenizer.encode("What? Façade €5.")
    masked = len(tokenizer.encode("What?"))
    rows = [
        {"input_ids": [*ids, 0], "labels": [-100] * masked + ids[masked:] + [0]},
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids[:1], "labels": ids[:1]},
    ]
    first = len(tokenizer.decode(ids[:1]).encode())
    whole = len("What? Façade €5.".encode())
    assert text_bytes(tokenizer, rows) == len(" Façade €5.".encode()) + whole - first
    assert text_bytes(tokenizer, rows[2:]) == 0


def test_one_process_of_many_measures(home, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = run(home, "--model", "base", "--general", "general.jsonl", "--json")
    assert result.output == ""
    monkeypatch.setenv("RANK", "0")
    result = run(home, "--model", "base", "--general", "general.jsonl", "--json")
    assert "launched as 2 processes" in result.stderr
    assert json.loads(result.stdout)["after"]["general"]["tokens"] > 0


REFUSED = {
    "nothing": ((), "nothing to measure on"),
    "no model": (("--model", "./gone", "--general", "general.jsonl"), r"--model.*gone"),
    "no model before": (("--before", "./gone", "--general", "general.jsonl"), r"--before.*gone"),
    "no text": (("--domain", "gone.txt"), "--domain.*gone.txt"),
    "no questions": (("--choices", "gone.jsonl"), "--choices.*gone.jsonl"),
    "text for questions": (("--choices", "general.jsonl"), r"general.jsonl: no multiple choice in its columns 'text'"),
    "columns": (("--general", "general.jsonl", "--general-columns", "text=body"), "--general-columns.*body"),
    "limit": (("--general", "general.jsonl", "--limit", "0"), "--limit: expected an integer ≥ 1, got 0"),
    "batch": (("--general", "general.jsonl", "--batch", "0"), "--batch.*≥ 1, got 0"),
    "max length": (("--general", "general.jsonl", "--max-length", "1"), "--max-length.*≥ 2, got 1"),
    "seed": (("--general", "general.jsonl", "--seed", "-1"), "--seed.*-1"),
    "held out": (("--general", "general.jsonl", "--held-out", "0"), "--held-out.*got 0"),
    "no effect": (("--choices", "known.jsonl", "--loss-on", "all"), "--loss-on: it has no effect"),
    "no GPU": (("--general", "general.jsonl", "--device", "cuda"), "--device: a GPU was asked for"),
    "out": (("--general", "general.jsonl", "--out", "gone/results.json"), "--out.*folder that is there"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_one_message(home, what, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, message = REFUSED[what]
    model = () if "--model" in arguments else ("--model", "base")
    known = {path.name for path in home.iterdir()}
    given = [str(home / word) if word in known else word for word in (*model, *arguments)]
    result = CliRunner().invoke(app, ["eval", *given])
    assert (result.exit_code, result.stdout) == (2, "")
    said = result.stderr.strip().splitlines()[-1]
    assert said.startswith("alr-kernels eval: ")
    assert re.search(message, said)
    assert "Traceback" not in result.stderr


def test_an_empty_file_of_questions(home, tmp_path):
    for name in ("empty.jsonl", "empty.csv"):
        (tmp_path / name).write_text("")
        result = run(home, "--model", "base", "--choices", tmp_path / name, code=2)
        assert f"{name}: expected at least one question" in result.stderr


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_questions_of_every_kind_of_file(tmp_path, ending):
    rows = [
        {"question": f"Is {n}, “so”?", "correct_answer": "ja", "distractor1": "no", "distractor2": "n",
         "distractor3": "o", "support": "Because."} for n in range(3)
    ]  # fmt: skip
    path = tmp_path / f"sciq.{ending}"
    if ending == "json":
        path.write_text(json.dumps(rows), "utf-8")
    elif ending == "jsonl":
        write(path, rows)
    else:
        import pandas

        table = pandas.DataFrame({"hash": np.arange(3), **{name: [row[name] for row in rows] for name in rows[0]}})
        table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path)
    shape, found = questions.read(path)
    assert shape == "SciQ"
    assert found == questions.parse([("", row) for row in rows], "")[1]
    assert found[1].where.endswith({"jsonl": "line 2", "csv": "line 3"}.get(ending, "row 2"))
    assert found[0].context.startswith("Because.\nQuestion: Is 0")


def test_lists_of_a_parquet_file(tmp_path):
    import pandas

    path = Path(tmp_path / "own.parquet")
    pandas.DataFrame({"question": ["q"], "choices": [["x", "y"]], "answer": ["B"]}).to_parquet(path)
    assert questions.read(path)[1] == [questions.Question("Question: q\nAnswer:", ("x", "y"), 1)]


def test_progress_counts_batches(home):
    result = run(home, "--model", "base", "--general", "general.jsonl", "--limit", "4")
    assert " batches in " in result.stderr
    assert " steps" not in result.stderr


def test_the_help_has_an_example():
    result = CliRunner().invoke(app, ["eval", "--help"])
    assert "alr-kernels eval --model tuned --before" in result.output
