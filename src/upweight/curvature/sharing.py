"""What of a fit is shared by the ranks of a cluster, or done here where there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from upweight.curvature.capture import Capture, DeclinedCallError, Piece
from upweight.curvature.form import OutputForm
from upweight.curvature.sites import Site
from upweight.risk import EmpiricalRisk

__all__ = ["DeclinedSitesError", "eigenvectors", "visit"]


class DeclinedSitesError(Exception):
    """Rows go another way through these sites than the probed ones, with the reasons."""

    def __init__(self, failed: Mapping[Site, str]) -> None:
        super().__init__("; ".join(failed.values()))
        self.failed = dict(failed)


def visit(
    capture: Capture, risk: EmpiricalRisk, form: OutputForm, add: Callable[[Piece], None]
) -> None:
    """Call `add` with what was captured of the rows of a risk, or of this rank's share of them.

    Raises
    ------
    DeclinedSitesError
        On all ranks, if a layer is called in a way that its factors do not describe on one.
    """
    failed: dict[Site, str] = {}
    declined: DeclinedCallError | None = None
    try:
        capture.over(risk.mine()).visit(form, add)
    except DeclinedCallError as error:
        declined, failed = error, capture.using(error)
    if risk.cluster is not None:
        sites = (*capture.sites, *capture.rests)
        told = {at: failed[site] for at, site in enumerate(sites) if site in failed}
        for one in risk.cluster.meet("calls of layers", told):
            failed |= {sites[int(at)]: why for at, why in one.items()}
    if failed or declined is not None:
        raise DeclinedSitesError(failed) from declined


def eigenvectors(
    risk: EmpiricalRisk, sizes: Sequence[tuple[int, ...]], matrix: Callable[[int], Tensor]
) -> list[tuple[Tensor, Tensor | None]]:
    """Eigenvalues (q, d) ≥ 0 and eigenvectors (q, d, d) of each matrix, by its number.

    `sizes` are their shapes: of a diagonal (q, d), whose eigenvectors are None. In a cluster each
    is decomposed by one rank, so that all have the same to the last bit.
    """
    whole = [at for at, size in enumerate(sizes) if len(size) == 3]

    def decomposed(at: int) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix(whole[at]))
        # contiguous, as they come back from a file: products round by how matrices lie in memory
        return values.clamp(min=0), vectors.to(risk.dtype).contiguous()

    if risk.cluster is None:
        found = [decomposed(at) for at in range(len(whole))]
    else:
        costs = [sizes[at][0] * float(sizes[at][1]) ** 3 for at in whole]
        spread = risk.cluster.spread(costs, decomposed, risk.device, "eigenvectors")
        found = [(values, vectors) for values, vectors in spread]
    of = dict(zip(whole, found, strict=True))
    return [of[at] if at in of else (matrix(at).clamp(min=0), None) for at in range(len(sizes))]
