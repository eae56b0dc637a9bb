"""When runs stop, what they say of it, and that going on is the same as having gone on."""

from __future__ import annotations

import hashlib
import warnings

import numpy as np
import pandas as pd
import pytest

from upweight.valuation import (
    Evaluations,
    FunctionUtility,
    KernelSubsets,
    KnnUtility,
    Minutes,
    OwenSubsets,
    Permutations,
    RankStability,
    StandardError,
    Stratified,
    Utility,
    Values,
    ValueWarning,
    WeightedSubsets,
    banzhaf,
    beta_shapley,
    delta_shapley,
    knn_shapley,
    least_core,
    leave_one_out,
    shapley,
)
from upweight.valuation.samples import Estimate
from upweight.valuation.states import State
from upweight.valuation.stopping import Stopping, Verdict, default_rule, rule_from
from upweight.valuation.utility import Evaluated
from value_games import ChainedTable, TableUtility, rough

TABLE = rough(9)


class Noise(Utility):
    """A number for each set that has nothing to do with its rows."""

    prefer = "threads"
    fingerprint = None

    def __init__(self, n: int):
        from upweight.valuation import UtilityCache

        self.n, self.cache, self.names = n, UtilityCache(), pd.RangeIndex(n)

    def evaluate(self, masks):
        digests = (hashlib.blake2b(m.tobytes(), digest_size=8).digest() for m in masks)
        return Evaluated(np.array([int.from_bytes(d) / 2**64 for d in digests]))


def additive(n: int = 30) -> FunctionUtility:
    worth = np.random.default_rng(0).standard_normal(n)
    return FunctionUtility(lambda rows: worth[rows].sum(), n)


def state(values, errors, units=30, evaluations=100, seconds=1.0) -> State:
    values, errors = np.asarray(values, float), np.asarray(errors, float)
    estimate = Estimate(values, errors, np.full(len(values), units))
    return State(lambda units: estimate, units, evaluations, seconds)


class Says(Stopping):
    """A rule with one answer."""

    def __init__(self, stop: bool, converged: bool | None, room: float = np.inf):
        self.verdict, self.left = Verdict(stop, converged, "said"), room

    def judge(self, state):
        return self.verdict

    def room(self, state):
        return self.left

    def __str__(self):
        return "says"


def test_rules_combine():
    any_state = state([1.0, 2.0], [0.1, 0.1])
    for a in (True, False):
        for b in (True, False):
            assert (Says(a, None) & Says(b, None)).judge(any_state).stop == (a and b)
            assert (Says(a, None) | Says(b, None)).judge(any_state).stop == (a or b)
    # a budget says nothing of quality
    assert (Says(True, None) | Says(True, None)).judge(any_state).converged is None
    assert (Says(True, None) | Says(False, False)).judge(any_state).converged is False
    assert (Says(True, None) | Says(True, True)).judge(any_state).converged is True
    assert (Says(True, True) & Says(True, None)).judge(any_state).converged is True
    assert (Says(True, True) & Says(False, False)).judge(any_state).converged is False
    assert (Says(False, False) | Says(True, True)).judge(any_state).converged is True
    assert (Says(True, None, 5) | Says(True, None, 7)).room(None) == 5
    assert (Says(True, None, 5) & Says(True, None, 7)).room(None) == 7


def test_rules_print():
    rule = (StandardError(0.2, share=0.9) & RankStability(0.9)) | Evaluations(5000) | Minutes(1.5)
    assert str(rule) == (
        "(((standard error ≤ 0.2 of the spread for 90% of the rows & rank stability ≥ 0.9) | "
        "5,000 evaluations) | 1.5 minutes)"
    )
    assert str(StandardError(absolute=0.01)) == "standard error ≤ 0.01"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Evaluations(0),
        lambda: Evaluations(2.5),  # pyright: ignore
        lambda: Minutes(0),
        lambda: Minutes(float("nan")),
        lambda: StandardError(0),
        lambda: StandardError(absolute=-1),
        lambda: StandardError(share=0),
        lambda: StandardError(share=1.1),
        lambda: RankStability(1.0),
        lambda: RankStability(0.9, level=1),
    ],
)
def test_rules_that_make_no_sense(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_what_until_may_be():
    assert rule_from(None, 50) == default_rule(50)
    assert rule_from(np.int64(7), 5) == Evaluations(7)
    for wrong in (True, 2.5, "soon", [Evaluations(3)]):
        with pytest.raises(TypeError, match="expected until"):
            rule_from(wrong, 5)
    with pytest.raises(ValueError, match="evaluations"):
        shapley(additive(), until=0)


def test_standard_errors():
    values = [0.0, 2.0, 0.0, 2.0]  # spread 1
    for errors, relative, met in (
        ([0.1] * 4, 0.1, True),
        ([0.1, 0.1, 0.1, 0.11], 0.1, False),
        ([0.1, 0.1, 0.1, np.nan], 0.1, False),
        ([0.0] * 4, 0.1, True),
    ):
        verdict = StandardError(relative).judge(state(values, errors))
        assert (verdict.stop, verdict.converged) == (met, met)
    three = state(values, [0.1, 0.1, 0.1, 9.0])
    assert StandardError(0.1, share=0.75).judge(three).stop
    assert not StandardError(0.1, share=0.76).judge(three).stop
    assert StandardError(absolute=0.1, share=0.75).judge(three).stop
    assert not StandardError(absolute=0.05).judge(three).stop
    assert not StandardError(absolute=9).judge(state([1.0, np.nan], [0.1, np.nan])).stop
    # fewer draws than an error can be believed from, though it is small
    assert not StandardError(0.1).judge(state(values, [0.0] * 4, units=29)).stop
    some = state(values, [0.0] * 4)
    some.estimate.counts[0] = 29
    assert not StandardError(0.1).judge(some).stop
    assert StandardError(0.1, share=0.75).judge(some).stop
    # one draw, whose errors nobody knows; values without a spread
    assert not StandardError(0.1).judge(state(values, [0.0] * 4, units=1)).stop
    assert not StandardError(0.1).judge(state([1.0, 1.0], [0.1, 0.1])).stop
    assert StandardError(0.1).judge(state([1.0, 1.0], [0.0, 0.0])).stop


def test_a_run_until_errors_are_small():
    u = TableUtility(TABLE)
    for rule in (StandardError(0.05), StandardError(absolute=0.004, share=0.8)):
        values = shapley(u, sampler="permutations", until=rule | Evaluations(200_000))
        assert values.converged is True
        bound = 0.05 * values.values.std() if rule.absolute is None else 0.004
        assert (values.errors <= bound).mean() >= rule.share
        assert 0 < values.provenance["evaluations"] < 200_000
    assert str(rule) in values.stopped


def test_stable_ranks():
    values = banzhaf(additive(), readout="msr", until=RankStability(0.9) | Evaluations(50_000))
    assert values.converged is True
    assert "rank stability" in values.stopped
    again = banzhaf(additive(), readout="msr", seed=1, until=values.provenance["evaluations"])
    found = np.corrcoef(*(v.values.argsort().argsort() for v in (values, again)))[0, 1]
    assert found > 0.9


@pytest.mark.parametrize("sampler", ["permutations", "subsets"])
def test_noise_never_converges(sampler: str):
    rule = RankStability(0.95) | Evaluations(6_000)
    with pytest.warns(ValueWarning, match="did not converge"):
        values = shapley(Noise(40), sampler=sampler, until=rule)
    assert values.converged is False
    assert values.provenance["evaluations"] <= 6_000
    assert (values.history["low"] < 0.95).all()
    assert (values.history["stability"].iloc[-3:] < 0.7).all()


def test_the_default_says_so():
    with pytest.warns(ValueWarning, match=r"did not converge.*values\.more"):
        values = banzhaf(Noise(25))
    assert values.converged is False
    assert "2,500 evaluations" in values.stopped
    assert "not converged" in repr(values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = banzhaf(additive())
    assert good.converged is True
    assert ", converged" in repr(good)
    assert banzhaf(Noise(25), until=100).converged is None
    assert leave_one_out(additive()).converged is None
    assert shapley(TableUtility(TABLE), sampler="exact").converged is None


SAMPLERS = {
    "permutations": Permutations(),
    "antithetic": Permutations(antithetic=True),
    "stratified": Stratified(),
    "weighted": WeightedSubsets(),
    "weighted pairs": WeightedSubsets(antithetic=True),
    "owen": OwenSubsets(),
    "levels": OwenSubsets(levels=7),
    "kernel": KernelSubsets(),
}


@pytest.mark.filterwarnings("ignore:9 of 9 rows have no value")  # one set tells of none
@pytest.mark.parametrize("most", [1, 17, 100, 999, 1_234])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_budgets_are_kept(name: str, most: int):
    u, sampler = TableUtility(TABLE), SAMPLERS[name]
    asked = shapley(u, sampler=sampler, until=most).provenance["evaluations"]
    one = sampler.cost(np.full(9, 1 / 9))
    assert asked <= max(most, one)
    assert asked > most - one  # and are used
    rule = RankStability(0.9999) | Evaluations(most)
    with pytest.warns(ValueWarning, match="converge"):
        assert shapley(u, sampler=sampler, until=rule).provenance["evaluations"] == asked


def same(a: Values, b: Values) -> None:
    for name in ("values", "errors", "counts"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name, value in vars(a.samples).items():
        np.testing.assert_array_equal(value, getattr(b.samples, name))
    assert a.provenance["evaluations"] == b.provenance["evaluations"]
    assert a.stopped == b.stopped
    pd.testing.assert_frame_equal(a.history, b.history)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_going_on_is_one_long_run(name: str):
    whole = shapley(TableUtility(TABLE), sampler=SAMPLERS[name], until=1_500, seed=5)
    u = TableUtility(TABLE)
    values = shapley(u, sampler=SAMPLERS[name], until=100, seed=5)
    for until in (101, 700, 1_500):
        values = values.more(u, until)
    same(values, whole)
    same(values.more(u, 900), whole)  # nothing to do


@pytest.mark.parametrize("kind", [TableUtility, ChainedTable])
def test_going_on_with_truncated_orders(kind):
    table = np.tanh(3 * rough(12, noise=0.0))
    whole = shapley(kind(table), truncation=0.05, until=1_500)
    u = kind(table)
    values = shapley(u, truncation=0.05, until=200).more(u, 640).more(u, 1_500)
    same(values, whole)
    assert (whole.samples.lengths < 12).any()


def test_going_on_with_other_values(tmp_path):
    u = TableUtility(TABLE, fingerprint="rough")
    whole = banzhaf(u, p=0.1, readout="regression", until=800)
    half = banzhaf(u, p=0.1, readout="regression", until=300)
    half.save(tmp_path / "half.npz")
    again = Values.load(tmp_path / "half.npz").more(TableUtility(TABLE, fingerprint="rough"), 800)
    same(again, whole)
    with pytest.raises(ValueError, match="got another one"):
        half.more(TableUtility(TABLE, fingerprint="other"), 800)
    with pytest.raises(ValueError, match="got another one"):
        half.more(TableUtility(rough(8)), 800)
    with pytest.raises(ValueError, match="these are of leave-one-out"):
        leave_one_out(u).more(u, 10)
    with pytest.raises(ValueError, match="these are of KNN-Shapley"):
        knn_shapley(np.eye(4), [0, 1, 0, 1], k=1).more(u, 10)


@pytest.mark.parametrize("sampler", ["subsets", "permutations", "stratified"])
def test_going_on_with_values_that_were_read_again(sampler):
    """Sets must still be drawn as for the first value, whose law of sizes is on record."""
    u = TableUtility(TABLE)
    whole = beta_shapley(u, alpha=4, sampler=sampler, until=2_000)
    part = shapley(beta_shapley(u, alpha=4, sampler=sampler, until=500))
    going = part.more(u, 2_000)
    same(beta_shapley(going, alpha=4), beta_shapley(shapley(whole), alpha=4))
    np.testing.assert_array_equal(going.values, shapley(whole).values)


def test_exact_values_are_complete():
    u = TableUtility(TABLE)
    values = shapley(u, sampler="exact")
    asked = u.asked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        more = values.more(u)
    np.testing.assert_array_equal(more.values, values.values)
    assert more.converged is None
    assert u.asked == asked


def rare(rows) -> float:
    """What rows are worth alone, but for one set of 35 of its size."""
    return float(np.arange(1.0, 8.0)[rows].sum()) - 200.0 * (set(rows.tolist()) == {0, 1, 3, 5})


@pytest.mark.parametrize(
    "until", [None, 1_000, np.int64(128), StandardError(0.1), RankStability(0.9)]
)
def test_few_rows_are_known_exactly(until):
    truth = shapley(FunctionUtility(rare, 7), sampler="exact").values
    for ask in (shapley, beta_shapley, banzhaf, delta):
        values = ask(FunctionUtility(rare, 7), until=until, seed=2)
        assert values.provenance["sampler_name"] == "exact"
        assert values.provenance["evaluations"] == 128
        assert values.converged is None
        assert not values.errors.any()
    np.testing.assert_array_equal(shapley(FunctionUtility(rare, 7), until=until).values, truth)


def delta(utility, **options):
    return delta_shapley(utility, 0, 3, **options)


def test_what_is_asked_for_is_done():
    """All subsets only where nothing else is asked for, and there is room."""
    u = TableUtility(TABLE)
    for options in (
        {"sampler": "permutations", "until": 600},
        {"until": 511},
        {"until": Minutes(1) | Evaluations(600)},
        {"until": 600, "truncation": 0.01},
        {"until": 600, "readout": "marginal"},
    ):
        assert shapley(u, **options).provenance["sampler_name"] == "permutations"
    assert shapley(u, until=512).provenance["sampler_name"] == "exact"
    assert shapley(TableUtility(rough(11)), until=3_000).provenance["sampler_name"] == (
        "permutations"
    )


def test_few_rows_of_which_some_sets_fail():
    def wants_two(rows):
        if len(rows) == 1:
            raise ArithmeticError("too few")
        return float(len(rows))

    with pytest.warns(ValueWarning, match="6 of 600 utilities could not"):
        values = shapley(FunctionUtility(wants_two, 6), until=600)
    assert values.provenance["sampler_name"] == "permutations"
    assert values.provenance["failed"]
    assert np.isfinite(values.values).all()
    with pytest.raises(ValueError, match="6 of 64 failed"):
        shapley(FunctionUtility(wants_two, 6), sampler="exact")


def test_a_few_orders_are_not_enough():
    """Most rows change no prediction in four orders, whatever they do in others."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 2)), rng.integers(2, size=60)
    u = KnnUtility((x, y), (x[:30], y[:30]), 5, "accuracy")
    values = shapley(u, until=StandardError(0.5, share=0.5) | Evaluations(200_000))
    assert values.converged is True
    assert values.counts.min() >= 30
    assert (values.errors > 0).all()


@pytest.mark.parametrize(
    "rule",
    [
        RankStability(0.9),
        RankStability(0.9) & Evaluations(100),
        RankStability(0.9) & StandardError(0.1),
        (RankStability(0.9) & Minutes(1)) | RankStability(0.8),
    ],
)
def test_ranks_of_few_rows_are_refused(rule):
    with pytest.raises(ValueError, match="7 rows can fulfil"):
        shapley(FunctionUtility(rare, 7), sampler="permutations", until=rule)


def test_rules_without_a_budget_end(monkeypatch):
    """Values that are all alike never have stable ranks."""
    from upweight.valuation import stopping

    monkeypatch.setattr(stopping, "CEILING", 2)
    alike = FunctionUtility(lambda rows: float(len(rows) >= 6), 12)
    for rule in (RankStability(0.9), RankStability(0.9) & Evaluations(500)):
        with pytest.warns(ValueWarning, match="did not converge.*4,000 evaluations"):
            values = shapley(alike, until=rule)
        assert values.converged is False
        assert 500 < values.provenance["evaluations"] <= 4_000
    # a rule that has one keeps it
    ends = StandardError(1e-9) | Evaluations(700)
    assert stopping.ending(ends, 12) is ends
    assert stopping.ending(Minutes(1) & Evaluations(7), 12).room(None) == np.inf


def test_values_that_are_there_are_not_sampled_anew():
    u = TableUtility(TABLE)
    sets = banzhaf(u, sampler="subsets", until=400)
    for options in ({"sampler": "owen"}, {"until": 900}, {"seed": 1}, {"truncation": 0.1}):
        with pytest.raises(ValueError, match="beside earlier values"):
            shapley(sets, **options)
    told = banzhaf(least_core(sets)).provenance
    assert not {"deficit", "constraints", "egalitarian"} & set(told)
    assert told["method"] == sets.provenance["method"]
    for wrong in ("a", None, np.eye(3)):
        for ask in (shapley, banzhaf, leave_one_out):
            with pytest.raises(TypeError, match="expected a Utility"):
                ask(wrong)
    with pytest.raises(TypeError, match="expected a Utility"):
        leave_one_out(sets)


def test_minutes(monkeypatch):
    """Under a clock that is moved by the utility: a tenth of a second for each set."""
    import time

    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(rows):
        clock[0] += 0.1
        return float(rows.sum()) + len(rows) % 3

    u = FunctionUtility(slow, 40)
    values = banzhaf(u, until=Minutes(2.0))
    assert values.converged is None
    assert "minutes" in values.stopped
    assert 100 < values.provenance["seconds"] <= 125
    more = values.more(u, Minutes(3.0))
    assert 165 < more.provenance["seconds"] <= 185
    assert 1_500 < more.provenance["evaluations"] < 1_850


def test_history():
    u = TableUtility(TABLE)
    rule = RankStability(0.9999) | Evaluations(2_000)
    with pytest.warns(ValueWarning, match="converge"):
        history = shapley(u, sampler="permutations", until=rule).history
    assert {"evaluations", "error", "stability", "low", "high"} <= set(history.columns)
    assert history["evaluations"].is_monotonic_increasing
    assert (history["low"] <= history["stability"]).all()
    assert (history["stability"] <= history["high"]).all()
    assert history["error"].iloc[-1] < history["error"].iloc[0]
