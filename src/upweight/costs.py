"""What a method will cost, in operations and bytes, before anything runs; what it may take.

Letters: n rows, p parameters, K roots per row, m test rows, o/i outputs/inputs of a layer.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

__all__ = ["PILOT_RTOL", "Cost", "Memory", "Workload", "told_bytes"]

PILOT_RTOL = 1e-5

NUMBER = 8  # bytes: factorisations and solutions are kept in float64

UNITS = {"": 1, "B": 1} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("KMGT", 1)
    for end, base in (("iB", 1024), ("B", 1000))
}


def told_bytes(count: float) -> str:
    """Bytes in words.

    Examples
    --------
    >>> told_bytes(3 * 2**20), told_bytes(2.5 * 2**30)
    ('3 MiB', '2.5 GiB')
    """
    if count >= 2**30:
        return f"{count / 2**30:,.1f} GiB"
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"


@dataclass(frozen=True)
class Memory:
    """What the tensors of the work may take, beside the model, the rows and the results.

    Sizes of chunks follow from it alone, and not from what happens to be free: the same options
    give the same bytes.

    Attributes
    ----------
    limit
        Bytes; None: chunks of their usual sizes, and of the rest what it takes.
    kept
        How much of it the method needs throughout, as for factors; the chunks share what is left.

    Examples
    --------
    >>> memory = Memory.of("1 MiB")
    >>> memory.chunk(2**30), memory.chunk(2**10), memory.queries(2**10)
    (262144, 1024, 524288)
    >>> memory.keeping(2**19, "the matrix", "").chunk(2**30)
    131072
    """

    limit: int | None = None
    kept: int = 0

    @classmethod
    def of(cls, given: str | int | None) -> Memory:
        """From a number of bytes, or text such as ``"4GiB"`` or ``"500 MB"``."""
        if given is None:
            return cls()
        found = given
        if isinstance(given, str):
            parts = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", given)
            unit = {name.lower(): size for name, size in UNITS.items()}
            size = None if parts is None else unit.get(parts[2].lower())
            found = 0 if parts is None or size is None else int(float(parts[1]) * size)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise ValueError(
                f"expected memory as bytes, as text such as '4GiB' or '500 MB', or None; got "
                f"{given!r}"
            )
        return cls(found)

    def keeping(self, kept: int, what: str, advice: str) -> Memory:
        """The same, of which so much is needed throughout.

        Raises
        ------
        ValueError
            If that is more than there is.
        """
        if self.limit is not None and kept >= self.limit:
            raise ValueError(
                f"{what} take {told_bytes(kept)}, which leaves nothing of memory="
                f"{told_bytes(self.limit)} for the rows. {advice}"
            )
        return replace(self, kept=kept)

    def chunk(self, usual: int) -> int:
        """For the tensors of one chunk of rows: as usual, or a quarter of what is left."""
        return self._part(usual, 4)

    def queries(self, usual: int) -> int:
        """For what is held of solved test rows: as usual, or half of what is left."""
        return usual if self.limit is None else max(1, (self.limit - self.kept) // 2)

    def buffer(self, usual: int) -> int:
        """For one tensor on the way: as usual, or a sixteenth of what is left."""
        return self._part(usual, 16)

    def _part(self, usual: int, share: int) -> int:
        if self.limit is None:
            return usual
        return max(1, min(usual, (self.limit - self.kept) // share))

    def check_row(self, needed: float, what: str = "one row") -> None:
        """Refuse a row that does not fit into a chunk."""
        if self.limit is not None and 2 * needed > self.limit - self.kept:
            raise ValueError(
                f"{what} takes about {told_bytes(needed)}, more than half of what is left of "
                f"memory={told_bytes(self.limit)} beside {told_bytes(self.kept)} for the method. "
                f"Use memory= of {told_bytes(1.01 * (self.kept + 2 * needed))} or more, shorter "
                "rows, or fewer parameters with parameters="
            )


@dataclass(frozen=True)
class Workload:
    """The sizes that costs depend on.

    Attributes
    ----------
    n, p, m
        Training rows, parameters, right-hand sides (test rows).
    roots
        K, the roots of one row's output curvature: for cross-entropy the number of classes.
    layers
        (o, i) of every parameter with two dimensions or more, as a matrix.
    dense
        Whether the curvature is written out by products of small matrices (`curvature.linear`).
    gram
        Whether the curvature offers its roots RᵀR, of n·K rows.
    condition
        (λ_max + λ)/λ, estimated.
    pilot_steps
        Steps of conjugate gradients to 1e-5 for one right-hand side over some of the rows.
    """

    n: int
    p: int
    m: int
    roots: int
    layers: tuple[tuple[int, int], ...]
    dense: bool
    gram: bool
    condition: float
    pilot_steps: int

    @property
    def solved_bytes(self) -> int:
        """The test gradients and their solutions."""
        return 2 * NUMBER * self.p * self.m

    def cg_steps(self, rtol: float) -> int:
        """Steps of conjugate gradients: those of the pilot, for another tolerance."""
        return max(1, math.ceil(self.pilot_steps * math.log(2 / rtol) / math.log(2 / PILOT_RTOL)))

    def chebyshev_steps(self, rtol: float) -> int:
        """½√κ ln(2/rtol), the bound for polynomials that know the ends of the spectrum only."""
        return max(1, math.ceil(0.5 * self.condition**0.5 * math.log(2 / rtol)))


@dataclass(frozen=True)
class Cost:
    """Fit and solve together.

    Attributes
    ----------
    products
        Directional derivatives of all training rows: one for each column that C multiplies.
    calls
        In how many rounds, one after the other.
    flops
        Operations beside them.
    memory
        Bytes that are held at once, beside model and data.
    note
        What the estimate rests on.
    """

    products: float
    calls: float
    flops: float
    memory: float
    note: str = ""
