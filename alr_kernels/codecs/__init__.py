"""How importance, moments and bf16 weights are encoded; the step decodes them in registers."""
