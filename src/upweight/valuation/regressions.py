"""Values as the coefficients of a linear fit to utilities of random sets.

Letters: M sets, n rows, Z (M, n) the sets as 0 and 1, u (M,) utilities.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.samples import SetSamples

__all__ = ["constrained_regression", "is_shrunk", "subset_regression"]

Floats: TypeAlias = NDArray[np.float64]
Found: TypeAlias = tuple[Floats, Floats, NDArray[np.int64]]  # values, standard errors, counts

PLENTY = 4  # times as many sets as rows for plain least squares


def subset_regression(samples: SetSamples, *, errors: bool = True) -> Found:
    """The p-weighted Banzhaf value as least squares: u(S) ≈ a + Σ_{i ∈ S} v_i.

    With sets that have each row with probability p, the columns of Z − p are orthogonal in the
    limit, and the coefficients tend to the same values as the differences of means do; but what
    the other rows of a set add is accounted for, which lowers the variance (Lin et al., Measuring
    the effect of training data by randomized experiments, ICML 2022, with lasso).

    With at least four times as many sets as rows: ordinary least squares, unbiased. With fewer, the
    values get a normal prior around their mean, whose width maximises the marginal likelihood:
    they are drawn to each other, the more the noisier they are. Standard errors are those of the
    posterior then, else from the residuals of each draw: they do not suppose that what the fit
    leaves over is the same for all sets.
    """
    good = ~np.isnan(samples.utilities)
    inside = np.zeros(samples.n)
    for _, z in samples.chunks():
        inside += z.sum(axis=0)
    if not good.all():
        inside -= samples.masks[~good].sum(axis=0)
    count = int(good.sum())
    seen = np.minimum(inside, count - inside).astype(np.int64)
    if is_shrunk(samples):
        z, u = samples.masks[good].astype(np.float64), samples.utilities[good]
        found, off = _by_marginal_likelihood(z - z.mean(axis=0), u - u.mean())
    else:
        found, off = _least_squares(samples, good, inside / count, errors=errors)
    found[seen == 0] = off[seen == 0] = np.nan
    return found, off, seen


def is_shrunk(samples: SetSamples) -> bool:
    """Whether there are too few sets for a fit without a prior."""
    return int((~np.isnan(samples.utilities)).sum()) < PLENTY * samples.n + 2


def _least_squares(
    samples: SetSamples, good: NDArray[np.bool_], mean: Floats, *, errors: bool
) -> tuple[Floats, Floats]:
    """Coefficients, and their standard errors by draws: Σ_t (A⁻¹ Σ_{m in t} z_m e_m)² / (1 − h_t).

    A = ZᵀZ of centred Z, e the residuals, h_t the leverage of draw t (White 1980; the correction is
    HC2's). Z is made some sets at a time, and never there as a whole.
    """
    from scipy.linalg import cho_factor, cho_solve

    n = samples.n
    u = np.where(good, samples.utilities, 0.0)
    u = np.where(good, u - u.sum() / good.sum(), 0.0)

    def centred(some: slice, z: Floats) -> Floats:
        z -= mean
        z[~good[some]] = 0.0
        return z

    gram, right = np.zeros((n, n)), np.zeros(n)
    for some, z in samples.chunks():
        z = centred(some, z)
        gram += z.T @ z
        right += z.T @ u[some]
    gram[np.diag_indices(n)] += 1e-12 * max(np.trace(gram) / n, 1e-300)  # a row never drawn
    factor = cho_factor(gram, lower=True)
    values = cho_solve(factor, right)
    if not errors:
        return values, np.full(n, np.nan)
    inverse, spread = cho_solve(factor, np.eye(n)), np.zeros(n)
    for some, z in samples.chunks():
        z = centred(some, z)
        parts = z @ inverse
        leverage = np.where(good[some], 1 / good.sum() + np.einsum("mi,mi->m", parts, z), 0.0)
        parts *= (u[some] - z @ values)[:, None]
        free = 1 - leverage.reshape(-1, samples.per_unit).sum(axis=1)
        parts = parts.reshape(-1, samples.per_unit, n).sum(axis=1)
        spread += (parts**2 / np.maximum(free, 0.1)[:, None]).sum(axis=0)
    return values, np.sqrt(spread)


def _by_marginal_likelihood(z: Floats, u: Floats) -> tuple[Floats, Floats]:
    """u = m s + Z b + e: s the size without a prior, b ~ N(0, τ²), e ~ N(0, σ²); v = m + b."""
    from scipy.optimize import minimize_scalar

    count, n = z.shape
    size = z.sum(axis=1)
    norm = float(size @ size) or 1.0
    slope = float(size @ u) / norm
    free_u = u - slope * size
    free_z = z - np.outer(size, (size @ z) / norm)
    wide = n > count
    eigen, vectors = np.linalg.eigh(free_z @ free_z.T if wide else free_z.T @ free_z)
    eigen = np.maximum(eigen, 0.0)
    inside = eigen > 1e-10 * max(float(eigen.max(initial=0.0)), 1e-300)
    degrees = max(1, count - 2)
    if not inside.any():
        noise = max(float(free_u @ free_u), 0.0) / degrees
        return np.full(n, slope), np.full(n, np.sqrt(noise / norm))
    # V, the directions of b, and what u has along each: free_z = U √e Vᵀ, turned = Uᵀ u
    eigen, vectors = eigen[inside], vectors[:, inside]
    if wide:
        vectors = free_z.T @ vectors / np.sqrt(eigen)
    turned = vectors.T @ (free_z.T @ free_u) / np.sqrt(eigen)
    rest = max(float(free_u @ free_u - turned @ turned), 0.0)

    def minus_log(log_ratio: float) -> float:
        scale = np.exp(log_ratio) * eigen + 1.0
        power = float((turned**2 / scale).sum()) + rest
        return float(np.log(scale).sum()) + degrees * float(np.log(max(power, 1e-300)))

    middle = -float(np.log(eigen.mean()))
    best: Any = minimize_scalar(minus_log, bounds=(middle - 14, middle + 14), method="bounded")
    ratio = float(np.exp(best.x))  # τ² / σ²
    scale = ratio * eigen + 1.0
    noise = (float((turned**2 / scale).sum()) + rest) / degrees
    b = vectors @ (ratio * np.sqrt(eigen) * turned / scale)
    # b is found beside the size; what of it lies along the size belongs to m
    along = (size @ z) / norm
    mean = slope - float(along @ b)
    # v_i = m + b_i = slope + (1_i − along)ᵀ b + a part of variance σ² / |s|²
    less = 1.0 - 1.0 / scale
    shared = along - vectors @ (less * (vectors.T @ along))
    spread = 1.0 - (vectors**2 * less).sum(axis=1) - 2 * shared + float(along @ shared)
    return mean + b, np.sqrt(noise * (ratio * np.maximum(spread, 0.0) + 1.0 / norm))


def constrained_regression(samples: SetSamples) -> Found:
    """Shapley's value as least squares over sets drawn by the Shapley kernel.

    min_v Σ_m (u_m − u(none) − Σ_{i ∈ S_m} v_i)²   subject to   Σ_i v_i = u(all) − u(none)

    The constraint is met exactly, by Lagrange's multiplier. Standard errors follow from the spread
    of the units' parts of the normal equations.
    """
    good = ~np.isnan(samples.utilities)
    z = np.where(good[:, None], samples.masks, False).astype(np.float64)
    u = np.where(good, samples.utilities - samples.ends[0], 0.0)
    count, n = int(good.sum()), samples.n
    total = samples.ends[1] - samples.ends[0]
    gram = z.T @ z / max(1, count)
    gram[np.diag_indices(n)] += 1e-10 * max(np.trace(gram) / n, 1e-300)
    inverse = np.linalg.inv(gram)
    one = inverse.sum(axis=1)
    plain = inverse @ (z.T @ u) / max(1, count)
    values = plain - one * (plain.sum() - total) / one.sum()
    left = u - z @ values
    parts = (z * left[:, None]).reshape(samples.units, samples.per_unit, n).sum(axis=1)
    parts -= parts.mean(axis=0)
    project = inverse - np.outer(one, one) / one.sum()
    spread = parts @ project.T / max(1, count)
    errors = np.sqrt((spread**2).sum(axis=0) * samples.units / max(1, samples.units - n))
    seen = np.minimum(z.sum(axis=0), count - z.sum(axis=0)).astype(np.int64)
    return values, errors, seen
