"""A matplotlib figure as inline SVG that takes its colours and its font from the page."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.figure

from upweight.report import plots
from upweight.report.style import BLUE, GREY, ORANGE, PURPLE, RED, TEAL

__all__ = ["to_svg"]

_XLINK = "{http://www.w3.org/1999/xlink}href"
_COLOURS = {
    BLUE: "var(--blue)",
    RED: "var(--red)",
    ORANGE: "var(--orange)",
    TEAL: "var(--teal)",
    PURPLE: "var(--purple)",
    GREY: "var(--line)",
    "#000000": "var(--ink)",
    "#ffffff": "var(--surface)",
}
# XML knows no control characters but these three, and matplotlib writes what it is given.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_svg(figure: matplotlib.figure.Figure, prefix: str, alt: str) -> ElementTree.Element:
    """A figure as an `<svg>` element for the middle of a page."""
    buffer = io.StringIO()
    settings: dict[Any, str] = {"svg.fonttype": "none", "svg.hashsalt": "upweight"}
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with plots.report_style(), matplotlib.rc_context(settings), warnings.catch_warnings():
        # The browser has other fonts than matplotlib.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=nothing,
            dpi=200,  # of what is rasterized; the rest has no resolution
            bbox_inches="tight" if figure.get_layout_engine() is None else None,
        )
    root = ElementTree.fromstring(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", buffer.getvalue()))
    _strip(root)
    _rename_ids(root, prefix)
    for element in root.iter():
        if "style" in element.attrib:
            element.set("style", _adapted(element.attrib["style"]))
    for name in ("width", "height", "version"):
        del root.attrib[name]
    root.set("role", "img")
    root.set("aria-label", _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", alt))
    return root


def _strip(root: ElementTree.Element) -> None:
    """Drop namespaces, indentation, metadata, all links, and styles, which would hold page-wide."""
    for parent in root.iter():
        for child in list(parent):
            if child.tag.rpartition("}")[2] in {"metadata", "style", "script"}:
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if element.tag == "a":
            element.tag = "g"
        target = element.attrib.pop(_XLINK, "")
        if target.startswith(("#", "data:image/png;base64,")):
            element.set("href", target)
        for name in [name for name in element.attrib if name.startswith("{")]:
            del element.attrib[name]
        if not (element.tail or "").strip():
            element.tail = None  # indentation
        if not (element.text or "").strip():
            element.text = None


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
    """Keep the ids that something points to, under names that no other figure uses."""
    pointer = re.compile(r"(?<=url\(#)[^)]+(?=\))")
    used = {e.attrib["href"][1:] for e in root.iter() if e.get("href", "").startswith("#")}
    used.update(*(pointer.findall(value) for e in root.iter() for value in e.attrib.values()))
    names: dict[str, str] = {}
    for element in root.iter():
        old = element.attrib.pop("id", None)
        if old in used:
            element.set("id", names.setdefault(old, f"{prefix}{len(names)}"))
    for element in root.iter():
        if element.get("href", "").startswith("#"):
            element.set("href", "#" + names.get(element.attrib["href"][1:], ""))
        for name, value in element.attrib.items():
            element.set(name, pointer.sub(lambda m: names.get(m.group(), ""), value))


def _adapted(style: str) -> str:
    kept: list[str] = []
    for declaration in filter(None, style.split("; ")):
        name, _, value = declaration.rstrip("; ").partition(": ")
        if name != "font-family":  # the font of the page
            kept.append(f"{name}: {_COLOURS.get(value, value)}")
    return "; ".join(kept)
