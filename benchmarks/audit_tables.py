"""Tables and bounds from the lines of `audit.py`, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from audit_data import HARD, UNITS

Line = Mapping[str, Any]
Section = tuple[str, list[str], list[list[str]]]

MIXED = ("shuffled", "Gaussian")
BEHIND = 0.005
SMALL, LARGE = 20_000, 1_000_000


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def over_sets(lines: Sequence[Line], of: Callable[[Sequence[Line]], float | None]) -> float | None:
    """Mean over the tables, each of which weighs the same."""
    return mean(of(_of(lines, set=name)) for name in _sets(lines))


def _text(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _sets(lines: Sequence[Line]) -> list[str]:
    order = ("wine", "iris", "breast_cancer", "digits", "penguins", "mixed", *HARD)
    names = {line["set"] for line in lines}
    return [name for name in order if name in names]


def _of(lines: Sequence[Line], **wanted: Any) -> list[Line]:
    return [line for line in lines if all(line[key] == value for key, value in wanted.items())]


def _between(lines: Sequence[Line], low: float, high: float) -> list[Line]:
    return [line for line in lines if low <= line["rate"] <= high]


def areas(lines: Sequence[Line]) -> dict[str, float | None]:
    """Mean AUC of the suspicion, of every signal and of cleanlab."""
    names = list(dict.fromkeys(name for line in lines for name in line["auc"]))
    found = {name: mean(line["auc"].get(name) for line in lines) for name in names}
    for method in ("features", "probabilities"):
        values = [line.get("cleanlab", {}).get(method, {}).get("auc") for line in lines]
        if any(value is not None for value in values):
            found[f"cleanlab, {method}"] = mean(values)
    return found


def _label_areas(lines: Sequence[Line]) -> Section:
    found = {
        (name, rate): areas(_of(lines, set=name, rate=rate))
        for name in _sets(lines)
        for rate in sorted({line["rate"] for line in lines} - {0.0})
    }
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    rows = [
        [name, f"{rate:.0%}", *(_text(one.get(of), 4) for of in names)]
        for (name, rate), one in found.items()
    ]
    return "AUC of finding flipped labels", ["table", "flipped", *names], rows


def _cleanlab(lines: Sequence[Line], method: str, key: str) -> float | None:
    return mean(line.get("cleanlab", {}).get(method, {}).get(key) for line in lines)


def _label_flags(lines: Sequence[Line]) -> Section:
    head = ["table", "flipped", "F1", "precision", "recall", "flagged"]
    head += ["right label proposed", "cleanlab, features: F1", "flagged"]
    head += ["cleanlab, probabilities: F1", "flagged"]
    rows = []
    for name in _sets(lines):
        for rate in sorted({line["rate"] for line in lines}):
            here = _of(lines, set=name, rate=rate)

            def average(key: str, here: Sequence[Line] = here) -> float | None:
                return mean(line[key] for line in here)

            clean = rate == 0
            row = [name, f"{rate:.0%}"]
            row += ["–" if clean else _text(average(key)) for key in ("f1", "precision", "recall")]
            row += [_percent(average("flagged")), _text(average("proposed_right"))]
            for method in ("features", "probabilities"):
                row += [
                    "–" if clean else _text(_cleanlab(here, method, "f1")),
                    _percent(_cleanlab(here, method, "flagged")),
                ]
            rows.append(row)
    return "Flags", head, rows


def errors(lines: Sequence[Line], expected: str, true: str) -> list[float]:
    """Expected minus true shares, where there are both."""
    return [
        line[expected] - line[true]
        for line in lines
        if line[expected] is not None and line[true] is not None
    ]


def _label_expected(lines: Sequence[Line]) -> Section:
    head = ["table", "flipped", "estimated", "expected precision of flags", "true", "off by"]
    head += ["signed", "expected of first k", "true", "off by"]
    rows = []
    for name in _sets(lines):
        for rate in sorted({line["rate"] for line in lines}):
            here = _of(lines, set=name, rate=rate)
            flagged = [line for line in here if line["precision"] is not None]
            off = errors(flagged, "expected", "precision")
            first = errors(here, "first_expected", "first_true")
            row = [name, f"{rate:.0%}", _percent(mean(line["noise"] for line in here))]
            row += [_text(mean(line["expected"] for line in flagged))]
            row += [_text(mean(line["precision"] for line in flagged))]
            row += [_text(mean(map(abs, off))), "–" if not off else f"{mean(off):+.3f}"]
            row += [
                _text(mean(line[f"first_{of}"] for line in here)) for of in ("expected", "true")
            ]
            rows.append([*row, _text(mean(map(abs, first)))])
    return "Expected and true share of wrong rows", head, rows


def _cells(lines: Sequence[Line]) -> list[Section]:
    kinds = [kind for kind in dict.fromkeys(line["kind"] for line in lines) if kind != "clean"]
    figures: dict[str, Callable[[Sequence[Line]], str]] = {
        "AUC": lambda of: _text(mean(line["auc"] for line in of)),
        "column known": lambda of: _text(mean(line["auc_known"] for line in of)),
        "right column": lambda of: _text(mean(line["right_column"] for line in of), 2),
        "precision": lambda of: _text(mean(line["precision"] for line in of), 2),
        "recall": lambda of: _text(mean(line["recall"] for line in of), 2),
    }
    sections: list[Section] = []
    for kind in kinds:
        shares = sorted({line["share"] for line in _of(lines, kind=kind)})
        head = ["table", *(f"{figure}, {share:.0%}" for share in shares for figure in figures)]
        rows = []
        for name in _sets(lines):
            cells = [
                show(_of(lines, set=name, kind=kind, share=share))
                for share in shares
                for show in figures.values()
            ]
            rows.append([name, *cells])
        sections.append((f"Cells: {kind}", head, rows))
    rows = [
        [name, _percent(mean(line["flagged"] for line in _of(lines, set=name, kind="clean")))]
        for name in _sets(lines)
    ]
    return [*sections, ("Cells: rows flagged in the clean table", ["table", "flagged"], rows)]


def _twins(lines: Sequence[Line]) -> Section:
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    head = ["table", *(f"{kind}: {of}" for kind in kinds for of in ("recall", "precision"))]
    rows = []
    for name in _sets(lines):
        of = {kind: _of(lines, set=name, kind=kind) for kind in kinds}
        cells = [
            _text(mean(line[key] for line in of[kind]), 2)
            for kind in kinds
            for key in ("recall", "precision")
        ]
        rows.append([name, *cells])
    return "Copies of rows", head, rows


def _scale(lines: Sequence[Line]) -> Section:
    steps = list(dict.fromkeys(name for line in lines for name in line["steps"]))
    head = ["rows", "threads", "seconds", "of the processor", "peak MiB", "load before", "AUC"]
    rows = [
        [
            f"{line['rows']:,} × {line['columns']}",
            str(line["threads"]),
            *(f"{line[key]:,.0f}" for key in ("seconds", "cpu_seconds", "peak_mb")),
            f"{line['load']:.1f}",
            _text(line["auc"], 4),
            *(f"{line['steps'].get(name, 0):,.0f}" for name in steps),
        ]
        for line in lines
    ]
    return "Seconds and memory", [*head, *(f"{name} s" for name in steps)], rows


def sections(result: Mapping[str, Any]) -> list[Section]:
    """All tables for which there are lines: a title, the head, and the rows."""
    found: list[Section] = []
    if result.get("labels"):
        lines = result["labels"]
        found += [_label_areas(lines), _label_flags(lines), _label_expected(lines)]
    if result.get("cells"):
        found += _cells(result["cells"])
    if result.get("twins"):
        found.append(_twins(result["twins"]))
    if result.get("scale"):
        found.append(_scale(result["scale"]))
    return found


# ---- bounds --------------------------------------------------------------------------------------


def _check(line: str, bound: str, reached: float | None, limit: float, least: bool) -> Any:
    good = reached is not None and (reached >= limit if least else reached <= limit)
    sign = ">=" if least else "<="
    return {"line": line, "bound": f"{bound} {sign} {limit:g}", "reached": reached, "ok": good}


def bounds(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was promised, what was reached, and whether that is enough."""
    found: list[dict[str, Any]] = []
    if result.get("labels"):
        found += _label_bounds(result["labels"])
    if result.get("cells"):
        lines = [line for line in result["cells"] if line["set"] not in HARD]
        for title, kinds in (("units", UNITS), ("shuffled, Gaussian", MIXED)):
            of = [line for line in lines if line["kind"] in kinds]
            if not of:
                continue
            auc = over_sets(of, lambda some: mean(line["auc"] for line in some))
            right = over_sets(of, lambda some: mean(line["right_column"] for line in some))
            found += [
                _check(f"cells: {title}", "AUC", auc, 0.95, True),
                _check(f"cells: {title}", "right column", right, 0.8, True),
            ]
        clean = _worst_flagged(_of(lines, kind="clean"))
        found.append(_check("cells, clean: worst table", "flagged", clean, 0.02, False))
    for rows, seconds, memory in ((SMALL, 180, 2048), (LARGE, 2400, 4096)):
        of = [line for line in result.get("scale", ()) if line["rows"] == rows]
        if of:
            two = next((line["seconds"] for line in of if line["threads"] == 2), None)
            peak = max(line["peak_mb"] for line in of)
            found += [
                _check(f"{rows:,} rows, two threads", "seconds", two, seconds, False),
                _check(f"{rows:,} rows", "MiB", peak, memory, False),
            ]
    return found


def _worst_flagged(lines: Sequence[Line]) -> float | None:
    """The largest of the mean flagged shares of the tables."""
    means = [mean(line["flagged"] for line in _of(lines, set=name)) for name in _sets(lines)]
    return max((value for value in means if value is not None), default=None)


def _label_bounds(lines: Sequence[Line]) -> list[dict[str, Any]]:
    easy = [line for line in lines if line["set"] not in HARD]
    some = _between(easy, 0.05, 0.1)
    own = over_sets(some, lambda of: areas(of).get("suspicion"))
    found = [_check("labels, 5–10 %", "mean AUC", own, 0.99, True)]
    for name in _sets(lines):
        of = areas(_between(_of(lines, set=name), 0.05, 0.1))
        mine = of.pop("suspicion", None)
        best = max((v for v in of.values() if v is not None), default=None)
        behind = None if mine is None or best is None else best - mine
        found.append(_check(f"labels, 5–10 %: {name}", "behind the best", behind, BEHIND, False))
    peers = [
        value
        for method in ("features", "probabilities")
        if (value := over_sets(some, lambda of, m=method: areas(of).get(f"cleanlab, {m}")))
    ]
    if peers and own is not None:
        above = own - max(peers)
        found.append(_check("labels, 5–10 %", "above cleanlab by", above, 0, True))
    flags = over_sets(_between(easy, 0.1, 0.1), lambda of: mean(line["f1"] for line in of))
    found.append(_check("labels, 10 %", "mean F1", flags, 0.92, True))
    clean = _between(easy, 0, 0)
    if clean:
        worst = _worst_flagged(clean)
        found.append(_check("labels, clean: worst table", "flagged", worst, 0.02, False))
    for title, of in (("5–20 %", _between(easy, 0.01, 1)), ("0–20 %", easy)):
        flagged = [line for line in of if line["precision"] is not None]
        off = over_sets(flagged, lambda of: mean(map(abs, errors(of, "expected", "precision"))))
        found.append(_check(f"labels, {title}", "expected precision off by", off, 0.1, False))
    return found


def short(result: Mapping[str, Any]) -> list[str]:
    """Where the suspicion is behind a single signal or cleanlab, in sentences."""
    told: list[str] = []
    lines = result.get("labels", ())
    for name in _sets(lines):
        for rate in sorted({line["rate"] for line in lines} - {0.0}):
            found = areas(_of(lines, set=name, rate=rate))
            own = found.pop("suspicion", None)
            better = {
                other: value
                for other, value in found.items()
                if own is not None and value is not None and value > own + BEHIND
            }
            if better:
                names = ", ".join(f"{other} {value:.3f}" for other, value in better.items())
                told.append(f"- {name}, {rate:.0%} flipped: suspicion {own:.3f}, {names}")
    if not told:
        return ["Nowhere is the suspicion more than 0.005 behind a single signal or cleanlab."]
    return ["More than 0.005 behind a single signal or cleanlab:", "\n".join(told)]
