"""The answer to a check, and the retraining that it may rest on."""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from upweight.evaluate import Retrained, prediction_score, random_subsets, retrain
from upweight.evaluate.ranks import constant_columns
from upweight.fitting import Fitting
from upweight.inverse import IndefiniteCurvatureWarning
from upweight.prediction import Prediction
from upweight.risk import EmpiricalRisk
from upweight.trust.questions import (
    Finding,
    Verdict,
    against_retraining,
    asked,
    at_a_minimum,
    damped,
    far_enough,
    nothing_to_compare,
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
        (S, m): with a `refit`, what one Newton step and a sum of influences predict of the test
        rows without each random half of the rows, and what became of them; None without. Lower is
        better in all three, so that margins have a minus. S are the halves of which a run worked.
    dampings
        With a `refit`: the linear datamodeling score of both predictions at other dampings
        (``sum``, ``newton``), NaN where C + λI could not be solved.
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

    def to_dict(self) -> dict[str, Any]:
        """The answer, its verdict and the findings, as JSON takes them."""
        findings = [asdict(finding) for finding in self.findings]
        return {"sentence": self.sentence, "verdict": self.verdict, "findings": findings}

    def __repr__(self) -> str:
        width = max(len(f.what) for f in self.findings)
        lines = [f"{f.verdict:4}  {f.what:{width}}  {f.value}" for f in self.findings]
        return "\n".join([*lines, "", self.sentence])

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):  # or it cuts sentences off
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
    _check_sizes(influence, test, refit, subsets, others)
    with warnings.catch_warnings():
        # the finding about the damping says so once
        warnings.simplefilter("ignore", IndefiniteCurvatureWarning)
        findings = [
            asked("minimum", at_a_minimum, influence),
            asked("loss", same_every_time, influence),
            asked("solves", solved, influence, test),
            asked("damping", damped, influence),
            asked("other dampings", other_dampings, influence, test),
        ]
        if others:
            findings.append(asked("other seeds", other_seeds, influence, test, others))
        findings.append(asked("nonlinearity", far_enough, influence, test))
        if refit is None:
            return Check(tuple(findings), _sentence(findings, None))
        masks = random_subsets(influence.training.n, subsets, share=0.5)
        found = retrain(refit, masks, seeds=seeds, **(options or {}))
        return _with_retraining(influence, test, findings, found, -1.0 if higher_is_better else 1.0)


def _check_sizes(
    influence: Fitting, test: EmpiricalRisk, refit: Any, subsets: int, others: Sequence[Fitting]
) -> None:
    """Refuse what would fail after hours of training."""
    n = influence.training.n
    if n < 2:
        raise ValueError("check() takes rows away: expected at least two training rows; got one")
    for other in others:
        if other.training.n != n:
            raise ValueError(
                f"expected others fitted on the same {n} training rows; got one fitted on "
                f"{other.training.n}"
            )
    if refit is None:
        return
    if not callable(refit):
        raise TypeError(f"expected refit(rows, seed) → outputs (m,); got {refit!r}")
    if subsets < 3:
        raise ValueError(f"expected at least 3 subsets to rank; got {subsets}")
    for name, wanted, what in (("n", n, "training"), ("m", test.n, "test")):
        given = getattr(refit, name, wanted)
        if isinstance(given, int) and given != wanted:
            raise ValueError(
                f"expected a refit on the same {wanted} {what} rows; that one has {given}"
            )


def _with_retraining(
    influence: Fitting,
    test: EmpiricalRisk,
    findings: list[Finding],
    found: Retrained,
    sign: float,
) -> Check:
    """What the retrained models say, beside the other findings; sign −1 where higher is better."""
    actual = sign * found.mean  # (S, m)
    if actual.shape[1] != test.n:
        raise ValueError(
            f"expected a refit that gives one number for each of the {test.n} test rows; it gave "
            f"{actual.shape[1]}"
        )
    used = np.isfinite(actual).all(1)
    actual = actual[used]
    varies = len(actual) > 0 and not bool(constant_columns(actual).all())
    if len(actual) < 3 or not varies:
        finding = nothing_to_compare(found, len(actual))
        findings = [*findings, finding]
        return Check(tuple(findings), _sentence(findings, finding), retrained=found)
    dropped = torch.from_numpy(~found.masks[used])
    table, prediction = _by_damping(influence, test, dropped, actual)
    if prediction is None:
        finding = Finding("retraining", "no prediction", "poor", "C + λI cannot be solved")
        findings = [*findings, finding]
        sentence = _sentence(findings, finding)
        return Check(tuple(findings), sentence, actual=actual, dampings=table, retrained=found)
    finding = against_retraining(prediction, actual, table, found)
    findings = [*findings, finding]
    return Check(
        findings=tuple(findings),
        sentence=_sentence(findings, finding),
        predicted=prediction.after.numpy() if prediction.order == "newton" else None,
        first_order=prediction.first_order.numpy(),
        actual=actual,
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
) -> tuple[pd.DataFrame, Prediction | None]:
    """LDS of both predictions at λ and around it; the prediction at λ."""
    own = one_damping(influence.damping)
    lines: list[dict[str, float]] = []
    kept: Prediction | None = None
    for factor in DAMPINGS:
        line = {"damping": factor * own, "factor": factor, "sum": np.nan, "newton": np.nan}
        lines.append(line)
        try:
            prediction = predict(influence, test, dropped, factor * own)
            line["newton"] = _lds(prediction.after.numpy(), actual)
        except (ArithmeticError, ValueError):
            # indefinite with this damping: no step, but the inverse may exist, and the scores do
            try:
                prediction = predict(influence, test, dropped, factor * own, "first")
            except (ArithmeticError, ValueError):
                continue
        kept = prediction if factor == 1.0 else kept
        line["sum"] = _lds(prediction.first_order.numpy(), actual)
    return pd.DataFrame(lines), kept


def _lds(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Over the test rows whose predictions and outputs vary; NaN where none does."""
    finite = np.isfinite(predicted).all(0)
    predicted, actual = predicted[:, finite], actual[:, finite]
    vary = ~(constant_columns(predicted) | constant_columns(actual))
    if not vary.any():
        return float("nan")
    return prediction_score(predicted[:, vary], actual[:, vary], bootstrap=0).value
