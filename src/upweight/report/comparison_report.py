"""The part of a page that shows a `Comparison`: what stands out, tables, a plot for each method."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray

from upweight.comparison import Comparison
from upweight.report import plots
from upweight.report.inputs import row_mask, short_label
from upweight.report.page import Block, Figure, Format, Paragraph, Table

__all__ = ["blocks", "findings", "terminal_table"]

CLOSE = 1.0  # per cent of error below which a method counts as giving the scores of the reference
OFF = 25.0  # per cent of error above which sizes count as wrong
HOLD = 0.8  # Spearman's ρ above which the order counts as kept
LOWEST = 10  # rows to look at where the marked ones give no number

# By the word that a method's name begins with.
HOW = {
    "direct": "factorises the whole matrix C + λI",
    "cg": "iterates to a tolerance, with products C·v only",
    "lissa": "repeats a simple update to a tolerance, with products C·v only",
    "arnoldi": "keeps some leading directions of C, found by Lanczos' method",
    "nystroem": "keeps some leading directions of C, found by a random sketch",
    "jacobi": "keeps the diagonal of C",
    "kfac": "takes a block of C for each layer, as a Kronecker product",
    "ekfac": "takes a block of C for each layer, as a corrected Kronecker product",
}


def blocks(
    found: Comparison,
    marked: ArrayLike | None = None,
    *,
    rows: str = "rows",
    marked_label: str = "marked",
) -> list[Block]:
    """Everything there is to see in a comparison, for a section of a report.

    Parameters
    ----------
    found
        Of `compare`.
    marked
        Training rows to circle: (n,) booleans, or positions. As many of the lowest rows are
        compared; ten if only one is marked, none, or more than half.
    rows
        What a training row is called, in the plural: ``"bottles"``.
    marked_label
        What the marked rows are.

    Returns
    -------
    list of Block
        What is compared, what stands out, how the methods agree, a plot for each that gave an
        answer, and how well each solved its equations.
    """
    mask = row_mask(marked, len(found.mean))
    told = findings(found, mask, rows=rows)
    return [
        Paragraph(_what(found, rows)),
        *([Paragraph(told, "note")] if told else []),
        Paragraph(_columns(found, mask, rows)),
        _agreement(found, mask),
        *_notes(found),
        *_figures(found, mask, rows, marked_label),
        Paragraph(
            "The residual is ‖(C + λI)x − g‖ / ‖g‖ for the solution x that a method gives for a "
            "test gradient g, with the exact C: 0 is exact, and 1 is no better than x = 0. It is "
            "the largest over the test rows, while the scores above are of their mean, on which "
            "a method may do better than on each. Steps and converged are those of an iteration. "
            "Products counts the derivatives of all training rows that the method took; Kronecker "
            "factors need none, only a pass or two over the rows. Seconds are those of fit and "
            "scores on this machine: on a small network exact scores are often among the "
            "quickest. Coverage is the share of the parameters that the method has a part of C for."
        ),
        _solves(found),
    ]


def findings(found: Comparison, marked: ArrayLike | None = None, *, rows: str = "rows") -> str:
    """What stands out, in sentences; each is said only where the numbers say so.

    Parameters
    ----------
    found, marked, rows
        As for `blocks`.
    """
    lines = {str(line["method"]): line for line in found.table.to_dict("records")}
    error = {name: float(lines[name]["error_percent"]) for name in _answered(found)}
    by_error = sorted(error, key=lambda name: error[name])
    close = [name for name in by_error if error[name] < CLOSE]
    middle = [name for name in by_error if CLOSE <= error[name] <= OFF]
    off = [name for name in by_error if error[name] > OFF]
    kept = [name for name in off if lines[name]["spearman"] >= HOLD]
    lost = [name for name in off if name not in kept]
    told: list[str] = []
    if close:
        verb = "gives" if len(close) == 1 else "give"
        told.append(
            f"{_listed(close)} {verb} the scores of {found.reference} to better than {CLOSE:g} %."
        )
    elif error:
        told.append(f"No method is within {CLOSE:g} % of {found.reference}.")
    if middle:
        first, *others = middle
        sizes = [f"{first} is off by {_with_unit(error[first])}"]
        sizes += [f"{name} by {_with_unit(error[name])}" for name in others]
        told.append(f"On average over the {rows}, {_listed(sizes)}.")
    for name in kept:
        told.append(
            f"{name} gets sizes wrong, by {_with_unit(error[name])} on average, but mostly keeps "
            f"the order of the {rows}: {_spearman(lines[name])}{_among_top(lines[name], found)}."
        )
    if lost:
        sizes = [
            f"{name} ({_with_unit(error[name])} off, {_spearman(lines[name])})" for name in lost
        ]
        told.append(f"Neither sizes nor order are right with {_listed(sizes)}.")
    return " ".join([*told, *_told_of_lowest(found, marked, rows), *_told_of_failures(found)])


def terminal_table(found: Comparison) -> str:
    """The methods in short, for a terminal.

    Parameters
    ----------
    found
        Of `compare`.
    """
    width = max(len("method"), *(len(_name(found, name)) for name in found.table["method"]))
    head = f"{'method':<{width}}{'error %':>10}{'Pearson':>10}{'Spearman':>10}{'seconds':>10}"
    lines = [head]
    for line in found.table.to_dict("records"):
        label = f"{_name(found, line['method']):<{width}}"
        if line["method"] not in found.mean.columns:
            lines.append(f"{label}  no answer (the report says why)")
            continue
        lines.append(
            f"{label}{_percent(line['error_percent']):>10}{line['pearson']:>10.4f}"
            f"{line['spearman']:>10.4f}{line['seconds']:>10.2f}"
        )
    return "\n".join(lines)


# ---- texts --------------------------------------------------------------------------------------


def _what(found: Comparison, rows: str) -> str:
    count = len(found.table) - 1
    how = HOW.get(_kind(found, found.reference))
    which = f", which {how}" if how else ""
    return (
        "Exact scores need the whole curvature matrix C, with a row for each parameter, which a "
        "large network has no room for. Other methods get by with products C·v, with some "
        f"directions of C, or with a block for each layer. Compared here, on the same {rows} and "
        f"with the same C and λ: {count} of them. The reference is {found.reference}{which}. What "
        "is compared is the mean score over the test rows, one number for each of the "
        f"{len(found.mean):,} {rows}. How well a method does here says what it can do, not what it "
        "will do on another network."
    )


def _columns(found: Comparison, mask: NDArray[np.bool_], rows: str) -> str:
    k, reference = _lowest_count(mask), found.reference
    return (
        f"How to read the table. Error: how far a score is from that of {reference}, in per cent "
        f"of it, on average over the {rows}; the smallest scores count as much as the largest. "
        "Relative norm: the length of the vector of differences, divided by the length of the "
        "vector of scores; here large scores count more, and 0 is exact. Pearson compares sizes, "
        f"whatever their common factor, and Spearman only the order of the {rows}; 1 is full "
        f"agreement. “Top {found.top}” are the same two for the {found.top} {rows} that "
        f"{reference} scores strongest, for good or bad. “Same {k} lowest” counts how many of the "
        f"{k} lowest {rows} of {reference} are among the {k} lowest of the method."
    )


def _told_of_lowest(found: Comparison, marked: ArrayLike | None, rows: str) -> list[str]:
    k = _lowest_count(row_mask(marked, len(found.mean)))
    shared = _shared(found, k)
    same = [name for name, count in shared.items() if count == k]
    fewer = [name for name in shared if name not in same]
    told: list[str] = []
    if same:
        who = f"All {len(same)}" if not fewer and len(same) > 2 else _listed(same)
        verb = "finds" if len(same) == 1 else "find"
        told.append(f"{who} {verb} the same {k} lowest {rows} as {found.reference}.")
    if fewer:
        first, *others = fewer
        counts = [f"{first} finds {shared[first]}"]
        counts += [f"{name} {shared[name]}" for name in others]
        told.append(f"Of the {k} lowest {rows} of {found.reference}, {_listed(counts)}.")
    return told


def _told_of_failures(found: Comparison) -> list[str]:
    failed = [str(name) for name in found.table["method"] if name not in found.mean.columns]
    broken = [name for name in found.methods if name not in _answered(found)]
    told: list[str] = []
    if failed:
        told.append(f"{_listed(failed)} gave no answer; the reasons stand below the table.")
    if broken:
        told.append(f"{_listed(broken)} gave scores that are not finite.")
    return told


def _notes(found: Comparison) -> list[Paragraph]:
    """What methods noted, failures among it; methods that say the same share a paragraph."""
    said: dict[str, list[str]] = {}
    for line in found.table.to_dict("records"):
        if line["note"]:
            said.setdefault(str(line["note"]), []).append(str(line["method"]))
    return [Paragraph(f"{_listed(names)}: {note}.", "warning") for note, names in said.items()]


def _spearman(line: dict[Any, Any]) -> str:
    return f"Spearman {line['spearman']:.2f}"


def _among_top(line: dict[Any, Any], found: Comparison) -> str:
    value = line["spearman_top"]
    return "" if pd.isna(value) else f" ({value:.2f} for the {found.top} strongest)"


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _percent(value: float) -> str:
    """As many digits as are worth reading."""
    if pd.isna(value):
        return "–"
    if value == 0:
        return "0"
    if value < 0.01:
        return "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _with_unit(value: float) -> str:
    return f"{_percent(value)}\N{NO-BREAK SPACE}%"


def _small(value: float) -> str:
    return f"{value:.1e}" if value else "0"


# ---- tables and figures -------------------------------------------------------------------------


def _agreement(found: Comparison, mask: NDArray[np.bool_]) -> Table:
    k, top = _lowest_count(mask), found.top
    table = found.table
    lowest = f"same {k} lowest"
    frame = pd.DataFrame({"method": [_name(found, name) for name in table["method"]]})
    columns: dict[str, tuple[str, Format]] = {
        "error_percent": ("error %", _percent),
        "relative_norm": ("relative norm", _small),
        "pearson": ("Pearson", "{:.4f}"),
        "spearman": ("Spearman", "{:.4f}"),
        "pearson_top": (f"Pearson top {top}", "{:.4f}"),
        "spearman_top": (f"Spearman top {top}", "{:.4f}"),
    }
    formats: dict[Hashable, Format] = {lowest: "{:.0f}"}
    for column, (name, shown) in columns.items():
        frame[name] = table[column].to_numpy()
        formats[name] = shown
    shared = _shared(found, k)
    frame[lowest] = [shared.get(str(name), np.nan) for name in table["method"]]
    frame.loc[table["method"] == found.reference, lowest] = k
    return Table(
        frame,
        f"Mean scores of each method against those of {found.reference}.",
        formats=formats,
        highlight_column="error %",
    )


def _solves(found: Comparison) -> Table:
    lines: list[dict[str, Any]] = []
    for line in found.table.to_dict("records"):
        name = str(line["method"])
        certificate = found.certificates.get(name)
        told: dict[str, Any] = {
            "method": _name(found, name),
            "how the method works": HOW.get(_kind(found, name)),
            "residual": line["residual"],
            "steps": line["steps"],
            "converged": None,
            "products": line["products"],
            "seconds": line["seconds"],
            "coverage %": np.nan,
        }
        if certificate is not None:
            told["converged"] = certificate.converged
            told["coverage %"] = 100 * certificate.coverage
        lines.append(told)
    frame = pd.DataFrame(lines)
    formats: dict[Hashable, Format] = {
        "residual": _small,
        "seconds": "{:.2f}",
        "steps": "{:,.0f}",
        "products": "{:,.0f}",
        "coverage %": "{:.1f}",
    }
    return Table(frame, "How well each method solved, and what it took.", formats=formats)


def _figures(
    found: Comparison, mask: NDArray[np.bool_], rows: str, marked_label: str
) -> list[Figure]:
    lines = {str(line["method"]): line for line in found.table.to_dict("records")}
    circled = f" Red circles: {marked_label}." if mask.any() else ""
    figures: list[Figure] = []
    for name in _answered(found):
        error = _with_unit(lines[name]["error_percent"])
        figures.append(
            Figure(
                plots.draw(
                    _plot,
                    found.mean[found.reference].to_numpy(),
                    found.mean[name].to_numpy(),
                    mask if mask.any() else None,
                    name=name,
                    reference=found.reference,
                    width=3.6,
                    height=3.7,
                ),
                f"{name}: mean error {error}. On the dashed line it agrees with "
                f"{found.reference}.{circled}",
                f"Scatter plot of the scores of the {rows} by {name} against those by "
                f"{found.reference}; mean error {error}, Pearson {lines[name]['pearson']:.3f}, "
                f"Spearman {lines[name]['spearman']:.3f}.{circled}",
            )
        )
    return figures


def _plot(
    exact: ArrayLike,
    scores: ArrayLike,
    marked: ArrayLike | None,
    *,
    name: str,
    reference: str,
    ax: Axes,
) -> Axes:
    """A small comparison plot, with the method's name on a line of its own beside the axis."""
    plots.plot_method_comparison(exact, scores, marked, ax=ax, name=name)
    ax.set_xlabel(f"{short_label(reference, limit=16)}: {plots.DIRECTION}")
    label = ax.set_ylabel(plots.DIRECTION)
    # Not one text of two lines, which a browser's narrower font would shift against each other.
    ax.annotate(
        short_label(name, limit=32),
        (0, 0.5),
        (-3, 0),
        xycoords=label,
        textcoords="offset points",
        rotation=90,
        rotation_mode="anchor",
        ha="center",
        va="bottom",
        annotation_clip=False,
    )
    return ax


# ---- what the tables are made from --------------------------------------------------------------


def _answered(found: Comparison) -> list[str]:
    """Methods with a finite score for every row, which can be drawn and ranked."""
    return [name for name in found.methods if np.isfinite(found.mean[name].to_numpy()).all()]


def _shared(found: Comparison, k: int) -> dict[str, int]:
    """By method: how many of the k lowest rows of the reference are among its k lowest."""
    wanted = _lowest(found.mean[found.reference].to_numpy(), k)
    return {
        name: len(np.intersect1d(wanted, _lowest(found.mean[name].to_numpy(), k)))
        for name in _answered(found)
    }


def _lowest(scores: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    return np.argsort(scores, kind="stable")[:k]


def _lowest_count(mask: NDArray[np.bool_]) -> int:
    marked = int(mask.sum())
    return marked if 2 <= marked <= len(mask) // 2 else min(LOWEST, len(mask))


def _kind(found: Comparison, name: str) -> str:
    """The word that a method's own name begins with, whatever label it has."""
    certificate = found.certificates.get(name)
    return certificate.method if certificate else re.split(r"[(+]", name, maxsplit=1)[0]


def _name(found: Comparison, name: str) -> str:
    return f"{name} (reference)" if name == found.reference else name
