"""The examples run, forget less with the pull and resume bit for bit; docs/trainers.md shows their very lines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NEEDED = {
    "plain_torch": ["transformers"],
    "hf_trainer": ["transformers", "accelerate"],
    "trl_sft": ["trl", "datasets"],
    "accelerate_loop": ["transformers", "accelerate"],
    "lightning_module": ["transformers", "lightning"],
}
LAUNCHED = "fsdp2"  # by test_killed.py
SECTIONS = {
    "Plain torch": "plain_torch", "Hugging Face Trainer": "hf_trainer", "TRL": "trl_sft",
    "Accelerate": "accelerate_loop", "Lightning": "lightning_module",
}  # fmt: skip


def source(name):
    return (DOCS / "examples" / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED)
def test_an_example_forgets_less_and_resumes(tmp_path, name):
    for module in NEEDED[name]:
        pytest.importorskip(module, reason=f"{module} is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(DOCS / "examples" / f"{name}.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"model"')]
    before, plain, tuned = rows
    assert [row["model"] for row in rows] == ["before", "plain", "tuned"]
    assert plain["general"] > before["general"] + 0.1
    assert tuned["general"] - before["general"] < 0.75 * (plain["general"] - before["general"])
    assert tuned["domain"] < before["domain"] - 0.5
    assert all(row["resumed"] for row in rows)


@pytest.mark.parametrize("name", [*NEEDED, LAUNCHED])
def test_an_example_is_short(name):
    assert len(source(name).splitlines()) <= 60


def test_the_docs_show_lines_that_run():
    """Each block of the page is a part of its example, and short; each example is there."""
    page = (DOCS / "trainers.md").read_text(encoding="utf-8")
    shown = set()
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        title = section.splitlines()[0]
        if not blocks:
            assert title not in SECTIONS
            continue
        for block in blocks:
            assert f"\n{block}" in source(SECTIONS[title]), f"{title}: the page shows what the example does not run"
            assert len([line for line in block.splitlines() if line.strip()]) <= 12
        shown.add(title)
    assert shown == set(SECTIONS)
    assert set(SECTIONS.values()) == set(NEEDED)
    assert {path.stem for path in (DOCS / "examples").glob("*.py")} == {*NEEDED, LAUNCHED}
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "distributed.md").read_text(encoding="utf-8"), re.DOTALL)
    assert f"\n{block}" in source(LAUNCHED)
    assert len([line for line in block.splitlines() if line.strip()]) <= 12


def test_the_docs_name_what_is_logged():
    """Every name of the page is logged, and the other way round."""
    from alr_kernels.integrations import watching

    page = (DOCS / "trainers.md").read_text(encoding="utf-8")
    names = set(re.findall(r"^\| `(alr/[\w/]+)`", page, re.MULTILINE))
    assert names == set(re.findall(r"^    (alr/[\w/]+) ", watching.numbers.__doc__, re.MULTILINE))
    assert len(names) == 6
