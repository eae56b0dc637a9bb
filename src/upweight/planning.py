"""What each method would cost on this model and these rows, and which one to take.

Operations and bytes come from `Recipe.cost`; seconds from a pilot: a product with the curvature of
some rows, and a product of matrices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from upweight.costs import NUMBER, PILOT_RTOL, Cost, Workload
from upweight.curvature.coverage import coverage
from upweight.inverse import NegativeCurvatureError, conjugate_gradients
from upweight.inverse.lanczos import lanczos, random_columns
from upweight.layerwise import plan_layers
from upweight.layerwise.planning import TERMS
from upweight.operator import LinearOperator, free_memory
from upweight.recipes import CG, EKFAC, KFAC, Direct, Nystroem, Recipe

__all__ = ["Auto", "Plan", "make_plan", "plan_by_layers", "propose"]

# Factorising more parameters takes minutes, and more than a gigabyte.
DIRECT_PARAMETERS = 10_000
# With more, the right-hand sides of conjugate gradients alone fill a machine.
ITERATIVE_PARAMETERS = 20_000_000
# Directions of the sketch that preconditions conjugate gradients.
SKETCHED = 50
# Modules in the text of a plan: the largest, and as many without factors.
SHOWN_MODULES = 6
COLUMNS = ["method", "memory_mib", "products", "seconds", "note"]
PILOT_ROWS = 512
PILOT_COLUMNS = 16
PILOT_STEPS = 200


def propose(p: int, rank: int, free: int | None) -> tuple[Recipe, str]:
    """A recipe for p parameters, a curvature of at most this rank and so much free memory.

    Examples
    --------
    >>> propose(547, 547, 2**33)[0].name, propose(10**6, 10**6, 2**33)[0].name
    ('direct', 'cg+nystroem')
    """
    side = min(p, rank)
    needed = 2.5 * NUMBER * side * p
    if side <= DIRECT_PARAMETERS and (free is None or needed <= free / 2):
        return Direct(), (
            f"{p:,} parameters: the matrix or its smaller side ({side:,}) takes "
            f"{needed / 2**20:,.0f} MiB, and factorising it is exact"
        )
    if p <= ITERATIVE_PARAMETERS:
        why = (
            f"{p:,} parameters are too many to factorise; conjugate gradients are exact to their "
            "tolerance and need products only"
        )
        sketch = 4 * NUMBER * SKETCHED * p
        if free is None or sketch <= free / 4:
            return CG(preconditioner=Nystroem(rank=min(SKETCHED, p))), why
        return CG(), why
    return EKFAC(), (
        f"{p:,} parameters: solutions of every test row are too many for an iteration; Kronecker "
        "factors need two passes over the rows"
    )


@dataclass(frozen=True)
class Auto:
    """The method that `propose` finds for the model at hand: exact where it can be."""

    @property
    def name(self) -> str:
        """``"auto"``."""
        return "auto"

    def chosen(self, curvature: LinearOperator) -> tuple[Recipe, str]:
        """The recipe for this curvature, and why."""
        rank = int(getattr(curvature, "rank_bound", curvature.size))
        return propose(curvature.size, rank, free_memory(curvature.device))

    def prepare(self, curvature: LinearOperator) -> Any:
        """Prepare the recipe that was chosen."""
        return self.chosen(curvature)[0].prepare(curvature)

    def cost(self, work: Workload) -> Cost:
        """Of the recipe that would be chosen."""
        rank = work.n * work.roots if work.gram else work.p
        return propose(work.p, rank, None)[0].cost(work)


@dataclass(frozen=True)
class Plan:
    """Memory, products and time of several methods, before any of them runs.

    Attributes
    ----------
    table
        A line per method: ``memory_mib`` beside model and data, ``products`` with the curvature
        (one for each column), ``seconds`` for fit and scores together, ``note``.
    proposal, reason
        The method for this model, and why it.
    work
        The sizes that the estimates rest on.
    phases
        For `EKFAC` and `KFAC` step by step: ``phase``, ``flops`` of products of matrices, ``mib``
        that tensors take at its peak, results included, ``seconds``, ``passes`` over the training
        rows, ``rows`` of a chunk. The allocator of a CPU keeps some of what tensors leave: a few
        MiB where there is a ``memory=``, else up to as much again. None for other methods.
    coverage
        For those methods: how the parameters of every module are dealt with, as `coverage` says.
    """

    table: pd.DataFrame
    proposal: Recipe
    reason: str
    work: Workload
    phases: pd.DataFrame | None = None
    coverage: pd.DataFrame | None = None

    def __str__(self) -> str:
        if self.phases is not None:
            return self._by_phase(self.phases)
        work = self.work
        shown = self.table.copy()
        shown["memory_mib"] = shown["memory_mib"].map("{:,.0f}".format)
        shown["products"] = shown["products"].map("{:,.0f}".format)
        shown["seconds"] = shown["seconds"].map("{:,.2g}".format)
        return (
            f"{work.n:,} training rows, {work.m:,} test rows, {work.p:,} parameters, "
            f"condition about {work.condition:,.0f}\n"
            f"{shown.to_string(index=False)}\n"
            f"proposed: {self.proposal!r}\n{self.reason}"
        )

    def _by_phase(self, phases: pd.DataFrame) -> str:
        shown = phases.copy()
        for column, form in (("flops", "{:,.2g}"), ("mib", "{:,.0f}"), ("seconds", "{:,.2g}")):
            shown[column] = shown[column].map(form.format)
        shown["passes"] = shown["passes"].map("{:g}".format)
        line = self.table.iloc[0]
        return "\n".join(
            [
                f"{line['method']}: {self.work.n:,} training rows, {self.work.m:,} test rows, "
                f"{self.work.p:,} parameters; about {line['memory_mib']:,.0f} MiB and "
                f"{line['seconds']:,.2g} s",
                shown.to_string(index=False),
                str(line["note"]),
                *([] if self.coverage is None else _covered(self.coverage)),
            ]
        )

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False, escape=True) + f"<p>proposed: {self.reason}</p>"


def make_plan(
    curvature: LinearOperator, methods: Sequence[Recipe], damping: float, test_rows: int
) -> Plan:
    """Estimates for these methods on a curvature that has a risk."""
    risk: Any = getattr(curvature, "risk", None)
    if risk is None:
        raise TypeError(f"expected a curvature of a model and rows to plan for; got {curvature!r}")
    pilot = _Pilot(curvature, risk, damping)
    condition = (pilot.largest + damping) / damping if damping else float("inf")
    work = _workload(curvature, risk, test_rows, condition, pilot.steps)
    rank = int(getattr(curvature, "rank_bound", curvature.size))
    proposal, reason = propose(risk.p, rank, free_memory(curvature.device))
    lines = [_line(recipe, recipe.cost(work), work, pilot) for recipe in methods]
    reason = ". ".join([reason, *pilot.notes])
    return Plan(pd.DataFrame(lines, columns=pd.Index(COLUMNS)), proposal, reason, work)


def _workload(
    curvature: LinearOperator,
    risk: Any,
    test_rows: int,
    condition: float = 1.0,
    pilot_steps: int = 1,
) -> Workload:
    shapes = [shape for shape in risk.model.shapes if len(shape) > 1]
    roots = int(getattr(getattr(curvature, "form", None), "root_count", 0))
    roots = roots or int(torch.Size(risk.output_shape).numel())
    rank = int(getattr(curvature, "rank_bound", curvature.size))
    return Workload(
        n=risk.n,
        p=risk.p,
        m=test_rows,
        roots=roots,
        layers=tuple((int(s[0]), int(torch.Size(s[1:]).numel())) for s in shapes),
        dense=risk.taps() is not None,
        # not where the output is too wide for roots
        gram=hasattr(curvature, "factor_rows") and rank == risk.n * roots,
        condition=min(condition, 1e12),
        pilot_steps=pilot_steps,
    )


def _covered(table: pd.DataFrame) -> list[str]:
    """The largest modules, and how many parameters are dealt with in each way."""
    counts: dict[str, int] = {}
    for how, count in zip(table["how"].tolist(), table["parameters"].tolist(), strict=True):
        counts[how] = counts.get(how, 0) + count
    total = sum(counts.values())
    told = ", ".join(f"{how} {100 * count / total:.1f} %" for how, count in counts.items())
    largest = table.sort_values("parameters", ascending=False, kind="stable").head(SHOWN_MODULES)
    rest = table.loc[(table["how"] != "kronecker") & ~table.index.isin(largest.index)]
    shown = pd.concat([largest, rest.head(SHOWN_MODULES)]).sort_index()
    # one reason for all that have factors is enough
    shown["why"] = shown["why"].where(shown["how"] != "kronecker", "")
    more = len(table) - len(shown)
    lines = [f"parameters: {told}", shown.to_string(index=False)]
    return [*lines, f"… and {more} more modules"] if more else lines


def plan_by_layers(
    curvature: LinearOperator, recipe: EKFAC | KFAC, test_rows: int, certify: int | None
) -> Plan:
    """A plan for `EKFAC` or `KFAC`, step by step; no product with the curvature is made."""
    risk: Any = getattr(curvature, "risk", None)
    if risk is None:
        raise TypeError(f"expected a curvature of a model and rows to plan for; got {curvature!r}")
    wanted = getattr(recipe, "correction_rows", None)
    share = max(1, round(wanted * risk.n)) if isinstance(wanted, float) else wanted
    found = plan_layers(
        risk,
        recipe,
        test_rows,
        corrected=isinstance(recipe, EKFAC),
        correcting=min(risk.n, share or risk.n),
        certified=test_rows if certify is None else certify,
    )
    rank = int(getattr(curvature, "rank_bound", curvature.size))
    proposal, reason = propose(risk.p, rank, free_memory(curvature.device))
    held = "at once" if found.groups == 1 else f"in {found.groups} groups, with a pass for each"
    note = f"test rows are held {held}"
    if recipe.factored is not None:
        note += f"; factored scores are taken to need {TERMS} terms, which Λ decides"
    table = pd.DataFrame(
        [(recipe.name, found.bytes / 2**20, 0.0, found.seconds, note)], columns=pd.Index(COLUMNS)
    )
    work = _workload(curvature, risk, test_rows)
    return Plan(table, proposal, reason, work, found.phases, coverage(risk))


def _line(recipe: Recipe, cost: Cost, work: Workload, pilot: _Pilot) -> tuple[Any, ...]:
    scoring = 2.0 * work.n * work.m * work.p
    seconds = (
        cost.calls * pilot.call_seconds
        + cost.products * pilot.column_seconds
        + (cost.flops + scoring) / pilot.flops
    )
    return recipe.name, cost.memory / 2**20, cost.products, seconds, cost.note


class _Pilot:
    """What a product takes here: for every call, and for every column of all rows."""

    def __init__(self, curvature: LinearOperator, risk: Any, damping: float) -> None:
        self.notes: list[str] = []
        on_rows: Any = getattr(curvature, "on_rows", None)
        n = min(PILOT_ROWS, risk.n)
        rows = [i * (risk.n - 1) // max(1, n - 1) for i in range(n)]
        small = curvature if on_rows is None else on_rows(rows)
        share = 1.0 if on_rows is None else n / risk.n
        columns = random_columns(small, min(PILOT_COLUMNS, small.size), 0)
        _ = small @ columns  # the first call imports parts of torch
        one = _seconds(lambda: small @ columns[:, :1])
        many = _seconds(lambda: small @ columns)
        per_column = max(0.0, many - one) / max(1, columns.shape[1] - 1)
        self.column_seconds = max(per_column, many / columns.shape[1] / 10) / share
        self.call_seconds = max(0.0, one - per_column)
        ritz = lanczos(small, columns[:, 0], 8)
        self.largest = float((ritz.values + ritz.errors).max())
        self.steps = self._cg_steps(small, damping)
        square = torch.ones(512, 512, dtype=torch.float64, device=curvature.device)
        self.flops = 2 * 512.0**3 / _seconds(lambda: square @ square)

    def _cg_steps(self, small: Any, damping: float) -> int:
        """Steps for a gradient of rows with random signs."""
        generator = torch.Generator().manual_seed(1)
        signs = torch.randn(small.risk.n, 1, generator=generator, dtype=torch.float64).sign()
        right = small.risk.rmatmul(signs / small.risk.n)
        try:
            solved = conjugate_gradients(
                small.damped(damping), right, rtol=PILOT_RTOL, max_steps=PILOT_STEPS
            )
        except NegativeCurvatureError:
            self.notes.append(
                "C + λI is indefinite: conjugate gradients and LiSSA will not solve it"
            )
            return PILOT_STEPS
        return int(solved.steps.max())


def _seconds(work: Callable[[], Tensor]) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        float(work()[0, 0])  # waits for a device
        best = min(best, time.perf_counter() - start)
    return best
