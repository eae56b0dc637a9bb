"""The HTML page: nothing from data becomes markup, nothing is loaded, nothing is half-written."""

from __future__ import annotations

import os
import re
from collections import Counter
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure as Canvas

from upweight.report import plots
from upweight.report.page import (
    Fact,
    Facts,
    Figure,
    Paragraph,
    Report,
    Section,
    Table,
    render,
    write,
)

EVIL = "</script><img src=x onerror=alert(1)>"
QUOTE = "\"' onload='alert(1)' x=\""
CDATA = "]]><!-- {{ 7 * 7 }} {% raw %}"
RTL = "\u202eevil never closed"
HOSTILE = [EVIL, QUOTE, CDATA, RTL, "</style></title></svg><script>alert(1)</script>"]


class Page(HTMLParser):
    """Elements, attributes, and texts by the path of elements they stand in."""

    void = frozenset({"meta", "link", "wbr", "br", "img", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, "an element was not closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(("/".join(self.open), data))

    def handle_comment(self, data):
        pytest.fail(f"comment: {data}")

    def within(self, *tags):
        """All text inside these nested elements, joined."""
        return "".join(text for path, text in self.texts if set(tags) <= set(path.split("/")))

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def figure(text="loss"):
    return plots.draw(plots.plot_losses, pd.DataFrame({text: [2.0, 1.0], "other": [3.0, 1.0]}))


def user_figure(text):
    """A figure that upweight did not draw: markers, clipping, a link, an id, a picture."""
    canvas = Canvas(figsize=(10, 4))
    ax = canvas.add_subplot()
    (line,) = ax.plot([1, 2], marker="o", label=text.replace("$", ""))
    line.set_gid(text)
    ax.imshow([[0, 1]], aspect="auto")
    ax.text(0, 1, "link", url="javascript:alert(1)")
    ax.set_title(text)
    ax.legend()
    return canvas


def everywhere(text):
    """A report that shows `text` in every place there is."""
    table = Table(
        pd.DataFrame({text: [text, "b"], "n": [1.5, 2.5]}),
        caption=text,
        highlight_rows=[0],
        highlight_label=text,
        highlight_column=text,
    )
    blocks = [
        Paragraph(text, "note"),
        Facts([Fact(text, text, text)]),
        Figure(figure(text), text, text),
        Figure(user_figure(text), text),
        table,
    ]
    return Report(text, text, [Section(text, blocks, text), Section(text, [])], text, text)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.slow
def test_text_from_data_is_never_markup(text):
    page, harmless = Page(render(everywhere(text))), Page(render(everywhere("harmless")))
    # The same elements with the same attributes as for a harmless text, in the same order.
    # (Long names have places to break, and a title.)
    for (tag, found), (same, expected) in zip(
        [element for element in page.elements if element[0] != "wbr"],
        [element for element in harmless.elements if element[0] != "wbr"],
        strict=True,
    ):
        assert (tag, set(found) - {"title"}) == (same, set(expected) - {"title"})
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "iframe",
        "object",
        "embed",
        "img",
        "form",
        "base",
        "foreignobject",
    }
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    # And it can be read, whole, in each of its places.
    for place in [
        ("title",), ("h1",), ("nav",), ("h2",), ("header", "p"), ("main", "p"), ("dt",), ("dd",),
        ("figcaption",), ("thead",), ("tbody",), ("footer",), ("svg", "text"),
    ]:  # fmt: skip
        shown = page.within(*place)
        # Figures of ours drop marks that turn the direction of text, and shorten.
        assert text in shown, place
    assert text in page.attributes("aria-label")


def test_every_text_is_isolated_from_the_direction_of_its_neighbours():
    html = render(everywhere(RTL))
    page = Page(html)
    places = [path for path, text in page.texts if "evil never" in text]
    assert len(places) > 12
    free = [path for path in places if not path.endswith("bdi")]
    assert set(free) - {"html/head/title"} == {path for path in free if path.endswith("/text")}
    assert ".plot text { font-variant-numeric: tabular-nums; unicode-bidi: isolate; }" in html


def test_the_page_forbids_and_needs_no_network():
    html = render(everywhere("x"))
    page = Page(html)
    names = [tag for tag, _ in page.elements]
    (policy,) = [
        attributes["content"]
        for _, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["style-src"] == "'unsafe-inline'"
    assert rules["img-src"] == "data:"
    assert "script-src" not in rules
    # A policy holds only for what comes after it.
    before = names[: names.index("meta") + 2]
    assert before == ["html", "head", "meta", "meta"]

    assert not re.search(r"https?:|ftp:|javascript:|@import|//[a-z]", html)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", html))
    for attribute in ("src", "href", "xlink:href"):
        for value in page.attributes(attribute):
            assert value.startswith(("#", "data:")), value
    assert any(value.startswith("data:image/png;base64,") for value in page.attributes("href"))


def test_ids_are_unique_across_figures_and_all_references_lead_somewhere():
    same = figure()
    blocks = [
        Figure(same, "a"),
        Figure(same, "b"),
        Figure(figure(), "c"),
        Figure(user_figure("d"), "d"),
    ]
    sections = [Section("Summary", blocks), Section("Rows", blocks[:1]), Section("rows!", []),
                Section("行", []), Section("x", [], "rows")]  # fmt: skip
    html = render(Report("t", [Figure(same, "e")], sections))
    page = Page(html)
    ids = page.attributes("id")
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    wanted = [value[1:] for value in page.attributes("href") if value.startswith("#")]
    wanted += re.findall(r"url\(#([^)]+)\)", html)
    assert len(wanted) > 20
    assert set(wanted) <= set(ids)
    figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(figures) == 6
    assert set(re.findall(r' id="([^"]+)', "".join(figures))) <= set(wanted)
    assert {"summary-2", "rows", "rows-2", "section-4", "rows-3"} <= set(ids)


def test_the_same_report_gives_the_same_bytes_also_when_it_is_built_again():
    report = everywhere(EVIL)
    first = render(report)
    assert render(report) == first
    with matplotlib.rc_context({"svg.hashsalt": "other", "text.color": "red", "font.size": 20}):
        again = Report("t", "s", [Section("a", [Figure(figure(), "f")])])
        expected = render(again)
    assert render(Report("t", "s", [Section("a", [Figure(figure(), "f")])])) == expected
    assert "20px" not in expected


def test_figures_follow_the_theme_and_the_fonts_of_the_page():
    canvas = plots.draw(plots.plot_score_distribution, [-1.0, 1.0, 2.0], [0])
    html = render(Report("t", "", [Section("s", [Figure(canvas, "caption", "what is seen")])]))
    svg = re.search("<svg.*</svg>", html, re.DOTALL).group()
    assert not re.search("#[0-9a-f]{6}", svg)
    assert {"var(--ink)", "var(--blue)", "var(--red)", "var(--line)"} <= set(
        re.findall(r"var\(.*?\)", svg)
    )
    assert "font-family" not in svg
    assert "<style" not in svg
    assert ">influence on the test rows: harmful ← 0 → helpful</text>" in svg
    assert 'role="img"' in svg
    assert 'aria-label="what is seen"' in svg
    assert 'viewBox="0 0 360 244.8"' in svg
    assert not re.search(r'<svg[^>]* (width|height)="', svg)
    # Each variable has a light and a dark value, also those of other plots.
    four = plots.draw(plots.plot_losses, pd.DataFrame(np.eye(4), columns=list("abcd")))
    html = render(Report("t", "", [Section("s", [Figure(four, "all series")])]))
    assert {"var(--orange)", "var(--teal)", "var(--purple)"} <= set(re.findall(r"var\(.*?\)", html))
    for name in set(re.findall(r"var\((--[a-z]+)\)", html)) - {"--w", "--n"}:
        assert html.count(f"  {name}: ") == 2, name


def test_colours_of_users_that_are_none_of_ours_stay():
    canvas = Canvas()
    canvas.add_subplot().plot([1, 2], color="#123456")
    html = render(Report("t", "", [Section("s", [Figure(canvas, "c")])]))
    assert "stroke: #123456" in html


def test_long_cells_are_cut_and_can_be_read_in_full():
    long = "word " * 2000 + "end"
    frame = pd.DataFrame({"a": [long, "x" * 80], "b" * 200: [1, 2]})
    page = Page(render(Report("t", "", [Section("s", [Table(frame)])])))
    (cut,) = [text for path, text in page.texts if path.endswith("summary/bdi")]
    assert cut == "word " * 15 + "word…"
    assert len(cut) == 80
    assert page.attributes("title") == ["b" * 200, long]
    assert page.within("details").endswith(long)
    assert "x" * 80 in page.within("tbody")
    assert page.within("thead").strip().endswith("b" * 79 + "…")


def test_a_table_can_show_long_cells_whole():
    long = "<b>word " * 30
    page = Page(
        render(Report("t", "", [Section("s", [Table(pd.DataFrame({"a": [long]}), whole=True)])]))
    )
    assert [text for path, text in page.texts if path.endswith("th/bdi")] == ["a", long]
    assert "details" not in {tag for tag, _ in page.elements}


def row_texts(page, element="td"):
    return [text for path, text in page.texts if f"/{element}/" in path + "/" and text.strip()]


@pytest.mark.parametrize(
    ("values", "shown", "is_number"),
    [
        ([1.5, 10.25, -3.0], ["1.50", "10.25", "-3.00"], True),
        ([1.0, 2.0, np.nan], ["1", "2", "–"], True),
        ([1234.56, 0.5, 0.0], ["1235", "0", "0"], True),
        ([0.123456, 0.1, 0.2], ["0.1235", "0.1000", "0.2000"], True),
        ([1e-7, 0.0, np.inf], ["1e-07", "0", "inf"], True),
        ([10**20, 1, 2], ["1e+20", "1", "2"], True),
        ([True, False, None], ["yes", "no", "–"], False),
        (["a", None, "3"], ["a", "–", "3"], False),
        ([[1, 2], "a", 1], ["[1, 2]", "a", "1"], False),
    ],
)  # fmt: skip
def test_cells_by_type(values, shown, is_number):
    column = pd.Series(values, dtype=object if not is_number else None)
    frame = pd.DataFrame({"row": list("abc"), "value": column})
    page = Page(render(Report("t", "", [Section("s", [Table(frame)])])))
    assert row_texts(page) == shown
    classes = [attributes["class"].split() for tag, attributes in page.elements if tag == "td"]
    assert all(("number" in names) is is_number for names in classes)
    assert sum("missing" in names for names in classes) == shown.count("–")


def test_formats_and_highlights():
    frame = pd.DataFrame({"row": [7, 8], "score": [-1.0, 2.0], "given": ["a", "b"]})
    table = Table(
        frame,
        "caption",
        {"score": "{:+.2f}", "given": str.upper},
        highlight_rows=np.array([1]),
        highlight_label="flipped",
        highlight_column="score",
    )
    page = Page(render(Report("t", "", [Section("s", [table])])))
    assert row_texts(page) == ["-1.00", "A", "+2.00", "B"]
    rows = [attributes.get("class", "") for tag, attributes in page.elements if tag == "tr"]
    assert rows == ["", "", "marked"]
    # For those who do not see the colour.
    assert [text for path, text in page.texts if path.endswith("th/span/bdi")] == ["flipped"]
    keys = [tag for tag, attributes in page.elements if "key-column" in attributes.get("class", "")]
    assert keys == ["th", "td", "td"]
    (region,) = [
        attributes for _, attributes in page.elements if attributes.get("role") == "region"
    ]
    assert (region["tabindex"], region["aria-label"]) == ("0", "caption")


def test_odd_frames_are_shown_as_they_are():
    frame = pd.DataFrame([[1, 2, 3]], columns=["a", "a", ("b", 1)])
    page = Page(render(Report("t", "", [Section("s", [Table(frame), Table(pd.DataFrame())])])))
    assert row_texts(page) == ["2", "3", "no rows"]
    assert page.within("thead").split() == ["a", "a", "('b',", "1)"]


def test_figures_that_follow_each_other_share_a_row():
    one, two, three = (Figure(figure(), name) for name in "abc")
    html = render(Report("t", "", [Section("s", [one, two, Paragraph("between"), three])]))
    rows = html.split('<div class="figures"')[1:]
    assert [row.count("<svg") for row in rows] == [2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": {"scores": "{:.2f}"}}, r"\['score'\], got \['scores'\]"),
        ({"highlight_column": "row"}, r"got \['row'\]"),
        ({"highlight_rows": [0, 2]}, r"between 0 and 1, got \[0, 2\]"),
        ({"highlight_rows": [-1]}, "between 0 and 1"),
        ({"formats": {"score": "{:d}"}}, r"'{:d}' cannot show 1\.5: Unknown format code"),
    ],
)
def test_a_table_that_asks_for_what_it_has_not_is_refused(options, message):
    table = Table(pd.DataFrame({"score": [1.5, 2]}), **options)
    with pytest.raises(ValueError, match=message):
        render(Report("t", "", [Section("s", [table])]))


BROKEN = Report("t", "", [Section("s", [Table(pd.DataFrame({"a": [1]}), formats={"b": "{}"})])])


def test_a_report_that_cannot_be_rendered_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="must name columns"):
        write(BROKEN, path)
    assert os.listdir(tmp_path) == ["report.html"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    def fail(*arguments):
        raise OSError("disk full")

    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write(Report("t", "", []), path)
    assert os.listdir(tmp_path) == ["report.html"]
    assert path.read_text() == "old"


@pytest.mark.slow
def test_write_never_shows_part_of_a_page(tmp_path, monkeypatch):
    path, seen = tmp_path / "report.html", []
    replace = os.replace

    def spy(source, target):
        assert not path.exists()
        seen.append((os.path.dirname(source), os.path.getsize(source)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    report = everywhere("x")
    assert write(report, str(path)) == path
    # The whole page lay in the same folder: a rename across file systems would be a copy.
    assert seen == [(str(tmp_path), len(render(report).encode()))]
    assert path.read_text(encoding="utf-8") == render(report)
    assert os.listdir(tmp_path) == ["report.html"]


def test_what_utf8_xml_and_html_cannot_hold_is_replaced(tmp_path):
    text = "a\x00b\ud800c\x1bd\ufffe"
    canvas = user_figure("t")
    canvas.axes[0].set_xlabel("a\x00b\x1bc")
    frame = pd.DataFrame({"a": pd.Series([text], dtype=object)})
    report = Report(text, text, [Section(text, [Table(frame, text), Figure(canvas, text, text)])])
    html = write(report, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\0" not in html
    assert "a\ufffdb?c" in html
    assert ">a\ufffdb\ufffdc</text>" in html
