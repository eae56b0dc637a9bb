"""Conjugate gradients: exact, frozen, preconditioned, honest about what they cannot do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import upweight as uw
from cases import make
from matrices import Counting, draw, off, residuals, solved, with_spectrum
from upweight.inverse import CGFactors, DirectFactors, JacobiFactors, NystroemFactors
from upweight.inverse.cg import conjugate_gradients
from upweight.operator import Dense, Diagonal, LinearOperator

SPREAD = torch.logspace(-3, 2, 40, dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "rtol", "damping"),
    [(torch.float32, 1e-5, 1.0), (torch.float64, 1e-8, 0.05)],
    ids=["32", "64"],
)
@pytest.mark.parametrize("k", [1, 7, 60], ids=["one", "some", "more columns than parameters"])
def test_solves_all_columns(dtype: torch.dtype, rtol: float, damping: float, k: int) -> None:
    matrix, right = with_spectrum(SPREAD).to(dtype), draw(40, k)
    inverse = CGFactors(Dense(matrix)).inverse(damping)
    x = inverse @ right
    assert float(residuals(matrix, damping, x, right).max()) < 2 * rtol
    condition = (100 + damping) / damping
    assert off(x, solved(matrix, damping, right)) < condition * rtol
    assert inverse.certificate.converged
    assert inverse.certificate.measured == inverse.certificate.columns == k


@settings(max_examples=25, deadline=None)
@given(
    p=st.integers(1, 12),
    k=st.integers(1, 15),
    seed=st.integers(0, 10_000),
    damping=st.floats(0.01, 1.0),
)
def test_any_positive_definite_matrix(p: int, k: int, seed: int, damping: float) -> None:
    root = draw(p, p, seed=seed)
    matrix, right = root @ root.T / p, draw(p, k, seed=seed + 1)
    inverse = CGFactors(Dense(matrix), rtol=1e-10).inverse(damping)
    x = inverse @ right
    assert off(x, solved(matrix, damping, right)) < 1e-6
    # columns do not see each other
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    assert off(inverse @ right[:, order], x[:, order]) < 1e-8


def test_columns_that_have_converged_are_left_alone() -> None:
    """An eigenvector takes one step; the products stop counting it then."""
    matrix = Counting(with_spectrum(SPREAD))
    eigenvector = torch.linalg.eigh(matrix.matrix).eigenvectors[:, :1]
    right = torch.cat([eigenvector.expand(-1, 9), draw(40, 1)], dim=1)
    result = conjugate_gradients(matrix.damped(0.1), right, rtol=1e-10)
    assert result.steps[:9].tolist() == [1] * 9
    assert int(result.steps[9]) > 10
    assert matrix.calls[0] == 10
    assert set(matrix.calls[1 : int(result.steps[9])]) == {1}


def test_zero_columns_are_solved_by_zero() -> None:
    right = torch.stack([torch.zeros(5), torch.ones(5)], dim=1).double()
    inverse = CGFactors(Dense(with_spectrum([1.0, 2.0, 3.0, 4.0, 5.0]))).inverse(0.1)
    x = inverse @ right
    assert not bool(x[:, 0].any())
    assert inverse.certificate.converged


@pytest.mark.parametrize(
    "make",
    [
        JacobiFactors,
        lambda a: JacobiFactors(a, probes=400),
        lambda a: NystroemFactors(a, 20),
        DirectFactors,
    ],
    ids=["jacobi", "jacobi-estimated", "nystroem", "direct"],
)
def test_the_preconditioner_is_used(make: object) -> None:
    """Ill-conditioned, nearly diagonal, a few large eigenvalues: each has something to gain."""
    scale = torch.logspace(-2, 3, 60, dtype=torch.float64)
    bump = draw(60, 60)
    matrix = torch.diag(scale) + 1e-3 * bump @ bump.T
    right = draw(60, 4)
    operator = Dense(matrix)
    plain = CGFactors(operator, rtol=1e-8).inverse(1e-3)
    better = CGFactors(operator, make(operator), rtol=1e-8).inverse(1e-3)  # type: ignore[operator]
    wanted = solved(matrix, 1e-3, right)
    assert off(plain @ right, wanted) < 1e-4
    assert off(better @ right, wanted) < 1e-4
    assert plain.certificate.steps is not None
    assert better.certificate.steps is not None
    assert better.certificate.steps < 0.6 * plain.certificate.steps


def test_negative_curvature_is_an_error_and_not_an_answer() -> None:
    matrix = with_spectrum([-0.5, 0.2, 1.0, 3.0])
    inverse = CGFactors(Dense(matrix)).inverse(0.1)
    with pytest.raises(uw.NegativeCurvatureError, match=r"(?s)step \d.*curvature='ggn'.*damping"):
        inverse @ draw(4, 3)
    assert inverse.certificate.columns == 0
    # a damping that makes it positive definite solves it
    assert off(CGFactors(Dense(matrix)).inverse(0.6) @ draw(4, 3), solved(matrix, 0.6, draw(4, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_matrix_has_no_answer(dtype: torch.dtype) -> None:
    root = draw(12, 5)
    factors = CGFactors(Dense((root @ root.T).to(dtype)))
    with pytest.raises(uw.NegativeCurvatureError, match=r"singular|indefinite"):
        factors.inverse(0.0) @ draw(12, 3)
    assert off(factors.inverse(0.1) @ draw(12, 3), solved(root @ root.T, 0.1, draw(12, 3))) < 1e-2


def test_float32_stops_where_round_off_stops_it() -> None:
    matrix = with_spectrum(torch.logspace(-2, 3, 30, dtype=torch.float64)).float()
    inverse = CGFactors(Dense(matrix), rtol=1e-10).inverse(1e-2)
    right = draw(30, 5)
    with pytest.warns(uw.ResidualWarning, match="float32"):
        x = inverse @ right
    certificate = inverse.certificate
    assert not certificate.converged
    assert any("float32" in note for note in certificate.notes)
    true = residuals(matrix, 1e-2, x, right)
    # in float32 the residual itself is known to some round-off only
    assert float(true.max()) < 3e-4
    assert certificate.steps is not None
    assert certificate.steps < 1000


def test_the_residual_is_that_of_the_solution() -> None:
    matrix, right = with_spectrum(SPREAD), draw(40, 6)
    inverse = CGFactors(Dense(matrix), rtol=1e-3).inverse(0.01)
    true = residuals(matrix, 0.01, inverse @ right, right)
    assert inverse.certificate.residual_max == pytest.approx(float(true.max()), rel=1e-6)
    assert inverse.certificate.residual_mean == pytest.approx(float(true.mean()), rel=1e-6)
    assert float(true.max()) <= 1.5e-3


def test_too_few_steps_are_told() -> None:
    inverse = CGFactors(Dense(with_spectrum(SPREAD)), max_steps=3).inverse(0.01)
    with pytest.warns(uw.ResidualWarning, match="3 steps were not enough"):
        inverse @ draw(40, 2)
    assert inverse.certificate.converged is False
    assert inverse.certificate.steps == 3


def test_a_warm_start_saves_steps_and_changes_nothing() -> None:
    matrix, right = Counting(with_spectrum(SPREAD)), draw(40, 5)
    taken = {}
    for warm in (False, True):
        factors = CGFactors(matrix, rtol=1e-8, warm_start=warm)
        factors.inverse(0.1) @ right
        again = factors.inverse(0.1001)
        x = again @ right
        assert off(x, solved(matrix.matrix, 0.1001, right)) < 1e-5
        taken[warm] = again.certificate.steps
    assert taken[True] < taken[False]


class Several(LinearOperator):
    """Another matrix for every column."""

    def __init__(self, matrices: list[Tensor]) -> None:
        super().__init__(len(matrices[0]), torch.float64, "cpu")
        self.matrices = matrices

    def at(self, columns: Tensor) -> Several:
        return Several([self.matrices[j] for j in columns.tolist()])

    def _apply(self, columns: Tensor) -> Tensor:
        pairs = zip(self.matrices, columns.T, strict=True)
        return torch.stack([matrix @ v for matrix, v in pairs], dim=1)


def test_every_column_may_have_a_matrix_of_its_own() -> None:
    """They take steps of different numbers, so that columns leave one after the other."""
    matrices = [
        with_spectrum(torch.linspace(1, top, 20), seed=i) for i, top in enumerate((1, 9, 90))
    ]
    right = draw(20, 3)
    wanted = torch.cat(
        [solved(a, 0.0, b[:, None]) for a, b in zip(matrices, right.T, strict=True)], 1
    )
    for start in (None, wanted + 0.1 * draw(20, 3, seed=1)):
        result = conjugate_gradients(Several(matrices), right, rtol=1e-10, start=start)
        assert off(result.solution, wanted) < 1e-8
        assert result.steps[0] < result.steps[1] <= result.steps[2]
    near = conjugate_gradients(Several(matrices), right, rtol=1e-10, start=wanted)
    assert not bool(near.steps.any())


class Broken(LinearOperator):
    def _apply(self, columns: Tensor) -> Tensor:
        return columns * float("nan")


def test_a_product_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        CGFactors(Broken(3, torch.float64, "cpu")).inverse(0.1) @ torch.ones(3)


def test_a_preconditioner_that_is_not_positive_definite() -> None:
    operator = Dense(with_spectrum([1.0, 2.0, 3.0]))
    wrong = Diagonal(-torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="preconditioner is not positive definite"):
        conjugate_gradients(operator, draw(3, 1), preconditioner=wrong)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"rtol": 0.0}, "rtol"), ({"rtol": 1.0}, "rtol"), ({"max_steps": 0}, "max_steps")],
)
def test_options_out_of_range(options: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CGFactors(Dense(torch.eye(2)), **options)  # type: ignore[arg-type]


def test_a_preconditioner_can_begin_with_the_test_rows() -> None:
    """Conjugate gradients for the mean begin where its solution is already known."""
    case = make("mlp")
    other = tuple(t[:2] for t in case.test)
    for start, fewest, most in (("test", 1, 1), ("random", 3, 6)):
        recipe = uw.CG(uw.Arnoldi(rank=10, steps=10, start=start), rtol=1e-4)  # type: ignore[arg-type]
        influence = uw.Influence(case.model, case.loss, recipe, damping=0.05).fit(case.train)
        for rows in (case.test, other):
            influence.mean_scores(rows)
            assert fewest <= int(influence.certificate.steps or 0) <= most
