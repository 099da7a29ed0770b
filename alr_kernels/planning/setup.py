"""What a plan is for: how the model is spread over devices, what is trained, and how everything is kept."""

from __future__ import annotations

from dataclasses import dataclass

from .. import _validate, _validate_planning
from ..codecs.storage import FORMATS
from ..step.plan import MASTERS, MODES

STRATEGIES = ("single", "ddp", "fsdp2", "hsdp")
PHASES = ("plain", "record", "tune", "both")
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Lora:
    """LoRA as PEFT makes it: ``targets`` are ends of module paths, ``dtype`` is the factors' (PEFT's default fp32)."""

    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dtype: str = "fp32"


@dataclass(frozen=True)
class Setup:
    """How a model is trained; dtype options are AlrAdamW's.

    Args:
        strategy: ``"single"``, ``"ddp"`` (replicas), ``"fsdp2"`` (``fully_shard`` of every block and of the root) or
            ``"hsdp"`` (shards over ``shard`` devices, replicas of these).
        shard: devices of one hsdp replica.
        lora: None trains every parameter.
        dtype: of the weights; None: as the model says.
        grad_dtype: of the gradients when the optimizer steps; None: as their parameter.
        phase: ``"record"`` (ω and start), ``"tune"`` (importance and anchor), ``"both"``, or ``"plain"`` AdamW.
        importance_dtype: None: fp32.
        bucket_view: DDP with ``gradient_as_bucket_view=True``: gradients lie in its buckets, not beside them.

    Raises:
        ValueError: options that do not exist, or would have no effect.
    """

    strategy: str = "fsdp2"
    shard: int | None = None
    lora: Lora | None = None
    dtype: str | None = None
    grad_dtype: str | None = None
    state_dtype: str = "fp32"
    importance_dtype: str | None = None
    anchor_dtype: str | None = None
    master: str = "none"
    phase: str = "tune"
    mode: str = "proximal"
    bucket_view: bool = False

    def __post_init__(self) -> None:
        _validate.choice("strategy", self.strategy, STRATEGIES)
        _validate.choice("phase", self.phase, PHASES)
        _validate.choice("mode", self.mode, MODES)
        _validate.choice("master", self.master, MASTERS)
        _validate.choice("dtype", self.dtype, (*DTYPES, None))
        _validate.choice("grad_dtype", self.grad_dtype, (*DTYPES, None))
        _validate.choice("state_dtype", self.state_dtype, FORMATS["state_dtype"])
        _validate.choice("importance_dtype", self.importance_dtype, (*FORMATS["importance_dtype"], None))
        _validate.choice("anchor_dtype", self.anchor_dtype, (*FORMATS["anchor_dtype"], None))
        if self.lora is not None:
            _validate.count("rank", self.lora.rank)
            _validate.choice("factor dtype", self.lora.dtype, DTYPES)
        _validate_planning.shard(self.strategy, self.shard)
        for option in ("importance_dtype", "anchor_dtype"):
            _validate_planning.penalised(option, getattr(self, option), self.phase, self.penalised)
        _validate_planning.bucket_view(self.bucket_view, self.strategy)

    @property
    def penalised(self) -> bool:
        """Whether there is importance."""
        return self.phase in ("tune", "both")

    @property
    def records(self) -> bool:
        """Whether ω is recorded."""
        return self.phase in ("record", "both")

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded."""
        return self.strategy in ("fsdp2", "hsdp")

    def shards(self, gpus: int) -> int:
        """Return over how many devices a tensor is cut."""
        if self.strategy == "hsdp":
            assert self.shard is not None
            return self.shard
        return gpus if self.strategy == "fsdp2" else 1
