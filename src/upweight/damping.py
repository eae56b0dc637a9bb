"""The damping λ at which predictions agree with what can be observed.

*By held-out rows.* Of a fitted model two numbers are known of which one is a removal effect: the
mean loss on rows that it was not trained on, and (by `upweight.prediction`) the loss on training
rows that it is predicted to have without them. Both estimate the loss on new rows, so

    1/n Σ_f Σ_{i∈fold f} ℓ_i(θ + δ_{−f}(λ)) = 1/m Σ_j ℓ_j(θ)

The left side falls as λ grows, from above the right side to the training loss. No model is
retrained, and nothing needs to be known of the training.

*By the record of the training*: `TrainingRecord`. *By the scale of the curvature*, where nothing
else is known: a tenth of its mean eigenvalue.

Letters: n training rows, m held-out rows, p parameters, F folds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from upweight.inverse import NegativeCurvatureError
from upweight.inverse.approximate import as_preconditioner
from upweight.inverse.lanczos import lanczos, random_columns
from upweight.operator import LinearOperator
from upweight.prediction import losses_at, removal_gradients, removal_steps
from upweight.recipes import Nystroem
from upweight.record import TrainingRecord
from upweight.risk import EmpiricalRisk

__all__ = [
    "DampingChoice",
    "choose_damping",
    "lowest_eigenvalue",
    "mean_eigenvalue",
    "top_eigenvalue",
]

FOLDS = 20
# Rows in all folds: more would make the estimate hardly less noisy than the held-out loss is.
FOLDED_ROWS = 4000
# The bracket, relative to the largest eigenvalue, and the width at which the search ends.
LOWEST, WITHIN = 1e-7, 1.15
RTOL = 1e-2
PROBES = 16
# The share of the mean eigenvalue that is taken where nothing else is known.
SCALE = 0.1
LANCZOS_STEPS = 40
SKETCHED = 50


@dataclass(frozen=True)
class DampingChoice:
    """A damping, and why.

    Attributes
    ----------
    value
        λ.
    how
        ``"held-out"``, ``"record"`` or ``"scale"``; ``"cut"`` where a low-rank method knows no
        eigenvalue as low as theirs.
    why
        In words.
    low, high
        Where the two losses of ``"held-out"`` differ by one standard error of their difference, by
        interpolation; None otherwise, or where the search did not get there.
    tried
        Of ``"held-out"``: every λ tried, with the predicted loss and its standard error.
    """

    value: float
    how: str
    why: str
    low: float | None = None
    high: float | None = None
    tried: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __str__(self) -> str:
        ends = ["…" if end is None else f"{end:.2g}" for end in (self.low, self.high)]
        interval = f" ({ends[0]} to {ends[1]})" if self.how == "held-out" else ""
        return f"damping {self.value:.3g}{interval}, by {self.how}: {self.why}"


def choose_damping(
    curvature: LinearOperator,
    train: EmpiricalRisk,
    held_out: EmpiricalRisk | None = None,
    record: TrainingRecord | None = None,
    *,
    blocks: bool = False,
    seed: int = 0,
) -> DampingChoice:
    """λ by held-out rows if there are any, else by the training's record, else by scale.

    Parameters
    ----------
    curvature, train
        C and the training rows.
    held_out
        Rows drawn as the training rows were.
    record
        Of the training.
    blocks
        Whether C will be taken in blocks. Then always by scale: what is left out between blocks
        makes another damping the best than that of C, and neither held-out rows nor the record
        know of it.
    seed
        Of the folds.
    """
    why_not = ""
    if blocks:
        why_not = "between blocks the curvature is taken as zero, so that its own scale counts; "
    elif held_out is not None:
        found = by_held_out(curvature, train, held_out, seed=seed)
        if isinstance(found, DampingChoice):
            return found
        why_not = f"{found}; "
    if record is not None and not blocks:
        return DampingChoice(record.damping, "record", why_not + record.why)
    value = SCALE * mean_eigenvalue(curvature)
    why = f"{why_not}a tenth of the mean eigenvalue"
    if not blocks:
        why += ". Held-out rows, fit(train, held_out=…), or a TrainingRecord tell more"
    return DampingChoice(value, "scale", why)


def mean_eigenvalue(curvature: LinearOperator) -> float:
    """tr(C)/p by a few random probes (Hutchinson)."""
    probes = random_columns(curvature, PROBES, seed=0)
    quadratic = (probes * (curvature @ probes).to(probes)).sum(0) / probes.square().sum(0)
    return float(quadratic.mean().clamp(min=torch.finfo(torch.float32).tiny))


def by_held_out(
    curvature: LinearOperator, train: EmpiricalRisk, held_out: EmpiricalRisk, *, seed: int = 0
) -> DampingChoice | str:
    """λ where the predicted loss of left-out training rows is that of held-out rows.

    Returns
    -------
    DampingChoice, or why there is none: the held-out loss is not above the training loss, so that
    no damping is too large, or above what the smallest damping predicts.
    """
    search = _Search(curvature, train, seed)
    losses = held_out.losses().to("cpu", torch.float64)
    wanted, error = float(losses.mean()), _standard_error(losses)
    fitted = float(train.losses().double().mean())
    if train.n < 2 or wanted <= fitted:
        return (
            f"the held-out loss ({wanted:.4g}) is not above the training loss ({fitted:.4g}), "
            "which any large damping predicts"
        )
    found = search.solve(wanted)
    if isinstance(found, str):
        return found
    tried = search.table()
    at_found = search.seen[min(search.seen, key=lambda damping: abs(math.log(damping / found)))]
    spread = math.hypot(error, at_found[1])
    return DampingChoice(
        value=found,
        how="held-out",
        why=(
            f"there the loss predicted for left-out training rows is the held-out loss, "
            f"{wanted:.4g} ± {error:.2g} over {held_out.n} rows (training loss {fitted:.4g})"
        ),
        low=search.crossing(wanted + spread),
        high=search.crossing(wanted - spread),
        tried=tried,
    )


class _Search:
    """The predicted loss of left-out training rows as a function of λ."""

    def __init__(self, curvature: LinearOperator, train: EmpiricalRisk, seed: int) -> None:
        self.curvature = curvature
        self.train = train
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(train.n, generator=generator)[:FOLDED_ROWS]
        self.folds = list(
            order.sort()
            .values[torch.randperm(len(order), generator=generator)]
            .tensor_split(min(FOLDS, len(order)))
        )
        dropped = torch.zeros(len(self.folds), train.n, dtype=torch.bool)
        for mask, fold in zip(dropped, self.folds, strict=True):
            mask[fold] = True
        self.dropped = dropped
        self.gradients = removal_gradients(train, dropped)
        sketch = Nystroem(rank=min(SKETCHED, curvature.size)) if curvature.semidefinite else None
        self.prepared: Any = None if sketch is None else sketch.prepare(curvature)
        self.steps: Tensor | None = None
        self.seen: dict[float, tuple[float, float]] = {}

    def predicted(self, damping: float) -> float:
        """1/n Σ ℓ_i(θ + δ_{−f}) over the rows of the folds; inf where C + λI is indefinite."""
        preconditioner = (
            None if self.prepared is None else as_preconditioner(self.prepared, damping)
        )
        try:
            self.steps = removal_steps(
                self.curvature,
                ~self.dropped,
                self.gradients,
                damping,
                preconditioner=preconditioner,
                start=self.steps,
                rtol=RTOL,
            )
        except NegativeCurvatureError:
            self.steps = None
            self.seen[damping] = (math.inf, math.inf)
            return math.inf
        losses = torch.cat(
            [
                _losses_at(self.train, fold, step)
                for fold, step in zip(self.folds, self.steps.T, strict=True)
            ]
        )
        value = float(losses.mean())
        value = math.inf if math.isnan(value) else value
        self.seen[damping] = (value, _standard_error(losses))
        return value

    def solve(self, wanted: float) -> float | str:
        """λ with predicted(λ) = wanted, by bisection of log λ."""
        high = damping = top_eigenvalue(self.curvature)
        low: float | None = None
        # down from where the predictions are about the training loss
        lowest = LOWEST * high
        while damping > lowest:
            if self.predicted(damping) > wanted:
                low = damping
                break
            high, damping = damping, damping / 10.0
        if low is None:
            return (
                f"no damping above {damping:.1e} predicts a loss of left-out rows as high as the "
                f"held-out loss, {wanted:.4g}: the held-out rows differ from the training rows"
            )
        while high / low > WITHIN:
            middle = math.sqrt(high * low)
            if self.predicted(middle) > wanted:
                low = middle
            else:
                high = middle
        return math.sqrt(high * low)

    def crossing(self, wanted: float) -> float | None:
        """λ with predicted(λ) = wanted, between those that were tried; None outside of them."""
        tried = sorted(self.seen)
        for low, high in pairwise(tried):
            above, below = self.seen[low][0], self.seen[high][0]
            if above >= wanted >= below and math.isfinite(above):
                share = (above - wanted) / max(above - below, 1e-300)
                return low * (high / low) ** share
        return None

    def table(self) -> pd.DataFrame:
        """λ → predicted loss and its standard error."""
        frame = pd.DataFrame.from_dict(self.seen, orient="index", columns=["predicted", "error"])
        return frame.sort_index().rename_axis("damping")


def top_eigenvalue(curvature: LinearOperator) -> float:
    """The largest eigenvalue, roughly, by a few power steps."""
    vector = random_columns(curvature, 1, seed=1)
    size = 0.0
    for _ in range(8):
        vector = (curvature @ vector).to(vector)
        size = float(torch.linalg.vector_norm(vector))
        if size == 0.0:
            return torch.finfo(torch.float32).tiny
        vector = vector / size
    return size


def lowest_eigenvalue(curvature: LinearOperator) -> float:
    """The lowest Ritz value after some Lanczos steps: an upper bound of the lowest eigenvalue."""
    start = random_columns(curvature, 1, seed=2)[:, 0]
    return float(lanczos(curvature, start, min(LANCZOS_STEPS, curvature.size)).values.min())


def _standard_error(losses: Tensor) -> float:
    return float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else math.inf


def _losses_at(risk: EmpiricalRisk, rows: Tensor, step: Tensor) -> Tensor:
    own = risk.with_rows(risk.rows.subset(rows.tolist()))
    return losses_at(own, step).to("cpu", torch.float64)
