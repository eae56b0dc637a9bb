"""What leaving out rows does, by training again."""

from __future__ import annotations

import numpy as np
import pytest

from upweight.evaluate import RetrainingWarning, actual_effects, leave_one_out

N, M = 12, 5
X = np.random.default_rng(0).normal(size=(N, M))


def means(rows, seed):
    """A model whose outputs depend on the rows and on the seed."""
    return X[rows].mean(axis=0) + np.random.default_rng([seed, len(rows)]).normal(size=M)


def test_leave_one_out_is_the_difference_of_two_trainings():
    effect = leave_one_out(means, N, seeds=2)
    assert effect.shape == (N, M)
    everything = np.arange(N)
    for i in range(N):
        without = np.delete(everything, i)
        wanted = np.mean([means(everything, s) - means(without, s) for s in (0, 1)], axis=0)
        np.testing.assert_allclose(effect[i], wanted, atol=1e-15)
    np.testing.assert_array_equal(leave_one_out(means, N, seeds=2, higher_is_better=False), -effect)


def test_effects_of_groups():
    mask = np.zeros(N, dtype=bool)
    mask[[1, 4]] = True
    effects = actual_effects(means, N, [[3], mask, [4, 1]])
    np.testing.assert_allclose(effects[0], leave_one_out(means, N)[3])
    np.testing.assert_array_equal(effects[1], effects[2])


def test_differences_are_taken_of_seeds_that_worked_on_both_sides():
    def refit(rows, seed):
        if seed == 1 and 3 not in rows:
            raise ValueError("unlucky")
        return X[rows].mean(axis=0) + 100 * seed

    with pytest.warns(RetrainingWarning):
        effect = leave_one_out(refit, N, seeds=2)
    np.testing.assert_allclose(effect, leave_one_out(lambda r, s: X[r].mean(axis=0), N), atol=1e-12)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([], "at least one group"),
        ([[0], []], "group 1 as positions"),
        ([[0.5]], "group 0 as positions"),
        ([[0, N]], "from 0 to 11 in group 0"),
        ([np.arange(N)], "leave some row"),
    ],
)
def test_bad_groups_are_refused(groups, says):
    with pytest.raises(ValueError, match=says):
        actual_effects(means, N, groups)


def test_no_effect_without_a_model_of_all_rows():
    def refit(rows, seed):
        if len(rows) == N:
            raise ValueError("never")
        return means(rows, seed)

    with (
        pytest.warns(RetrainingWarning),
        pytest.raises(RuntimeError, match="nothing to compare with"),
    ):
        leave_one_out(refit, N)
