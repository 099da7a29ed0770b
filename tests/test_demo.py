"""The demo: its texts, its comparison, and the whole command at its smallest."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import subprocess
import sys
import tokenize
from itertools import combinations

import pytest
from typer.testing import CliRunner

from alr_kernels.demo import corpus
from alr_kernels.demo.frontier import general_at, lower_envelope, shared_level

pytest.importorskip("transformers", reason="the demo needs transformers")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"
TIMINGS = ("optimizer_ms", "step_ms")
ARMS = {"AdamW": 3, "L2-SP": 3, "ALR coupled": 3, "ALR proximal": 3}


# ---------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def texts():
    return corpus.build(80_000)


def test_no_file_is_in_two_splits_of_either_text(texts):
    general, domain = texts
    for left, right in combinations(corpus.SPLITS, 2):
        seen_left = {*general.sources[left], *domain.sources[left]}
        seen_right = {*general.sources[right], *domain.sources[right]}
        assert seen_left
        assert not seen_left & seen_right


def test_every_split_has_text_of_both_kinds(texts):
    for one in texts:
        assert all(len(one.texts[split]) > 4_000 for split in corpus.SPLITS)
    assert any(source.startswith("topic:") for source in texts[0].sources["train"])


def test_building_twice_gives_the_same_bytes(texts):
    assert [one.texts for one in corpus.build(80_000)] == [one.texts for one in texts]


def test_domain_text_has_neither_comments_nor_bare_strings(texts):
    files = dict(corpus.library_files())
    for split, sources in texts[1].sources.items():
        pieces = [corpus.read_code(files[source]) for source in sources]
        assert texts[1].texts[split].decode() == "".join(piece.strip() + "\n\n" for piece in pieces)
        for piece in pieces:
            tokens = list(tokenize.generate_tokens(io.StringIO(piece).readline))
            assert not [token for token in tokens if token.type == tokenize.COMMENT]
            assert not [node for node in ast.walk(ast.parse(piece)) if corpus._is_bare_string(node)]


CODE = '''#!/usr/bin/python
"""Module."""
import os  # why

def f(x):
    """Do."""  # and a comment

class A:
    """One."""
    "two"

    name = "# kept"  # été
    "attribute"
    def g(self): "inline"

    async def h(self):
        r"""Über
        # not a comment
        """
        é = f"""{self!r}  # kept too"""
        return é
'''


def test_strings_and_comments_go_and_the_program_stays():
    text = corpus.code_only(CODE, ast.parse(CODE))
    assert "# kept" in text
    assert "# kept too" in text
    for gone in ("Module", "why", "Do.", "and a comment", "One", "two", "été", "attribute", "inline", "Über", "usr"):
        assert gone not in text
    assert "def f(x):\n    pass" in text
    assert "def g(self): pass" in text
    compile(text, "code", "exec")


def test_a_string_that_shares_its_line_is_refused():
    source = 'x = 1; "bare"; y = 2\n'
    with pytest.raises((ValueError, SyntaxError)):
        corpus.code_only(source, ast.parse(source))


def test_a_file_that_does_not_parse_is_skipped(tmp_path):
    path = tmp_path / "old.py"
    path.write_text("print 'two'\n")
    assert corpus._parsed(path) is None


# ---------------------------------------------------------------- the comparison


def test_interpolation_between_two_points():
    assert general_at([(2.0, 0.0), (1.0, 1.0)], 1.25) == pytest.approx(0.75)


def test_interpolation_at_the_points_themselves():
    points = [(3.0, 0.0), (2.0, 0.1), (1.0, 0.4)]
    assert [general_at(points, level) for level, _ in points] == pytest.approx([0.0, 0.1, 0.4])


def test_a_level_that_was_not_reached_has_no_forgetting():
    assert general_at([(2.0, 0.0), (1.0, 1.0)], 0.99) is None
    assert general_at([], 1.0) is None


def test_a_level_above_all_points_is_the_least_trained_point():
    assert general_at([(2.0, 0.0), (1.0, 1.0)], 5.0) == 0.0


def test_points_that_go_back_do_not_bend_the_curve():
    assert lower_envelope([(2.0, 0.0), (1.5, 0.5), (1.6, 0.7), (1.0, 0.6)]) == [(1.0, 0.6), (1.5, 0.5), (2.0, 0.0)]
    assert lower_envelope([(2.0, 0.3), (2.0, 0.1), (1.0, 0.1)]) == [(1.0, 0.1)]


def test_a_run_that_forgets_nothing_more_is_flat():
    assert general_at([(2.0, 0.0), (1.0, -0.1)], 1.5) == pytest.approx(-0.1)


def test_points_of_a_run_that_diverged_are_left_out():
    assert lower_envelope([(2.0, 0.0), (math.nan, 1.0), (1.0, math.inf)]) == [(2.0, 0.0)]


def test_the_shared_level_is_the_worst_of_the_best():
    assert shared_level([[(2.0, 0.0), (1.0, 0.5)], [(2.0, 0.0), (1.3, 0.2)]]) == 1.3
    with pytest.raises(ValueError, match="finite"):
        shared_level([[(math.nan, 0.0)]])
    with pytest.raises(ValueError, match="at least one"):
        shared_level([])


# ---------------------------------------------------------------- the comparison of runs


def row(family, general, chosen=True):
    return {"family": family, "arm": family, "chosen": chosen, "general_at_level": general}


def test_the_verdict_names_the_arms_that_were_not_beaten():
    from alr_kernels.demo.comparison import verdict

    rows = [row("AdamW", 0.3), row("L2-SP", 0.2), row("L2-SP", None, False), row("ALR coupled", 0.1)]
    assert verdict(rows) == {"ALR coupled": {"holds": True, "beaten_by": []}}
    rows.append(row("ALR proximal", 0.2))
    assert verdict(rows)["ALR proximal"] == {"holds": False, "beaten_by": ["L2-SP"]}


# ---------------------------------------------------------------- the command


def run_demo(folder, *options):
    from alr_kernels.cli import app

    result = CliRunner().invoke(app, ["demo", "--fast", "--out", str(folder), "--threads", "2", *options])
    assert result.exit_code == 0, result.output
    return result.output, json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, *run_demo(folder)


def test_all_arms_are_in_the_table(fast):
    _, output, result = fast
    families = [entry["family"] for entry in result["rows"]]
    assert {family: families.count(family) for family in dict.fromkeys(families)} == ARMS
    for entry in result["rows"]:
        assert entry["arm"] in output
        assert entry["forgetting"] == pytest.approx(entry["general_after"] - entry["general_before"])
        assert entry["extra_bytes"] == (0.0 if entry["family"] == "AdamW" else 8.0)
        assert math.isfinite(entry["domain"])
        assert entry["optimizer_ms"] > 0
    assert sum(entry["chosen"] for entry in result["rows"]) == 4


def test_output_fits_the_width_and_names_the_files(fast):
    folder, output, result = fast
    assert max(map(len, output.replace(str(folder), "").splitlines())) <= 110
    for name in ("importance.safetensors", "results.json", "report/index.html"):
        assert name in output
        assert (folder / name).stat().st_size > 500
    for name in ("forgetting", "curves", "coefficients", "pull", "movement", "cost"):
        assert (folder / "report" / f"{name}.png").read_bytes().startswith(PNG)
    assert f"{result['importance']['artifact_bytes']:,}" in output


def test_the_json_says_what_was_run_and_where(fast):
    _, _, result = fast
    assert result["options"]["seed"] == 0
    assert result["versions"]["torch"]
    assert result["machine"]["threads"] == 2
    assert len(result["runs"]) == 12
    assert all(len(entry["points"]["test"]) == len(entry["points"]["validation"]) for entry in result["runs"])
    assert all(abs(sum(values.values()) - 1) < 1e-9 for values in result["coefficients"].values())
    assert result["corpus"]["domain"]["test"]["sources"]


def test_the_json_says_when_and_where_weights_moved(fast):
    _, _, result = fast
    assert all(entry["steps"] == [0, 8, 16] for entry in result["runs"])
    assert all(len(entry["points"]["test"]) == 3 for entry in result["runs"])
    assert set(result["movement"]) == set(result["selection"]["chosen"].values())
    for moves in result["movement"].values():
        assert sum(moves["count"]) == result["parameters"]
        assert sum(mean is not None and mean > 0 for mean in moves["mean_square_move"]) > 5
    assert sum(row["share"] for row in result["pull"]["modules"]) == pytest.approx(1)
    assert result["pull"]["values"] == result["coefficients"][result["selection"]["rule"]]


def test_the_report_is_that_of_the_results(fast):
    from alr_kernels.report.page import html
    from alr_kernels.report.results import page_of

    folder, _, _ = fast
    assert html(page_of(folder)) == (folder / "report" / "index.html").read_text(encoding="utf-8")


def test_the_saved_artifact_loads(fast):
    from alr_kernels import Importance

    folder, _, result = fast
    importance = Importance.load(folder / "importance.safetensors")
    assert importance.steps == result["importance"]["steps"] > 0
    assert sum(tensor.numel() for tensor in importance.values()) == result["parameters"]


@pytest.mark.slow
def test_a_seed_gives_the_same_table(fast, tmp_path):
    def table(result):
        return [{key: value for key, value in entry.items() if key not in TIMINGS} for entry in result["rows"]]

    _, again = run_demo(tmp_path)
    assert table(again) == table(fast[2])


@pytest.mark.slow
def test_gptj(tmp_path):
    output, result = run_demo(tmp_path, "--arch", "gptj")
    assert result["options"]["arch"] == "gptj"
    assert any(layer.startswith("transformer.h.") for layer in result["coefficients"]["softmax"])
    assert "ALR proximal" in output


def test_full_models_have_about_800_thousand_parameters():
    from alr_kernels.demo.models import build_model

    for arch in ("llama", "gptj"):
        assert 7.5e5 < sum(param.numel() for param in build_model(arch, 0).parameters()) < 9e5


def test_missing_packages_are_named_in_one_line(monkeypatch):
    from alr_kernels.cli import app

    monkeypatch.setattr(sys.modules["alr_kernels.cli.demo"], "NEEDS", ("no_such_package",))
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2
    assert result.output.strip() == 'The demo needs no_such_package: pip install "alr-kernels[demo]"'


def test_help_answers_without_importing_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from alr_kernels.cli import app; "
        "result = CliRunner().invoke(app, ['--help']); assert 'demo' in result.output, result.output; "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "COLUMNS": "100"})
