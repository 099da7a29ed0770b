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
    guarded,
    guards_are_untouched,
    param_unit,
    relative_error,
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
        return ((0, 256), (1, 128), (3, 256), (2, 3, 128)) if case.coded else ((0,), (17,), (3, 5, 7), (2, 128))
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
    """Require one of the two codes around each number within ``error`` of the exact one, and the mean of all."""
    peaks = oracle.code_scales(exact, name)
    assert_between(
        f"scales of {name}", scales.double(), *(peaks + s * oracle.code_scales(error, name) for s in (-1, 1))
    )
    slack, top = TOLERANCES["code"].limit, oracle.CODES[name][1]
    low, high = (oracle.code_positions(exact + s * error, peaks, name) for s in (-1, 1))
    low, high = (low - slack * low.abs()).floor().clamp(min=-top), (high + slack * high.abs()).ceil().clamp(max=top)
    if name == "exp_avg_sq":
        low, high = (torch.where(exact > 0, limit.clamp(min=1), limit) for limit in (low, high))
    assert_between(name, codes.double(), low, high)
    position = oracle.code_positions(exact, peaks, name)
    inner = (position.abs() > 1) & (position.abs() < top)  # neither end is at hand
    offset = (codes.double().abs() - position.abs())[inner]
    if len(offset) > 100:
        assert abs(float(offset.mean())) < 5 * 0.5 / len(offset) ** 0.5, f"{name} is rounded to one side"


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
    unit = ulp(param_unit(was["params"], theta, HYPER["lr"], was["anchors"]), compute)
    error = TOLERANCES["param", compute].limit * unit
    kept = F32 if case.param == "split" else FORMS[case.param]
    assert_stored("params", got["params"], theta, error, kept, case.param == "stochastic")
    limit, terms = TOLERANCES["moment"].limit, ((was["exp_avgs"].abs(), largest), (was["exp_avg_sqs"], largest**2))
    errors = [
        limit * (HYPER[beta] * old + (1 - HYPER[beta]) * new)
        for beta, (old, new) in zip(("beta1", "beta2"), terms, strict=True)
    ]
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


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("special", [False, True], ids=("numbers", "nan, inf and subnormal"))
@pytest.mark.parametrize("case", [*PAIRWISE, *SINGLE], ids=name_of)
def test_native_is_the_reference_bit_for_bit(case, special, backend):
    """Where it is told to be precise."""
    columns = formed(case, shapes_of(case, small=case in PAIRWISE), seed=3)
    if special:
        odd = torch.tensor([math.nan, math.inf, -math.inf, 1e-42, 0.0, -0.0, 6e-8, 65504.0, 3e38])
        for params, grads in zip(columns["params"], columns["grads"], strict=True):
            for tensor in (params, grads):
                flat = tensor.view(-1)
                flat[: len(odd)] = odd[: len(flat)].roll(0 if tensor is params else 1).to(tensor.dtype)
    expected, tables = copied(columns), []
    for rotation in range(3):
        for name, lists in ((backend, columns), ("reference", expected)):
            tables.append(torch.full((len(lists["params"]), len(STATISTICS)), math.nan, dtype=F64))
            options = case.options._replace(maximize=rotation == 2, precise=True)
            numbers = {"clip": case.clip, "inverse_scale": case.inverse_scale}
            statistics = tables[-1] if case.statistics else None
            take_step(lists, name, counts_of(lists, rotation), options, statistics=statistics, **numbers)
        assert_same_columns(columns, expected)
        if case.statistics and not special:  # native sums float32 terms
            sizes = dict(zip(STATISTICS, tables[-1].abs().unbind(1), strict=True))
            sizes["grad_dot_pull"] = (sizes["grad_sq"] * sizes["pull_sq"]).sqrt()
            within(relative_error(tables[-2], tables[-1], torch.stack([*sizes.values()], 1)), "step statistics")
    assert all(guards_are_untouched(tensor) for tensors in columns.values() for tensor in tensors)


# ---------------------------------------------------------------- forms that must change nothing

CODED = ((32, 128), (33, 384))


@backends
@modes
@pytest.mark.parametrize("bits", [8, 4])
def test_coded_importance_is_its_decoded_value(bits, mode, backend):
    case = Case(importance=f"int{bits}", moments="int8", mode=mode, statistics=True)
    coded = formed(case, CODED)
    pairs = zip(coded["importances"], coded["importance_scales"], strict=True)
    plain = copied(coded) | {"importance_scales": []}
    plain["importances"] = [codecs.decode_importance(codes, scales, bits) for codes, scales in pairs]
    tables = [torch.zeros(len(CODED), len(STATISTICS), dtype=F64) for _ in range(2)]
    for rotation in range(3):
        for columns, table in zip((coded, plain), tables, strict=True):
            take_step(columns, backend, counts_of(columns, rotation), case.options, statistics=table)
        assert_same_columns(coded, plain, MUTATED)
    assert torch.equal(*tables)


@backends
@modes
@pytest.mark.parametrize("moments", CHOICES["moments"])
def test_split_master_is_float32(moments, mode, backend):
    case = Case("split", "bf16", moments, "int8", "bf16", mode=mode)
    split = formed(case, CODED)
    single = copied(split) | {"remainders": []}
    single["params"] = [guarded(decoded(split, i)["params"].float()) for i in range(len(CODED))]
    start = copied(single)
    for rotation in range(6):
        for columns, master in ((split, "split"), (single, "none")):
            take_step(columns, backend, counts_of(columns, rotation), case.options._replace(master=master))
        for i, param in enumerate(single["params"]):
            assert same_bits(decoded(split, i)["params"].float(), param)
            assert same_bits(oracle.nearest_bf16(param), split["params"][i])
        assert_same_columns(split, single, MUTATED - {"params", "remainders"})
    assert not torch.equal(single["params"][0], start["params"][0])


LAYOUTS = {
    "transposed": ((256, 384), lambda t: t.t().contiguous().t()),
    "channels_last": ((3, 4, 2, 128), lambda t: t.contiguous(memory_format=torch.channels_last)),
}


@backends
@pytest.mark.parametrize("whose", ["parameter and gradient", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [Case("split", moments="int8", importance="int4"), Case("bf16", moments="int8", importance="int8"),
     Case("stochastic", moments="bf16", importance="bf16"), Case("stochastic", moments="int8", importance="int4")],
    ids=name_of,
)  # fmt: skip
def test_strides_of_coded_parameters_change_no_bit(case, layout, whose, backend):
    shape, arrange = LAYOUTS[layout]
    dense = formed(case, (shape,))
    arranged = copied(dense)
    for name, tensors in arranged.items():
        if tensors and tensors[0].shape == shape and (whose == "all" or name in ("params", "grads")):
            arranged[name] = [arrange(tensors[0])]
            assert not arranged[name][0].is_contiguous()
    for count in (1.0, 2.0):
        for columns in (dense, arranged):
            take_step(columns, backend, [count], case.options)
    assert_same_columns(arranged, dense)
