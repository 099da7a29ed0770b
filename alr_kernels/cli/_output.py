"""What reaches the terminal: progress and remarks on stderr, nothing of other libraries, results on stdout."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..finetune.progress import Progress, Tick

if TYPE_CHECKING:
    from rich.console import Console

PACKAGE = str(Path(__file__).parent.parent)
LIBRARIES = ("transformers", "datasets", "accelerate", "peft", "huggingface_hub", "bitsandbytes", "torch", "filelock")
# Read when the libraries are imported; what the user has set stays.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # DDP warns of what Trainer chose for it
}
EVERY, SHARE = 15.0, 10  # where no bar can be drawn: a line each so many seconds, and a tenth of a phase at least
PIPED = 100  # columns of a table that goes to no terminal


@contextmanager
def quiet(verb: str, main: bool = True, debug: bool = False) -> Iterator[None]:
    """Silence other libraries, and show warnings of this package as one line each, on the main process alone."""
    if debug:
        yield
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not (main and sys.stderr.isatty()):  # a download of gigabytes is worth a bar
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)

    def show(
        message: Warning | str, category: type[Warning], filename: str, line: int,
        file: TextIO | None = None, text: str | None = None,
    ) -> None:  # fmt: skip
        if main and _is_ours():
            print(f"alr-kernels {verb}: warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]  # its stub has other parameters
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _is_ours() -> bool:
    """Whether the code that warns is this package's, wherever its warning points to."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in ("warnings", "_py_warnings"):
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)


class Shown(Progress):
    """Progress on stderr: a bar for each phase on a terminal, a line now and then elsewhere."""

    def __init__(self, verb: str, console: Console, unit: str = "steps") -> None:
        self.verb, self.console, self.unit = verb, console, unit
        self._bars: Any = None

    def __enter__(self) -> Shown:
        if self.console.is_terminal:
            from rich import progress

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(), progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"), console=self.console,
            )  # fmt: skip
            self._bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bars is not None:
            self._bars.stop()

    def phase(self, name: str, total: int, done: int = 0) -> Tick:
        """Show a phase."""
        if self._bars is None:
            return self._lines(name, total, done)
        task = self._bars.add_task(name, total=total, completed=done, note="")

        def tick(step: int, note: str = "") -> None:
            more = {"note": note} if note else {}
            self._bars.update(task, completed=step, **more)

        return tick

    def _lines(self, name: str, total: int, done: int) -> Tick:
        begin = time.monotonic()
        told, at, last = begin, done, ""
        self.say(f"{name}: {total} {self.unit}" + (f", from step {done} on" if done else ""))

        def tick(step: int, note: str = "") -> None:
            nonlocal told, at, last
            last, now = note or last, time.monotonic()
            if step == total and at != total:
                of = f", {total} in all" if done else ""
                self.say(f"{name}: {total - done} {self.unit} in {_duration(now - begin)}{of}")
                told, at = now, step
            elif step < total and now - told >= EVERY and step - at >= total / SHARE:
                left = (now - begin) / max(step - done, 1) * (total - step)
                note = f", {last}" if last else ""
                self.say(f"{name}: {step} of {total}, {_duration(left)} left{note}")
                told, at = now, step

        return tick

    def say(self, text: str) -> None:
        """Show one line, above the bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    """Return a time as people read it.

    >>> _duration(7), _duration(130), _duration(4000)
    ('7 s', '2 min', '1 h 7 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table_console() -> Console:
    """Return the console for tables: as wide as the terminal or $COLUMNS say, and wide enough to read in a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else shutil.get_terminal_size((PIPED, 24)).columns)
