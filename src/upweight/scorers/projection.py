"""Random projections from p parameters to k numbers, never held as a matrix where that is large.

Letters: b rows, p parameters, k numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["ProjectionKind", "RandomProjection"]

ProjectionKind = Literal["rademacher", "gaussian"]

# Rows of R that are drawn together, each lot from a generator of its own. It is part of what a seed
# means: another number gives another R.
LOT = 1024
# R is kept where it takes no more than this.
KEPT_BYTES = 2**28


class RandomProjection:
    """G → G R for R (p, k) of independent entries with mean 0 and variance 1/k, so E[R Rᵀ] = I.

    R is drawn in lots of rows, from the seed and the number of the lot alone: the same whatever the
    chunks that G comes in, on every machine (for ``"rademacher"``: ±1/√k) and device.

    Parameters
    ----------
    size, k
        p and k.
    kind
        ``"rademacher"`` or ``"gaussian"``.
    seed
        One or several whole numbers of at least 0.
    dtype, device
        Of G.

    Examples
    --------
    >>> projection = RandomProjection(3, 4, "rademacher", [0])
    >>> projection(torch.ones(2, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        size: int,
        k: int,
        kind: ProjectionKind,
        seed: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if kind not in ("rademacher", "gaussian"):
            raise ValueError(f"expected projection 'rademacher' or 'gaussian'; got {kind!r}")
        self.size, self.k, self.kind, self.seed = size, k, kind, tuple(seed)
        self.dtype, self.device = dtype, torch.device(device)
        self.kept = size * k * dtype.itemsize <= KEPT_BYTES
        self._lots: dict[int, Tensor] = {}

    def __call__(self, gradients: Tensor) -> Tensor:
        """G R for G (b, p): (b, k)."""
        out = torch.zeros(len(gradients), self.k, dtype=self.dtype, device=self.device)
        for lot, start in enumerate(range(0, self.size, LOT)):
            stop = min(start + LOT, self.size)
            out.addmm_(gradients[:, start:stop], self._lot(lot, stop - start))  # (b, l) × (l, k)
        return out

    def _lot(self, lot: int, rows: int) -> Tensor:
        known = self._lots.get(lot)
        if known is None:
            known = self._draw(lot, rows).to(self.device, self.dtype)
            known = known.mul_(self.k**-0.5)
            if self.kept:
                self._lots[lot] = known
        return known

    def _draw(self, lot: int, rows: int) -> Tensor:
        bits = np.random.PCG64(np.random.SeedSequence([*self.seed, lot]))
        if self.kind == "gaussian":
            normal = np.random.Generator(bits).standard_normal((rows, self.k), dtype=np.float32)
            return torch.from_numpy(normal)
        words = bits.random_raw(-(-rows * self.k // 64))
        flat = np.unpackbits(words.astype("<u8").view(np.uint8), count=rows * self.k)
        return torch.from_numpy(flat.reshape(rows, self.k)).to(self.dtype).mul_(2).sub_(1)
