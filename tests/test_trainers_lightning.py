"""Lightning: what the steps see, what is logged and saved, and resuming from its checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import random_importance, tiny_model
from trainer_cases import OPTIONS, Shadow, assert_same_run, batches, mse, task_grads

from alr_kernels import AlrAdamW, DynamicCoeffs, Importance

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from alr_kernels.integrations.lightning import AlrCallback  # noqa: E402


class Module(pl.LightningModule):
    """The tiny model inside; the data of a step depend on its number."""

    def __init__(self, options, importance=None, seed=0, parts=1):
        super().__init__()
        self.model, self.options, self.importance, self.parts = tiny_model(seed), options, importance, parts

    def training_step(self, batch, batch_idx):
        data = batches(self.global_step, self.parts)
        loss = mse(self.model, data if self.parts == 1 else data[batch_idx % self.parts])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = AlrAdamW(self.named_parameters(), self.importance, **self.options)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, total_iters=5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Logged(pl.loggers.logger.DummyLogger):
    """Keeps what a logger is told."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def fit(module, folder, callbacks=(), logger=False, resume=None, steps=6, **options):
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=logger, callbacks=list(callbacks),
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        **{"enable_checkpointing": any(isinstance(each, pl.callbacks.ModelCheckpoint) for each in callbacks)} | options,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.zeros(1000, 1), batch_size=1)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def importance_of(module):
    return random_importance((name, param) for name, param in module.named_parameters())


class Witness(pl.Callback):
    """Tells the shadow the full batch's gradient at the weights that each step begins from."""

    def __init__(self, shadow, clip):
        self.shadow, self.clip, self.steps = shadow, clip, 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx % module.parts == 0:
            self.shadow.adam.param_groups[0]["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            with torch.enable_grad():
                grads = task_grads(module.model, mse(module.model, batches(module.global_step)))
            self.shadow.step({f"model.{name}": grad for name, grad in grads.items()}, self.clip)
            self.steps += 1


def test_accumulation_schedule_and_clipping_inside(tmp_path):
    module = Module(
        OPTIONS | {"coeffs": "uniform", "normalize": False, "mode": "coupled", "record": True, "max_grad_norm": 0.05},
        parts=4,
    )
    module.importance = importance_of(module)
    witness = Witness(Shadow(module, module.importance), 0.05)
    trainer = fit(module, tmp_path, [witness, AlrCallback()], accumulate_grad_batches=4)
    assert witness.steps == 6
    witness.shadow.check(module, trainer.optimizers[0])


class Overflow(pl.Callback):
    """Puts an infinity into the third step's gradient, and notes what is there before and after that step."""

    def __init__(self):
        self.before = None

    def on_after_backward(self, trainer, module):
        if trainer.fit_loop.total_batch_idx == 2:
            module.model.head.weight.grad[0, 0] = torch.inf
            self.before = copy.deepcopy((module.state_dict(), trainer.optimizers[0].state_dict()["state"]))

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.fit_loop.total_batch_idx == 2:
            weights, states = self.before
            assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
            for key, state in trainer.optimizers[0].state_dict()["state"].items():
                assert all(torch.equal(value, states[key][what]) for what, value in state.items())


@pytest.mark.parametrize("clip", [None, 0.05])
def test_16_mixed(tmp_path, clip):
    """Gradients arrive scaled; a step with infinities is skipped; Lightning itself refuses to clip, the step clips."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    mixed = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    options = OPTIONS | {"coeffs": "uniform", "normalize": False, "mode": "coupled", "record": True}
    module = Module(options | {"max_grad_norm": clip})
    module.importance = importance_of(module)
    overflow = Overflow()
    trainer = fit(module, tmp_path, [overflow, AlrCallback()], plugins=[mixed])
    assert overflow.before is not None
    assert trainer.optimizers[0].recorded_steps == 5
    recorded = trainer.optimizers[0].recorded_importance()
    total = sum(row.path_integral_sum for row in recorded.stats.values())
    assert 1e-4 < abs(total) < 1  # unscaled: 2^10 times as much otherwise
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(
            Module(OPTIONS),
            tmp_path,
            gradient_clip_val=1.0,
            plugins=[pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))],
        )


PHASES = {
    "record": {"record": True},
    "tune": {"reg_lambda": 0.5, "stats": True},
    "tune, balanced": {"coeffs": DynamicCoeffs("uniform", every=2), "record": True},
}


@pytest.mark.parametrize("phase", PHASES)
def test_resuming_from_a_checkpoint_is_bit_exact(tmp_path, phase):
    """Checkpoints have importance beside them while the optimizer records; deleted ones lose it."""
    runs = []
    for seed in (0, 1):
        module = Module(OPTIONS | PHASES[phase], seed=seed)
        if "tune" in phase:
            module.importance = importance_of(module)
        keep = pl.callbacks.ModelCheckpoint(
            tmp_path, filename="at.{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max"
        )
        every = pl.callbacks.ModelCheckpoint(tmp_path, filename="third-{step}", every_n_train_steps=3, save_top_k=-1)
        resume = tmp_path / "third-step=3.ckpt" if seed else None
        trainer = fit(module, tmp_path, [AlrCallback(dtype="bf16"), keep, every], resume=resume)
        runs.append((module, trainer.optimizers[0]))
        if seed == 0:
            checkpoints = {path.stem for path in tmp_path.glob("*.ckpt")}
            assert checkpoints == {"third-step=3", "third-step=6", "at.step=5", "at.step=6"}
            files = {path.name.removesuffix(".importance.safetensors") for path in tmp_path.glob("*.safetensors")}
            assert files == (checkpoints if PHASES[phase].get("record") else set())
    assert_same_run(runs[1], runs[0])
    if phase == "record":
        saved = Importance.load(tmp_path / "third-step=6.importance.safetensors")
        recorded = runs[0][1].recorded_importance(dtype="bf16")
        assert saved.steps == 6
        assert all(torch.equal(saved[name], recorded[name]) for name in recorded)


@pytest.mark.parametrize("parts", [1, 4])
def test_every_logger_gets_the_numbers(tmp_path, parts):
    """The task's loss is that of the whole batch."""
    module = Module(OPTIONS | {"stats": True}, parts=parts)
    module.importance = importance_of(module)
    loggers = [Logged(), Logged()]
    whole = Whole()
    trainer = fit(module, tmp_path, [whole, AlrCallback()], loggers, log_every_n_steps=2, accumulate_grad_batches=parts)
    optimizer = trainer.optimizers[0]
    for logger in loggers:
        own = [(step, row) for step, row in logger.rows if "loss" in row]
        ours = [(step, row) for step, row in logger.rows if "alr/penalty" in row]
        assert [step for step, _ in ours] == [step for step, _ in own] == [1, 3, 5]
        assert [row["alr/task_loss"] for _, row in ours] == pytest.approx(whole.losses[1::2], rel=1e-5)
        last = ours[-1][1]
        stats = optimizer.stats()
        assert last["alr/penalty"] == pytest.approx(sum(float(row["penalty"]) for row in stats.values()))
        assert last["alr/stiffness"] == max(float(row["stiffness"]) for row in stats.values())
        assert last["alr/anchor_drift/model.head"] == float(stats["model.head"]["drift_sq"]) ** 0.5
        assert last["alr/effective_layers"] == optimizer.coeffs.effective_layers
        assert last["alr/state_bytes"] > 0
    assert trainer.callback_metrics["alr/penalty"] == last["alr/penalty"]


class Whole(pl.Callback):
    """Keeps the loss of each whole batch at the weights that its step begins from."""

    def __init__(self):
        self.losses = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx % module.parts == 0:
            self.losses.append(float(mse(module.model, batches(module.global_step)).detach()))


class Failing(pl.Callback):
    """Fails once."""

    armed = True

    def on_train_batch_end(self, *args):
        if self.armed:
            self.armed = False
            raise RuntimeError("out of memory")


def test_a_fit_that_fails_leaves_nothing_behind(tmp_path):
    """The next fit of the same trainer writes each file once."""
    module, callback = Module(OPTIONS | {"record": True}), AlrCallback()
    written = []
    callback._saving.write = lambda optimizer, path, is_main: written.append(path.name)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, tmp_path, [callback, Failing()])
    trainer = module.trainer
    trainer.callbacks.append(pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3))
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(100, 1)))
    assert len(written) == len(set(written)) > 0


def test_the_callback_lets_go_of_the_trainer(tmp_path):
    """A checkpoint that is asked for after the fit is the trainer's own."""
    module = Module(OPTIONS | {"record": True})
    trainer = fit(module, tmp_path, [AlrCallback()])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not list(tmp_path.glob("*.safetensors"))


def test_importance_of_the_bare_model(tmp_path):
    """The module's names begin with its attribute; the error says how to rename."""
    bare = Importance(random_importance(tiny_model()))
    with pytest.raises(ValueError, match=r"renamed\('', 'model\.'\)"):
        fit(Module(OPTIONS, bare), tmp_path)
    module = Module(OPTIONS, bare.renamed("", "model."))
    optimizer = fit(module, tmp_path).optimizers[0]
    assert float(optimizer.penalty()) > 0
    assert bare.astype("int4").renamed("", "model.").renamed("model.", "").content_fingerprint == (
        bare.astype("int4").content_fingerprint
    )
