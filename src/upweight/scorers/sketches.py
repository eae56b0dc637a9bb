"""TRAK: influence on the margin, in random projections of its gradients, over several models.

Letters: m test rows, n training rows, b rows in a chunk, p parameters, k projected ones, M models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from upweight.functional import FunctionalModel
from upweight.inverse import DirectFactors
from upweight.margins import negative_margin
from upweight.operator import LinearOperator, wide
from upweight.risk import EmpiricalRisk
from upweight.scorers.checkpoints import Checkpoint, Checkpoints
from upweight.scorers.projection import ProjectionKind, RandomProjection
from upweight.scorers.sides import ScorerOptions, Sides, make_sides
from upweight.scores import Scores

__all__ = ["trak"]

# Gradients that are projected together where the projection is drawn anew every time.
HELD_BYTES = 2**30
ROWS = 4096


def trak(
    models: nn.Module | Sequence[nn.Module],
    loss: Callable[[Any, Any], Tensor],
    train: Any,
    test: Any,
    *,
    projection_dim: int,
    damping: float = 0.0,
    weighted: bool = False,
    projection: ProjectionKind = "rademacher",
    seed: int = 0,
    checkpoints: Sequence[Checkpoint] | None = None,
    **options: Unpack[ScorerOptions],
) -> Scores:
    """TRAK: the influence on the margin of a classifier, in random projections of its gradients.

        I[j, i] = (1/M Σ_μ φ_test[j]ᵀ (C + λI)⁻¹ φ_train[i]) · (1/M Σ_μ q_i)

        φ = Rᵀ ∇f        f = log p/(1 − p), the margin        q = 1 − p
        C = 1/n Σ_i φ_train[i] φ_train[i]ᵀ        (weighted: 1/n Σ_i p_i q_i φ_train[i] φ_train[i]ᵀ)

    with p the probability of the label, R (p, k) random, and φ, C, q those of model μ. Positive =
    training row i helps: up-weighting it raises the margin of test row j. The scale is that of
    `Influence` with ``test_loss="margin"``: leaving row i out of n lowers the margin by about
    I[j, i] / n.

    Parameters
    ----------
    models
        Trained classifiers: several that differ by their seed or rows only, or one. The mean over
        ten is much truer than one.
    loss
        The log-loss of the label, −log p: cross-entropy, or binary cross-entropy with logits.
    train, test, **options
        As for `grad_dot`.
    projection_dim
        k, at most p; without damping well below n, such as n / 8. With damping, more is better.
    damping
        λ, in the units of C. The paper has none.
    weighted
        Keep the weights p q of the log-loss's own curvature, which the paper leaves out. With
        k = p, λ = 0 and one logit it is the exact influence with the Gauss-Newton matrix.
    projection, seed
        ``"rademacher"`` or ``"gaussian"``, and what it is drawn from. Chunks and batch size do not
        change it; it is not held as a matrix where that is large.
    checkpoints
        Weights to load into a copy of one model, in place of several models; see `tracin`.

    Returns
    -------
    Scores
        ``values`` (m, n), in memory: ``scores.save(path)`` writes them.

    Raises
    ------
    ValueError
        If k is larger than p; if the loss is not the log-loss of the label; or if C + λI is
        singular.

    Notes
    -----
    The authors' implementation has Σ in place of 1/n Σ in C, so no factor n, and divides the scores
    of every model by a mean of absolute values; the ranking for one model is the same.

    References
    ----------
    S. M. Park et al., *TRAK: attributing model behavior at scale*, ICML 2023, §3 and Algorithm 1.

    Examples
    --------
    >>> x, y = torch.randn(20, 3), torch.randint(2, (20,))
    >>> models = [nn.Linear(3, 2) for _ in range(2)]
    >>> data, test = (x, y), (x[:5], y[:5])
    >>> trak(models, F.cross_entropy, data, test, projection_dim=3, damping=0.1).shape
    (5, 20)
    """
    chosen = _members(models, checkpoints)
    sides = make_sides(loss, train, test, negative_margin, **options)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"expected a seed, a whole number of at least 0; got {seed!r}")
    parameters = _check_dimension(chosen, projection_dim, damping, sides)
    m, n = len(sides.test), len(sides.train)
    total, doubt = torch.zeros(m, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    fingerprints: list[str] = []
    dtype = torch.float32
    for at, model in enumerate(tqdm(chosen, desc="models", delay=2, disable=None)):
        risk = _margin_risk(sides, model)
        sketch = RandomProjection(
            risk.p, projection_dim, projection, [seed, at], dtype=risk.dtype, device=risk.device
        )
        features = _features(sides, risk, sketch)
        features.add_scores(total, damping, weighted)
        doubt += features.doubt
        fingerprints.append(risk.model.fingerprint())
        dtype = risk.dtype
    total *= doubt / len(fingerprints) ** 2
    provenance = {
        **sides.provenance("trak", parameters, fingerprints),
        "test_loss": "margin",
        "damping": damping,
        "weighted": weighted,
        "projection": projection,
        "projection_dim": projection_dim,
        "seed": seed,
    }
    return Scores(total.to(dtype), sides.test.names, sides.train.names, provenance)


@dataclass(frozen=True)
class _Features:
    """φ of the training rows (n, k) and of the test rows (m, k), and q of the former (n,)."""

    train: Tensor
    test: Tensor
    doubt: Tensor

    def add_scores(self, total: Tensor, damping: float, weighted: bool) -> None:
        """Add φ_testᵀ (C + λI)⁻¹ φ_train to a total (m, n)."""
        n = len(self.train)
        kind = wide(self.train.dtype, self.train.device)
        curvature = _Gram(self, weighted)
        try:
            inverse = DirectFactors(curvature).inverse(damping)
        except ValueError as error:
            raise ValueError(
                f"the projected curvature: {error}, or a smaller projection"
            ) from error
        solved = inverse @ self.test.T.to(kind)  # (k, m)
        for rows in _lots(n):
            total[:, rows] += (solved.T @ self.train[rows].T.to(kind)).to(total)


class _Gram(LinearOperator):
    """C = 1/n Σ w φ φᵀ, (k, k), with rows √(w/n) φ for the direct inverse where n < k."""

    semidefinite = True

    def __init__(self, features: _Features, weighted: bool) -> None:
        n, k = features.train.shape
        kind = wide(features.train.dtype, features.train.device)
        super().__init__(k, kind, features.train.device)
        q = features.doubt
        weights = q * (1 - q) if weighted else torch.ones_like(q)
        self.rank_bound = n
        self._phi, self._scale = features.train, (weights / n).sqrt().to(self.device, kind)[:, None]

    def factor_rows(self) -> Iterator[Tensor]:
        for rows in _lots(self.rank_bound):
            yield self._scale[rows] * self._phi[rows].to(self.dtype)

    def _apply(self, columns: Tensor) -> Tensor:
        return sum((r.T @ (r @ columns) for r in self.factor_rows()), torch.zeros_like(columns))

    def _dense(self, block: int = 1024) -> Tensor:
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for r in self.factor_rows():
            total.addmm_(r.T, r)  # (k, b) × (b, k)
        return total


def _lots(n: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS))


def _members(
    models: nn.Module | Sequence[nn.Module], checkpoints: Sequence[Checkpoint] | None
) -> Checkpoints | list[nn.Module]:
    if checkpoints is not None:
        if not isinstance(models, nn.Module):
            raise TypeError("expected one model to load the checkpoints into; got several")
        return Checkpoints(models, checkpoints)
    chosen = [models] if isinstance(models, nn.Module) else list(models)
    if not chosen:
        raise ValueError("expected at least one model; got none")
    return chosen


def _check_dimension(
    chosen: Checkpoints | list[nn.Module], k: int, damping: float, sides: Sides
) -> int:
    """P, where k fits to the models and the rows."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"expected projection_dim, a whole number of at least 1; got {k!r}")
    models: Iterable[nn.Module] = [chosen.model] if isinstance(chosen, Checkpoints) else chosen
    forward, patterns = sides.options.get("forward"), sides.options.get("parameters")
    sizes = [FunctionalModel(model, forward, patterns).size for model in models]
    if k > min(sizes):
        raise ValueError(
            f"expected projection_dim of at most the number of parameters, {min(sizes)}; got {k}"
        )
    n = len(sides.train)
    if damping == 0 and k > n:
        raise ValueError(
            f"C has rank at most {n}, the number of training rows, and projection_dim is {k}: it "
            "has no inverse. Choose a smaller projection_dim, or a damping above 0"
        )
    return sizes[0]


def _margin_risk(sides: Sides, model: nn.Module) -> EmpiricalRisk:
    """The mean of −f over the training rows, where the loss is that of f."""
    losses = sides.train_risk(model).losses()
    risk = sides.train_risk(model, negative_margin)
    # ℓ = −log p = log(1 + exp(−f)), from which q = −∂ℓ/∂f follows
    wanted = F.softplus(risk.losses())
    if not torch.allclose(losses, wanted, rtol=1e-3, atol=1e-4):
        worst = int((losses - wanted).abs().argmax())
        raise ValueError(
            "expected the log-loss of the label, such as cross-entropy without weights and label "
            f"smoothing: trak stands on it. Training row {worst} has a loss of "
            f"{float(losses[worst]):.4g}, and −log p is {float(wanted[worst]):.4g}"
        )
    return risk


def _features(sides: Sides, train: EmpiricalRisk, sketch: RandomProjection) -> _Features:
    test = sides.test_risk(train)
    return _Features(
        _projected(train, sketch, "training"),
        _projected(test, sketch, "test"),
        train.losses().double().sigmoid().cpu(),  # 1 − p = σ(−f)
    )


def _projected(risk: EmpiricalRisk, sketch: RandomProjection, what: str) -> Tensor:
    out = torch.empty(risk.n, sketch.k, dtype=risk.dtype, device=risk.device)
    held: list[Tensor] = []
    start = 0
    for chunk, gradients in risk.row_gradients(sketch.k * risk.dtype.itemsize):
        held.append(gradients)
        stop = chunk.stop
        enough = sketch.kept or (stop - start + len(chunk)) * risk.p * 8 > HELD_BYTES
        if enough or stop == risk.n:
            out[start:stop] = sketch(torch.cat(held) if len(held) > 1 else held[0])
            start, held = stop, []
    bad = (~torch.isfinite(out)).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{what} data: row {int(bad[0])}: the gradient of its margin is not finite (NaN or inf)"
        )
    return out
