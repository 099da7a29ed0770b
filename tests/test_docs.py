"""The site is built strictly, needs nothing from outside, its links and anchors hold, and what it quotes is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

from alr_kernels.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LOADING = {"script": "src", "img": "src", "link": "href", "source": "srcset", "iframe": "src", "object": "data"}
TELLING = ("canonical", "next", "prev")  # kinds of <link> that load nothing
VARYING = "…"

pytest.importorskip("mkdocs", reason="the site needs mkdocs-material")
pytest.importorskip("mkdocstrings", reason="the site needs mkdocstrings-python")
pytest.importorskip("latex2mathml", reason="the site's formulas need latex2mathml")


class _Page(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in LOADING and LOADING[tag] in found and found.get("rel") not in TELLING:
            self.loaded.append(found[LOADING[tag]])

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site into a folder of its own; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Page]:
    return {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_built(pages: dict[Path, _Page], site: Path) -> None:
    built = {path.relative_to(site).with_suffix("").as_posix() for path in pages}
    written = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    assert written <= built


def test_nothing_is_loaded_from_outside(pages: dict[Path, _Page], site: Path) -> None:
    outside = [(path.name, target) for path, page in pages.items() for target in page.loaded if urlsplit(target).netloc]
    assert not outside
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"url\(\s*[\"']?((?:https?:)?//[^)\"']+)|@import\s+[\"']((?:https?:)?//[^\"']+)", text)
        assert not found, path.name


def test_what_is_loaded_is_there(pages: dict[Path, _Page]) -> None:
    for path, page in pages.items():
        for target in page.loaded:
            local = unquote(urlsplit(target).path)
            if local and not target.startswith("data:") and path.name != "404.html":
                assert (path.parent / local).resolve().exists(), (path.name, target)


def test_links_and_anchors_hold(pages: dict[Path, _Page], site: Path) -> None:
    broken = [(path.relative_to(site).as_posix(), link) for path, page in pages.items() for link in page.links]
    assert not [(name, link) for name, link in broken if name != "404.html" and not _holds(site, name, link, pages)]


def _holds(site: Path, name: str, link: str, pages: dict[Path, _Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme in ("http", "https", "mailto"):
        return True
    target = (site / name).parent / unquote(parts.path) if parts.path else site / name
    target = target.resolve()
    target = target / "index.html" if target.is_dir() else target
    if not target.exists():
        return False
    return not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].anchors


def test_formulas_are_drawn(site: Path) -> None:
    """MathML has no TeX left in it, and none is left outside."""
    drawn = 0
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert 'class="arithmatex"' not in text, path.name
        for formula in re.findall(r"<math.*?</math>", text, re.DOTALL):
            drawn += 1
            assert "\\" not in formula, (path.name, formula)
    assert drawn > 7


def test_commands_are_all_there(pages: dict[Path, _Page], site: Path) -> None:
    page = pages[site / "commands.html"]
    words = "".join(page.words)
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert name in page.anchors
        for param in command.params:
            for flag in (*param.opts, *param.secondary_opts):
                if flag.startswith("--") and flag != "--help" and not getattr(param, "hidden", False):
                    assert flag in words, (name, flag)


def test_diagrams_are_current(tmp_path: Path) -> None:
    sys.path.insert(0, str(DOCS / "_build"))
    try:
        import diagrams
    finally:
        sys.path.remove(str(DOCS / "_build"))
    for name, draw in diagrams.DRAWN.items():
        kept = (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8")
        assert kept == draw(), f"{name}.svg: run python docs/_build/diagrams.py"


# ---------------------------------------------------------------- messages


def _literals() -> Iterator[str]:
    """Yield every string of the package, formatted values as an ellipsis."""
    for path in sorted((ROOT / "alr_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else VARYING for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r'^```text title="message"\n(.*?)\n```$', PAGE, re.DOTALL | re.MULTILINE)
LITERALS = sorted(set(_literals()), key=len, reverse=True)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:40])
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    """Its fixed parts are those of one string of the package, in order."""
    parts = [re.escape(part) for part in message.split(VARYING)]
    assert len("".join(parts)) > 10
    quoted = re.compile(".*".join(parts), re.DOTALL)
    assert any(quoted.search(literal) for literal in LITERALS), message


def test_troubleshooting_has_the_likely_ones() -> None:
    assert len(MESSAGES) >= 25
    assert "\n".join(MESSAGES).count(VARYING) > 25
