"""The answer to a check, and the retraining that it may rest on."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from upweight.evaluate import Retrained, prediction_score, random_subsets, retrain
from upweight.fitting import Fitting
from upweight.prediction import Prediction
from upweight.risk import EmpiricalRisk
from upweight.trust.questions import (
    Finding,
    Verdict,
    against_retraining,
    at_a_minimum,
    damped,
    far_enough,
    one_damping,
    other_dampings,
    other_seeds,
    predict,
    same_every_time,
    solved,
    worst,
)

__all__ = ["Check", "check_influence"]

DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, repr=False)
class Check:
    """What speaks for and against the scores of a fitted influence.

    Attributes
    ----------
    findings
        In the order in which they were looked at.
    sentence
        The answer.
    predicted, first_order, actual
        (S, m): with a `refit`, what the test rows became without each random group of rows, and
        what one Newton step and a sum of influences had predicted; None without.
    dampings
        With a `refit`: the linear datamodeling score of both predictions at other dampings.
    retrained
        With a `refit`: the retrained outputs, to use again.
    """

    findings: tuple[Finding, ...]
    sentence: str
    predicted: np.ndarray | None = None
    first_order: np.ndarray | None = None
    actual: np.ndarray | None = None
    dampings: pd.DataFrame = field(default_factory=pd.DataFrame)
    retrained: Retrained | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst of the findings."""
        verdicts: list[Verdict] = [f.verdict for f in self.findings]
        return worst(*verdicts)

    def to_frame(self) -> pd.DataFrame:
        """One line for every finding: what, value, verdict, meaning."""
        return pd.DataFrame(
            [(f.what, f.value, f.verdict, f.meaning) for f in self.findings],
            columns=["what", "value", "verdict", "meaning"],
        )

    def __repr__(self) -> str:
        width = max(len(f.what) for f in self.findings)
        lines = [f"{f.verdict:4}  {f.what:{width}}  {f.value}" for f in self.findings]
        return "\n".join([*lines, "", self.sentence])

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, escape=True)
        return f"{table}<p>{html.escape(self.sentence)}</p>"


def check_influence(
    influence: Fitting,
    test: EmpiricalRisk,
    *,
    refit: Any = None,
    higher_is_better: bool = False,
    subsets: int = 30,
    seeds: int | Sequence[int] = 2,
    others: Sequence[Fitting] = (),
    options: Mapping[str, Any] | None = None,
) -> Check:
    """Look at everything that can be looked at; see `Influence.check`."""
    findings = [
        at_a_minimum(influence),
        same_every_time(influence),
        solved(influence, test),
        damped(influence),
        other_dampings(influence, test),
    ]
    if others:
        findings.append(other_seeds(influence, test, others))
    findings.append(far_enough(influence, test))
    if refit is None:
        return Check(tuple(findings), _sentence(findings, None))
    masks = random_subsets(influence.training.n, subsets, share=0.5)
    found = retrain(refit, masks, seeds=seeds, **(options or {}))
    sign = -1.0 if higher_is_better else 1.0
    actual = sign * found.mean
    used = np.isfinite(actual).all(1)
    dropped = torch.from_numpy(~masks[used])
    table, prediction = _by_damping(influence, test, dropped, actual[used])
    finding = against_retraining(prediction, actual[used], table)
    findings.append(finding)
    return Check(
        findings=tuple(findings),
        sentence=_sentence(findings, finding),
        predicted=prediction.after.numpy(),
        first_order=prediction.first_order.numpy(),
        actual=actual[used],
        dampings=table,
        retrained=found,
    )


def _sentence(findings: Iterable[Finding], retraining: Finding | None) -> str:
    against = [f for f in findings if f.verdict == "poor"]
    doubtful = [f for f in findings if f.verdict == "fair"]
    if against:
        told = " ".join(f"{f.what.capitalize()}: {f.meaning}." for f in against)
        return f"Do not rely on these scores yet. {told}"
    if retraining is not None:
        head = (
            "These scores can be believed: retraining agrees with them"
            if retraining.verdict == "good"
            else "These scores tell part of the truth: retraining agrees with them in part"
        )
        head += f" ({retraining.value})."
    elif doubtful:
        head = "Nothing speaks strongly against these scores."
    else:
        head = "These scores can be believed as far as can be seen without retraining."
    told = " ".join(f"{f.what.capitalize()}: {f.meaning}." for f in doubtful if f is not retraining)
    return f"{head} {told}".strip()


def _by_damping(
    influence: Fitting, test: EmpiricalRisk, dropped: Tensor, actual: np.ndarray
) -> tuple[pd.DataFrame, Prediction]:
    """LDS of both predictions at λ and around it; the prediction at λ."""
    own = one_damping(influence.damping)
    lines: list[dict[str, float]] = []
    kept: Prediction | None = None
    for factor in DAMPINGS:
        prediction = predict(influence, test, dropped, factor * own)
        kept = prediction if factor == 1.0 else kept
        line = {"damping": factor * own, "factor": factor}
        for name, values in (("sum", prediction.first_order), ("newton", prediction.after)):
            score = prediction_score(values.numpy(), actual, bootstrap=0)
            line[name] = score.value
        lines.append(line)
    return pd.DataFrame(lines), cast("Prediction", kept)
