"""The page of an audit: what it says of an audit, of its rows and their cells."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit_example import example, verified
from audit_html import Page, bodies, shown_rows, text_of
from upweight.auditing.audit import RowDetail, StandOut
from upweight.report import audit_page
from upweight.report.audit_cells import ColumnCells
from upweight.report.audit_signals import KNOWN, Signals, verdict
from upweight.report.audit_suspects import Suspects, row_names
from upweight.report.audit_text import cell_text, share, visible


@pytest.fixture(scope="module")
def normal():
    return audit_page.build(verified(example()))


def test_the_summary_comes_first_and_has_the_numbers(normal):
    text = text_of(normal)
    told = (
        "400 rows were judged by models that had not seen them. 20 labels in “churned” are "
        "probably wrong (5 %): about 17 of them are expected to be truly wrong (between 14 and "
        "19). 10 cells do not fit the rest of the row"
    )
    assert told in text
    assert "6 exact duplicates, 3 near duplicates and 3 rows that contradict their copies" in text
    assert "“since” predicts the target alone" in text
    assert "do better on held-out rows: balanced accuracy changes by +0.020" in text
    main = text[text.index(told) :]
    parts = ["Look through the suspected", "Rows judged", "Search", "In pictures", "taken for"]
    places = [main.find(part) for part in [*parts, "Settings and replay"]]
    assert places == sorted(places)
    assert -1 not in places


@pytest.mark.parametrize(
    ("gain", "told"),
    [(0.02, "do better"), (-0.02, "do worse"), (0.001, "cannot be told")],
)
@pytest.mark.slow
def test_the_summary_says_what_verification_found(gain, told):
    assert told in text_of(audit_page.build(verified(example(100), gain)))


def test_a_gain_without_an_interval_is_told_as_such():
    audit = verified(example(100))
    nothing = (0.01, -np.inf, np.inf)
    found = replace(audit.verification, gain=nothing, gain_over_random=nothing, repeats=1)
    found.table.loc[:, ["low", "high"]] = np.nan
    text = text_of(audit_page.build(replace(audit, verification=found)))
    assert "+0.010 (how exactly cannot be told)" in text
    assert "inf" not in re.findall(r"\b(?:nan|inf)\b", text)


@pytest.mark.slow
def test_what_to_do_follows_what_was_found(normal):
    (todo,) = re.findall(r'<ol class="todo">.*?</ol>', normal, re.DOTALL)
    steps = re.findall(r'<li><a href="#([a-z]+)">', todo)
    assert steps == ["leakage", "findings", "findings", "copies", "copies"]
    unverified = text_of(audit_page.build(example(100)))
    assert "upweight verify RUN" in unverified
    assert "upweight verify RUN" not in text_of(normal)
    audit = example(100, findings=0, top=3)
    nothing = replace(
        audit,
        findings=audit.findings.iloc[:0],
        rows=audit.rows.assign(feature_flag=False),
        summary=replace(audit.summary, counts={}, flagged=0, precision=None),
    )
    text = text_of(audit_page.build(nothing))
    assert "No label in “churned” looks wrong enough" in text
    assert "Nothing has to be done" in text
    assert "One of the most suspicious rows, but not suspicious enough" in text


@pytest.mark.slow
def test_judges_that_know_nothing_are_a_warning():
    audit = example(100)
    weak = {"network": 0.585, "forest": 0.55, "baseline": 0.58}
    poor = replace(audit.summary, quality=weak, notes=())
    assert '<p class="warning">' not in audit_page.build(audit)
    html = audit_page.build(replace(audit, summary=poor))
    assert "the best judge (network) has a held-out accuracy of 0.58, and 0.58 needs" in html
    assert html.count('<p class="warning">') == 1
    # Who audits knows better what to say.
    html = audit_page.build(replace(audit, summary=replace(poor, notes=("It rests on little.",))))
    assert '<p class="warning"><bdi>It rests on little.' in html
    assert "hardly predict" not in html


def test_every_finding_has_a_line_with_its_row_and_evidence(normal):
    audit = verified(example())
    about_rows = audit.findings[~audit.findings["kind"].isin(["helpful", "leakage"])]
    assert shown_rows(normal) == about_rows["row"].tolist()
    for line, found in zip(bodies(normal), about_rows.to_dict("records"), strict=True):
        assert f'data-kind="{found["kind"]}"' in line
        assert found["evidence"].replace("'", "&#39;") in line
        suspicion = "feature_suspicion" if found["kind"] == "features" else "suspicion"
        value = f"{audit.rows[suspicion].iat[found['row']]:.3f}"
        judged = found["kind"] not in ("duplicate", "near-duplicate")
        assert f">{value if judged else '–'}</td>" in line
        if found["kind"] == "label":
            assert f'<td class="given">{found["given"]}</td>' in line
            assert f'<td class="proposed">{found["proposed"]}</td>' in line


def test_details_show_neighbours_signals_and_what_stands_out():
    audit = example(200)
    row = int(audit.suspects(1)["row"].iloc[0])
    html = audit_page.build(audit)
    (line,) = [body for body in bodies(html) if body.startswith(f'<tbody id="row-{row}"')]
    detail, text = audit.details[row], text_of(line)
    first, second = (re.escape(one.column) for one in detail.stand_out)
    # What stands out comes first, under the label; what is at the end of its column is tinted.
    assert re.search(rf'class="out"><th scope="row">{first}</th>', line)
    assert re.search(rf'<tr><th scope="row">{second}</th>', line)
    assert re.search(rf"churned.*{first}.*{second}.*since", text)
    for other in (*detail.supporting, *detail.contradicting, *(i for i, _ in detail.behind)):
        assert f"row {other} (" in text
    for _, influence in detail.behind:
        assert f"{influence:+.3g}" in text
    assert "99.3 %" in text
    for key in ("knn", "oob", "influence"):
        assert KNOWN[key].meaning.replace("'", "&#39;") in line
    # Labels of neighbours differ from the row's where they should.
    (labels,) = re.findall(r'<tr><th scope="row">churned</th>(.*?)</tr>', line)
    marks = re.findall(r'<td( class="d")?>', labels)[-10:]
    assert [bool(mark) for mark in marks] == [False] * 5 + [True] * 5
    # A row that is no neighbour of the table of findings has no link.
    known = set(shown_rows(html))
    links = {int(target) for target in re.findall(r'href="#row-(\d+)"', line)}
    assert links <= known


def test_rows_with_an_odd_cell_have_details_too():
    audit = example(200, top=5)
    odd = audit.findings[audit.findings["kind"] == "features"]["row"].iloc[0]
    (line,) = [b for b in bodies(audit_page.build(audit)) if b.startswith(f'<tbody id="row-{odd}"')]
    column = audit.rows["suspect_column"].iat[odd]
    assert f'class="out"><th scope="row">{column}</th>' in line


def test_a_row_with_two_findings_has_its_details_once():
    audit = example(100, top=10)
    row = int(audit.suspects(1)["row"].iloc[0])
    again = audit.findings.iloc[[0]].assign(row=row, kind="harmful", evidence="again")
    found = pd.concat([audit.findings, again], ignore_index=True)
    html = audit_page.build(replace(audit, findings=found))
    lines = [body for body in bodies(html) if f'<th scope="row">{row}</th>' in body]
    assert [line.count("<details") for line in lines] == [1, 0]
    assert f'<a href="#row-{row}">Details of the row</a>' in lines[1]
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_regression_speaks_of_numbers():
    html = audit_page.build(example(task="regression"))
    text = text_of(html)
    assert "20 numbers in “churned” are probably wrong" in text
    assert "wrong number" in text
    assert 'name="given"' not in html
    assert "closest churned" in text


@pytest.mark.slow
def test_rows_without_a_target_are_told_and_break_nothing():
    audit = example(100, top=5)
    gone = np.arange(100) >= 90
    rows = audit.rows.copy()
    rows["label_flag"] = rows["label_flag"].astype("boolean").mask(gone)
    rows["suspicion"] = rows["suspicion"].astype("Float64").mask(gone)
    for name in ("given", "proposed", "knn", "oob"):
        rows[name] = rows[name].mask(gone)
    line = {"row": 95, "name": "x", "kind": "no-target", "score": np.nan,
            "evidence": "has no target"}  # fmt: skip
    found = pd.concat([audit.findings, pd.DataFrame([line])], ignore_index=True)
    details = {**audit.details, 95: RowDetail(95, [StandOut("tenure", "1")])}
    html = audit_page.build(
        replace(
            audit,
            rows=rows,
            findings=found.astype({"row": "Int64"}),
            details=details,
            summary=replace(audit.summary, judged=90),
        )
    )
    Page(html)
    assert "10 rows without a target were not." in text_of(html)
    (line,) = [body for body in bodies(html) if 'data-kind="no-target"' in body]
    assert "nan" not in line.lower()


def test_an_audit_without_anything_optional_has_a_page():
    audit = example(50)
    bare = replace(
        audit,
        rows=audit.rows.drop(columns=list(KNOWN), errors="ignore"),
        details={},
        summary=replace(
            audit.summary, noise=None, precision=None, recall=None, expected=(), quality={},
            notes=(), seconds={}, counts={},
        ),
    )  # fmt: skip
    Page(audit_page.build(bare))


def test_names_of_rows_fall_back_to_their_position():
    rows = pd.DataFrame({"name": ["a", None, np.nan, 7]})
    assert row_names(rows) == ["a", "1", "2", "7"]


def test_lines_of_unflagged_rows_come_last():
    audit = example(200, findings=5, top=12)
    suspects = Suspects(audit, row_names(audit.rows))
    kinds = [line.kind for line in suspects.lines]
    assert kinds.count("unflagged") == 12 - 5 - len(
        set(audit.details) & set(audit.rows.loc[audit.rows["feature_flag"], "row"])
        | set(audit.details) & set(range(40))
        & set(audit.findings["row"].dropna().astype(int))
    )  # fmt: skip
    assert kinds[-1] == "unflagged"


# ---- signals ---------------------------------------------------------------------------------


def test_signals_say_wrong_on_their_bad_end_only():
    rows = pd.DataFrame(
        {
            "label_flag": [False] * 100,
            "oob": np.linspace(0, 1, 100),
            "loss": np.linspace(0, 1, 100),
            "margin": np.linspace(-0.5, 3, 100),
            "disagreement": np.linspace(0, 1, 100),
            "unknown_thing": np.linspace(0, 1, 100),
        }
    )
    signals = Signals(rows)
    lowest = {one.key: one for one in signals.read(0)}
    highest = {one.key: one for one in signals.read(99)}
    assert [lowest[key].says for key in ("oob", "loss", "margin")] == ["wrong", "fine", "wrong"]
    assert [highest[key].says for key in ("oob", "loss", "margin")] == ["fine", "wrong", "fine"]
    assert (lowest["oob"].beats, lowest["loss"].beats) == (1.0, 0.0)
    assert lowest["unknown_thing"].says == lowest["disagreement"].says == ""
    assert lowest["unknown_thing"].beats is None
    assert highest["disagreement"].beats == 1.0
    assert lowest["unknown_thing"].signal.name == "unknown thing"
    # Beyond zero is wrong, however many are; above it a low one is unclear.
    margins = [{one.key: one.says for one in signals.read(i)}["margin"] for i in range(100)]
    assert margins == ["wrong"] * 15 + ["unclear"] * 5 + ["fine"] * 80
    outs = [{one.key: one.says for one in signals.read(i)}["oob"] for i in range(100)]
    assert outs == ["wrong"] * 5 + ["unclear"] * 15 + ["fine"] * 80


def test_the_page_says_where_influence_disagrees():
    rows = pd.DataFrame(
        {
            "label_flag": [False] * 100,
            "oob": np.linspace(0, 1, 100),
            "margin": np.linspace(-0.5, 3, 100),
            "influence": np.linspace(1, -1, 100),
        }
    )
    signals = Signals(rows)
    assert verdict(signals.read(0)) == (
        "Forest and network say that the label is wrong. Influence disagrees: as a training row it "
        "helps the prediction of others."
    )
    assert verdict(signals.read(99)) == (
        "Forest and network do not say that the label is wrong. Influence disagrees: as a training "
        "row it harms the prediction of others."
    )
    assert verdict(signals.read(50)) == "Forest and network do not say that the label is wrong."
    assert verdict(signals.read(10), "number") == (
        "Network says that the number is wrong, forest does not. Influence disagrees: as a "
        "training row it helps the prediction of others."
    )
    assert verdict([]) == ""


def test_signals_of_numbers_are_told_as_such():
    rows = pd.DataFrame({"label_flag": [False] * 3, "oob": [-1.0, -2.0, -3.0]})
    (signal,) = {one.signal for one in Signals(rows, regression=True).read(0)}
    assert signal.meaning == KNOWN["oob"].number
    assert Signals(rows).read(0)[0].signal.meaning == KNOWN["oob"].meaning


# ---- cells -----------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, -3.0, np.nan]), min_size=1, max_size=12))
def test_a_rank_is_the_share_of_the_other_values_that_are_lower(values):
    column = ColumnCells("x", pd.Series(values, dtype="float64"), "numeric")
    for i, value in enumerate(values):
        others = [v for j, v in enumerate(values) if j != i and not np.isnan(v)]
        if np.isnan(value) or not others:
            assert column.rank(i) is None
            continue
        lower = np.mean([1.0 if v < value else 0.5 if v == value else 0.0 for v in others])
        assert column.rank(i) == pytest.approx(lower)


def test_cells_of_every_kind_stand_somewhere():
    text = pd.Series(["a", "a", "a", "b", None, "  "], dtype="str")
    category = ColumnCells("x", text, "category")
    assert [category.told(i) for i in (0, 3, 4)] == [
        "in 50\xa0%", "only here", "missing, as in 33\xa0%",
    ]  # fmt: skip
    assert category.differs(0, 3)
    assert not category.differs(0, 1)
    assert category.differs(0, 4)
    assert category.at(0) < category.at(3)
    assert category.at(4) is None
    dates = ColumnCells("d", pd.Series(pd.date_range("2020-01-01", periods=5)), "date")
    assert [dates.rank(i) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert dates.text(0) == "2020-01-01"
    amounts = ColumnCells("n", pd.Series(["1,000", "2,000", "x", "3,000"]), "numeric")
    assert [amounts.rank(i) for i in range(4)] == [0, 0.5, None, 1]
    constant = ColumnCells("c", pd.Series([2.0, 2.0, 2.0]), "numeric")
    assert constant.shape.startswith("M")
    assert constant.rank(1) == 0.5
    assert ColumnCells("e", pd.Series([np.nan, np.nan]), "numeric").shape == ""


def test_an_outlier_is_marked_at_the_end_of_the_shape():
    values = np.append(np.random.default_rng(0).normal(size=500), [1e9, -1e9, np.inf])
    column = ColumnCells("x", pd.Series(values), "numeric")
    assert column.at(500) == 63
    assert column.at(501) == 1
    assert column.at(502) is None
    assert column.shape.count("M") > 15  # and does not press all others into one bar


# ---- text ------------------------------------------------------------------------------------


@given(st.text(max_size=50))
def test_visible_text_hides_nothing(text):
    shown = visible(text)
    allowed = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    hidden = {c for c in shown if unicodedata.category(c) in allowed}
    assert not hidden & set(map(chr, [*range(32), 0x7F, *range(0x202A, 0x202F), 0x200B, 0xFEFF]))
    assert not hidden & set(map(chr, range(0x2066, 0x206A)))
    if text.isprintable():
        assert shown == text


def test_cells_as_text():
    values = [1.0, 0.1 + 0.2, np.float32(2.5), True, np.bool_(False), None, np.nan, pd.NaT, "", 7]
    assert [cell_text(value) for value in values] == [
        "1", "0.3", "2.5", "yes", "no", "–", "–", "–", "(blank)", "7",
    ]  # fmt: skip
    assert cell_text("x" * 10_000) == "x" * 199 + "…"
    assert cell_text([1, 2]) == "[1, 2]"


@given(st.floats(0, 1))
def test_shares_never_pretend_to_be_all_or_nothing(value):
    text = share(value)
    assert (text == "0\xa0%") == (value == 0)
    assert (text == "100\xa0%") == (value == 1)
