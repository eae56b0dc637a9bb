"""How many bytes Kronecker factors take, step by step, from the shapes of the layers alone.

Letters: q groups, o outputs and i columns of a layer, d either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from upweight.costs import told_bytes
from upweight.curvature.rests import Rest
from upweight.curvature.sites import Site
from upweight.operator import wide
from upweight.risk import EmpiricalRisk

__all__ = ["Needs", "keep_for_factors"]

# Products on their way, of `block_bytes` each on a CPU.
PRODUCTS = 3 * 2**24


@dataclass(frozen=True)
class Needs:
    """Bytes that do not depend on the number of rows.

    Attributes
    ----------
    sums
        Factors A and G, and dense or diagonal blocks, as they are summed.
    vectors
        Eigenvectors, in the dtype of the model.
    values
        Λ, in the dtype of the model.
    wide_values
        Λ, as it is summed.
    eigh
        The most that one eigendecomposition has beside the sums.
    largest
        Λ of the largest layer.
    """

    sums: int
    vectors: int
    values: int
    wide_values: int
    eigh: int
    largest: int

    @classmethod
    def of(cls, risk: EmpiricalRisk, sites: Sequence[Site], rests: Sequence[Rest]) -> Needs:
        """Of these layers, and the parameters of no such layer."""
        size, big = risk.dtype.itemsize, wide(risk.dtype, risk.device).itemsize
        sums = vectors = eigh = 0
        for matrices in (*map(_matrices, sites), *map(_of_rest, rests)):
            for q, d, diagonal in matrices:
                sums += q * d * big if diagonal else q * d**2 * big
                vectors += 0 if diagonal else q * d**2 * size
                # the mean, its eigenvectors, and 2 d² numbers of LAPACK's syevd
                eigh = max(eigh, 0 if diagonal else 2 * (q + 1) * d**2 * big)
        values = sum(site.size for site in sites) + sum(rest.size for rest in rests)
        largest = max((site.size for site in sites), default=0)
        return cls(sums, vectors, values * size, values * big, eigh, largest * size)

    @property
    def scoring(self) -> int:
        """Eigenvectors, Λ and 1/(Λ + λ), and products on their way."""
        return self.vectors + 2 * self.values + PRODUCTS

    def fitting(self, *, corrected: bool) -> int:
        """The most that the fit holds beside rows."""
        eigen = self.sums + self.vectors + self.eigh + (0 if corrected else self.wide_values)
        last = self.sums + self.vectors + (self.wide_values + self.values if corrected else 0)
        return max(eigen, last)


def _matrices(site: Site) -> list[tuple[int, int, bool]]:
    """(q, d, whether it is a diagonal) of both factors."""
    sides = zip((site.outputs, site.columns), site.wide, strict=True)
    return [(site.groups, d, diagonal) for d, diagonal in sides]


def _of_rest(rest: Rest) -> list[tuple[int, int, bool]]:
    return [(1, rest.size, rest.kind == "diagonal")]


def keep_for_factors(
    risk: EmpiricalRisk, sites: Sequence[Site], rests: Sequence[Rest], *, corrected: bool | None
) -> None:
    """Set aside what the factors take of the risk's memory; with `corrected` None, they are known.

    Raises
    ------
    ValueError
        If that leaves nothing for the rows; the largest layers are named.
    """
    if risk.memory.limit is None:
        return
    needs = Needs.of(risk, sites, rests)
    fitting = 0 if corrected is None else needs.fitting(corrected=corrected)
    kept = max(needs.scoring, fitting)
    advice = (
        "Pass a larger memory=, or fewer parameters with parameters=. Most is for "
        f"{'; '.join(_largest(risk, sites, rests))}"
    )
    what = f"Kronecker factors of {risk.p:,} parameters, with their eigendecomposition,"
    risk.memory = risk.memory.keeping(kept, what, advice)


def _largest(risk: EmpiricalRisk, sites: Sequence[Site], rests: Sequence[Rest]) -> Iterator[str]:
    big = wide(risk.dtype, risk.device).itemsize
    named = [(site.name, _matrices(site)) for site in sites]
    named += [(rest.name, _of_rest(rest)) for rest in rests]
    sizes = [(sum(q * (d if diag else d**2) * big for q, d, diag in m), name) for name, m in named]
    for size, name in sorted(sizes, reverse=True)[:3]:
        yield f"{name} with {told_bytes(size)}"
