"""Lanczos, Nyström and the diagonal: eigenpairs with their complement, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import upweight as uw
from cases import make
from matrices import Counting, draw, off, residuals, solved, with_spectrum
from reference import Reference
from upweight.inverse import JacobiFactors, LanczosFactors, NystroemFactors
from upweight.inverse.approximate import ApproximateInverse, products_spent
from upweight.inverse.jacobi import hutchinson_diagonal
from upweight.inverse.lanczos import lanczos
from upweight.operator import BlockDiagonal, Dense, Diagonal, Identity, LinearOperator, Product

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


def test_an_answer_that_is_no_number_leaves_an_infinite_residual() -> None:
    matrix, certificate = Dense(with_spectrum(SPREAD)), uw.Certificate("own", 0.1, 44)
    nothing = Diagonal(torch.full((44,), float("nan")).double())
    inverse = ApproximateInverse(nothing, matrix.damped(0.1), certificate)
    inverse.budget = 2
    inverse @ draw(44, 5)
    assert certificate.residual_max == float("inf")
    assert "inf (of 2 measured)" in str(certificate)


class Odd(Counting):
    """With names that mean something else than in the operators of the algebra."""

    factors, blocks, terms = 3, None, torch.ones(2)


def test_products_are_counted_through_the_algebra() -> None:
    a, b, odd = Counting(torch.eye(2)), Counting(torch.eye(3)), Odd(torch.eye(2))
    for operator, each in (
        (2.0 * a, 1),
        (a.damped(0.1), 1),
        (Product([Identity(2, a.dtype, "cpu"), 0.5 * a.damped(0.1)]).damped(0.2), 1),
        (BlockDiagonal([0.5 * a, b]), 2),
        (3.0 * odd, 1),
    ):
        before = products_spent(operator)
        operator @ torch.ones(operator.size, 4)
        assert products_spent(operator) == before + 4 * each


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


def test_probes_do_not_depend_on_how_many_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Counting(with_spectrum(SPREAD))
    wanted = hutchinson_diagonal(operator, 7, seed=3)
    for held, calls in ((1, [1] * 7), (2 * 44, [2, 2, 2, 1]), (100 * 44, [7])):
        monkeypatch.setattr("upweight.inverse.jacobi.PROBED_NUMBERS", held)
        operator.calls.clear()
        assert off(hutchinson_diagonal(operator, 7, seed=3), wanted) < 1e-12
        assert operator.calls == calls


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
@pytest.mark.parametrize(("roots", "products"), [(512, 3), (2, 43)], ids=["roots", "too wide"])
def test_the_exact_diagonal_of_a_model(
    curvature: Any, roots: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the roots of each row, as many products as outputs; without roots as parameters."""
    case = make("mlp")
    monkeypatch.setattr("upweight.curvature.form.ROOT_OUTPUTS", roots)
    recipe = uw.Jacobi(probes=None)
    influence = uw.Influence(
        case.model, case.loss, recipe, curvature=curvature, damping=0.1, certify=0
    ).fit(case.train)
    found = 1 / (influence.inverse @ torch.ones(43).double()) - 0.1
    assert off(found, Reference(case).curvature(curvature).diagonal()) < 1e-10
    assert influence.certificate.products == products


# --- a start at the test rows --------------------------------------------------------------------

WAITING = {
    "arnoldi": uw.Arnoldi(rank=3, start="test"),
    "cg": uw.CG(uw.Arnoldi(rank=3, start="test")),
}
waiting = pytest.mark.parametrize("name", sorted(WAITING))


def fit(name: str, **options: Any) -> uw.Influence:
    case = make("mlp")
    options = {"damping": 0.1, **options}
    return uw.Influence(case.model, case.loss, WAITING[name], **options).fit(case.train)


@waiting
@pytest.mark.parametrize("blocks", ["full", "layer"])
def test_nothing_is_computed_before_the_test_rows(
    name: str, blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()
    apply = uw.GGN._apply

    def counted(self: uw.GGN, columns: Tensor) -> Tensor:
        calls.append(columns.shape[1])
        return apply(self, columns)

    monkeypatch.setattr(uw.GGN, "_apply", counted)
    influence = fit(name, blocks=blocks)
    for damping in (0.1, 0.2):
        influence.damping = damping
        certificate = influence.certificate
        assert "nothing computed yet" in str(certificate)
        assert (certificate.products, certificate.damping) == (0, damping)
    influence.refine()
    assert not calls
    influence.scores(make("mlp").test)
    assert calls
    assert "nothing computed yet" not in str(influence.certificate)
    assert influence.certificate.products > 0


@waiting
@pytest.mark.parametrize(
    ("damping", "told"),
    [
        ({"wrong": 1.0}, "one damping for each of the blocks"),
        ({"0": 0.1}, "one damping for each of the blocks"),
        ({"0": 0.1, "2": -0.1}, "damping λ ≥ 0"),
        (-0.1, "damping λ ≥ 0"),
        (float("nan"), "damping λ ≥ 0"),
    ],
)
def test_a_bad_damping_is_refused_while_waiting(name: str, damping: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        fit(name, blocks="layer", damping=damping)
    influence = fit(name, blocks="layer")
    with pytest.raises(ValueError, match=told):
        influence.damping = damping
    assert influence.damping == 0.1
    assert influence.scores(make("mlp").test).provenance["damping"] == 0.1


@pytest.mark.parametrize("blocks", ["full", "layer"])
def test_a_damping_of_zero_is_refused_while_waiting(blocks: Any) -> None:
    with pytest.raises(ValueError, match="damping above 0"):
        fit("arnoldi", blocks=blocks, damping=0.0)
    influence = fit("arnoldi", blocks=blocks)
    with pytest.raises(ValueError, match="damping above 0"):
        influence.damping = 0.0
    with pytest.raises(TypeError, match="blocks='layer'"):
        fit("arnoldi").damping = {"0": 0.1, "2": 0.1}
