"""Reports as a reader sees them, in headless Chromium: wide and narrow, light and dark, and on paper."""

from __future__ import annotations

import json
import math
import re

import chromium
import pytest
import report_cases

pytest.importorskip("matplotlib", reason="reports are drawn by matplotlib")
pytestmark = pytest.mark.skipif(chromium.FOUND is None, reason=chromium.MISSING)

WIDE, PHONE = 1200, 360
CASES = ("run", "without_general", "demo", "demo_lora")
SIZES = pytest.mark.parametrize("width", [WIDE, PHONE])
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])

# Of every text that is visible: what it says, its colour and the surface behind it, as [r, g, b].
TEXTS = """(() => {
  const colour = css => css.match(/[\\d.]+/g).map(Number);
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const found = colour(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const texts = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("script, title, desc")) continue;
    const style = getComputedStyle(node), inside = node.closest("svg");
    texts.push([walker.currentNode.data, colour(inside ? style.fill : style.color).slice(0, 3), behind(node)]);
  }
  return texts;
})()"""

# Of every chart that is visible: its id, its size, the sizes of its paths, and the boxes of its level texts.
CHARTS = """[...document.querySelectorAll("figure svg")].filter(svg => svg.checkVisibility()).map(svg => {
  const box = node => { const b = node.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  const texts = [...svg.querySelectorAll("text")];
  return {
    section: svg.closest("section").id,
    box: box(svg),
    paths: [...svg.querySelectorAll("path, use")].map(path => path.getBBox()).map(b => [b.width, b.height]),
    texts: texts.map(text => [text.textContent, ...box(text)]),
    level: texts.filter(text => / ?rotate\\(-?0 /.test(text.getAttribute("transform") || "rotate(0 "))
      .map(text => [text.textContent, ...box(text)]),
  };
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    running = chromium.Chromium(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


class Pages(dict):
    """Case → its page, written when it is first looked at."""

    def __init__(self, factory):
        self.factory = factory

    def __missing__(self, case):
        self[case] = report_cases.written(case, self.factory.mktemp(case))
        return self[case]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return Pages(tmp_path_factory)


def contrast(one, other):
    def luminance(colour):
        parts = [part / 255 for part in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("case", CASES)
def test_it_loads_alone_and_without_errors(browser, pages, case):
    browser.open(pages[case], width=WIDE)
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert browser.console == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [pages[case].as_uri()]


def test_the_browser_would_tell_of_errors_and_requests(browser, pages, tmp_path):
    """So that the test above can fail: a page that asks for what is not there."""
    broken = pages["run"].read_text(encoding="utf-8").replace("default-src 'none'; ", "default-src * 'unsafe-inline'; ")
    broken = broken.replace("</main>", '<img src="no.png"><script>throw new Error("thrown")</script></main>')
    page = tmp_path / "broken.html"
    page.write_text(broken.replace("img-src data:", ""), encoding="utf-8")
    browser.open(page, width=WIDE)
    assert any("ERR_FILE_NOT_FOUND" in line for line in browser.console), browser.console
    assert any("Uncaught" in line for line in browser.console), browser.console
    assert any(url.endswith("no.png") for url in browser.requests)


@SIZES
@pytest.mark.parametrize("case", CASES)
def test_charts_are_drawn_and_their_labels_apart(browser, pages, case, width):
    browser.open(pages[case], width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    charts = browser.evaluate(CHARTS)
    assert [chart["section"] for chart in charts] == report_cases.drawn(case)
    for chart in charts:
        left, top, right, bottom = chart["box"]
        assert right - left > 0.8 * min(width, 700) - 60
        assert bottom - top > 100
        assert sum(w > 20 or h > 20 for w, h in chart["paths"]) >= 4, chart["section"]
        for text, x, y, beyond, below in chart["texts"]:
            assert left - 2 <= x < beyond <= right + 2, (chart["section"], text)
            assert top - 2 <= y < below <= bottom + 2, (chart["section"], text)
        for place, (text, x, y, beyond, below) in enumerate(chart["level"]):
            for other, x2, y2, beyond2, below2 in chart["level"][:place]:
                apart = min(beyond, beyond2) - max(x, x2) < 1 or min(below, below2) - max(y, y2) < 3
                assert apart, (chart["section"], text, other)


@SCHEMES
@pytest.mark.parametrize("case", ["run", "demo"])
def test_text_is_readable(browser, pages, case, scheme):
    browser.open(pages[case], width=WIDE, scheme=scheme)
    browser.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    texts = browser.evaluate(TEXTS)
    assert len(texts) > 300
    for text, colour, background in texts:
        assert contrast(colour, background) >= 4.5, (text, colour, background)
    surfaces = {tuple(background) for _, _, background in texts}
    assert all((sum(surface) > 600) == (scheme == "light") for surface in surfaces)


def test_paper_is_light_and_shows_the_tables(browser, pages):
    browser.open(pages["run"], width=WIDE, scheme="dark", media="print")
    assert browser.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--surface')") == "#ffffff"
    heights = browser.evaluate("[...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().height)")
    assert min(heights) > 20


def embedded(browser):
    return json.loads(browser.evaluate("document.getElementById('results').textContent"))


def table(browser, section):
    """Return the cells of a section's first table: (value of its data element, or None, text)."""
    return browser.evaluate(
        f"[...document.querySelector('#{section} table tbody').rows].map(row => [...row.cells].map("
        "cell => [cell.querySelector('data')?.value ?? null, cell.textContent]))"
    )


@pytest.mark.parametrize("case", CASES)
def test_the_embedded_numbers_are_those_of_the_file(browser, pages, case):
    browser.open(pages[case], width=WIDE)
    assert embedded(browser) == json.loads((pages[case].parent / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_every_number_shown_is_its_value_rounded(browser, pages, case):
    browser.open(pages[case], width=WIDE)
    found = browser.evaluate("[...document.querySelectorAll('data')].map(data => [data.value, data.textContent])")
    assert len(found) > 50
    for value, text in found:
        assert float(re.sub("[,+]", "", text).replace("−", "-")) == pytest.approx(float(value), rel=6e-4, abs=1e-300)


@pytest.mark.parametrize("case", CASES)
def test_the_first_numbers_are_where_they_say_in_the_json(browser, pages, case):
    browser.open(pages[case], width=WIDE)
    found = browser.evaluate(
        "[...document.querySelectorAll('[data-path]')].map(data => [data.dataset.path, data.value])"
    )
    assert found
    for path, value in found:
        place = embedded(browser)
        for key in path.split("."):
            place = place[key]
        assert float(value) == place, path


def test_the_tables_behind_the_charts_are_the_json(browser, pages):
    browser.open(pages["run"], width=WIDE)
    results = embedded(browser)

    def numbers(rows, first=1):
        return [[None if value is None else float(value) for value, _ in row[first:]] for row in rows]

    curves = [entry for phase in ("tune", "plain") for entry in results["curves"][phase]]
    assert numbers(table(browser, "curves")) == [[e["step"], e["domain"], e["general"]] for e in curves]
    assert numbers(table(browser, "tradeoff")) == [[e["domain"], e["general"]] for e in curves]
    logged = [entry for phase in ("tune", "plain", "record") for entry in results["log"][phase]]
    assert numbers(table(browser, "loss")) == [[e["step"], e["loss"]] for e in logged]
    modules = {(e["layer"], e["module"]): [e["alpha"], e["mass"], 100 * e["share"]] for e in
               results["coefficients"]["modules"]}  # fmt: skip
    rows = table(browser, "coefficients")
    assert {(row[0][1], row[1][1]): numbers([row], 2)[0] for row in rows} == modules
    moves = results["movement"]
    filled = [b for b, count in enumerate(moves["tune"]["count"]) if count]
    roots = [[math.sqrt(moves[phase]["mean_square_move"][b]) for phase in ("tune", "plain")] for b in filled]
    counts = [moves["tune"]["count"][b] for b in filled]
    assert numbers(table(browser, "movement")) == [[n, *two] for n, two in zip(counts, roots, strict=True)]
    costs = {row[0][1]: numbers([row])[0] for row in table(browser, "cost")}
    assert costs["bytes: importance"][0] == results["cost"]["bytes"]["importance"]
    assert costs["step: tuned"][1:] == list(results["cost"]["step_ms"]["tune"].values())
