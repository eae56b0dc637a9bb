"""Test rows solved for and held, block by block, each in the cheapest form.

Letters: n training rows, m test rows, q groups, t and s positions of a test and a training row, o
outputs and i columns of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.costs import Memory
from upweight.curvature import KroneckerInverse
from upweight.layerwise.checking import check_sides
from upweight.layerwise.queries import Formed, Queries, Separable, Weighted
from upweight.layerwise.separable import Split, split_weight
from upweight.layerwise.sides import LayerGradients, Sides
from upweight.meter import release_freed
from upweight.risk import EmpiricalRisk

__all__ = ["HELD_BYTES", "Frames", "Held", "held_queries"]

# What the solved test rows of one pass over the training rows may take.
HELD_BYTES = 2**30
# Gradients of single test rows that are solved for together.
FORMED_BYTES = 2**26
# How many test rows of a group show what sums of products in place of weights cost.
SHOWN = 4

Form = Literal["formed", "weighted", "separable"]


@dataclass(frozen=True)
class Held:
    """Some test rows, ready to meet training rows.

    Attributes
    ----------
    rows
        Which ones.
    queries
        One for every block; None for a block that none of them uses.
    exact
        The first few again, without sums of products in place of weights; None where there are
        none.
    facts
        How they are held, in words.
    """

    rows: slice
    queries: Sequence[Queries | None]
    exact: Sequence[Queries | None] | None = None
    facts: Mapping[str, str] = field(default_factory=lambda: {})


def held_queries(
    inverse: KroneckerInverse, test: EmpiricalRisk, train_rows: int, stored: Frames | None = None
) -> Iterator[Held]:
    """The test rows in as large groups as may be held.

    Parameters
    ----------
    inverse
        (C + λI)⁻¹ by blocks.
    test
        The test rows.
    train_rows
        n, how many rows they will meet: what is done once for a test row pays with many.
    stored
        The frames of training rows that come rotated; default: as they come from the model.
    """
    frames = stored or Frames.of(inverse)
    collected: _Collected | None = None
    for chunk, sides in LayerGradients(inverse.curvature, test).chunks():
        check_sides(sides, chunk.start, "test")
        start = 0
        while start < len(chunk):
            if collected is None:
                plans = [
                    _plan(inverse, frames, at, side, test.n, train_rows)
                    for at, side in enumerate(sides)
                ]
                collected = _Collected(inverse, frames, plans, chunk.start + start, test.n)
            stop = min(len(chunk), start + collected.room)
            own = [None if s is None else s.rows(slice(start, stop)) for s in sides]
            collected.add(own, stop - start)
            start = stop
            if collected.room == 0 or chunk.start + stop == test.n:
                held, collected = collected.finish(), None
                if start == len(chunk):
                    sides = []
                release_freed()
                yield held
                del held


@dataclass(frozen=True)
class Frames:
    """The coordinates in which the blocks of test and training rows meet.

    Attributes
    ----------
    bases
        Eigenvectors of both sides, or the leading ones of them; None for the identity.
    weights
        1/(Λ + λ) in these coordinates, (q, o, i).
    values
        Λ.
    turned
        Whether training rows come in these coordinates; else in those of the parameters.
    formed
        For every block whether training rows come as gradients, and not as sides.
    """

    bases: Sequence[tuple[Tensor | None, Tensor | None]]
    weights: Sequence[Tensor]
    values: Sequence[Tensor]
    turned: bool
    formed: Sequence[bool]

    @classmethod
    def of(cls, inverse: KroneckerInverse) -> Frames:
        """All eigenvectors, for rows as they come from the model."""
        operators = [block.operator for block in inverse.curvature.blocks]
        return cls(
            [(operator.left, operator.right) for operator in operators],
            inverse.weights,
            [operator.values for operator in operators],
            turned=False,
            formed=[False for _ in operators],
        )


def rows_held(row_bytes: Sequence[int], memory: Memory) -> int:
    """How many test rows meet the training rows in one pass, from what one takes of every block."""
    return max(1, memory.queries(HELD_BYTES) // max(1, sum(row_bytes)))


@dataclass(frozen=True)
class _Plan:
    """How the test rows of one block are held, and what one takes."""

    form: Form
    row_bytes: int
    split: Split | None = None


def _plan(  # noqa: PLR0917
    inverse: KroneckerInverse, frames: Frames, at: int, sides: Sides | None, m: int, n: int
) -> _Plan:
    """The form with the fewest operations; among equals the smallest."""
    weight = frames.weights[at]
    q, o, i = weight.shape
    formed_bytes = q * o * i * weight.itemsize
    if sides is None or sides.right is None or frames.formed[at]:
        return _Plan("formed", formed_bytes)
    s = sides.positions
    if inverse.factored is not None:
        most = most_terms((q, o, i), s, m, n, turned=frames.turned)
        split = split_weight(frames.values[at], weight, most, inverse.factored)
        if split is not None:
            return _Plan("separable", q * s * (o + i) * weight.itemsize, split)
    form, numbers = cheapest((q, o, i), s, m, n, turned=frames.turned)
    return _Plan(form, numbers * weight.itemsize)


def _operations(
    shape: tuple[int, int, int], s: int, m: int, n: int, *, turned: bool
) -> tuple[int, int, int]:
    """Multiply-adds of a group for all rows: rotating them, and all of it by either form."""
    _, o, i = shape
    rotated = 0 if turned else n * s * (o**2 + i**2)
    formed = n * (m + s) * o * i + m * (s * o * i + 2 * o * i * (o + i))
    return rotated, formed, rotated + n * m * s * o * i


def cheapest(
    shape: tuple[int, int, int], s: int, m: int, n: int, *, turned: bool = False
) -> tuple[Form, int]:
    """The exact form for m test and n training rows with s positions, and its numbers per row."""
    q, o, i = shape
    _, formed, weighted = _operations(shape, s, m, n, turned=turned)
    if s * (o + i) < o * i and weighted <= 1.25 * formed:
        return "weighted", q * s * (o + i)
    return "formed", q * o * i


def most_terms(
    shape: tuple[int, int, int], s: int, m: int, n: int, *, turned: bool = False
) -> float:
    """With how many terms a sum of products takes as long as the cheapest exact form."""
    _, o, i = shape
    rotated, formed, weighted = _operations(shape, s, m, n, turned=turned)
    return (min(formed, weighted) - rotated) / (n * m * s * s * (o + i))


@dataclass
class _Collected:
    """Test rows of one group, as they come."""

    inverse: KroneckerInverse
    frames: Frames
    plans: Sequence[_Plan]
    start: int
    total: int  # m
    count: int = 0
    # of a block: solved gradients, or sides and how many rows have none, in order
    parts: list[list[Sides | Tensor | int]] = field(default_factory=lambda: [])

    def __post_init__(self) -> None:
        self.parts = [[] for _ in self.plans]
        self._memory = self.inverse.curvature.risk.memory
        self._most = rows_held([plan.row_bytes for plan in self.plans], self._memory)

    @property
    def room(self) -> int:
        """For how many more rows there is room."""
        return self._most - self.count

    def add(self, sides: Sequence[Sides | None], rows: int) -> None:
        """Solve for some rows, or keep what is needed for that.

        A layer may be left out for some rows, which then have no gradient there.
        """
        before = self.count
        self.count += rows
        for at, (plan, own) in enumerate(zip(self.plans, sides, strict=True)):
            if plan.form != "formed":
                turned = rows if own is None else own.rotated(*self.frames.bases[at])
                self.parts[at].append(turned)
            elif own is not None:
                self._solve(at, own, before)

    def _solve(self, at: int, own: Sides, start: int) -> None:
        """Set what is held of rows from `start` on, some at a time."""
        weight, back = self.frames.weights[at], self.inverse.block(at).back
        if not self.parts[at]:
            count = min(self._most, self.total - self.start)
            # a layer may be left out for some rows
            self.parts[at].append(weight.new_zeros(count, *weight.shape))
        (values,) = self.parts[at]
        assert isinstance(values, Tensor)
        some = max(1, self._memory.buffer(FORMED_BYTES) // max(1, weight.nbytes))
        for first in range(0, len(own), some):
            rows = own.rows(slice(first, first + some))
            solved = rows.rotated(*self.frames.bases[at]).formed() * weight
            place = values[start + first : start + first + len(rows)]
            place.copy_(solved if self.frames.turned else back(solved))

    def finish(self) -> Held:
        """The group."""
        queries = [self._queries(at) for at in range(len(self.plans))]
        exact: list[Queries | None] | None = None
        if any(plan.split is not None for plan in self.plans):
            exact = [self._exact(at, query) for at, query in enumerate(queries)]
        rows = slice(self.start, self.start + self.count)
        return Held(rows, queries, exact, _facts(self.plans))

    def _queries(self, at: int) -> Queries | None:
        plan, parts = self.plans[at], self.parts[at]
        if all(isinstance(part, int) for part in parts):
            return None
        self.parts[at] = []
        if plan.form == "formed":
            (values,) = parts
            assert isinstance(values, Tensor)
            return Formed(values, self._bases(at))
        left, right = _joined([part for part in parts if not isinstance(part, Tensor)])
        if plan.split is not None:
            return Separable(left, right, plan.split.u, plan.split.v, self._bases(at))
        return Weighted(left, right, self.frames.weights[at], self._bases(at))

    def _bases(self, at: int) -> tuple[Tensor | None, Tensor | None] | None:
        """What training rows have to be rotated by."""
        if self.frames.turned or self.plans[at].form == "formed":
            return None
        return self.frames.bases[at]

    def _exact(self, at: int, query: Queries | None) -> Queries | None:
        if isinstance(query, Formed):
            return Formed(query.values[:SHOWN], query.bases)
        if not isinstance(query, Weighted | Separable):
            return None
        left, right = query.left[:SHOWN], query.right[:SHOWN]
        return Weighted(left, right, self.frames.weights[at], query.bases)


def _facts(plans: Sequence[_Plan]) -> dict[str, str]:
    counted = {form: sum(plan.form == form for plan in plans) for form in get_args(Form)}
    found = {"blocks of test rows": ", ".join(f"{n} {form}" for form, n in counted.items() if n)}
    splits = [plan.split for plan in plans if plan.split is not None]
    if splits:
        ranks = [split.rank for split in splits]
        error = (sum(s.rest for s in splits) / sum(s.size for s in splits)) ** 0.5
        found["factored scores"] = (
            f"{min(ranks)} to {max(ranks)} terms in {len(splits)} of {len(plans)} blocks, expected "
            f"relative error of these {error:.2g}"
        )
    return found


def _joined(parts: Sequence[Sides | int]) -> tuple[Tensor, Tensor]:
    """Sides of consecutive rows, zero for those without any.

    Those with fewer positions get some that count nothing.
    """
    known = [part for part in parts if isinstance(part, Sides)]
    longest = max(part.positions for part in known)

    def whole(sides: Sequence[Tensor]) -> Tensor:
        q, _, d = sides[0].shape[1:]
        left = iter(sides)
        padded = [
            sides[0].new_zeros(part, q, longest, d)
            if isinstance(part, int)
            else F.pad(side := next(left), (0, 0, 0, longest - side.shape[2]))
            for part in parts
        ]
        return padded[0] if len(padded) == 1 else torch.cat(padded)

    left = whole([part.left for part in known])
    return left, whole([part.right for part in known if part.right is not None])
