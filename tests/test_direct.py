"""Direct inverses: positive definite, indefinite, singular, low rank, and their certificates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import upweight as uw
from upweight.inverse import DirectFactors
from upweight.inverse.certificate import warn_of_residuals
from upweight.operator import Dense, Gram


def spectrum(values: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    )
    return q @ torch.tensor(values, dtype=torch.float64).diag() @ q.T


class WithRows(Gram):
    """RᵀR that offers its rows, as the GGN does."""

    rank_bound = property(lambda self: len(self.rows))

    def factor_rows(self) -> Iterator[Tensor]:
        yield from self.rows.split(2)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
def test_positive_definite_by_cholesky(damping: float) -> None:
    a = spectrum([0.5, 1.0, 3.0])
    inverse = DirectFactors(Dense(a)).inverse(damping)
    columns = torch.randn(3, 5, dtype=torch.float64)
    wanted = torch.linalg.inv(a + damping * torch.eye(3).double()) @ columns
    torch.testing.assert_close(inverse @ columns, wanted, rtol=1e-12, atol=0)
    assert "positive definite" in inverse.certificate.facts["factorisation"]
    assert inverse.certificate.columns == 5
    assert inverse.certificate.residual_max < 1e-14


def test_indefinite_is_exact_and_told() -> None:
    a = spectrum([-2.0, -0.5, 1.0, 3.0])
    factors = DirectFactors(Dense(a))
    with pytest.warns(uw.IndefiniteCurvatureWarning, match="2 of its 4 eigenvalues are negative"):
        inverse = factors.inverse(0.1)
    columns = torch.randn(4, 3, dtype=torch.float64)
    wanted = torch.linalg.inv(a + 0.1 * torch.eye(4).double()) @ columns
    torch.testing.assert_close(inverse @ columns, wanted, rtol=1e-11, atol=0)
    assert inverse.certificate.facts["negative eigenvalues"] == 2
    assert any("indefinite" in note for note in inverse.certificate.notes)
    # 0.6 > 0.5 leaves one negative eigenvalue, and the eigenvalues are not computed again
    with pytest.warns(uw.IndefiniteCurvatureWarning, match="1 of its 4"):
        factors.inverse(0.6)


@settings(max_examples=25, deadline=None)
@given(p=st.integers(2, 8), r=st.integers(1, 7), damping=st.floats(1e-4, 10.0))
def test_smaller_side_equals_the_dense_inverse(p: int, r: int, damping: float) -> None:
    rows = torch.randn(r, p, generator=torch.Generator().manual_seed(p * r), dtype=torch.float64)
    inverse = DirectFactors(WithRows(rows)).inverse(damping)
    columns = torch.eye(p, dtype=torch.float64)
    wanted = torch.linalg.inv(rows.T @ rows + damping * columns)
    torch.testing.assert_close(inverse @ columns, wanted, rtol=1e-9, atol=1e-9)
    assert ("smaller side" in inverse.certificate.facts["factorisation"]) == (r < p)


@pytest.mark.parametrize(
    "operator",
    [
        Dense(spectrum([0.0, 1.0, 2.0])),
        Dense(spectrum([-1.0, 0.0, 2.0])),
        WithRows(torch.ones(1, 3, dtype=torch.float64)),
    ],
)
def test_singular_without_damping_is_refused(operator: Gram) -> None:
    with pytest.raises(ValueError, match=r"singular.*[Cc]hoose a (larger )?damping"):
        DirectFactors(operator).inverse(0.0)


def test_damping_that_meets_an_eigenvalue_is_refused() -> None:
    with pytest.raises(ValueError, match="singular"):
        DirectFactors(Dense(torch.diag(torch.tensor([-0.5, 1.0])))).inverse(0.5)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_damping_out_of_range_is_refused(damping: float) -> None:
    with pytest.raises(ValueError, match="expected a damping"):
        DirectFactors(Dense(torch.eye(2))).inverse(damping)


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        DirectFactors(Dense(torch.tensor([[float("nan")]])))


def test_a_matrix_beyond_memory_is_refused_before_it_is_formed() -> None:
    class Huge(Gram):
        rank_bound = property(lambda self: 10**7)

        def __init__(self) -> None:
            super().__init__(torch.zeros(1, 1))
            self.size = 10**7

    with pytest.raises(MemoryError, match="parameters="):
        DirectFactors(Huge())


@pytest.mark.parametrize(
    "operator",
    [Dense(spectrum([0.1, 1.0, 2.0])), Dense(spectrum([-0.4, 1.0, 2.0])), "rows"],
    ids=["definite", "indefinite", "smaller side"],
)
@pytest.mark.filterwarnings("ignore::upweight.IndefiniteCurvatureWarning")
def test_the_factor_that_is_kept_is_of_its_damping(operator: Dense | str) -> None:
    if isinstance(operator, str):
        operator = WithRows(torch.randn(2, 3, dtype=torch.float64))  # type: ignore[assignment]
    factors = DirectFactors(operator)  # type: ignore[arg-type]
    columns = torch.randn(3, 2, dtype=torch.float64)
    kept = factors.inverse(0.1)
    for damping in (0.1, 0.7, 0.1, 0.1, 0.3, 0.7):
        fresh = DirectFactors(operator).inverse(damping)  # type: ignore[arg-type]
        inverse = factors.inverse(damping)
        preconditioner = factors.preconditioner(damping)
        wanted = fresh @ columns
        assert torch.equal(inverse @ columns, wanted)
        assert torch.equal(preconditioner @ columns, wanted)
        assert inverse.certificate.to_dict() == fresh.certificate.to_dict()
    # one that was made before keeps its own
    again = kept @ columns
    assert torch.equal(again, DirectFactors(operator).inverse(0.1) @ columns)  # type: ignore[arg-type]


def test_every_indefinite_inverse_warns_and_no_preconditioner_does() -> None:
    factors = DirectFactors(Dense(spectrum([-2.0, 1.0, 3.0])))
    factors.preconditioner(0.1)
    for _ in range(2):
        with pytest.warns(uw.IndefiniteCurvatureWarning, match="1 of its 3"):
            inverse = factors.inverse(0.1)
        assert inverse.certificate.facts["negative eigenvalues"] == 1
        assert len(inverse.certificate.notes) == 1


def test_a_refused_damping_leaves_the_next_one_alone() -> None:
    factors = DirectFactors(Dense(torch.diag(torch.tensor([-0.5, 1.0]))))
    wanted = factors.inverse(1.0) @ torch.ones(2)
    with pytest.raises(ValueError, match="singular"):
        factors.inverse(0.5)
    with pytest.raises(ValueError, match="expected a damping"):
        factors.preconditioner(-1.0)
    assert torch.equal(factors.inverse(1.0) @ torch.ones(2), wanted)


def test_certificate_counts_a_bad_solve() -> None:
    """The residual is measured, not assumed: break the solve and it shows."""
    inverse = DirectFactors(Dense(torch.eye(2, dtype=torch.float64))).inverse(1.0)
    inverse._solve = lambda columns: columns
    with pytest.warns(uw.ResidualWarning, match=r"relative residual of 1\.0e\+00"):
        inverse @ torch.ones(2, dtype=torch.float64)
    assert inverse.certificate.residual_max == pytest.approx(1.0)
    assert "1.0e+00" in str(inverse.certificate)


def test_a_residual_that_is_no_number_counts_as_infinite() -> None:
    certificate = uw.Certificate("own", 0.1, 3)
    certificate.add(torch.tensor([0.5]))
    certificate.add(torch.tensor([float("nan"), 0.25]))
    certificate.add(torch.tensor([0.125]))
    assert certificate.measured == 4
    assert certificate.residual_max == certificate.residual_mean == float("inf")
    with pytest.warns(uw.ResidualWarning, match="nan"):
        warn_of_residuals(torch.tensor([0.0, float("nan")]), 1e-3, "")
