"""What the README shows is what runs: its Python blocks, in order, in one process; its figures have a source."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    checks = "assert float(optimizer.penalty()) > 0 and float(tuning.penalty()) > 0"
    script.write_text("\n".join([*BLOCKS, checks]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_example_is_short() -> None:
    """The first block is what a newcomer pastes: twelve lines besides imports, model and data."""
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(("import", "from", "model", "general,"))]
    assert len(own) <= 12


def test_the_lora_example_is_short() -> None:
    block = next(block for block in BLOCKS if "get_peft_model" in block)
    assert len([line for line in block.splitlines() if line.strip() and not line.startswith("from")]) <= 12


def test_named_result_files_exist() -> None:
    pages = [README, *(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))]
    named = {name for page in pages for name in re.findall(r"bench/results/[\w./-]+\.json", page)}
    assert named - {"bench/results/local.json"}
    named.discard("bench/results/local.json")
    for name in named:
        json.loads((ROOT / name).read_text(encoding="utf-8"))


def test_line_counts_are_true() -> None:
    rows = re.findall(r"\[`(alr_kernels/[\w/]+\.py)`\]\([^)]*\) \| (\d+) \|", README)
    assert len(rows) == 10
    for name, lines in rows:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == int(lines), name


PAGES = [*(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))), "CONTRIBUTING.md", "README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page: str) -> None:
    text = re.sub(
        r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL
    )  # code has brackets, too
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
