"""AlrAdamW in other people's trainers: one thin file per framework, which imports its framework itself.

* ``alr_kernels.integrations.transformers``: ``alr_optimizer`` and ``AlrCallback`` for Trainer and TRL's trainers.
* ``alr_kernels.integrations.lightning``: ``AlrCallback`` for Lightning's Trainer.

Accelerate and plain torch need none: ``accelerator.prepare(optimizer)`` is enough. docs/trainers.md has each of them.
"""

from .groups import param_groups

__all__ = ["param_groups"]
