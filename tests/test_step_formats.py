"""The step on operands of every form, on every CPU backend: against the oracle, and what holds for any numbers."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch
from cases import (
    BACKENDS,
    BF16,
    CHOICES,
    CODED_SHAPES,
    COLUMNS,
    F16,
    F32,
    F64,
    FORMS,
    HYPER,
    MODES,
    NATIVE,
    NUMBERS,
    SHAPES,
    STEPS,
    TOLERANCES,
    Case,
    assert_same_columns,
    copied,
    counts_of,
    decoded,
    formed,
    guards_are_untouched,
    relative_error,
    rows,
    same_bits,
    take_step,
    ulp,
    unit_scales_of,
    within,
)

from alr_kernels.codecs import reference as codecs
from alr_kernels.step.plan import STATISTICS

backends = pytest.mark.parametrize("backend", BACKENDS)
modes = pytest.mark.parametrize("mode", MODES)
MUTATED = set(COLUMNS) - {"grads", "importances", "anchors", "importance_scales"}


def pairwise(choices):
    """Return rows in which every pair of values of two columns appears, greedily and always the same ones."""
    names = list(choices)
    missing = {
        frozenset({(a, x), (b, y)}) for a, b in itertools.combinations(names, 2) for x in choices[a] for y in choices[b]
    }
    found = []
    while missing:
        row = dict(sorted(min(missing, key=lambda pair: sorted(map(str, pair)))))
        for name in names:
            if name not in row:
                row[name] = max(
                    choices[name],
                    key=lambda value, name=name: sum(
                        frozenset({(name, value), item}) in missing for item in row.items()
                    ),
                )
        missing -= set(map(frozenset, itertools.combinations(row.items(), 2)))
        found.append(row)
    return found


PAIRWISE = [Case(**row) for row in pairwise(CHOICES)]
BASES = [Case(mode=mode) for mode in MODES]
SINGLE = [
    *BASES,
    *(base._replace(**{name: value}) for base in BASES for name, values in CHOICES.items() for value in values[1:]),
]
DOUBLE = [
    Case("fp64", record=record, mode=mode, importance=importance, maximize=record, clip=0.3, inverse_scale=0.37)
    for record in (True, False)
    for mode, importance in ((MODES[0], "fp32"), (MODES[1], "fp32"), (MODES[1], "none"))
]


def name_of(case):
    """Say what a case changes of the default."""
    return "-".join(f"{name}={v}" for name, v in case._asdict().items() if v != Case._field_defaults[name]) or "default"


def shapes_of(case, small):
    if small:
        return ((1, 128), (3, 256), (2, 3, 128)) if case.coded else ((0,), (17,), (3, 5, 7), (2, 128))
    return CODED_SHAPES if case.coded else (*SHAPES, *CODED_SHAPES)


# ---------------------------------------------------------------- against the oracle


def assert_between(name, got, low, high):
    inside = (low <= got) & (got <= high)
    assert bool(inside.all()), f"{name}: {int((~inside).sum())} of {got.numel()} outside what the oracle allows"


def assert_stored(name, got, exact, error, dtype, stochastic=False):
    """Require what storing in ``dtype`` makes of a number within ``error`` of the exact one."""
    low, high = exact - error, exact + error
    if stochastic:
        low, high = oracle.bf16_neighbours(low)[0], oracle.bf16_neighbours(high)[1]
    else:
        low, high = low.to(dtype).double(), high.to(dtype).double()
    assert_between(name, got.double(), low, high)


def assert_codes(name, codes, scales, exact, error):
    """Require the codes of numbers within ``error`` of the exact ones; where that leaves two, they are neighbours."""
    within(
        relative_error(scales, oracle.code_scales(exact, name), oracle.code_scales(exact.abs() + error, name)), "scale"
    )
    allowed = []
    for sign in (-1, 1):
        position = oracle.code_positions(exact + sign * error, oracle.code_scales(exact, name), name)
        if name == "exp_avg_sq":
            position = position.clamp(min=0.5)
        allowed.append(oracle.code_rounded(position * (1 + sign * position.sign() * TOLERANCES["code"].limit), name))
    assert bool((allowed[1] - allowed[0] <= 1).all()), "the oracle leaves more than two codes"
    assert float((allowed[1] > allowed[0]).double().mean()) < 0.02, "the oracle leaves too much open"
    assert_between(name, codes.double(), *allowed)


def expected_step(case, was, count, unit_scale):
    """Return θ, m, v, the largest gradient that went into them, and the oracle's name for the penalty."""
    penalised, pull = {}, torch.zeros(())
    if case.importance != "none":
        weight = NUMBERS["reg_lambda"] * unit_scale / 2
        penalised = {"importance": was["importances"], "anchor": was["anchors"], "weight": weight}
        if case.mode == "coupled":
            pull = oracle.penalty_gradient(was["params"], **penalised).abs()
    results = oracle.step(
        was["params"], was["grads"], was["exp_avgs"], was["exp_avg_sqs"], count, maximize=case.maximize,
        mode=case.mode if penalised else None, inverse_scale=case.inverse_scale, clip=case.clip, **penalised, **HYPER,
    )  # fmt: skip
    return *results, was["grads"].abs() * case.inverse_scale * case.clip + pull, penalised


def check_statistics(case, was, exp_avg_sq, count, penalised, row):
    grad = oracle.task_gradient(was["grads"], case.maximize, case.inverse_scale)
    denom = oracle.denominator(exp_avg_sq, count, HYPER["beta2"], HYPER["eps"])
    none = {"importance": torch.zeros_like(grad), "anchor": was["params"], "weight": 0.0}
    expected = oracle.statistics(was["params"], grad, **(penalised or none), lr=HYPER["lr"], denom=denom)
    assert set(expected) == set(STATISTICS)
    for name, got in zip(STATISTICS, row.tolist(), strict=True):
        value, scale = expected[name]
        within(abs(got - value) / scale if got != value else 0.0, "step statistics")


def check_tensor(case, was, columns, i, count):
    """Compare everything that the step left of one parameter with the oracle."""
    got = decoded(columns, i)
    theta, exp_avg, exp_avg_sq, largest, penalised = expected_step(case, was, count, unit_scales_of(columns)[i])
    compute = F64 if case.param == "fp64" else F32
    unit = torch.maximum(was["params"].abs(), theta.abs()).clamp(min=HYPER["lr"])
    error = TOLERANCES["param", compute].limit * ulp(unit, compute)
    kept = F32 if case.param == "split" else FORMS[case.param]
    assert_stored("params", got["params"], theta, error, kept, case.param == "stochastic")
    limit = TOLERANCES["moment"].limit
    errors = limit * (was["exp_avgs"].abs() + largest), limit * (was["exp_avg_sqs"] + largest**2)
    if case.moments == "int8":
        assert_codes("exp_avg", columns["exp_avgs"][i], columns["exp_avg_scales"][i], exp_avg, errors[0])
        assert_codes("exp_avg_sq", columns["exp_avg_sqs"][i], columns["exp_avg_sq_scales"][i], exp_avg_sq, errors[1])
    else:
        dtype = F64 if case.param == "fp64" else FORMS[case.moments]
        assert_stored("exp_avgs", got["exp_avgs"], exp_avg, errors[0], dtype)
        assert_stored("exp_avg_sqs", got["exp_avg_sqs"], exp_avg_sq, errors[1], dtype, stochastic=dtype == BF16)
    if case.record:
        before = was["path_integrals"]
        terms = (was["grads"], was["params"], got["params"], case.maximize, case.inverse_scale)
        omega = oracle.record(before, *terms)
        within(relative_error(got["path_integrals"], omega, before.abs() + (omega - before).abs()), "path_integral")
    return exp_avg_sq, penalised


def check_case(case, backend, shapes, rotations=2, seed=0):
    columns = formed(case, shapes, seed)
    for rotation in range(rotations):
        counts, before = counts_of(columns, rotation), copied(columns)
        statistics = torch.full((len(shapes), len(STATISTICS)), math.nan, dtype=F64) if case.statistics else None
        numbers = {"clip": case.clip, "inverse_scale": case.inverse_scale}
        take_step(columns, backend, counts, case.options, statistics=statistics, **numbers)
        for i, count in enumerate(counts):
            was = decoded(before, i)
            exp_avg_sq, penalised = check_tensor(case, was, columns, i, count)
            if case.statistics:
                check_statistics(case, was, exp_avg_sq, count, penalised, statistics[i])
        assert_same_columns(columns, before, set(COLUMNS) - MUTATED)
        assert all(guards_are_untouched(tensor) for tensors in columns.values() for tensor in tensors)


def test_pairwise_covers_every_pair():
    for a, b in itertools.combinations(CHOICES, 2):
        seen = {(getattr(case, a), getattr(case, b)) for case in PAIRWISE}
        assert seen == set(itertools.product(CHOICES[a], CHOICES[b]))
    assert len(PAIRWISE) < 60


@backends
@pytest.mark.parametrize("case", PAIRWISE, ids=name_of)
def test_any_two_options_together(case, backend):
    check_case(case, backend, shapes_of(case, small=True))


@backends
@pytest.mark.parametrize("case", SINGLE, ids=name_of)
def test_each_option_alone_on_all_sizes(case, backend):
    check_case(case, backend, shapes_of(case, small=False), rotations=len(STEPS) if case in BASES else 2)


@pytest.mark.parametrize("case", DOUBLE, ids=name_of)
def test_float64(case):
    check_case(case, "auto", SHAPES)
