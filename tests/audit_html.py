"""What tests read of a page: its elements, its texts, the lines of its table of findings."""

from __future__ import annotations

import re
from html.parser import HTMLParser

__all__ = ["Page", "bodies", "shown_rows", "text_of"]

VOID = frozenset({"meta", "link", "wbr", "br", "img", "input"})


class Page(HTMLParser):
    """Elements with attributes, and texts by the elements they stand in; nothing left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[list[str], str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, "an element was not closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((list(self.open), data))

    def handle_comment(self, data):
        raise AssertionError(f"a comment is left: {data!r:.80}")

    def within(self, *tags):
        return "".join(text for path, text in self.texts if set(tags) <= set(path))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def text_of(html):
    text = re.sub(r"<[^>]*>", " ", re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.DOTALL))
    return re.sub(r"[\s\xa0]+", " ", text)


def bodies(html):
    """The lines of the table of findings."""
    (table,) = re.findall(r'<table id="suspects"[^>]*>(.*?)</figure>', html, re.DOTALL)
    return re.split(r"(?=<tbody (?:id|data-kind)=)", table)[1:]


def shown_rows(html):
    return [int(re.search(r'<th scope="row">(\d+)</th>', body)[1]) for body in bodies(html)]
