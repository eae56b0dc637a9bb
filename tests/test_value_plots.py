"""Plots of data values: what they draw, say and refuse."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from upweight.report.plots import draw
from upweight.report.style import BLUE, DIRECTION, GREY, RED
from upweight.report.value_plots import (
    asked_stability,
    plot_convergence,
    plot_value_comparison,
    plot_value_distribution,
    plot_values,
)
from upweight.valuation import Values


def new() -> Axes:
    return Figure().add_subplot()


def some(errors: Any = None, **more: Any) -> Values:
    numbers = np.array([0.5, -2.0, 0.1, np.nan, 3.0, -0.2])
    given = np.zeros(6) if errors is None else np.asarray(errors, np.float64)
    return Values(numbers, given, names=list("abcdef"), **more)


def settled(values: Values, history: pd.DataFrame) -> Values:
    vars(values)["history"] = history  # which is worked out of samples, when it is asked for
    return values


def ticks(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def test_the_lowest_rows_come_first_and_rows_without_a_value_never() -> None:
    ax = plot_values(some(), 20, new())
    assert ticks(ax) == ["b", "f", "c", "a", "e"]
    assert ticks(plot_values(some(), 2, new(), highest=1)) == ["b", "f", "e"]
    assert ticks(plot_values(some(), 4, new(), highest=9)) == ["b", "f", "c", "a", "e"]
    top, bottom = ax.get_ylim()
    assert top > bottom  # the first on top


def test_shape_and_colour_both_say_which_side_of_zero_an_interval_is_on() -> None:
    ax = plot_values(some([0.1, 0.1, 0.1, 0.1, 0.1, 0.2]), 5, new())
    drawn = {
        (line.get_marker(), line.get_color()): sorted(map(float, line.get_xdata()))  # pyright: ignore
        for line in ax.get_lines()
        if line.get_marker() in "v^o"
    }
    assert drawn == {("v", RED): [-2.0], ("^", BLUE): [0.5, 3.0], ("o", GREY): [-0.2, 0.1]}
    ends = sorted(float(x) for part in ax.collections for x in part.get_paths()[0].vertices[:, 0])  # pyright: ignore
    assert ends[0] == pytest.approx(-2 - 1.96 * 0.1, abs=1e-3)
    assert ax.get_xlabel() == f"value and its 95 % interval: {DIRECTION}"


def test_errors_that_are_not_known_draw_no_interval() -> None:
    ax = plot_values(some([float("nan")] * 6), 5, new())
    assert ax.get_xlabel() == f"value: {DIRECTION}"
    marks = [line.get_label() for line in ax.get_lines() if line.get_marker() in "v^o"]
    assert marks == ["not known how sure"]
    mixed = plot_values(some([float("nan"), 0.1, 0.1, 0.1, 0.1, 0.2]), 5, new())
    assert mixed.get_xlabel() == f"value and its 95 % interval: {DIRECTION}"


def test_zero_is_no_boundary_of_shares() -> None:
    ax = plot_values(some(meaning="high = trees give its label"), 3, new())
    assert {line.get_marker() for line in ax.get_lines()} == {"o"}
    assert "harmful" not in ax.get_xlabel()
    assert "worse" in ax.get_xlabel()


@pytest.mark.parametrize(("k", "highest"), [(0, 0), (3, -1)])
def test_fewer_than_one_row_is_refused(k: int, highest: int) -> None:
    with pytest.raises(ValueError, match="expected k of at least 1"):
        plot_values(some(), k, new(), highest=highest)


def test_rows_without_any_value_are_refused() -> None:
    nothing = Values(np.full(3, np.nan))
    for plot in (plot_values, plot_value_distribution):
        with pytest.raises(ValueError, match="none of the 3 rows"):
            plot(nothing, ax=new())


def test_a_distribution_marks_rows_by_their_place_before_rows_were_left_out() -> None:
    ax = plot_value_distribution(some(), marked=[1, 4], marked_label="wrong", ax=new())
    legend: Any = ax.get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["other rows (3)", "wrong (2)"]
    assert ax.get_xlabel() == f"value: {DIRECTION}"


def history(low: list[float]) -> pd.DataFrame:
    n = len(low)
    return pd.DataFrame(
        {
            "evaluations": [100.0 * 2**at for at in range(n)],
            "error": np.geomspace(3, 0.1, n) if n > 1 else [0.5],
            "stability": [value + 0.03 for value in low],
            "low": low,
            "high": [value + 0.05 for value in low],
        }
    )


def test_convergence_shows_stability_its_interval_errors_and_what_was_asked() -> None:
    told = {"until": "(rank stability ≥ 0.9 | 5,000 evaluations)"}
    values = settled(some(provenance=told), history([0.2, 0.5, 0.93]))
    assert asked_stability(values) == 0.9
    ax = plot_convergence(values, new())
    lines = {str(line.get_label()): line for line in ax.get_lines()}
    stable = lines["rank stability: up is better"]
    assert list(stable.get_xdata()) == [100, 200, 400]  # pyright: ignore
    assert list(stable.get_ydata()) == pytest.approx([0.23, 0.53, 0.96])  # pyright: ignore
    assert lines["median error / spread: down is better"].get_linestyle() == "--"
    asked = lines["asked: 0.9"]
    assert asked.get_linestyle() == ":"
    assert set(asked.get_ydata()) == {0.9}  # pyright: ignore
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]  # pyright: ignore
    assert (heights.min(), heights.max()) == pytest.approx((0.2, 0.98))
    assert ax.get_ylim()[1] <= 1.5  # an early error of 3 does not flatten the rest


def test_without_a_rule_nothing_was_asked_and_a_single_line_is_drawn() -> None:
    values = settled(some(provenance={"until": "500 evaluations"}), history([0.4]))
    assert asked_stability(values) is None
    ax = plot_convergence(values, new())
    assert not [line for line in ax.get_lines() if "asked" in str(line.get_label())]
    assert "log" not in ax.get_xlabel()


def test_closed_forms_have_no_convergence() -> None:
    with pytest.raises(ValueError, match="closed form"):
        plot_convergence(some(), new())


def test_a_comparison_is_by_rank_and_names_the_rows_that_differ_most() -> None:
    numbers = np.arange(12.0)
    other = np.exp(numbers)  # the same order in other units
    ax = plot_value_comparison(numbers, other, new())
    assert ax.texts[0].get_text() == "Spearman ρ = 1.000 (12 rows)"
    assert len(ax.texts) == 1
    other[[0, 11]] = other[[11, 0]]
    ax = plot_value_comparison(
        numbers, other, new(), names=[f"r{at}" for at in range(12)], outliers=2, x_name="influence"
    )
    assert sorted(text.get_text() for text in ax.texts[1:]) == ["r0", "r11"]
    assert ax.get_xlabel() == f"influence: {DIRECTION}"
    expected = 1 - 6 * 2 * 11**2 / (12 * (12**2 - 1))
    assert f"{expected:.3f}" in ax.texts[0].get_text()


def test_values_of_the_same_names_are_brought_into_one_order() -> None:
    x = Values(np.array([1.0, 2.0, 3.0]), names=["a", "b", "c"])
    y = Values(np.array([30.0, 10.0, 20.0]), names=["c", "a", "b"])
    ax = plot_value_comparison(x, y, new())
    assert "ρ = 1.000" in ax.texts[0].get_text()
    with pytest.raises(ValueError, match="'c' is in the first alone"):
        plot_value_comparison(x, Values(np.arange(3.0), names=["a", "b", "z"]), new())


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        ([1.0, 2.0], [1.0], "got shapes"),
        ([[1.0]], [[1.0]], "got shapes"),
        ([1.0, np.nan, 3.0], [np.nan, 2.0, 3.0], "got 1"),
    ],
)
def test_a_comparison_of_other_rows_is_refused(x: Any, y: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plot_value_comparison(x, y, new())


def test_hostile_names_can_be_drawn() -> None:
    names = ["$x^$", "\u202eevil", "a" * 500, "", "\n", "<b>"]
    values = settled(some([0.1] * 6).named(names), history([0.2, 0.9]))
    plots = (plot_values, plot_value_distribution, plot_convergence)
    for plot in plots:
        draw(plot, values).savefig(io.BytesIO(), format="svg")
    draw(plot_value_comparison, values, values.values[::-1].copy()).savefig(
        io.BytesIO(), format="svg"
    )
