"""Semivalues of games, by every sampler, against sums over all subsets and published values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from upweight.valuation import (
    BernoulliSubsets,
    FunctionUtility,
    KernelSubsets,
    OwenSubsets,
    Permutations,
    Stratified,
    ValueWarning,
    WeightedSubsets,
    banzhaf,
    beta_shapley,
    delta_shapley,
    leave_one_out,
    semivalue,
    shapley,
)
from upweight.valuation.drawing import Sampler
from upweight.valuation.laws import Semivalue, beta_law, shapley_law
from upweight.valuation.readouts import choose_readout, read_out
from upweight.valuation.sampling import sampler_from
from upweight.valuation.subsets import EverySubset
from value_games import COUNCIL, GAMES, Looked, TableUtility, enumerated, rough, voting

SHAPLEY, HALF, FEW = Semivalue.of("shapley"), Semivalue.of("banzhaf", p=0.5), 0.2
BETA = Semivalue.of("beta", alpha=4.0, beta=1.0)
SMALL = Semivalue.of("delta", lower=1, upper=3)
RARE = Semivalue.of("banzhaf", p=FEW)
# sampler, semivalue, read-out, units for 1e5 sets or so of nine rows
ESTIMATES = {
    "permutations": (Permutations(), SHAPLEY, "auto", 12_000),
    "permutations, beta": (Permutations(), BETA, "auto", 12_000),
    "permutations, banzhaf": (Permutations(), RARE, "auto", 12_000),
    "permutations, delta": (Permutations(), SMALL, "auto", 20_000),
    "antithetic": (Permutations(antithetic=True), SHAPLEY, "auto", 6_000),
    "antithetic, beta": (Permutations(antithetic=True), BETA, "auto", 6_000),
    "stratified": (Stratified(), SHAPLEY, "auto", 3_000),
    "stratified, beta": (Stratified(decay=0.5), BETA, "auto", 3_000),
    "stratified, delta": (Stratified(1, 3), SMALL, "auto", 3_000),
    "weighted": (WeightedSubsets(), SHAPLEY, "auto", 100_000),
    "weighted, antithetic": (WeightedSubsets(antithetic=True), SHAPLEY, "auto", 50_000),
    "weighted, beta": (WeightedSubsets(), BETA, "auto", 100_000),
    "weighted, delta": (WeightedSubsets(), SMALL, "auto", 100_000),
    "owen": (OwenSubsets(), SHAPLEY, "auto", 100_000),
    "owen, levels": (OwenSubsets(levels=5), SHAPLEY, "auto", 100_000),
    "owen, antithetic": (OwenSubsets(antithetic=True), SHAPLEY, "auto", 50_000),
    "owen, banzhaf": (OwenSubsets(), HALF, "auto", 100_000),
    "kernel": (KernelSubsets(), SHAPLEY, "auto", 50_000),
    "kernel, re-use": (KernelSubsets(), SHAPLEY, "msr", 50_000),
    "kernel, beta": (KernelSubsets(), BETA, "auto", 50_000),
    "bernoulli, re-use": (BernoulliSubsets(), HALF, "msr", 100_000),
    "bernoulli, fit": (BernoulliSubsets(), HALF, "regression", 100_000),
    "bernoulli, antithetic": (BernoulliSubsets(antithetic=True), HALF, "regression", 50_000),
    "bernoulli, antithetic re-use": (BernoulliSubsets(antithetic=True), HALF, "msr", 50_000),
    "few rows, re-use": (BernoulliSubsets(FEW), RARE, "msr", 100_000),
    "few rows, fit": (BernoulliSubsets(FEW), RARE, "regression", 100_000),
    "half of them, beta": (BernoulliSubsets(), BETA, "auto", 100_000),
}
TABLES = {name: game.table for name, game in GAMES.items()} | {"rough": rough(9)}
LAWS = {
    "shapley": SHAPLEY,
    "banzhaf": HALF,
    "few": RARE,
    "beta": BETA,
    "delta": SMALL,
}


def estimate(table, sampler: Sampler, kind: Semivalue, readout="auto", *, seed=0, units=1):
    n = len(table).bit_length() - 1
    samples = sampler.collect(Looked(table), kind.law(n), seed, range(units))
    return read_out(samples, kind, choose_readout(samples, kind, readout))


@pytest.mark.parametrize("name", sorted(GAMES))
def test_known_values_of_games(name: str):
    game = GAMES[name]
    u = TableUtility(game.table)
    np.testing.assert_allclose(shapley(u, sampler="exact").values, game.shapley, atol=1e-12)
    if "banzhaf" in game.known:
        wanted = game.known["banzhaf"]
        np.testing.assert_allclose(banzhaf(u, sampler="exact").values, wanted, atol=1e-12)


def test_power_in_the_security_council():
    """Five members with a veto, ten without; nine votes of fifteen (Shapley and Shubik)."""
    game = voting([7] * 5 + [1] * 10, 39, [421 / 2145] * 5 + [4 / 2145] * 10, np.zeros(15))
    values = shapley(TableUtility(game.table), sampler="exact")
    np.testing.assert_allclose(values.values, game.shapley, atol=1e-12)


@pytest.mark.parametrize("law", sorted(LAWS))
@pytest.mark.parametrize("name", sorted(TABLES))
def test_all_subsets_give_the_sum_over_all_subsets(name: str, law: str):
    table = TABLES[name]
    n, kind = len(table).bit_length() - 1, LAWS[law]
    found = estimate(table, EverySubset(), kind)
    np.testing.assert_allclose(found.values, enumerated(table, kind.law(n)), atol=1e-12)
    assert (found.errors == 0).all()


@pytest.mark.parametrize("name", sorted(ESTIMATES))
@pytest.mark.slow
def test_samplers_agree_with_all_subsets(name: str):
    sampler, kind, readout, units = ESTIMATES[name]
    for table in (TABLES["rough"], TABLES["council"]):
        n = len(table).bit_length() - 1
        found = estimate(table, sampler, kind, readout, seed=1, units=units)
        truth = enumerated(table, kind.law(n))
        off = np.abs(found.values - truth)
        assert (off <= 5 * found.errors + 1e-6).all(), (off / found.errors).max()
        # and so many samples do tell: the errors are small beside what the values are
        assert np.median(found.errors) < 0.1 * np.abs(truth).mean()


# fewer units: what they are off by is to be what they say that it is
HONEST = {
    "permutations": 100,
    "permutations, beta": 200,
    "antithetic": 50,
    "stratified": 60,
    "stratified, beta": 250,
    "weighted": 400,
    "weighted, antithetic": 200,
    "weighted, beta": 400,
    "owen": 400,
    "owen, antithetic": 200,
    "owen, banzhaf": 400,
    "kernel": 200,
    "kernel, re-use": 200,
    "bernoulli, re-use": 400,
    "bernoulli, fit": 400,
    "bernoulli, antithetic": 300,
    "bernoulli, antithetic re-use": 200,
    "few rows, re-use": 600,
    "few rows, fit": 600,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HONEST))
def test_standard_errors_are_honest(name: str):
    sampler, kind, readout, _ = ESTIMATES[name]
    # of few rows, hardly any set of ministers decides
    for game in ("rough", "airport") if kind is RARE else ("rough", "airport", "council"):
        table = TABLES[game]
        n = len(table).bit_length() - 1
        truth = enumerated(table, kind.law(n))
        runs = [
            estimate(table, sampler, kind, readout, seed=seed, units=HONEST[name])
            for seed in range(200)
        ]
        errors = np.array([run.errors for run in runs])
        known = (errors > 0).all(axis=0)  # a vote that never matters has none
        assert known.sum() >= n - 1, game
        z = (np.array([run.values for run in runs]) - truth)[:, known] / errors[:, known]
        assert 0.7 < (z**2).mean() < 1.4, (game, (z**2).mean(axis=0))
        assert np.abs(z.mean(axis=0)).max() < 5 / np.sqrt(200), game


def test_shrunk_values_are_off_by_about_their_errors():
    """Fewer sets than four times the rows: a posterior, whose errors hold on average over rows."""
    rng = np.random.default_rng(0)
    worth, squares = rng.standard_normal(40), []
    law = HALF.law(40)
    for seed in range(30):
        masks = BernoulliSubsets().collect(Additive(worth, seed), law, seed, range(80))
        found = read_out(masks, HALF, "regression")
        squares.append((found.values - worth) ** 2 / found.errors**2)
    assert 0.7 < np.mean(squares) < 1.4


class Additive:
    """Sums of worths, with noise."""

    def __init__(self, worth, seed: int):
        self.worth, self.rng = worth, np.random.default_rng(1000 + seed)
        self.ends = 0.0, float(worth.sum())

    def masks(self, masks):
        return masks @ self.worth + 2 * self.rng.standard_normal(len(masks))

    def orders(self, orders, length, tolerance):
        raise NotImplementedError


tables = st.integers(1, 6).flatmap(
    lambda n: arrays(np.float64, 2**n, elements=st.floats(-1e3, 1e3, width=32))
)


@settings(max_examples=40, deadline=None)
@given(tables, st.integers(0, 2**20))
def test_efficiency_holds_in_every_run(table, seed: int):
    u = TableUtility(table)
    whole = table[-1] - table[0]
    assert shapley(u, sampler="exact").values.sum() == pytest.approx(whole, abs=1e-9)
    for sampler in ("permutations", "antithetic"):
        values = shapley(u, sampler=sampler, until=40, seed=seed).values
        assert values.sum() == pytest.approx(whole, abs=1e-9)
    if u.n > 1:
        values = shapley(u, sampler="kernel", until=200, seed=seed).values
        assert values.sum() == pytest.approx(whole, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(tables, st.sampled_from(sorted(LAWS)), st.data())
def test_axioms_of_semivalues(table, name: str, data):
    n = len(table).bit_length() - 1
    kind = LAWS[name] if name != "delta" or n > 3 else SHAPLEY
    other = data.draw(arrays(np.float64, 2**n, elements=st.floats(-1e3, 1e3, width=32)))
    scale = data.draw(st.floats(-3, 3))

    def values(of):
        return estimate(of, EverySubset(), kind).values

    bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
    combined = values(table + scale * other)
    np.testing.assert_allclose(combined, values(table) + scale * values(other), atol=1e-9)
    # a row that adds what it adds, whoever is there
    i = data.draw(st.integers(0, n - 1))
    without = bits @ np.where(np.arange(n) == i, 0, 1 << np.arange(n))
    assert values(table[without] + 3.0 * bits[:, i])[i] == pytest.approx(3.0, abs=1e-9)
    # two rows that may stand for each other
    if n > 1:
        j = data.draw(st.sampled_from([k for k in range(n) if k != i]))
        swapped = bits.copy()
        swapped[:, [i, j]] = bits[:, [j, i]]
        both = values(table + table[swapped @ (1 << np.arange(n))])
        assert both[i] == pytest.approx(both[j], abs=1e-9)


def test_functions_are_the_laws():
    u = TableUtility(TABLES["rough"])
    n = u.n
    every = shapley(u, sampler="exact")
    for found, law in (
        (banzhaf(every, p=0.3), Semivalue.of("banzhaf", p=0.3).law(n)),
        (beta_shapley(every, alpha=2, beta=3), beta_law(n, 2, 3)),
        (delta_shapley(every, 2, 5), SMALL.of("delta", lower=2, upper=5).law(n)),
        (semivalue(every, np.eye(n)[-1]), np.eye(n)[-1]),
        (beta_shapley(every, alpha=1, beta=1), shapley_law(n)),
    ):
        np.testing.assert_allclose(found.values, enumerated(u.table, law), atol=1e-12)
    without = leave_one_out(u)
    np.testing.assert_allclose(without.values, enumerated(u.table, np.eye(n)[-1]), atol=1e-12)
    assert without.converged is None
    assert without.samples is None


@pytest.mark.parametrize("n", [1, 2, 3, 50, 3_000])
def test_laws_are_distributions(n: int):
    for kind in (
        SHAPLEY,
        HALF,
        Semivalue.of("banzhaf", p=0.01),
        BETA,
        Semivalue.of("beta", alpha=16.0, beta=1.0),
    ):
        law = kind.law(n)
        assert law.shape == (n,)
        assert law.min() >= 0
        assert law.sum() == pytest.approx(1, abs=1e-9)
        for sampler in (WeightedSubsets(), OwenSubsets(levels=7), BernoulliSubsets(0.1)):
            assert sampler.sizes(law).sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    "sampler", ["permutations", "antithetic", "stratified", "subsets", "owen", "kernel", "exact"]
)
def test_very_few_rows(n: int, sampler):
    worth = np.array([2.0, -1.0, 0.5])[:n]
    u = FunctionUtility(lambda rows: worth[rows].sum(), n)
    if n == 1 and sampler == "kernel":
        with pytest.raises(ValueError, match="at least two rows"):
            shapley(u, sampler=sampler, until=60)
        return
    budget = None if sampler == "exact" else 60
    values = shapley(u, sampler=sampler, until=budget)
    assert np.abs(values.values - worth).max() <= np.nan_to_num(5 * values.errors).max() + 1e-6
    assert budget is None or values.provenance["evaluations"] <= budget


def test_samplers_are_told_and_made_again():
    for sampler, *_ in ESTIMATES.values():
        assert sampler_from(sampler.to_dict()) == sampler
    assert sampler_from(EverySubset().to_dict()) == EverySubset()


@pytest.mark.parametrize("name", sorted(ESTIMATES))
def test_units_depend_on_the_seed_and_their_number_alone(name: str):
    sampler, kind, *_ = ESTIMATES[name]
    ask, law = Looked(TABLES["rough"]), kind.law(9)
    whole = sampler.collect(ask, law, 3, range(150))
    parts = sampler.collect(ask, law, 3, range(1))
    for some in (range(1, 70), range(70, 71), range(71, 150)):
        parts = parts.joined(sampler.collect(ask, law, 3, some))  # pyright: ignore
    other = sampler.collect(ask, law, 4, range(150))
    for key, value in vars(whole).items():
        np.testing.assert_array_equal(value, getattr(parts, key))
    assert any(
        not np.array_equal(value, getattr(other, key), equal_nan=True)
        for key, value in vars(whole).items()
    )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda u: shapley(u, sampler="exakt"), "expected a sampler among"),
        (lambda u: shapley(u, seed=-1), "expected seed"),
        (lambda u: shapley(u, readout="mrs"), "expected readout"),
        (lambda u: shapley(u, readout="msr"), "independent sets"),
        (lambda u: shapley(u, sampler="subsets", readout="regression"), "use readout='msr'"),
        (lambda u: shapley(u, sampler="subsets", readout="marginal"), "marginal contributions"),
        (lambda u: shapley(u, n_jobs=0), "n_jobs"),
        (lambda u: shapley(u, sampler="exact", until=30), "room for all 64 subsets"),
        (lambda u: shapley(u, sampler=Stratified(2, 4)), "leaves out sets of 0 rows"),
        (lambda u: banzhaf(u, p=0), "expected p between 0 and 1"),
        (lambda u: banzhaf(u, p=0.3, sampler="antithetic"), "complements"),
        (lambda u: beta_shapley(u, alpha=0), "above 0"),
        (lambda u: delta_shapley(u, 3, 2), "expected upper"),
        (lambda u: delta_shapley(u, 0, 6), "expected upper"),
        (lambda u: semivalue(u, [0.5, 0.5]), "a law of 6 numbers"),
        (lambda u: semivalue(u, np.full(6, 0.5)), "sum 1"),
        (lambda u: semivalue(u, [-1.0, 2.0, 0, 0, 0, 0]), "≥ 0"),
        (lambda u: BernoulliSubsets(1.0), "between 0 and 1"),
        (lambda u: OwenSubsets(levels=0), "levels"),
    ],
)
def test_wrong_arguments_are_refused_at_once(call, match: str):
    u = TableUtility(COUNCIL.table)
    with pytest.raises(ValueError, match=match):
        call(u)
    assert u.asked <= 66  # of one round at most


def test_too_many_rows_for_all_subsets():
    with pytest.raises(ValueError, match="at most 20 rows"):
        shapley(FunctionUtility(lambda rows: 0.0, 21), sampler="exact")


def test_a_row_that_fails_alone_has_no_value_and_no_zero():
    u = FunctionUtility(lambda rows: float("nan") if len(rows) == 7 else len(rows), 8)
    with pytest.warns(ValueWarning, match="8 of 8 utilities could not be computed"):
        values = leave_one_out(u)
    assert np.isnan(values.values).all()


def test_what_is_no_utility_is_refused():
    with pytest.raises(TypeError, match=r"expected a Utility, .* or earlier Values; got list"):
        shapley([1.0, 2.0])
