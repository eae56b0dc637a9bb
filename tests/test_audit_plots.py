"""Plots of an audit: what is drawn, and that every axis says what it means."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
import pytest

from audit_example import example, verified
from audit_html import Page
from upweight.auditing.audit import Expected, Verification
from upweight.report import audit_page, audit_plots


@pytest.mark.slow
def test_figures_by_name_and_every_one_in_words():
    figures = audit_page.plots(verified(example()))
    names = ["suspicion", "proposed", "expected", "columns", "verification", "values"]
    assert list(figures) == names
    page = Page(audit_page.build(verified(example())))
    images = [a for tag, a in page.elements if tag == "svg" and a.get("role") == "img"]
    assert len(images) == len(figures)
    assert all(len(image["aria-label"]) > 20 for image in images)
    hidden = [a for tag, a in page.elements if tag == "svg" and a.get("role") != "img"]
    assert all(a["aria-hidden"] == "true" for a in hidden)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_axes_say_what_they_mean(task):
    figures = audit_page.plots(verified(example(600, task=task)))
    for figure in figures.values():
        (ax,) = figure.axes
        assert ax.get_xlabel()
        assert ax.get_ylabel() or ax.get_yticklabels()
    assert figures["suspicion"].axes[0].get_yscale() == "log"
    label = {"classification": "proposed label", "regression": "given churned"}[task]
    assert figures["proposed"].axes[0].get_xlabel() == label


def test_bars_count_what_they_should():
    audit = example()
    (ax,) = audit_page.plots(audit)["columns"].axes
    widths = [bar.get_width() for bar in ax.patches]
    counts = audit.rows.loc[audit.rows["feature_flag"], "suspect_column"].value_counts()
    assert sorted(widths) == sorted(counts.tolist())
    assert widths == sorted(widths, reverse=True)


def test_many_classes_are_shown_as_pairs():
    given = [f"c{i % 12}" for i in range(30)]
    proposed = ["c1"] * 30
    ax = audit_plots.plot_given_and_proposed(given, proposed, _axes())
    assert ax.get_xlabel() == "flagged rows, by given → proposed label"
    assert ax.get_yticklabels()[0].get_text() == "c0 → c1"
    assert [bar.get_width() for bar in ax.patches][:6] == [3] * 6


def test_expected_is_drawn_with_its_interval():
    ax = audit_plots.plot_expected([Expected(20, 15, 12, 18), Expected(10, 9, 8, 10)], _axes())
    (curve,) = [line for line in ax.lines if line.get_label() == "expected"]
    assert curve.get_xydata().tolist() == [[0, 0], [10, 9], [20, 15]]


def test_verification_is_drawn_as_dots_or_curves():
    dots = verified(example(100), curve=False).verification
    ax = audit_plots.plot_verification(dots, _axes())
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["all rows", "without flagged\n(−5)", "without random\n(−5)"]
    ax = audit_plots.plot_verification(verified(example(100)).verification, _axes())
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["without flagged", "without random", "without most suspicious"]
    curve = next(line for line in ax.lines if line.get_label() == "without most suspicious")
    assert curve.get_xdata().tolist() == [0, 2, 5, 10]
    # Scores on the other held-out rows, which are 0.05 higher, are not mixed in.
    assert curve.get_ydata().max() < 0.84


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ax: audit_plots.plot_suspicion([0.5, 1.5], ax=ax), r"in \[0, 1\]"),
        (lambda ax: audit_plots.plot_expected([], ax=ax), "at least one entry"),
        (lambda ax: audit_plots.plot_flagged_columns({}, ax=ax), "at least one column"),
        (lambda ax: audit_plots.plot_verification(_nothing(), ax=ax), "at least one score"),
        (lambda ax: audit_plots.plot_proposed_numbers([np.nan], [1.0], ax=ax), "at least one"),
    ],
)
def test_plots_refuse_what_they_cannot_show(call, message):
    with pytest.raises(ValueError, match=message):
        call(_axes())


def _axes():
    return matplotlib.figure.Figure().add_subplot()


def _nothing():
    table = pd.DataFrame({name: [] for name in ("what", "removed", "score", "low", "high")})
    return Verification("accuracy", table, (0, 0, 0), (0, 0, 0), 1, "nowhere")
