"""What data are refused: part of the table of tests/test_validation.py."""

from __future__ import annotations

import errno
import sys
from unittest import mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from data_cases import FORGETFUL, STRICT, chat, loaded, numbered, tokenizer

from alr_kernels.finetune.data import Collator, Source
from alr_kernels.finetune.data.store import Store

PAIR = {"prompt": "2 + 2 =", "completion": " 4"}
TALK = [chat(f"hello {i}", "good day", "and now?", "farewell") for i in range(4)]


def refused(message, files, name="a.jsonl", tokens=None, how=None, error=ValueError, **source):
    """Return a row of the table; what is to be tokenised by a function is made when the row is."""
    return lambda c: loaded(files, name, tokens and tokens(), how, **source), error, message


def without_datasets(c):
    with mock.patch.dict(sys.modules, {"datasets": None}):
        loaded({"a.txt": "one\n\ntwo"}, "a.txt")


def full_device(error=errno.ENOSPC):
    """What writing to a full device does, at the first batch or at the end of the file."""
    store = Store(pa.schema([("a", pa.int64())]), in_memory=0)
    store.append({"a": [1]})
    with mock.patch.object(store, "_writer") as writer:
        writer.write_batch.side_effect = OSError(error, "no")
        store.append({"a": [2]})


def table(rows):
    return lambda path: pq.write_table(pa.Table.from_pylist(rows), path)


def saved(path):
    datasets.DatasetDict({"test": datasets.Dataset.from_list(numbered(4))}).save_to_disk(path)


def saved_alone(path):
    datasets.Dataset.from_list(numbered(4)).save_to_disk(path)


def not_on_the_hub(c):
    with mock.patch("datasets.load_dataset", side_effect=ConnectionError("no answer\nat all")):
        loaded({}, "someone/texts", subset="small", split="test")


def ten(*rows, make=PAIR):
    return {"a.jsonl": [make] * 2 + [{**make, "prompt": f"{i} + 0 ="} for i in range(7)] + list(rows)}


SURROGATE = b'{"text": "a"}\n{"text": "\\ud83d"}\n'
REFUSED = {
    "data source": (lambda c: Source(" "), ValueError, "--data: expected a file, a folder, a pattern or a hub.*' '"),
    "data source type": (lambda c: Source(None, option="--general"), ValueError, "--general: .*got None"),
    "data held_out": (lambda c: Source("a", held_out=1.5), ValueError, r"--held-out: .*\[0.0, 1.0\], got 1.5"),
    "data max_rows": (lambda c: Source("a", max_rows=0, option="--general"), ValueError, "--general-max-rows.*got 0"),
    "data seed": (lambda c: Source("a", seed=-1), ValueError, "seed: .*got -1"),
    "data max_length": refused("--max-length: expected an integer ≥ 4, got 1", {}, how={"max_length": 1}),
    "data loss_on": refused("--loss-on.*'answers', 'all'.*'prompts'", {}, how={"loss_on": "prompts"}),
    "data without datasets": (without_datasets, ImportError, r"datasets: pip install 'alr-kernels\[train\]'"),
    "data no pad": (
        lambda c: Collator(tokenizer(eos=False)),
        ValueError, "tokenizer: expected a token to pad with.*neither a pad token nor.*set tokenizer.pad_token",
    ),
    "data multiple": (lambda c: Collator(tokenizer(), 0), ValueError, "multiple: expected an integer ≥ 1, got 0"),
    "data limit": (lambda c: Collator(tokenizer(), limit=0), ValueError, "limit: expected an integer ≥ 1, got 0"),
    "data no file": refused("--data: there is no file or folder 'a.jsonl'.*check", {}, error=FileNotFoundError),
    "data no folder": refused("no file or folder 'a/b/c'", {}, "a/b/c", error=FileNotFoundError),
    "data no held-out file": refused(
        "--general-held-out-data: there is no file or folder 'b.txt'", {"a.jsonl": numbered(3)},
        error=FileNotFoundError, held_out_data="b.txt", option="--general",
    ),
    "data no match": refused(r"no file matches the pattern 't/\*.c'", {}, "t/*.c", error=FileNotFoundError),
    "data split of a file": refused("--split: it has no effect.*'a.jsonl'", {"a.jsonl": numbered(3)}, split="test"),
    "data subset of a file": refused("--subset: it has no effect", {"a.jsonl": numbered(3)}, subset="test"),
    "data not on the hub": (
        not_on_the_hub, ValueError,
        r"no file or folder 'someone/texts' here.*\(split 'test', subset 'small'\).*ConnectionError: no answer; check",
    ),
    "data saved split": refused("--split: 'texts' has no split 'train'; it has 'test'", {"texts": saved}, "texts"),
    "data saved whole": refused("--split: it has no effect", {"texts": saved_alone}, "texts", split="test"),
    "data folder without data": refused("no data in the folder 't'.*only .png, .py.*'t/\\*\\*/", {
        "t/a.png": b"1", "t/b.png": b"1", "t/c.py": b"2", "t/.git/x.txt": b"3",
    }, "t"),
    "data empty folder": refused("no data in the folder 't'.*it is empty", {"t/.x": b""}, "t"),
    "data folder of two sorts": refused(
        r"the folder 't' has text \(b.txt, 1 in all\) and tables \(a.jsonl, 1 in all\).*'t/\*\*/\*.jsonl'",
        {"t/a.jsonl": numbered(3), "t/b.txt": "text", "t/README.md": "of the table"}, "t",
    ),
    **{
        f"data empty {name}": refused(f"{name}: the file is empty; expected", {name: b""}, name)
        for name in ("a.txt", "a.jsonl", "a.csv", "a.parquet")
    },
    "data only blank": refused("nothing to read in 'a.txt': it has no rows", {"a.txt": "\n \n\n"}, "a.txt"),
    "data only a header": refused("nothing to read in 'a.csv': it has no rows", {"a.csv": "text\n"}, "a.csv"),
    "data blank rows": refused("all of its 2 rows are blank", {"a.jsonl": [{"text": " "}, {"text": ""}]}),
    "data latin-1": refused(
        r"a.txt: expected UTF-8 text, got byte 0xe9 at position 7 \(line 2\); convert",
        {"a.txt": "all\ncafé".encode("latin-1")}, "a.txt",
    ),
    "data utf-16": refused(r"got byte 0xff at position 0 \(line 1\)", {"a.csv": "a,b\n".encode("utf-16")}, "a.csv"),
    "data utf-16 without a mark": refused(
        r"got byte 0x00 at position 1 \(line 1\)", {"a.jsonl": '{"text": 1}'.encode("utf-16-le")},
    ),
    "data not json": refused(
        r"a.jsonl, line 3 is not JSON \(Expecting ',' delimiter, column 14\); each line",
        {"a.jsonl": b'{"text": "a"}\n\n{"text": "b" "c"}\n'},
    ),
    "data not json array": refused("a.json, line 2 is not JSON", {"a.json": b'[{"text": "a"},\n}]'}, "a.json"),
    "data json long number": refused(
        r"a.jsonl, line 1: a number of the JSON cannot be read \(.*4300", {"a.jsonl": '{"n": ' + "9" * 5000 + "}"}
    ),
    "data json too deep": refused("a.jsonl, line 1: the JSON is nested too deeply", {"a.jsonl": "[" * 200_000}),
    "data no object": refused(r"a.jsonl, line 2: expected a JSON object, got list \['b'\]", {
        "a.jsonl": b'{"text": "a"}\n["b"]',
    }),
    "data no object in an array": refused("a.json, row 2: .*got int 3", {"a.json": b'[{"text": "a"}, 3]'}, "a.json"),
    "data csv quote": refused('a.csv, line 3: expected a CSV record, got unexpected end', {
        "a.csv": 'text,n\na,1\n"c,2\n',
    }, "a.csv"),
    "data csv fields": refused("a.csv, line 4: expected 2 fields, as the header has, got 3", {
        "a.csv": 'text,n\n"a\nb",1\nc,d,2\n',
    }, "a.csv"),
    "data csv header": refused("a.csv: expected a header with distinct names, got 'text' twice", {
        "a.csv": "text,text\na,b\n",
    }, "a.csv"),
    "data no parquet": refused("a.parquet: expected a whole Parquet file.*", {"a.parquet": b"PAR1 no"}, "a.parquet"),
    "data half a parquet": refused("a.parquet: expected a whole Parquet file", {"a.parquet": lambda path: (
        table(numbered(3))(path), path.write_bytes(b"PAR1" + b"\0" * 40 + path.read_bytes()[44:]),
    )}, "a.parquet"),
    **{
        f"data columns {given}": refused(
            "--columns: expected text.*got '.*'", {"a.jsonl": numbered(3)}, columns=given,
        )
        for given in ("body", "text=", "=body", "prompt=a", "words=a", "text=a,text=b", "messages=a+b", "text=a+")
    },
    "data columns not there": refused(
        "--general-columns: a.jsonl has no column 'body'; it has 'text', 'n'",
        {"a.jsonl": numbered(3, n=1)}, columns="text=body", option="--general",
    ),
    "data columns of text": refused("--columns: it has no effect on a.txt", {
        "a.txt": "a\n\nb",
    }, "a.txt", columns="text=a"),
    "data preferences": refused(
        "a.jsonl: these are preferences.*'prompt', 'chosen', 'rejected'.*--columns prompt=prompt,completion=chosen",
        {"a.jsonl": [{"prompt": "a", "chosen": "b", "rejected": "c"}]},
    ),
    "data columns unknown": refused(
        'a.jsonl: expected a "text" column.*it has the columns \'abstract\', \'n\'. Say which.*--columns text=COLUMN',
        {"a.jsonl": [{"abstract": "a", "n": 1}]},
    ),
    "data columns of two formats": refused(
        r"in more than one way, as prompt/completion \(prompt, completion\) or text \(text\); say which: --columns",
        {"a.jsonl": [PAIR | {"text": "a"}]},
    ),
    "data two formats": refused("t/b.jsonl: expected text, as in t/a.jsonl, got prompt/completion", {
        "t/a.jsonl": numbered(3), "t/b.jsonl": [PAIR],
    }, "t"),
    "data row without a column": refused(
        "a.jsonl, line 2: expected a column 'text', as in the first row; it has 'body'",
        {"a.jsonl": [{"text": "a"}, {"body": "b"}]},
    ),
    "data null": refused("a.jsonl, line 2: text: expected a string, got null", {
        "a.jsonl": [{"text": "a"}, {"text": None}],
    }, error=TypeError),
    "data number": refused("a.jsonl, line 1: completion: expected a string, got int 4", {
        "a.jsonl": [{"prompt": "a", "completion": 4}],
    }, error=TypeError),
    "data number in parquet": refused("a.parquet, row 1: text: expected a string, got int 7", {
        "a.parquet": table([{"text": 7}]),
    }, "a.parquet", error=TypeError),
    "data half a character": refused("a.jsonl, line 2: expected text, got half a character", {"a.jsonl": SURROGATE}),
    "data messages": refused("a.jsonl, line 1: messages: expected a list of messages.*got str 'hello'", {
        "a.jsonl": [{"messages": "hello"}],
    }, error=TypeError),
    "data message": refused(
        r"a.jsonl, line 1: messages: message 1: expected \"role\" and \"content\".*role str 'user' and content null",
        {"a.jsonl": [{"messages": [{"role": "user", "text": "hello"}]}]}, error=TypeError,
    ),
    "data no chat template": refused("no chat template.*--chat-template FILE", {"a.jsonl": TALK}),
    "data template refuses": refused(
        "a.jsonl, line 5: .*chat template does not take this.*a user speaks first.*--chat-template",
        {"a.jsonl": [*TALK, {"messages": chat("a", "b")["messages"][::-1]}]}, tokens=lambda: tokenizer(STRICT),
    ),
    "data template rewrites": refused(
        r"a.jsonl, line 1: .*says in message 2 cannot.*'<think>.* became 'good.*--loss-on all",
        {"a.jsonl": TALK}, tokens=lambda: tokenizer(FORGETFUL), held_out=0.0,
    ),
    "data nothing measured": refused(
        "nothing of 'a.jsonl' is held out.*--held-out > 0 or --held-out-data",
        {"a.jsonl": numbered(3)}, how={"train": False}, held_out=0,
    ),
    "data all measured": refused("--held-out: expected a share below 1, got 1", {"a.jsonl": numbered(3)}, held_out=1),
    "data one row": refused("no row of 'a.jsonl' can be held out.*only one.*--held-out-data", {"a.jsonl": numbered(1)}),
    "data one paragraph": refused("no paragraph of 'a.txt'.*blank lines", {"a.txt": "one\ntwo"}, "a.txt"),
    "data one content": refused("it has 4 times the same", {"a.jsonl": numbered(1) * 4}),
    "data known rows": refused("nothing of 'a.jsonl' is left to train on, for 'b.jsonl' has all", {
        "a.jsonl": numbered(3), "b.jsonl": numbered(4),
    }, held_out_data="b.jsonl"),
    "data nothing to learn": refused(
        "nothing to train on in 'a.jsonl': 3 rows, 3 of them cut to 4 tokens, none with.*--max-length",
        {"a.jsonl": [{"prompt": f"{i} is a long question", "completion": "no"} for i in range(3)]},
        how={"max_length": 4}, held_out=0,
    ),
    "data nothing to measure": refused(
        r"nothing to measure on in what is held out of 'b.jsonl': 1 rows, none.*--held-out\).*--held-out-data",
        {"a.jsonl": TALK, "b.jsonl": [chat("hello")]}, tokens=lambda: tokenizer(STRICT), held_out_data="b.jsonl",
    ),
    "data full device": (lambda c: full_device(), OSError, r"No space left.*TMPDIR.*\.arrow"),
    "data broken device": (lambda c: full_device(errno.EIO), OSError, r"\[Errno 5\] no"),
}  # fmt: skip
