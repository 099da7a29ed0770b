"""bf16 weights that lose nothing: the split float32 master, and stochastic rounding with its generator.

    split        fp32 = bf16 and int16: ((bits + 0x8000) >> 16, low half of the bits), exactly
    stochastic   bf16 of fp32, up with the probability of the part that is cut off

Plain torch; every backend repeats these lines bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (bf16, int16 remainder) of float32; the pair is the number, bit for bit."""
    bits = torch.where(x.isnan(), 0x7FC00000, x.view(torch.int32)).long() & MASK
    high = ((bits + 0x8000) >> 16) & 0xFFFF
    return _as_int16(high).view(torch.bfloat16), _as_int16(bits & 0xFFFF)


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 number of a bf16 weight and its remainder."""
    return ((param.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def _as_int16(x: Tensor) -> Tensor:
    return torch.where(x > 0x7FFF, x - 0x10000, x).to(torch.int16)


def mix(x: Any) -> Any:
    """Return a hash of 32 bits (xor-shift and multiply, twice); int64 tensors or ints in [0, 2^32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def noise_key(seed: int, parameter: int, step: int) -> int:
    """Return the generator's key of one parameter in one step."""
    return int(mix(mix(mix(seed & MASK) ^ parameter) ^ step))


def noise(key: int, shape: torch.Size, device: torch.device, offset: int = 0) -> Tensor:
    """Return 32 random bits an element (int64), a function of key and index alone; ``offset``: index of the first."""
    index = torch.arange(shape.numel(), device=device) + offset
    return mix((((index & MASK) ^ key) + (index >> 32) * 0x9E3779B9) & MASK).view(shape)


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """Return bf16 of float32: the magnitude plus 16 random bits, cut off."""
    whole = (x.view(torch.int32).long() & MASK) + bits
    return _as_int16(torch.where(x.isnan(), 0x7FC0, (whole >> 16) & 0xFFFF)).view(torch.bfloat16)


def dither(key: int, blocks: int, block: int, device: torch.device, first_block: int = 0) -> Tensor:
    """Return u in [0, 1) of the moments' codes, float32 [blocks, block]: a random number a block, plus j·φ (mod 1)."""
    start = noise(key, torch.Size([blocks, 1]), device, first_block)
    whole = (start + torch.arange(block, device=device) * 0x9E3779B9) & MASK
    return (whole >> 8).float() * 2.0**-24
