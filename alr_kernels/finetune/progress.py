"""What a run says while it goes on, and how it stops: the command line shows it, this base says nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Tick = Callable[..., None]  # tick(step, note="")


class Progress:
    """Told of phases, steps and remarks; does nothing with them. For Python callers, and for ranks other than 0."""

    def phase(self, name: str, total: int, done: int = 0) -> Tick:
        """Begin a phase of ``total`` steps, of which ``done`` are done; return ``tick(step, note="")``.

        >>> tick = Progress().phase("recording", 100)
        >>> tick(1, "loss 2.31")
        """

        def tick(step: int, note: str = "") -> None:
            pass

        return tick

    def say(self, text: str) -> None:
        """Tell one line."""


class Interrupted(KeyboardInterrupt):
    """A run that was interrupted elsewhere than after a step; its text says what is left and how to go on."""


class Stopped(KeyboardInterrupt):
    """A run that was interrupted after a whole step.

    Args:
        step: the last one that is done.
        checkpoint: from which ``--resume`` goes on, or None where the phase has none yet and begins again.
    """

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.checkpoint = step, checkpoint
