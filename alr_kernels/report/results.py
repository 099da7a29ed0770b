"""From a results file to its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import _validate_report
from .page import Page

RESULTS = "results.json"
KINDS = ("tune", "run", "demo")


def page_of(path: Path) -> Page:
    """Return the page of a results file.

    Args:
        path: what ``tune``, ``run`` or ``demo`` left: ``results.json``, or the folder that it is in.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is something else, or a part of it is missing.
    """
    path = path / RESULTS if path.is_dir() else path
    results = _read(path)
    _validate_report.kind(path, results, KINDS)
    from . import demo_page, run_page

    try:
        return (demo_page if results["kind"] == "demo" else run_page).page(results)
    except (LookupError, TypeError, AttributeError) as error:
        _validate_report.not_whole(path, error)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        _validate_report.no_file(path)
    except ValueError as error:  # of the encoding, too
        _validate_report.no_json(path, error)
