"""The page of an audit: data never becomes markup; its size; its script, in a browser."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit_example import HOSTILE, example, verified
from audit_html import Page, bodies, shown_rows
from upweight.report import audit_page
from upweight.report.audit_details import Details
from upweight.report.audit_suspects import MOST_LINES, quotas

CHROMIUM = shutil.which("chromium")
SCRIPT = Path(audit_page.__file__).parent / "templates" / "audit.js"


@pytest.fixture(scope="module")
def normal():
    return audit_page.build(verified(example()))


@pytest.fixture(scope="module")
def hostile():
    return audit_page.build(verified(example(hostile=True)))


TAGS = frozenset(
    [
        "html",
        "head",
        "meta",
        "link",
        "title",
        "style",
        "body",
        "a",
        "div",
        "header",
        "p",
        "bdi",
        "h1",
        "h2",
        "nav",
        "ol",
        "li",
        "main",
        "section",
        "dl",
        "dt",
        "dd",
        "svg",
        "g",
        "defs",
        "path",
        "use",
        "text",
        "clippath",
        "rect",
        "image",
        "figure",
        "figcaption",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "details",
        "summary",
        "label",
        "span",
        "select",
        "option",
        "input",
        "button",
        "script",
        "footer",
        "code",
        "wbr",
    ]
)
ATTRIBUTES = frozenset(
    [
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "rel",
        "href",
        "class",
        "id",
        "style",
        "aria-label",
        "aria-hidden",
        "aria-controls",
        "aria-sort",
        "role",
        "tabindex",
        "scope",
        "colspan",
        "title",
        "value",
        "type",
        "autocomplete",
        "spellcheck",
        "placeholder",
        "hidden",
        "data-key",
        "data-down",
        "data-kind",
        "data-given",
        "data-proposed",
        "viewbox",
        "d",
        "x",
        "y",
        "width",
        "height",
        "transform",
        "clip-path",
        "preserveaspectratio",
    ]
)


def test_nothing_from_data_is_markup(hostile):
    page = Page(hostile)
    assert {tag for tag, _ in page.elements} <= TAGS
    assert {name for _, attributes in page.elements for name in attributes} <= ATTRIBUTES
    assert len(page.all("script")) == 1
    assert page.within("script") == SCRIPT.read_text(encoding="utf-8")
    assert not page.all("img")
    for attributes in (attributes for _, attributes in page.elements):
        assert attributes.get("href", "#").startswith(("#", "data:"))
    for link in page.all("a"):
        assert re.fullmatch(r"#[a-z0-9-]+", link["href"])
    for word in HOSTILE[:5]:
        assert word in page.within("main"), word
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for _, a in page.elements if a.get("href", "").startswith("#")}
    assert wanted <= set(ids)


def test_hidden_characters_of_the_data_are_seen(hostile):
    body = hostile[hostile.index("<body>") :]
    assert not set(body) & set("\u202e\u2066\u200b\ufeff\x1b\x07\0")
    assert "⟦U+202E⟧gnp.exe" in body
    assert "⟦tab⟧" in body
    assert "x" * 250 not in body


def test_the_policy_forbids_all_but_the_script(normal):
    page = Page(normal)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    digest = base64.b64encode(hashlib.sha256(page.within("script").encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert [tag for tag, _ in page.elements[:4]] == ["html", "head", "meta", "meta"]
    assert not re.search(r"https?:|javascript:|@import|url\((?!#)", normal)


def test_the_script_is_small_and_makes_no_markup():
    script = SCRIPT.read_text(encoding="utf-8")
    assert len(script.encode()) < 10_000
    assert "</" not in script
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch("):
        assert word not in script


# ---- size ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big():
    return example(100_000, features=26, top=100, findings=1500)


@pytest.mark.slow
def test_a_large_audit_has_a_small_page_with_all_its_details(big):
    html = audit_page.build(big)
    assert len(html.encode()) < 2_000_000
    Page(html)
    lines = bodies(html)
    assert len(lines) == MOST_LINES
    assert {int(r) for r in re.findall(r'<tbody id="row-(\d+)"[^>]*>.*?<details', html)} >= set(
        big.details
    )
    # Every kind is there, also that of which there are few behind the many.
    kinds = set(re.findall(r'data-kind="([a-z-]+)"', html))
    assert kinds == {"label", "features", "conflict", "duplicate", "near-duplicate", "harmful"}
    found = big.findings["kind"].value_counts()
    shown = {kind: sum(f'data-kind="{kind}"' in line for line in lines) for kind in kinds}
    missing = found["label"] - shown["label"]
    assert f"{missing:,} wrong labels" in html
    assert "findings.csv" in html


@pytest.mark.slow
def test_details_that_do_not_fit_are_dropped_from_the_least_suspicious_up(monkeypatch):
    audit = example(2000, top=60, findings=100)
    whole = audit_page.build(audit)
    monkeypatch.setattr(audit_page, "BUDGET", len(whole.encode()) - 600_000)
    html = audit_page.build(audit)
    assert len(html.encode()) <= audit_page.BUDGET
    Page(html)
    with_details = {
        int(body.split('id="row-')[1].split('"')[0]) for body in bodies(html) if "<details" in body
    }
    suspicion = audit.rows["suspicion"]
    kept = [suspicion[row] for row in with_details & set(audit.details)]
    dropped = [suspicion[row] for row in set(audit.details) - with_details]
    assert kept
    assert dropped
    assert min(kept) >= max(dropped)
    count = re.search(r"Details of (\d+) rows are left out", html)
    rest = [body for body in bodies(whole) if "<details" in body]
    assert int(count[1]) == len(rest) - len(with_details)
    # A line that lost its details still has its evidence.
    assert html.count("raises the loss on") == whole.count("raises the loss on")


def test_no_details_are_shown_behind_some_that_do_not_fit(monkeypatch):
    audit = example(200, top=10, findings=10)
    order = audit.suspects(10)["row"].tolist()

    def html(self, detail, evidence):
        size = 2_000_000 if detail.row == order[3] else 10
        return f"<details><summary>{'x' * size}</summary></details>"

    monkeypatch.setattr(Details, "html", html)
    shown = [body for body in bodies(audit_page.build(audit)) if "<details" in body]
    ids = [re.match(r'<tbody id="row-(\d+)"', body)[1] for body in shown]
    assert [int(row) for row in ids] == order[:3]


@pytest.mark.slow
def test_lines_are_dropped_where_text_alone_is_too_much(monkeypatch):
    audit = example(2000, top=0, findings=400)
    found = audit.findings.assign(evidence='"' * 300)
    audit = replace(audit, findings=found)
    monkeypatch.setattr(audit_page, "BUDGET", 700_000)
    html = audit_page.build(audit)
    assert len(html.encode()) <= 700_000
    assert 200 < len(bodies(html)) < 400
    assert "Not shown here: " in html


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 3000), min_size=1, max_size=8))
@settings(max_examples=50)
def test_quotas_use_the_room_and_starve_no_kind(total):
    quota = quotas(total, 1000)
    assert sum(quota.values()) == min(1000, sum(total.values()))
    assert all(quota[kind] == min(count, quota[kind]) for kind, count in total.items())
    short = [quota[kind] for kind in total if quota[kind] < total[kind]]
    assert all(max(quota.values()) - one <= 1 for one in short)


@pytest.mark.slow
def test_many_columns_and_classes_are_cut_and_said_so():
    audit = example(300, features=400, top=3)
    classes = {f"class {i}": 1 for i in range(1000)}
    html = audit_page.build(replace(audit, summary=replace(audit.summary, classes=classes)))
    assert len(html.encode()) < 1_000_000
    assert "The first 300 of 407 are shown" in html
    assert "The first 300 of 1,000 are shown" in html
    assert "more columns not shown" in html


def test_the_same_audit_gives_the_same_bytes(normal):
    audit = verified(example())
    with matplotlib.rc_context({"svg.hashsalt": "other", "font.size": 20}):
        assert audit_page.build(audit) == normal


@pytest.mark.slow
def test_write_replaces_a_page_whole_or_not_at_all(tmp_path, monkeypatch, normal):
    path = tmp_path / "report.html"
    path.write_text("old")
    audit = verified(example())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        audit_page.write(audit, path)
    assert os.listdir(tmp_path) == ["report.html"]
    assert path.read_text() == "old"
    monkeypatch.undo()
    assert audit_page.write(audit, path) == path
    assert path.read_text(encoding="utf-8") == normal


# ---- in a browser ----------------------------------------------------------------------------


def rendered(html, tmp_path, fragment=""):
    """The document after its script ran, as Chromium has it."""
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom",
        "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
        f"{path.as_uri()}{fragment}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@browser
def test_the_script_runs_under_the_policy(normal, tmp_path):
    dom = rendered(normal, tmp_path)
    assert 'data-script="ran"' in dom
    assert "Showing all 48." in dom
    assert 'class="tools" role="search" aria-label="Filter the findings" hidden' in normal
    assert 'class="tools" role="search" aria-label="Filter the findings">' in dom
    assert shown_rows(dom) == shown_rows(normal)  # as the page had them
    assert dom.count('aria-sort="none"') == 7


@browser
def test_lines_are_sorted_and_filtered_by_the_address(normal, tmp_path):
    audit = example()
    yes = list(audit.summary.classes).index("yes")
    dom = rendered(normal, tmp_path, f"#sort=-row&kind=label&q=YÉS%20%20raises&proposed={yes}")
    flagged = audit.rows[audit.rows["label_flag"]]
    wanted = flagged.loc[flagged["proposed"] == "yes", "row"].tolist()
    assert f"Showing {len(wanted)} of 48." in dom
    lines = bodies(dom)
    shown = [line for line in lines if "hidden" not in line[: line.index(">")]]
    rows = [int(re.search(r'<th scope="row">(\d+)<', line)[1]) for line in shown]
    assert rows == sorted(wanted, reverse=True)
    assert len(lines) == 48
    assert 'data-key="row" aria-sort="descending"' in dom


@browser
def test_a_search_keeps_the_lines_that_have_all_its_words(normal, tmp_path):
    column = example().findings.query("kind == 'features'")["column"].iloc[0]
    wanted = [line for line in bodies(normal) if f"<td>{column}</td>" in line]
    dom = rendered(normal, tmp_path, f"#q=odd%20{column.upper()}")
    assert f"Showing {len(wanted)} of 48." in dom
    assert 0 < len(wanted) < 10


@browser
@pytest.mark.slow
def test_lines_without_a_value_are_sorted_last(normal, tmp_path):
    for sort, down in (("suspicion", False), ("-suspicion", True)):
        dom = rendered(normal, tmp_path, f"#sort={sort}")
        texts = re.findall(r'<td class="number bar"[^>]*>(.*?)</td>', dom)
        known = [float(text) for text in texts if text != "–"]
        assert texts[len(known) :] == ["–"] * 9
        assert known == sorted(known, reverse=down)


@browser
def test_an_address_opens_the_details_of_a_row(normal, tmp_path):
    row = example().suspects(1)["row"].iloc[0]
    dom = rendered(normal, tmp_path, f"#row-{row}")
    (line,) = [body for body in bodies(dom) if f'id="row-{row}"' in body]
    assert '<details open="">' in line
    assert dom.count('<details open="">') == dom.count('aria-current="true"') == 1


@browser
@pytest.mark.slow
def test_nothing_is_opened_without_being_asked_for(tmp_path):
    audit = example(100, top=10)
    # A second line of a row has no address of its own.
    again = audit.findings.iloc[[0]].assign(kind="harmful")
    found = pd.concat([audit.findings, again], ignore_index=True)
    dom = rendered(audit_page.build(replace(audit, findings=found)), tmp_path)
    assert 'data-script="ran"' in dom
    assert "aria-current=" not in dom


@browser
@pytest.mark.parametrize("fragment", ["", "#sort=__proto__&kind=constructor&q=%3Cimg&given=x"])
@pytest.mark.slow
def test_hostile_data_stays_text_in_a_browser(hostile, tmp_path, fragment):
    dom = rendered(hostile, tmp_path, fragment)
    assert 'data-script="ran"' in dom
    page = Page(dom.replace("<!DOCTYPE html>", ""))
    assert not page.all("img")
    assert len(page.all("script")) == 1
    assert page.within("head", "title").startswith("What is wrong with “</script>")
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
