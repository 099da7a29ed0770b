"""transformers' Trainer as a phase needs it: NLL in nats a token over whole sets, whatever the number of processes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from .. import _ranks, _validate_models
from ..integrations.transformers import alr_optimizer, last_checkpoint
from ..integrations.watching import unwrapped
from . import models
from .callback import AlreadyThere, PhaseCallback, tidy
from .evaluation import Nll, evaluating, token_losses
from .progress import Progress, Stopped
from .stopping import Stop

if TYPE_CHECKING:
    from datasets import Dataset

    from ..optim import AlrAdamW
    from .metrics import Metrics
    from .models import Loaded
    from .options import TrainOptions

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass
class Phase:
    """One training of a run, and what it needs.

    Attributes:
        name: "record", "tune" or "plain".
        loaded: the model that it starts from, and its tokenizer.
        train: what is trained on.
        measured: what is measured on, by "domain" and "general"; sets that are None are not.
        collate: makes batches of rows.
        options: how long and how fast.
        steps, epochs, lr: in place of those of the options.
        optimizer: options of AlrAdamW, lr and weight_decay included.
        work: folder of its checkpoints.
        metrics: where it logs to.
        stop: whether it is to stop.
        progress: told how far it is.
        record_after: share of the steps after which recording begins.
        tensorboard: folder of TensorBoard's logs, if such are wanted.
        tick: tells of steps.
        save_every, eval_every: filled in once the number of steps is known.
    """

    name: str
    loaded: Loaded
    train: Dataset
    measured: dict[str, Dataset | None]
    collate: Callable[[list[Any]], Mapping[str, torch.Tensor]]
    options: TrainOptions
    steps: int | None
    epochs: float
    lr: float
    optimizer: dict[str, Any]
    work: Path
    metrics: Metrics
    stop: Stop
    progress: Progress
    record_after: float = 0.0
    tensorboard: Path | None = None
    tick: Callable[..., None] = field(default=lambda step, note="": None)
    save_every: int = 1
    eval_every: int = 1


class PhaseTrainer(Trainer):
    """A Trainer that runs a :class:`Phase`: ``PhaseTrainer(phase).run()``."""

    control: Any

    def __init__(self, phase: Phase) -> None:
        args = _arguments(phase)
        steps = _steps(phase, args.world_size)
        args.max_steps = steps
        args.warmup_steps = min(math.ceil(phase.options.warmup * steps), steps - 1)  # the first step of a warm-up is 0
        tenth = max(1, math.ceil(steps / 10))
        phase.save_every, phase.eval_every = phase.options.save_every or tenth, phase.options.eval_every or tenth
        super().__init__(
            phase.loaded.model,
            args,
            data_collator=phase.collate,
            train_dataset=phase.train,
            optimizer_cls_and_kwargs=(alr_optimizer, phase.optimizer),
        )
        for printing in (PrinterCallback, ProgressCallback):  # standard output is for results
            self.remove_callback(printing)
        after = int(phase.record_after * steps)
        self.phase_callback = PhaseCallback(self, record_after=after, keep=phase.options.keep)
        self.add_callback(self.phase_callback)
        self.phase = phase
        self.stopped = False
        self.saved: int | None = None
        self._losses: torch.Tensor | None = None
        self._began, self._before, self._measuring = time.perf_counter(), 0.0, 0.0
        self._measured = {name: _by_length(rows) for name, rows in phase.measured.items() if rows is not None}

    @property
    def alr(self) -> AlrAdamW:
        """The optimizer, without accelerate's wrapper."""
        found = unwrapped(self.optimizer)
        assert found is not None
        return found

    def run(self, resume: bool) -> None:
        """Train to the last step, from the last whole checkpoint with ``resume`` where there is one.

        Raises:
            Stopped: it was asked to stop; a checkpoint of the last step is there, where one was taken.
        """
        phase = self.phase
        checkpoint = _ranks.of_first(last_checkpoint(phase.work)) if resume else None
        at = -1 if checkpoint is None else int(Path(checkpoint).name.removeprefix("checkpoint-"))
        if _ranks.place()[0] == 0:
            tidy(phase.work, phase.options.keep)
            phase.metrics.keep(phase.name, at)
        _ranks.wait()
        self._before = max((line["time"] for line in phase.metrics.lines(phase.name)), default=0.0)
        self.saved = None if checkpoint is None else at
        phase.tick = phase.progress.phase(phase.name, self.args.max_steps, max(at, 0))
        if phase.tensorboard is not None and self.is_world_process_zero():
            self.add_callback(_tensorboard(phase, at))
        self._began, self._measuring = time.perf_counter(), 0.0
        with contextlib.suppress(AlreadyThere):
            self.train(resume_from_checkpoint=checkpoint)
        if self.stopped:
            raise Stopped(self.state.global_step, None if self.saved is None else phase.work)

    @property
    def seconds(self) -> float:
        """How long the phase has trained, pauses and measurements left out."""
        return self._before + time.perf_counter() - self._began - self._measuring

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        self.phase.metrics.add(self.phase.name, step, self.seconds, values)

    def asked_to_stop(self) -> bool:
        """Whether any process was asked to; all are told alike."""
        asked = self.phase.stop.asked
        if _ranks.place()[1] > 1:
            flag = torch.tensor(float(asked), device=self.args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            asked = bool(flag)
        self.stopped = self.stopped or asked
        return self.stopped

    # ---- what is measured

    def due(self, step: int) -> bool:
        """Whether the model is measured at this step: the first, the last, and every ``eval_every``."""
        return bool(self._measured) and (step % self.phase.eval_every == 0 or step >= self.args.max_steps)

    def is_measured(self, step: int) -> bool:
        """Whether that is done already, by the run that this one goes on from."""
        done = any(line["step"] == step for line in self.phase.metrics.evaluations(self.phase.name))
        return bool(_ranks.of_first(done))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure all sets and write it down; training goes on as if nothing had been measured.

        Returns:
            ``eval_domain_nll`` and so on. Nothing when asked to stop meanwhile: the run that goes on measures.
        """
        begin = time.perf_counter()
        step = self.state.global_step
        self.phase.tick(step, "measuring")
        found: dict[str, Nll] = {}
        with evaluating(self.model), torch.random.fork_rng(devices=[]):
            for name, rows in self._measured.items():
                measured = self._nll(rows)
                if measured is None:
                    break
                found[name] = measured
        elapsed = time.perf_counter() - begin
        self._measuring += elapsed
        if len(found) < len(self._measured):
            self.control.should_save = self.control.should_training_stop = True
            return {}
        for value in found.values():
            _validate_models.finite_loss(self.phase.name, step, value.nll)  # the last step may be the one that broke it
        self.write(step, {"evaluation": {k: v.as_dict() for k, v in found.items()}, "seconds": round(elapsed, 3)})
        self.phase.tick(step, ", ".join(f"{name} {value.nll:.4f}" for name, value in found.items()))
        metrics = {f"{metric_key_prefix}_{name}_nll": value.nll for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _nll(self, rows: Dataset) -> Nll | None:
        """Return the mean over all tokens of a set; None when asked to stop meanwhile."""
        sums: list[float] = []
        tokens = 0
        for batch in self.get_eval_dataloader(rows):
            found = token_losses(self.model, self._prepare_inputs(batch))
            losses, counts = self.accelerator.gather_for_metrics(found)  # rows that only fill up a batch left out
            sums += losses.tolist()
            tokens += int(counts.sum())
            if self.asked_to_stop():
                return None
        return Nll(math.fsum(sums) / max(tokens, 1), tokens)

    # ---- what is trained

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Take a micro-batch, and remember whether all losses were finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses = loss if self._losses is None else self._losses + loss  # NaN and inf stay
        return loss

    def losses_so_far(self) -> float:
        """Return a number that is finite if the loss of every step on every process was."""
        here = torch.zeros(()) if self._losses is None else self._losses.cpu()
        return float(sum(_ranks.of_all(float(here))))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Leave it to the optimizer, which knows it; Trainer would take another pass over the gradients."""
        return grad_norm

    def save_whole(self, folder: Path) -> None:
        """Save the model as ``from_pretrained`` reads it; sharded weights are gathered on rank 0. For all processes."""
        state = None
        if self.is_fsdp_enabled:
            tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
            tied -= {name for name, _ in self.model.named_parameters()}  # once gathered they are two tensors
            gathered = self.accelerator.get_state_dict(self.model)
            state = {name: tensor for name, tensor in gathered.items() if name not in tied}
        if self.is_world_process_zero():
            models.save(self.phase.loaded, folder, state)
        _ranks.wait()


def _arguments(phase: Phase) -> TrainingArguments:
    options = phase.options
    args = TrainingArguments(
        str(phase.work),
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.eval_batch or options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=phase.lr,
        lr_scheduler_type=SCHEDULES[options.schedule],
        max_grad_norm=0.0,  # the optimizer clips, if anything does: recording must see the whole gradient
        max_steps=1,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=phase.loaded.device == "cpu",
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=phase.loaded.device != "cpu",
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no",  # PhaseCallback says when
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    args._n_gpu = min(args.n_gpu, 1)  # no DataParallel: a process has one device, and launchers start several
    return args


def _steps(phase: Phase, processes: int) -> int:
    """Return how many steps the phase takes."""
    if phase.steps is not None:
        return phase.steps
    batches = math.ceil(len(phase.train) / (phase.options.batch * processes))
    return max(1, math.ceil(phase.epochs * math.ceil(batches / phase.options.accumulate)))


def _by_length(rows: Dataset) -> Dataset:
    """Return it with the longest rows first: batches pad little, and what does not fit into memory fails at once."""
    lengths = [len(row) for row in rows["input_ids"]]
    return rows.select(sorted(range(len(lengths)), key=lambda index: -lengths[index]))


def _tensorboard(phase: Phase, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    assert phase.tensorboard is not None
    folder = phase.tensorboard / phase.name
    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=step + 1 if step >= 0 else None))
