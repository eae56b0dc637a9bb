"""The damping λ at which predictions agree with what can be observed.

*By held-out rows.* Of a fitted model two numbers are known of which one is a removal effect: the
mean loss on rows that it was not trained on, and (by `upweight.prediction`) the loss on training
rows that it is predicted to have without them. Both estimate the loss on new rows, so

    1/n Σ_f Σ_{i∈fold f} ℓ_i(θ + δ_{−f}(λ)) = 1/m Σ_j ℓ_j(θ)

The left side falls as λ grows, down to the training loss, and one λ is where the two meet. No model
is retrained, and nothing needs to be known of the training.

*By the record of the training*: `TrainingRecord`. *By the scale of the curvature*: its mean
eigenvalue, where nothing else is known, or where a network would be given less.

Letters: n training rows, m held-out rows, p parameters, F folds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from upweight.inverse import NegativeCurvatureError
from upweight.inverse.approximate import as_preconditioner
from upweight.inverse.spectrum import mean_eigenvalue, top_eigenvalue
from upweight.operator import LinearOperator, free_memory
from upweight.prediction import losses_at, removal_gradients, removal_steps, together
from upweight.recipes import Nystroem
from upweight.record import TrainingRecord
from upweight.risk import EmpiricalRisk

__all__ = ["DampingChoice", "by_held_out", "choose_damping"]

FOLDS = 20
# Rows in all folds: more would make the estimate hardly less noisy than the held-out loss is.
FOLDED_ROWS = 4000
# The range of the search, relative to the largest eigenvalue, and the ratio at which it ends.
LOWEST, HIGHEST, WITHIN = 1e-7, 1e4, 1.15
RTOL = 1e-3
# The share of the mean eigenvalue that is taken where nothing else is known, and for blocks, as
# measured in benchmarks/damping.py: there the best was 0.5 to 5, and 0.05 to 2 by EK-FAC.
SCALE, BLOCK_SCALE = 1.0, 0.1
# What round-off leaves of a linear model's deviation from its own derivative.
LINEAR = 1e-3
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
        interpolation; kept where the mean eigenvalue takes the place of the λ between them. None
        otherwise, or where the search did not get there.
    tried
        Of ``"held-out"``, and kept like them: every λ tried, with the predicted loss and its
        standard error.
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
    """λ by the training's record where it is known, else by held-out rows, else by scale.

    With both, and a model that is not linear in its parameters, the larger of the two.

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

    Raises
    ------
    ValueError
        If there is nothing to go by: the curvature is zero.
    """
    if blocks:
        value, why = _by_scale(curvature, BLOCK_SCALE)
        why = f"between blocks the curvature is taken as zero, so that its own scale counts; {why}"
        return DampingChoice(value, "scale", why)
    recorded = None if record is None else DampingChoice(record.damping, "record", record.why)
    if recorded is None and held_out is None:
        return _unknown(curvature)
    linear = is_linear(train)
    choice, why_not = recorded, ""
    if held_out is not None and (recorded is None or not linear):
        found = by_held_out(curvature, train, held_out, seed=seed)
        if isinstance(found, str):
            why_not = f"{found}; "
        else:
            choice = _larger(found, recorded)
    if choice is None:
        return _unknown(curvature, why_not)
    choice = replace(choice, why=why_not + choice.why)
    return choice if linear else _above_the_mean(curvature, choice)


def _unknown(curvature: LinearOperator, why_not: str = "") -> DampingChoice:
    """λ by the scale of the curvature, where neither held-out rows nor a record tell."""
    value, why = _by_scale(curvature, SCALE)
    why += ". Held-out rows, fit(train, held_out=…), or a TrainingRecord tell more"
    return DampingChoice(value, "scale", why_not + why)


def _larger(found: DampingChoice, recorded: DampingChoice | None) -> DampingChoice:
    """Of two choices for a network the one that predicts smaller steps."""
    if recorded is None:
        return found
    one, other = sorted((found, recorded), key=lambda choice: choice.value, reverse=True)
    return replace(one, why=f"{one.why}. The {other.how} alone says {other.value:.3g}")


def _above_the_mean(curvature: LinearOperator, choice: DampingChoice) -> DampingChoice:
    """The choice for a network, or the mean eigenvalue where that is larger.

    A smaller λ allows steps that leave the region where a network is near its linearisation. Over
    the settings of benchmarks/damping.py the larger of the two was near the best of all λ; a model
    that is linear in θ has no such region, and for it the choice itself was.
    """
    floor = SCALE * mean_eigenvalue(curvature)
    if floor <= choice.value:
        return choice
    why = (
        f"the mean eigenvalue of the curvature, because {choice.value:.3g}, by {choice.how}, is "
        f"below it, and a network is linear only near its weights ({choice.why})"
    )
    return replace(choice, value=floor, how="scale", why=why)


def is_linear(risk: EmpiricalRisk) -> bool:
    """Whether the output is linear in θ, as far as one random step of the size of θ shows."""
    model = risk.model
    with model.evaluating():
        theta = model.parameters()
        flat = model.flatten(theta)
        generator = torch.Generator().manual_seed(0)
        step = torch.randn(flat.shape, generator=generator, dtype=torch.float64).to(flat)
        step *= torch.linalg.vector_norm(flat).clamp(min=1.0) / torch.linalg.vector_norm(step)
        batch = next(risk.chunks()).batch

        def output(parameters: Any) -> Tensor:
            return model(parameters, batch)

        linear = risk.autodiff.pushforward(output, theta, model.unflatten(step[None]))[0]
        rest = torch.linalg.vector_norm(output(model.moved(step)) - output(theta) - linear)
        return float(rest) <= LINEAR * float(torch.linalg.vector_norm(linear))


def _by_scale(curvature: LinearOperator, share: float) -> tuple[float, str]:
    mean, why = mean_eigenvalue(curvature), f"{share:g} times the mean eigenvalue"
    if mean <= 0.0 and not curvature.semidefinite:
        mean, why = top_eigenvalue(curvature), f"{share:g} times the largest eigenvalue, as the"
        why += " mean is not above 0"
    value = share * mean
    if not torch.finfo(torch.float32).tiny < value < math.inf:
        raise ValueError(
            f"damping='auto' finds no scale: the mean eigenvalue of the curvature is {mean:.2g}. "
            "The training loss may be zero to the last digit. Give a number for the damping"
        )
    return value, why


def by_held_out(
    curvature: LinearOperator, train: EmpiricalRisk, held_out: EmpiricalRisk, *, seed: int = 0
) -> DampingChoice | str:
    """λ where the predicted loss of left-out training rows is that of held-out rows.

    Returns
    -------
    DampingChoice, or why there is none: there is one training row only; the held-out loss is not
    above the training loss, so that no damping is too large; or it is above what the smallest
    damping predicts.
    """
    if train.n < 2:
        return "there is one training row only, and none to leave out"
    losses = held_out.losses().to("cpu", torch.float64)
    wanted, error = float(losses.mean()), _standard_error(losses)
    fitted = float(train.losses().double().mean())
    if wanted <= fitted:
        return (
            f"the held-out loss ({wanted:.4g}) is not above the training loss ({fitted:.4g}), "
            "which any large damping predicts"
        )
    search = _Search(curvature, train, seed)
    found = search.solve(wanted)
    if isinstance(found, str):
        return found
    at_found = search.seen[min(search.seen, key=lambda damping: abs(math.log(damping / found)))]
    spread = math.hypot(error, at_found[1])
    plus_minus = f" ± {error:.2g}" if math.isfinite(error) else ""
    return DampingChoice(
        value=found,
        how="held-out",
        why=(
            f"there the loss predicted for left-out training rows is the held-out loss, "
            f"{wanted:.4g}{plus_minus} over {held_out.n} rows (training loss {fitted:.4g})"
        ),
        low=search.crossing(wanted + spread),
        high=search.crossing(wanted - spread),
        tried=search.table(),
    )


class _Search:
    """The predicted loss of left-out training rows as a function of λ."""

    def __init__(self, curvature: LinearOperator, train: EmpiricalRisk, seed: int) -> None:
        self.curvature = curvature
        self.train = train
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(train.n, generator=generator)[:FOLDED_ROWS]
        self.folds = list(rows.tensor_split(min(FOLDS, len(rows))))
        self.dropped = torch.zeros(len(self.folds), train.n, dtype=torch.bool)
        for mask, fold in zip(self.dropped, self.folds, strict=True):
            mask[fold] = True
        self.gradients = removal_gradients(train, self.dropped)
        self.before = train.losses().to("cpu", torch.float64)
        self.prepared = _sketch(curvature)
        self.steps: Tensor | None = None
        self.seen: dict[float, tuple[float, float]] = {}

    def predicted(self, damping: float) -> float:
        """1/n Σ ℓ_i(θ + δ_{−f}), f the fold of row i; inf where C + λI is indefinite or singular.

        With more rows than are in folds, the mean loss of all and the mean change over the folds.
        """
        try:
            self.steps = self._solve(damping)
        except NegativeCurvatureError:
            self.steps = None
            self.seen[damping] = (math.inf, math.inf)
            return math.inf
        losses = torch.cat(
            [
                losses_at(_of_rows(self.train, fold), step)
                for fold, step in zip(self.folds, self.steps.T, strict=True)
            ]
        )
        change = losses - self.before[torch.cat(self.folds)]
        value = float(self.before.mean() + change.mean())
        self.seen[damping] = (math.inf if math.isnan(value) else value, _standard_error(losses))
        return self.seen[damping][0]

    def _solve(self, damping: float) -> Tensor:
        """δ_{−f} of every fold, (p, F)."""
        preconditioner = (
            None if self.prepared is None else as_preconditioner(self.prepared, damping)
        )
        every = torch.arange(len(self.folds)).split(together(self.train.p))
        return torch.cat(
            [
                removal_steps(
                    self.curvature,
                    ~self.dropped[part],
                    self.gradients[:, part],
                    damping,
                    preconditioner=preconditioner,
                    start=None if self.steps is None else self.steps[:, part],
                    rtol=RTOL,
                )
                for part in every
            ],
            dim=1,
        )

    def solve(self, wanted: float) -> float | str:
        """λ with predicted(λ) = wanted, by bisection of log λ; or why there is none."""
        top = top_eigenvalue(self.curvature)
        high = low = top
        if self.predicted(top) > wanted:
            while self.predicted(high := 10.0 * high) > wanted:
                low = high
                if high >= HIGHEST * top:
                    return f"even damping {high:.1e} predicts more than the held-out loss"
        else:
            while self.predicted(low := low / 10.0) <= wanted:
                high = low
                if low <= LOWEST * top:
                    return (
                        f"no damping above {low:.1e} predicts a loss of left-out rows as high as "
                        f"the held-out loss, {wanted:.4g} (the lowest predicts "
                        f"{self.seen[low][0]:.4g}): the held-out rows differ from the training "
                        "rows, or are too few to tell"
                    )
        while high / low > WITHIN:
            middle = math.sqrt(high * low)
            if self.predicted(middle) > wanted:
                low = middle
            else:
                high = middle
        if math.isinf(self.seen[low][0]):
            return (
                f"down to damping {high:.1e} the predicted loss of left-out rows, "
                f"{self.seen[high][0]:.4g}, is below the held-out loss, {wanted:.4g}, and below it "
                "the curvature with damping is singular or indefinite"
            )
        return _between(low, high, self.seen[low][0], self.seen[high][0], wanted)

    def crossing(self, wanted: float) -> float | None:
        """λ with predicted(λ) = wanted, between those that were tried; None outside of them."""
        tried = sorted(self.seen)
        for low, high in pairwise(tried):
            above, below = self.seen[low][0], self.seen[high][0]
            if above >= wanted >= below and math.isfinite(above):
                return _between(low, high, above, below, wanted)
        return None

    def table(self) -> pd.DataFrame:
        """λ → predicted loss and its standard error."""
        frame = pd.DataFrame.from_dict(self.seen, orient="index", columns=["predicted", "error"])
        return frame.sort_index().rename_axis("damping")


def _between(low: float, high: float, above: float, below: float, wanted: float) -> float:
    """λ between two of them, by interpolation in log λ."""
    share = (above - wanted) / max(above - below, 1e-300)
    return low * (high / low) ** share


def _sketch(curvature: LinearOperator) -> Any:
    """A preconditioner for every λ, where it is sure to be one and there is room for it."""
    rank = min(SKETCHED, curvature.size)
    free = free_memory(curvature.device)
    if not curvature.semidefinite or (free is not None and 32 * rank * curvature.size > free / 4):
        return None
    return Nystroem(rank=rank).prepare(curvature)


def _standard_error(losses: Tensor) -> float:
    return float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else math.inf


def _of_rows(risk: EmpiricalRisk, rows: Tensor) -> EmpiricalRisk:
    return risk.with_rows(risk.rows.subset(rows.tolist()))
