"""Influence and data values of the rows of an audit, side by side."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from upweight.auditing.audit import Audit
from upweight.report.audit_signals import flags_of
from upweight.report.audit_text import cell_text, counted, cut_middle, name_text
from upweight.report.audit_values_plot import MANY, plot_influence_and_values, spearman
from upweight.report.page import Block, Figure, Format, Paragraph, Table
from upweight.report.plots import draw

__all__ = ["MEASURES", "Measure", "Values", "values_blocks", "values_figure"]

Floats = NDArray[np.float64]

ASKED = 20  # most suspicious rows that are looked for where none is flagged
MOST_APART = 5  # rows of each kind of disagreement
HIGH = 0.95  # quantile of the self-influence from which the networks learnt a row by heart


@dataclass(frozen=True)
class Measure:
    """A number of each row: its column in `Audit.rows`, and what it is.

    Attributes
    ----------
    key, name
        The column, and its name for people.
    sign
        1 where low is suspicious, −1 where high is.
    step
        Of the audit, in which it was computed.
    """

    key: str
    name: str
    sign: int
    step: str


OUT_OF_BAG = "out of bag"  # in regression it is an error, and no Data-OOB value
MEASURES = (
    Measure("influence", "influence", 1, "influence"),
    Measure("self_influence", "self-influence", -1, "influence"),
    Measure("knn", "KNN-Shapley", 1, "neighbours"),
    Measure("oob", "Data-OOB", 1, "forest"),
)


class Values:
    """What influence and data values say of the judged rows.

    Parameters
    ----------
    audit
        Rows without a finite number of each measure that the audit has are left out.

    Attributes
    ----------
    measures
        Those that the audit has.
    rows
        (n,) positions in the table.
    flags
        (n,) rows with a label flag.
    """

    def __init__(self, audit: Audit) -> None:
        frame = audit.rows
        columns = {one.key: _numbers(frame, one.key) for one in MEASURES}
        columns = {key: values for key, values in columns.items() if np.isfinite(values).any()}
        self.measures = [one for one in MEASURES if one.key in columns]
        if audit.summary.task == "regression":
            self.measures = [
                replace(one, name=OUT_OF_BAG) if one.key == "oob" else one for one in self.measures
            ]
        there = np.zeros(len(frame), dtype=np.bool_)
        if columns:
            there = np.isfinite(np.stack(list(columns.values()))).all(axis=0)
        self.rows: NDArray[np.intp] = np.flatnonzero(there)
        self.flags: NDArray[np.bool_] = flags_of(frame, "label_flag")[there]
        self._columns = {key: values[there] for key, values in columns.items()}
        self._suspicion = _numbers(frame, "suspicion")[there]

    def __getitem__(self, key: str) -> Floats:
        """(n,) a measure."""
        return self._columns[key]

    def __contains__(self, key: object) -> bool:
        """Whether the audit has this measure."""
        return key in self._columns

    @cached_property
    def asked(self) -> NDArray[np.bool_]:
        """(n,) the rows that a measure should find: those with a flag, or the most suspicious."""
        if self.flags.any():
            return self.flags
        mask = np.zeros(len(self.rows), dtype=np.bool_)
        mask[np.argsort(-self._suspicion, kind="stable")[:ASKED]] = True
        return mask

    def correlations(self) -> Floats:
        """(m, m) Spearman's r between the measures, each turned so that low is suspicious.

        Not a number where a measure is the same for all rows, or where there are too few rows.
        """
        return spearman([one.sign * self[one.key] for one in self.measures])

    def found(self, measure: Measure) -> float:
        """How many of the k rows asked for are among the k lowest by a measure; ties by share."""
        values, k = measure.sign * self[measure.key], int(self.asked.sum())
        if not k:
            return 0.0
        last = np.partition(values, k - 1)[k - 1]
        below, tied = values < last, values == last
        part = (k - below.sum()) / tied.sum()
        return float(self.asked[below].sum() + part * self.asked[tied].sum())

    def apart(self) -> pd.DataFrame:
        """Rows that are low by influence and high by KNN-Shapley, or the other way round.

        In the lower half by one and in the upper half by the other: of each kind those whose ranks
        are farthest apart. ``at`` is the position in these arrays; rank 1 is the lowest number.
        Rows with an influence nearer to 0 than half of the rows have are left out: their rank
        depends on next to nothing. So those that are left harm where they are low, and help where
        they are high.
        """
        n, size = len(self.rows), np.abs(self["influence"])
        telling = size >= np.median(size)
        ranks: Any = pd.DataFrame({"by": self["influence"], "worth": self["knn"]}).rank()
        by, worth = ranks["by"].to_numpy(), ranks["worth"].to_numpy()
        middle = (n + 1) / 2
        parts: list[NDArray[np.intp]] = []
        for low, high in ((by, worth), (worth, by)):
            there = np.flatnonzero(telling & (low < middle) & (high > middle))
            order = np.argsort(low[there] - high[there], kind="stable")
            parts.append(there[order[:MOST_APART]])
        at = np.concatenate(parts)
        return pd.DataFrame({"at": at, "by": by[at], "worth": worth[at]})


def values_figure(audit: Audit, names: Sequence[str]) -> dict[str, Figure]:
    """The scatter plot as ``values``, if there are influences and values of two rows at least."""
    found = Values(audit)
    if "influence" not in found or "knn" not in found or len(found.rows) < 2:
        return {}
    named = [_row_name(int(row), names) for row in found.rows]
    figure = draw(
        plot_influence_and_values,
        found["influence"],
        found["knn"],
        found.flags,
        named,
        height=3.8,
    )
    caption = (
        "Influence and KNN-Shapley value of each row. Bottom left, both say that the row harms; "
        "top left and bottom right they disagree. Rows far from all others have their names."
    )
    if int((~found.flags).sum()) > MANY:
        caption += " Where many lie the blue is stronger."
    r = spearman([found["influence"], found["knn"]])[0, 1]
    alt = f"Scatter plot of {counted(len(named), 'row')}, {int(found.flags.sum()):,} flagged"
    alt += f"; Spearman's r is {r:+.2f}." if np.isfinite(r) else "."
    return {"values": Figure(figure, caption, alt)}


def values_blocks(audit: Audit, names: Sequence[str]) -> list[Block]:
    """The section: what each number measures, the plot, how far they agree, where they do not."""
    found = Values(audit)
    if not found.measures or not len(found.rows):
        return [Paragraph("There are no values to compare.")]
    noun = "number" if audit.summary.task == "regression" else "label"
    blocks: list[Block] = [Paragraph(text) for text in _told(found, audit, noun)]
    if "influence" not in found:
        why = "were not asked for" if not audit.settings.influence else "are missing"
        blocks.append(Paragraph(f"Influences {why}, so only the values are here.", "note"))
    blocks += values_figure(audit, names).values()
    blocks.append(_agreement(found, audit.summary.seconds))
    if "influence" in found and "knn" in found:
        blocks.append(_apart(found, audit, names, noun))
    return blocks


def _told(found: Values, audit: Audit, noun: str) -> list[str]:
    """What each number measures, and when they differ."""
    told: list[str] = []
    if "influence" in found:
        text = (
            "Influence asks trained networks: what happens to the loss on rows that were left out "
            "if this row counts for a little more? It is a first-order answer, large for rows that "
            "a network fits alone, and about 0 for rows that many others support."
        )
        if "self_influence" in found:
            text += " Self-influence is the same for the loss on the row itself."
        told.append(text)
    values: list[str] = []
    if "knn" in found:
        values.append(
            f"The KNN-Shapley value is what the {noun} of the row is worth to a vote of the "
            f"{audit.settings.neighbours} nearest rows about all other rows, averaged over "
            "training sets of all sizes: below 0 it misleads them. No network is trained for it."
        )
    if "oob" in found:
        values.append(
            "Out of bag is minus the difference from what trees say that have not seen the row."
            if noun == "number"
            else "Data-OOB is the share that trees give to the label that have not seen the row."
        )
    told.append(" ".join(values))
    if "influence" in found and "knn" in found:
        told.append(
            f"They agree on a wrong {noun} among rows that are alike. They differ where few rows "
            "decide: a row between groups, or alone, can turn a network and hardly matter to its "
            "neighbours. Where a network has fitted a row well, its influence is "
            "near 0, and its rank says little."
        )
    return [text for text in told if text]


def _agreement(found: Values, seconds: Mapping[str, float]) -> Table:
    k, n = int(found.asked.sum()), len(found.rows)
    r = found.correlations()
    names = [one.name for one in found.measures]
    lines: dict[str, Any] = {"measure": names}
    for j, name in enumerate(names):
        column = r[:, j].copy()
        column[j] = np.nan  # with itself
        lines[f"r with {name}"] = column
    what = "flagged rows" if found.flags.any() else "most suspicious rows"
    lines["finds"] = [_of(found.found(one), k) for one in found.measures]
    times = _times(found.measures, seconds)
    if any(times):
        lines["seconds"] = [time or "–" for time in times]
    caption = (
        "How far the numbers agree: Spearman's r between them, and how many of the "
        f"{k:,} {what} are among the {k:,} lowest by each (about {_round(k * k / n)} by chance)."
    )
    if "self_influence" in found:
        caption += (
            " Self-influence is high where a row is suspicious, so it counts here with a minus."
        )
    if "knn" in found or "oob" in found:
        caption += (
            " The flags rest on the trees and the nearest rows, too, so this is no fair race; how "
            "well each judge finds planted faults is told below."
        )
    formats: dict[Hashable, Format] = {f"r with {name}": "{:+.2f}" for name in names}
    return Table(pd.DataFrame(lines), caption, formats, whole=True)


def _times(measures: Sequence[Measure], seconds: Mapping[str, float]) -> list[str]:
    """What each took, as far as it is known; both influences come from one step."""
    told: list[str] = []
    seen: set[str] = set()
    for one in measures:
        if one.step not in seconds:
            told.append("")
        elif one.step in seen:
            told.append("in the same step")
        else:
            text = _seconds(seconds[one.step])
            if one.step == "influence" and "networks" in seconds:
                text += f", after {_seconds(seconds['networks'])} for the networks"
            told.append(text)
        seen.add(one.step)
    return told


def _apart(found: Values, audit: Audit, names: Sequence[str], noun: str) -> Block:
    lines = found.apart()
    if lines.empty:
        return Paragraph(
            "No row with an influence that is not near 0 is in the lower half by one of influence "
            "and KNN-Shapley and in the upper half by the other."
        )
    at = lines["at"].to_numpy(dtype=np.intp)
    rows: list[int] = found.rows[at].tolist()
    given = audit.rows["given"].tolist()
    shown = [cut_middle(names[row], 60) for row in rows]
    frame = pd.DataFrame(
        {
            "row": [str(row) for row in rows],
            "name": shown,
            "given": [_given(given[row]) for row in rows],
            "influence": found["influence"][at],
            "rank by influence": lines["by"].to_numpy(),
            "KNN-Shapley": found["knn"][at],
            "rank by KNN-Shapley": lines["worth"].to_numpy(),
            "what it usually means": _meanings(found, lines, noun),
        }
    )
    if frame["row"].tolist() == shown:
        frame = frame.drop(columns="name")
    formats: dict[Hashable, Format] = {
        "influence": "{:+.3g}",
        "KNN-Shapley": "{:+.3g}",
        "rank by influence": "{:,.0f}",
        "rank by KNN-Shapley": "{:,.0f}",
    }
    return Table(
        frame,
        "Rows on which they disagree most, by the difference of their ranks: at most "
        f"{MOST_APART} that are low by influence and high by KNN-Shapley, then as many that are "
        f"high by influence and low by KNN-Shapley. Rank 1 is the lowest of {len(found.rows):,}. "
        "Rows with an influence near 0, half of all, are left out: their rank says little.",
        formats,
        highlight_rows=np.flatnonzero(found.flags[at]).tolist(),
        highlight_label=f"{noun} flagged as wrong",
        whole=True,
    )


def _meanings(found: Values, lines: pd.DataFrame, noun: str) -> list[str]:
    alone = np.zeros(len(found.rows), dtype=np.bool_)
    if "self_influence" in found:
        alone = found["self_influence"] >= np.quantile(found["self_influence"], HIGH)
    number = noun == "number"
    like = "numbers like its own" if number else f"the same {noun}"
    border = "where networks expect others" if number else "near where the networks draw a border"
    kind = "far from most" if number else "at a border or of a rare kind"
    told: list[str] = []
    for at, by, worth in lines.itertuples(index=False, name=None):
        if by < worth:
            text = f"Its nearest rows have {like}, but rows left out lose by it: "
            text += (
                "networks fit it alone, as with an odd cell or a rare kind."
                if alone[at]
                else f"mostly right, and {border}."
            )
        elif found.flags[at]:
            text = (
                f"Models that have not seen it expect another {noun}, but rows left out gain by "
                "it: it may be right and rare, so look before changing it."
            )
        else:
            text = "It misleads" if found["knn"][at] < 0 else "It is of little worth to"
            text += f" its nearest rows, but rows left out gain by it: mostly right, {kind}."
        told.append(text)
    return told


def _numbers(frame: pd.DataFrame, name: str) -> Floats:
    if name not in frame.columns:
        return np.full(len(frame), np.nan)
    return frame[name].to_numpy(dtype=np.float64, na_value=np.nan)


def _row_name(row: int, names: Sequence[str]) -> str:
    return f"row {row}" if names[row] == str(row) else names[row]


def _given(value: object) -> str:
    return name_text(value) if isinstance(value, str) else cell_text(value, 60)


def _round(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def _of(part: float, k: int) -> str:
    return f"{_round(part)} of {k:,}".replace(" ", "\N{NO-BREAK SPACE}")


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 0.05 else "less than 0.1"
