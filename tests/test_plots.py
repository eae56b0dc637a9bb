"""Plots: what is drawn, what the axes say, and what is refused."""

from __future__ import annotations

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy import stats
from sklearn.metrics import confusion_matrix

from upweight.report import plots
from upweight.report.plots import (
    DIRECTION,
    draw,
    plot_confusion,
    plot_feature_influence,
    plot_losses,
    plot_method_comparison,
    plot_score_distribution,
)

rng = np.random.default_rng(0)
SCORES = np.concatenate([rng.normal(-2, 0.5, 10), rng.normal(1, 0.5, 96)])
LOSSES = pd.DataFrame({"train": [3.0, 2.0, 1.0], "validation": [4.0, 3.0, 3.5]}, index=[1, 2, 3])
CALLS = {
    "losses": (plot_losses, (LOSSES,)),
    "confusion": (plot_confusion, (["a", "b", "b"], ["a", "a", "b"])),
    "distribution": (plot_score_distribution, (SCORES,)),
    "features": (plot_feature_influence, ([0.5, -1.0], ["x", "y"])),
    "comparison": (plot_method_comparison, (SCORES, 2 * SCORES)),
}


@pytest.fixture
def ax():
    return Figure(layout="constrained").add_subplot()


def heights(ax, colour):
    """Counts of the histogram bars of one colour: (left, right, count)."""
    return [
        (bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height())
        for bar in ax.patches
        if to_hex(bar.get_facecolor()) == colour
    ]


@pytest.mark.parametrize("name", CALLS)
def test_draws_on_the_axes_it_is_given_and_returns_them(name, ax):
    plot, arguments = CALLS[name]
    other = ax.figure.add_subplot()
    assert plot(*arguments, ax=ax) is ax
    assert ax.has_data() or ax.patches
    assert not other.has_data()


@pytest.mark.parametrize("name", CALLS)
def test_takes_the_current_axes_when_none_are_given(name):
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, current = plt.subplots()
    plot, arguments = CALLS[name]
    assert plot(*arguments) is current
    plt.close(figure)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("losses", "lower is better"),
        ("distribution", DIRECTION),
        ("features", DIRECTION),
        ("comparison", DIRECTION),
    ],
)
def test_axes_say_which_way_is_good(name, label, ax):
    plot, arguments = CALLS[name]
    plot(*arguments, ax=ax)
    assert label in (ax.get_ylabel() if name == "losses" else ax.get_xlabel())
    assert name != "comparison" or label in ax.get_ylabel()
    # Zero lies between the two words, and scores grow to the right.
    assert DIRECTION.index("harmful") < DIRECTION.index("0") < DIRECTION.index("helpful")
    assert ax.get_xlim()[0] < ax.get_xlim()[1]


def test_losses_are_one_line_a_column_and_bridge_missing_epochs(ax):
    plot_losses(LOSSES.astype(object).replace(3.0, None), ax=ax)
    train, validation = ax.lines
    np.testing.assert_array_equal(train.get_xydata(), [[2, 2], [3, 1]])
    np.testing.assert_array_equal(validation.get_xydata(), [[1, 4], [3, 3.5]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "validation"]
    assert train.get_linestyle() != validation.get_linestyle()


def cells(ax):
    k = round(len(ax.texts) ** 0.5)
    assert [text.get_position() for text in ax.texts] == [
        (j, i) for i in range(k) for j in range(k)
    ]
    return np.array([int(text.get_text().replace(",", "")) for text in ax.texts]).reshape(k, k)


def test_confusion_counts_match_scikit_learn(ax):
    given = rng.choice(["a", "b", "c"], 5000, p=[0.9, 0.05, 0.05])
    predicted = rng.choice(["a", "b", "c"], 5000)
    plot_confusion(given, predicted, ax=ax)
    np.testing.assert_array_equal(cells(ax), confusion_matrix(given, predicted))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b", "c"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first class on top
    assert ax.get_ylabel() == "given label"
    assert ax.get_xlabel() == "predicted label"


@pytest.mark.parametrize(
    ("given", "labels", "names", "counts"),
    [
        (["b", "b", "a"], ["b", "a", "c"], ["b", "a", "c"], [[2, 0, 0], [0, 1, 0], [0, 0, 0]]),
        ([0, 0, 2], ["r", "g", "b"], ["r", "g", "b"], [[2, 0, 0], [0, 0, 0], [0, 0, 1]]),
        ([False, False, True], ["no", "yes"], ["no", "yes"], [[2, 0], [0, 1]]),
        ([10, 9, 10], None, ["9", "10"], [[1, 0], [0, 2]]),
    ],
    ids=["order", "names", "booleans", "sorted as numbers"],
)  # fmt: skip
def test_confusion_labels(given, labels, names, counts, ax):
    plot_confusion(given, given, labels, ax=ax)
    np.testing.assert_array_equal(cells(ax), counts)
    assert [text.get_text() for text in ax.get_xticklabels()] == names


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_confusion_counts_are_readable_on_light_and_dark(style):
    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    with matplotlib.style.context(style):
        figure = Figure()
        ax = plot_confusion([0, 0, 1, 1], [0, 1, 1, 0], ax=figure.add_subplot())
        ink = luminance(matplotlib.colors.to_rgb(ax.texts[0].get_color()))
        page = np.array(matplotlib.colors.to_rgb(ax.get_facecolor()))
    for patch in ax.patches:
        *colour, alpha = patch.get_facecolor()
        cell = luminance(alpha * np.array(colour) + (1 - alpha) * page)
        assert (max(ink, cell) + 0.05) / (min(ink, cell) + 0.05) > 7  # WCAG AAA


@pytest.mark.parametrize("as_mask", [True, False])
def test_marked_rows_are_counted_in_their_own_colour(as_mask, ax):
    marked = np.arange(len(SCORES)) < 10
    plot_score_distribution(SCORES, marked if as_mask else np.flatnonzero(marked), "noise", ax=ax)
    assert sum(count for *_, count in heights(ax, plots.RED)) == 10
    assert sum(count for *_, count in heights(ax, plots.BLUE)) == 96
    for left, right, count in heights(ax, plots.RED):
        assert count == ((SCORES[:10] >= left) & (SCORES[:10] < right)).sum()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["other rows (96)", "noise (10)"]


def test_histogram_has_log_counts_a_line_at_zero_and_no_bar_across_it(ax):
    plot_score_distribution(SCORES, ax=ax)
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] < 1  # a bar of one row has a height
    assert any(np.array_equal(line.get_xdata(), [0, 0]) for line in ax.lines)
    bars = heights(ax, plots.BLUE)
    assert sum(count for *_, count in bars) == len(SCORES)
    assert not any(left < -1e-12 and right > 1e-12 for left, right, _ in bars)
    ax.figure.canvas.draw()
    low, high = ax.get_ylim()
    shown = {
        t: label.get_text() for t, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
    }
    visible = {t: text for t, text in shown.items() if low <= t <= high}
    assert visible == {1: "1", 2: "2", 5: "5", 10: "10", 20: "20"}


@pytest.mark.parametrize("scores", [[3.0], [0.0, 0.0], [1e9, 1e9 + 1e-6], [*SCORES, -1e12]])
def test_histogram_holds_every_row_of_awkward_data_in_few_bins(scores, ax):
    plot_score_distribution(scores, ax=ax)
    bars = heights(ax, plots.BLUE)
    assert sum(count for *_, count in bars) == len(scores)
    assert len(bars) <= plots.MAX_BINS + 2


def test_histogram_takes_bins(ax):
    plot_score_distribution([-1, 0.5, 0.6, 2], bins=[-1, 0, 1, 2], ax=ax)
    assert heights(ax, plots.BLUE) == [(-1, 0, 1), (0, 1, 2), (1, 2, 1)]


def test_features_are_sorted_by_magnitude_and_coloured_by_sign(ax):
    plot_feature_influence([0.1, -3.0, 2.0, 0.0], ["a", "b", "c", "d"], ax=ax, top=3)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["b", "c", "a"]
    assert [bar.get_width() for bar in ax.patches] == [-3.0, 2.0, 0.1]
    colours = [to_hex(bar.get_facecolor()) for bar in ax.patches]
    assert colours == [plots.RED, plots.BLUE, plots.BLUE]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the strongest on top


def test_comparison_shows_correlations_identity_and_circles(ax):
    approximate = SCORES**3 + rng.normal(size=len(SCORES))
    plot_method_comparison(SCORES, approximate, marked=[3, 5], ax=ax, name="CG")
    texts = [text.get_text() for text in ax.texts]
    assert texts == [
        f"Pearson r = {stats.pearsonr(SCORES, approximate)[0]:.3f}",
        f"Spearman ρ = {stats.spearmanr(SCORES, approximate)[0]:.3f}",
    ]
    rows, circles = ax.collections
    np.testing.assert_array_equal(rows.get_offsets(), np.column_stack([SCORES, approximate]))
    np.testing.assert_array_equal(circles.get_offsets(), rows.get_offsets()[[3, 5]])
    assert to_hex(circles.get_edgecolor()) == plots.RED
    assert len(circles.get_facecolor()) == 0
    (line,) = ax.lines
    assert (line.get_xy1(), line.get_slope()) == ((0, 0), 1)
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_ylabel().startswith("CG: ")


def test_correlation_of_constant_scores_is_undefined_rather_than_a_warning(ax):
    plot_method_comparison([1, 1, 1], [1, 2, 3], ax=ax)
    assert ax.texts[0].get_text() == "Pearson r = undefined"


@pytest.mark.parametrize(
    ("n", "raster"), [(plots.MAX_VECTORS, False), (plots.MAX_VECTORS + 1, True)]
)
def test_many_points_become_a_picture(n, raster, ax):
    plot_method_comparison(np.arange(n), np.arange(n), ax=ax)
    assert bool(ax.collections[0].get_rasterized()) is raster


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (r"$\frac{1}{0}$", r"\$\frac{1}{0}\$"),
        ("a\x00b\nc", "a b c"),
        ("\u202eevil", "evil"),
        ("", "(empty)"),
        ("x" * 10_000 + "1", "x" * 15 + "…" + "x" * 7 + "1"),
    ],
)
def test_names_from_data_are_neither_mathematics_nor_long_nor_control_characters(name, shown):
    figure = draw(plot_feature_influence, [1.0, 2.0], [name, "other"])
    figure.canvas.draw()  # r"$\frac{1}{0" would raise here
    assert figure.axes[0].get_yticklabels()[1].get_text() == shown


def test_draw_does_not_depend_on_the_settings_of_the_user():
    with matplotlib.rc_context({"text.color": "red", "axes.labelsize": 40}):
        (ax,) = draw(plot_score_distribution, SCORES, marked=[0]).axes
        assert matplotlib.rcParams["text.color"] == "red"  # and leaves them alone
    assert ax.xaxis.label.get_fontsize() == 10
    assert ax.get_legend().get_texts()[0].get_color() == "black"


NAN = [1.0, float("nan")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ax: plot_losses(LOSSES.iloc[:0], ax), r"at least one epoch.*got shape \(0, 2\)"),
        (lambda ax: plot_confusion([1, 2], [1], ax=ax), "same rows, got 2 and 1 labels"),
        (lambda ax: plot_confusion([], [], ax=ax), "got 0 and 0 labels"),
        (lambda ax: plot_confusion(["a", None], ["a", "a"], ax=ax), "row 1 lacks one"),
        (lambda ax: plot_confusion(["a", "b"], ["a", "b"], ["a", "c"], ax), "without 'b'"),
        (lambda ax: plot_confusion([0, 3], [0, 0], ["a", "b", "c"], ax), "without 3"),
        (lambda ax: plot_score_distribution([], ax=ax), r"scores must be.*got shape \(0,\)"),
        (lambda ax: plot_score_distribution([[1.0]], ax=ax), r"got shape \(1, 1\)"),
        (lambda ax: plot_score_distribution(NAN, ax=ax), "finite, got nan at position 1"),
        (lambda ax: plot_score_distribution([1, 2], [True], ax=ax), r"2 rows, got shape \(1,\)"),
        (lambda ax: plot_score_distribution([1, 2], [2], ax=ax), "between 0 and 1"),
        (lambda ax: plot_score_distribution([1, 2], [-1], ax=ax), "between 0 and 1"),
        (lambda ax: plot_score_distribution([1, 2, 3], [0, 1, 1], ax=ax), "mask must be of bool"),
        (lambda ax: plot_score_distribution([1, 2], [0.5], ax=ax), "got shape .1,. of float64"),
        (lambda ax: plot_feature_influence([1, 2], ["a"], ax), "2 values, got 1 names"),
        (lambda ax: plot_feature_influence([1], ["a"], ax, top=0), "at least 1.*got 0"),
        (lambda ax: plot_method_comparison([1, 2], [1], ax=ax), "got 2 and 1 scores"),
        (lambda ax: plot_method_comparison([1, 2], NAN, ax=ax), "approximate must be finite"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(call, message, ax):
    with pytest.raises(ValueError, match=message):
        call(ax)
    assert not ax.has_data()
    assert not ax.get_xlabel()
