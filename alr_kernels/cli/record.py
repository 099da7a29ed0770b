"""`alr-kernels record`: which weights matter for text that a model knows."""

from __future__ import annotations

from ._options import Call, command
from ._training import train


@command
def record(call: Call) -> None:
    r"""Find out how much each weight matters for general text, and write that to a file for tune.

    Example:

        alr-kernels record --model my-llama --data general/ \
            --out importance.safetensors

    The model trains on the text, and the importance of each weight is integrated on the way; --method has others that
    only read. The model itself is left as it is, unless --save-model keeps what it became. Part of the text is held out
    to measure on.
    """
    train(call)
