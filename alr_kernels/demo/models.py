"""Byte-level models of about 0.8 M parameters, built from transformers configs, and what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

VOCABULARY = 256  # one token a byte
ARCHITECTURES = ("llama", "gptj")


def build_model(arch: str, seed: int, *, width: int = 128, layers: int = 4, context: int = 64) -> nn.Module:
    """Return a freshly initialised causal language model over bytes, without dropout, in float32."""
    import transformers

    torch.manual_seed(seed)
    config: Any
    if arch == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 5 // 2,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=context,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        return transformers.LlamaForCausalLM(config)
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY,
        n_embd=width,
        n_inner=width * 4,
        n_layer=layers,
        n_head=4,
        rotary_dim=width // 8,
        n_positions=context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return transformers.GPTJForCausalLM(config)


def nll(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean negative log-likelihood per byte, in nats. ``batch``: [sequences, context + 1] int64 bytes."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY).float(), batch[:, 1:].reshape(-1))


def as_tensor(text: bytes) -> Tensor:
    """Return the bytes as a uint8 tensor (one copy)."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(text: Tensor, context: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield [size, context + 1] int64 windows at random places, for ever; the seed fixes all of them."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(text) - context - 1, (size, 1), generator=generator)
        yield text[starts + offsets].long()


def windows(text: Tensor, context: int, count: int) -> Tensor:
    """Return ``count`` evenly spaced windows [count, context + 1], the same ones for every model."""
    starts = torch.linspace(0, len(text) - context - 2, count).long()[:, None]
    return text[starts + torch.arange(context + 1)].long()


@torch.no_grad()
def evaluate(model: nn.Module, sets: Mapping[str, Tensor], chunk: int = 64) -> dict[str, float]:
    """Return set → mean NLL in nats per byte."""
    model.eval()
    result = {}
    for name, rows in sets.items():
        parts = [float(nll(model, part)) * len(part) for part in rows.split(chunk)]
        result[name] = sum(parts) / len(rows)
    model.train()
    return result


def trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return what is trained of a model, by name."""
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every trained weight by name."""
    return {name: param.detach().clone() for name, param in trained(model)}


@torch.no_grad()
def restore(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a snapshot back."""
    for name, param in trained(model):
        param.copy_(weights[name])
        param.grad = None
