"""The comparison of methods in the report of the demo, in its run folder and on the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from test_report import Page
from upweight.comparison import Comparison, agreement
from upweight.inverse import Certificate, IndefiniteCurvatureWarning
from upweight.report import cli, comparison_report, demo_report, plots
from upweight.report.comparison_report import blocks, findings, terminal_table
from upweight.report.demo import WineSettings, run_wine
from upweight.report.page import Figure, Paragraph, Report, Section, Table, render

TITLE = "Do methods for large models agree?"
METHODS = ["cg+nystroem", "lissa", "arnoldi", "nystroem", "ekfac", "cg+ekfac"]
EXACT = np.linspace(-1, 2, 40) + 0.01


def made(notes: dict[str, str] | None = None, **scores: np.ndarray) -> Comparison:
    """A comparison as `compare` makes it, of these scores; a method with a note has no answer."""
    scores = {"direct": EXACT, **scores}
    lines = [
        {
            "method": name,
            **agreement(torch.tensor(EXACT), torch.tensor(values)),
            **{"residual": 0.5, "steps": None, "products": 7, "seconds": 0.25, "peak_mib": 1},
            "note": "",
        }
        for name, values in scores.items()
    ]
    lines += [{"method": name, "note": note} for name, note in (notes or {}).items()]
    certificates = {name: Certificate(name, 0.1, 3, coverage=0.876) for name in scores}
    return Comparison(pd.DataFrame(lines), pd.DataFrame(scores), certificates, "direct", 20)


def page_of(found: Comparison, marked: object = None, **words: str) -> str:
    return render(Report("t", "s", [Section("methods", blocks(found, marked, **words))]))


def kinds(found: Comparison, kind: type, marked: object = None) -> list:
    return [block for block in blocks(found, marked) if isinstance(block, kind)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder, and what the command printed."""
    out = tmp_path_factory.mktemp("runs") / "wine"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.main(
            [
                "demo",
                "wine",
                "--epochs",
                "60",
                "--curvature",
                "ggn",
                "--no-check",
                "--out",
                str(out),
            ]
        )
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def unanswered():
    """An unfinished training, where the Hessian has directions of negative curvature."""
    with pytest.warns(IndefiniteCurvatureWarning):
        return run_wine(WineSettings(epochs=3, check=False), progress=False)


def test_run_folder_has_the_table_and_the_scores(folder):
    out, _ = folder
    assert yaml.safe_load((out / "config.yaml").read_text())["settings"]["compare"] is True
    table = pd.read_parquet(out / "methods.parquet")
    scores = pd.read_parquet(out / "method_scores.parquet")
    assert table["method"][0] == "direct"
    assert set(METHODS) <= set(table["method"])
    assert list(scores.columns) == list(table["method"])
    rows = pd.read_parquet(out / "rows.parquet")
    np.testing.assert_allclose(scores["direct"], rows["mean_influence"], rtol=1e-5)
    for name, error in zip(table["method"], table["error_percent"], strict=True):
        twin = 100 * np.mean(np.abs(scores[name] - scores["direct"]) / np.abs(scores["direct"]))
        assert error == pytest.approx(twin, rel=1e-6)


def test_report_shows_every_method_in_both_tables_and_with_a_plot(folder):
    out, _ = folder
    html = (out / "report.html").read_text(encoding="utf-8")
    table = pd.read_parquet(out / "methods.parquet")
    section = html.split(f"<h2><bdi>{TITLE}</bdi></h2>")[1]
    others = list(table["method"][1:])
    assert section.count("<svg") == len(others)
    tables = re.findall("<tbody>(.*?)</tbody>", section, re.DOTALL)
    for body in tables:
        names = re.findall(r"<th scope=\"row\".*?><bdi>(.*?)</bdi>", body)
        assert names == ["direct (reference)", *(name.replace("'", "&#39;") for name in others)]
    assert len(tables) == 2
    for name, pearson in zip(table["method"], table["pearson"], strict=True):
        assert f"{pearson:.4f}" in tables[0]
        assert name == "direct" or f"<bdi>{name.replace(chr(39), '&#39;')}: mean error " in section
    alternatives = re.findall('<svg[^>]*aria-label="([^"]*)"', section)
    assert all("by" in text and "against those by direct" in text for text in alternatives)
    assert len(set(alternatives)) == len(others)


def test_terminal_shows_the_methods_in_short(folder):
    out, printed = folder
    table = pd.read_parquet(out / "methods.parquet").set_index("method")
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    for name in METHODS:
        assert lines[name][-3:-1] == [f"{table[c][name]:.4f}" for c in ("pearson", "spearman")]
    assert lines["method"] == ["method", "error", "%", "Pearson", "Spearman", "seconds"]


@pytest.mark.slow
def test_methods_without_an_answer_are_told_and_have_no_plot(unanswered):
    found = unanswered.comparison
    failed = [name for name in found.table["method"] if name not in found.mean.columns]
    assert "lissa" in failed
    page = Page(render(demo_report.build(unanswered, 20)))
    text = " ".join(page.within("main").split())
    for name in failed:
        assert f"{name}: no answer: " in text
        assert f"{name}: mean error" not in text
        assert f"{name} no answer" in re.sub(" +", " ", terminal_table(found))
    assert "gave no answer; the reasons stand below the table." in text
    captions = page.within("figcaption")
    assert captions.count("On the dashed line") == len(found.methods) == 7 - len(failed)


def test_without_a_comparison_there_is_no_section(unanswered):
    titles = [section.title for section in demo_report.build(unanswered, 5).sections]
    assert TITLE in titles
    without = dataclasses.replace(unanswered, comparison=None)
    assert [s.title for s in demo_report.build(without, 5).sections] == titles[:-1]


def test_compare_false_computes_nothing(monkeypatch):
    monkeypatch.setattr("upweight.report.demo.compare", None)
    settings = WineSettings(epochs=1, curvature="ggn", compare=False, check=False)
    assert run_wine(settings, progress=False).comparison is None


RANDOM = np.random.default_rng(0).permutation(EXACT)
SWAPPED = np.where(np.arange(40) < 3, 5.0, EXACT)  # the three lowest are no longer low


@pytest.mark.parametrize(
    ("scores", "told", "not_told"),
    [
        ({"a": EXACT * 1.005}, "a gives the scores of direct to better than 1 %.", "No method"),
        ({"a": EXACT, "b": EXACT * 1.001}, "a and b give the scores", "off"),
        ({"a": EXACT * 1.1}, "No method is within 1 % of direct. On average over the wines, a is "
         "off by 10.0\xa0%.", "wrong"),
        ({"a": EXACT * 1.1, "b": EXACT * 0.95}, "b is off by 5.0\xa0% and a by 10.0\xa0%.", "lost"),
        ({"a": EXACT * 3}, "a gets sizes wrong, by 200\xa0% on average, but mostly keeps the order "
         "of the wines: Spearman 1.00 (1.00 for the 20 strongest).", "Neither"),
        ({"a": RANDOM}, "Neither sizes nor order are right with a (", "keeps the order"),
        ({"a": EXACT, "b": EXACT * 2}, "a and b find the same 10 lowest wines as direct.",
         "Of the"),
        ({"a": EXACT, "b": EXACT, "c": EXACT}, "All 3 find the same 10 lowest", "Of the"),
        ({"a": EXACT, "b": SWAPPED}, "a finds the same 10 lowest wines as direct. Of the 10 lowest "
         "wines of direct, b finds 7.", "All"),
        ({"a": EXACT * np.nan}, "a gave scores that are not finite.", "lowest"),
    ],
)  # fmt: skip
def test_findings_say_what_the_numbers_say(scores, told, not_told):
    text = findings(made(**scores), rows="wines")
    assert told in text
    assert not_told not in text


def test_as_many_lowest_rows_are_compared_as_are_marked():
    found = made(a=SWAPPED)
    assert "Of the 4 lowest rows of direct, a finds 1." in findings(found, np.arange(4, 8))
    for marked in (None, [3], np.arange(30)):
        assert "Of the 10 lowest rows of direct, a finds 7." in findings(found, marked)
    agree, _ = kinds(found, Table, np.arange(4))
    assert agree.frame["same 4 lowest"].tolist() == [4, 1]


def test_tables_hold_the_numbers_of_the_comparison():
    found = made({"lissa": "no answer: it diverged"}, ekfac=EXACT * 2)
    agree, solves = kinds(found, Table)
    assert agree.frame["method"].tolist() == ["direct (reference)", "ekfac", "lissa"]
    assert agree.frame["error %"].tolist()[:2] == pytest.approx([0, 100])
    assert agree.frame["error %"].isna().tolist() == [False, False, True]
    assert solves.frame["residual"].tolist()[:2] == [0.5, 0.5]
    assert solves.frame["how the method works"].notna().all()
    page = " ".join(Page(page_of(found)).within("tbody").split())
    assert "5.0e-01––70.2587.6" in page  # steps and converged: not those of an iteration
    assert "lissa: no answer: it diverged." in [p.text for p in kinds(found, Paragraph)]


def test_methods_with_the_same_note_share_a_paragraph():
    found = made({"b": "no answer: why", "c": "no answer: why", "d": "no answer: other"}, a=EXACT)
    told = [block.text for block in kinds(found, Paragraph) if block.tone == "warning"]
    assert told == ["b and c: no answer: why.", "d: no answer: other."]


def test_plots_circle_marked_rows_and_name_the_method_beside_the_axis():
    found = made(ekfac=EXACT * 2, broken=EXACT * np.nan)
    (plain,) = kinds(found, Figure)
    assert "circles" not in plain.caption
    (figure,) = kinds(found, Figure, [0, 1])
    assert "Red circles: marked." in figure.caption
    (ax,) = figure.figure.axes
    assert ax.get_xlabel() == f"direct: {plots.DIRECTION}"
    assert ax.get_ylabel() == plots.DIRECTION
    assert "ekfac" in [text.get_text() for text in ax.texts]
    circles = ax.collections[1].get_offsets()
    np.testing.assert_array_equal(circles, np.column_stack([EXACT, EXACT * 2])[:2])


def test_labels_are_no_markup_and_no_mathematics():
    label = r"<b>$\frac{1}{0$</b>"
    html = page_of(made({"<i>": "no answer: <u>"}, **{label: EXACT * 2}), [0], rows="<s>")
    assert not re.search("<(b|i|u|s)>", html)
    assert label in Page(html).within("tbody")


def test_how_is_found_by_the_method_behind_a_label():
    found = made(mine=EXACT)
    found.certificates["mine"] = Certificate("cg", 0.1, 3)
    (_, solves) = kinds(found, Table)
    assert solves.frame["how the method works"][1] == comparison_report.HOW["cg"]
