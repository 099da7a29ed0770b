"""What reports refuse: part of the table of tests/test_validation.py."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from unittest import mock

import report_cases

from alr_kernels import _validate_report
from alr_kernels.report.page import check_folder
from alr_kernels.report.results import page_of


def written(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return page_of(Path(folder))


def missing(part):
    results = report_cases.run()
    del results[part]
    return written(results)


def without_matplotlib(c):
    with mock.patch.object(_validate_report, "find_spec", return_value=None):
        _validate_report.matplotlib()


def over(name):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text("mine")
        check_folder(Path(folder), ["curves.png"])


REFUSED = {
    "report over a page": (lambda c: over("index.html"), ValueError, "report: the folder .*'index.html' that no rep"),
    "report over a picture": (lambda c: over("curves.png"), ValueError, "report: the folder .*'curves.png' that no"),
    "report file": (lambda c: page_of(Path("nowhere.json")), FileNotFoundError, r"no nowhere\.json; expected.*folder"),
    "report json": (lambda c: written(b"{"), ValueError, r"results: .*results\.json is no JSON.*expected"),
    "report encoding": (lambda c: written(b'{"\xff": 1}'), ValueError, r"results\.json is no JSON.*utf-8"),
    "report list": (lambda c: written([1]), ValueError, "results: .*holds a list, expected"),
    "report kind": (lambda c: written({"kind": "bench"}), ValueError, "'bench', expected.*'demo', 'run', 'tune'"),
    "report old": (lambda c: written({"rows": []}), ValueError, '"kind" None.*run the command again'),
    "report part": (lambda c: missing("curves"), ValueError, "not whole.*KeyError: 'curves'.*again"),
    "report matplotlib": (without_matplotlib, ImportError, r"alr-kernels\[report\]"),
}
