"""Plots of how true scores are: what is drawn, what the axes say, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from upweight.evaluate import brittleness, detection, prediction_score, removal_curve
from upweight.report.evaluation_plots import (
    plot_brittleness,
    plot_detection,
    plot_lds,
    plot_predicted_vs_actual,
    plot_removal,
)
from upweight.report.plots import DIRECTION, draw

rng = np.random.default_rng(0)
X = rng.normal(size=(20, 4)) + 0.5
WRONG = np.arange(20) < 6


def refit(rows, seed):
    return X[rows].mean(axis=0) + 0.01 * seed


PREDICTED = rng.normal(size=(30, 4))
LDS = {
    "exact": prediction_score(PREDICTED, PREDICTED + rng.normal(size=(30, 4))),
    "rough $x$": prediction_score(PREDICTED, rng.normal(size=(30, 4))),
}
DETECTION = {"low": detection(X[:, 0] - WRONG, WRONG), "none": detection(X[:, 1], WRONG)}
REMOVAL = removal_curve(X.mean(axis=1), refit, seeds=2)
BRITTLE = brittleness(X.T, refit, ks=[2, 5, 10])
CALLS = {
    "lds": (plot_lds, (LDS, {"noise ceiling": 0.99, "additive ceiling": 0.95})),
    "actual": (plot_predicted_vs_actual, (PREDICTED, 2 * PREDICTED)),
    "detection": (plot_detection, (DETECTION,)),
    "removal": (plot_removal, (REMOVAL,)),
    "brittleness": (plot_brittleness, (BRITTLE,)),
}


@pytest.fixture
def ax():
    return Figure(layout="constrained").add_subplot()


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax, label):
    (found,) = (one for one in ax.lines if one.get_label() == label)
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


@pytest.mark.parametrize("name", CALLS)
def test_draws_on_the_axes_it_is_given_and_returns_them(name, ax):
    plot, arguments = CALLS[name]
    assert plot(*arguments, ax=ax) is ax
    assert ax.has_data()
    assert ax.get_xlabel()
    draw(plot, *arguments).canvas.draw()


@pytest.mark.parametrize("name", CALLS)
def test_takes_the_current_axes_when_none_are_given(name, monkeypatch):
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    figure, current = plt.subplots()
    plot, arguments = CALLS[name]
    assert plot(*arguments) is current
    plt.close(figure)


def test_lds_shows_values_intervals_and_ceilings(ax):
    plot_lds(LDS, 0.9, ax=ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["exact", r"rough \$x\$"]
    interval, dot = ax.lines[0], ax.lines[1]
    assert tuple(interval.get_xdata()) == LDS["exact"].interval
    assert dot.get_xdata()[0] == LDS["exact"].value
    assert legend(ax) == ["noise ceiling (0.900)"]
    assert "higher is better" in ax.get_xlabel()
    low, high = ax.get_ylim()
    assert low > high  # the first on top


def test_actual_effects_show_slope_and_correlation(ax):
    actual = 2 * PREDICTED
    actual[3] = np.nan
    plot_predicted_vs_actual(PREDICTED, actual, ax=ax)
    assert legend(ax) == ["predicted = actual", "fit: slope 2.00, r = 1.000"]
    assert ax.get_xlabel().endswith(DIRECTION)
    assert ax.get_ylabel().endswith(DIRECTION)
    assert len(ax.collections[0].get_offsets()) == PREDICTED.size - 4


def test_actual_effects_without_variation_have_no_fit(ax):
    plot_predicted_vs_actual([1.0, 1.0], [0.0, 2.0], ax=ax)
    assert legend(ax) == ["predicted = actual"]


def test_detection_draws_the_curve(ax):
    plot_detection(DETECTION, ax=ax)
    x, y = line(ax, f"low (AUC {DETECTION['low'].auc:.3f})")
    np.testing.assert_array_equal(x, DETECTION["low"].curve["share_inspected"])
    np.testing.assert_array_equal(y, DETECTION["low"].curve["share_found"])


def test_removal_draws_means_over_seeds_and_repeats(ax):
    plot_removal(REMOVAL, "margin", ax=ax)
    for order, label in (("score", "lowest scores first"), ("random", "in random order")):
        x, y = line(ax, label)
        wanted = REMOVAL[REMOVAL["order"] == order].groupby("fraction")["output"].mean()
        np.testing.assert_allclose(x, wanted.index)
        np.testing.assert_allclose(y, wanted)
    assert ax.get_xlabel() == "training rows removed"
    assert ax.get_ylabel() == "margin"
    added = removal_curve(X.mean(axis=1), refit, kind="add-highest", fractions=[0.5])
    assert plot_removal(added, ax=Figure().add_subplot()).get_xlabel() == "training rows trained on"


def test_brittleness_draws_shares(ax):
    plot_brittleness(BRITTLE, ax=ax)
    _, y = line(ax, "most helpful rows")
    share = BRITTLE[BRITTLE["order"] == "score"].groupby("k")["flipped"].mean()
    np.testing.assert_allclose(y, share)
    assert "4 test rows" in ax.get_ylabel()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: plot_lds({}), "at least one method"),
        (lambda: plot_detection({}), "at least one method"),
        (lambda: plot_brittleness(BRITTLE[:0]), "at least one removal"),
        (lambda: plot_predicted_vs_actual([1.0], [1.0, 2.0]), "same shape"),
        (lambda: plot_predicted_vs_actual([np.nan], [1.0]), "at least one number"),
        (lambda: plot_removal(REMOVAL[:0]), "of one kind"),
    ],
)
def test_refuses(call, says):
    with pytest.raises(ValueError, match=says):
        call()
