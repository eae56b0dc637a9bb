"""The part of a page that shows a `Check`: findings, predicted against actual effects, dampings."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from upweight.report import evaluation_plots, plots
from upweight.report.page import Block, Figure, Table
from upweight.report.style import DIRECTION
from upweight.trust import Check
from upweight.trust.questions import slope_of

__all__ = ["blocks", "effects", "told_of_damping"]

# A shape and a word for each verdict, since colours are not seen by all.
MARKS = {"good": "✓ good", "fair": "~ fair", "poor": "✗ poor"}
CLEARLY = 0.02  # of the linear datamodeling score: what is less is not told
RIGHT_SIZE = (0.8, 1.25)  # slopes of actual on predicted effects that count as 1

Side = Literal["large", "small", "right"]


def blocks(found: Check, *, rows: str = "rows") -> list[Block]:
    """Everything there is to see in a check, for a section of a report.

    Parameters
    ----------
    found
        Of `Influence.check`. Without a `refit` there is only the table.
    rows
        What a training row is called, in the plural: ``"bottles"``.
    """
    return [findings(found), *effects(found, rows=rows), *by_damping(found, rows=rows)]


def findings(found: Check) -> Table:
    """A line for each thing that was looked at; the verdict has a mark and a word."""
    columns = ["what", "verdict", "value", "meaning"]
    lines = [(f.what, MARKS[f.verdict], f.value, f.meaning) for f in found.findings]
    against = [i for i, finding in enumerate(found.findings) if finding.verdict == "poor"]
    return Table(
        pd.DataFrame(lines, columns=columns),
        "What speaks for and against the scores: ✓ for, ~ with reserve, ✗ against.",
        highlight_rows=against,
        highlight_label="speaks against",
        highlight_column="verdict",
        whole=True,
    )


def effects(found: Check, *, rows: str = "rows") -> list[Figure]:
    """Predicted against actual effects of the halves: a sum of influences, and one Newton step."""
    if found.actual is None or found.first_order is None or found.predicted is None:
        return []
    actual = _about_the_mean(found.actual)
    figures: list[Figure] = []
    predictions = {"sum of influences": found.first_order, "one Newton step": found.predicted}
    for name, values in predictions.items():
        predicted = _about_the_mean(values)
        if not (np.isfinite(predicted) & np.isfinite(actual)).any():
            continue
        slope = slope_of(predicted, actual)
        figures.append(
            Figure(
                plots.draw(_plot_effects, predicted, actual, name=name, width=4.2, height=3.9),
                f"{name[0].upper()}{name[1:]}: a point is a test row and a half of the {rows} that "
                "is taken away, and shows how much that raises the loss of the test row, compared "
                "with the mean over all halves. On the dashed line prediction and retraining "
                f"agree; actual effects are {slope:.2f} times as large as predicted ones.",
                f"Scatter plot of actual effects against those predicted by {name}; slope "
                f"{slope:.2f}.",
            )
        )
    return figures


def by_damping(found: Check, *, rows: str = "rows") -> list[Figure]:
    """How well both predictions order the halves at other dampings, if there is more than one."""
    table = found.dampings
    if table.empty or table["damping"].to_numpy().min() <= 0:
        return []
    used = table[table["factor"] == 1.0]
    told = ", ".join(
        f"{line['damping']:.3g}: {line['sum']:.2f} and {line['newton']:.2f}"
        for line in table.to_dict("records")
    )
    return [
        Figure(
            plots.draw(evaluation_plots.plot_damping, table, width=4.6, height=3.4),
            f"LDS by damping: how alike predictions and retraining order the halves of the {rows}, "
            "by rank correlation for each test row, on average. 1 is the same order, 0 none.",
            f"LDS of a sum of influences and of one Newton step by damping: {told}. In use: "
            f"{', '.join(f'{value:.3g}' for value in used['damping'])}.",
        )
    ]


def told_of_damping(found: Check) -> str:
    """Whether λ is too large or too small by the retraining, and what says so.

    Parameters
    ----------
    found
        Of `Influence.check` with a `refit`.

    Returns
    -------
    str
        Empty without a retraining.
    """
    if found.actual is None or found.predicted is None or found.dampings.empty:
        return ""
    slope = slope_of(_about_the_mean(found.predicted), _about_the_mean(found.actual))
    table = found.dampings.dropna(subset="newton")
    used = table[table["factor"] == 1.0]
    if used.empty or np.isnan(slope):
        return ""
    here, best = used.iloc[0], table.iloc[int(table["newton"].to_numpy().argmax())]
    by_order: Side = "right"
    order = (
        f"no other λ that was tried orders the halves clearly better (LDS {here['newton']:.2f} for "
        "Newton steps)"
    )
    if best["newton"] > here["newton"] + CLEARLY:
        by_order = "large" if best["damping"] < here["damping"] else "small"
        order = (
            f"of those tried, λ = {best['damping']:.3g} orders the halves best, with an LDS of "
            f"{best['newton']:.2f} for Newton steps instead of {here['newton']:.2f}"
        )
    by_size, size = _told_of_size(slope)
    verdict = _verdict(by_order, by_size)
    return f"λ = {here['damping']:.3g} is {verdict}: {size}, and {order}."


def _about_the_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values - values.mean(0)


def _told_of_size(slope: float) -> tuple[Side, str]:
    low, high = RIGHT_SIZE
    if slope > high:
        return "large", f"actual effects are {slope:.2f} times as large as Newton steps predict"
    if slope < low:
        return "small", f"actual effects are only {slope:.2f} times what Newton steps predict"
    return "right", f"predicted effects have about the right size (slope {slope:.2f})"


def _verdict(by_order: Side, by_size: Side) -> str:
    sides = {by_order, by_size}
    if sides == {"right"}:
        return "about right"
    if sides == {"large", "small"}:
        return "too large by one measure and too small by another"
    (side,) = sides - {"right"}
    return f"too {side}" if len(sides) == 1 else f"rather too {side}"


def _plot_effects(
    predicted: NDArray[np.float64], actual: NDArray[np.float64], *, name: str, ax: Axes
) -> Axes:
    evaluation_plots.plot_predicted_vs_actual(predicted, actual, ax)
    ax.set_xlabel(f"{name}: {DIRECTION}")
    return ax
