"""The least core, against games with known answers and other ways to solve the two problems."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog, minimize, nnls

from upweight.valuation import (
    BernoulliSubsets,
    FunctionUtility,
    OwenSubsets,
    Permutations,
    Stratified,
    UtilityError,
    Values,
    ValueWarning,
    WeightedSubsets,
    banzhaf,
    shapley,
)
from upweight.valuation.least_core import least_core

WORTH = np.array([3.0, -1.0, 0.5, 2.0, 0.0])
COSTS = np.array([1.0, 2.0, 4.0, 4.0, 7.0])
TABLE = np.random.default_rng(3).normal(size=2**6)
SIDES = np.array([0.9, 0.1, 0.4, 0.4, 0.7, 0.2, 0.3])


def of_bits(rows):
    return TABLE[int((2 ** np.asarray(rows, np.int64)).sum())]


GAMES = {
    "gloves": (lambda rows: float(min((rows < 2).sum(), (rows >= 2).sum())), 5),
    "majority": (lambda rows: float(len(rows) >= 3), 5),
    "additive": (lambda rows: WORTH[rows].sum(), 5),
    "airport": (lambda rows: -COSTS[rows].max(initial=0.0), 5),
    "convex": (lambda rows: SIDES[rows].sum() ** 2, 7),
    "concave": (lambda rows: np.sqrt(SIDES[rows].sum()), 7),
    "steps": (lambda rows: np.round(np.sqrt(SIDES[rows].sum()), 1), 7),
    "any": (of_bits, 6),
    "far from zero": (lambda rows: 1e6 + 1e-3 * np.sqrt(SIDES[rows].sum()), 7),
    "nothing": (lambda rows: 7.0, 4),
}


def every_set(function, n):
    """(Z, v) of all sets but none and all, and what all are worth."""
    chosen = [s for k in range(1, n) for s in itertools.combinations(range(n), k)]
    none = function(np.array([], np.intp))
    z = np.array([[float(i in s) for i in range(n)] for s in chosen])
    v = np.array([function(np.array(s)) - none for s in chosen])
    return z, v, function(np.arange(n)) - none


def slow_deficit(z, v, total):
    """max Σ y v − t v(all) over weights y ≥ 0 of sets, Σ y = 1, that hold each row t in all."""
    m, n = z.shape
    equal = np.zeros((n + 1, m + 1))
    equal[:n, :m], equal[:n, m], equal[n, :m] = z.T, -1, 1
    found = linprog(
        np.append(-v, total), A_eq=equal, b_eq=np.append(np.zeros(n), 1), method="highs-ds"
    )
    return -found.fun


def slow_payoffs(z, v, total, e):
    n = z.shape[1]
    size = np.abs(v).max()
    found = minimize(
        lambda x: x @ x,
        np.full(n, total / n / size),
        jac=lambda x: 2 * x,
        method="SLSQP",
        constraints=[
            {
                "type": "ineq",
                "fun": lambda x: z @ x - (v - e) / size + 1e-9,
                "jac": lambda x: z,
            },
            {
                "type": "eq",
                "fun": lambda x: x.sum() - total / size,
                "jac": lambda x: np.ones((1, n)),
            },
        ],
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return found.x * size


# ------------------------------------------------------------------------------------- all subsets


@pytest.mark.parametrize("name", GAMES)
def test_all_subsets_give_what_slow_solvers_give(name):
    function, n = GAMES[name]
    z, v, total = every_set(function, n)
    values = least_core(FunctionUtility(function, n), sampler="exact")
    size = max(np.abs(v).max(), abs(total))
    e = values.provenance["deficit"]
    assert e == pytest.approx(slow_deficit(z, v, total), abs=1e-7 * size)
    assert values.values.sum() == pytest.approx(total, abs=1e-12 * max(size, 1))
    assert (v - z @ values.values <= e + 1e-12 * size).all()
    if size:
        expected = slow_payoffs(z, v, total, e)
        np.testing.assert_allclose(values.values, expected, atol=2e-5 * size)
        assert np.linalg.norm(values.values) <= np.linalg.norm(expected) + 1e-6 * size
    assert values.provenance["constraints"] == 2**n - 2
    assert np.isnan(values.errors).all()
    assert (values.counts == 2 ** (n - 1) - 1).all()


@pytest.mark.parametrize(
    ("function", "payoffs", "deficit"),
    [
        (lambda rows: float(0 in rows and len(rows) > 1), [1, 0, 0], 0),  # gloves: the core
        (lambda rows: float(len(rows) >= 2), [1 / 3] * 3, 1 / 3),  # majority: no core
        (lambda rows: float(len(rows) == 3), [1 / 3] * 3, -1 / 3),  # unanimity: more than enough
        (lambda rows: WORTH[rows].sum(), WORTH[:3], 0),  # additive
        (lambda rows: 5 - COSTS[rows].max(initial=0), [-0.5, -1, -2.5], -0.5),  # airport
    ],
)
def test_known_games_of_three(function, payoffs, deficit):
    values = least_core(FunctionUtility(function, 3), sampler="exact")
    np.testing.assert_allclose(values.values, payoffs, atol=1e-7)
    assert values.provenance["deficit"] == pytest.approx(deficit, abs=1e-7)


def test_rows_that_are_alike_have_equal_payoffs():
    kinds = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    worth = np.array([1.0, 0.2, 0.5])

    def function(rows):
        return np.sqrt(worth[np.unique(kinds[rows])].sum()) + 0.01 * len(rows)

    values = least_core(FunctionUtility(function, 9), sampler="exact").values
    for kind in range(3):
        assert np.ptp(values[kinds == kind]) < 1e-7


def test_without_the_least_norm_the_deficit_is_the_same():
    utility = FunctionUtility(GAMES["convex"][0], 7)
    least, any_of_them = (
        least_core(utility, sampler="exact", egalitarian=choice) for choice in (True, False)
    )
    z, v, total = every_set(*GAMES["convex"])
    e = least.provenance["deficit"]
    assert any_of_them.provenance["deficit"] == pytest.approx(e, abs=1e-7)
    assert any_of_them.values.sum() == pytest.approx(total)
    assert (v - z @ any_of_them.values).max() == pytest.approx(e, abs=1e-7)
    assert np.linalg.norm(least.values) < np.linalg.norm(any_of_them.values) - 1e-3


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_payoffs_scale_with_the_utility(scale):
    function, n = GAMES["steps"]
    one = least_core(FunctionUtility(function, n), sampler="exact")
    other = least_core(FunctionUtility(lambda rows: scale * function(rows), n), sampler="exact")
    np.testing.assert_allclose(other.values / scale, one.values, atol=1e-8)
    assert other.provenance["deficit"] / scale == pytest.approx(one.provenance["deficit"])


def test_many_subsets_are_looked_at_in_part_and_hold_all_the_same():
    rng = np.random.default_rng(0)
    n, worth, noise = 12, rng.random(12), 0.05 * rng.normal(size=2**12)

    def function(rows):
        return np.sqrt(worth[rows].sum()) + noise[int((2**rows).sum())]

    z, v, total = every_set(function, n)
    values = least_core(FunctionUtility(function, n), sampler="exact")
    e = values.provenance["deficit"]
    assert len(v) > 1_000  # else all sets are looked at from the beginning
    assert e == pytest.approx(slow_deficit(z, v, total), abs=1e-7)
    assert (v - z @ values.values).max() == pytest.approx(e, abs=1e-9)
    # The least norm: x is Σ over sets of weights ≥ 0, and a constant (Kuhn and Tucker).
    tight = z[v - z @ values.values > e - 1e-6]
    away = values.values - values.values.mean()
    _, left = nnls((tight - tight.mean(axis=1)[:, None]).T, away)
    assert left < 1e-6 * np.linalg.norm(away)


# --------------------------------------------------------------------------------- sets at random


def test_more_sets_lead_to_the_exact_answer_from_below():
    function, n = GAMES["any"]
    utility = FunctionUtility(function, n)
    exact = least_core(utility, sampler="exact")
    some = [least_core(utility, subsets=m, seed=2) for m in (4, 12, 40, 600)]
    deficits = [values.provenance["deficit"] for values in some]
    assert (np.diff(deficits) >= -1e-8).all()
    assert deficits[0] < deficits[-1] - 0.1
    assert deficits[-1] == pytest.approx(exact.provenance["deficit"], abs=1e-8)
    np.testing.assert_allclose(some[-1].values, exact.values, atol=1e-7)
    for values in some:
        assert values.values.sum() == pytest.approx(function(np.arange(n)) - function([]))


@pytest.mark.parametrize(
    "sampler", [WeightedSubsets(), OwenSubsets(levels=8), BernoulliSubsets(0.3)]
)
def test_other_sets_give_a_bound_too(sampler):
    function, n = GAMES["concave"]
    exact = least_core(FunctionUtility(function, n), sampler="exact").provenance["deficit"]
    values = least_core(FunctionUtility(function, n), sampler=sampler, subsets=300)
    assert values.provenance["deficit"] <= exact + 1e-8
    assert values.provenance["sampler_name"] == sampler.name


def test_how_many_sets_are_asked_for():
    function = FunctionUtility(lambda rows: float(len(rows)), 120)
    assert least_core(function).provenance["evaluations"] == 1_200
    assert least_core(function, subsets=500).provenance["evaluations"] == 500
    few = FunctionUtility(lambda rows: float(len(rows)), 4)
    assert least_core(few).provenance["evaluations"] == 1_000
    assert least_core(few).provenance["constraints"] == 14


@pytest.mark.slow
def test_workers_and_seeds():
    function, n = GAMES["any"]
    one = least_core(FunctionUtility(function, n), subsets=20, seed=1)
    two = least_core(FunctionUtility(function, n), subsets=20, seed=1, n_jobs=2)
    other = least_core(FunctionUtility(function, n), subsets=20, seed=2)
    np.testing.assert_array_equal(one.values, two.values)
    assert np.abs(one.values - other.values).max() > 1e-3


def test_sets_that_do_not_tell_rows_apart_are_refused():
    size = FunctionUtility(lambda rows: float(len(rows)), 9)
    with pytest.raises(ValueError, match="sets that bound the deficit; payoffs can be shifted"):
        least_core(size, sampler=BernoulliSubsets(), subsets=5)
    with pytest.raises(ValueError, match=r"neither empty nor everything.*there is none"):
        least_core(size, sampler=BernoulliSubsets(1e-6), subsets=5)


# ------------------------------------------------------------------------- samples, and failures


def test_samples_of_other_values_are_used_again(tmp_path):
    function, n = GAMES["concave"]
    calls = []

    def counted(rows):
        calls.append(rows)
        return function(rows)

    utility = FunctionUtility(counted, n, names=list("abcdefg"))
    before = banzhaf(utility, sampler="antithetic", until=200, seed=4)
    asked = len(calls)
    again = least_core(before)
    assert len(calls) == asked
    direct = least_core(FunctionUtility(function, n), subsets=200, seed=4)
    np.testing.assert_array_equal(again.values, direct.values)
    assert again.names.tolist() == list("abcdefg")
    assert again.provenance["evaluations"] == 200
    assert again.provenance["seed"] == 4
    np.testing.assert_array_equal(banzhaf(again).values, before.values)
    loaded = Values.load(again.save(tmp_path / "values.npz"))
    assert loaded.provenance["deficit"] == again.provenance["deficit"]
    np.testing.assert_array_equal(least_core(loaded).values, again.values)
    with pytest.raises(ValueError, match="to go on with; these are of"):
        again.more(utility, 400)


@pytest.mark.parametrize(
    "options",
    [{"subsets": 50}, {"sampler": "exact"}, {"sampler": BernoulliSubsets()}, {"seed": 1}],
)
def test_sets_that_are_there_are_not_drawn_by_other_options(options):
    before = banzhaf(FunctionUtility(GAMES["any"][0], 6), until=64)
    with pytest.raises(ValueError, match=r"got subsets, sampler or seed: give the utility"):
        least_core(before, **options)


def test_orders_and_closed_forms_have_no_sets():
    utility = FunctionUtility(GAMES["any"][0], 6)
    with pytest.raises(ValueError, match=r"samples are sets.*these have orders of rows"):
        least_core(shapley(utility, sampler="permutations", until=100))
    with pytest.raises(ValueError, match=r"samples are sets.*these have none"):
        least_core(Values(np.zeros(3)))
    with pytest.raises(TypeError, match=r"expected a Utility.*got str"):
        least_core("gloves")


def test_failed_sets_constrain_nothing():
    function, n = GAMES["any"]
    z, v, total = every_set(function, n)
    worst = int(np.argmax(v))
    bad = np.flatnonzero(z[worst])

    def fails(rows):
        if np.array_equal(rows, bad):
            raise ArithmeticError("no fit")
        return function(rows)

    with pytest.warns(ValueWarning, match=f"1 of 64 utilities .* of {len(bad)} rows: Arithm"):
        values = least_core(FunctionUtility(fails, n), sampler="exact")
    kept = np.arange(len(v)) != worst
    deficit = slow_deficit(z[kept], v[kept], total)
    assert values.provenance["deficit"] == pytest.approx(deficit, abs=1e-8)
    assert deficit < slow_deficit(z, v, total) - 1e-3
    assert values.provenance["failed"] == 1
    assert len(values.failures) == 1
    assert values.provenance["constraints"] == 2**n - 3
    np.testing.assert_array_equal(values.counts, z[kept].sum(axis=0))


def test_a_utility_without_ends_is_an_error():
    def fails(rows):
        raise ArithmeticError("no fit")

    with pytest.raises(UtilityError, match="no rows could not be computed: Arithmetic"):
        least_core(FunctionUtility(fails, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "permutations"}, "object that draws sets"),
        ({"sampler": Permutations()}, "object that draws sets"),
        ({"sampler": Stratified()}, "object that draws sets"),
        ({"sampler": "exact", "subsets": 10}, "no number of subsets with sampler='exact'"),
        ({"sampler": "exact", "n": 21}, "at most 20 rows"),
        ({"subsets": 0}, "expected subsets at least 1; got 0"),
        ({"seed": -1}, "expected seed at least 0; got -1"),
        ({"n": 1}, "at least two rows"),
    ],
)
def test_options_are_checked_before_work(options, message):
    def never(rows):
        raise AssertionError

    utility = FunctionUtility(never, options.pop("n", 4))
    with pytest.raises(ValueError, match=message):
        least_core(utility, **options)
