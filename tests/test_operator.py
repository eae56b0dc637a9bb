"""The algebra of operators against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upweight.operator import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Gram,
    Identity,
    LinearOperator,
    Product,
    Scaled,
    Sum,
)


def symmetric(p: int, seed: int) -> torch.Tensor:
    a = torch.randn(p, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a + a.T


def operators(p: int) -> dict[str, tuple[LinearOperator, torch.Tensor]]:
    """Each kind of operator with the matrix that it stands for."""
    a, b = symmetric(p, 0), symmetric(p, 1)
    rows = torch.randn(2, p, dtype=torch.float64)
    diagonal = torch.rand(p, dtype=torch.float64)
    eye = torch.eye(p, dtype=torch.float64)
    return {
        "identity": (Identity(p, torch.float64, "cpu"), eye),
        "dense": (Dense(a), a),
        "diagonal": (Diagonal(diagonal), diagonal.diag()),
        "gram": (Gram(rows), rows.T @ rows),
        "blocks": (
            BlockDiagonal([Dense(a), Diagonal(diagonal)]),
            torch.block_diag(a, diagonal.diag()),
        ),
        "sum": (Sum([Dense(a), Dense(b)]), a + b),
        "plus": (Dense(a) + Gram(rows), a + rows.T @ rows),
        "scaled": (Scaled(Dense(a), -2.0), -2.0 * a),
        "times": (0.5 * Dense(a), 0.5 * a),
        "product": (Product([Dense(a), Dense(b), Dense(a)]), a @ b @ a),
        "damped": (Dense(a).damped(0.3), a + 0.3 * eye),
    }


@pytest.mark.parametrize("name", sorted(operators(4)))
@pytest.mark.parametrize("p", [1, 4])
def test_operator_is_its_matrix(name: str, p: int) -> None:
    operator, matrix = operators(p)[name]
    columns = torch.randn(operator.size, 3, dtype=torch.float64)
    assert operator.shape == tuple(matrix.shape)
    torch.testing.assert_close(operator @ columns, matrix @ columns)
    torch.testing.assert_close(operator @ columns[:, 0], matrix @ columns[:, 0])
    torch.testing.assert_close(operator.dense(), matrix)
    torch.testing.assert_close(operator.diagonal(), matrix.diagonal())


class ByProducts(LinearOperator):
    """Knows nothing but its product: the general ways to a dense form and a diagonal."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__(len(matrix), matrix.dtype, "cpu")
        self.matrix = matrix

    def _apply(self, columns: torch.Tensor) -> torch.Tensor:
        return self.matrix @ columns


@settings(max_examples=20, deadline=None)
@given(p=st.integers(1, 9), block=st.integers(1, 10))
def test_dense_form_by_products_of_any_block_size(p: int, block: int) -> None:
    matrix = symmetric(p, p)
    torch.testing.assert_close(ByProducts(matrix)._dense(block), matrix)
    torch.testing.assert_close(ByProducts(matrix)._diagonal(block), matrix.diagonal())


def test_dense_forms_are_float64() -> None:
    assert Dense(torch.eye(2)).dense().dtype == torch.float64
    assert ByProducts(torch.eye(2)).dense().dtype == torch.float64


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 2, 2), ()])
def test_shapes_that_do_not_match_are_told(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a vector \(2,\) or columns \(2, k\)"):
        Dense(torch.eye(2)) @ torch.ones(shape)


def test_sizes_that_do_not_match_are_told() -> None:
    with pytest.raises(ValueError, match=r"sizes \[2, 3\]"):
        Dense(torch.eye(2)) + Dense(torch.eye(3))
    with pytest.raises(ValueError, match="square"):
        Dense(torch.ones(2, 3))
    with pytest.raises(ValueError, match="at least one block"):
        BlockDiagonal([])
