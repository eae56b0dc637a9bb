"""What each signal of an audit means, and whether it says that a row's label is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["KNOWN", "MARKS", "Reading", "Signal", "Signals", "flags_of", "verdict"]

Says = Literal["wrong", "unclear", "fine", ""]
MARKS: dict[str, str] = {"wrong": "✗ wrong", "unclear": "~ unclear", "fine": "✓ fine", "": "–"}

TOP = 0.05  # of the rows: a signal that is among these says wrong, whatever its scale
FINE = 0.20  # a signal that is not even among these says fine

# Columns of `Audit.rows` that are no signals.
_OTHERS = frozenset(
    {
        "row", "name", "suspicion", "label_flag", "given", "proposed", "feature_suspicion",
        "feature_flag", "suspect_column", "duplicate_of", "near_duplicate_of", "conflict_with",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Signal:
    """A signal: its name for people, what it measures, which end speaks against the label.

    Attributes
    ----------
    name, meaning
        For people.
    bad
        Which end is suspicious; None where that is not known.
    zero
        Whether the sign decides: then a value beyond 0 on the bad end says wrong.
    judge
        Who says it: signals of one judge count once. Empty for what says nothing of the label.
    number
        The meaning where the target is a number, if it is another one.
    """

    name: str
    meaning: str
    bad: Literal["low", "high"] | None
    zero: bool = False
    judge: str = ""
    number: str = ""


@dataclass(frozen=True)
class Reading:
    """A signal of one row: its value, and the share of rows that it makes less suspicious."""

    key: str
    signal: Signal
    value: float
    beats: float | None
    says: Says


# By the column of `Audit.rows`.
KNOWN: dict[str, Signal] = {
    "knn": Signal(
        "neighbours: value",
        "what the label is worth to the nearest rows (KNN-Shapley): below 0 it misleads them",
        "low",
        zero=True,
        judge="neighbours",
        number="what the number is worth to the nearest rows (KNN-Shapley): below 0 it misleads "
        "them",
    ),
    "votes": Signal(
        "neighbours: votes",
        "share of the nearest rows, the nearer the more, that have the same label",
        "low",
        judge="neighbours",
        number="minus the difference from what the nearest rows say",
    ),
    "oob": Signal(
        "forest",
        "share of the label among the trees that have not seen the row",
        "low",
        judge="forest",
        number="minus the difference from what trees say that have not seen the row",
    ),
    "network": Signal(
        "network: probability",
        "of the label, by networks that have not seen the row",
        "low",
        judge="network",
    ),
    "loss": Signal(
        "network: loss",
        "of the label, by networks that have not seen the row",
        "high",
        judge="network",
        number="difference from what networks say that have not seen the row",
    ),
    "margin": Signal(
        "network: margin",
        "how far the label is ahead of the best other one, by networks that have not seen the "
        "row: below 0 it is behind",
        "low",
        zero=True,
        judge="network",
    ),
    "influence": Signal(
        "influence",
        "effect of the row on the prediction of rows that the network has not seen: below 0 it "
        "harms, their loss rises",
        "low",
        judge="influence",
    ),
    "self_influence": Signal(
        "self-influence",
        "effect of the row on its own prediction: high where the network learns it by heart, as no "
        "other row supports it",
        "high",
    ),
    "disagreement": Signal(
        "disagreement",
        "how far networks with other initial weights disagree about the row: high where it is hard",
        "high",
    ),
    "distance": Signal(
        "distance", "mean distance to the nearest rows: high where the row is alone", "high"
    ),
    "surprise": Signal(
        "surprise of the cells",
        "how far its strangest cell is from what the other columns let expect, in standard "
        "deviations",
        "high",
    ),
}


class Signals:
    """The signals in `Audit.rows`, read for single rows.

    A signal says wrong where its sign does, or where it makes the row one of the most suspicious
    5 % (or as many as are flagged, if that is more); fine where it does not even make it one of the
    most suspicious 20 %.

    Parameters
    ----------
    rows
        `Audit.rows`: every numeric column of it that is not described in `Audit` is a signal.
    regression
        Whether the target is a number.
    """

    def __init__(self, rows: pd.DataFrame, *, regression: bool = False) -> None:
        self._regression = regression
        self.keys: list[str] = [
            str(name)
            for name in rows.columns
            if name not in _OTHERS
            and pd.api.types.is_numeric_dtype(rows[name])
            and not pd.api.types.is_bool_dtype(rows[name])
            and bool(rows[name].notna().any())
        ]
        self._values: dict[str, NDArray[np.float64]] = {}
        self._sorted: dict[str, NDArray[np.float64]] = {}
        for key in self.keys:
            values = rows[key].to_numpy(dtype=np.float64, na_value=np.nan)
            self._values[key] = values
            self._sorted[key] = np.sort(values[~np.isnan(values)])
        flags = flags_of(rows, "label_flag")
        self._top = max(TOP, float(flags.mean()) if len(flags) else 0.0)

    def known(self, key: str) -> Signal:
        """What is known of a signal; of an unknown one, its name."""
        signal = KNOWN.get(key) or Signal(key.replace("_", " "), "", None)
        if self._regression and signal.number:
            return replace(signal, meaning=signal.number)
        return signal

    def read(self, row: int) -> list[Reading]:
        """Each signal of a row that has one."""
        readings = (self._read(key, float(self._values[key][row])) for key in self.keys)
        return [reading for reading in readings if not np.isnan(reading.value)]

    def _read(self, key: str, value: float) -> Reading:
        signal, ordered = self.known(key), self._sorted[key]
        if signal.bad is None or np.isnan(value):
            return Reading(key, signal, value, None, "")
        # Rows that this signal makes less suspicious: those on the good side of the value.
        if signal.bad == "low":
            less = len(ordered) - int(np.searchsorted(ordered, value, side="right"))
            beyond = value < 0
        else:
            less = int(np.searchsorted(ordered, value, side="left"))
            beyond = value > 0
        beats = less / max(len(ordered) - 1, 1)
        if not signal.judge:
            return Reading(key, signal, value, beats, "")
        if signal.zero:
            says: Says = "wrong" if beyond else "fine" if beats < 1 - FINE else "unclear"
        else:
            says = "wrong" if beats >= 1 - self._top else "unclear"
            says = "fine" if beats < 1 - max(FINE, self._top) else says
        return Reading(key, signal, value, beats, says)


def flags_of(rows: pd.DataFrame, name: str) -> NDArray[np.bool_]:
    """A column of flags, (n,); where it is missing there is none."""
    flags: Any = rows[name].astype("boolean")
    return flags.fillna(False).to_numpy(dtype=np.bool_)


def verdict(readings: Sequence[Reading], noun: str = "label") -> str:
    """Who says that the label, or number, is wrong; and whether influence disagrees.

    A judge says so if at least half of its signals do.

    Examples
    --------
    >>> knn = Reading("knn", KNOWN["knn"], -0.1, 0.99, "wrong")
    >>> oob = Reading("oob", KNOWN["oob"], 0.9, 0.2, "fine")
    >>> verdict([knn, oob])
    'Neighbours say that the label is wrong, forest does not.'
    """
    judges: dict[str, list[Says]] = {}
    for one in readings:
        if one.says:
            judges.setdefault(one.signal.judge, []).append(one.says)
    against = {judge: 2 * says.count("wrong") >= len(says) for judge, says in judges.items()}
    influence = against.pop("influence", None)
    if not against:
        return ""
    wrong = [judge for judge, is_wrong in against.items() if is_wrong]
    others = [judge for judge, is_wrong in against.items() if not is_wrong]
    if not wrong:
        text = f"{_names(others)} {_verb(others, 'do')} not say that the {noun} is wrong."
    else:
        rest = f", {_names(others)} {_verb(others, 'do')} not" if others else ""
        text = f"{_names(wrong)} {_verb(wrong, 'say')} that the {noun} is wrong{rest}."
    text = text[0].upper() + text[1:]
    if influence is None or influence == bool(wrong):
        return text
    value = next(one.value for one in readings if one.key == "influence")
    if not influence:
        effect = "it helps" if value >= 0 else "it hardly harms"
        return f"{text} Influence disagrees: as a training row {effect} the prediction of others."
    return f"{text} Influence disagrees: as a training row it harms the prediction of others."


def _names(judges: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(judges[:-1]), *judges[-1:]]))


def _verb(judges: Sequence[str], verb: str) -> str:
    if len(judges) > 1 or judges[0].endswith("s"):
        return verb
    return {"do": "does", "say": "says"}[verb]
