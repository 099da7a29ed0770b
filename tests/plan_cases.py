"""Live tensors of a model in training, counted under the names of a plan's parts."""

from __future__ import annotations

import itertools

import torch
import transformers

STATE = {
    "exp_avg": "moments",
    "exp_avg_sq": "moments",
    "exp_avg_scale": "moment_scales",
    "exp_avg_sq_scale": "moment_scales",
    "anchor": "anchor",
    "start": "start",
    "path_integral": "path_integral",
    "effective_path_integral": "path_integral",
    "remainder": "remainder",
    "step": "steps",
}
SIZES = {  # 3840 elements (small), 192 columns (no whole blocks) and whole blocks; two sizes that 4 does not divide
    "vocab_size": 30, "hidden_size": 128, "intermediate_size": 193, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip


def llama(**options):
    """A small LLaMA from the config that a plan reads."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | options))


def live_bytes(optimizer, model):
    """Bytes of the distinct storages behind a model and its optimizer on this rank, by part; call it after a step.

    Of a DTensor the local tensor counts. Works for any optimizer; AlrAdamW's importance comes with it.
    """
    found, seen = {}, set()

    def count(part, tensor):
        local = tensor.detach()
        storage = (local.to_local() if hasattr(local, "to_local") else local).untyped_storage()
        if storage.data_ptr() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[part] = found.get(part, 0) + storage.nbytes()

    for param in model.parameters():
        count("weights" if param.requires_grad else "frozen_weights", param)
        if param.grad is not None:
            count("gradients", param.grad)
    importance = optimizer.importance_tensors() if hasattr(optimizer, "importance_tensors") else []
    for before, tensor in itertools.pairwise([None, *importance]):
        codes = before is not None and before.dtype is torch.uint8
        count("importance_scales" if codes and tensor.dtype is torch.bfloat16 else "importance", tensor)
    for state in optimizer.state.values():
        for key in ("anchor", *sorted(state.keys() - {"anchor"})):  # what is shared with the anchor counts as anchor
            if isinstance(state.get(key), torch.Tensor):
                count(STATE[key], state[key])
    return found


def counted(kept):
    """The parts of a plan that are there."""
    return {part: size for part, size in kept.items() if size}
