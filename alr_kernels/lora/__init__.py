"""LoRA in effective space: importance and penalty of U = s·B·A, never of B and A apart."""

from .pairs import LoraPair, LoraPairs, lora_pairs

__all__ = ["LoraPair", "LoraPairs", "lora_pairs"]
