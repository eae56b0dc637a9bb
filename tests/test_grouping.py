"""Scores of groups of rows: classes, sources, clusters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import upweight as uw

TRAIN = pd.Index([f"r{i}" for i in range(9)], name="row")
TEST = pd.Index([f"t{j}" for j in range(300)], name="row")
VALUES = torch.randn(300, 9, generator=torch.Generator().manual_seed(0))
LABELS = ["b", "a", "c", "a", "b", "b", "a", "c", "b"]
KINDS = np.arange(300) % 3


def scores() -> uw.Scores:
    return uw.Scores(VALUES, TEST, TRAIN, {"mode": "up"})


def by_pandas(labels: object = LABELS, reduce: str = "sum") -> pd.DataFrame:
    return getattr(scores().to_frame().astype(float).T.groupby(np.asarray(labels)), reduce)().T


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("stored", [False, True])
def test_groups_of_training_rows(reduce: str, stored: bool, tmp_path: Path) -> None:
    own = scores()
    if stored:
        own = uw.Scores.load(own.save(tmp_path / "scores"))
    frame = own.group(LABELS, reduce=reduce)
    np.testing.assert_allclose(frame, by_pandas(reduce=reduce), rtol=1e-12)
    assert list(frame.columns) == ["a", "b", "c"]
    assert list(frame.index) == list(TEST)
    assert frame.attrs == {"train_rows": {"a": 3, "b": 4, "c": 2}}
    both = own.group(LABELS, KINDS, reduce=reduce)
    wanted = by_pandas(reduce=reduce).groupby(KINDS).mean()
    np.testing.assert_allclose(both, wanted, rtol=1e-10)
    assert both.attrs["test_rows"] == {0: 100, 1: 100, 2: 100}


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        tuple(LABELS),
        np.array(LABELS),
        pd.Series(LABELS),
        pd.Index(LABELS),
        pd.Categorical(LABELS),
        pd.Series(LABELS, dtype="category"),
        pd.Series(LABELS, index=TRAIN)[::-1],
        pd.Series(LABELS, index=range(100, 109)),
    ],
)
def test_every_form_of_labels(labels: object) -> None:
    np.testing.assert_allclose(scores().group(labels), by_pandas())


def test_numbers_and_tensors_are_labels() -> None:
    numbers = torch.tensor([1, 0, 2, 0, 1, 1, 0, 2, 1])
    frame = scores().group(numbers)
    np.testing.assert_allclose(frame, by_pandas())
    assert frame.columns.tolist() == [0, 1, 2]
    mixed = scores().group([1, "a", 2, "a", 1, 1, "a", 2, 1])
    assert mixed.columns.tolist() == [1, 2, "a"]


def test_a_series_is_not_moved_where_rows_have_no_names() -> None:
    """Rows were taken from a shuffled table: its index says where they were, not where they are."""
    own = uw.Scores(VALUES, TEST, pd.RangeIndex(9))
    shuffled = pd.Series(LABELS, index=[3, 1, 2, 0, 8, 7, 6, 5, 4])
    np.testing.assert_allclose(own.group(shuffled), by_pandas())


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA])
def test_missing_labels_are_a_group_of_their_own(missing: object) -> None:
    labels = ["b", missing, "a", missing, "b", "b", "a", "a", "b"]
    frame = scores().group(labels)
    assert frame.columns.tolist() == ["a", "b", "(missing)"]
    np.testing.assert_allclose(frame["(missing)"], VALUES[:, [1, 3]].double().sum(1))
    np.testing.assert_allclose(frame.sum(axis=1), VALUES.double().sum(1))
    named = scores().group(["(missing)", missing, *LABELS[2:]])
    assert named.columns.tolist() == ["(missing)", "a", "b", "c", "((missing))"]
    codes = scores().group(np.array([1.0, np.nan] + [2.0] * 7))
    assert codes.attrs["train_rows"] == {1.0: 1, 2.0: 7, "(missing)": 1}


def test_rows_of_one_score() -> None:
    mean = scores().mean()
    frame = mean.group(LABELS)
    grouped = mean.to_frame()["score"].astype(float).groupby(np.array(LABELS))
    np.testing.assert_allclose(frame["sum"], grouped.sum())
    np.testing.assert_allclose(frame["mean"], grouped.mean())
    assert frame["count"].tolist() == [3, 4, 2]
    np.testing.assert_allclose(frame["negative"], grouped.apply(lambda v: (v < 0).mean()))


def test_top_by_group_of_test_rows() -> None:
    top = scores().top(2, by=KINDS)
    assert list(top.columns) == ["group", "train_row", "score", "rank"]
    assert top["group"].tolist() == [0, 0, 1, 1, 2, 2]
    for kind in range(3):
        means = VALUES[kind == KINDS].double().mean(0)
        order = means.argsort(descending=True)[:2]
        own = top[top["group"] == kind]
        assert own["train_row"].tolist() == [f"r{i}" for i in order]
        np.testing.assert_allclose(own["score"], means[order])
    harmful = scores().top(99, harmful=True, by=KINDS)
    assert len(harmful) == 27
    assert harmful["score"][0] == pytest.approx(float(VALUES[KINDS == 0].mean(0).min()))


def test_bad_labels_are_refused() -> None:
    own = scores()
    with pytest.raises(ValueError, match="one label for every training row, 9; got 8"):
        own.group(LABELS[:8])
    with pytest.raises(ValueError, match="one label for every test row, 300; got 9"):
        own.group(LABELS, LABELS)
    with pytest.raises(ValueError, match="one label for every test row, 300; got 9"):
        own.top(by=LABELS)
    with pytest.raises(ValueError, match="one label for every training row, 9; got 1"):
        own.mean().group(["a"])
    with pytest.raises(TypeError, match="as a sequence; got str"):
        own.group("abcabcabc")
    with pytest.raises(TypeError, match="as a sequence; got int"):
        own.group(3)
    with pytest.raises(ValueError, match=r"shape \(9, 2\)"):
        own.group(np.zeros((9, 2)))
    with pytest.raises(ValueError, match="'sum' or 'mean'"):
        own.group(LABELS, reduce="max")
    features = uw.Scores(torch.ones(2, 9, 4), TEST[:2], TRAIN)
    for action in (lambda: features.group(LABELS), lambda: features.top(by=["a", "b"])):
        with pytest.raises(ValueError, match="one number per feature"):
            action()
