"""Lightning: the callback that logs what the pull does and saves the recorded importance beside checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from .. import _validate_integrations
from . import watching

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..optim import AlrAdamW


class AlrCallback(Callback):
    """Log what the pull does, save the recorded importance beside each checkpoint, refuse to clip twice.

    ``Trainer(callbacks=[AlrCallback()])``. Every ``log_every_n_steps`` all loggers get :func:`watching.numbers`
    (``alr/penalty`` and so on), and ``trainer.callback_metrics`` holds them for other callbacks.

    Beside each checkpoint ``NAME.ckpt`` that is saved while the optimizer records, ``NAME.importance.safetensors`` is
    written by rank zero (of sharded parameters by all ranks together), and deleted once the checkpoint is.

    Args:
        xi, relative, dtype, allow_nonfinite: as in ``AlrAdamW.save_importance``.

    Raises:
        TypeError: at the start of training, no AlrAdamW among the module's optimizers, or several.
        ValueError: at the start of training, ``Trainer(gradient_clip_val=...)`` clips and so does the optimizer, or the
            optimizer records: Lightning clips before the step, and ω would be scaled.
    """

    def __init__(
        self,
        *,
        xi: float = 1e-6,
        relative: bool = False,
        dtype: str | torch.dtype = "fp32",
        allow_nonfinite: bool = False,
    ) -> None:
        self._saving = watching.Saving(xi, relative, dtype, allow_nonfinite)
        self._optimizer: AlrAdamW | None = None
        self._stepped = 0
        self._loss: Tensor | None = None  # of the micro-batches since the last step
        self._files: dict[Path, Path] = {}  # checkpoint → importance beside it

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check how the trainer clips, and follow it where it saves."""
        found = [optimizer for optimizer in map(watching.unwrapped, trainer.optimizers) if optimizer is not None]
        _validate_integrations.one_optimizer(len(found))
        self._optimizer = found[0]
        self._stepped, self._loss = trainer.global_step, None
        _validate_integrations.clipping(
            "Trainer(gradient_clip_val)", trainer.gradient_clip_val, found[0].max_grad_norm, found[0].record,
            "gradient_clip_val=None",
        )  # fmt: skip
        vars(trainer).pop("save_checkpoint", None)  # ours, of a fit that failed
        save = trainer.save_checkpoint  # the one way to every checkpoint, whoever asks for it

        def save_checkpoint(filepath: Any, *args: Any, **kwargs: Any) -> None:
            save(filepath, *args, **kwargs)
            self._save(trainer, Path(filepath))

        trainer.save_checkpoint = save_checkpoint

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log after a step that the trainer logs."""
        part = outputs.get("loss") if isinstance(outputs, dict) else outputs  # over the number of micro-batches
        if part is not None:
            self._loss = part.detach() if self._loss is None else self._loss + part.detach()
        if self._optimizer is None or trainer.global_step == self._stepped:
            return
        self._stepped, loss, self._loss = trainer.global_step, self._loss, None
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # where Lightning's own callbacks log
        if not trainer.log_every_n_steps or (step + 1) % trainer.log_every_n_steps:
            return
        found = watching.numbers(self._optimizer, None if loss is None else float(loss))
        for logger in trainer.loggers:
            logger.log_metrics(found, step=step)
        trainer.callback_metrics.update(found)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the trainer save as before."""
        if "save_checkpoint" in vars(trainer):
            del trainer.save_checkpoint
        self._forget_deleted(trainer.is_global_zero)
        self._optimizer = None

    def _save(self, trainer: Any, checkpoint: Path) -> None:
        assert self._optimizer is not None
        path = checkpoint.with_name(f"{checkpoint.name.removesuffix('.ckpt')}.{watching.FILE_NAME}")
        if self._saving.write(self._optimizer, path, trainer.is_global_zero):
            self._files[checkpoint] = path
        self._forget_deleted(trainer.is_global_zero)

    def _forget_deleted(self, is_main: bool) -> None:
        """Delete the files whose checkpoints are gone (``save_top_k``)."""
        for checkpoint in [checkpoint for checkpoint in self._files if not checkpoint.exists()]:
            path = self._files.pop(checkpoint)
            if is_main:
                path.unlink(missing_ok=True)
