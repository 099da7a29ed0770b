"""LoRA in effective space: importance and penalty of U = s·B·A, never of B and A apart."""
