"""The text of --lora."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import _validate_finetune


@dataclass(frozen=True)
class LoraSpec:
    """What LoRA adapters are made with.

    Args:
        r: rank, ≥ 1.
        alpha: U = alpha/r · B·A, or alpha/√r with ``rslora``.
        targets: ends of the paths of adapted modules; None: what PEFT adapts in a model of this kind.
        dropout: of the adapters' input while training, in [0, 1).
        rslora: scale by √r.
    """

    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    rslora: bool = False

    @classmethod
    def parse(cls, text: str, said: str = "--lora") -> LoraSpec:
        """Read "r=8,alpha=32,targets=q_proj+v_proj"; alpha is 2r unless given; "default" is all defaults.

        Args:
            text: the setting.
            said: how a message calls it.

        Raises:
            ValueError: an unknown or double part, or a value that does not fit; the message says which.

        >>> LoraSpec.parse("r=4,targets=q_proj+v_proj")
        LoraSpec(r=4, alpha=8.0, targets=('q_proj', 'v_proj'), dropout=0.0, rslora=False)
        """
        if text.strip() == "default":
            return cls()
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, value = _validate_finetune.lora_part(said, part)
            if name in values:
                _validate_finetune.lora_twice(said, name)
            values[name] = _validate_finetune.lora_value(said, name, value)
        values.setdefault("alpha", 2.0 * values.get("r", cls.r))
        return cls(**values)
