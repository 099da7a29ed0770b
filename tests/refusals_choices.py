"""What eval refuses of texts, questions and options: part of the table of tests/test_validation.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from alr_kernels import _validate_choices as check
from alr_kernels.finetune.choices import encode
from alr_kernels.finetune.comparison import Request, compare
from alr_kernels.finetune.evaluation import Losses
from alr_kernels.finetune.options import ModelOptions
from alr_kernels.finetune.questions import Question, parse, read

GENERAL = {"question": "q", "choices": ["x", "y"], "answer": 0}
PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
MEDMCQA = {"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d"}
OPTIONS = {
    **dict.fromkeys(("general", "domain", "held_out", "packing", "loss_on")),
    **{f"{name}_{part}": None for name in ("general", "domain") for part in ("columns", "split", "subset")},
}


class Bytes:
    """One token a character; of choices "z" nothing."""

    bos_token_id = pad_token_id = None

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) for letter in text.removesuffix(" z")]


def row(**changes):
    return parsed({**GENERAL, **changes})


def parsed(*rows):
    return lambda c: parse([(f"q.jsonl, line {number}", row) for number, row in enumerate(rows, 1)], "q.jsonl")


def options(**given):
    return lambda c: check.options_of_texts({**OPTIONS, **given})


def asked(*choices, files=False):
    return lambda c: compare(Request(ModelOptions("m"), choices=choices))


def without(name):
    return {key: value for key, value in GENERAL.items() if key != name}


REFUSED = {
    "nothing counts": (
        lambda c: Losses(np.zeros(3), np.zeros(3, dtype=np.int64)).total,
        ValueError, r"no token of the 3.*longer texts",
    ),
    "no questions": (parsed(), ValueError, "q.jsonl: expected at least one question"),
    "no file of questions": (lambda c: read("gone.jsonl"), ValueError, "--choices.*jsonl.*none at 'gone.jsonl'"),
    "shape": (
        parsed({"text": "t"}),
        ValueError, "q.jsonl: no multiple choice in its columns 'text'.*SciQ: question.*PIQA: goal",
    ),
    "column of a row": (
        parsed(GENERAL, without("answer")),
        ValueError, "q.jsonl, line 2: no 'answer'; expected question, choices, answer",
    ),
    "question null": (row(question=None), ValueError, "line 1: question: expected text, got None"),
    "question empty": (row(question=" "), ValueError, "line 1: question: expected text, got ' '"),
    "choice true": (row(choices=["x", True]), ValueError, "choices: expected text, got True"),
    "choice empty": (parsed({**PIQA, "sol2": ""}), ValueError, "line 1: sol2: expected text, got ''"),
    "choices of CSV": (row(choices="x, y"), ValueError, "line 1: choices: expected a list, in CSV as JSON.*got 'x, y'"),
    "choices one": (row(choices=["x"]), ValueError, r"choices: expected a list of two or more, got \['x'\]"),
    "choices mapping": (row(choices={"a": "x"}), ValueError, "choices: expected a list of two or more, got {'a': 'x'}"),
    **{
        f"label {value!r}": (
            parsed({**PIQA, "label": value}),
            ValueError, rf"line 1: label: .*0 to 1 or its letter, got {value!r}.*leave",
        )
        for value in (-1, 2, "C", None, 0.5, True, "", "yes")
    },
    "cop both": (parsed({**MEDMCQA, "cop": 0}, {**MEDMCQA, "cop": 4}), ValueError, "cop: got both 0 and 4"),
    "cop unclear": (parsed({**MEDMCQA, "cop": 2}), ValueError, "cop: neither 0 nor 4.*letters A to D"),
    "cop of a test split": (
        parsed({**MEDMCQA, "cop": 0}, {**MEDMCQA, "cop": -1}),
        ValueError, "line 2: cop: .*0 to 3.*got -1.*leave them out",
    ),
    "cop from one": (
        parsed({**MEDMCQA, "cop": 4}, {**MEDMCQA, "cop": 5}), ValueError, "line 2: cop: .*1 to 4.*got 5",
    ),
    **{
        f"answer {value!r}": (
            row(answer=value), ValueError, rf"line 1: answer: .*index from 0 to 1, a letter from A to B.*got {value!r}",
        )
        for value in (2, -1, "C", "z", None, 0.5)
    },
    "answer unclear": (
        row(choices=["1", "2"], answer="1"),
        ValueError, "answer: '1' may mean any of choices 0, 1 .*index, letter or text",
    ),
    "choice of no token": (
        lambda c: encode(Bytes(), Question("q", ("x", "z"), 0, "f, row 3"), 9), ValueError, "f, row 3.*no token.*'z'",
    ),
    "choice too long": (
        lambda c: encode(Bytes(), Question("q", ("x", "yyyy"), 0, "f, row 3"), 5), ValueError,
        "f, row 3: choice 'yyyy' has 5 tokens; expected fewer than max_length=5",
    ),
    "nothing to measure": (asked(), ValueError, "nothing to measure.*--general.*--domain-choices"),
    "questions twice": (asked("a.jsonl", "a.jsonl"), ValueError, "--choices.*'a.jsonl' is given twice"),
    "columns without text": (
        options(general="a.txt", domain_columns="text=a"),
        ValueError, "--domain-columns: it has no effect without --domain",
    ),
    **{
        f"{option} without text": (
            options(**{option: value}), ValueError, f"--{option.replace('_', '-')}: it has no effect without --general",
        )
        for option, value in (("held_out", 0.1), ("packing", False), ("loss_on", "all"))
    },
    **{
        f"held out {share}": (options(general="a", held_out=share), ValueError, rf"--held-out: .*\(0, 1\].*got {share}")
        for share in (0.0, 1.5, float("nan"))
    },
    "result file of something else": (
        lambda c: check.result_file(Path(__file__)), FileExistsError, "--out: .* is there, and eval did not write it",
    ),
    "result file a folder": (lambda c: check.result_file(Path("/")), ValueError, "--out: expected a file.*got '/'"),
    "result file in no folder": (
        lambda c: check.result_file(Path("gone/results.json")), ValueError, "--out: .*folder that is there, got 'gone/",
    ),
}  # fmt: skip
