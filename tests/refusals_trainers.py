"""What is refused of trainers and of importance under other names: part of the table of tests/test_validation.py."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace

import torch
import torch.distributed as dist
from refusals import new, one, p
from torch import nn

from alr_kernels import AlrAdamW, Importance
from alr_kernels.integrations import param_groups


def released_since():
    """What FSDP2 does to a root's parameters that were whole when the optimizer was built."""
    param = p(4)
    optimizer = one(param=param, record=True)
    param.grad = torch.ones(4)
    param.untyped_storage().resize_(0)
    optimizer.step()


def saved_in_a_job(c, **more):
    """Save a checkpoint as the one process of a job."""
    from alr_kernels.integrations.checkpoints import save_checkpoint

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(folder, 1, c.model, c.optimizer, **more)
    finally:
        dist.destroy_process_group()


SEVEN = ["embed.bias", "embed.weight", "head.bias", "layers.0.bias", "layers.0.weight", "layers.1.bias", "head.weight"]


def factory(c, **options):
    from alr_kernels.integrations.transformers import alr_optimizer

    return alr_optimizer()(c.model, **options)


def as_a_class(c):
    """What a Trainer does that knows no factories."""
    from alr_kernels.integrations.transformers import alr_optimizer

    alr_optimizer([{"params": [c.model.head.weight], "weight_decay": 0.0}], lr=1e-3)


def under_trainer(optimizer, max_grad_norm=0.0, **options):
    """Begin to train with transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    from alr_kernels.integrations.transformers import AlrCallback

    model = nn.Linear(2, 1)
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(model)
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_grad_norm=max_grad_norm, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=[{"x": 1}], optimizers=(optimizer, None))
    trainer.add_callback(AlrCallback(trainer, **options))
    trainer.train()


def under_lightning(*optimizers, clip=None):
    """What Lightning's Trainer asks of the callback when a fit begins."""
    from alr_kernels.integrations.lightning import AlrCallback

    trainer = SimpleNamespace(optimizers=list(optimizers), global_step=0, gradient_clip_val=clip)
    AlrCallback().on_train_start(trainer, None)


def adamw(**options):
    return lambda model: AlrAdamW(model.named_parameters(), **options)


def renamed(c, new_names, names=SEVEN):
    entries = {new_names(name): torch.ones_like(c.model.get_parameter(name)) for name in names}
    return new(c, Importance(entries))


REFUSED = {
    "groups of a frozen model": (
        lambda c: param_groups(nn.Linear(2, 1).requires_grad_(False)), ValueError, "trainable parameters, got none",
    ),
    "decay of groups": (
        lambda c: param_groups(nn.Linear(2, 1), weight_decay=-1), ValueError, r"weight_decay: .* in \[0.0.*got -1",
    ),
    "factory called as a class": (
        lambda c: as_a_class(c), TypeError, r"without arguments.*≥ 5\.2.*optimizers=\(alr_optimizer\(\)\(model, lr",
    ),
    "factory without lr": (
        lambda c: factory(c), TypeError, r"expected lr, got none.*nothing of TrainingArguments.*args\.learning_rate",
    ),
    "factory with params": (
        lambda c: factory(c, lr=1e-3, params=[]), TypeError, "params: it takes all trainable.*leave it out",
    ),
    "factory with a word for lora": (
        lambda c: factory(c, lr=1e-3, lora="q_proj"), TypeError, "lora: expected True.*got str 'q_proj'",
    ),
    "factory with a file that is not there": (
        lambda c: factory(c, lr=1e-3, importance="nowhere.safetensors"), FileNotFoundError, "nowhere",
    ),
    "callback without AlrAdamW": (
        lambda c: under_trainer(lambda model: torch.optim.AdamW(model.parameters())),
        TypeError, "expected the Trainer to train with AlrAdamW, found none",
    ),
    "Trainer and step clip": (
        lambda c: under_trainer(adamw(max_grad_norm=0.5), 1.0), ValueError,
        r"max_grad_norm=1.0: .*one of the two.*max_grad_norm=0.5 as well; pass TrainingArguments\(max_grad_norm=0.0\)",
    ),
    "Trainer clips what is recorded": (
        lambda c: under_trainer(adamw(record=True), 1.0), ValueError,
        r"Arguments.max_grad_norm=1.0: .*ω would be scaled.*\(max_grad_norm=0.0\) and.*AlrAdamW\(max_grad_norm=1",
    ),
    "xi of a callback": (lambda c: under_trainer(adamw(), xi=0), ValueError, "xi: expected a number in.*got 0"),
    "dtype of a callback": (
        lambda c: under_trainer(adamw(), dtype="int2"), ValueError, "dtype: expected one of 'fp32'.*got 'int2'",
    ),
    "released since": (lambda c: released_since(), RuntimeError, r"'w' has no memory any more.*model\.reshard\(\)"),
    "checkpoint that rank 0 cannot read back": (
        lambda c: saved_in_a_job(c, more=print), RuntimeError, "step-1': expected rank 0 .*weights_only.*earlier.*stay",
    ),
    "Lightning and step clip": (
        lambda c: under_lightning(one(max_grad_norm=0.5), clip=1.0), ValueError,
        r"gradient_clip_val\)=1.0: .*one of the two.*=0.5 as well; pass gradient_clip_val=None",
    ),
    "Lightning clips what is recorded": (
        lambda c: under_lightning(one(record=True), clip=1.0),
        ValueError, "gradient_clip_val.*ω would be scaled.*None and",
    ),
    "Lightning without AlrAdamW": (
        lambda c: under_lightning(torch.optim.AdamW([p()])), TypeError, "expected one AlrAdamW.*found 0",
    ),
    "Lightning with two": (lambda c: under_lightning(one(), one()), TypeError, "expected one AlrAdamW.*found 2"),
    "importance of the model inside": (
        lambda c: renamed(c, lambda name: f"lightning.model.{name}"), ValueError,
        r"7 of its.*7 of 7 fit with '' before.* place of 'lightning\.model\.'.*renamed\('lightning\.model\.', ''\)",
    ),
    "importance of the model around": (
        lambda c: AlrAdamW(
            [(f"model.{name}", param) for name, param in c.model.named_parameters()], Importance(c.importance)
        ),
        ValueError, r"8 of its.*8 of 8 fit with 'model\.' before their names.*renamed\('', 'model\.'\)",
    ),
    "importance of most, under another prefix": (
        lambda c: new(c, Importance({f"a.{name}": torch.ones(c.model.get_parameter(name).shape) for name in SEVEN[:6]}
                                    | {"b.weight": torch.ones(2), "c": torch.ones(1)})),
        ValueError, r"6 of 8 fit with '' before their names in place of 'a\.'",
    ),
    "importance of the same names and other shapes under a prefix": (
        lambda c: new(c, {f"a.{name}": torch.ones(3, 3, 3) for name in SEVEN}),
        ValueError, "parameters are 'embed.bias'",
    ),
    "renaming what is not there": (
        lambda c: Importance(c.importance).renamed("model.", ""), ValueError, r"no name begins with 'model\.'; it has",
    ),
    "renaming into one name": (
        lambda c: Importance({"a.w": p(2), "w": p(2)}).renamed("a.", ""), ValueError, "'w'",
    ),
}  # fmt: skip
