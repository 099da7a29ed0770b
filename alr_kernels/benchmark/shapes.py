"""What is stepped: lists of parameter shapes by name, written out from the architectures."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = tuple[int, ...]
BLOCK = 128  # last dimensions that codes can serve stay multiples of it when scaled

# LLaMA-3-8B: (out, in) of the seven linear layers of a decoder layer.
LLAMA_HIDDEN, LLAMA_LAYERS = 4096, 32
LLAMA_LINEAR = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}


def square(side: int = 2048, count: int = 10) -> list[Shape]:
    """Return ``count`` square matrices; the default is 42 M elements, the set of the CPU's bars."""
    return [(side, side)] * count


def llama_layer() -> list[Shape]:
    """Return one decoder layer of LLaMA-3-8B: 9 tensors, 218 M parameters."""
    return [*LLAMA_LINEAR.values(), (LLAMA_HIDDEN,), (LLAMA_HIDDEN,)]


def lora(rank: int = 16) -> list[Shape]:
    """Return LoRA's A and B on all seven linear layers of LLaMA-3-8B: 448 tensors, 42 M parameters at rank 16."""
    pairs: list[Shape] = [pair for out, inner in LLAMA_LINEAR.values() for pair in ((rank, inner), (out, rank))]
    return pairs * LLAMA_LAYERS


def resnet101() -> list[Shape]:
    """Return ResNet-101's parameters: 314 tensors, 44.5 M parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in zip((64, 128, 256, 512), (3, 4, 23, 3), strict=True):
        for block in range(blocks):
            convolutions = [(width, width_in, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, width_in, 1, 1))  # the shortcut
            for convolution in convolutions:
                shapes += [convolution, (convolution[0],), (convolution[0],)]  # batch norm's weight and bias
            width_in = 4 * width
    return [*shapes, (1000, width_in), (1000,)]


def billion() -> list[Shape]:
    """Return 1.007e9 elements in 15 matrices, the set of the GPU's bandwidth bar."""
    return square(8192, 15)


SETS = {
    "square": square,
    "llama-layer": llama_layer,
    "lora": lora,
    "resnet101": resnet101,
    "billion": billion,
}
MANY = 64  # tensors; from here on a set tests launches and loops rather than memory


def shapes_of(name: str, scale: float = 1.0) -> list[Shape]:
    """Return the set's shapes, with about ``scale`` times its elements in as many tensors."""
    return scaled(SETS[name](), scale)


def scaled(shapes: Sequence[Shape], scale: float) -> list[Shape]:
    """Shrink every dimension by the square root of ``scale`` in (0, 1]; block multiples stay block multiples."""
    if scale == 1.0:
        return list(shapes)
    factor = math.sqrt(scale)

    def shrunk(size: int, last: bool) -> int:
        if last and size % BLOCK == 0:
            return max(BLOCK, round(size * factor / BLOCK) * BLOCK)
        return max(1, round(size * factor))

    return [tuple(shrunk(size, i == len(shape) - 1) for i, size in enumerate(shape)) for shape in shapes]


def elements(shapes: Sequence[Shape]) -> int:
    """Return the number of elements of all tensors."""
    return sum(math.prod(shape) for shape in shapes)
