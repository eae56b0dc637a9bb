"""What a reader must know to believe or doubt an audit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from upweight.auditing.evidence import short
from upweight.auditing.judging import MANY, Judgement
from upweight.auditing.leakage import Leak
from upweight.tables import Target

__all__ = ["notes_of"]

BLOCK = 50_000
TOLD = {
    "suspicion": "all judges together",
    "forest": "the trees",
    "network": "the networks",
    "neighbours": "the nearest rows",
    "influence": "influence alone",
    "self_influence": "self-influence alone",
}


def notes_of(
    target: Target,
    judged: Judgement,
    *,
    quality: Mapping[str, float],
    flagged: int,
    precision: object,
    coarse: bool,
    leaks: Sequence[Leak],
) -> list[str]:
    """Sentences, the most important first."""
    return [
        *_of_quality(judged, quality, flagged),
        *_of_flags(precision, flagged),
        *_of_planting(judged),
        *_of_table(target, judged, coarse, leaks),
    ]


def _of_quality(judged: Judgement, quality: Mapping[str, float], flagged: int) -> Iterator[str]:
    best = max(quality[name] for name in judged.views)
    base = quality["baseline"]
    explained = best if judged.task == "regression" else (best - base) / max(1 - base, 1e-9)
    if explained < 0.1:
        yield (
            "The columns hardly tell the target: the best model that has not seen a row does "
            f"little better ({best:.2f}) than always giving the commonest answer ({base:.2f}). "
            "What is said of wrong targets rests on little."
        )
    elif explained < 0.6:
        yield (
            f"The columns tell the target in part only (held-out score {best:.2f}, without them "
            f"{base:.2f}). A row that is right but unusual looks like one that is wrong: read the "
            "evidence before you act."
        )
    if flagged > 0.3 * len(judged.y):
        yield (
            f"{100 * flagged / len(judged.y):.0f} % of the rows were flagged. With so many, the "
            "model learns from wrong rows, too, and may mistake right for wrong."
        )


def _of_flags(precision: object, flagged: int) -> Iterator[str]:
    if flagged and precision is None:
        yield (
            "So few targets were flagged that they may all be right: clean tables have as many "
            "rows that look wrong."
        )


def _of_planting(judged: Judgement) -> Iterator[str]:
    if not judged.auc:
        yield (
            "No faults were planted, so that it is not known how many of the flagged rows are "
            "truly wrong; rows with a suspicion above 0.9 were flagged."
        )
        return
    parts = [f"{TOLD.get(name, name)} {value:.3f}" for name, value in judged.auc.items()]
    yield (
        "As a test, wrong targets were planted at random, and all was judged again. A planted row "
        "was more suspicious than a row that had not been in doubt in this share of all pairs "
        f"(ROC AUC): {', '.join(parts)}. Mistakes that people make are less random, and some are "
        "harder to find."
    )
    if judged.auc.get("influence", 1.0) < judged.auc.get("suspicion", 0.0) - 0.01:
        yield (
            "Influence finds wrong targets less well here than the other judges do. It does not "
            "count in the suspicion: take it for what a row does to the predictions of others."
        )


def _of_table(
    target: Target, judged: Judgement, coarse: bool, leaks: Sequence[Leak]
) -> Iterator[str]:
    n = len(judged.y)
    missing = int((~target.judged).sum())
    if missing:
        yield f"{missing} rows have no target and were not judged."
    if coarse:
        yield (
            "More than half of the rows have the same features as another one: the columns are too "
            "coarse to tell rows apart, so duplicates and conflicts are not listed. They are in "
            "rows.parquet."
        )
    if leaks:
        yield (
            f"{short(leaks[0].column)} alone tells the target. If it was not known before, leave "
            "it out (--ignore) and audit again: with it, wrong targets can hide."
        )
    if target.classes is not None:
        counts = np.bincount(judged.y)
        rare = [target.classes[c] for c in np.flatnonzero(counts < 10)]
        if rare:
            yield (
                f"{len(rare)} classes have fewer than 10 rows ({', '.join(map(short, rare[:5]))}): "
                "their rows are often flagged for being rare."
            )
    if n > MANY:
        yield (
            f"Faults were planted into {MANY:,} of the {n:,} rows. KNN-Shapley counts the 100 "
            "nearest rows only, which changes a value by at most 0.01."
        )
    if n > BLOCK:
        yield (
            f"Nearest rows were looked for within random blocks of at most {BLOCK:,} rows; exact "
            "duplicates in the whole table."
        )
