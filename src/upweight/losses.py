"""The loss of one row, from a loss function of unknown reduction; and what it says of the output.

Letters: b rows in a batch, o numbers in the output of one row, c classes, t positions, K roots, k
cotangents.
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

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "RowLoss",
    "TokenCategorical",
    "TokenLoss",
    "output_distribution",
]

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


class TokenLoss(nn.Module):
    """Cross-entropy over the labelled positions of each row, as language models are trained by.

        ℓ_i = −w_i Σ_{s: y_is ≠ ignore} log softmax(z_is)[y_is]

    for logits z (b, t, c) and labels y (b, t), with w_i = 1 for the sum, and one over the number of
    labelled positions of row i for the mean. A row without any has the loss 0. The softmax is taken
    in float32 where logits have half precision. The result is (b,): rows are never averaged.

    Parameters
    ----------
    reduction
        ``"sum"`` over the labelled positions of a row: every token weighs the same, as in training
        by the mean over all tokens of a batch. ``"mean"``: every row weighs the same.
    ignore_index
        The label of positions that have none.
    shift
        Whether logits at s are of the token at s + 1, so that labels are the tokens themselves, as
        Hugging Face has them. False: labels stand where their logits are.

    Examples
    --------
    >>> logits = torch.zeros(1, 3, 4)
    >>> TokenLoss()(logits, torch.tensor([[2, -100, 0]]))  # 2 log 4
    tensor([2.7726])
    >>> TokenLoss(shift=True)(logits, torch.tensor([[2, -100, 0]]))  # the first is not predicted
    tensor([1.3863])
    """

    def __init__(
        self,
        reduction: Literal["sum", "mean"] = "sum",
        ignore_index: int = -100,
        *,
        shift: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"expected reduction 'sum' or 'mean' of TokenLoss; got {reduction!r}")
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.shift = shift

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """ℓ for logits (b, t, c) and labels (b, t): (b,)."""
        total = self.tokens(logits, labels).sum(1)
        if self.reduction == "sum":
            return total
        return total / self.labelled(labels).sum(1).clamp(min=1)

    def tokens(self, logits: Tensor, labels: Tensor) -> Tensor:
        """−log softmax(z)[y] of every label, where the label stands; 0 where there is none: (b, t).

        Their sum is the loss of a row by ``reduction="sum"``.
        """
        self._check(logits, labels)
        if self.shift:
            own, wanted = logits[:, :-1], labels[:, 1:]
        else:
            own, wanted = logits, labels
        there = wanted != self.ignore_index
        own = own.float() if own.dtype in (torch.float16, torch.bfloat16) else own
        # the label 0 stands in for none: an index must be one
        picked = own.log_softmax(-1).gather(-1, wanted.where(there, 0)[..., None])[..., 0]
        losses = torch.where(there, -picked, 0.0)
        return F.pad(losses, (1, 0)) if self.shift else losses

    def labelled(self, labels: Tensor) -> Tensor:
        """Which logits have a label, (b, t)."""
        there = labels != self.ignore_index
        return F.pad(there[:, 1:], (0, 1)) if self.shift else there

    def active(self, labels: Tensor) -> Tensor:
        """Which positions come no later than the last label of their row, (b, t).

        Those behind it are padding: in a model that looks back they have no part in the loss.
        """
        there = self.labelled(labels).int()
        return there.flip(1).cummax(1).values.flip(1).bool()

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if logits.ndim != 3 or labels.shape != logits.shape[:2]:
            raise ValueError(
                "expected logits (b, t, c) and a label for every position, (b, t); got "
                f"{tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        if labels.is_floating_point():
            raise ValueError(f"expected integer labels; got {labels.dtype}")


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
class TokenCategorical:
    """Cross-entropy of labelled positions: y ~ softmax(output) over the last of (b, t, c).

    Unlike those of the other distributions its methods take whole batches, with `labelled` (b, t):
    a position without a label has no curvature.
    """

    reduction: str = "sum"

    def _weights(self, labelled: Tensor, output: Tensor) -> Tensor:
        """The weight of every position in the loss of its row, (b, t)."""
        weights = labelled.to(output.dtype)
        if self.reduction == "mean":
            weights = weights / labelled.sum(1, keepdim=True).clamp(min=1)
        return weights

    def roots(self, output: Tensor, labelled: Tensor) -> Tensor:
        """√(w p_c) (p − e_c) for every class c at every position, (b, t·c, t, c)."""
        t, c = output.shape[1:]
        p = output.softmax(-1)  # (b, t, c)
        residual = p[:, :, None] - torch.eye(c, dtype=p.dtype, device=p.device)  # (b, t, c, c)
        scale = (p * self._weights(labelled, output)[..., None]).sqrt()
        own = scale[..., None] * residual
        spread = own[:, :, :, None] * torch.eye(t, dtype=p.dtype, device=p.device)[:, None, :, None]
        return spread.flatten(1, 2)  # (b, t, c, t, c) before

    def sampled_root(self, output: Tensor, noise: Tensor, labelled: Tensor) -> Tensor:
        """√w (p − e_y) for labels y drawn by inverse transform of uniform noise (b, t)."""
        root = output.softmax(-1)
        y = torch.searchsorted(root.cumsum(-1), noise[..., None]).clamp(max=output.shape[-1] - 1)
        root.scatter_add_(-1, y, torch.full_like(noise, -1.0)[..., None])
        return root.mul_(self._weights(labelled, output).sqrt()[..., None])

    def multiply(self, output: Tensor, pushed: Tensor, labelled: Tensor) -> Tensor:
        """∂²ℓ/∂z² u = w (p ∘ u − p pᵀu) at every position, for u (k, b, t, c)."""
        p = output.softmax(-1)
        weighted = p * pushed
        own = weighted - p * weighted.sum(-1, keepdim=True)
        return own * self._weights(labelled, output)[..., None]

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform noise, one number per position, for a batch of outputs (b, t, c)."""
        return torch.rand(output.shape[:2], generator=generator, dtype=torch.float64).to(output)


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


OutputDistribution = Categorical | TokenCategorical | Bernoulli | Gaussian


def output_distribution(loss: Any) -> OutputDistribution | None:
    """The distribution whose negative log-likelihood this loss is; None where it is not known.

    Known are cross-entropy, negative log-likelihood, binary cross-entropy with logits and mean
    squared error, as functions and as modules, without class weights and label smoothing; and
    `TokenLoss`.
    """
    if type(loss) is TokenLoss:
        return TokenCategorical(loss.reduction)
    functions: dict[Any, OutputDistribution] = {
        F.cross_entropy: Categorical(),
        F.nll_loss: Categorical(log_probabilities=True),
        F.binary_cross_entropy_with_logits: Bernoulli(),
        F.mse_loss: Gaussian(),
    }
    known = next((found for function, found in functions.items() if loss is function), None)
    if known is not None:
        return known
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
