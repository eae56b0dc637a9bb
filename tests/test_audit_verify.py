"""`verify`: training with and without the flagged rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.neighbors import KNeighborsClassifier

from audit_quick import frame, quick_audit
from upweight.auditing import refitting, verifying
from upweight.auditing.flagging import quick_suspicion
from upweight.auditing.settings import AuditSettings
from upweight.auditing.steps import Steps
from upweight.auditing.verifying import Rows, corrected_interval, verify, verify_arrays
from upweight.tables import read_table


def blobs(n: int = 160, flips: float = 0.2, seed: int = 0) -> Rows:
    """Two classes that are easy to tell, with some labels flipped, which are flagged."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 2
    x = rng.normal(size=(n, 3)) + 3 * truth[:, None]
    wrong = rng.random(n) < flips
    return Rows(x, np.where(wrong, 1 - truth, truth), wrong, "classification")


def nearest(seed: int) -> Any:
    """A model that follows every label."""
    return KNeighborsClassifier(1)


def score_of(found: Any, what: str, held_out: str = "all") -> float:
    table = found.table
    lines = table[(table["what"] == what) & (table["held_out"] == held_out)]
    return float(lines["score"].iloc[0])


# ---- the interval -------------------------------------------------------------------------------


def test_the_interval_by_hand() -> None:
    values = np.array([0.1, 0.2, 0.3, 0.6])
    mean, low, high = corrected_interval(values, 1 / 3)
    # t(0.975, 3) = 3.18245; variance 0.14 / 3
    width = 3.182446305 * np.sqrt((1 / 4 + 1 / 3) * 0.14 / 3)
    assert (mean, low, high) == pytest.approx((0.3, 0.3 - width, 0.3 + width))


def test_missing_scores_are_left_out_of_the_interval() -> None:
    values = np.array([0.1, np.nan, 0.3, 0.2])
    known = corrected_interval(values[~np.isnan(values)], 0.25)
    assert corrected_interval(values, 0.25) == known
    assert np.isnan(corrected_interval(np.array([np.nan]), 0.25)).all()
    assert corrected_interval(np.array([0.5]), 0.25) == (0.5, -np.inf, np.inf)


def test_the_interval_covers_the_truth_where_training_sets_overlap() -> None:
    # Scores of repeated splits of the same rows: the mean of 30 held-out of 120 rows.
    rng = np.random.default_rng(0)
    hits = naive = 0
    for _ in range(300):
        rows = rng.normal(size=120)
        values = np.array([rng.permutation(rows)[:30].mean() for _ in range(10)])
        _, low, high = corrected_interval(values, 1 / 3)
        hits += low <= 0 <= high
        _, low, high = corrected_interval(values, 0.0)
        naive += low <= 0 <= high
    assert hits / 300 >= 0.93
    assert naive / 300 < 0.85


# ---- what is trained on what --------------------------------------------------------------------


def test_removing_wrong_labels_helps_and_random_ones_do_not() -> None:
    found = verify_arrays(blobs(), repeats=4, model=nearest)
    assert found.metric == "balanced accuracy"
    assert found.gain[0] > 0.08
    assert found.gain_over_random[0] > 0.08
    assert found.gain[1] < found.gain[0] < found.gain[2]
    base, flagged = score_of(found, "all rows"), score_of(found, "without flagged")
    assert flagged - base == pytest.approx(found.gain[0])
    assert abs(score_of(found, "without random") - base) < 0.05
    assert score_of(found, "without flagged", "without a flag") > 0.95


@pytest.mark.slow
def test_random_labels_promise_nothing_though_the_flags_of_all_rows_do() -> None:
    gains: list[tuple[float, float]] = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(400, 4)), rng.integers(0, 2, 400)
        flagged = quick_suspicion(x, y, "classification", 0) > 1
        rows = Rows(x, y, flagged, "classification")
        found = verify_arrays(rows, repeats=3, model=nearest, shares=[1])
        optimistic = score_of(found, "without flagged by all rows") - score_of(found, "all rows")
        assert f"{optimistic:+.3f}" in found.held_out
        gains.append((found.gain[0], optimistic))
    honest, optimistic = np.mean(gains, axis=0)
    assert abs(honest) < 0.04
    assert optimistic > 0.06


def test_flags_are_made_again_from_the_training_rows_alone() -> None:
    rows = blobs(80)
    keys = {tuple(x): at for at, x in enumerate(rows.x)}
    seen: list[set[int]] = []
    tested: list[set[int]] = []

    def suspect(x: Any, y: Any, task: str, seed: int) -> Any:
        places = [keys[tuple(line)] for line in x]
        np.testing.assert_array_equal(y, rows.y[places])
        seen.append(set(places))
        return np.arange(len(y), dtype=float)

    class Spy(DummyClassifier):
        def predict(self, X: Any) -> Any:
            tested.append({keys[tuple(line)] for line in X})
            return super().predict(X)

    verify_arrays(rows, repeats=3, suspect=suspect, model=lambda seed: Spy(), shares=[1])
    assert len(seen) == 3
    # all rows, flagged, random, flagged by all rows: scored on the same rows
    assert len(tested) == 3 * 4
    for at, held_out in enumerate(tested):
        assert held_out == tested[at // 4 * 4]
        assert held_out | seen[at // 4] == set(range(80))
        assert not held_out & seen[at // 4]


def test_random_removals_take_as_many_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = blobs(120)
    trained: list[Any] = []

    def spy(model: Any, x: Any, y: Any, x_test: Any) -> Any:
        trained.append(np.bincount(y, minlength=2).tolist())
        return refitting.predict(model, x, y, x_test)

    monkeypatch.setattr(verifying, "predict", spy)
    verify_arrays(rows, repeats=2, model=nearest, shares=[0.5, 1, 2])
    for first in (0, 8):
        # all; three pairs of (suspicious, random); by all rows
        assert trained[first + 1] == trained[first + 2]
        assert trained[first + 3] == trained[first + 4]
        assert trained[first + 5] == trained[first + 6]
        assert sum(trained[first + 1]) > sum(trained[first + 3]) > sum(trained[first + 5])


def test_classes_are_held_out_evenly() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2, 3], [100, 40, 8, 1])
    rows = Rows(np.zeros((149, 1)), y, np.arange(149) < 2, "classification")
    test, train = verifying._split(rows, rng)
    assert np.bincount(y[test], minlength=4).tolist() == [25, 10, 2, 0]
    assert sorted([*test, *train]) == list(range(149))


def test_balanced_accuracy_and_d2() -> None:
    truth = np.array([0, 0, 0, 1])
    assert refitting.score_of("classification", truth, np.zeros(4)) == 0.5
    assert refitting.score_of("classification", truth, truth) == 1
    numbers = np.array([1.0, 2.0, 9.0])
    assert refitting.score_of("regression", numbers, np.full(3, 2.0)) == 0
    assert refitting.score_of("regression", numbers, numbers) == 1
    assert refitting.score_of("regression", numbers, np.array([1.0, 2.0, 5.0])) == 0.5
    assert np.isnan(refitting.score_of("regression", np.ones(3), np.zeros(3)))
    assert np.isnan(refitting.score_of("classification", truth[:0], truth[:0]))


# ---- models, tasks, options ---------------------------------------------------------------------


@pytest.mark.parametrize("model", ["boosting", "linear"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_models_and_tasks(model: Any, task: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(240, 3))
    y = 2 * x[:, 0] + 0.1 * rng.normal(size=240)
    wrong = (rng.random(240) < 0.3) & (y > 1)  # on one side: that moves a linear model, too
    y = np.where(wrong, 0, y > 0).astype(int) if task == "classification" else y + 20.0 * wrong
    found = verify_arrays(Rows(x, y, wrong, task), repeats=3, model=model, shares=[1])
    before, after = (
        score_of(found, what, "without a flag") for what in ("all rows", "without flagged")
    )
    assert after > before + 0.01
    assert after > 0.6
    assert found.metric == ("D²" if task == "regression" else "balanced accuracy")


def test_the_table_has_the_lines_that_the_page_draws() -> None:
    found = verify_arrays(blobs(), repeats=2, model=nearest, shares=[0.5, 1, 2])
    assert list(found.table) == ["what", "removed", "score", "low", "high", "held_out"]
    for _, part in found.table.groupby("held_out"):
        counts = part.groupby("what")["removed"].apply(list)
        assert set(counts.index) == {
            "all rows",
            "without flagged",
            "without flagged by all rows",
            "without most suspicious",
            "without random",
        }
        assert counts["all rows"] == [0]
        assert counts["without most suspicious"] == counts["without random"]
        assert counts["without flagged"] == counts["without most suspicious"][1:2]
    assert ((found.table["low"] >= 0) & (found.table["high"] <= 1)).all()


def test_shares_that_are_the_same_rows_are_trained_once() -> None:
    rows = replace(blobs(60, flips=0), flagged=np.arange(60) == 7)
    found = verify_arrays(rows, repeats=2, model=nearest, shares=[0.25, 0.5, 1, 4])
    first = found.table[found.table["held_out"] == "all"]
    assert first.loc[first["what"] == "without random", "removed"].tolist() == [1, 3]
    assert first.loc[first["what"] == "without flagged", "removed"].tolist() == [1]


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    a, b, c = (
        verify_arrays(blobs(), repeats=2, model=nearest, seed=seed, shares=[1])
        for seed in (3, 3, 4)
    )
    pd.testing.assert_frame_equal(a.table, b.table)
    assert a.gain == b.gain
    assert a.gain != c.gain


@pytest.mark.slow
def test_processes_change_nothing() -> None:
    one = verify_arrays(blobs(), repeats=3, model="boosting", shares=[1])
    two = verify_arrays(blobs(), repeats=3, model="boosting", shares=[1], n_jobs=2)
    pd.testing.assert_frame_equal(one.table, two.table)


def test_one_class_may_vanish_from_training() -> None:
    rows = blobs(40, flips=0)
    rows = replace(rows, flagged=rows.y == 1)
    found = verify_arrays(rows, repeats=2, model=nearest, shares=[1])
    assert score_of(found, "without flagged by all rows") == 0.5


def test_many_rows_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "MOST_ROWS", 50)
    test, train = verifying._split(blobs(400), np.random.default_rng(0))
    assert (len(test), len(train)) == (50, 50)
    assert not set(test) & set(train)


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        ({"flagged": np.zeros(160, dtype=bool)}, {}, "nothing to verify"),
        ({"flagged": np.ones(160, dtype=bool)}, {}, "nothing would be left"),
        ({}, {"repeats": 1}, "at least 2 repeats"),
        ({}, {"shares": [0.0]}, "shares above 0"),
        ({}, {"shares": [float("inf")]}, "shares above 0"),
        ({}, {"model": "forest"}, "model boosting, linear, or a function; got 'forest'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    change: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        verify_arrays(replace(blobs(), **change), **options)


def test_too_few_rows_are_refused() -> None:
    rows = Rows(np.zeros((4, 1)), np.array([0, 0, 1, 1]), np.arange(4) == 0, "classification")
    rows = replace(rows, y=np.arange(4))
    with pytest.raises(ValueError, match="expected more rows"):
        verify_arrays(rows, model=nearest)


# ---- of an audit --------------------------------------------------------------------------------


def test_rows_without_a_target_are_left_out() -> None:
    table = frame()
    table.loc[[3, 40], "kind"] = None
    audit = quick_audit(read_table(frame()), AuditSettings("kind"), steps=Steps())
    missing = audit.rows["row"].isin([3, 40])
    rows = audit.rows.assign(
        suspicion=audit.rows["suspicion"].mask(missing),
        label_flag=audit.rows["label_flag"].mask(missing),
    )
    gaps = replace(audit, table=read_table(table), rows=rows)
    assert len(verifying._rows_of(gaps).y) == 78
    found = verify(gaps, repeats=2, model="linear", shares=[1], progress=False)
    assert found.repeats == 2


def test_the_quick_suspicion_of_a_single_class_and_of_repeats() -> None:
    x = np.zeros((12, 2))
    assert quick_suspicion(x, np.ones(12), "classification", 0).tolist() == [0] * 12
    x = np.arange(30.0)[:, None]
    y = 2 * x[:, 0]
    y[11] = 300
    assert quick_suspicion(x, y, "regression", 0).argmax() == 11
