"""What a command says when something is wrong: one message and an exit code; a traceback only of a bug.

Exit codes: 0 done; 1 done, and what was found is bad (also a bug, with its traceback); 2 bad input or surroundings,
nothing was lost; 130 interrupted.
"""

from __future__ import annotations

import errno
import linecache
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

PACKAGE = str(Path(__file__).parent.parent)
FULL = (errno.ENOSPC, errno.EDQUOT)
# What libraries say of a full disk; torch's writer of checkpoints says only that it was cut off.
FULL_TEXTS = ("No space left on device", "os error 28", "Not enough disk space", "Disk quota exceeded")
CUT_OFF_TEXTS = ("iostream error", "inline_container.cc")
MEMORY_TEXTS = ("out of memory", "DefaultCPUAllocator", "not enough memory")
OTHER_RANK_TEXTS = ("Connection closed by peer", "Connection reset by peer")
EXTRAS = {
    **dict.fromkeys(("transformers", "datasets", "accelerate", "tokenizers", "yaml", "pyarrow", "jinja2"), "train"),
    "peft": "peft",
    "matplotlib": "report",
    "tensorboard": "all",
    "bitsandbytes": "all",
}  # module → the extra that brings it
LESS_MEMORY = (
    "Smaller --batch with a larger --accumulate trains the same; --gradient-checkpointing, --max-length, --dtype bf16, "
    "--state-dtype int8, --tune-importance-dtype int4 and --lora default need less, too; begin anew with --overwrite. "
    "`alr-kernels plan` counts what a model needs."
)


@contextmanager
def clean(verb: str, debug: bool = False, silent: bool = False) -> Iterator[None]:
    """Turn errors that the user can mend into one line on stderr and exit code 2; a bug shows its traceback.

    Args:
        verb: what begins the line.
        debug: let errors through.
        silent: say nothing of errors that the user can mend: another process of the job says the same.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        if _is_first():
            typer.echo(f"\n{_prefix(verb)}{_interrupted(stopped)}", err=True)
        raise typer.Exit(130) from stopped
    except Exception as error:
        if debug or hasattr(error, "exit_code") or isinstance(error, BrokenPipeError):
            raise  # typer's own, and a pipe that was closed
        said = message(error)
        if said is None:
            traceback.print_exception(error)
            said = (
                f"{type(error).__name__}: this is a bug in alr_kernels, or in what it uses. Please report it with the "
                "lines above and what `alr-kernels doctor` prints."
            )
            typer.echo(_prefix(verb) + said, err=True)
            raise typer.Exit(1) from error
        if not (silent or _told_by_rank_0(error)):
            typer.echo(_prefix(verb) + said, err=True)
        raise typer.Exit(2) from error


def message(error: BaseException) -> str | None:
    """Return what to say of an error that the user can mend, or None of a bug."""
    chain = list(_chain(error))
    texts = [str(link) for link in chain]
    if any(getattr(link, "errno", None) in FULL for link in chain) or _has(texts, FULL_TEXTS):
        return _full(chain)
    if isinstance(error, MemoryError) or any(type(link).__name__ == "OutOfMemoryError" for link in chain):
        return _memory(error)
    if isinstance(error, RuntimeError) and _has(texts[:1], MEMORY_TEXTS):
        return _memory(error)
    if _raised_by_us(error):
        return str(error) or type(error).__name__
    if isinstance(error, RuntimeError) and _has(texts[:1], CUT_OFF_TEXTS):
        return f"torch could not write a checkpoint; most often no space is left on the device ({_first(error)})."
    if isinstance(error, OSError):
        return _system(error)
    if isinstance(error, ImportError):
        return _import(error)
    if _of_another_rank(error):
        return f"another process of this job ended first, and its message says why ({_first(error)})."
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it came from."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _has(texts: list[str], parts: tuple[str, ...]) -> bool:
    return any(part in text for text in texts for part in parts)


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _raised_by_us(error: BaseException) -> bool:
    """Whether a statement of this package raised it: a check of what it was given, not an accident."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].filename.startswith(PACKAGE):
        return False
    return linecache.getline(frames[-1].filename, frames[-1].lineno or 0).lstrip().startswith("raise ")


def _full(chain: list[BaseException]) -> str:
    names = [getattr(link, "filename", None) for link in chain]
    name = next((name for name in names if name), None)
    return (
        f"no space left on the device{f' for {name}' if name else ''}: free some, or choose another folder. What was "
        "whole before is still whole; --resume goes on from the last checkpoint."
    )


def _memory(error: BaseException) -> str:
    said = ". ".join(_first(error).split(". ")[:2]).rstrip(".")  # how much was asked for; torch goes on at length
    return f"out of memory: {said}. {LESS_MEMORY}"


def _system(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return str(error) or type(error).__name__
    hint = "; its owner and rights forbid it" if isinstance(error, PermissionError) else ""
    return f"{error.filename}: {error.strerror}{hint}."


def _import(error: ImportError) -> str | None:
    module = (error.name or "").partition(".")[0]
    if module == "alr_kernels":
        return None
    if isinstance(error, ModuleNotFoundError) and module in EXTRAS:
        return f'this needs {module}: pip install "alr-kernels[{EXTRAS[module]}]"'
    return f"{_first(error)}. Is {module or 'it'} installed, in a version that fits? --debug shows who asks for it."


def _of_another_rank(error: BaseException) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or (isinstance(error, RuntimeError) and _has([str(error)], OTHER_RANK_TEXTS))


def _interrupted(stopped: KeyboardInterrupt) -> str:
    from ..finetune.progress import Interrupted, Stopped

    if isinstance(stopped, Interrupted):
        return str(stopped)
    if not isinstance(stopped, Stopped):
        return "interrupted."
    if stopped.checkpoint is None:
        return f"{stopped}, before a checkpoint was taken. The same command with --resume begins this phase anew."
    return f"{stopped}, which is saved. The same command with --resume goes on from there."


def _told_by_rank_0(error: Exception) -> bool:
    """Whether this is rank 0's error, which every process of the job raises."""
    frames = traceback.extract_tb(error.__traceback__)
    return not _is_first() and bool(frames) and frames[-1].name == "on_first"


def _is_first() -> bool:
    from .. import _environment

    return _environment.launched()[0] == 0


def _prefix(verb: str) -> str:
    """Return what begins every message; of a job of many processes, which of them speaks."""
    from .. import _environment

    rank = _environment.launched()[0]
    return f"alr-kernels {verb}: " if rank == 0 else f"[rank {rank}] alr-kernels {verb}: "
