"""An audit in a paragraph, in what to do next, and in key numbers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from upweight.auditing.audit import Audit
from upweight.report.audit_signals import flags_of
from upweight.report.audit_text import counted, listed, name_text, share
from upweight.report.page import Fact, Facts

__all__ = ["doubt", "flagged_columns", "interval", "lead", "tiles", "todo"]

HARDLY = 0.1  # of what is left above the baseline: a judge that explains no more knows little


def lead(audit: Audit) -> str:
    """The paragraph that comes first: what was looked at, and what was found."""
    summary, target = audit.summary, name_text(audit.settings.target)
    noun = "number" if summary.task == "regression" else "label"
    told = [
        f"{counted(summary.judged, 'row')} {'was' if summary.judged == 1 else 'were'} judged by "
        f"models that had not seen them."
    ]
    if summary.rows > summary.judged:
        told.append(f"{counted(summary.rows - summary.judged, 'row')} without a target were not.")
    if summary.flagged:
        are = "is" if summary.flagged == 1 else "are"
        text = (
            f"{counted(summary.flagged, noun)} in “{target}” {are} probably wrong "
            f"({share(summary.flagged / max(summary.judged, 1))})"
        )
        if summary.precision is not None:
            middle, low, high = (round(summary.flagged * part) for part in summary.precision)
            text += (
                f": about {middle:,} of them are expected to be truly wrong (between {low:,} and "
                f"{high:,})"
            )
        told.append(text + ".")
    else:
        told.append(f"No {noun} in “{target}” looks wrong enough for a flag.")
    told += [*_cells(audit), *_copies(audit), *_leakage(audit), *_gain(audit)]
    return " ".join(told)


def todo(audit: Audit) -> list[dict[str, str]]:
    """What to do next, the most useful first: link, words, and the command if there is one."""
    summary, counts = audit.summary, audit.summary.counts
    noun = "numbers" if summary.task == "regression" else "labels"
    steps: list[dict[str, str]] = []
    leaking = _leaking(audit)
    if leaking:
        steps.append(
            _step(
                "leakage",
                "Decide about " + listed([f"“{name}”" for name in leaking]),
                "alone predicts the target. If its value is not known when a prediction is needed, "
                "leave it out (ignore) and audit again: it decides everything else on this page.",
            )
        )
    if summary.flagged:
        worth = ""
        if summary.precision is not None:
            worth = f"About {round(10 * summary.precision[0])} of 10 should be worth the look. "
        steps.append(
            _step(
                "findings",
                f"Look through the suspected {noun}",
                f"from the top. {worth}Correct them in the source, or leave them out:",
                "upweight clean RUN -o clean.csv --drop label-errors",
            )
        )
    if counts.get("features"):
        columns = [f"“{name}”" for name in flagged_columns(audit)]
        where = f"most of them in {listed(columns)}." if columns else "see the findings."
        steps.append(_step("findings", "Check the cells that do not fit", where))
    if counts.get("conflict"):
        steps.append(
            _step(
                "copies",
                "Settle the conflicts",
                f"the same features with different {noun} cannot both be right.",
            )
        )
    if counts.get("duplicate"):
        steps.append(
            _step(
                "copies",
                "Drop the duplicates",
                "if they are copies and no repeated measurements:",
                "upweight clean RUN -o clean.csv --drop duplicates",
            )
        )
    if summary.flagged and audit.verification is None:
        steps.append(
            _step(
                "findings",
                "Try out whether it helps",
                "to leave the flagged rows out, on held-out rows:",
                "upweight verify RUN",
            )
        )
    return steps or [
        _step("model", "Nothing has to be done", "see how good the judges of the rows are.")
    ]


def tiles(audit: Audit) -> Facts:
    """The key numbers."""
    summary, counts = audit.summary, audit.summary.counts
    noun = "numbers" if summary.task == "regression" else "labels"
    used = counted(summary.features, "column")
    flagged = f"{share(summary.flagged / max(summary.judged, 1))} of the rows"
    tone = "bad" if summary.flagged else "good"
    facts = [
        Fact("Rows judged", f"{summary.judged:,}", f"of {summary.rows:,}, by {used}"),
        Fact(f"{noun.capitalize()} probably wrong", f"{summary.flagged:,}", flagged, tone),
    ]
    if summary.precision is not None and summary.flagged:
        middle, low, high = map(share, summary.precision)
        facts.append(Fact("Truly wrong among them", middle, f"expected; {low} to {high}"))
    odd = counts.get("features", 0)
    facts.append(Fact("Cells that do not fit", f"{odd:,}", _most(audit), "bad" if odd else "plain"))
    copies = counts.get("duplicate", 0) + counts.get("near-duplicate", 0)
    conflicts = counts.get("conflict", 0)
    facts.append(
        Fact(
            "Duplicates",
            f"{copies:,}",
            f"{conflicts:,} in conflict" if conflicts else "exact or near",
        )
    )
    leaking = counts.get("leakage", 0)
    if leaking:
        facts.append(
            Fact("Columns that may leak", f"{leaking:,}", listed(_leaking(audit), 1), "bad")
        )
    found = audit.verification
    if found is not None and math.isfinite(found.gain[0]):
        gain, low, high = found.gain
        within = f"; {low:+.3f} to {high:+.3f}" if math.isfinite(high - low) else ""
        tone = "good" if low > 0 else "bad" if high < 0 else "plain"
        facts.append(
            Fact("Gain without them", f"{gain:+.3f}", name_text(found.metric) + within, tone)
        )
    return Facts(facts)


def doubt(audit: Audit) -> str:
    """What makes all findings doubtful: judges that hardly predict the target; else empty."""
    quality = dict(audit.summary.quality)
    baseline = quality.pop("baseline", None)
    if baseline is None or not quality:
        return ""
    best = max(quality, key=lambda name: quality[name])
    if quality[best] - baseline > HARDLY * (1 - baseline):
        return ""
    metric = "R²" if audit.summary.task == "regression" else "accuracy"
    return (
        f"The columns hardly predict the target: the best judge ({best}) has a held-out {metric} "
        f"of {quality[best]:.2f}, and {baseline:.2f} needs no columns at all. What it says of "
        "single rows is then little more than a guess."
    )


def flagged_columns(audit: Audit) -> dict[str, int]:
    """Cells that do not fit, by the column, the most first."""
    rows = audit.rows
    columns = rows.loc[flags_of(rows, "feature_flag"), "suspect_column"].dropna()
    return {name_text(name): count for name, count in Counter(map(str, columns)).most_common()}


def _cells(audit: Audit) -> list[str]:
    odd = audit.summary.counts.get("features", 0)
    if not odd:
        return ["All cells fit the rest of their row."]
    columns = [f"“{name}”" for name in flagged_columns(audit)]
    where = f", most of them in {columns[0]}" if columns else ""
    does = "does" if odd == 1 else "do"
    return [f"{counted(odd, 'cell')} {does} not fit the rest of the row{where}."]


def _copies(audit: Audit) -> list[str]:
    counts = audit.summary.counts
    parts = [
        counted(counts.get(kind, 0), *words)
        for kind, words in (
            ("duplicate", ("exact duplicate",)),
            ("near-duplicate", ("near duplicate",)),
            (
                "conflict",
                ("row that contradicts its own copy", "rows that contradict their copies"),
            ),
        )
        if counts.get(kind)
    ]
    return [f"There are {listed(parts)}."] if parts else []


def _leaking(audit: Audit) -> list[str]:
    found = audit.findings
    return [name_text(name) for name in found.loc[found["kind"] == "leakage", "column"].dropna()]


def _leakage(audit: Audit) -> list[str]:
    names = [f"“{name}”" for name in _leaking(audit)]
    if not names:
        return []
    verb = "predicts" if len(names) == 1 else "predict"
    return [f"{listed(names)} {verb} the target alone and may be leaking it."]


def _gain(audit: Audit) -> list[str]:
    found = audit.verification
    if found is None or not math.isfinite(found.gain[0]):
        return []
    _, low, high = found.gain
    if low > 0:
        told = "Models trained without the flagged rows do better on held-out rows"
    elif high < 0:
        told = "Models trained without the flagged rows do worse on held-out rows"
    else:
        told = "Whether models get better without the flagged rows cannot be told"
    gain, over = interval(found.gain), interval(found.gain_over_random)
    change = f"{name_text(found.metric)} changes by {gain}"
    return [f"{told}: {change}; beside as many random rows, by {over}."]


def interval(values: tuple[float, float, float]) -> str:
    """A difference with its interval, in words where that has no end."""
    middle, low, high = values
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{middle:+.3f} (how exactly cannot be told)"
    return f"{middle:+.3f} ({low:+.3f} to {high:+.3f})"


def _most(audit: Audit) -> str:
    columns = flagged_columns(audit)
    if not columns:
        return ""
    name, count = next(iter(columns.items()))
    return f"{count:,} in {name}"


def _step(href: str, what: str, text: str, command: str = "") -> dict[str, Any]:
    return {"href": href, "what": what, "text": text, "command": command}
