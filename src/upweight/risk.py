"""The mean loss over rows in a fixed order, and its derivatives row by row.

    L(θ) = 1/n Σ_i ℓ_i(θ)          G = [∇ℓ_1, …, ∇ℓ_n]ᵀ  (n, p)

Letters: n rows, b rows in a chunk, p parameters, k directions. This is the only place that takes a
mean over rows, and it divides by n once, at the end: a ragged last chunk weighs as many rows as it
has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from upweight.autodiff import Autodiff, gradient
from upweight.checks import (
    check_repeatable,
    check_rows,
    describe,
    find_features,
    probe,
    same_form,
)
from upweight.costs import Memory
from upweight.functional import FunctionalModel, default_target
from upweight.layers import Taps, find_taps, row_gradients
from upweight.losses import RowLoss
from upweight.operator import wide
from upweight.ranks import check_ranks
from upweight.rows import Rows

if TYPE_CHECKING:
    from upweight.cluster import Cluster

__all__ = ["Chunk", "EmpiricalRisk"]

# Intermediate tensors of one chunk stay below this many bytes, unless one row alone needs more.
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Chunk:
    """Rows start … stop - 1 as one batch on the model's device, in the dtype of flat vectors."""

    start: int
    stop: int
    batch: Any

    def __len__(self) -> int:
        return self.stop - self.start


class EmpiricalRisk:
    """L(θ) = 1/n Σ_i ℓ_i(θ): a model, a loss and n rows in a fixed order.

    Parameters
    ----------
    model
        A trained `torch.nn.Module`. It is used in evaluation mode and comes back as it was.
    loss
        ``loss(output, target) → Tensor``. Mean and sum reductions are recognised by probing, one
        loss per row is accepted, and a loss that does not decompose into rows is refused. Whatever
        the reduction, ℓ_i is the loss of row i alone.
    data
        Rows, as `Rows` takes them: ``(x, y)`` tensors, a map-style data set, a `DataLoader`.
    parameters
        Name patterns of the parameters θ; default: those with ``requires_grad``.
    forward
        ``forward(model, batch) → output`` for batches that are not ``(x, y)``.
    target
        ``target(batch)``, what the loss gets beside the output.
    features
        ``features(batch)``: the tensor in the batch that ``mode="perturbation"`` differentiates by.
        Default: x of ``(x, y)``, or the only floating tensor that is not the target.
    batch_size
        At most so many rows go through the model at once; default: as memory allows. It never
        changes a result beyond round-off.
    names
        One name per row; see `Rows`.
    cluster
        The processes that have the same rows, and pass a share of them each.
    memory
        What the work may take beside the model, the rows and the results, such as ``"4GiB"``;
        chunks are made to fit. It never changes a result beyond round-off.

    Attributes
    ----------
    n, p
        Rows and parameters.
    notes
        What had to be done a slower way, in words.

    Raises
    ------
    TypeError, ValueError
        If the model, the loss and the rows do not fit together; the row at fault is named.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 2.0)
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> risk = EmpiricalRisk(model, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)))
    >>> risk.losses()  # (2x)²
    tensor([ 4., 36.])
    >>> risk.gradient()  # mean of 4x²
    tensor([20.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        parameters: str | Sequence[str] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        target: Callable[[Any], Any] | None = None,
        features: Callable[[Any], Tensor] | None = None,
        batch_size: int | None = None,
        names: Sequence[Any] | None = None,
        cluster: Cluster | None = None,
        memory: Memory | str | int | None = None,
    ) -> None:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"expected batch_size of at least 1, or None; got {batch_size!r}")
        self.model = FunctionalModel(model, forward, parameters)
        self.rows = Rows(data, names)
        self.loss = loss
        self.batch_size = batch_size
        self.memory = memory if isinstance(memory, Memory) else Memory.of(memory)
        self.autodiff = Autodiff()
        self._target = target or default_target
        self._features = features
        self.cluster = cluster
        self._within: slice | None = None
        found = probe(self.model, loss, self.rows, self._prepare, self._target)
        self.row_loss: RowLoss = found.row_loss
        self.output_shape: tuple[int, ...] = found.output_shape
        self.activation_bytes = found.activation_bytes
        self._taps: Taps | None = None
        self._taps_sought = False
        self._losses: Tensor | None = None
        self._losses = self._checked()

    def _checked(self) -> Tensor:
        """ℓ_i for every row, (n,), of rows that are in order on all ranks."""
        if self.cluster is None:
            return check_rows(self)
        check_ranks(self, self.cluster)
        return self.cluster.gather_rows(check_rows(self.mine()), "losses of rows")

    def with_rows(self, rows: Rows) -> EmpiricalRisk:
        """The same model and loss over other rows, which are taken as checked."""
        other = object.__new__(EmpiricalRisk)
        other.__dict__.update(self.__dict__)
        other.rows = rows
        other._losses = None
        other._within = None
        return other

    def within(self, rows: slice) -> EmpiricalRisk:
        """The same rows, n of them, of which passes take some alone, under their positions."""
        other = self.with_rows(self.rows)
        other._losses, other._within = self._losses, rows
        return other

    def mine(self) -> EmpiricalRisk:
        """The share of the rows that this rank passes; all of them where there is no cluster."""
        return self if self.cluster is None else self.within(self.cluster.share(self.n))

    def restricted(self, names: Collection[str]) -> EmpiricalRisk:
        """The same loss over the same rows as a function of some of the parameters alone."""
        other = self.with_rows(self.rows)
        other._losses, other._within = self._losses, self._within
        other.model = self.model.restricted(names)
        other._taps, other._taps_sought = None, False
        return other

    def over(self, data: Any, names: Sequence[Any] | None = None) -> EmpiricalRisk | None:
        """The same model and loss over new rows, checked; None if the rows have another form."""
        rows = Rows(data, names)
        if not same_form(self.rows, rows):
            return None
        other = self.with_rows(rows)
        check_repeatable(rows, self._prepare)
        other._losses = other._checked()
        return other

    @property
    def n(self) -> int:
        """The number of rows."""
        return len(self.rows)

    @property
    def p(self) -> int:
        """The number of parameters in θ."""
        return self.model.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of flat vectors and per-row gradients."""
        return self.model.vector_dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def notes(self) -> list[str]:
        """Slower ways that had to be taken, in words."""
        return self.autodiff.notes

    # --- rows ------------------------------------------------------------------------------------

    def _prepare(self, batch: Any) -> Any:
        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.to(self.device, self.dtype if leaf.is_floating_point() else None)
            # autograd takes no tensor that was made under torch.inference_mode()
            return leaf.clone() if leaf.is_inference() else leaf

        with torch.inference_mode(False):
            return tree_map(move, batch)

    def chunks(self, row_bytes: float = 0.0) -> Iterator[Chunk]:
        """All rows in order, so many at once that `row_bytes` for each stay within memory."""
        per_row = max(1.0, row_bytes + self.activation_bytes)
        self.memory.check_row(per_row)
        most = int(self.memory.chunk(CHUNK_BYTES) / per_row)
        size = max(1, min(self.n, most, self.batch_size or self.n))
        rows = self._within or slice(0, self.n)
        for start in range(rows.start, rows.stop, size):
            stop = min(start + size, rows.stop)
            if self.cluster is not None:
                self.cluster.watch()
            yield Chunk(start, stop, self._prepare(self.rows.batch(start, stop)))

    def target(self, batch: Any) -> Any:
        """What the loss gets beside the output, for a batch."""
        return self._target(batch)

    def batch_losses(self, parameters: Any, batch: Any) -> Tensor:
        """ℓ_i(θ) for the rows of a batch, (b,)."""
        return self.row_loss(self.model(parameters, batch), self._target(batch))

    def losses(self) -> Tensor:
        """ℓ_i(θ) for every row, (n,)."""
        if self._losses is None:
            self._losses = check_rows(self)
        return self._losses

    def outputs(self) -> Tensor:
        """The model's output for every row, (n, …)."""
        with self.model.evaluating():
            theta = self.model.parameters()
            return torch.cat([self.model(theta, c.batch) for c in self.chunks()])

    # --- gradients with respect to the parameters -------------------------------------------------

    def row_gradients(self, row_bytes: float = 0.0) -> Iterator[tuple[Chunk, Tensor]]:
        """G in chunks of rows: (chunk, (b, p)), never all of it.

        `row_bytes` is what the caller makes of each row, to be counted with the memory of a chunk.
        """
        own = 2 * self.p * self.dtype.itemsize + 2 * self.activation_bytes
        for chunk in self.chunks(row_bytes + own):
            # left before every yield: what the caller does meanwhile is not ours to switch
            with self.model.evaluating():
                gradients = self.chunk_gradients(chunk)
            yield chunk, gradients

    def chunk_gradients(self, chunk: Chunk) -> Tensor:
        """∇ℓ_i for the rows of a chunk, (b, p); inside ``model.evaluating()``."""
        taps = self.taps()
        if taps is not None:
            rows = taps.attempt(lambda t: row_gradients(t, chunk))
            if rows is not None:
                return rows

        def one(row: Any) -> Any:
            batch = tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, row)
            return gradient(lambda t: self.batch_losses(t, batch).sum())(theta)

        theta = self.model.parameters()
        return self.model.flatten(
            self.autodiff.rows(one, chunk.batch, what="gradients of single rows")
        )

    def taps(self) -> Taps | None:
        """Taps on the layers, where θ consists of linear layers that each act once for a row."""
        if not self._taps_sought:
            self._taps_sought = True
            self._taps = find_taps(self)
        return self._taps

    def gradient(self, weights: Tensor | None = None) -> Tensor:
        """Σ_i w_i ∇ℓ_i, (p,); the default weights 1/n give ∇L. One backward pass over the rows."""
        if weights is None:
            weights = torch.full((self.n,), 1.0 / self.n, dtype=torch.float64)
        return self.rmatmul(weights[:, None])[:, 0]

    def rmatmul(self, weights: Tensor) -> Tensor:
        """Gᵀ U for U (n, k) → (p, k), in `wide` precision.

        Few columns are k backward passes over the whole chunk; with more, the per-row gradients of
        the chunk are formed once and multiplied.
        """
        self._expect(weights, self.n, "rows")
        weights = weights.to(self.device)
        total = torch.zeros(
            self.p, weights.shape[1], dtype=wide(self.dtype, self.device), device=self.device
        )
        if weights.shape[1] > 2:
            for chunk, rows in self.row_gradients():
                part = weights[chunk.start : chunk.stop].to(rows.dtype)
                total += rows.T @ part
            return total
        with self.model.evaluating():
            theta = self.model.parameters()
            for chunk in self.chunks(3 * self.activation_bytes):
                part = weights[chunk.start : chunk.stop].T.to(self.dtype)
                pulled = self.autodiff.pullback(
                    lambda t, c=chunk: self.batch_losses(t, c.batch), theta, part
                )
                total += self.model.flatten(pulled).T
        return total

    def matmul(self, columns: Tensor) -> Tensor:
        """G V for V (p, k) → (n, k): the derivative of every row's loss along every column.

        Few columns are forward-mode derivatives of the batched losses; with more, the per-row
        gradients of each chunk are formed once and multiplied.
        """
        self._expect(columns, self.p, "parameters")
        columns = columns.to(self.device)
        parts: list[Tensor] = []
        if columns.shape[1] > 2:
            for _, rows in self.row_gradients():
                parts.append(rows.to(columns.dtype) @ columns)
            return torch.cat(parts)
        with self.model.evaluating():
            theta = self.model.parameters()
            tangents = self.model.unflatten(columns.T)
            for chunk in self.chunks(3 * self.activation_bytes):
                pushed = self.autodiff.pushforward(
                    lambda t, c=chunk: self.batch_losses(t, c.batch), theta, tangents
                )
                parts.append(pushed.T.to(columns.dtype))
        return torch.cat(parts)

    def _expect(self, matrix: Tensor, length: int, what: str) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != length:
            raise ValueError(
                f"expected a matrix ({length}, k), one line for each of the {what}; got shape "
                f"{tuple(matrix.shape)}"
            )

    # --- gradients with respect to the features ---------------------------------------------------

    def feature_shape(self) -> tuple[int, ...]:
        """The shape of one row's features, for ``mode="perturbation"``.

        Raises
        ------
        TypeError
            If the features cannot be differentiated by, as token ids cannot.
        """
        batch = self._prepare(self.rows.batch(0, 1))
        get, _ = find_features(batch, self._target(batch), self._features)
        return tuple(get(batch).shape[1:])

    def feature_gradients(self, columns: Tensor) -> Iterator[tuple[Chunk, Tensor]]:
        """∇_x ⟨v_j, ∇_θ ℓ(x_i)⟩ in chunks of rows: (chunk, (k, b, ...x)) for V (p, k).

        The mixed derivative ∂²ℓ/∂x∂θ (p times the features of a row) is never formed: the gradient
        by x of the chunk's loss is differentiated along each column.
        """
        self._expect(columns, self.p, "parameters")
        k = columns.shape[1]
        theta = self.model.parameters()
        tangents = self.model.unflatten(columns.T.to(self.device))
        row_bytes = 3 * self.activation_bytes
        together = max(1, min(k, int(self.memory.chunk(CHUNK_BYTES) / row_bytes)))
        for chunk in self.chunks(together * row_bytes):
            get, put = find_features(chunk.batch, self._target(chunk.batch), self._features)
            x = get(chunk.batch)

            def slope(t: Any, c: Chunk = chunk, x: Tensor = x, put: Any = put) -> Tensor:
                return gradient(lambda z: self.batch_losses(t, put(c.batch, z)).sum())(x)

            parts: list[Tensor] = []
            with self.model.evaluating():
                for start in range(0, k, together):
                    part = {n: v[start : start + together] for n, v in tangents.items()}
                    parts.append(self.autodiff.pushforward(slope, theta, part))
            yield chunk, torch.cat(parts) if len(parts) > 1 else parts[0]

    def __repr__(self) -> str:
        return (
            f"<EmpiricalRisk of {describe(self.model.model)}: {self.n} rows, {self.p} parameters, "
            f"loss reduction {self.row_loss.reduction!r}>"
        )
