"""Rounding at random inside the step: keyed, repeatable, and without it narrow weights and moments would freeze."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, BF16, HYPER, Case, decoded, formed, rows, same_bits, take_step

backends = pytest.mark.parametrize("backend", BACKENDS)


def still(case, shapes=((256, 256),), **values):
    """Return operands that rest but for decay: g = 0, Ω = 0, m = 0; ``values`` fill a role."""
    columns = formed(case, shapes)
    for name in ("grads", "importances", "exp_avgs"):
        for tensor in columns[name]:
            tensor.zero_()
    for name, value in values.items():
        for tensor in columns[name]:
            tensor.fill_(value)
    return columns


RANDOM = {
    "stochastic weights": (Case("stochastic"), "params"),
    "bf16 v": (Case(moments="bf16"), "exp_avg_sqs"),
    "codes of v": (Case(moments="int8"), "exp_avg_sqs"),
    "codes of m": (Case(moments="int8"), "exp_avgs"),
}


@backends
@pytest.mark.parametrize("kind", RANDOM)
def test_random_bits_are_those_of_seed_step_and_parameter(kind, backend):
    """What is rounded does not depend on the step's count, so that only the random bits can differ."""
    case, name = RANDOM[kind]
    shapes = ((64, 128), (32, 256))

    def run(seed=7, counts=(3.0, 3.0), keys=(0, 1), only=(0, 1)):
        columns = rows(still(case, shapes) if name == "params" else formed(case, shapes), only)
        counts, keys = ([values[i] for i in only] for values in (counts, keys))
        take_step(columns, backend, counts, case.options._replace(seed=seed), keys=keys)
        return columns[name]

    first = run()
    assert all(map(same_bits, run(), first)), "the same bits on repetition"
    for i in range(2):
        assert same_bits(run(only=(i,))[0], first[i]), "whatever else is in the list"
    for other in (run(seed=8), run(keys=(2, 3)), run(counts=(4.0, 3.0))):
        share = float((first[0] != other[0]).double().mean())
        assert share > 0.1, f"only {share:.2%} of the elements differ"


@backends
def test_weights_and_v_are_rounded_independently(backend):
    """0.999 and 0.99, whose neighbours in bf16 are 1 and 0.9961, 0.9922 and 0.9883."""
    columns = still(Case("stochastic", moments="bf16"), params=1.0, exp_avg_sqs=1.0)
    take_step(columns, backend, [3.0], Case("stochastic").options)
    up = [(columns[name][0] > limit).double().flatten() for name, limit in (("params", 0.998), ("exp_avg_sqs", 0.99))]
    for indicator, share in zip(up, (1 - 0.001 * 256, 1 - (0.9921875 - 0.99) * 256), strict=True):
        assert float(indicator.mean()) == pytest.approx(share, abs=5 * 0.5 / 256)
    assert abs(float(torch.corrcoef(torch.stack(up))[0, 1])) < 5 / 256


@backends
def test_stochastic_weights_keep_moves_that_nearest_rounding_loses(backend):
    """A move of lr a step, 1/40 of bf16's spacing."""
    steps, lr = 40, 1e-4
    for param in ("bf16", "stochastic"):
        columns = still(Case(param), params=1.0, grads=1.0, exp_avg_sqs=0.0)
        for count in range(1, steps + 1):
            take_step(columns, backend, [float(count)], Case(param).options, lr=lr, weight_decay=0.0)
        moved = 1.0 - columns["params"][0].double()
        if param == "bf16":
            assert int(moved.count_nonzero()) == 0
        else:  # each element is off by a spacing at most, so the mean by 2⁻⁸/√n
            assert abs(float(moved.mean()) - steps * lr) < 4 * 2.0**-8 / moved.numel() ** 0.5
            assert 0.3 < float((moved > 0).double().mean()) < 0.9, "some moved by a whole spacing, some not at all"


@backends
@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_narrow_v_decays(moments, backend):
    """By 0.1 % a step: less than half of what bf16 and a code of 8 bits tell apart."""
    beta2, steps = 0.999, 300
    assert float(torch.tensor(beta2, dtype=BF16)) == 1.0
    case = Case(moments=moments, importance="none")
    columns = formed(case, ((64, 128),))
    if moments == "int8":
        columns["exp_avg_sqs"][0].fill_(80)
        columns["exp_avg_sqs"][0].view(-1)[::128] = 255
        columns["exp_avg_sq_scales"][0].fill_(1.0)
    else:
        columns["exp_avg_sqs"][0].fill_(1.0)
    columns["grads"][0].zero_()
    columns["grads"][0].view(-1)[::128] = 1.0  # keeps the scale of its block, and with it the codes, where they are
    start = decoded(columns, 0)["exp_avg_sqs"]
    for count in range(1, steps + 1):
        take_step(columns, backend, [float(count)], case.options, beta2=beta2)
    ratio = (decoded(columns, 0)["exp_avg_sqs"] / start).view(-1, 128)[:, 1:]
    assert float(ratio.mean()) == pytest.approx(beta2**steps, rel=0.02)


@backends
def test_v_above_zero_never_becomes_zero(backend):
    """One huge gradient, long ago, must not make the steps of its block's small weights leap: m/√v would be m/eps."""
    case = Case(moments="int8", importance="none")
    columns = still(case, ((2, 128),))
    for name in ("exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales"):
        columns[name][0].zero_()
    columns["grads"][0].fill_(1e-3)
    columns["grads"][0][:, 5] = 1e4
    for count in range(1, 201):
        before = columns["params"][0].clone()
        take_step(columns, backend, [float(count)], case.options, weight_decay=0.0, beta2=0.999)
        columns["grads"][0].fill_(1e-3)
        values = decoded(columns, 0)
        assert bool((values["exp_avg_sqs"] > 0).all())
        assert float((columns["params"][0] - before).abs().max()) < 10 * HYPER["lr"]
    assert float(values["exp_avgs"].min()) > 5e-4, "the small gradients are in m"
    assert float(values["exp_avg_sqs"].min()) < 1e-4 * float(values["exp_avg_sqs"].max())
