"""Read-outs and regressions against the plainest formulas; one value from samples of another."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from upweight.valuation import (
    BernoulliSubsets,
    KernelSubsets,
    OwenSubsets,
    Permutations,
    Stratified,
    WeightedSubsets,
    banzhaf,
    beta_shapley,
    delta_shapley,
    leave_one_out,
    semivalue,
    shapley,
)
from upweight.valuation.laws import Semivalue, beta_law
from upweight.valuation.readouts import choose_readout, read_out
from upweight.valuation.samples import OrderSamples, PairSamples, SetSamples
from value_games import Looked, TableUtility, enumerated, rough

SHAPLEY, HALF = Semivalue.of("shapley"), Semivalue.of("banzhaf", p=0.5)
TABLE = rough(9)
U = TableUtility(TABLE)


def drawn(sampler, kind: Semivalue, units: int, table=TABLE):
    n = len(table).bit_length() - 1
    return sampler.collect(Looked(table), kind.law(n), 0, range(units))


def scattered(sets: int, n: int, p: float, seed: int = 0) -> tuple[np.ndarray, SetSamples]:
    """Random sets of many rows, with a utility that is additive but for noise."""
    rng = np.random.default_rng(seed)
    masks = rng.random((sets, n)) < p
    u = masks @ (0.3 + rng.standard_normal(n)) + rng.standard_normal(sets)
    sizes = BernoulliSubsets(p).sizes(np.empty(n))
    return masks, SetSamples(np.packbits(masks, axis=1), n, u, sizes, (0.0, 1.0))


@pytest.mark.parametrize("n", [5, 8, 40])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_re_use_is_the_plain_difference_of_means(n: int, p: float):
    masks, samples = scattered(700, n, p)
    found = read_out(samples, Semivalue.of("banzhaf", p=p), "msr")
    m, u = masks.astype(float), samples.utilities
    with_it, without = m.sum(axis=0), (1 - m).sum(axis=0)
    wanted = m.T @ u / with_it - (1 - m).T @ u / without
    np.testing.assert_allclose(found.values, wanted, rtol=0, atol=1e-12)
    sides = [[u[masks[:, i]] for i in range(n)], [u[~masks[:, i]] for i in range(n)]]
    # the error of a difference of two means; each knows the variance of a set of the others, too
    inner, outer = (
        moderated([some.var(ddof=1) for some in side], list(map(len, side))) for side in sides
    )
    np.testing.assert_allclose(found.errors, np.sqrt(inner + outer), rtol=1e-9)
    np.testing.assert_array_equal(found.counts, np.minimum(with_it, without))


def moderated(draws, counts):
    """Variances of means from the variances of a draw, and the mean of these as one draw more."""
    draws, counts = np.asarray(draws), np.asarray(counts)
    typical = ((counts - 1) * draws).sum() / (counts - 1).sum()
    return ((counts - 1) * draws + typical) / counts**2


@pytest.mark.parametrize("readout", ["marginal", "msr", "pairs"])
def test_draws_that_happen_to_be_alike_are_not_known_for_sure(readout: str):
    """Rows 0 to 3 add nothing in the sets that were drawn; other rows do now and then."""
    rng = np.random.default_rng(0)
    if readout == "msr":
        masks = rng.random((60, 6)) < 0.5
        u = (masks[:, 4] * masks[:, 5]).astype(float)
        sizes = BernoulliSubsets(0.5).sizes(np.empty(6))
        samples = SetSamples(np.packbits(masks, axis=1), 6, u, sizes, (0.0, 1.0))
        found = read_out(samples, HALF, "msr")
    elif readout == "pairs":
        marginals = np.zeros((60, 6))
        marginals[:, 4:] = rng.random((60, 2)) < 0.5
        before = np.tile(np.arange(60)[:, None] % 6, 6).astype(np.int32)
        found = read_out(PairSamples(marginals, before, np.full(6, 1 / 6)), SHAPLEY, "marginal")
    else:
        orders = rng.permuted(np.tile(np.arange(6, dtype=np.int32), (60, 1)), axis=1)
        places = orders.argsort(axis=1)
        joined = np.maximum(places[:, 4], places[:, 5])  # both must be there
        u = (np.arange(7) > joined[:, None]).astype(float)
        samples = OrderSamples(orders, u, np.full(60, 6, np.int32))
        found = read_out(samples, SHAPLEY, "marginal")
    assert (found.errors > 0).all()
    if readout != "msr":  # where the utilities of sets with the row vary like any
        np.testing.assert_allclose(found.values[:4], 0, atol=1e-12)
        assert (found.errors[:4] < found.errors[4:].min()).all()
        assert (found.errors[:4] > found.errors[4:].min() / 60).all()


def test_one_set_does_not_tell_how_sure_it_is():
    masks = np.zeros((50, 3), np.bool_)
    masks[:25, 0] = masks[::2, 1] = masks[7, 2] = True
    u = np.random.default_rng(0).standard_normal(50)
    sizes = BernoulliSubsets(0.5).sizes(np.empty(3))
    found = read_out(SetSamples(np.packbits(masks, axis=1), 3, u, sizes, (0.0, 1.0)), HALF, "msr")
    assert np.isfinite(found.values).all()
    np.testing.assert_array_equal(np.isnan(found.errors), [False, False, True])


def test_failed_sets_count_nowhere():
    masks, samples = scattered(400, 6, 0.5)
    failed = np.random.default_rng(1).random(400) < 0.2
    u = np.where(failed, np.nan, samples.utilities)
    both = [
        SetSamples(np.packbits(masks, axis=1), 6, u, samples.sizes, samples.ends),
        SetSamples(np.packbits(masks[~failed], axis=1), 6, u[~failed], samples.sizes, samples.ends),
    ]
    for kind, readout in ((HALF, "msr"), (HALF, "regression"), (SHAPLEY, "msr")):
        a, b = (read_out(some, kind, readout) for some in both)
        np.testing.assert_allclose(a.values, b.values, atol=1e-12)
        np.testing.assert_allclose(a.errors, b.errors, atol=1e-12)
        np.testing.assert_array_equal(a.counts, b.counts)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_fit_is_least_squares_with_an_intercept(p: float):
    masks, samples = scattered(300, 12, p)
    found = read_out(samples, Semivalue.of("banzhaf", p=p), "regression")
    design = np.column_stack([np.ones(300), masks])
    wanted, *_ = np.linalg.lstsq(design, samples.utilities, rcond=None)
    np.testing.assert_allclose(found.values, wanted[1:], atol=1e-9)
    # errors: the sandwich, with each residual over the root of what is free of it
    bread = np.linalg.inv(design.T @ design)
    hat = np.einsum("mi,ij,mj->m", design, bread, design)
    meat = design * ((samples.utilities - design @ wanted) / np.sqrt(1 - hat))[:, None]
    wanted_errors = np.sqrt(np.diag(bread @ meat.T @ meat @ bread))[1:]
    np.testing.assert_allclose(found.errors, wanted_errors, rtol=1e-7)


def test_row_that_was_always_there_has_no_fitted_value():
    masks, samples = scattered(300, 5, 0.5)
    masks[:, 2] = True
    samples = SetSamples(np.packbits(masks, 1), 5, samples.utilities, samples.sizes, samples.ends)
    for readout in ("regression", "msr"):
        found = read_out(samples, HALF, readout)
        assert np.isnan(found.values[2])
        assert np.isnan(found.errors[2])
        assert np.isfinite(np.delete(found.values, 2)).all()


@pytest.mark.parametrize(("sets", "n"), [(60, 30), (25, 40), (100, 26)])
def test_fit_with_few_sets_is_a_posterior(sets: int, n: int):
    """Against dense normal equations, and a likelihood by determinants."""
    masks, samples = scattered(sets, n, 0.5, seed=sets)
    found = read_out(samples, HALF, "regression")
    z = masks - masks.mean(axis=0)
    u = samples.utilities - samples.utilities.mean()
    size = z.sum(axis=1)

    def posterior(ratio: float):
        # all of (m, b): u = m s + Z b + e, a flat prior on m, b ~ N(0, ratio) in units of the noise
        design = np.column_stack([size, z])
        precision = design.T @ design + np.diag([0.0, *[1 / ratio] * n])
        covariance = np.linalg.inv(precision)
        joint = covariance @ design.T @ u
        to_values = np.column_stack([np.ones(n), np.eye(n)])
        return to_values @ joint, to_values @ covariance @ to_values.T

    # restricted: u without what lies along the size, in sets − 2 directions
    basis = np.linalg.svd(np.column_stack([np.ones(sets), size]))[0][:, 2:]
    v, degrees = basis.T @ u, sets - 2

    def covariance_of(ratio: float) -> np.ndarray:
        return np.eye(degrees) + ratio * basis.T @ z @ z.T @ basis

    def noise_of(ratio: float) -> float:
        return v @ np.linalg.solve(covariance_of(ratio), v) / degrees

    def minus_log_likelihood(log_ratio: float) -> float:
        ratio = np.exp(log_ratio)
        return np.linalg.slogdet(covariance_of(ratio))[1] + degrees * np.log(noise_of(ratio))

    best = minimize_scalar(minus_log_likelihood, bounds=(-6, 6), options={"xatol": 1e-8})
    assert -5 < best.x < 5
    values, covariance = posterior(np.exp(best.x))
    errors = np.sqrt(noise_of(np.exp(best.x)) * np.diag(covariance))
    np.testing.assert_allclose(found.values, values, atol=1e-4 * values.std())
    np.testing.assert_allclose(found.errors, errors, rtol=1e-4)


def test_kernel_regression_solves_its_optimality_conditions():
    samples = drawn(KernelSubsets(), SHAPLEY, 200)
    found = read_out(samples, SHAPLEY, "regression")
    z, u = samples.masks.astype(float), samples.utilities - samples.ends[0]
    n = samples.n
    kkt = np.block([[z.T @ z, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    wanted = np.linalg.solve(kkt, np.append(z.T @ u, samples.ends[1] - samples.ends[0]))[:n]
    np.testing.assert_allclose(found.values, wanted, atol=1e-7)
    assert found.values.sum() == pytest.approx(samples.ends[1] - samples.ends[0], abs=1e-12)


def test_values_from_orders_are_weighted_means_of_contributions():
    kind = Semivalue.of("beta", alpha=4.0, beta=1.0)
    samples = drawn(Permutations(), kind, 50)
    law, terms = beta_law(9, 4.0, 1.0), np.empty((50, 9))
    for t, order in enumerate(samples.orders):
        before = 0
        for k, row in enumerate(order):
            after = before | 1 << int(row)
            terms[t, row] = 9 * law[k] * (TABLE[after] - TABLE[before])
            before = after
    found = read_out(samples, kind, "marginal")
    np.testing.assert_allclose(found.values, terms.mean(axis=0), atol=1e-12)
    wanted = moderated(terms.var(axis=0, ddof=1), np.full(9, 50))
    np.testing.assert_allclose(found.errors, np.sqrt(wanted), rtol=1e-9)
    np.testing.assert_array_equal(found.counts, 50)


def test_errors_of_antithetic_orders_are_those_of_pairs():
    samples = drawn(Permutations(antithetic=True), SHAPLEY, 40)
    assert samples.units == 40
    np.testing.assert_array_equal(samples.orders[::2], samples.orders[1::2, ::-1])
    plain = OrderSamples(samples.orders, samples.utilities, samples.lengths)
    terms = np.empty((80, 9))
    np.put_along_axis(terms, samples.orders.astype(int), np.diff(samples.utilities, axis=1), axis=1)
    pairs = terms.reshape(40, 2, 9).mean(axis=1)
    found = read_out(samples, SHAPLEY, "marginal")
    np.testing.assert_allclose(
        found.values, read_out(plain, SHAPLEY, "marginal").values, atol=1e-12
    )
    wanted = moderated(pairs.var(axis=0, ddof=1), np.full(9, 40))
    np.testing.assert_allclose(found.errors, np.sqrt(wanted), rtol=1e-9)


def test_values_of_strata_are_weighted_means():
    kind = Semivalue.of("beta", alpha=4.0, beta=1.0)
    samples = drawn(Stratified(decay=0.5), kind, 30)
    assert isinstance(samples, PairSamples)
    weights = kind.law(9) / samples.sizes
    wanted = (samples.marginals * weights[samples.before]).mean(axis=0)
    np.testing.assert_allclose(read_out(samples, kind, "marginal").values, wanted, atol=1e-12)
    # all sizes in turn: after 30 draws each row has met each size about as often as it should
    many = np.stack([(samples.before == k).sum(axis=0) for k in range(9)])
    assert np.abs(many - 30 * samples.sizes[:, None]).max() < 2


# ------------------------------------------------------------------- one value from another's


FROM = {
    "permutations": lambda u: shapley(u, until=80_000),
    "subsets": lambda u: shapley(u, sampler="subsets", until=40_000),
    "owen": lambda u: shapley(u, sampler="owen", until=40_000),
    "kernel": lambda u: shapley(u, sampler="kernel", until=40_000),
    "stratified": lambda u: shapley(u, sampler="stratified", until=40_000),
    "banzhaf": lambda u: banzhaf(u, until=40_000),
    "exact": lambda u: shapley(u, sampler="exact"),
}
TO = {
    "shapley": shapley,
    "banzhaf": banzhaf,
    "beta": lambda v: beta_shapley(v, alpha=4),
    "delta": lambda v: delta_shapley(v, 2, 5),
    "law": lambda v: semivalue(v, np.full(9, 1 / 9)),
}


@pytest.mark.parametrize("source", sorted(FROM))
def test_other_values_from_the_same_samples(source: str):
    first = FROM[source](U)
    before = U.asked
    for read in TO.values():
        values = read(first)
        told = values.provenance["semivalue"]
        law = Semivalue(told["kind"], tuple((k, v) for k, v in told["options"])).law(9)
        truth = enumerated(TABLE, law)
        assert (np.abs(values.values - truth) <= 5 * values.errors + 1e-9).all()
        assert values.converged is None
        assert "read out of samples for" in values.stopped
        assert values.samples is first.samples
    assert U.asked == before


def test_reading_again_is_the_formula_on_what_is_stored():
    orders = shapley(U, sampler="permutations", until=800)
    samples = orders.samples
    weights = 9 * HALF.law(9)
    terms = np.empty((samples.units, 9))
    marginals = np.diff(samples.utilities, axis=1) * weights
    np.put_along_axis(terms, samples.orders.astype(int), marginals, axis=1)
    np.testing.assert_allclose(banzhaf(orders).values, terms.mean(axis=0), atol=1e-12)
    # and back
    np.testing.assert_array_equal(shapley(banzhaf(orders)).values, orders.values)


def test_orders_that_end_early_do_not_tell_of_longer_ones():
    short = delta_shapley(U, 0, 3, sampler="permutations", until=400)
    assert short.samples.lengths.max() == 4
    fine = delta_shapley(short, 0, 2)
    assert np.isfinite(fine.values).all()
    for read in (shapley, banzhaf, lambda v: delta_shapley(v, 2, 4)):
        for values in (short, fine):
            with pytest.raises(ValueError, match="orders of at least"):
                read(values)


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (lambda: delta_shapley(U, 1, 3, until=400), shapley),
        (lambda: delta_shapley(U, 1, 3, sampler="subsets", until=400), shapley),
        (lambda: semivalue(U, np.eye(9)[0], until=400), banzhaf),
    ],
)
def test_sizes_that_were_not_drawn_are_refused(first, again):
    with pytest.raises(ValueError, match="sizes that"):
        again(first())


def test_sets_that_hardly_tell_are_refused():
    table = rough(14, noise=0.0)
    values = banzhaf(TableUtility(table), p=0.05, until=300)
    with pytest.raises(ValueError, match="hardly ever drawn"):
        shapley(values)
    with pytest.raises(ValueError, match="for a regression"):
        banzhaf(values, p=0.5, readout="regression")


def test_closed_forms_cannot_be_read_again():
    with pytest.raises(ValueError, match="closed form"):
        shapley(leave_one_out(U))


@pytest.mark.parametrize("n", [6_000, 20_000])
@pytest.mark.parametrize("sampler", [WeightedSubsets(), OwenSubsets()])
def test_few_sets_of_many_rows_are_not_refused(n: int, sampler):
    """A set of each size would take n of them; those of about a size will do."""
    rng = np.random.default_rng(0)
    sizes = sampler.sizes(SHAPLEY.law(n))
    masks = rng.random((256, n)) < rng.random((256, 1))
    u = masks.mean(axis=1)
    samples = SetSamples(np.packbits(masks, axis=1), n, u, sizes, (0.0, 1.0))
    found = read_out(samples, SHAPLEY, "msr")
    assert found.values.sum() == pytest.approx(1.0, abs=1e-9)


def test_which_readout_is_chosen():
    sets = drawn(BernoulliSubsets(), HALF, 64)
    assert choose_readout(sets, HALF, "auto") == "regression"
    assert choose_readout(sets, Semivalue.of("banzhaf", p=0.4), "auto") == "msr"
    assert choose_readout(sets, SHAPLEY, "auto") == "msr"
    assert choose_readout(drawn(KernelSubsets(), SHAPLEY, 64), SHAPLEY, "auto") == "regression"
    assert choose_readout(drawn(KernelSubsets(), SHAPLEY, 64), HALF, "auto") == "msr"
    assert choose_readout(drawn(Permutations(), HALF, 4), HALF, "auto") == "marginal"
