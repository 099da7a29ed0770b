"""Reports of runs in which a phase has no time of a step: of an estimator, or resumed when all steps were done."""

from __future__ import annotations

import pytest
import report_cases

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from alr_kernels.report import page, run_page

UNTIMED = {"optimizer": None, "whole": None}


@pytest.mark.parametrize("phases", [["record"], ["tune"], ["record", "tune", "plain"]])
def test_a_phase_without_a_timed_step_is_left_out(phases):
    results = report_cases.run()
    results["cost"]["step_ms"] |= dict.fromkeys(phases, UNTIMED)
    found = run_page.page(results)
    assert ("a tuning step" in [number.label for number in found.numbers]) == ("tune" not in phases)
    chart = next(chart for chart in found.charts if chart.key == "cost")
    timed = {row[0] for row in chart.rows if str(row[0]).startswith("step: ")}
    assert timed == {f"step: {run_page.STYLE[name][0]}" for name in ("record", "tune", "plain") if name not in phases}
    assert 'id="cost"' in page.html(page.Page("", "", [], [chart]))
