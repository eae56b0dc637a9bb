"""What a fit and scores by layers will take, step by step, before they are begun.

Bytes follow from the shapes of the layers and the sizes of chunks; seconds from a pilot, which runs
some rows through the model, and the products of every layer with what the rows have left there.

Letters: n training rows, m test rows, r rows of the pilot, K roots, q groups, s positions, o
outputs and i columns of a layer, d either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from upweight.curvature.capture import Capture, Piece, find_capture
from upweight.curvature.exact import Fisher
from upweight.curvature.moments import FORMED_BYTES, Corrections, Factors, may_keep
from upweight.curvature.needs import Needs, keep_for_factors
from upweight.curvature.rests import Rest, find_rests
from upweight.curvature.roots import Roots
from upweight.curvature.sites import Site
from upweight.layerwise import holding
from upweight.layerwise.queries import Formed, Queries, Separable, Weighted
from upweight.layerwise.sides import Sides
from upweight.risk import CHUNK_BYTES, EmpiricalRisk

__all__ = ["LayerPlan", "plan_layers"]

# A pilot runs more rows until it takes so long.
PILOT_SECONDS = 0.1
# Sides of the matrix whose eigendecomposition is timed.
PILOT_SIDE = 384
# Test rows of a pilot, for a straight line through the time they take.
PILOT_QUERIES = (8, 32)
# Training rows that they meet.
PILOT_MET = (32, 128)
# Terms of a factored weight before Λ is known.
TERMS = 16
# What a CPU's allocator has for what tensors have, where it is left to keep what was freed; between
# 1.1 and 2.1 in measurements with glibc, and not the same in every run.
ALLOCATOR = 1.2
# Multiplications of d³ in an eigendecomposition with eigenvectors.
EIGH_FLOPS = 9


@dataclass(frozen=True)
class LayerPlan:
    """What is known beforehand of a method by layers.

    Attributes
    ----------
    phases
        A line for each: ``phase``, ``flops`` of products of matrices, ``mib`` that tensors take at
        its peak, ``seconds``, ``passes`` over the training rows, ``rows`` of a chunk.
    groups
        In how many groups the test rows are held.
    """

    phases: pd.DataFrame
    groups: int

    @property
    def bytes(self) -> float:
        """The most of all phases."""
        return max(self.phases["mib"].tolist()) * 2**20

    @property
    def seconds(self) -> float:
        """All phases together."""
        return sum(self.phases["seconds"].tolist())


def plan_layers(
    risk: EmpiricalRisk,
    recipe: Any,
    test_rows: int,
    *,
    corrected: bool,
    correcting: int,
    certified: int = 0,
) -> LayerPlan:
    """A plan for training rows and so many test rows like them.

    Parameters
    ----------
    risk
        The training rows.
    recipe
        EKFAC or KFAC.
    test_rows
        m.
    corrected
        Whether eigenvalues are computed, from `correcting` of the rows.
    certified
        For how many test rows the residual is measured.

    Raises
    ------
    ValueError
        If the factors do not fit into the memory of the risk.
    """
    risk = risk.with_rows(risk.rows)  # whose memory may be set
    capture, reasons = find_capture(risk)
    rests = find_rests(risk, reasons, recipe.other)
    keep_for_factors(risk, capture.sites, rests, corrected=corrected)
    roots = Roots(recipe.fisher, recipe.samples, recipe.seed, None)
    work = _Work(risk, capture, rests, roots, recipe.factored, test_rows)
    lines = [*work.fit(corrected=corrected, correcting=correcting)]
    if certified:
        lines.append(work.certificate(min(certified, test_rows)))
    lines += work.scores()
    columns = pd.Index(["phase", "flops", "mib", "seconds", "passes", "rows"])
    return LayerPlan(pd.DataFrame(lines, columns=columns), work.groups)


Line = tuple[str, float, float, float, float, int]


class _Work:
    """The sizes of a fit and of scores, and what a pilot tells of them."""

    def __init__(  # noqa: PLR0917
        self,
        risk: EmpiricalRisk,
        capture: Capture,
        rests: list[Rest],
        roots: Roots,
        factored: float | None,
        m: int,
    ) -> None:
        self.risk, self.capture, self.m = risk, capture.whole().over(risk), m
        self.sites: tuple[Site, ...] = capture.sites
        self.needs = Needs.of(risk, capture.sites, rests)
        self.size = risk.dtype.itemsize
        self.factored = factored
        form = roots.form(risk)
        self.k = form.root_count
        self.numbers = capture.row_numbers
        self.rows = self._chunk(self.k, 0.0)
        self.fit_pilot = _Pilot(self.capture, roots.form, self.rows)
        empirical = _Pilot(self.capture, lambda some: Fisher(some, "empirical").form, self.rows)
        self.score_pilot = empirical
        self.plans = [self._held(*pair) for pair in zip(self.sites, self._sides(), strict=True)]
        each = sum(plan.row_bytes for plan in self.plans)
        each += sum(rest.size for rest in rests) * self.size
        self.most = holding.rows_held([max(1, int(each))], risk.memory)
        self.groups = math.ceil(m / self.most)
        self.held = min(m, self.most) * each
        self.rows_met = self._chunk(1, 2.0 * min(m, self.most) * self.size)

    def _chunk(self, roots: int, more: float) -> int:
        own = max(self.capture.row_bytes(roots), more + self.risk.activation_bytes, 1.0)
        most = int(self.risk.memory.chunk(CHUNK_BYTES) / own)
        return max(1, min(self.risk.n, most, self.risk.batch_size or self.risk.n))

    # --- the fit ---------------------------------------------------------------------------------

    def fit(self, *, corrected: bool, correcting: int) -> list[Line]:
        """Factors, eigenvectors, eigenvalues."""
        n, k, needs, pilot = self.risk.n, self.k, self.needs, self.fit_pilot
        row = (self.numbers[0] + k * self.numbers[1]) * self.size
        keep = corrected and correcting == n and may_keep(self.risk, self.numbers, k)
        kept = n * row if keep else 0
        before = max(0, kept - self.rows * row)  # the pieces of all chunks but the last
        chunk = self.rows * self.capture.row_bytes(k)
        chunks = math.ceil(n / self.rows)
        grams = self._flops(lambda q, s, o, i: 2 * q * s * (i**2 + k * o**2))
        seconds = n * pilot.seconds + _line(pilot.piece, self._add_factors(), n, chunks)
        gram = max((max(s.columns, s.outputs) ** 2 for s in self.sites), default=0) * self.size
        lines = [
            self._told(
                "factors", n * grams, needs.sums + before + chunk + gram, seconds, 1, self.rows
            )
        ]
        cubes = sum(q * d**3 for q, d, diagonal in self._matrices() if not diagonal)
        held = needs.sums + needs.vectors + needs.eigh + kept
        lines.append(
            self._told("eigenvectors", EIGH_FLOPS * cubes, held, cubes * self._eigh(), 0, 0)
        )
        if not corrected:
            return lines
        squares = self._flops(lambda q, s, o, i: 2 * q * (s * (i**2 + k * o**2) + k * s * o * i))
        seconds = _line(pilot.piece, self._add_corrections(), correcting, chunks)
        seconds += 0 if keep else correcting * pilot.seconds
        piece = self.rows * self.capture.row_bytes(k) if not keep else 0
        held = (
            needs.vectors
            + needs.wide_values
            + kept
            + max(piece, self._rotated(k) + (0 if keep else self.rows * row))
        )
        share = 0 if keep else correcting / n
        lines.append(
            self._told("eigenvalues", correcting * squares, held, seconds, share, self.rows)
        )
        return lines

    def _matrices(self) -> list[tuple[int, int, bool]]:
        pairs = [(s.groups, (s.outputs, s.columns), s.wide) for s in self.sites]
        return [(q, d, w) for q, sides, wide in pairs for d, w in zip(sides, wide, strict=True)]

    def _flops(self, of: Callable[[int, int, int, int], float]) -> float:
        """Σ over sites of a function of q, s, o and i."""
        sides = self._sides()
        return sum(
            of(site.groups, 0 if own is None else own.positions, site.outputs, site.columns)
            for site, own in zip(self.sites, sides, strict=True)
        )

    def _rotated(self, roots: int) -> float:
        """The rotated sides of the largest layer, their squares or what is formed of them."""
        most = 0.0
        formed = self.risk.memory.buffer(FORMED_BYTES)
        for site, own in zip(self.sites, self._sides(), strict=True):
            s = 0 if own is None else own.positions
            sides = self.rows * s * site.groups * (site.columns + roots * site.outputs) * self.size
            row = site.size * self.size
            more = max(sides, row) if s == 1 else min(max(formed, row), self.rows * row)
            most = max(most, sides + more)
        return most

    def _add_factors(self) -> Callable[[Piece], None]:
        sums = Factors(self.risk, self.sites, keep=False)
        return lambda piece: sums.add(piece.part(slice(0, len(self.sites))))

    def _add_corrections(self) -> Callable[[Piece], None]:
        vectors: list[tuple[Tensor | None, Tensor | None]] = []
        for site in self.sites:
            sides = zip((site.outputs, site.columns), site.wide, strict=True)
            u, v = (None if w else self._random(site.groups, d, d) for d, w in sides)
            vectors.append((u, v))
        corrections = Corrections(self.risk, self.sites, vectors)
        return lambda piece: corrections.add(piece.part(slice(0, len(self.sites))))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.risk.dtype, device=self.risk.device)

    def _eigh(self) -> float:
        """Seconds for one unit of d³."""
        d = min(PILOT_SIDE, max((d for _, d, wide in self._matrices() if not wide), default=1))
        x = torch.randn(1, d, d, dtype=torch.float64, device=self.risk.device)
        x = x @ x.mT
        return _seconds(lambda: torch.linalg.eigh(x)) / d**3

    # --- scores ----------------------------------------------------------------------------------

    def _sides(self) -> list[Sides | None]:
        """Of the pilot's rows, in all sites."""
        piece = self.score_pilot.piece
        found: list[Sides | None] = []
        for a, g in zip(piece.inputs, piece.slopes, strict=True):
            if isinstance(a, Tensor) and g is not None:
                found.append(Sides(g[0].transpose(1, 2), a.transpose(1, 2)))
            else:
                found.append(None)
        return found[: len(self.sites)]

    def _held(self, site: Site, own: Sides | None) -> _Held:
        shape = (site.groups, site.outputs, site.columns)
        s = 0 if own is None else own.positions
        form, row_numbers = holding.cheapest(shape, s, self.m, self.risk.n)
        if self.factored is not None and own is not None:
            q, o, i = shape
            if holding.most_terms(shape, s, self.m, self.risk.n) >= TERMS:
                return _Held("separable", s * q * (o + i) * self.size)
        return _Held(form, row_numbers * self.size)

    def certificate(self, columns: int) -> Line:
        """Residuals of some test rows, by products with the exact curvature."""
        p, n = self.risk.p, self.risk.n
        held = self.needs.vectors + 2 * self.needs.values + 6 * 8 * p * columns
        held += min(CHUNK_BYTES, n * 3 * self.risk.activation_bytes * columns)
        seconds = 4 * columns * n * self.score_pilot.seconds
        return self._told("certificate", 0.0, held, seconds, 1, 0)

    def scores(self) -> list[Line]:
        """Test rows, solved for and held; training rows that meet them."""
        n, m, base = self.risk.n, self.m, self.needs.scoring
        rows = self.rows_met
        chunk = min(m, self._chunk(1, 0.0)) * self.capture.row_bytes(1)
        buffer = 3 * min(self.risk.memory.buffer(holding.FORMED_BYTES), m * self.needs.largest)
        buffer *= any(plan.form == "formed" for plan in self.plans)
        solve = sum(self._solving(at) for at in range(len(self.sites)))
        seconds = m * (self.score_pilot.seconds + solve / self._speed())
        lines = [
            self._told("test rows", m * solve, base + self.held + chunk + buffer, seconds, 0, 0)
        ]
        meet = 2.0 * n * m * sum(self._meeting(at) for at in range(len(self.sites)))
        seconds = self.groups * n * self.score_pilot.seconds + self._meet()
        sides = sum(self.numbers) * self.size
        held = max(self.capture.row_bytes(1), sides + self._rotated(1) / self.rows) * rows
        held += base + self.held + m * n * self.size
        lines.append(self._told("training rows", meet, held, seconds, self.groups, rows))
        return lines

    def _solving(self, at: int) -> float:
        """Operations for one test row in one layer."""
        site, own = self.sites[at], self._sides()[at]
        s, o, i = 0 if own is None else own.positions, site.outputs, site.columns
        whole = s * o * i + o * i * (o + i) if self.plans[at].form == "formed" else 0
        return 2.0 * site.groups * (s * (o**2 + i**2) + whole)

    def _meeting(self, at: int) -> float:
        """Multiply-adds of one pair in one layer."""
        site, own, plan = self.sites[at], self._sides()[at], self.plans[at]
        s = 0 if own is None else own.positions
        if plan.form == "separable":
            return TERMS * s * s * site.groups * (site.outputs + site.columns)
        return site.size * (1 if plan.form == "formed" else s)

    def _speed(self) -> float:
        x = self._random(512, 512)
        return 2 * 512.0**3 / _seconds(lambda: x @ x)

    def _meet(self) -> float:
        """Seconds in which all training rows meet all test rows, by a straight line in m."""
        total = 0.0
        known: dict[Any, float] = {}
        for site, own, plan in zip(self.sites, self._sides(), self.plans, strict=True):
            if own is None:
                continue
            key = (site.groups, site.outputs, site.columns, own.positions, plan.form)
            if key not in known:
                known[key] = self._meet_one(site, own, plan.form)
            total += known[key]
        return total

    def _meet_one(self, site: Site, own: Sides, form: str) -> float:
        rows = [min(len(own), count) for count in PILOT_MET]
        queries = [min(self.m, count) for count in PILOT_QUERIES]
        times: list[list[float]] = []
        for m in queries:
            held = self._queries(site, own, form, m)
            times.append(
                [_seconds(lambda h=held, b=b: h.scores(own.rows(slice(0, b)))) for b in rows]
            )
        # bilinear in the test rows of a group and the rows of a chunk
        chunks = self.groups * math.ceil(self.risk.n / self.rows_met)
        by_m = [_through(rows, pair, min(self.rows_met, self.risk.n)) for pair in times]
        return chunks * _through(queries, by_m, min(self.m, self.most))

    def _queries(self, site: Site, own: Sides, form: str, m: int) -> Queries:
        q, o, i, s = site.groups, site.outputs, site.columns, own.positions
        wide = zip((o, i), site.wide, strict=True)
        u, v = (None if w else self._random(q, d, d) for d, w in wide)
        if form == "formed":
            return Formed(self._random(m, q, o, i))
        left, right = self._random(m, q, s, o), self._random(m, q, s, i)
        if form == "weighted":
            return Weighted(left, right, self._random(q, o, i), (u, v))
        return Separable(left, right, self._random(TERMS, q, o), self._random(TERMS, q, i), (u, v))

    def _told(  # noqa: PLR0917
        self, phase: str, flops: float, held: float, seconds: float, passes: float, rows: int
    ) -> Line:
        if self.risk.memory.limit is None and self.risk.device.type == "cpu":
            held *= ALLOCATOR
        return phase, flops, held / 2**20, seconds, passes, rows


@dataclass(frozen=True)
class _Held:
    """How the test rows of one layer are held, and what one takes."""

    form: str
    row_bytes: float


class _Pilot:
    """Some rows, captured; and the seconds that one takes."""

    def __init__(self, capture: Capture, form: Callable[[EmpiricalRisk], Any], most: int) -> None:
        rows = min(2, most)
        while True:
            few = capture.risk.with_rows(capture.risk.rows.subset(range(rows)))
            few.batch_size = None
            # all roots of the rows, of which the first piece is kept
            pieces: list[Piece] = []

            def once(few: EmpiricalRisk = few, found: list[Piece] = pieces) -> None:
                found[:] = [piece for _, piece in capture.over(few).pieces(form(few))]

            taken = _seconds(once)
            if taken > PILOT_SECONDS or rows == most:
                break
            rows = min(most, 2 * rows)
        self.piece = pieces[0]
        self.rows = rows
        self.seconds = taken / rows


def _through(at: list[int], values: list[float], wanted: float) -> float:
    """On the straight line through two points; never below what they grow by."""
    if at[0] == at[1]:
        return values[1] * wanted / at[1]
    slope = max(0.0, values[1] - values[0]) / (at[1] - at[0])
    return max(slope * wanted, values[1] + slope * (wanted - at[1]))


def _line(piece: Piece, add: Callable[[Piece], None], n: int, chunks: int) -> float:
    """Seconds for n rows in chunks, from those for one row and for all of a piece."""
    rows = max((g.shape[1] for g in piece.slopes if g is not None), default=0)
    if not rows:
        return 0.0
    one = Piece(
        [a[:1] if isinstance(a, Tensor) else None for a in piece.inputs],
        [None if g is None else g[:, :1] for g in piece.slopes],
        piece.first,
    )
    least, whole = _seconds(lambda: add(one)), _seconds(lambda: add(piece))
    slope = max(0.0, whole - least) / max(1, rows - 1)
    return chunks * least + slope * n


def _seconds(work: Callable[[], Any], repeats: int = 2) -> float:
    """The shortest of some runs; of one thread's own time where one thread works."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, clock() - start)
        if best > PILOT_SECONDS:
            break
    return best
