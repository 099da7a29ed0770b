"""What fixes a study, and the names of what it compares."""

from __future__ import annotations

from dataclasses import dataclass

ADAMW, L2SP, COUPLED, PROXIMAL = "AdamW", "L2-SP", "ALR coupled", "ALR proximal"
FRESH, THEN = "plain LoRA", "general phase then LoRA"  # what takes AdamW's place in LoRA's space
OURS = (COUPLED, PROXIMAL)
RULES = ("softmax", "proportional", "uniform")
BASE, GENERAL = "base model", "general phase"  # where tuning starts: after what
TARGETS = {
    "llama": ("q_proj", "v_proj", "up_proj", "down_proj"),
    "gptj": ("q_proj", "v_proj", "fc_in", "fc_out"),
}


@dataclass(frozen=True)
class Adapter:
    """LoRA's side of a study: r and alpha as in the paper, its q_proj and v_proj, and two of each MLP.

    With q_proj and v_proj alone a model this small learns too little of the domain to compare anything.
    """

    targets: tuple[str, ...]
    r: int = 8
    alpha: int = 32
    steps: int = 400  # of the general phase, all of them recorded
    lr: float = 1e-3


@dataclass(frozen=True)
class Settings:
    """What fixes a study; with the machine and the number of threads it fixes every number but the timings."""

    arch: str = "llama"
    seed: int = 0
    adapter: Adapter | None = None  # None: all weights are trained
    corpus_bytes: int = 1_500_000
    width: int = 128
    layers: int = 4
    context: int = 64
    batch: int = 8
    pretrain_steps: int = 1600
    pretrain_lr: float = 3e-3
    record_share: float = 0.25  # of pre-training, its end, over which ω is integrated; an adapter's phase is its own
    xi: float = 0.01  # relative: in units of each tensor's mean squared move
    tune_steps: int = 160
    evaluate_every: int = 40
    windows: int = 96  # of context + 1 bytes in each evaluation set
    # Grids set on seed 3, so that no family is held back by where its grid ends: a smaller learning rate no longer
    # reaches the others' domain NLL in these steps, and larger ones forget more. Arms with a pull share one learning
    # rate; importance that lies on few weights wants a larger λ at the same mean curvature.
    lrs: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    pull_lr: float = 4e-4
    l2sp_lambdas: tuple[float, ...] = (0.01, 0.02, 0.04)
    alr_lambdas: tuple[float, ...] = (0.08, 0.16, 0.32)
    fast: bool = False  # too short to compare arms

    @classmethod
    def of(cls, arch: str, seed: int, *, lora: bool = False, fast: bool = False) -> Settings:
        """Return a study's settings; ``fast``: one of seconds, which shows that all runs, not which arm is better."""
        options: dict[str, object] = {"arch": arch, "seed": seed}
        if lora:
            options |= LORA | {"adapter": Adapter(TARGETS[arch], **({"steps": 16} if fast else {}))}
        return cls(**options | (FAST if fast else {}))  # type: ignore[arg-type]


FAST: dict[str, object] = {
    "fast": True,
    "corpus_bytes": 60_000,
    "width": 64,
    "layers": 2,
    "context": 32,
    "pretrain_steps": 80,
    "tune_steps": 16,
    "evaluate_every": 8,
    "windows": 32,
}
# LoRA's factors start small and take larger learning rates. Its grids, too, were set on seed 3.
LORA: dict[str, object] = {
    "pretrain_steps": 1200,
    "tune_steps": 200,
    "lrs": (5e-4, 7e-4, 1e-3, 1.4e-3),
    "pull_lr": 2e-3,
    "l2sp_lambdas": (0.0007, 0.001, 0.0014),
    "alr_lambdas": (0.0014, 0.002, 0.0028),
}
