"""The check of the wine walk-through: retraining on halves, and what other dampings would do."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from upweight.damping import DampingChoice
from upweight.datasets import Split, flip_labels
from upweight.evaluate import (
    LinearDatamodelingScore,
    Retrained,
    linear_datamodeling_score,
    prediction_score,
)
from upweight.inverse import IndefiniteCurvatureWarning
from upweight.methods import Influence
from upweight.report.demo_settings import WineSettings, make_model, training_options
from upweight.scores import Scores
from upweight.stacked import Retraining
from upweight.trust import Check
from upweight.trust.questions import slope_of

__all__ = ["WineCheck", "check_wine", "in_a_line"]

FAILURES = (ArithmeticError, ValueError, TypeError, MemoryError)
DRAWS = 3  # of wrong labels for the validation part
Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class WineCheck:
    """Whether the scores of the walk-through can be believed.

    Attributes
    ----------
    check
        Of its model, with retraining.
    curvature
        The C that it was done with.
    unanswered
        The check with the C of the scores, if that could not be done in full, so that the GGN took
        its place; else None.
    own
        Of the scores themselves: how well their sums order the halves as retraining does.
    rank
        Spearman's ρ of the mean scores with those of `curvature`; 1 where that is their own.
    retrained
        What retraining gave.
    epochs
        Of each training.
    clean
        What ``damping="auto"`` takes by the validation part as it is.
    spoiled
        What it takes by the validation part with the same share of wrong labels as the training
        part, for some draws of them, lowest first; empty where there are none.
    dampings
        Some λ, each with ``damping``, ``origin``, the linear datamodeling scores ``sum`` and
        ``newton`` and the slopes ``sum_slope`` and ``newton_slope`` of actual on predicted
        effects; NaN where C + λI is indefinite.
    """

    check: Check
    curvature: str
    unanswered: Check | None
    own: LinearDatamodelingScore
    rank: float
    retrained: Retrained
    epochs: int
    clean: DampingChoice
    spoiled: tuple[DampingChoice, ...]
    dampings: pd.DataFrame

    def findings(self) -> pd.DataFrame:
        """A line for each finding of each check, with its ``curvature``."""
        frames = [self.check.to_frame().assign(curvature=self.curvature)]
        if self.unanswered is not None:
            frames.append(self.unanswered.to_frame().assign(curvature="of the scores"))
        return pd.concat(frames, ignore_index=True)


def in_a_line(found: WineCheck | str) -> str:
    """The answer, for a terminal."""
    if isinstance(found, str):
        return f"not known: {found}"
    if found.unanswered is None:
        return found.check.sentence
    return (
        f"{found.check.sentence} (This is for the {found.curvature.upper()}. With the curvature of "
        "the scores some steps cannot be predicted, and the answer is not to rely on them yet: see "
        "the report.)"
    )


def check_wine(
    settings: WineSettings,
    model: nn.Module,
    data: Split,
    train: Part,
    scores: Scores,
    *,
    epochs: int,
    progress: bool = True,
) -> WineCheck | str:
    """Train again on random halves of the rows, and compare with what scores say.

    Parameters
    ----------
    settings
        Of the walk-through.
    model, data
        What was trained, and the parts of the data.
    train
        The training rows, with their wrong labels.
    scores
        Of every training row on every test row.
    epochs
        Of each training.
    progress
        Show a progress bar when on a terminal.

    Returns
    -------
    WineCheck or str
        A text says why there is no answer.
    """
    fit = partial(_fit, model, train)
    refit = _retraining(settings, train, data.test, epochs)
    try:
        with warnings.catch_warnings():  # the findings say so
            warnings.simplefilter("ignore", IndefiniteCurvatureWarning)
            influence, check, unanswered = _checked(settings, fit, refit, data.test, progress)
            retrained = check.retrained
            if retrained is None:
                return "no retraining has finished"
            clean, spoiled = _choices(settings, fit, data.validation, len(train[1]))
            wanted = _wanted(check, settings.damping, clean, spoiled)
            return WineCheck(
                check=check,
                curvature=str(influence.curvature),
                unanswered=unanswered,
                own=linear_datamodeling_score(
                    scores.values, retrained.masks, retrained.mean, higher_is_better=False
                ),
                rank=_rank(scores.mean().values, influence.mean_scores(data.test).values),
                retrained=retrained,
                epochs=epochs,
                clean=clean,
                spoiled=spoiled,
                dampings=_dampings(influence, data.test, retrained, wanted),
            )
    except FAILURES as error:
        return str(error) or type(error).__name__


def _retraining(settings: WineSettings, train: Part, test: Part, epochs: int) -> Retraining:
    return Retraining(
        make_model,
        F.cross_entropy,
        train,
        test,
        epochs=epochs,
        output="loss",  # what the scores are of
        **training_options(settings),
    )


def _fit(
    model: nn.Module,
    train: Part,
    curvature: str,
    damping: float | str,
    held_out: Part | None = None,
) -> Influence:
    made: Any = Influence
    return made(model, F.cross_entropy, curvature=curvature, damping=damping).fit(
        train, held_out=held_out
    )


def _checked(
    settings: WineSettings, fit: Any, refit: Retraining, test: Part, progress: bool
) -> tuple[Influence, Check, Check | None]:
    """By the C of the scores; where a step for a half has no answer, by the GGN if that has one."""
    found: list[tuple[Influence, Check]] = []
    with tempfile.TemporaryDirectory() as store:  # nothing is trained twice
        for curvature in dict.fromkeys([settings.curvature, "ggn"]):
            influence: Influence = fit(curvature, settings.damping)
            check = influence.check(
                test,
                refit=refit,
                subsets=settings.halves,
                seeds=settings.trainings,
                store=store,
                progress=progress,
            )
            if check.predicted is not None:
                return influence, check, found[0][1] if found else None
            found.append((influence, check))
    return *found[0], None


def _choices(
    settings: WineSettings, fit: Any, part: Part, n: int
) -> tuple[DampingChoice, tuple[DampingChoice, ...]]:
    """What ``damping="auto"`` takes by the validation part as it is, and spoiled as the n rows."""
    clean: DampingChoice = fit(settings.curvature, "auto", part).damping_choice
    if not settings.flipped:
        return clean, ()
    spoiled: list[DampingChoice] = []
    for seed in range(settings.seed, settings.seed + DRAWS):
        held_out = _spoil(part, settings.flipped / n, seed)
        spoiled.append(fit(settings.curvature, "auto", held_out).damping_choice)
    return clean, tuple(sorted(spoiled, key=lambda choice: choice.value))


def _spoil(part: Part, share: float, seed: int) -> Part:
    x, y = part
    wrong, _ = flip_labels(y, round(share * len(y)), classes=3, seed=seed)
    return x, wrong


def _rank(a: Tensor, b: Tensor) -> float:
    found: Any = spearmanr(a.numpy(), b.numpy())
    return float(found.statistic)


# ---- dampings -----------------------------------------------------------------------------------


def _wanted(
    check: Check, own: float, clean: DampingChoice, spoiled: Sequence[DampingChoice]
) -> dict[str, float]:
    """λ by what asks for it."""
    wanted = {
        "in use": own,
        "best of those tried": _best(check.dampings, own),
        "auto, validation part as it is": clean.value,
    }
    if spoiled:
        wanted["auto, spoiled validation part, lowest"] = spoiled[0].value
        wanted["auto, spoiled validation part, highest"] = spoiled[-1].value
    return wanted


def _dampings(
    influence: Influence, test: Part, retrained: Retrained, wanted: Mapping[str, float]
) -> pd.DataFrame:
    """What retraining says of each λ that something asks for; a line for each λ."""
    origins: dict[float, list[str]] = {}
    for origin, damping in wanted.items():
        origins.setdefault(damping, []).append(origin)
    lines: list[dict[str, Any]] = []
    for damping, names in origins.items():
        found = _against_retraining(influence, test, retrained, damping)
        lines.append({"damping": damping, "origin": "; ".join(names), **found})
    return pd.DataFrame(lines)


def _best(dampings: pd.DataFrame, otherwise: float) -> float:
    """λ whose Newton steps order the halves best."""
    tried = dampings if dampings.empty else dampings.dropna(subset="newton")
    if tried.empty:
        return otherwise
    return float(tried["damping"].to_numpy()[tried["newton"].to_numpy().argmax()])


def _against_retraining(
    influence: Influence, test: Part, retrained: Retrained, damping: float
) -> dict[str, float]:
    """How predictions with this λ order the halves, and how large actual effects are for them."""
    actual = retrained.mean
    there = np.isfinite(actual).all(1)
    try:
        influence.damping = damping
        predicted = influence.predict(test, ~retrained.masks[there])
        pairs = {"sum": predicted.first_order.numpy(), "newton": predicted.after.numpy()}
    except (ArithmeticError, ValueError):
        return dict.fromkeys(("sum", "newton", "sum_slope", "newton_slope"), np.nan)
    found: dict[str, float] = {}
    for name, values in pairs.items():
        found[name] = prediction_score(values, actual[there], bootstrap=0).value
        about = values - values.mean(0), actual[there] - actual[there].mean(0)
        found[f"{name}_slope"] = slope_of(*about)
    return found
