"""`alr-kernels tune`: learn a domain, and hold what mattered."""

from __future__ import annotations

from ._options import Call, command
from ._training import train


@command
def tune(call: Call) -> None:
    r"""Train a model on a domain's text while each weight is pulled back as strongly as it mattered before.

    Example:

        alr-kernels tune --model my-llama --importance importance.safetensors \
            --data domain.jsonl --general general/ --out tuned

    The importance comes from record, of the same model. --general says how much is forgotten. --out becomes a plain
    transformers model folder, or a PEFT adapter with --lora; AutoModelForCausalLM.from_pretrained loads either.
    """
    train(call)
