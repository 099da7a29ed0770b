"""Reports: what is on the page and in it, that the same results give the same bytes, and what is left out and why."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import report_cases
from typer.testing import CliRunner

pytest.importorskip("matplotlib", reason="reports are drawn by matplotlib")

from alr_kernels.report import charts, demo_page, palette, run_page, run_words, svg
from alr_kernels.report.drawing import FAINTEST, STRONGEST, duration
from alr_kernels.report.page import Absent, Chart, Number, Page, Table, embedded, html, shown, write

VOID = ("meta", "link", "br", "img", "input", "hr")


class Reader(HTMLParser):
    """Collects ids, references, attributes, text by section, and whether every element is closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.ids, self.references, self.elements, self.open, self.sections, self.script = [], [], [], [], {}, ""
        self.feed(text)
        self.close()
        assert self.open == [], "not closed"

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.elements.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.references += re.findall(r"url\(#([^)]*)\)", " ".join(str(value) for value in found.values()))
        self.references += found.get("aria-labelledby", "").split()
        if found.get("href", "").startswith("#"):
            self.references.append(found["href"][1:])
        if tag not in VOID:
            self.open.append((tag, found.get("id")))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.script += data
        section = next((name for tag, name in reversed(self.open) if tag == "section"), None)
        self.sections[section] = self.sections.get(section, "") + data


def page_of(results):
    return (demo_page if results["kind"] == "demo" else run_page).page(results)


@pytest.fixture(scope="module")
def whole():
    text = html(page_of(report_cases.run()))
    return text, Reader(text)


def only(page, *keys):
    return replace(page, charts=[chart for chart in page.charts if chart.key in keys])


def line(x, y):
    def draw(figure):
        figure.subplots().plot(x, y, color=palette.VERMILLION, marker="o")

    return draw


def small(**options):
    chart = Chart("line", "A line", "It rises.", line([0, 1, 2], [1.0, 2.0, 4.0]), ["x", "y"], [[0, 1.0], [1, None]])
    return Page(**{"title": "T", "subtitle": "s", "summary": ["One."], "charts": [chart], "data": {"a": 1.5}} | options)


def test_every_id_is_unique_and_every_reference_is_met(whole):
    _, reader = whole
    assert len(reader.ids) == len(set(reader.ids))
    assert len(reader.references) > 50
    assert set(reader.references) <= set(reader.ids)


def test_nothing_is_fetched(whole):
    text, reader = whole
    for tag, attributes in reader.elements:
        assert "src" not in attributes
        assert tag not in ("img", "iframe", "object", "embed", "audio", "video", "base", "form")
        for name in ("href", "xlink:href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:,")), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in text
    assert re.search(r"url\((?!#)", text) is None
    assert re.search(r"https?:", text) is None
    assert [attributes["type"] for tag, attributes in reader.elements if tag == "script"] == ["application/json"]


def test_colours_of_charts_are_the_pages(whole):
    for drawing in re.findall(r"<svg.*?</svg>", whole[0], re.DOTALL):
        assert re.search(r"#[0-9a-fA-F]{6}\b", drawing) is None
        assert {*re.findall(r"var\(--(\w+)\)", drawing)} <= {colour.name for colour in palette.COLOURS}


def test_it_is_said_to_those_who_do_not_see(whole):
    _, reader = whole
    tags = [tag for tag, _ in reader.elements]
    assert tags.count("h1") == 1
    assert ("html", {"lang": "en"}) in reader.elements
    pictures = [attributes for tag, attributes in reader.elements if tag == "svg"]
    assert len(pictures) == 2 * len(report_cases.drawn("run"))
    assert all(attributes["role"] == "img" and attributes["aria-labelledby"] for attributes in pictures)
    assert tags.count("desc") == len(pictures)
    heads = [attributes.get("scope") for tag, attributes in reader.elements if tag == "th"]
    assert {*heads} == {"col", "row"}
    assert tags.count("caption") == tags.count("table")


def test_the_data_come_back_from_the_page(whole):
    assert json.loads(whole[1].script) == report_cases.run()


@pytest.mark.parametrize("case", report_cases.CASES)
def test_what_is_drawn_and_what_is_left_out(case):
    page = page_of(report_cases.CASES[case]())
    assert [chart.key for chart in page.charts if isinstance(chart, Chart)] == report_cases.drawn(case)
    for chart in page.charts:
        if isinstance(chart, Chart):
            assert chart.rows
            assert all(len(row) == len(chart.columns) for row in chart.rows), chart.key
        else:
            assert chart.why.endswith((".", "without."))
    assert all(len(row) == len(table.columns) for table in page.details for row in table.rows)


def test_a_chart_without_data_says_why():
    absent = {}
    for case in ("without_general", "without_pull"):
        page = page_of(report_cases.CASES[case]())
        absent |= {chart.key: chart.why for chart in page.charts if isinstance(chart, Absent)}
    assert "--general" in absent["tradeoff"]
    assert "λ 0" in absent["coefficients"]
    assert "λ 0" in absent["movement"]
    text = html(small(charts=[Absent("gone", "Gone", "There is none, see `--all`.")]))
    assert "<p>There is none, see <code>--all</code>.</p>" in text
    assert "<svg" not in text


def test_without_a_baseline_charts_say_how_to_get_one():
    page = page_of(report_cases.without_baseline())
    said = {chart.key: chart.note for chart in page.charts}
    assert "--baseline" in said["tradeoff"]
    assert "--baseline" in said["movement"]
    assert [number.path for number in page.numbers] == [
        "summary.domain_gain", "summary.forgetting", "cost.step_ms.tune.whole"
    ]  # fmt: skip


def test_the_same_results_give_the_same_bytes(tmp_path):
    import matplotlib

    once = {path.name: path.read_bytes() for path in write(small(), tmp_path / "a")}
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        again = {path.name: path.read_bytes() for path in write(small(), tmp_path / "b")}
    assert list(once) == ["index.html", "line.png"]
    assert once == again
    assert once["line.png"].startswith(b"\x89PNG")


def test_other_results_give_another_page():
    other = [Chart("line", "A line", "It rises.", line([0, 1, 2], [1.0, 2.0, 4.5]), ["x", "y"], [])]
    assert html(small()) != html(small(charts=other))


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    html(small())
    assert dict(matplotlib.rcParams) == before


def test_a_page_that_fails_leaves_the_old_one(tmp_path):
    index, picture = write(small(), tmp_path)
    before = index.read_bytes(), picture.read_bytes()

    def fail(figure):
        raise RuntimeError("no ink")

    with pytest.raises(RuntimeError, match="no ink"):
        write(small(title="new", charts=[Chart("line", "", "", fail, [], [])]), tmp_path)
    assert (index.read_bytes(), picture.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "line.png"]


def test_nan_and_infinity_are_null_and_leave_gaps():
    results = report_cases.run()
    results["curves"]["tune"][3] |= {"domain": math.nan, "general": math.inf}
    results["log"]["tune"][0]["loss"] = math.nan
    results["movement"]["tune"]["mean_square_move"][30] = None
    results["summary"]["plain_forgetting"] = None
    text = html(only(page_of(results), "curves", "loss", "movement"))
    loaded = json.loads(Reader(text).script)
    assert loaded["curves"]["tune"][3]["general"] is None
    for word in (">nan", ">inf", "NaN", "Infinity", '"nan'):
        assert word not in text


HOSTILE = '</script><script>alert("1")</script>&<b id=x>\'"`--x`'


def test_names_cannot_become_html():
    results = report_cases.run()
    results["model"]["name"] = results["data"]["domain"]["source"] = results["options"]["model"] = HOSTILE
    results["options"][HOSTILE] = [HOSTILE]
    results["coefficients"]["modules"][0]["layer"] = f"model.layers.7{HOSTILE}"
    reader = Reader(html(only(page_of(results), "coefficients")))
    assert [tag for tag, _ in reader.elements].count("script") == 1
    assert not [tag for tag, _ in reader.elements if tag in ("b", "alert")]
    assert json.loads(reader.script)["model"]["name"] == HOSTILE


def test_a_dollar_is_no_formula():
    """matplotlib reads $x$ as mathematics; names of layers and runs are names."""
    text = svg.inline(lambda figure: figure.subplots().set_title("a_$b$ \\frac"), "k", (4, 3), "t", "d")
    assert "a_$b$ \\frac" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1, "1"), (1234567, "1,234,567"), (12345.6, "12,346"), (9.99996, "10"), (-0.25, "−0.25"),
     (1e20, "1e+20"), (True, "yes"), ("x", "x"), (None, "—"), (math.nan, "—")],
)  # fmt: skip
def test_cells_are_shown_with_four_digits(value, text):
    assert shown(value) == text


def test_numbers_keep_their_value_beside_what_is_shown():
    text = html(small(numbers=[Number("gain", 0.123456789, "nats", "a", True), Number("none", None)]))
    assert '<data value="0.123456789" data-path="a">+0.1235</data> <span>nats</span>' in text
    assert "<b>—</b>" in text
    assert '<th scope="row">x</th><td><data value="2.5">2.5</data></td><td class="text">a&lt;b</td>' in html(
        small(details=[Table("D", ["n", "v", "w"], [["x", 2.5, "a<b"]])])
    )


def test_embedded_json_has_no_tag():
    assert json.loads(embedded({"a": HOSTILE, "b": [math.inf, "\u2028"]})) == {"a": HOSTILE, "b": [None, "\u2028"]}
    assert "<" not in embedded([HOSTILE])


def test_the_summary_says_the_numbers_of_the_results():
    results = report_cases.run()
    said = " ".join(run_words.summary(results))
    before, after, found = results["before"], results["after"], results["summary"]
    for kind in ("domain", "general"):
        assert f"from {before[kind]['nll']:.3f} to {after[kind]['nll']:.3f} nats per token" in said
        assert f"perplexity {before[kind]['perplexity']:.4g} to {after[kind]['perplexity']:.4g}" in said
    assert f"{found['domain_gain']:.3f} nats per token better" in said
    assert f"It forgot {found['forgetting']:.3f} nats" in said
    share = 100 * (1 - found["forgetting"] / found["plain_forgetting"])
    assert f"avoided {share:.0f} % of that forgetting" in said
    assert f"kept {100 * found['domain_gain'] / found['plain_domain_gain']:.0f} % of what" in said
    assert f"It took {duration(sum(results['seconds'].values()))}" in said
    assert "12.8 MB of importance and 12.8 MB of anchors" in said
    level = results["curves"]["tune"][-1]["domain"]  # the baseline went further
    near = sorted(results["curves"]["plain"], key=lambda entry: entry["domain"])
    below, above = next((a, b) for a, b in itertools.pairwise(near) if a["domain"] <= level <= b["domain"])
    part = (level - below["domain"]) / (above["domain"] - below["domain"])
    plain = below["general"] + part * (above["general"] - below["general"]) - before["general"]["nll"]
    assert f"At the same domain NLL of {level:.3f}" in said
    assert f"changed by {found['forgetting']:+.3f} with the pull and by {plain:+.3f} without" in said
    held = [charts.most_important(results["movement"][phase]) for phase in ("tune", "plain")]
    assert f"moved {held[0][2] / held[1][2]:.2g} times as far" in said


WORDS = {
    "learnt nothing": ({"domain_gain": -0.1}, "did not learn the domain"),
    "forgot nothing": ({"forgetting": -0.01}, "forgot nothing that was measured"),
    "not measured": ({"forgetting": None}, "What it forgot was not measured"),
    "worse than the baseline": ({"forgetting": 0.5, "plain_forgetting": 0.25}, "The pull forgot 100 % more"),
    "better than before": ({"forgetting": -0.05}, "The pull avoided all of that forgetting, and kept"),
    "only the baseline learnt": ({"domain_gain": -0.1}, "and kept nothing of what the baseline learnt."),
    "a baseline that forgot nothing": (
        {"plain_forgetting": -0.1},
        "(its general NLL fell by 0.100): there was nothing to save",
    ),
    "a baseline that learnt nothing": ({"plain_domain_gain": -0.1}, "of that forgetting."),
    "a baseline without general text": ({"plain_forgetting": None}, "without the pull, learnt 0.959 nats per token."),
    "no baseline": ({"plain_domain_gain": None}, "It took"),
}


@pytest.mark.parametrize("what", WORDS)
def test_words_follow_the_numbers(what):
    changed, words = WORDS[what]
    results = report_cases.run()
    results["summary"] |= changed
    assert words in " ".join(run_words.summary(results))


def test_nothing_to_save_is_not_followed_by_what_was_saved():
    results = report_cases.run()
    results["summary"]["plain_forgetting"] = -0.1
    assert "At the same domain NLL" not in " ".join(run_words.summary(results))


def test_the_demo_names_its_arms_and_numbers():
    results = report_cases.demo()
    page = page_of(results)
    assert {number.path: number.value for number in page.numbers} == {
        f"at_shared_level.{family}": value for family, value in results["at_shared_level"].items()
    }
    assert "Both chosen ALR arms forgot less" in page.summary[0]
    rows = {tuple(row[1:]) for chart in page.charts if chart.key == "curves" for row in chart.rows}
    chosen = [run for run in results["runs"] if run["label"] in results["selection"]["chosen"].values()]
    assert rows == {(step, *point) for run in chosen for step, point in
                    zip(run["steps"], run["points"]["test"], strict=True)}  # fmt: skip


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def mixed(above, below, alpha):
    return "#" + "".join(
        f"{round(alpha * int(above[i : i + 2], 16) + (1 - alpha) * int(below[i : i + 2], 16)):02x}" for i in (1, 3, 5)
    )


@pytest.mark.parametrize("form", ["light", "dark"])
def test_colours_stand_out_from_the_surface(form):
    colours = {colour.name: getattr(colour, form) for colour in palette.COLOURS}
    for name in ("vermillion", "blue", "green", "purple", "grey", "black"):
        assert contrast(colours[name], colours["surface"]) >= 3, name
    for name in ("ink", "muted", "link"):
        assert min(contrast(colours[name], colours[under]) for under in ("surface", "page")) >= 4.5, name
    for alpha in (FAINTEST, 0.5, STRONGEST):
        assert contrast(colours["ink"], mixed(colours["heat"], colours["surface"], alpha)) >= 4.5
    assert len({colour.light for colour in palette.COLOURS}) == len(palette.COLOURS)


def invoke(*arguments):
    from alr_kernels.cli import app

    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_the_page_beside_the_results(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(json.dumps(report_cases.without_pull()), encoding="utf-8")
    done = invoke(tmp_path, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["page"] == str(tmp_path / "report" / "index.html")
    assert [path.rsplit("/", 1)[1] for path in found["pictures"]] == [
        f"{key}.png" for key in report_cases.drawn("without_pull")
    ]
    assert {str(path) for path in (tmp_path / "report").iterdir()} == {found["page"], *found["pictures"]}


def test_a_bad_file_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    for target in (tmp_path, tmp_path / "nowhere.json"):
        done = invoke(target)
        assert done.exit_code == 2
        assert done.stderr.startswith("alr-kernels report: results: ")
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "report").exists()
