"""The dispatch table of LoRA in effective space: which implementation serves which device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import _ops
from .lora import native, penalty, reference, triton_kernel
from .lora.reference import Product

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .codecs.encoded import Encoded
    from .lora.penalty import Pull


def lora_backends(device_type: str, dtype: torch.dtype) -> dict[str, str]:
    """Return backend → '' when it can serve factors of this dtype, else the reason why not; best first."""
    narrow = "" if dtype == torch.float32 else f"{dtype} factors go through the reference"
    native_reason = narrow or native.unavailable_reason(device_type)
    triton_reason = narrow or triton_kernel.unavailable_reason(device_type)
    if device_type == "cpu":  # Triton reaches CPU tensors only through its interpreter: never the default
        return {"native": native_reason, "reference": "", "triton": triton_reason}
    return {"triton": triton_reason, "reference": "", "native": native_reason}


def choose_lora_backend(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that serves, honouring an explicit request.

    Raises:
        BackendUnavailableError: the requested backend cannot serve, with the reason.
    """
    table = lora_backends(device.type, dtype)
    if requested == "auto":
        return next(name for name, reason in table.items() if not reason)
    if table[requested]:
        raise _ops.BackendUnavailableError(
            f"backend={requested!r} cannot serve {dtype} LoRA factors on {device.type}: {table[requested]}. "
            "Use backend='auto', or run `alr-kernels doctor`."
        )
    return requested


_RECORD = {"reference": reference.record, "native": native.record, "triton": triton_kernel.record}
_PULLS = {"reference": penalty.pulls, "native": native.pulls, "triton": triton_kernel.pulls}


@torch.no_grad()
def lora_record_(
    path_integrals: Sequence[Tensor],
    gradients: Sequence[Product | Tensor],
    moves: Sequence[Product],
    clamp: bool = False,
    backend: str = "auto",
) -> None:
    """Add −Ĝ ⊙ (U_after − U_before) to ω of each pair, in place, in one pass; nothing dense is made besides.

    Args:
        path_integrals: [P tensors] [m, n] float32 (float64 through the reference), contiguous: ω, mutated.
        gradients: Ĝ of each: a :class:`Product` ([m, k], [k, n]) of the dtype of ω, or dense [m, n].
        moves: U_after − U_before of each, a :class:`Product` likewise.
        clamp: afterwards ω ← max(ω, 0).
        backend: ``"auto"`` or one by name.

    Raises:
        BackendUnavailableError: an explicit backend cannot serve these tensors.

    Source: arXiv 2501.13669, eq. 3 on LoRA.
    """
    if path_integrals:
        chosen = choose_lora_backend(backend, path_integrals[0].device, path_integrals[0].dtype)
        dense = [g.contiguous() if isinstance(g, torch.Tensor) else _contiguous(g) for g in gradients]
        _RECORD[chosen](path_integrals, dense, list(map(_contiguous, moves)), clamp)


@torch.no_grad()
def lora_pull(
    importances: Sequence[Encoded],
    scales: Tensor,
    drifts: Sequence[Product],
    factors: Sequence[Product],
    sides: str = "both",
    curvature: bool = False,
    backend: str = "auto",
) -> list[Pull]:
    """Return the penalty of each pair and its derivatives by the factors, reading Ω once; k = scale·Ω.

    Args:
        importances: [P] Ω [m, n] in any format, contiguous; of rank1 nothing [m, n] is made, whatever the backend.
        scales: [P] float64 on the same device: curvature_scale.
        drifts: U − U* of each, a :class:`Product` ([m, k], [k, n]) float32 (float64 through the reference).
        factors: (s·B [m, r], s·A [r, n]) of each, of the same dtype.
        sides: whose derivatives: ``"both"``, ``"up"``, ``"down"`` or ``"none"``.
        curvature: whether the majorising diagonals are wanted too.
        backend: ``"auto"`` or one by name.

    Returns:
        a :class:`Pull` for each pair; its value is on the device, nothing waits for it.

    Raises:
        BackendUnavailableError: an explicit backend cannot serve these tensors.

    Source: arXiv 2501.13669, eq. 7 on LoRA; the majoriser is derived in docs/lora.md.
    """
    if not importances:
        return []
    chosen = choose_lora_backend(backend, factors[0].left.device, factors[0].left.dtype)
    drifts, factors = list(map(_contiguous, drifts)), list(map(_contiguous, factors))
    pulls = _PULLS[chosen]
    others = [i for i, x in enumerate(importances) if x.format != "rank1"]
    if len(others) == len(importances):
        return pulls(importances, scales, drifts, factors, sides, curvature)
    found: list[Pull] = []
    if others:
        kept, drifted, pairs = ([column[i] for i in others] for column in (importances, drifts, factors))
        found = pulls(kept, torch.stack([scales[i] for i in others]), drifted, pairs, sides, curvature)
    rest = dict(zip(others, found, strict=True))
    rows = enumerate(zip(importances, scales.unbind(), drifts, factors, strict=True))
    return [rest[i] if i in rest else penalty.pull_rank1(*row, sides, curvature) for i, row in rows]


def _contiguous(product: Product) -> Product:
    return Product(product.left.contiguous(), product.right.contiguous())
