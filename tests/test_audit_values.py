"""Influence and data values side by side: what is counted, drawn, listed and said."""

from __future__ import annotations

import re
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from audit_example import HOSTILE, example
from audit_html import Page, text_of
from upweight.report import audit_page
from upweight.report.audit_suspects import row_names
from upweight.report.audit_values import MEASURES, Values, values_blocks, values_figure
from upweight.report.audit_values_plot import plot_influence_and_values
from upweight.report.page import Figure, Paragraph, Table

BY = {one.key: one for one in MEASURES}


def with_rows(audit, **columns):
    return replace(audit, rows=audit.rows.assign(**columns))


def blocks_of(audit):
    return values_blocks(audit, row_names(audit.rows))


def tables_of(audit):
    return [block for block in blocks_of(audit) if isinstance(block, Table)]


def words_of(audit):
    return " ".join(block.text for block in blocks_of(audit) if isinstance(block, Paragraph))


@pytest.fixture(scope="module")
def section():
    html = audit_page.build(example())
    return re.search(r'<section id="values">.*?</section>', html, re.DOTALL)[0]


# ---- what is counted ----------------------------------------------------------------------------


def test_correlations_are_between_numbers_that_are_low_where_a_row_is_suspicious():
    audit = example()
    r = Values(audit).correlations()
    turned = audit.rows[["influence", "self_influence", "knn", "oob"]] * [1, -1, 1, 1]
    for i in range(4):
        for j in range(4):
            expected = spearmanr(turned.iloc[:, i], turned.iloc[:, j]).statistic
            assert r[i, j] == pytest.approx(expected)


def test_a_constant_measure_has_no_correlation_and_breaks_nothing():
    audit = with_rows(example(100), knn=0.25)
    assert np.isnan(Values(audit).correlations()[0, 2])
    (agreement,) = tables_of(audit)
    assert agreement.frame["r with KNN-Shapley"].isna().all()
    assert "Spearman's r is" not in values_figure(audit, row_names(audit.rows))["values"].alt
    assert "No row with an influence" in words_of(audit)


def test_flagged_rows_are_looked_for_at_the_suspicious_end_of_each_measure():
    flags = np.zeros(100, dtype=bool)
    flags[[3, 50, 99]] = True
    falling = np.arange(100.0)[::-1]
    audit = with_rows(
        example(100), label_flag=flags, influence=np.arange(100.0), self_influence=falling,
        knn=falling, oob=np.where(flags, 0.0, 1.0),
    )  # fmt: skip
    found = Values(audit)
    # The three lowest are rows 0, 1, 2; and 99, 98, 97.
    counts = {key: found.found(BY[key]) for key in BY}
    assert counts == {"influence": 0, "self_influence": 0, "knn": 1, "oob": 3}
    # Of rows that are the same a share is found: 3 of 100.
    assert Values(with_rows(audit, oob=0.5)).found(BY["oob"]) == pytest.approx(3 * 3 / 100)
    (agreement, _) = tables_of(audit)
    assert agreement.frame["finds"].tolist() == [f"{k}\xa0of\xa03" for k in (0, 0, 1, 3)]
    assert "the 3 flagged rows are among the 3 lowest by each (about 0.1 by chance)" in (
        agreement.caption
    )


def test_without_flags_the_most_suspicious_rows_are_looked_for():
    suspicion = np.linspace(0, 0.5, 100)
    audit = with_rows(example(100), label_flag=False, suspicion=suspicion, oob=1 - suspicion)
    found = Values(audit)
    assert np.flatnonzero(found.asked).tolist() == list(range(80, 100))
    assert found.found(BY["oob"]) == 20
    assert "20 most suspicious rows are among" in tables_of(audit)[0].caption
    small = example(12)
    assert Values(with_rows(small, label_flag=False)).asked.sum() == 12


def test_times_are_told_as_far_as_they_are_known():
    audit = example(100)
    seconds = {"influence": 3.14, "networks": 12, "neighbours": 0.001}
    known = replace(audit, summary=replace(audit.summary, seconds=seconds))
    assert tables_of(known)[0].frame["seconds"].tolist() == [
        "3.1, after 12.0 for the networks", "in the same step", "less than 0.1", "–",
    ]  # fmt: skip
    unknown = replace(audit, summary=replace(audit.summary, seconds={}))
    assert "seconds" not in tables_of(unknown)[0].frame


# ---- where they disagree ------------------------------------------------------------------------


def apart_example():
    """Influence and value rise together, but for rows 10 (harms) and 90 (helps); 50 is near 0."""
    influence = np.linspace(-1, 1, 101)
    knn = np.linspace(-0.1, 0.3, 101)
    knn[[10, 90, 49]] = 0.5, -0.5, 0.6
    own = np.zeros(101)
    own[10] = 9.0
    return with_rows(
        example(101), influence=influence, knn=knn, self_influence=own, label_flag=False
    )


def test_rows_on_which_they_disagree_are_found_by_rank():
    audit = apart_example()
    lines = Values(audit).apart()
    # Row 49 is low by influence and highest by value, but its influence is nearly 0.
    assert lines["at"].tolist() == [10, 90]
    assert lines["by"].tolist() == [11, 91]
    assert lines["worth"].tolist() == [100, 1]
    frame = tables_of(audit)[1].frame
    assert frame["row"].tolist() == ["10", "90"]
    assert frame["given"].tolist() == audit.rows["given"].iloc[[10, 90]].tolist()
    assert frame["influence"].tolist() == pytest.approx([-0.8, 0.8])
    assert frame["KNN-Shapley"].tolist() == [0.5, -0.5]


def test_each_kind_of_disagreement_has_its_sentence():
    def told(audit):
        return tables_of(audit)[1].frame["what it usually means"].tolist()

    audit = apart_example()
    low, high = told(audit)
    assert "networks fit it alone" in low
    assert high.startswith("It misleads its nearest rows, but rows left out gain by it")
    # Not the only one that the networks fit alone; and a value that is low, but not below 0.
    other = with_rows(audit, self_influence=np.arange(101.0), knn=audit.rows["knn"] + 1)
    low, high = told(other)
    assert "near where the networks draw a border" in low
    assert high.startswith("It is of little worth to its nearest rows")
    flagged = with_rows(audit, label_flag=np.arange(101) == 90)
    assert "look before changing it" in told(flagged)[1]
    assert tables_of(flagged)[1].highlight_rows == [1]
    # Without the self-influence nothing is said of it.
    without = replace(audit, rows=audit.rows.drop(columns="self_influence"))
    assert "border" in told(without)[0]


def test_who_disagrees_harms_and_helps_by_influence():
    for seed in range(5):
        audit = example(300, seed=seed)
        found = Values(audit)
        lines = found.apart()
        signs = np.sign(found["influence"][lines["at"]])
        assert (signs == np.where(lines["by"] < lines["worth"], -1, 1)).all()
        assert set(signs) == {-1, 1}
        assert len(lines) <= 10


# ---- the plot -----------------------------------------------------------------------------------


def test_flagged_rows_have_another_colour_and_another_shape():
    ax = _axes()
    plot_influence_and_values([-5, 1, 2, 3], [-0.2, 0.1, 0.2, 0.1], [0], list("abcd"), ax)
    plain, flagged = ax.collections
    assert flagged.get_offsets().tolist() == [[-5, -0.2]]
    assert len(plain.get_offsets()) == 3
    assert plain.get_facecolor().tolist() != flagged.get_facecolor().tolist()
    assert len(plain.get_paths()[0]) != len(flagged.get_paths()[0])
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["not flagged (3)", "flagged (1)", "Spearman's r = +0.63"]
    assert "harmful ← 0 → helpful" in ax.get_xlabel()
    assert "misleads ← 0 → helps" in ax.get_ylabel()


def test_outliers_have_names_that_do_not_meet():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 500))
    x[7], y[9], x[11], y[11] = 400, -30, 399, y[7]
    ax = _axes()
    plot_influence_and_values(x, y, None, [f"name {i}" for i in range(500)], ax)
    texts = [text.get_text() for text in ax.texts]
    assert "name 7" in texts
    assert "name 9" in texts
    assert "name 11" not in texts  # it would lie on the other
    assert len(texts) <= 5


def test_many_rows_are_shades_and_no_flag_is_lost_from_sight():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5000))
    flagged = np.arange(5000) < 1000
    x[0], y[0], x[1], y[1] = 80, 20, -90, -20  # far from all others
    ax = _axes()
    plot_influence_and_values(x, y, flagged, ax=ax)
    cells, plain, diamonds = ax.collections
    shades = cells.get_array()
    assert (~np.ma.getmaskarray(shades)).sum() < 4000
    assert set(np.unique(shades.compressed())) == {0, 1, 2}  # one row, up to 10, up to 100
    assert len(plain.get_offsets()) == 0
    shown = [tuple(place) for place in diamonds.get_offsets()]
    assert {(80, 20), (-90, -20)} <= set(shown)
    assert set(shown) <= set(zip(x[:1000], y[:1000], strict=True))
    assert len(shown) < 600
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names[:2] == ["not flagged (4,000)", "flagged (1,000)"]


def test_every_row_without_a_flag_lies_in_a_shaded_cell():
    rng = np.random.default_rng(1)
    x, y = rng.standard_cauchy(size=(2, 2000))
    ax = _axes()
    plot_influence_and_values(x, y, ax=ax)
    (cells, _) = ax.collections
    corners = cells.get_coordinates()
    across, along = corners[0, :, 0], corners[:, 0, 1]
    column = np.clip(np.searchsorted(across, x, side="right") - 1, 0, len(across) - 2)
    line = np.clip(np.searchsorted(along, y, side="right") - 1, 0, len(along) - 2)
    shaded = ~np.ma.getmaskarray(cells.get_array()).reshape(len(along) - 1, len(across) - 1)
    assert shaded[line, column].mean() > 0.999  # but for rounding at an edge
    same = _axes()
    plot_influence_and_values(np.full(700, 2.0), np.full(700, 0.1), ax=same)
    same.figure.canvas.draw()


@pytest.mark.parametrize(
    "influence", [[0.0, 0.0], [1e-9, -3e-9], [-1e6, 2.0], [5.0, 5.0], [0.0, 0.0, 0.0, 0.0, 7.0]]
)
def test_ticks_lie_within_the_axis_whatever_the_scale(influence):
    ax = _axes()
    plot_influence_and_values(influence, np.arange(len(influence)), ax=ax)
    ticks, (low, high) = ax.get_xticks(), ax.get_xlim()
    assert all(low <= tick <= high for tick in ticks)
    assert min(influence) >= low
    assert max(influence) <= high
    assert len(set(ticks)) == len(ticks)
    ax.figure.canvas.draw()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, np.nan], [1, 2]), "influence must be finite"),
        (([1, 2], [1, np.inf]), "values must be finite"),
        (([1, 2], [1]), "got 2 influences, 1 values"),
        (([1, 2], [1, 2], None, ["a"]), "2 values, 1 names"),
        (([], []), "at least one number"),
    ],
)
def test_the_plot_refuses_what_it_cannot_show(arguments, message):
    with pytest.raises(ValueError, match=message):
        plot_influence_and_values(*arguments, ax=_axes())


# ---- the section in the page --------------------------------------------------------------------


def test_the_page_has_the_section(section):
    text = text_of(section)
    order = ["Influence and data values side by side", "Influence asks trained networks",
             "The KNN-Shapley value", "They agree", "Influence and KNN-Shapley value of each row",
             "How far the numbers agree", "r with KNN", "Rows on which they disagree most",
             "what it usually means"]  # fmt: skip
    places = [text.find(part) for part in order]
    assert -1 not in places
    assert places == sorted(places)
    assert section.count('role="img"') == 1
    assert list(audit_page.plots(example()))[-1] == "values"


@pytest.mark.parametrize("asked", [False, True])
def test_without_influences_the_values_remain(asked):
    audit = example(100)
    bare = replace(
        audit,
        rows=audit.rows.drop(columns=["influence", "self_influence"]),
        settings=replace(audit.settings, influence=asked),
    )
    words = words_of(bare)
    assert ("Influences were not asked for" in words) is not asked
    assert ("Influences are missing" in words) is asked
    assert "trained networks" not in words
    (agreement,) = tables_of(bare)
    assert agreement.frame["measure"].tolist() == ["KNN-Shapley", "Data-OOB"]
    assert not any(isinstance(block, Figure) for block in blocks_of(bare))
    assert "values" not in audit_page.plots(bare)
    Page(audit_page.build(bare))


def test_regression_speaks_of_numbers():
    audit = example(task="regression")
    words = words_of(audit)
    assert "what the number of the row is worth" in words
    assert "minus the difference from what trees say" in words
    assert "label" not in words
    agreement, table = tables_of(audit)
    assert agreement.frame["measure"].tolist()[-1] == "out of bag"
    assert "border" not in " ".join(table.frame["what it usually means"])
    assert "label" not in " ".join([table.highlight_label, *table.frame["what it usually means"]])
    given = audit.rows["given"].iloc[int(table.frame["row"].iloc[0])]
    assert float(table.frame["given"].iloc[0]) == pytest.approx(given)


def test_rows_without_a_target_are_left_out():
    audit = example(100)
    gone = np.arange(100) % 10 == 0
    keys = list(BY)
    rows = audit.rows.assign(**{key: audit.rows[key].mask(gone) for key in keys})
    found = Values(replace(audit, rows=rows))
    assert found.rows.tolist() == np.flatnonzero(~gone).tolist()
    assert found["knn"].tolist() == audit.rows["knn"][~gone].tolist()
    nothing = audit.rows.assign(**dict.fromkeys(keys, np.nan))
    assert words_of(replace(audit, rows=nothing)) == "There are no values to compare."
    none = replace(audit, rows=audit.rows.drop(columns=keys))
    assert words_of(none) == "There are no values to compare."


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_few_rows_break_nothing(rows):
    audit = example(20)
    few = replace(audit, rows=audit.rows.iloc[:rows].reset_index(drop=True))
    assert len(Values(few).rows) == rows
    assert tables_of(few)
    assert ("values" in values_figure(few, row_names(few.rows))) is (rows > 1)


def test_hostile_names_and_labels_stay_text():
    # Every outlier and every row apart has a hostile name and label.
    audit = apart_example()
    names = [HOSTILE[i % len(HOSTILE)] for i in range(101)]
    hostile = with_rows(
        audit, name=names, given=pd.Series(names[::-1]), influence=audit.rows["influence"] ** 9
    )
    html = audit_page.build(hostile)
    section = re.search(r'<section id="values">.*?</section>', html, re.DOTALL)[0]
    page = Page(section)
    assert not {"script", "img", "a"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    # Of the rows apart one has a formula for a name, the other one for a label; of the outliers in
    # the plot the first has a script.
    assert page.within("table").count(names[90]) == 2
    assert "</script>" in page.within("svg")
    assert "x" * 100 not in section
    assert not set(section) & set("\u202e\u2066\u200b\ufeff\x1b\x07\0")


def _axes():
    return matplotlib.figure.Figure().add_subplot()
