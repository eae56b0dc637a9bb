"""Products with curvatures, chunk by chunk, and the form that GGN and Fisher matrices share.

    C = 1/n Σ_i J_iᵀ A_i J_i,        A_i = S_i S_iᵀ a curvature of row i's loss in its output

Letters: n rows, b rows in a chunk, o numbers in one output, K roots per row, p parameters, k
columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from upweight.autodiff import vjp
from upweight.curvature.linear import dense_gram
from upweight.layers import jacobian_rows
from upweight.operator import wide
from upweight.risk import Chunk, EmpiricalRisk

__all__ = ["OutputForm", "chunked_product", "multiply_roots"]

# Tangents of all columns that go through a chunk together stay below this many bytes.
COLUMN_BYTES = 256 * 2**20
# Beyond this many output numbers a row's output Hessian is multiplied, never formed.
ROOT_OUTPUTS = 512

# (θ, chunk) → (tangents (k, …) of these columns, which columns) → (k, …) by name
ChunkProduct = Callable[[Any, Chunk], Callable[[Any, slice], Any]]


def chunked_product(risk: EmpiricalRisk, columns: Tensor, product: ChunkProduct) -> Tensor:
    """1/n Σ over chunks of their products with columns (p, k), in `wide` precision."""
    k = columns.shape[1]
    per_column = 3 * risk.activation_bytes
    # Small networks: many columns share one primal pass. Large ones: few columns, and the rows of a
    # chunk fill the memory instead.
    most = risk.memory.chunk(COLUMN_BYTES)
    together = max(1, min(k, int(most / (64 * per_column + 3 * risk.p * 8))))
    total = torch.zeros(columns.shape, dtype=wide(risk.dtype, risk.device), device=risk.device)
    with risk.model.evaluating():
        theta = risk.model.parameters()
        for chunk in risk.mine().chunks(together * per_column):
            of_chunk = product(theta, chunk)
            for start in range(0, k, together):
                block = slice(start, start + together)
                part = of_chunk(risk.model.unflatten(columns[:, block].T), block)
                total[:, block] += risk.model.flatten(part).T
    if risk.cluster is not None:
        risk.cluster.add([total], "products with the curvature")
    return total / risk.n


def multiply_roots(roots: Tensor, pushed: Tensor) -> Tensor:
    """S Sᵀ u for S (b, K, *o) and u (k, b, *o)."""
    flat = roots.reshape(*roots.shape[:2], -1)  # (b, K, o)
    inner = torch.einsum("bro,kbo->kbr", flat, pushed.reshape(*pushed.shape[:2], -1))
    return torch.einsum("bro,kbr->kbo", flat, inner).reshape(pushed.shape)


@dataclass(frozen=True)
class OutputForm:
    """1/n Σ_i J_iᵀ A_i J_i for curvatures A_i = S_i S_iᵀ of each row's loss in its output.

    Parameters
    ----------
    risk
        The rows, model and loss.
    root_count
        K, the number of roots of one row.
    roots
        S for a chunk and its output (b, *o): (b, K, *o).
    multiply
        A u for a chunk, its output and u (k, b, *o).
    """

    risk: EmpiricalRisk
    root_count: int
    roots: Callable[[Chunk, Tensor], Tensor]
    multiply: Callable[[Chunk, Tensor, Tensor], Tensor]

    def product(self, columns: Tensor, weights: Tensor | None = None) -> Tensor:
        """C V for columns (p, k): along J, through A, back along Jᵀ; one pass over the rows.

        With weights (n, k), column j is multiplied with 1/n Σ_i w_ij J_iᵀ A_i J_i.
        """
        risk = self.risk

        def chunk_product(theta: Any, chunk: Chunk) -> Callable[[Any, slice], Any]:
            def outputs(t: Any) -> Tensor:
                return risk.model(t, chunk.batch)

            # one pass forward, and its graph, for all columns
            output, pull = vjp(outputs, theta)
            output = output.detach()

            def of_columns(tangents: Any, block: slice) -> Any:
                pushed = risk.autodiff.pushforward(outputs, theta, tangents)  # (k, b, *o)
                curved = self.multiply(chunk, output, pushed)
                if weights is not None:
                    own = weights[chunk.start : chunk.stop, block].T.to(curved)  # (k, b)
                    curved = curved * own.reshape(*own.shape, *[1] * (curved.ndim - 2))
                return risk.autodiff.pulled(pull, curved)

            return of_columns

        return chunked_product(risk, columns, chunk_product)

    def factor_rows(self) -> Iterator[Tensor] | None:
        """R in blocks (b·K, p) with C = RᵀR, rows S_iᵀJ_i/√n; None if the output is too wide."""
        return None if self.root_count > ROOT_OUTPUTS else self._factor_rows()

    def _factor_rows(self) -> Iterator[Tensor]:
        risk = self.risk

        def one(row: Any, root: Tensor) -> Any:
            batch = tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, row)
            _, pullback = vjp(lambda t: risk.model(t, batch), theta)
            return vmap(lambda s: pullback(s[None]))(root)

        theta = risk.model.parameters()
        taps = risk.taps()
        row_bytes = 2 * risk.p * risk.dtype.itemsize + risk.activation_bytes
        for chunk in risk.chunks(self.root_count * row_bytes):
            rows: Tensor | None = None
            with risk.model.evaluating():
                if taps is not None:
                    rows = taps.attempt(lambda t, c=chunk: jacobian_rows(t, c, self.roots))
                if rows is None:
                    root = self.roots(chunk, risk.model(theta, chunk.batch))
                    what = "Jacobians of single rows"
                    pulled = risk.autodiff.rows(one, chunk.batch, root, what=what)
                    rows = risk.model.flatten(pulled)
            yield rows.flatten(0, 1) / risk.n**0.5

    def dense(self) -> tuple[Tensor, int]:
        """C (p, p) in `wide` precision, and how many products it took."""
        risk = self.risk
        found = dense_gram(risk, self.root_count, self.roots, self.multiply)
        if found is not None:
            return found, self.root_count
        blocks = self.factor_rows()
        if blocks is None:
            return self.product(torch.eye(risk.p, dtype=risk.dtype, device=risk.device)), risk.p
        total = torch.zeros(risk.p, risk.p, dtype=wide(risk.dtype, risk.device), device=risk.device)
        for rows in blocks:
            total += rows.T @ rows
        return total, self.root_count

    def diagonal(self) -> Tensor | None:
        """The diagonal of C, (p,), by all rows of R; None where R is not to be had."""
        blocks = self.factor_rows()
        if blocks is None:
            return None
        risk = self.risk
        total = torch.zeros(risk.p, dtype=wide(risk.dtype, risk.device), device=risk.device)
        for rows in blocks:
            total += rows.square().sum(0)
        return total
