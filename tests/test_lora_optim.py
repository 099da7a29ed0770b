"""AlrAdamW on LoRA pairs: both modes against float64, what the majoriser promises, where the step rests."""

from __future__ import annotations

import itertools

import lora_oracle
import oracle
import pytest
import torch
from cases import BF16, F32, F64, MODES

from alr_kernels import AlrAdamW, DynamicCoeffs, _ops, _ops_lora
from alr_kernels.codecs.encoded import Encoded
from alr_kernels.lora.reference import Product

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
NAMES = ("layers.0.q.weight", "layers.0.v.weight", "layers.1.q.weight")
SHAPES = (
    (24, 128, 3),
    (40, 128, 2),
    (24, 128, 3),
)  # two share a stack; rows of whole blocks, ≥ 4096 in the second only
SCALINGS = (2.0, 0.5, 2.0)
ALPHAS = dict(zip(("layers.0.q", "layers.0.v", "layers.1.q"), (0.5, 0.2, 0.3), strict=True))
KEPT = ("fp32", "bf16", "int8", "int4")


class Problem:
    """Three pairs, and a plain bias, of a linear task: the gradients are fixed numbers that change with the step."""

    def __init__(self, dtype=F64, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.pairs = []
        for (m, n, r), s, name in zip(SHAPES, SCALINGS, NAMES, strict=True):
            self.pairs.append((name, self.param(dtype, r, n), self.param(dtype, m, r), s))
        self.bias = self.param(dtype, 7)
        self.importance = {
            name: torch.rand(m, n, generator=self.generator, dtype=F64).pow(4).to(dtype if dtype == F64 else F32)
            for (m, n, _), name in zip(SHAPES, NAMES, strict=True)
        }
        self.importance["bias"] = torch.rand(7, generator=self.generator, dtype=F64).to(F32 if dtype != F64 else F64)
        self.alphas = ALPHAS | {"(root)": 0.1}

    def param(self, dtype, *shape):
        value = torch.randn(*shape, generator=self.generator, dtype=F64) * 0.3
        return torch.nn.Parameter(value.to(dtype))

    def named(self):
        rows = [(f"{name}.{letter}", t) for name, a, b, _ in self.pairs for letter, t in (("A", a), ("B", b))]
        return [*rows, ("bias", self.bias)]

    def set_grads(self, number):
        generator = torch.Generator().manual_seed(100 + number)
        for _, param in self.named():
            param.grad = (torch.randn(param.shape, generator=generator, dtype=F64) * 0.1).to(param.dtype)

    def optimizer(self, **options):
        options = {"reg_lambda": 0.7, "coeffs": self.alphas, "lora": self.pairs} | HYPER | options
        return AlrAdamW(self.named(), self.importance, **options)

    def weights(self, reg_lambda, normalize):
        alphas = {name: self.alphas[name.rpartition(".")[0] or "(root)"] for name in self.importance}
        return oracle.weights(self.importance, alphas, reg_lambda, normalize)


def expected(problem, mode, steps, reg_lambda=0.7, normalize=True, max_grad_norm=None):
    """Return name → factor after ``steps``, by the oracle."""
    weights = problem.weights(reg_lambda, normalize)
    found = {name: lora_oracle.wide(param) for name, param in problem.named()}
    states = {name: [torch.zeros_like(value), torch.zeros_like(value)] for name, value in found.items()}
    anchors = {name: s * lora_oracle.wide(b) @ lora_oracle.wide(a) for name, a, b, s in problem.pairs}
    start = found["bias"]
    for count in range(1, steps + 1):
        problem.set_grads(count)
        grads = {name: lora_oracle.wide(param.grad) for name, param in problem.named()}
        clip = 1.0 if max_grad_norm is None else oracle.clip_factor(grads.values(), max_grad_norm)
        for name, _, _, s in problem.pairs:
            keys = (f"{name}.B", f"{name}.A")
            penalised = (s, anchors[name], lora_oracle.wide(problem.importance[name]), weights[name])
            moved = lora_oracle.step(
                *(found[key] for key in keys), [states[key] for key in keys], [grads[key] for key in keys],
                count, mode, penalised, clip=clip, **HYPER,
            )  # fmt: skip
            found |= zip(keys, moved, strict=True)
        hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
        found["bias"], *states["bias"] = oracle.step(
            found["bias"], grads["bias"], *states["bias"], count, mode=mode, importance=problem.importance["bias"],
            anchor=start, weight=weights["bias"], clip=clip, **hyper,
        )  # fmt: skip
    return found


def run(problem, optimizer, steps, first=1):
    for count in range(first, first + steps):
        problem.set_grads(count)
        optimizer.step()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("mode", MODES)
def test_steps_equal_the_oracle_in_float64(mode, max_grad_norm, normalize):
    options = {"mode": mode, "max_grad_norm": max_grad_norm, "normalize": normalize}
    problem = Problem()
    wanted = expected(Problem(), mode, 5, normalize=normalize, max_grad_norm=max_grad_norm)
    run(problem, problem.optimizer(**options), 5)
    for name, param in problem.named():
        limit = 1e-10 if max_grad_norm is None else 1e-6  # the norm is float32's, and 1e-6 is added to it
        torch.testing.assert_close(
            param.detach(), wanted[name], rtol=limit, atol=limit, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("mode", MODES)
def test_steps_of_float32_factors_stay_near_the_oracle(mode):
    problem = Problem(F32)
    wanted = expected(Problem(F32), mode, 3)
    run(problem, problem.optimizer(mode=mode), 3)
    for name, param in problem.named():
        # m/√v of a pull whose terms cancel is the worst: float32's error relative to the terms
        torch.testing.assert_close(param.detach().double(), wanted[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("mode", MODES)
def test_encoded_importance_pulls_as_it_decodes(mode, kept):
    problem, decoded = Problem(F32), Problem(F32)
    optimizer = problem.optimizer(mode=mode, importance_dtype=kept, normalize=False)
    for name in NAMES:
        encoded = Encoded.dense(decoded.importance[name])
        if decoded.importance[name].numel() >= 4096:
            (encoded,), *_ = _ops.merge([encoded], [None], [kept], (1.0, 0.0))
        decoded.importance[name] = _ops.decoded(encoded).float()
    run(problem, optimizer, 3)
    assert {t.dtype for t in optimizer.importance_tensors()} >= {torch.uint8 if "int" in kept else F32}
    run(decoded, decoded.optimizer(mode=mode, normalize=False), 3)
    for (name, param), (_, wanted) in zip(problem.named(), decoded.named(), strict=True):
        torch.testing.assert_close(param, wanted, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_the_gradients_of_the_penalty_are_autograds():
    generator = torch.Generator().manual_seed(0)
    up, down, start_up, start_down = (
        torch.randn(*shape, generator=generator, dtype=F64) for shape in ((30, 4), (4, 50), (30, 4), (4, 50))
    )
    importance, s, weight = torch.rand(30, 50, generator=generator, dtype=F64), 1.7, 0.3
    wanted = lora_oracle.penalty_gradients(up, down, s, s * start_up @ start_down, importance, weight)
    scales = torch.tensor([2 * weight], dtype=F64)
    drift = Product(torch.cat([up - start_up, start_up], 1) * s, torch.cat([down, down - start_down]))
    (got,) = _ops_lora.lora_pull([Encoded.dense(importance)], scales, [drift], [Product(s * up, s * down)])
    torch.testing.assert_close(got.grad_up, wanted[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.grad_down, wanted[1], rtol=1e-10, atol=1e-10)
    value = lora_oracle.penalty(up, down, s, s * start_up @ start_down, importance, weight)
    torch.testing.assert_close(got.value, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_curvature_majorises(seed):
    """penalty(A + a) ≤ penalty(A) + ⟨q, a⟩ + ½ Σ κ a² for any a: without it the step would not be stable."""
    generator = torch.Generator().manual_seed(seed)
    up, down, move_up, move_down = (
        torch.randn(*shape, generator=generator, dtype=F64) for shape in ((9, 4), (4, 11), (9, 4), (4, 11))
    )
    importance = torch.rand(9, 11, generator=generator, dtype=F64).pow(8)
    factors = [Product(up, down)]  # at U* = 0 the drift is U
    (got,) = _ops_lora.lora_pull(
        [Encoded.dense(importance)], torch.ones(1, dtype=F64), factors, factors, curvature=True
    )

    def value(b, a):
        return 0.5 * (importance * (b @ a) ** 2).sum()

    for size in (1e-3, 1.0, 1e3):
        a, b = size * move_down, size * move_up
        assert value(up, down + a) <= value(up, down) + (got.grad_down * a + 0.5 * got.curvature_down * a * a).sum()
        assert value(up + b, down) <= value(up, down) + (got.grad_up * b + 0.5 * got.curvature_up * b * b).sum()


@pytest.mark.parametrize("reg_lambda", [1e-3, 1.0, 1e3, 1e6, 1e9])
def test_the_penalty_alone_never_grows(reg_lambda):
    problem = Problem(F32)
    optimizer = problem.optimizer(reg_lambda=reg_lambda, weight_decay=0.0)
    problem.set_grads(0)
    for _, param in problem.named():
        param.grad.zero_()
    optimizer.step()  # takes the anchor
    with torch.no_grad():
        for _, param in problem.named():
            param.add_(torch.randn(param.shape, generator=problem.generator) * 0.3)
    values = [float(optimizer.penalty())]
    for _ in range(60):
        optimizer.step()
        values.append(float(optimizer.penalty()))
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(values))
    assert values[-1] < 1e-2 * values[0] or reg_lambda < 1


@pytest.mark.parametrize("mode_and_lambda", [("proximal", 10.0**e) for e in range(-3, 10, 3)] + [("coupled", 1.0)])
def test_the_step_rests_where_the_papers_loss_is_stationary(mode_and_lambda):
    """Slope g in U, curvature k: U − U* = −g/k, whatever k is."""
    mode, reg_lambda = mode_and_lambda
    a, b = (torch.nn.Parameter(torch.tensor([[value]], dtype=F64)) for value in (1.0, 1.5))
    k = 2 * reg_lambda  # normalised: the mean of Ω is 1
    slope, scaling = min(0.02, 0.3 * k), 2.0  # it rests within reach of the steps
    optimizer = AlrAdamW(
        [("A", a), ("B", b)], {"w.weight": torch.ones(1, 1, dtype=F64)}, lora=[("w.weight", a, b, scaling)],
        reg_lambda=reg_lambda, mode=mode, weight_decay=0.0, lr=1e-2, betas=(0.9, 0.99),
    )  # fmt: skip
    start = scaling * a.item() * b.item()
    steps = 1500
    for count in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - count / steps) ** 2
        a.grad, b.grad = slope * scaling * b.detach(), slope * scaling * a.detach()
        optimizer.step()
    moved = scaling * a.item() * b.item() - start
    assert moved == pytest.approx(-slope / k, rel=0.02)


def test_statistics_and_penalty_are_those_of_the_effective_space():
    for mode in MODES:
        problem = Problem()
        optimizer = problem.optimizer(mode=mode, stats=True)
        anchors = {name: s * lora_oracle.wide(b) @ lora_oracle.wide(a) for name, a, b, s in problem.pairs}
        run(problem, optimizer, 2)
        before = {name: (b.detach().clone(), a.detach().clone()) for name, a, b, _ in problem.pairs}
        weights = problem.weights(0.7, True)
        by_layer = optimizer.penalty_by_layer()
        run(problem, optimizer, 1, first=3)
        stats = optimizer.stats()
        for name, a, b, s in problem.pairs:
            layer = name.rpartition(".")[0]
            penalised = (s, anchors[name], problem.importance[name], weights[name])
            drift = s * before[name][0] @ before[name][1] - anchors[name]
            value = lora_oracle.penalty(*before[name], *penalised)
            torch.testing.assert_close(by_layer[layer], value, rtol=1e-10, atol=0)
            torch.testing.assert_close(stats[layer]["penalty"], value, rtol=1e-10, atol=0)
            torch.testing.assert_close(stats[layer]["drift_sq"], drift.square().sum(), rtol=1e-10, atol=0)
            grad_sq = a.grad.square().sum() + b.grad.square().sum()
            torch.testing.assert_close(stats[layer]["grad_sq"], grad_sq, rtol=1e-10, atol=0)
            pulls = list(lora_oracle.penalty_gradients(*before[name], *penalised))
            if mode == "proximal":  # B's pull was formed once A had moved
                pulls[0] = lora_oracle.penalty_gradients(before[name][0], a, *penalised)[0]
            pull_sq = sum(pull.square().sum() for pull in pulls)
            torch.testing.assert_close(stats[layer]["pull_sq"], pull_sq, rtol=1e-9, atol=0)
            dot = (pulls[0] * b.grad).sum() + (pulls[1] * a.grad).sum()
            torch.testing.assert_close(stats[layer]["grad_dot_pull"], dot, rtol=1e-8, atol=1e-12)
            k = 2 * weights[name] * problem.importance[name]
            seen = a.detach() if mode == "proximal" else before[name][1]  # by B's curvature
            stiffness = []
            for param, bound in (
                (a, lora_oracle.majoriser_down(before[name][0], s, k)), (b, lora_oracle.majoriser_up(seen, s, k)),
            ):  # fmt: skip
                denominator = oracle.denominator(optimizer.state[param]["exp_avg_sq"], 3, 0.99, 1e-8)
                stiffness.append((1e-2 * bound / denominator).max())
            torch.testing.assert_close(stats[layer]["stiffness"], max(stiffness), rtol=1e-9, atol=0)


def test_dynamic_coefficients_balance_modules():
    problem = Problem(F32)
    optimizer = problem.optimizer(coeffs=DynamicCoeffs(problem.alphas, every=2))
    run(problem, optimizer, 6)
    assert set(optimizer.coeffs) == set(problem.alphas)
    assert sum(optimizer.coeffs.values()) == pytest.approx(1)
    assert optimizer.coeffs["layers.0.q"] != pytest.approx(problem.alphas["layers.0.q"] / 1.1, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_frozen_factor_stays_and_the_other_is_pulled(mode, frozen):
    problem = Problem()
    optimizer = problem.optimizer(mode=mode)
    name, a, b, s = problem.pairs[0]
    still, side = (a, 1) if frozen == "A" else (b, 0)
    start = still.detach().clone()
    penalised = (
        s, s * lora_oracle.wide(b) @ lora_oracle.wide(a), problem.importance[name], problem.weights(0.7, True)[name],
    )  # fmt: skip
    factors = [lora_oracle.wide(b), lora_oracle.wide(a)]
    states = [[torch.zeros_like(x), torch.zeros_like(x)] for x in factors]
    for count in (1, 2, 3):
        problem.set_grads(count)
        grads = [b.grad, a.grad]
        factors = lora_oracle.step(*factors, states, grads, count, mode, penalised, **HYPER, frozen=side)
        still.grad = None
        optimizer.step()
    assert torch.equal(still, start)
    for got, wanted in zip((b, a), factors, strict=True):
        torch.testing.assert_close(got.detach(), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("master", ["none", "split"])
@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_factors(mode, master):
    problem = Problem(BF16)
    optimizer = problem.optimizer(mode=mode, master=master)
    reference = Problem(F32)
    for (_, to), (_, of) in zip(reference.named(), problem.named(), strict=True):
        to.data.copy_(of)
    other = reference.optimizer(mode=mode)
    for count in range(1, 6):
        problem.set_grads(count)
        for (_, to), (_, of) in zip(reference.named(), problem.named(), strict=True):
            to.grad = of.grad.float()
        optimizer.step()
        other.step()
    limit = 1e-3 if master == "split" else 3e-2
    for (_, got), (_, wanted) in zip(problem.named(), reference.named(), strict=True):
        whole = oracle.join(got, optimizer.state[got]["remainder"]) if master == "split" else got.double()
        torch.testing.assert_close(whole, wanted.detach().double(), rtol=limit, atol=limit)


@pytest.mark.parametrize("mode", MODES)
def test_maximising_the_negative_is_the_same(mode):
    problem, other = Problem(F32), Problem(F32)
    optimizers = (problem.optimizer(mode=mode, record=True), other.optimizer(mode=mode, record=True, maximize=True))
    for count in (1, 2, 3):
        problem.set_grads(count)
        for (_, param), (_, twin) in zip(problem.named(), other.named(), strict=True):
            twin.grad = -param.grad
        for optimizer in optimizers:
            optimizer.step()
    for (_, param), (_, twin) in zip(problem.named(), other.named(), strict=True):
        assert torch.equal(param, twin)
    first, second = (optimizer.recorded_importance() for optimizer in optimizers)
    assert first.content_fingerprint == second.content_fingerprint
