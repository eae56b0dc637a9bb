"""What the values of a run say, in words: for the page and the terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from upweight.report.audit_text import counted, listed, name_text, share, visible
from upweight.report.value_run import TREES, Outcome, Ready
from upweight.report.value_settings import SAMPLED, command
from upweight.valuation import Values
from upweight.valuation.values import MEANING

__all__ = [
    "converged",
    "failed",
    "has_intervals",
    "head",
    "longer",
    "meaning",
    "named_alike",
    "number",
    "range_text",
    "sureness",
    "unsure",
]

MINUS = "\N{MINUS SIGN}"


def head(found: Ready) -> str:
    """What the table is."""
    rows = counted(len(found.table), "row")
    if len(found.rows) < len(found.table):
        rows += f", {len(found.rows):,} with a target"
    used = sum(
        c.kind not in ("target", "id", "constant", "empty", "ignored") for c in found.columns
    )
    told = f"{name_text(found.table.source.name)}: {rows}, {counted(used, 'feature column')}, "
    told += f"target {name_text(found.settings.target)} ({found.task}"
    if found.classes:
        counts = np.bincount(found.y.astype(np.intp), minlength=len(found.classes))
        classes = [f"{name_text(c)} {n:,}" for c, n in zip(found.classes, counts, strict=True)]
        told += f": {listed(classes, 6)}"
    return told + ")"


def meaning(found: Ready, values: Values) -> str:
    """What the number is, and what its sign or size says."""
    settings = found.settings
    if settings.method == "oob":
        if found.task == "regression":
            return (
                "A value is minus the squared difference between the given number and what trees "
                "predict that have not seen the row, in squares of its usual size: 0 is best, "
                f"{MINUS}9 is three times as far off as usual."
            )
        return (
            "A value is the probability that trees which have not seen the row give to its class: "
            "1 is best, and near 0 all of them say something else."
        )
    by = "other rows of the table" if found.test is None else "the test rows"
    score = {
        "log_likelihood": "log-likelihood, in nats",
        "brier": "negative Brier score",
        "accuracy": "accuracy",
        "neg_mean_squared_error": "negative mean squared error",
    }.get(str(found.scoring), str(found.scoring))
    if settings.method == "knn-shapley":
        score = (
            "share of right votes of the nearest rows"
            if found.task == "classification"
            else "negative squared error of the mean of the nearest rows"
        )
    law = {
        "knn-shapley": "on average over all sets of other rows",
        "tmc": "on average over all orders in which rows may join",
        "shapley": "on average over all orders in which rows may join",
        "beta": "on average over sets of other rows, small ones above all",
        "banzhaf": "on average over random sets of other rows, "
        f"each of which is there with probability {found.p or 0:.3g}",
        "loo": "to all other rows",
    }[settings.method]
    return (
        f"A value is what the row adds, {law}, to the score on {by} ({score}; higher is better). "
        "Positive: the row helps. Negative: it harms."
        if settings.method != "knn-shapley"
        else f"A value is what the row adds, {law}, to the {score} on {by}. "
        "Positive: the row helps. Negative: it harms."
    )


def sureness(found: Ready, values: Values) -> list[str]:
    """What is known of how exact the values are, a paragraph each."""
    method = found.settings.method
    if method not in SAMPLED:
        told = {
            "knn-shapley": "The values are exact: every set of rows counts, by a formula. There is "
            "no sampling error, and nothing to converge.",
            "loo": "The values are exact: every row was left out once. But one row among many "
            "moves a score by little, and differences between small values mean nothing.",
            "oob": f"The error of a value is that of a mean over the trees that have not seen the "
            f"row, about a third of {TREES}. More of them would not change the order much.",
        }[method]
    else:
        told = converged(found, values)
    return [told, *failed(values), *_missing(values), *_errors_missing(values)]


def converged(found: Ready, values: Values) -> str:
    """Whether ranks are stable, in a sentence or two."""
    last = values.history.iloc[-1] if len(values.history) else None
    asked = found.settings.until_stable
    spent = counted(int(values.provenance["evaluations"]), "evaluation")
    stable = (
        ""
        if last is None
        else (f"a correlation of {last['stability']:.3f} ({last['low']:.3f} to {last['high']:.3f})")
    )
    if values.converged:
        return (
            f"Converged: after {spent}, another run of the same size is expected to rank the rows "
            f"with {stable} to these; the lower end was to be {asked:g} or more."
        )
    few = last is None or last["low"] <= -1
    now = (
        "too little to say how another run would rank the rows"
        if few
        else f"another run of the same size would rank the rows with {stable}"
    )
    alike = "Take rows whose intervals overlap as alike. " if has_intervals(values) else ""
    return (
        f"Not converged: the run ended after {spent}, {now}; the lower end was to be {asked:g} or "
        f"more. {alike}A longer run goes on from what is there."
    )


def longer(outcome: Outcome) -> str | None:
    """The command that goes on where values did not converge."""
    settings, values = outcome.ready.settings, outcome.values
    if values.converged is not False:
        return None
    more = replace(settings, evaluations=4 * int(values.provenance["evaluations"]), minutes=None)
    source = outcome.ready.table.source
    return f"{command(more, source.path or source.name, outcome.folder)} --overwrite"


def failed(values: Values) -> list[str]:
    """How many utilities failed, and why the first did."""
    number = int(values.provenance.get("failed", 0))
    if not number:
        return []
    asked = int(values.provenance["evaluations"])
    told = f"{number:,} of {asked:,} evaluations failed, and count nowhere"
    if len(values.failures):
        first = values.failures.iloc[0]
        told += f"; the first, on {first['size']} rows: {visible(first['error'])[:300]}"
    return [told + "."]


def _missing(values: Values) -> list[str]:
    missing = int(np.isnan(values.values).sum())
    return [f"{counted(missing, 'row')} have no value: no sample tells of them."] if missing else []


def has_intervals(values: Values) -> bool:
    """Whether a value has an interval: it is neither exact, nor of unknown error."""
    return bool((values.errors > 0).any())


def _errors_missing(values: Values) -> list[str]:
    known = ~np.isnan(values.values)
    missing = int(np.isnan(values.errors[known]).sum())
    if not missing:
        return []
    which = "the values are" if missing == known.sum() else f"{missing:,} of the values are"
    return [f"Too few samples to say how far off {which}: take more evaluations."]


def named_alike(found: Ready) -> list[str]:
    """That rows share their names, and what they are called then."""
    if not found.shared:
        return []
    return [
        f"{counted(len(found.shared), 'row')} have a name that other rows have too, such as "
        f"“{name_text(found.shared[0])}”: behind it is the number of the row."
    ]


def unsure(values: Values) -> str:
    """How many rows may be of either sign; nothing where 0 is no boundary, or values are exact."""
    if values.meaning != MEANING or not values.errors.any():
        return ""
    low, high = values.interval()[~np.isnan(values.values)].T
    either = 1 - float(((low > 0) | (high < 0)).mean()) if len(low) else 0.0
    return f"the sign of {share(either)} of the values is not known" if either else ""


def number(value: Any, signed: bool = True) -> str:
    """A value as short as it can be told from others."""
    value = float(value)
    if np.isnan(value):
        return "–"
    told = f"{value:+.3g}" if signed else f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
    return told.replace("-", MINUS)


def range_text(low: Any, high: Any, signed: bool = True) -> str:
    """An interval, or that there is none."""
    if np.isnan(low) and np.isnan(high):
        return number(low)
    return f"{number(low, signed)} to {number(high, signed)}"
