"""What a command says when something is wrong: one message, an exit code, no traceback unless it is asked for.

Exit codes: 0 done; 1 done, and what was found is bad; 2 bad input, nothing was lost; 130 interrupted.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def clean(verb: str, debug: bool = False) -> Iterator[None]:
    """Turn errors that the user can mend into one line on stderr and exit code 2; ``debug`` lets them through."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if debug:
            raise
        typer.echo(f"alr-kernels {verb}: {_said(error)}", err=True)
        raise typer.Exit(2) from error


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the device for {error.filename or 'a file'}: free some, or choose another folder."
    return str(error) or type(error).__name__
