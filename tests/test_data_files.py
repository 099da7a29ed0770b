"""Where rows come from: files, folders and data sets make the same of them, in every process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import NONE_HELD, TEXTS, loaded, numbered, said, same, tokenizer, written

from alr_kernels.finetune.data import Source, load, loading, rows, store
from alr_kernels.finetune.data.packing import IGNORED


def as_csv(delimiter):
    def quoted(text):
        return '"' + text.replace('"', '""') + '"'

    return f"n{delimiter}text\r\n" + "".join(f"{i}{delimiter}{quoted(r['text'])}\r\n" for i, r in enumerate(TEXTS))


SAME = {
    "a.jsonl": TEXTS,
    "marked.jsonl": b"\xef\xbb\xbf" + "\r\n\n".join(map(json.dumps, TEXTS)).encode(),
    "mixed.jsonl": [row | {"n": ["NA", 1, None, [2]][i % 4]} for i, row in enumerate(TEXTS)],
    "a.json": json.dumps(TEXTS, indent=1),
    "lines.json": TEXTS,
    "a.csv": as_csv(","),
    "semicolons.csv": as_csv(";"),
    "a.tsv": as_csv("\t"),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist([row | {"n": 1} for row in TEXTS]), path),
    "saved": lambda path: datasets.DatasetDict({"train": datasets.Dataset.from_list(TEXTS)}).save_to_disk(path),
    "folder": lambda path: written(path, {"1.jsonl": TEXTS[:9], "more/2.csv": as_csv(",")[:7], "3.json": TEXTS[9:]}),
    "files": lambda path: written(
        path, {f"{i:02}.txt": row["text"].replace("\n", "\r\n") for i, row in enumerate(TEXTS)} | {".x.txt": "no"}
    ),
    "files/**/*.txt": lambda path: written(Path("files"), {f"{i:02}.txt": r["text"] for i, r in enumerate(TEXTS)}),
}


@pytest.mark.parametrize("name", SAME)
def test_it_does_not_matter_how_rows_are_kept(name, monkeypatch, tmp_path):
    """Nor how many go through at a time, nor whether they pass through files. Nor what the file is called."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, {"expected.jsonl": TEXTS})
    content = SAME[name]
    content(tmp_path / name) if callable(content) else written(tmp_path, {name: content})
    tokens = tokenizer()
    expected = load(Source("expected.jsonl"), tokens, max_length=32)
    monkeypatch.setattr(rows, "BATCH_ROWS", 7)
    monkeypatch.setattr(loading, "BATCH_ROWS", 4)
    monkeypatch.setattr(loading, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(store, "IN_MEMORY", 40_000)  # some batches wait in memory, then all go into the file
    got = load(Source(name), tokens, max_length=32)
    assert same(got.train, expected.train)
    assert same(got.held_out, expected.held_out)
    assert got.facts["fingerprint"] == expected.facts["fingerprint"]
    assert json.loads(json.dumps(got.facts)) == got.facts


def test_a_cell_is_text_whatever_it_looks_like():
    tokens = tokenizer()
    found = loaded({"a.csv": "text\nNA\n12\nnull\n"}, "a.csv", tokens, {"packing": False}, **NONE_HELD)
    assert [said(tokens, row)[0] for row in found.train] == ["NA</s>", "12</s>", "null</s>"]


def test_large_sets_lie_in_files_and_rows_are_given_back(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "_folder", lambda: type("Folder", (), {"name": str(tmp_path)}))
    small = loaded({"a.jsonl": TEXTS}, "a.jsonl")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(store, "IN_MEMORY", 1000)
    large = loaded({"a.jsonl": TEXTS}, "a.jsonl")
    assert same(small.train, large.train)
    assert len(large.train.cache_files) == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        Path(one.cache_files[0]["filename"]).name for one in (large.train, large.held_out)
    }


PROSE = "\n\n" + "\n\n\n".join(f"Paragraph {i}\n  of two lines." for i in range(50)) + "\n"


def test_paragraphs_that_are_neighbours_are_one_text():
    tokens = tokenizer(adds="<s> $A")
    found = loaded({"a.txt": PROSE.replace("\n", "\r\n")}, "a.txt", tokens, **NONE_HELD)
    assert tokens.decode([token for row in found.train["input_ids"] for token in row]) == f"<s>{PROSE.lstrip()}</s>"
    assert (found.facts["unit"], found.facts["rows"], found.held_out) == ("paragraph", 50, None)
    alone = loaded({"a.txt": PROSE}, "a.txt", tokens, {"packing": False}, **NONE_HELD)
    assert len(alone.train) == 50
    assert said(tokens, alone.train[3])[0] == "<s>Paragraph 3\n  of two lines.\n\n\n"


def test_a_text_goes_on_around_what_is_held_out():
    tokens = tokenizer()
    found = loaded({"a.txt": PROSE}, "a.txt", tokens, held_out=0.1)
    learnt, measured = ("".join(said(tokens, row)[0] for row in side) for side in (found.train, found.held_out))
    assert found.facts["held_out_rows"] == measured.count("Paragraph") == 5
    assert found.facts["train_rows"] == learnt.count("Paragraph") == 45
    assert (learnt + measured).count("</s>") == 1  # the end of the file, on whichever side it is
    starts = sum(row["labels"].count(IGNORED) for row in found.train) - len(found.train)
    assert 1 <= starts <= 6  # one text begins after each gap; some where a sequence does


@pytest.mark.parametrize(
    ("count", "share", "unit"), [(3, 0.05, "paragraph"), (20, 0.05, "file"), (3, 0.5, "file"), (3, 0, "file")]
)
def test_files_of_a_folder_are_rows_when_they_are_many(count, share, unit):
    files = {f"t/{i}.txt": f"File {i}.\n\nMore." for i in range(count)}
    found = loaded(files | {"t/note.pdf": "x"}, "t", held_out=share)
    assert (found.facts["unit"], found.facts["files"], found.facts["ignored_files"]) == (unit, count, 1)
    assert found.facts["rows"] == count * (2 if unit == "paragraph" else 1)


def test_data_sets_of_the_hub(monkeypatch):
    """Asked for by id, subset and split; a colon names the split of what is measured on."""
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(numbered(5 if split == "test" else 20, other=None))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = loaded({}, "someone/texts", subset="small", split="train[:9]", held_out_data="someone/texts:test")
    assert asked == [("someone/texts", "small", "test"), ("someone/texts", "small", "train[:9]")]
    assert (found.facts["train_rows"], found.facts["held_out_rows"], found.facts["overlap"]) == (15, 5, 5)


SCRIPT = """
import hashlib, sys
sys.path.insert(0, {tests!r})
from data_cases import tokenizer
from alr_kernels.finetune.data import Source, load
found = load(Source("a.jsonl", held_out=0.2), tokenizer(), max_length=32)
print(hashlib.sha256(repr([found.train.to_dict(), found.held_out.to_dict()]).encode()).hexdigest())
"""


def test_processes_of_a_job_see_the_same(tmp_path):
    written(tmp_path, {"a.jsonl": TEXTS})
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    jobs = [subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE) for _ in range(2)]
    told = [job.communicate(timeout=120)[0].decode().split()[-1] for job in jobs]
    found = loaded({"a.jsonl": TEXTS}, "a.jsonl", held_out=0.2)
    here = hashlib.sha256(repr([found.train.to_dict(), found.held_out.to_dict()]).encode()).hexdigest()
    assert told == [here, here]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
