"""What a few products tell of the eigenvalues of a matrix.

Letters: p parameters.
"""

from __future__ import annotations

import torch

from upweight.inverse.lanczos import lanczos, random_columns
from upweight.operator import LinearOperator

__all__ = ["lowest_eigenvalue", "mean_eigenvalue", "top_eigenvalue"]

PROBES = 64
# Probes that are multiplied at once stay below this many bytes.
PROBE_BYTES = 2**28
LANCZOS_STEPS = 40
TINY = torch.finfo(torch.float32).tiny


def mean_eigenvalue(curvature: LinearOperator) -> float:
    """tr(C)/p by random signs v, the mean of vᵀCv/p (Hutchinson)."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for part in torch.arange(PROBES).split(
        min(PROBES, max(1, PROBE_BYTES // (8 * curvature.size)))
    ):
        signs = torch.randint(0, 2, (curvature.size, len(part)), generator=generator)
        probes = (2.0 * signs - 1.0).to(curvature.device, curvature.dtype)
        total += float((probes * (curvature @ probes)).double().sum())
    return total / (PROBES * curvature.size)


def top_eigenvalue(curvature: LinearOperator) -> float:
    """The largest eigenvalue, roughly, by a few power steps."""
    vector = random_columns(curvature, 1, seed=1)
    size = 0.0
    for _ in range(8):
        vector = (curvature @ vector).to(vector)
        size = float(torch.linalg.vector_norm(vector))
        if size == 0.0:
            return TINY
        vector = vector / size
    return size


def lowest_eigenvalue(curvature: LinearOperator) -> float:
    """The lowest Ritz value after some Lanczos steps: an upper bound of the lowest eigenvalue."""
    start = random_columns(curvature, 1, seed=2)[:, 0]
    return float(lanczos(curvature, start, min(LANCZOS_STEPS, curvature.size)).values.min())
