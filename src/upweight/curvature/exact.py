"""The three exact curvatures of L(θ) = 1/n Σ_i ℓ_i(θ), known by their products.

    Hessian   ∇²L
    GGN       1/n Σ_i J_iᵀ (∂²ℓ_i/∂f²) J_i         J_i = ∂f(x_i)/∂θ  (o, p)
    Fisher    1/n Σ_i E_y[∇ℓ(f_i, y) ∇ℓ(f_i, y)ᵀ]

Letters: n rows, b rows in a chunk, o numbers in one output, K roots per row, p parameters, k
columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from upweight.autodiff import gradient
from upweight.curvature import form
from upweight.curvature.form import OutputForm, chunked_product, multiply_roots
from upweight.curvature.linear import dense_hessian
from upweight.losses import (
    Categorical,
    OutputDistribution,
    TokenCategorical,
    TokenLoss,
    output_distribution,
    output_hessian,
    output_roots,
)
from upweight.operator import LinearOperator
from upweight.risk import Chunk, EmpiricalRisk

__all__ = ["GGN", "Curvature", "Fisher", "Hessian"]

# Up to this many, its roots in closed form are multiplied, and the loss is not differentiated.
CLOSED_OUTPUTS = 64
# Noise for sampled labels is drawn for blocks of rows at fixed places, whatever the chunks.
NOISE_ROWS = 1024

FisherKind = Literal["exact", "sampled", "empirical"]


class Hessian(LinearOperator):
    """∇²L(θ), the Hessian of the mean loss.

    Symmetric, and indefinite away from a minimum: a damped inverse is then positive definite only
    for a damping above the size of its most negative eigenvalue.

    Parameters
    ----------
    risk
        The rows, model and loss.

    Attributes
    ----------
    products
        Matrix-vector products spent so far: passes over all rows, counted per column.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> risk = EmpiricalRisk(model, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)))
    >>> Hessian(risk).dense()  # mean of 2x²
    tensor([[10.]], dtype=torch.float64)
    """

    name = "hessian"

    def __init__(self, risk: EmpiricalRisk) -> None:
        super().__init__(risk.p, risk.dtype, risk.device)
        self.risk = risk
        self.products = 0

    def on_rows(self, rows: Sequence[int]) -> Hessian:
        """The Hessian of the mean loss over some of the rows."""
        return Hessian(self.risk.with_rows(self.risk.rows.subset(rows)))

    def on_parameters(self, names: Collection[str]) -> Hessian:
        """Its block of some of the parameters."""
        return Hessian(self.risk.restricted(names))

    def _apply(self, columns: Tensor) -> Tensor:
        self.products += columns.shape[1]
        return chunked_product(self.risk, columns, self._chunk_product).to(self.dtype)

    def _dense(self, block: int = 1024) -> Tensor:
        found = dense_hessian(self.risk)
        if found is not None:
            self.products += found[1]
            return found[0]
        self.products += self.size
        identity = torch.eye(self.size, dtype=self.dtype, device=self.device)
        dense = chunked_product(self.risk, identity, self._chunk_product)
        return _symmetric(dense)

    def _chunk_product(self, theta: Any, chunk: Chunk) -> Callable[[Any, slice], Any]:
        slope = gradient(lambda t: self.risk.batch_losses(t, chunk.batch).sum())
        return lambda tangents, _: self.risk.autodiff.pushforward(slope, theta, tangents)


def _symmetric(dense: Tensor) -> Tensor:
    """The symmetric part; what is left over must be round-off."""
    # A wrong derivative rule shows here: on torch 2.13 the forward-mode derivative of a vmapped
    # layer_norm gradient is wrong, and not symmetric.
    rest = float((dense - dense.T).norm())
    if rest > 1e-3 * float(dense.norm()):
        raise ArithmeticError(
            "the second derivatives of this model are not symmetric, so an operation in it has a "
            "wrong derivative rule. Use curvature='ggn'"
        )
    return (dense + dense.T) / 2


class GGN(LinearOperator):
    """The generalised Gauss-Newton matrix 1/n Σ_i J_iᵀ (∂²ℓ_i/∂f²) J_i.

    Positive semi-definite for every loss that is convex in the output f; equal to the Hessian where
    f is linear in θ, and to the exact Fisher matrix for cross-entropy and squared error.

    Parameters
    ----------
    risk
        The rows, model and loss.

    Raises
    ------
    ValueError
        If the loss is not convex in the output, or is linear in it (as ``nll_loss`` is in
        log-probabilities), so that the matrix would be meaningless or zero.

    References
    ----------
    J. Martens, *New insights and perspectives on the natural gradient method*, JMLR 21 (2020), §8.
    """

    name = "ggn"
    semidefinite = True

    def __init__(self, risk: EmpiricalRisk) -> None:
        super().__init__(risk.p, risk.dtype, risk.device)
        self.risk = risk
        self.products = 0
        outputs = int(torch.Size(risk.output_shape).numel())
        self.form = OutputForm(risk, outputs, self._roots, self._multiply)
        known = output_distribution(risk.loss)
        linear = isinstance(known, Categorical) and known.log_probabilities
        self._known = None if linear else known
        if self._known is None:
            self._check_convex()

    def on_rows(self, rows: Sequence[int]) -> GGN:
        """The matrix of the mean loss over some of the rows."""
        return GGN(self.risk.with_rows(self.risk.rows.subset(rows)))

    def on_parameters(self, names: Collection[str]) -> GGN:
        """Its block of some of the parameters."""
        return GGN(self.risk.restricted(names))

    def _apply(self, columns: Tensor) -> Tensor:
        self.products += columns.shape[1]
        return self.form.product(columns).to(self.dtype)

    def _dense(self, block: int = 1024) -> Tensor:
        dense, products = self.form.dense()
        self.products += products
        return dense

    def _diagonal(self, block: int = 1024) -> Tensor:
        found = self.form.diagonal()
        if found is None:
            return super()._diagonal(block)
        self.products += self.form.root_count
        return found

    @property
    def rank_bound(self) -> int:
        """n·K, the number of rows of R in C = RᵀR; p where R is not to be had."""
        offered = self.form.root_count <= form.ROOT_OUTPUTS
        return self.risk.n * self.form.root_count if offered else self.size

    def factor_rows(self) -> Iterator[Tensor] | None:
        """R in blocks (b·K, p) with C = RᵀR; None where the output is too wide for roots."""
        found = self.form.factor_rows()
        self.products += 0 if found is None else self.form.root_count
        return found

    def _closed_roots(self, chunk: Chunk, output: Tensor) -> Tensor | None:
        """Roots in closed form, where the loss is known and they do not depend on the target."""
        if self._known is None:
            return None
        if isinstance(self._known, TokenCategorical):
            return self._known.roots(output, _labelled(self.risk, chunk))
        if isinstance(self._known, Categorical):
            target = self.risk.target(chunk.batch)
            ignored = getattr(self.risk.loss, "ignore_index", -100)
            # soft labels need not add up to one, and an ignored label has no curvature
            if target.is_floating_point() or bool((target == ignored).any()):
                return None
        return vmap(self._known.roots)(output)

    def _roots(self, chunk: Chunk, output: Tensor) -> Tensor:
        closed = self._closed_roots(chunk, output)
        if closed is not None:
            return closed
        return self.risk.autodiff.rows(
            lambda z, y: output_roots(self.risk.row_loss, z, y),
            output,
            self.risk.target(chunk.batch),
            what="output Hessians",
        )

    def _multiply(self, chunk: Chunk, output: Tensor, pushed: Tensor) -> Tensor:
        if isinstance(self._known, TokenCategorical):
            return self._known.multiply(output, pushed, _labelled(self.risk, chunk))
        if self.form.root_count <= CLOSED_OUTPUTS:
            roots = self._closed_roots(chunk, output)
            if roots is not None:
                return multiply_roots(roots, pushed)
        target = self.risk.target(chunk.batch)
        slope = gradient(lambda z: self.risk.row_loss(z, target).sum())
        return self.risk.autodiff.pullback(slope, output, pushed)  # symmetric

    def _check_convex(self) -> None:
        count = min(self.risk.n, 16)
        spread = [i * (self.risk.n - 1) // max(1, count - 1) for i in range(count)]
        probe = next(iter(self.risk.with_rows(self.risk.rows.subset(spread)).chunks()))
        with self.risk.model.evaluating():
            output = self.risk.model(self.risk.model.parameters(), probe.batch)
            if self.form.root_count > form.ROOT_OUTPUTS:
                signs = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
                u = signs.to(output)
                values = (u * self._multiply(probe, output, u[None])[0]).flatten(1).sum(1)
            else:
                hessians = self.risk.autodiff.rows(
                    lambda z, y: output_hessian(self.risk.row_loss, z, y),
                    output,
                    self.risk.target(probe.batch),
                    what="output Hessians",
                )
                values = torch.linalg.eigvalsh(hessians.to(self.dtype)).flatten()
        largest = float(values.abs().max())
        if largest == 0.0:
            raise ValueError(
                "the loss is linear in the model's output, so the GGN is zero. Leave the last "
                "nonlinearity (log_softmax) to the loss, or use curvature='hessian' or 'fisher'"
            )
        if float(values.min()) < -1e-4 * largest:
            raise ValueError(
                "the GGN needs a loss that is convex in the model's output; this one has curvature "
                f"{float(values.min()):.3g} there. Use curvature='hessian'"
            )


class Fisher(LinearOperator):
    """The Fisher matrix 1/n Σ_i E_y[∇ℓ(f_i, y) ∇ℓ(f_i, y)ᵀ].

    Parameters
    ----------
    risk
        The rows, model and loss.
    kind
        ``"exact"``: the expectation over the model's own distribution of labels, in closed form;
        ``"sampled"``: one or several labels drawn from it per row; ``"empirical"``: the label that
        the row has, which is no Fisher matrix but goes by the name.
    samples, seed
        For ``"sampled"``: labels per row, and the seed. The labels depend on the seed and the
        position of a row, not on the batch size.
    distribution
        The distribution of labels; default: known for cross-entropy, binary cross-entropy and
        squared error.

    Notes
    -----
    A loss that averages over t positions of a row is −1/t times a log-likelihood; its Fisher matrix
    is scaled by 1/t, so that it stays equal to the GGN.

    References
    ----------
    F. Kunstner, L. Balles, P. Hennig, *Limitations of the empirical Fisher approximation* (2019),
    §2.
    """

    semidefinite = True

    def __init__(
        self,
        risk: EmpiricalRisk,
        kind: FisherKind = "exact",
        *,
        samples: int = 1,
        seed: int = 0,
        distribution: OutputDistribution | None = None,
    ) -> None:
        super().__init__(risk.p, risk.dtype, risk.device)
        self.risk = risk
        self.products = 0
        if kind not in ("exact", "sampled", "empirical"):
            raise ValueError(
                f"expected kind 'exact', 'sampled' or 'empirical' of Fisher; got {kind!r}"
            )
        if samples < 1:
            raise ValueError(f"expected at least one sample per row; got {samples}")
        self.kind: FisherKind = kind
        self.samples = samples
        self.seed = seed
        self.name = f"fisher-{kind}"
        found = distribution or output_distribution(risk.loss)
        if found is None and kind != "empirical":
            raise ValueError(
                f"the distribution of labels behind this loss is not known, so Fisher {kind!r} is "
                "not defined. Pass distribution=, or use kind='empirical' or curvature='ggn'"
            )
        self.distribution = found
        outputs = int(torch.Size(risk.output_shape).numel())
        count = {"empirical": 1, "sampled": samples, "exact": outputs}[kind]
        self.form = OutputForm(risk, count, self._roots, self._multiply)
        # the position that a row has where labels are drawn, if it is another than here
        self._positions: Tensor | None = None

    def _over(self, risk: EmpiricalRisk) -> Fisher:
        other = Fisher(
            risk,
            self.kind,
            samples=self.samples,
            seed=self.seed,
            distribution=self.distribution,
        )
        other._positions = self._positions
        return other

    def on_rows(self, rows: Sequence[int]) -> Fisher:
        """The matrix over some of the rows, which keep their sampled labels."""
        other = self._over(self.risk.with_rows(self.risk.rows.subset(rows)))
        chosen = torch.as_tensor([int(row) for row in rows])
        other._positions = chosen if self._positions is None else self._positions[chosen]
        return other

    def on_parameters(self, names: Collection[str]) -> Fisher:
        """Its block of some of the parameters."""
        return self._over(self.risk.restricted(names))

    def _apply(self, columns: Tensor) -> Tensor:
        self.products += columns.shape[1]
        return self.form.product(columns).to(self.dtype)

    def _dense(self, block: int = 1024) -> Tensor:
        dense, products = self.form.dense()
        self.products += products
        return dense

    def _diagonal(self, block: int = 1024) -> Tensor:
        found = self.form.diagonal()
        if found is None:
            return super()._diagonal(block)
        self.products += self.form.root_count
        return found

    @property
    def rank_bound(self) -> int:
        """n·K, the number of rows of R in C = RᵀR; p where R is not to be had."""
        offered = self.form.root_count <= form.ROOT_OUTPUTS
        return self.risk.n * self.form.root_count if offered else self.size

    def factor_rows(self) -> Iterator[Tensor] | None:
        """R in blocks (b·K, p) with C = RᵀR; None where the output is too wide for roots."""
        found = self.form.factor_rows()
        self.products += 0 if found is None else self.form.root_count
        return found

    def _multiply(self, chunk: Chunk, output: Tensor, pushed: Tensor) -> Tensor:
        return multiply_roots(self._roots(chunk, output), pushed)

    def _roots(self, chunk: Chunk, output: Tensor) -> Tensor:
        if self.kind == "empirical":
            target = self.risk.target(chunk.batch)
            return gradient(lambda z: self.risk.row_loss(z, target).sum())(output)[:, None]
        assert self.distribution is not None
        drawn = range(self.samples if self.kind == "sampled" else 0)
        noises = [self._noise(chunk, output, s) for s in drawn]
        if isinstance(self.distribution, TokenCategorical):
            labelled = _labelled(self.risk, chunk)
            if self.kind == "exact":
                return self.distribution.roots(output, labelled)
            draws = [self.distribution.sampled_root(output, noise, labelled) for noise in noises]
            return torch.stack(draws, dim=1) / self.samples**0.5
        self._check_no_ignored_label(chunk)
        if self.kind == "exact":
            return vmap(self.distribution.roots)(output)
        draws = [vmap(self.distribution.sampled_root)(output, noise) for noise in noises]
        return torch.stack(draws, dim=1) / self.samples**0.5

    def _check_no_ignored_label(self, chunk: Chunk) -> None:
        """A label that the loss ignores has no distribution, but would be given one."""
        target = self.risk.target(chunk.batch)
        ignored = getattr(self.risk.loss, "ignore_index", -100)
        if (
            isinstance(self.distribution, Categorical)
            and isinstance(target, Tensor)
            and not target.is_floating_point()
            and bool((target == ignored).any())
        ):
            raise ValueError(
                f"Fisher {self.kind!r} is not defined where the loss ignores labels "
                f"(ignore_index={ignored}, in rows {chunk.start} to {chunk.stop - 1}). Use "
                "curvature='ggn', which leaves them out, or kind='empirical'"
            )

    def _noise(self, chunk: Chunk, output: Tensor, sample: int) -> Tensor:
        """Noise for the rows of a chunk, the same whatever the chunk."""
        assert self.distribution is not None
        positions = torch.arange(chunk.start, chunk.stop)
        if self._positions is not None:
            positions = self._positions[positions]
        shape = output[:1].expand(NOISE_ROWS, *output.shape[1:])
        found: Tensor | None = None
        for block in (positions // NOISE_ROWS).unique().tolist():
            entropy = np.random.SeedSequence((self.seed, sample, int(block)))
            generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
            noise = self.distribution.noise(shape, generator)
            if found is None:
                found = noise.new_empty(len(chunk), *noise.shape[1:])
            here = positions // NOISE_ROWS == block
            found[here.to(noise.device)] = noise[(positions[here] % NOISE_ROWS).to(noise.device)]
        assert found is not None
        return found


def _labelled(risk: EmpiricalRisk, chunk: Chunk) -> Tensor:
    """Which positions of the outputs of a chunk have a label, (b, t)."""
    if not isinstance(risk.loss, TokenLoss):
        raise TypeError(
            "expected a TokenLoss for the distribution of tokens, as it knows which positions have "
            f"a label; got {type(risk.loss).__name__}"
        )
    return risk.loss.labelled(risk.target(chunk.batch))


Curvature = Hessian | GGN | Fisher
