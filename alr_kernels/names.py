"""Parameter names: what launchers add to them, and which layer they belong to."""

from __future__ import annotations

from typing import Literal

LayerBy = Literal["block", "module"]

# Components that wrappers (DDP/FSDP1, torch.compile, activation checkpointing) put into names.
WRAPPER_COMPONENTS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

ROOT_LAYER = "(root)"


def unwrap(name: str) -> str:
    """Strip whole components that wrappers added.

    >>> unwrap("module._orig_mod.model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPER_COMPONENTS)


def layer_of(name: str, by: LayerBy = "block") -> str:
    """Return the layer that a parameter belongs to.

    ``by="block"``: the name up to its first all-digit component, else its module's path;
    ``by="module"``: its module's path. A parameter of the top module is in layer ``(root)``.

    >>> layer_of("model.layers.3.self_attn.q_proj.weight")
    'model.layers.3'
    >>> layer_of("model.layers.3.self_attn.q_proj.weight", by="module")
    'model.layers.3.self_attn.q_proj'
    >>> layer_of("lm_head.weight")
    'lm_head'
    """
    parts = unwrap(name).split(".")
    if by == "block":
        for position, part in enumerate(parts):
            if part.isdigit():
                return ".".join(parts[: position + 1])
    return ".".join(parts[:-1]) or ROOT_LAYER


def module_of(name: str) -> tuple[str, str]:
    """Return the block that a parameter belongs to and what it is there: row and column of a heat map.

    A weight is called as its module; other parameters of a module have their own name behind it.

    >>> module_of("model.layers.3.self_attn.q_proj.weight")
    ('model.layers.3', 'self_attn.q_proj')
    >>> module_of("h.0.attn.c_attn.bias"), module_of("lm_head.weight")
    (('h.0', 'attn.c_attn.bias'), ('lm_head', 'lm_head'))
    """
    name = unwrap(name)
    block = layer_of(name)
    path, _, last = name.rpartition(".")
    kind, at, adapter = last.partition("@")  # LoRA with several adapters: weight@second
    within = path.removeprefix(block).lstrip(".") or ("" if block == ROOT_LAYER else block.rpartition(".")[2])
    parts = [within] if kind == "weight" and within else [within, kind]
    return block, ".".join(part for part in parts if part) + at + adapter
