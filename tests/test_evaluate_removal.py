"""Removing and adding rows by score, and how many it takes to flip a prediction."""

from __future__ import annotations

import numpy as np
import pytest

from upweight.evaluate import RetrainingWarning, brittleness, removal_curve

N, M = 20, 6
X = np.random.default_rng(0).normal(size=(N, M)) + 0.4
SCORES = X.mean(axis=1)


class Mean:
    """Outputs are means of the rows, a little up with the seed; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, rows, seed):
        self.asked.append(tuple(rows))
        return X[rows].mean(axis=0) + 0.001 * seed


@pytest.mark.parametrize("kind", ["remove-lowest", "remove-highest", "add-lowest", "add-highest"])
def test_curve_equals_a_loop(kind):
    fractions = (0.2, 0.5, 0.8)
    frame = removal_curve(SCORES, Mean(), kind=kind, fractions=fractions, seeds=2)
    assert (frame["kind"] == kind).all()
    assert len(frame) == 3 * 2 * (1 + 3)
    order = np.argsort(SCORES)
    order = order if kind.endswith("lowest") else order[::-1]
    by_score = frame[frame["order"] == "score"]
    for line in by_score.itertuples():
        count = round(line.fraction * N)
        rows = order[count:] if kind.startswith("remove") else order[:count]
        assert line.rows == len(rows)
        assert line.output == pytest.approx(X[rows].mean() + 0.001 * line.seed)


def test_better_rows_make_better_curves():
    def by_score_and_random(kind):
        frame = removal_curve(SCORES, Mean(), kind=kind, fractions=[0.5], random_repeats=5)
        return frame.groupby("order")["output"].mean()

    for kind, sign in (("remove-lowest", 1), ("remove-highest", -1), ("add-highest", 1)):
        output = by_score_and_random(kind)
        assert sign * (output["score"] - output["random"]) > 0.1


def test_the_same_subset_is_trained_once():
    refit = Mean()
    frame = removal_curve(SCORES, refit, fractions=[0, 0.5], random_repeats=4)
    assert len(refit.asked) == len(set(refit.asked)) == 1 + 5
    assert frame.loc[frame["fraction"] == 0, "output"].nunique() == 1
    assert frame["repeat"].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_failed_trainings_are_left_out_of_the_curve():
    def refit(rows, seed):
        if len(rows) < 5:
            raise ValueError("too few")
        return X[rows].mean(axis=0)

    with pytest.warns(RetrainingWarning):
        frame = removal_curve(SCORES, refit, fractions=[0.5, 0.9])
    assert set(frame["fraction"]) == {0.5}


def test_random_orders_depend_on_their_seed_only():
    one, again, other = (removal_curve(SCORES, Mean(), seed=s) for s in (1, 1, 2))
    assert one.equals(again)
    assert not one.equals(other)


@pytest.mark.parametrize(
    ("scores", "options", "says"),
    [
        (SCORES, {"kind": "remove"}, "a kind among"),
        (SCORES, {"fractions": [1.0]}, "leave rows to train on"),
        (SCORES, {"fractions": [0.0], "kind": "add-highest"}, "leave rows to train on"),
        (SCORES, {"fractions": [1.2]}, "between 0 and 1"),
        (SCORES, {"fractions": []}, "at least one fraction"),
        (SCORES, {"random_repeats": -1}, "random_repeats ≥ 0"),
        (X, {}, r"scores of shape \(n,\)"),
        (SCORES * np.nan, {}, "finite scores"),
    ],
)
def test_bad_curves_are_refused(scores, options, says):
    with pytest.raises(ValueError, match=says):
        removal_curve(scores, Mean(), **options)


# --- brittleness ----------------------------------------------------------------------------------


def test_brittleness_equals_a_loop():
    ks, threshold = (2, 6, 12), 0.1
    refit = Mean()
    frame = brittleness(
        X.T, refit, ks=ks, threshold=threshold, random_repeats=2, seeds=2, protocol="fixed-seed"
    )
    before = X.mean(axis=0) + 0.0005
    right = np.flatnonzero(before > threshold)
    assert len(right) > 0
    assert len(frame) == len(ks) * len(right) * (1 + 2)
    for line in frame[frame["order"] == "score"].itertuples():
        rows = np.argsort(-X[:, line.test])[line.k :]
        after = X[rows, line.test].mean() + 0.0005
        assert line.before == pytest.approx(before[line.test])
        assert line.after == pytest.approx(after)
        assert line.flipped == (after <= threshold)
    share = frame.groupby(["order", "k"])["flipped"].mean()
    assert (share["score"] >= share["random"]).all()
    assert share["score", 12] > share["random", 12]


def test_only_right_and_wanted_test_rows_are_tried():
    def refit(rows, seed):
        return X[rows].mean(axis=0) - [0, 9, 0, 0, 9, 0]

    frame = brittleness(X.T, refit, ks=[3], tests=[5, 1, 2])
    assert set(frame["test"]) <= {2, 5}
    with pytest.raises(ValueError, match="none has one"):
        brittleness(X.T, refit, ks=[3], tests=[1, 4])


def test_store_and_workers_change_nothing(tmp_path):
    wanted = brittleness(X.T, Mean(), ks=[2, 5])
    assert brittleness(X.T, Mean(), ks=[2, 5], store=tmp_path, n_jobs=2).equals(wanted)
    refit = Mean()
    assert brittleness(X.T, refit, ks=[2, 5], store=tmp_path).equals(wanted)
    assert not refit.asked
    assert {path.name for path in tmp_path.iterdir()} == {"base", "removed"}


@pytest.mark.parametrize(
    ("scores", "options", "says"),
    [
        (X.T, {"ks": [N]}, "every k between 1 and 19"),
        (X.T, {"ks": [0]}, "every k between 1 and 19"),
        (X.T, {"ks": []}, "at least one k"),
        (X.T, {"ks": [1], "tests": [M]}, "test rows below 6"),
        (X.T, {"ks": [1], "tests": [0, 0]}, "different positions"),
        (X.T[:3], {"ks": [1]}, "each of the 3 test rows of the scores; got 6"),
        (SCORES, {"ks": [1]}, r"shape \(m, n\)"),
    ],
)
def test_bad_brittleness_is_refused(scores, options, says):
    with pytest.raises(ValueError, match=says):
        brittleness(scores, Mean(), **options)
