"""`alr-kernels run`: record, tune and measure in one."""

from __future__ import annotations

from ._options import Call, command
from ._training import train


@command
def run(call: Call) -> None:
    r"""Record on general text, tune on a domain, measure both, and write a report: everything in one folder.

    Example:

        alr-kernels run --model my-llama --general general/ \
            --data domain.jsonl --out results

    results/tuned is the model, results/importance.safetensors what record found, results/report/index.html the page.
    --baseline tunes once more without the pull, to see what it saves.
    """
    train(call)
