"""LoRA in effective space, as method.md and the paper state it, dense and in float64; imports nothing of the package.

Gradients of the penalty come from autograd through s·B·A, tangent projections from pseudo-inverses, majorisers from
explicit sums, so that no line here is a copy of a line under test.
"""

from __future__ import annotations

import torch


def wide(tensor):
    return tensor.detach().to(torch.float64)


def penalty(up, down, scaling, anchor, importance, weight):
    """Return weight · Σ Ω (s·B·A − U*)²; ``weight`` is λ·α/normaliser, ``anchor`` dense."""
    return weight * (importance * (scaling * up @ down - anchor) ** 2).sum()


def penalty_gradients(up, down, *rest):
    """Return its derivatives by B and A."""
    leaves = [wide(factor).requires_grad_() for factor in (up, down)]
    with torch.enable_grad():
        return torch.autograd.grad(penalty(*leaves, *rest), leaves)


def majoriser_down(up, scaling, k):
    """Return κ_A[q, j] = s² Σ_i |B_iq| k_ij Σ_p |B_ip|, element by element."""
    m, rank = up.shape
    result = torch.zeros(rank, k.shape[1], dtype=torch.float64)
    for q in range(rank):
        for i in range(m):
            result[q] += scaling**2 * up[i, q].abs() * up[i].abs().sum() * k[i]
    return result


def majoriser_up(down, scaling, k):
    return majoriser_down(down.T, scaling, k.T).T


def adam(state, grad, beta1, beta2, eps, count):
    """Advance (m, v) in place and return m̂ and D."""
    state[0] = beta1 * state[0] + (1 - beta1) * grad
    state[1] = beta2 * state[1] + (1 - beta2) * grad**2
    return state[0] / (1 - beta1**count), (state[1] / (1 - beta2**count)).sqrt() + eps


def step(up, down, states, grads, count, mode, penalised, *, lr, betas, eps, weight_decay, clip=1.0, frozen=None):
    """Return B and A after one update; ``penalised``: (s, U*, Ω, λ·α/normaliser) or None; A moves before B.

    Proximal: θ ← argmin ½‖θ − h‖²_D/lr + ½ κ (θ − c)² with c where the majorising parabola is lowest.
    """
    hyper = (*betas, eps, count)
    up, down = wide(up), wide(down)
    grads = [wide(grad) * clip for grad in grads]
    if mode == "coupled" and penalised:
        pulls = penalty_gradients(up, down, *penalised)
        grads = [grad + pull for grad, pull in zip(grads, pulls, strict=True)]
    moved = [up, down]
    for side in (1, 0):
        if side == frozen:
            continue
        mean, denom = adam(states[side], grads[side], *hyper)
        target = moved[side] * (1 - lr * weight_decay) - lr * mean / denom
        if mode == "proximal" and penalised:
            scaling, _, importance, weight = penalised
            pull = penalty_gradients(*moved, *penalised)[side]
            bound = (majoriser_down, majoriser_up)[1 - side](moved[1 - side], scaling, 2 * weight * importance)
            lowest = torch.where(bound > 0, moved[side] - pull / bound, moved[side])
            target = (denom * target + lr * bound * lowest) / (denom + lr * bound)
        moved[side] = target
    return moved


def tangent(up, down, gradient):
    """Return P_B·G + G·P_A − P_B·G·P_A."""
    columns = up @ torch.linalg.pinv(up, rtol=1e-4)
    rows = torch.linalg.pinv(down, rtol=1e-4) @ down
    return columns @ gradient + gradient @ rows - columns @ gradient @ rows


def factored(up, down, grad_up, grad_down, scaling, lr):
    """Return the pseudo-gradient of the published code."""
    return scaling * (up @ grad_down + grad_up @ down - lr * grad_up @ grad_down)
