"""Hugging Face: the optimizer factory of Trainer and TRL's trainers, and the callback that logs and saves.

Under FSDP Trainer refuses ``optimizers=``; a factory is called with the model and so knows names and parameters:
``Trainer(..., optimizer_cls_and_kwargs=(alr_optimizer, {"lr": args.learning_rate, ...}))``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .. import _ranks, _validate_integrations
from ..importance import Importance
from ..lora import LoraPairs, lora_pairs
from ..optim import AlrAdamW
from . import watching
from .groups import param_groups

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WHOLE = "alr_whole"  # an empty file in checkpoints, the last that is written


def alr_optimizer(*groups: Any, **options: Any) -> Callable[..., AlrAdamW]:
    """Return :func:`build`; Trainer's protocol for factories (transformers ≥ 5.2): ``alr_optimizer()(model, ...)``.

    Raises:
        TypeError: called like an optimizer's class, as an older Trainer does.

    >>> import torch
    >>> optimizer = alr_optimizer()(torch.nn.Linear(2, 1), lr=1e-3, weight_decay=0.1)
    >>> [(group["param_names"], group["weight_decay"]) for group in optimizer.param_groups]
    [(['weight'], 0.1), (['bias'], 0.0)]
    """
    _validate_integrations.factory_protocol(groups, options)
    return build


def build(
    model: nn.Module,
    importance: str | PathLike[str] | Mapping[str, Tensor] | None = None,
    *,
    lr: float | None = None,
    weight_decay: float = 1e-2,
    lora: bool | LoraPairs = False,
    **options: Any,
) -> AlrAdamW:
    """Return an AlrAdamW of the model's trainable, named parameters, split by weight decay as Trainer splits them.

    Args:
        model: handed over by Trainer.
        importance: an :class:`Importance`, a mapping name → tensor, or the path of a ``.safetensors`` file.
        lr: needed, because Trainer hands nothing of its TrainingArguments to a factory: ``args.learning_rate``, say.
        weight_decay: of the parameters that decay (:func:`param_groups`).
        lora: True for ``lora_pairs(model)``, or what :func:`lora_pairs` returned.
        options: all others of :class:`AlrAdamW`.

    Raises:
        TypeError: no lr, ``params``, or another ``lora``. ValueError: as AlrAdamW, Importance.load and lora_pairs.
    """
    _validate_integrations.factory_lr(lr)
    _validate_integrations.factory_params(options)
    if not isinstance(lora, (bool, LoraPairs)):
        _validate_integrations.factory_lora(lora)
    if isinstance(importance, (str, PathLike)):
        importance = Importance.load(importance)
    pairs = (lora_pairs(model) if lora else None) if isinstance(lora, bool) else lora
    return AlrAdamW(param_groups(model, weight_decay), importance, lr=lr, lora=pairs, **options)


def last_checkpoint(folder: str | PathLike[str]) -> str | None:
    """Return the latest whole checkpoint that a Trainer with :class:`AlrCallback` left in its ``output_dir``, or None.

    For ``trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))``: Trainer itself takes the one with
    the largest number, which may be half written when a process was killed.

    >>> import tempfile
    >>> last_checkpoint(tempfile.mkdtemp()) is None
    True
    """
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{WHOLE}")]
    numbered = [path for path in found if path.name.removeprefix("checkpoint-").isdigit()]
    return str(max(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))) if numbered else None


class AlrCallback(TrainerCallback):
    """Log what the pull does, save the recorded importance beside each checkpoint, refuse to clip twice.

    ``trainer.add_callback(AlrCallback(trainer))``, for transformers' Trainer and TRL's trainers. It puts itself before
    the reporting callbacks, so that whatever the trainer reports to gets the numbers (:func:`watching.numbers`, in the
    same entry as the loss: ``train/alr/penalty`` in TensorBoard), and so does ``trainer.state.log_history``.

    A recording optimizer's importance so far goes into ``checkpoint-N/importance.safetensors``: written by the process
    that saves the checkpoint; of sharded parameters (FSDP2) by all ranks together. Then the checkpoint is marked as
    whole, for :func:`last_checkpoint`.

    Args:
        trainer: it is asked for its optimizer, callbacks and arguments.
        xi, relative, dtype, allow_nonfinite: as in ``AlrAdamW.save_importance``.

    Raises:
        TypeError: at the start of training, the trainer's optimizer is no AlrAdamW.
        ValueError: at the start of training, ``TrainingArguments.max_grad_norm`` (1.0 unless it is set) clips and so
            does the optimizer, or the optimizer records: Trainer clips before the step, and ω would be scaled.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        xi: float = 1e-6,
        relative: bool = False,
        dtype: str | torch.dtype = "fp32",
        allow_nonfinite: bool = False,
    ) -> None:
        self._trainer = trainer
        self._saving = watching.Saving(xi, relative, dtype, allow_nonfinite)

    @property
    def optimizer(self) -> AlrAdamW | None:
        """The AlrAdamW inside what the trainer steps."""
        return watching.unwrapped(self._trainer.optimizer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check how the trainer clips, and go before the callbacks that report."""
        optimizer = self.optimizer
        _validate_integrations.has_alr_adamw(optimizer, "the Trainer")
        assert optimizer is not None
        _validate_integrations.clipping(
            "TrainingArguments.max_grad_norm", args.max_grad_norm, optimizer.max_grad_norm, optimizer.record,
            "TrainingArguments(max_grad_norm=0.0)",
        )  # fmt: skip
        callbacks = self._trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the numbers to an entry that holds the loss of training steps."""
        optimizer = self.optimizer
        if optimizer is None or logs is None or "loss" not in logs:
            return
        found = watching.numbers(optimizer, logs["loss"])
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the importance into the checkpoint that has just been saved, and a mark that all of it is there."""
        optimizer = self.optimizer
        if optimizer is not None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._saving.write(optimizer, folder / watching.FILE_NAME, bool(args.should_save))
            _ranks.wait()  # every rank has written its part
            if args.should_save:
                (folder / WHOLE).touch()
