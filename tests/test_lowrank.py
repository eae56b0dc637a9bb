"""Lanczos, Nyström and the diagonal: eigenpairs with their complement, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import upweight as uw
from matrices import Counting, draw, off, residuals, solved, with_spectrum
from upweight.inverse import JacobiFactors, LanczosFactors, NystroemFactors
from upweight.inverse.jacobi import hutchinson_diagonal
from upweight.inverse.lanczos import lanczos
from upweight.operator import Dense, LinearOperator

SPREAD = torch.cat([torch.logspace(-6, -2, 40), torch.tensor([0.5, 1.0, 3.0, 8.0])]).double()
INDEFINITE = torch.cat([SPREAD, torch.tensor([-2.0, -0.3])]).double()

MAKE = {
    "arnoldi": lambda a, r, seed=0: LanczosFactors(a, r, seed=seed),
    "nystroem": lambda a, r, seed=0: NystroemFactors(a, r, power=2, seed=seed),
}
both = pytest.mark.parametrize("name", sorted(MAKE))


@both
@pytest.mark.parametrize("values", [SPREAD, INDEFINITE], ids=["semidefinite", "indefinite"])
def test_full_rank_is_exact(name: str, values: Tensor) -> None:
    matrix = with_spectrum(values)
    right = draw(len(values), 50)
    with _indefinite_told(values):
        inverse = MAKE[name](Dense(matrix), len(values)).inverse(0.1)
    assert off(inverse @ right, solved(matrix, 0.1, right)) < 1e-8


def _indefinite_told(values: Tensor) -> object:
    import contextlib

    if float(values.min()) + 0.1 < 0:
        return pytest.warns(uw.IndefiniteCurvatureWarning, match="indefinite")
    return contextlib.nullcontext()


@both
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), p=st.integers(1, 14), r=st.integers(0, 14))
def test_full_rank_is_exact_whatever_the_rank_of_the_matrix(
    name: str, seed: int, p: int, r: int
) -> None:
    """Also where eigenvalues are zero or equal, and the Krylov space ends early."""
    root = draw(p, r, seed=seed)
    matrix = root @ root.T + 2.0 * torch.eye(p, dtype=torch.float64) * (seed % 2)
    right = draw(p, 3, seed=seed + 1)
    inverse = MAKE[name](Dense(matrix), p, seed).inverse(0.3)
    assert off(inverse @ right, solved(matrix, 0.3, right)) < 1e-7


@both
def test_the_complement_is_kept(name: str) -> None:
    """Outside the eigenvectors the inverse is 1/λ, where it is in truth nearly that, and not 0."""
    matrix = with_spectrum(SPREAD)
    inverse = MAKE[name](Dense(matrix), 8).inverse(0.1)
    right = torch.linalg.eigh(matrix).eigenvectors[:, :10]  # eigenvalues below 1e-4
    assert off(inverse @ right, right / 0.1) < 0.05
    assert off(inverse @ draw(44, 5), solved(matrix, 0.1, draw(44, 5))) < 0.02


@both
def test_top_eigenvalues(name: str) -> None:
    values = MAKE[name](Dense(with_spectrum(INDEFINITE)), 12).pairs().values.sort().values
    assert float(values[-1]) == pytest.approx(8.0, rel=1e-3)
    assert float(values[0]) == pytest.approx(-2.0, rel=1e-2)


def test_ritz_values_are_within_their_errors() -> None:
    matrix = with_spectrum(torch.linspace(-3, 5, 60).double())
    ritz = lanczos(Dense(matrix), draw(60, 1)[:, 0], 15)
    true = torch.linalg.eigvalsh(matrix)
    nearest = (ritz.values[:, None] - true).abs().min(1).values
    assert bool((nearest <= ritz.errors + 1e-12).all())
    rest = (matrix @ ritz.vectors - ritz.vectors * ritz.values).norm(dim=0)
    assert torch.allclose(rest, ritz.errors, atol=1e-10)
    assert off(ritz.vectors.T @ ritz.vectors, torch.eye(15).double()) < 1e-12


def test_a_start_makes_its_own_solution_exact_early() -> None:
    """Started at b, few steps solve for b; started at random, they do not."""
    matrix = with_spectrum(torch.logspace(-2, 1, 80).double())
    # of five eigenvectors in the midst of the spectrum
    b = torch.linalg.eigh(matrix).eigenvectors[:, 40:45].sum(1)
    operator = Dense(matrix)
    informed = LanczosFactors(operator, 5, informed=True)
    assert informed.waits
    assert informed.inform(b)
    assert not informed.inform(b.clone())  # nothing new
    wanted = solved(matrix, 0.5, b[:, None])[:, 0]
    assert off(informed.inverse(0.5) @ b, wanted) < 1e-8
    assert off(LanczosFactors(operator, 5).inverse(0.5) @ b, wanted) > 1e-2


def test_more_steps_than_the_rank_give_better_pairs() -> None:
    values = torch.logspace(-3, 1, 80).double()
    operator = Dense(with_spectrum(values))
    found = [LanczosFactors(operator, 10, steps=s).pairs().values for s in (10, 30)]
    errors = [off(v, values.flip(0)[:10]) for v in found]
    assert errors[1] < errors[0] / 10


def test_nystroem_needs_no_second_product_where_the_matrix_is_semidefinite() -> None:
    semidefinite, indefinite = Counting(with_spectrum(SPREAD)), Counting(with_spectrum(INDEFINITE))
    facts = [NystroemFactors(a, 10).pairs().facts["form"] for a in (semidefinite, indefinite)]
    assert semidefinite.calls == [10]
    assert indefinite.calls == [10, 10]
    assert facts[0] == "Nyström"
    assert "Rayleigh-Ritz" in facts[1]


def test_the_shift_is_reported_where_there_is_one() -> None:
    """A matrix of rank 3 sketched by 6 directions: its core is singular."""
    root = draw(20, 3)
    deficient = NystroemFactors(Dense(root @ root.T), 6)
    assert "shift" in deficient.pairs().facts
    right = draw(20, 4)
    assert off(deficient.inverse(0.1) @ right, solved(root @ root.T, 0.1, right)) < 1e-7
    full = NystroemFactors(Dense(with_spectrum([1.0, 2.0, 3.0, 4.0])), 2)
    assert "shift" not in full.pairs().facts


def test_float32_semidefinite_matrix_is_taken_as_such() -> None:
    """Round-off makes eigenvalues of -1e-7; that is no indefinite curvature."""
    root = draw(60, 5).float()
    matrix = (root @ root.T).float()
    factors = NystroemFactors(Dense(matrix), 20, power=1)
    assert factors.pairs().facts["form"] == "Nyström"
    right = draw(60, 4)
    assert off(factors.inverse(0.1) @ right, solved(matrix, 0.1, right)) < 1e-3


@both
@pytest.mark.parametrize("rank", [0, -1, 45, 2.0, True])
def test_ranks_out_of_range(name: str, rank: object) -> None:
    with pytest.raises((ValueError, TypeError), match="rank"):
        MAKE[name](Dense(with_spectrum(SPREAD)), rank)  # type: ignore[arg-type]


@both
def test_zero_and_singular_damping(name: str) -> None:
    factors = MAKE[name](Dense(with_spectrum(INDEFINITE)), 20)
    with pytest.raises(ValueError, match="damping above 0"):
        factors.inverse(0.0)
    with pytest.raises(ValueError, match="damping λ ≥ 0"):
        factors.inverse(-0.1)
    singular = MAKE[name](Dense(with_spectrum([-1.0, 0.5, 2.0])), 3)
    with pytest.raises(ValueError, match="singular"):
        singular.inverse(1.0)


@both
def test_an_indefinite_inverse_is_told_of(name: str) -> None:
    with pytest.warns(uw.IndefiniteCurvatureWarning, match="negative"):
        inverse = MAKE[name](Dense(with_spectrum(INDEFINITE)), 20).inverse(0.1)
    assert inverse.certificate.facts["negative eigenvalues"] >= 1


@both
def test_preconditioners_are_positive_definite_even_then(name: str) -> None:
    factors = MAKE[name](Dense(with_spectrum(INDEFINITE)), 20)
    dense = factors.preconditioner(0.1).dense()
    assert float(torch.linalg.eigvalsh((dense + dense.T) / 2).min()) > 0


def test_options_out_of_range() -> None:
    operator = Dense(with_spectrum(SPREAD))
    with pytest.raises(ValueError, match="as many steps as the rank"):
        LanczosFactors(operator, 10, steps=5)
    with pytest.raises(ValueError, match="power"):
        NystroemFactors(operator, 10, power=-1)
    with pytest.raises(ValueError, match="probe"):
        JacobiFactors(operator, 0)


class Broken(LinearOperator):
    def _apply(self, columns: Tensor) -> Tensor:
        return columns * float("nan")


@both
def test_products_that_are_not_finite(name: str) -> None:
    with pytest.raises(ValueError, match="not finite"):
        MAKE[name](Broken(5, torch.float64, "cpu"), 3).inverse(0.1)


@both
def test_residuals_are_measured_on_a_budget(name: str) -> None:
    matrix, right = with_spectrum(SPREAD), draw(44, 6)
    inverse = MAKE[name](Dense(matrix), 5).inverse(0.1)
    x = inverse @ right
    assert (inverse.certificate.columns, inverse.certificate.measured) == (6, 0)
    inverse.budget = 8
    inverse @ right
    true = residuals(matrix, 0.1, x, right)
    assert inverse.certificate.measured == 6
    assert inverse.budget == 2
    assert inverse.certificate.residual_max == pytest.approx(float(true.max()), rel=1e-9)
    inverse @ right
    assert inverse.certificate.measured == 8


def test_jacobi_is_the_diagonal() -> None:
    matrix = with_spectrum(SPREAD)
    inverse = JacobiFactors(Dense(matrix)).inverse(0.1)
    assert torch.allclose(inverse @ torch.ones(44).double(), 1 / (matrix.diagonal() + 0.1))
    with pytest.raises(ValueError, match="damping above 0"):
        JacobiFactors(Dense(torch.zeros(3, 3).double())).inverse(0.0)


def test_the_estimated_diagonal_tends_to_the_exact_one() -> None:
    matrix = with_spectrum(SPREAD)
    errors = [off(hutchinson_diagonal(Dense(matrix), k), matrix.diagonal()) for k in (30, 3000)]
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 3
    # of a diagonal matrix one probe is enough
    diagonal = torch.diag(torch.arange(1.0, 5.0).double())
    assert off(hutchinson_diagonal(Dense(diagonal), 1), diagonal.diagonal()) < 1e-12
