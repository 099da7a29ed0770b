"""The page and the pictures of an importance file, and what docs/inspecting.md shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import zip_longest

import chromium
import pytest
import torch
from importance_files import ROOT, importance, saved
from typer.testing import CliRunner

from alr_kernels import Importance
from alr_kernels.cli import app
from alr_kernels.importance.inspection import inspect

pytest.importorskip("matplotlib", reason="reports are drawn by matplotlib")
browsers = pytest.mark.skipif(chromium.FOUND is None, reason=chromium.MISSING)

from alr_kernels.report import importance_page, importance_plots  # noqa: E402 - they need matplotlib to draw
from alr_kernels.report.page import Absent, Chart, html  # noqa: E402

KEYS = ["pull", "layers", "spread", "encodings"]


def charts(found):
    return {part.key: part for part in importance_plots.parts(found)}


def test_the_command_writes_a_page_and_a_picture(tmp_path):
    path, _ = saved(tmp_path / "i.safetensors")
    options = ["--plot", tmp_path / "i.png", "--html", tmp_path / "page", "--json"]
    done = CliRunner().invoke(app, ["inspect", str(path), *map(str, options)])
    assert done.exit_code == 0, done.output
    written = ["i.png", "page/index.html", *(f"page/{key}.png" for key in KEYS)]
    for name in written:
        assert f"Written: {tmp_path / name}" in done.stderr
        head = (tmp_path / name).read_bytes()[:8]
        assert head == b"\x89PNG\r\n\x1a\n" or name.endswith(".html")
    assert not list(tmp_path.rglob("*.part"))
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    embedded = json.loads(re.search(r'id="results">(.*?)</script>', page, re.DOTALL)[1])
    assert embedded == json.loads(done.stdout)


def test_tables_behind_the_charts_are_the_numbers(tmp_path):
    path, _ = saved(tmp_path / "i.safetensors")
    found = inspect(path)
    drawn = charts(found)
    rows = {row.name: row for row in found.layers}
    assert len(drawn["layers"].rows) == len(rows)
    for name, alpha, share, mass, mean, top, l2, negative, bad, elements, nbytes, form in drawn["layers"].rows:
        row = rows[name]
        assert (alpha, share, mass) == (row.alpha, 100 * row.share, row.mass)
        assert (mean, top, l2, bad, elements) == (row.stats.mean, row.stats.max, row.stats.l2, 0, row.stats.numel)
        assert (negative, nbytes, form) == (100 * row.negative_share, row.nbytes, row.form)
    assert sum(row[1] for row in drawn["spread"].rows) == found.total.stats.numel
    for row in drawn["spread"].rows:
        assert sum(row[2:]) == row[1]
    errors = {(row[0], row[1]): row[2] for row in drawn["encodings"].rows}
    assert errors["all", "int4"] == 100 * found.total.losses["int4"].rms
    assert sum(row[-1] for row in drawn["pull"].rows) == pytest.approx(100)


def test_layers_come_in_the_order_of_the_model(tmp_path):
    names = [f"h.{i}.w" for i in (10, 9, 2)]
    Importance({name: torch.rand(4, 4) for name in ["lm_head.weight", *names, "wte.weight"]}).save(
        tmp_path / "i.safetensors"
    )
    found = inspect(tmp_path / "i.safetensors")
    assert [row.name for row in importance_plots.ordered(found)] == ["wte", "h.2", "h.9", "h.10", "lm_head"]


@pytest.mark.parametrize(
    ("make", "options", "absent", "says"),
    [
        (lambda: importance(), {"encodings": "none"}, {"encodings"}, "--encodings all"),
        (lambda: Importance({"a.w": torch.zeros(64, 128)}), {}, {"pull", "spread"}, "nothing would be pulled"),
        (lambda: Importance({"a.w": torch.rand(64, 128)}).astype("int4"), {}, {"encodings"}, "differs from the"),
        (lambda: Importance({"a.w": torch.rand(())}), {}, {"encodings"}, "would take another form"),
    ],
)  # fmt: skip
def test_what_there_is_nothing_of_is_said(tmp_path, make, options, absent, says):
    make().save(tmp_path / "i.safetensors")
    found = inspect(tmp_path / "i.safetensors", **options)
    drawn = charts(found)
    assert list(drawn) == KEYS
    assert {key for key, part in drawn.items() if isinstance(part, Absent)} == absent
    assert all(isinstance(part, Chart) for key, part in drawn.items() if key not in absent)
    assert any(says in part.why for part in drawn.values() if isinstance(part, Absent))
    importance_page.draw(found, tmp_path / "i.png")
    html(importance_page.of(found))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    running = chromium.Chromium(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    path, _ = saved(folder / "i.safetensors")
    (folder / "index.html").write_text(html(importance_page.of(inspect(path))), encoding="utf-8")
    return folder / "index.html"


@browsers
@pytest.mark.parametrize("width", [1200, 360])
def test_the_page_in_a_browser(browser, page, width):
    browser.open(page, width=width, scheme="dark" if width < 1000 else "light")
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert browser.console == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    sizes = browser.evaluate(
        "[...document.querySelectorAll('figure svg')].filter(svg => svg.checkVisibility()).map("
        "svg => [svg.closest('section').id, svg.getBoundingClientRect().height, svg.querySelectorAll('path').length])"
    )
    assert [key for key, *_ in sizes] == KEYS
    assert all(height > 100 and paths > 10 for _, height, paths in sizes)
    shown = browser.evaluate(
        "[...document.querySelectorAll('[data-path]')].map(data => [data.dataset.path, data.value])"
    )
    results = json.loads(browser.evaluate("document.getElementById('results').textContent"))
    assert len(shown) == 4
    for path, value in shown:
        place = results
        for key in path.split("."):
            place = place[key]
        assert float(value) == place, path


# ---------------------------------------------------------------- docs/inspecting.md


def alike(shown, printed):
    """Whether two words are the same, or numbers that are near: training rounds differently on other processors."""
    numbers = [re.fullmatch(r"[~+-]?[\d,]*\.?\d+(e[+-]\d+)?", word) for word in (shown, printed)]
    if not all(numbers):
        return shown == printed or all("[" in word or "▁" in word for word in (shown, printed))
    one, other = (float(word.strip("~").replace(",", "")) for word in (shown, printed))
    return abs(one - other) <= max(0.1 * abs(one), 0.05)


def printed_by(line, folder):
    """Run a command in a folder; ours in this process, where torch is there already."""
    if line.startswith("alr-kernels ") and ">" not in line:
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
        return done.stdout
    ours = f'"{sys.executable}" -m alr_kernels '
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = line.replace("alr-kernels ", ours, 1)
    done = subprocess.run(
        ["bash", "-ec", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_shows_what_is_printed(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "inspecting.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    examples = 0
    for kind, body in re.findall(r"```(python|console)\n(.*?)```", text, re.DOTALL):
        if kind == "python":
            exec(body, {"__name__": "page"})
            continue
        for example in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            line, _, shown = example.partition("\n")
            printed = printed_by(line, tmp_path)
            words = zip_longest(shown.split(), printed.split())
            differing = [pair for pair in words if None in pair or not alike(*pair)]
            assert len(differing) <= 0.02 * len(printed.split()), (line, differing)
            examples += 1
    assert examples == 10
