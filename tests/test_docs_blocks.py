"""Every code block of the documentation runs, in the order of its page, in an empty folder.

```python                       blocks that follow each other are one program
```console                      lines after "$ " are commands, what is below them is what they print
```bash                         every line is a command
```yaml title="tune.yaml"       a file of that name, for the commands below
```... title="... (not run by the tests)"   is not; NOT_RUN says how many there are
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)(?P<rest>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
SHELLS = ("console", "bash", "sh", "shell")
SHOWN = ("text", "json", "jsonl", "yaml", "csv", "")  # not run; of no language: formulas and tables
MARK = "not run by the tests"
ELSEWHERE = {"trainers.md", "distributed.md"}  # excerpts of docs/examples, which test_examples.py holds to them
NOT_RUN = {"evaluation.md": 2, "index.md": 1, "performance.md": 1, "quickstart.md": 4, "report.md": 1}
SLOW = {"evaluation.md", "quickstart.md"}
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


class Block(NamedTuple):
    """A fenced block: its language, what its ``title`` says, and its lines without their indent."""

    kind: str
    title: str
    body: str

    @property
    def runs(self) -> bool:
        return self.kind not in SHOWN and MARK not in self.title


def blocks_of(page: str) -> list[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        title = re.search(r'title="([^"]*)"', fence["rest"])
        body = re.sub(f"^{fence['indent']}", "", fence["body"], flags=re.M)
        found.append(Block(fence["kind"], title[1] if title else "", body))
    return found


def commands_of(block: Block) -> list[str]:
    """Return the commands of a console or bash block, continued lines joined."""
    lines = block.body.replace("\\\n", " ").splitlines()
    if block.kind == "console":
        return [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def steps_of(page: str) -> list[list[str]]:
    """Return what to run, in order: Python programs as files to be, commands, and files to write."""
    steps: list[list[str]] = []
    for block in blocks_of(page):
        if block.kind == "python" and block.runs:
            if steps and steps[-1][0] == "python":
                steps[-1].append(block.body)
            else:
                steps.append(["python", block.body])
        elif block.kind in SHELLS and block.runs:
            steps += [["command", command] for command in commands_of(block)]
        elif block.kind == "yaml" and block.title.endswith(".yaml"):
            steps.append(["file", block.title, block.body])
    return steps


RUNNING = [page for page in PAGES if page not in ELSEWHERE and steps_of(page)]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in RUNNING]
)
def test_the_blocks_of_a_page_run(tmp_path: Path, page: str) -> None:
    folder, programs = tmp_path / "folder", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    command = programs / "alr-kernels"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m alr_kernels "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    shutil.copytree(DOCS / "examples" / "configs", folder / "configs")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for number, (kind, *parts) in enumerate(steps_of(page)):
        if kind == "file":
            (folder / parts[0]).write_text(parts[1], encoding="utf-8")
            continue
        if kind == "python":
            program = tmp_path / f"block{number}.py"
            program.write_text("\n".join(parts), encoding="utf-8")
            arguments = [sys.executable, str(program)]
        else:
            arguments = ["bash", "-ec", parts[0]]
        done = subprocess.run(
            arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{parts[0]}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page: str) -> None:
    """A command in a block without a language would never be run; an unknown language neither."""
    for block in blocks_of(page):
        assert block.kind in ("python", *SHELLS, *SHOWN), (page, block.kind)
        if block.kind in ("", "text"):
            assert not re.search(r"^(\$ |alr-kernels |import |from \w+ import )", block.body, re.M), (page, block.body)
        if block.kind == "console":
            assert commands_of(block), (page, block.body)


def test_few_are_not_run() -> None:
    found = {page: sum(MARK in block.title for block in blocks_of(page)) for page in PAGES}
    assert {page: count for page, count in found.items() if count} == NOT_RUN


def test_continued_commands_are_joined() -> None:
    block = Block("console", "", "$ alr-kernels plan \\\n    --gpus 1\nprinted\n$ ls\n")
    assert commands_of(block) == ["alr-kernels plan      --gpus 1", "ls"]
