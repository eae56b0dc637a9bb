"""The loss of one row, from a loss function of unknown reduction; and what it says of the output.

Letters: b rows in a batch, o numbers in the output of one row, c classes, t positions, K roots.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from upweight.autodiff import Autodiff, gradient, vjp

__all__ = ["Bernoulli", "Categorical", "Gaussian", "RowLoss", "output_distribution"]

Reduction = Literal["mean", "sum", "none"]


class RowLoss:
    """ℓ(output, target) row by row: (b, …), (b, …) → (b,).

    ``reduction`` says what `loss` does with a batch, found by comparing the loss of a batch with
    the losses of its rows one by one.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], output: Tensor, target: Any) -> None:
        if isinstance(loss, type):
            raise TypeError(f"expected a loss function; got a class: write {loss.__name__}()")
        if not callable(loss):
            raise TypeError(
                f"expected a loss function (output, target) → Tensor; got {type(loss).__name__}"
            )
        self.loss = loss
        self._autodiff = Autodiff()
        self.reduction: Reduction = _find_reduction(loss, output, target)

    def __call__(self, output: Tensor, target: Any) -> Tensor:
        """ℓ for outputs (b, …) and targets (b, …): (b,)."""
        if self.reduction == "none":
            return self.loss(output, target).reshape(output.shape[0])
        return self._autodiff.rows(self.one, output, target, what="row losses")

    def one(self, output: Tensor, target: Any) -> Tensor:
        """The loss of one row, a scalar: output and target without the dimension of rows."""
        target = tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, target)
        return self.loss(output[None], target).reshape(())

    def check(self, output: Tensor, target: Any, rows: Tensor) -> None:
        """Refuse a batch whose loss is not the mean or the sum of the losses of its rows."""
        if self.reduction == "none" or len(rows) == 1:
            return
        together = self.loss(output, target).double()
        whole = rows.double().mean() if self.reduction == "mean" else rows.double().sum()
        scale = float(rows.double().abs().mean() if self.reduction == "mean" else rows.abs().sum())
        if abs(float(together - whole)) > 1e-3 * scale + 1e-6:
            raise ValueError(
                _explain_undecomposable(
                    self.loss, output, target, together, rows, reduction=self.reduction
                )
            )


def _find_reduction(loss: Callable[[Any, Any], Tensor], output: Tensor, target: Any) -> Reduction:
    b = output.shape[0]
    together = _call(loss, output, target)
    alone: list[Tensor] = []
    for i in range(b):
        one = tree_map(lambda leaf: leaf[i : i + 1] if isinstance(leaf, Tensor) else leaf, target)  # noqa: B023
        value = _call(loss, output[i : i + 1], one)
        if value.numel() != 1:
            raise ValueError(
                f"expected a loss with one number per row; one row alone gives shape "
                f"{tuple(value.shape)}. Average over the other dimensions, e.g. "
                "lambda output, target: loss(output, target).flatten(1).mean(1)"
            )
        alone.append(value.reshape(()))
    rows = torch.stack(alone)
    if not bool(torch.isfinite(rows).all() and torch.isfinite(together).all()):
        bad = (~torch.isfinite(rows)).nonzero().flatten().tolist()
        raise ValueError(f"the loss is not finite (NaN or inf) on probed row(s) {bad}")

    def same(value: Tensor, wanted: Tensor) -> bool:
        return torch.allclose(value, wanted, rtol=1e-4, atol=1e-6)

    if together.numel() == b and together.ndim > 0:
        if same(together.flatten(), rows):
            return "none"
    elif together.numel() == 1:
        if same(together.reshape(()), rows.mean()):
            return "mean"
        if same(together.reshape(()), rows.sum()):
            return "sum"
    raise ValueError(_explain_undecomposable(loss, output, target, together, rows))


def _call(loss: Callable[[Any, Any], Tensor], output: Tensor, target: Any) -> Tensor:
    with warnings.catch_warnings():
        # Torch warns when output and target are broadcast; here that ends in an error of its own.
        warnings.simplefilter("ignore", UserWarning)
        value = loss(output, target)
    if not isinstance(value, Tensor):
        raise TypeError(f"expected the loss to return a Tensor; got {type(value).__name__}")
    return value


def _explain_undecomposable(
    loss: Any,
    output: Tensor,
    target: Any,
    together: Tensor,
    rows: Tensor,
    *,
    reduction: str | None = None,
) -> str:
    hint = "Use reduction='none' or 'sum', or a loss that treats rows independently"
    if isinstance(target, Tensor) and target.shape != output.shape and target.ndim < output.ndim:
        flat = output.shape[:1] + tuple(s for s in output.shape[1:] if s != 1)
        if flat == tuple(target.shape):
            hint = (
                f"The output {tuple(output.shape)} and the target {tuple(target.shape)} are "
                "broadcast against each other: squeeze the output or unsqueeze the target"
            )
    if getattr(loss, "weight", None) is not None:
        hint = "Class weights are averaged over the batch: use reduction='sum' or 'none'"
    if reduction is not None:
        return (
            f"expected a loss that is the {reduction} of one loss per row, as it is on the first "
            f"rows; over {len(rows)} rows it gives {float(together):.6g}, the {reduction} of the "
            f"rows alone is {float(getattr(rows.double(), reduction)()):.6g}. {hint}"
        )
    return (
        "expected a loss that is the mean or the sum of one loss per row; over "
        f"{len(rows)} rows it gives {together.flatten()[:8].tolist()}, the rows alone give "
        f"{rows.tolist()}. {hint}"
    )


# --- the distribution of labels that a loss stands for
# ---------------------------------------------
#
# ℓ = −s · log p(y | output) for a tempering s (1/t where the loss averages over t positions of a
# row). `roots` gives S (K, o) with Σ_k S_k S_kᵀ = (1/s) E_y[∇ℓ ∇ℓᵀ], so that s = 1 is the Fisher
# matrix of the output, and any s keeps it equal to the Gauss-Newton matrix of the same loss.


@dataclass(frozen=True)
class Categorical:
    """Cross-entropy: y ~ softmax(output) over dimension 0 of one row's output (c, …positions)."""

    log_probabilities: bool = False
    reduction: str = "mean"

    def _temper(self, output: Tensor) -> float:
        positions = output[0].numel()
        return 1.0 / positions if self.reduction == "mean" else 1.0

    def roots(self, output: Tensor) -> Tensor:
        """√p_c (p − e_c) for every class c at every position, (c·t, *output)."""
        c = output.shape[0]
        p = output.exp() if self.log_probabilities else output.softmax(0)
        flat = p.reshape(c, -1)  # (c, t)
        t = flat.shape[1]
        mean = torch.zeros_like(flat) if self.log_probabilities else flat
        residual = mean[None] - torch.eye(c, dtype=p.dtype, device=p.device)[:, :, None]
        weighted = flat.sqrt()[:, None] * residual * self._temper(output) ** 0.5  # (c, c, t)
        spread = weighted[..., None] * torch.eye(t, dtype=p.dtype, device=p.device)  # (c, c, t, t)
        return spread.permute(0, 3, 1, 2).reshape(c * t, *output.shape)

    def sampled_root(self, output: Tensor, noise: Tensor) -> Tensor:
        """(p − e_y) for a label y drawn by inverse transform of uniform noise (…positions)."""
        p = output.exp() if self.log_probabilities else output.softmax(0)
        y = (p.cumsum(0) < noise[None]).sum(0).clamp(max=output.shape[0] - 1)
        one_hot = F.one_hot(y, output.shape[0]).movedim(-1, 0).to(p.dtype)
        residual = -one_hot if self.log_probabilities else p - one_hot
        return residual * self._temper(output) ** 0.5

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform noise, one number per position, for a batch of outputs (b, c, …)."""
        shape = (output.shape[0], *output.shape[2:])
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(output)


@dataclass(frozen=True)
class Bernoulli:
    """Binary cross-entropy with logits: every number of the output is a label of its own."""

    reduction: str = "mean"

    def _temper(self, output: Tensor) -> float:
        return 1.0 / output.numel() if self.reduction == "mean" else 1.0

    def roots(self, output: Tensor) -> Tensor:
        """√(p(1 − p)) e_j for every output j, (o, *output)."""
        p = output.sigmoid().flatten()
        scale = (p * (1 - p) * self._temper(output)).sqrt()
        return torch.diag_embed(scale).reshape(-1, *output.shape)

    def sampled_root(self, output: Tensor, noise: Tensor) -> Tensor:
        """p − y for labels y drawn with uniform noise of the shape of the output."""
        p = output.sigmoid()
        return (p - (noise < p).to(p.dtype)) * self._temper(output) ** 0.5

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform noise of the shape of a batch of outputs."""
        return torch.rand(output.shape, generator=generator, dtype=torch.float64).to(output)


@dataclass(frozen=True)
class Gaussian:
    """Squared error: y ~ N(output, σ²), with σ² = o/2 for a mean over o outputs, 1/2 for a sum."""

    reduction: str = "mean"

    def _precision(self, output: Tensor) -> float:
        return 2.0 / output.numel() if self.reduction == "mean" else 2.0

    def roots(self, output: Tensor) -> Tensor:
        """e_j / σ for every output j, (o, *output)."""
        scale = torch.full_like(output, self._precision(output) ** 0.5).flatten()
        return torch.diag_embed(scale).reshape(-1, *output.shape)

    def sampled_root(self, output: Tensor, noise: Tensor) -> Tensor:
        """(output − y)/σ² = noise/σ for standard normal noise of the shape of the output."""
        return noise * self._precision(output) ** 0.5

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal noise of the shape of a batch of outputs."""
        return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)


OutputDistribution = Categorical | Bernoulli | Gaussian


def output_distribution(loss: Any) -> OutputDistribution | None:
    """The distribution whose negative log-likelihood this loss is; None where it is not known.

    Known are cross-entropy, negative log-likelihood, binary cross-entropy with logits and mean
    squared error, as functions and as modules, without class weights and label smoothing.
    """
    if loss is F.cross_entropy:
        return Categorical()
    if loss is F.nll_loss:
        return Categorical(log_probabilities=True)
    if loss is F.binary_cross_entropy_with_logits:
        return Bernoulli()
    if loss is F.mse_loss:
        return Gaussian()
    reduction = "mean" if getattr(loss, "reduction", "mean") == "mean" else "sum"
    plain = getattr(loss, "weight", None) is None and not getattr(loss, "label_smoothing", 0.0)
    if not plain or getattr(loss, "pos_weight", None) is not None:
        return None
    if type(loss) is nn.CrossEntropyLoss:
        return Categorical(reduction=reduction)
    if type(loss) is nn.NLLLoss:
        return Categorical(log_probabilities=True, reduction=reduction)
    if type(loss) is nn.BCEWithLogitsLoss:
        return Bernoulli(reduction=reduction)
    if type(loss) is nn.MSELoss:
        return Gaussian(reduction=reduction)
    return None


def output_roots(row_loss: RowLoss, output: Tensor, target: Any) -> Tensor:
    """S (o, *output) with Σ_k S_k S_kᵀ = ∂²ℓ/∂output² for one row: a symmetric root of the Hessian.

    A loss that is convex in the output has no negative eigenvalue here; what round-off leaves below
    zero is set to zero. `output_curvature` tells the two apart.
    """
    values, vectors = torch.linalg.eigh(output_hessian(row_loss, output, target))
    roots = vectors * values.clamp(min=0).sqrt()
    return roots.T.reshape(-1, *output.shape)


def output_hessian(row_loss: RowLoss, output: Tensor, target: Any) -> Tensor:
    """∂²ℓ/∂output² of one row, (o, o)."""
    o = output.numel()
    slope = gradient(lambda z: row_loss.one(z.reshape(output.shape), target))
    flat = output.flatten()
    basis = torch.eye(o, dtype=output.dtype, device=output.device)
    _, pullback = vjp(slope, flat)  # symmetric, so transposed products serve
    hessian = vmap(pullback)(basis)
    return (hessian + hessian.T) / 2
