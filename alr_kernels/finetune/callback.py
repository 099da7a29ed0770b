"""What happens around the steps of a phase: log and measure, time, save whole checkpoints, stop when asked to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _ranks, _validate_models
from .._files import to_disk
from ..integrations.transformers import WHOLE, AlrCallback, last_checkpoint
from ..integrations.watching import numbers
from .cost import Clock

if TYPE_CHECKING:
    from .trainer import PhaseTrainer


class AlreadyThere(Exception):  # noqa: N818 - no error: the way out of a training that has no step left
    """The checkpoint that training goes on from is that of the last step."""


class PhaseCallback(AlrCallback):
    """The callback of :class:`PhaseTrainer`.

    Args:
        trainer: whose phase it is.
        record_after: ω begins anew after this step; 0: it is recorded from the start.
        keep: checkpoints that stay.
    """

    def __init__(self, trainer: PhaseTrainer, *, record_after: int, keep: int) -> None:
        super().__init__(trainer)
        self._record_after, self._keep = record_after, keep
        self.clock = Clock(trainer.args.device)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what is due and was not measured yet; leave where no step is left."""
        super().on_train_begin(args, state, control, **kwargs)
        trainer = self._trainer
        if trainer.due(state.global_step) and not trainer.is_measured(state.global_step):
            trainer.evaluate()
        if state.global_step >= state.max_steps or trainer.stopped:
            raise AlreadyThere

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to time a step."""
        self.clock.mark("begin", state.global_step + 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to time the optimizer."""
        self.clock.mark("pre", state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End to time the optimizer."""
        self.clock.mark("post", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time, begin recording, and ask for what is due: a measurement, a checkpoint, an end."""
        trainer, step = self._trainer, state.global_step
        self.clock.mark("end", step)
        if step == self._record_after and self.optimizer is not None and self.optimizer.record:
            self.optimizer.restart_recording()
        control.should_evaluate = trainer.due(step)
        control.should_save = step % trainer.phase.save_every == 0 or step >= state.max_steps
        if trainer.asked_to_stop():
            control.should_save = control.should_training_stop = True
        trainer.phase.tick(step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add what the pull does to an entry that holds the loss of training steps, and write it down."""
        optimizer = self.optimizer
        if optimizer is None or logs is None or "loss" not in logs:
            return
        trainer = self._trainer
        _validate_models.finite_loss(trainer.phase.name, state.global_step, logs["loss"])
        found = numbers(optimizer, logs["loss"])
        if optimizer.grad_norm is not None:
            found["grad_norm"] = float(optimizer.grad_norm)
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)
        line = {"loss": logs["loss"], "lr": logs["learning_rate"], **found}
        trainer.write(state.global_step, line)
        trainer.phase.tick(state.global_step, f"loss {logs['loss']:.4g}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as whole once all of it is on disk; then delete older ones."""
        trainer = self._trainer
        _validate_models.finite_loss(trainer.phase.name, state.global_step, trainer.losses_so_far())
        _ranks.wait()  # every rank has written its part
        if args.should_save:
            home = Path(args.output_dir)
            folder = home / f"checkpoint-{state.global_step}"
            for path in [*folder.rglob("*"), folder]:
                to_disk(path)
            (folder / WHOLE).touch()
            to_disk(folder)
            tidy(home, self._keep)
        _ranks.wait()
        trainer.saved = state.global_step


def tidy(home: Path, keep: int) -> None:
    """Delete checkpoints that are not whole, and of the whole ones all but the latest; the mark goes first."""
    latest = last_checkpoint(home)
    if latest is None:
        found: list[Path] = []
    else:
        whole = [path.parent for path in home.glob(f"checkpoint-*/{WHOLE}")]
        found = sorted(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))[-keep:]
    for path in home.glob("checkpoint-*"):
        if path not in found and path.name.removeprefix("checkpoint-").isdigit():  # others no run wrote
            (path / WHOLE).unlink(missing_ok=True)
            shutil.rmtree(path)
