"""LiSSA: its fixed point, its acceleration, its parts, and how it tells of divergence."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import upweight as uw
from cases import make
from matrices import Counting, draw, off, residuals, solved, with_spectrum
from upweight.inverse import LissaFactors, Part
from upweight.operator import Dense

SPREAD = torch.logspace(-2, 1, 30, dtype=torch.float64)


def gram_parts(rows: int = 40, p: int = 12, batch: int = 9) -> tuple[Tensor, list[Part]]:
    """1/n Σ x xᵀ, and the same of ragged batches: 9, 9, 9, 9, 4 rows."""
    x = draw(rows, p)
    batches = x.split(batch)
    parts = [Part(Dense(b.T @ b / len(b)), len(b) / rows) for b in batches]
    return x.T @ x / rows, parts


@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("semidefinite", [True, False])
def test_solves_to_its_tolerance(accelerate: bool, semidefinite: bool) -> None:
    matrix, right = with_spectrum(SPREAD), draw(30, 40)
    inverse = LissaFactors(
        Dense(matrix), accelerate=accelerate, semidefinite=semidefinite, rtol=1e-6, max_steps=10_000
    ).inverse(0.1)
    x = inverse @ right
    assert off(x, solved(matrix, 0.1, right)) < 1e-5
    true = residuals(matrix, 0.1, x, right)
    assert float(true.max()) <= 1.0000001e-6
    assert inverse.certificate.residual_max == pytest.approx(float(true.max()), rel=1e-3)
    assert inverse.certificate.converged


@pytest.mark.slow
def test_acceleration_takes_the_root_of_the_steps() -> None:
    matrix, right = Dense(with_spectrum(SPREAD)), draw(30, 3)
    steps = {}
    for accelerate in (True, False):
        inverse = LissaFactors(matrix, accelerate=accelerate, rtol=1e-4, max_steps=5000).inverse(
            0.01
        )
        inverse @ right
        steps[accelerate] = inverse.certificate.steps
    assert steps[True] < steps[False] / 4


def test_parts_reach_the_solution_of_the_whole() -> None:
    """Ragged batches weigh as many rows as they have, and their noise dies out."""
    matrix, parts = gram_parts()
    right = draw(12, 20)
    inverse = LissaFactors(Dense(matrix), parts, rtol=1e-8, max_steps=50_000).inverse(0.05)
    x = inverse @ right
    assert off(x, solved(matrix, 0.05, right)) < 1e-6
    assert inverse.certificate.converged


def test_the_last_iterate_of_the_plain_recursion_keeps_its_noise() -> None:
    """What the control variate is for: as many steps of the plain recursion stay far away."""
    matrix, parts = gram_parts()
    right, damping = draw(12, 20), 0.05
    wanted = solved(matrix, damping, right)
    inverse = LissaFactors(Dense(matrix), parts, rtol=1e-4, max_steps=50_000).inverse(damping)
    x = inverse @ right
    generator = torch.Generator().manual_seed(0)
    plain = torch.zeros_like(right)
    for _ in range(int(inverse.certificate.steps or 0)):
        part = parts[int(torch.randint(len(parts), (1,), generator=generator))]
        moved = part.operator @ plain + damping * plain
        plain = plain + (right - moved) / inverse.scale
    assert off(x, wanted) < 1e-3
    assert off(plain, wanted) > 30 * off(x, wanted)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_parts_does_not_matter(seed: int) -> None:
    matrix, parts = gram_parts()
    right = draw(12, 5)
    inverse = LissaFactors(Dense(matrix), parts, rtol=1e-9, max_steps=50_000, seed=seed).inverse(
        0.1
    )
    assert off(inverse @ right, solved(matrix, 0.1, right)) < 1e-7


def test_divergence_names_the_step_and_a_scale_that_works() -> None:
    matrix, right = Dense(with_spectrum(SPREAD)), draw(30, 3)
    inverse = LissaFactors(matrix, scale=0.5).inverse(0.1)
    with pytest.raises(uw.DivergenceError, match=r"diverged at step \d+") as caught:
        inverse @ right
    found = re.search(r"scale of ([\d.]+) would work", str(caught.value))
    assert found is not None
    again = LissaFactors(matrix, scale=float(found[1]), max_steps=5000).inverse(0.1)
    assert off(again @ right, solved(with_spectrum(SPREAD), 0.1, right)) < 1e-2


def test_parts_diverge_with_too_small_a_scale() -> None:
    matrix, parts = gram_parts()
    inverse = LissaFactors(Dense(matrix), parts, scale=0.2).inverse(0.1)
    with pytest.raises(uw.DivergenceError, match="would work"):
        inverse @ draw(12, 2)


def test_an_indefinite_matrix_is_refused_before_any_step() -> None:
    matrix = Counting(with_spectrum([-0.5, 0.2, 1.0, 3.0]))
    factors = LissaFactors(matrix)
    before = len(matrix.calls)
    with pytest.raises(uw.DivergenceError, match=r"(?s)negative eigenvalue.*'ggn'.*damping above"):
        factors.inverse(0.1)
    assert len(matrix.calls) == before
    assert off(factors.inverse(0.7) @ draw(4, 2), solved(matrix.matrix, 0.7, draw(4, 2))) < 1e-2


def test_a_negative_eigenvalue_that_the_estimate_missed_is_seen_on_the_way() -> None:
    """A diagonal matrix whose only negative entry the probe of the spectrum cannot see."""
    values = torch.linspace(1.0, 2.0, 400, dtype=torch.float64)
    factors = LissaFactors(Dense(torch.diag(values)), max_steps=5000, rtol=1e-6)
    values[7] = -0.3
    factors.operator = Dense(torch.diag(values))
    with pytest.raises(uw.DivergenceError, match="may be indefinite"):
        factors.inverse(0.1) @ draw(400, 2)


def test_too_few_steps_are_told() -> None:
    inverse = LissaFactors(Dense(with_spectrum(SPREAD)), max_steps=2).inverse(0.1)
    with pytest.warns(uw.ResidualWarning, match=r"2 steps were not enough.*method='cg'"):
        inverse @ draw(30, 2)
    assert inverse.certificate.converged is False


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scale": 0.0}, "scale above 0"),
        ({"scale": float("inf")}, "scale above 0"),
        ({"rtol": 0.0}, "rtol"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_options_out_of_range(options: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LissaFactors(Dense(torch.eye(2)), **options)  # type: ignore[arg-type]


def test_products_with_parts_count_the_rows_that_they_have() -> None:
    """Five parts of a fifth of the rows each are one product with the whole."""
    matrix, parts = gram_parts(rows=45)
    counted = [Part(Counting(p.operator.matrix), p.share) for p in parts]  # type: ignore[attr-defined]
    whole = Counting(matrix)
    factors = LissaFactors(whole, counted, rtol=1e-2)
    inverse = factors.inverse(0.5)
    inverse @ draw(12, 1)
    steps = int(inverse.certificate.steps or 0)
    spent = whole.products + sum(p.operator.products for p in counted) / 5  # type: ignore[attr-defined]
    assert steps > 0
    assert inverse.certificate.products == pytest.approx(spent, abs=3)


def test_products_with_batches_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product with one row of n is an n-th of a product, whatever few of them a row takes."""
    case, spent = make("mlp"), list[float]()
    apply = uw.GGN._apply

    def counted(self: uw.GGN, columns: Tensor) -> Tensor:
        spent.append(columns.shape[1] * self.risk.n / case.n)
        return apply(self, columns)

    monkeypatch.setattr(uw.GGN, "_apply", counted)
    recipe = uw.LiSSA(batch_size=1, max_steps=case.n)  # each row once
    influence = uw.Influence(case.model, case.loss, recipe, damping=0.1).fit(case.train)
    with pytest.warns(uw.ResidualWarning):
        influence.scores(tuple(t[:3] for t in case.test))
    assert influence.certificate.products == pytest.approx(sum(spent), abs=0.51)


WAYS = {
    "accelerated": uw.LiSSA(max_steps=20_000),
    "plain": uw.LiSSA(accelerate=False, max_steps=20_000),
    "minibatches": uw.LiSSA(batch_size=4, max_steps=20_000),
}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_columns_do_not_see_each_other(way: str) -> None:
    """Each stops at its own tolerance, early or late, as it would alone."""
    matrix, parts = gram_parts()
    factors = LissaFactors(
        Dense(matrix),
        parts if way == "minibatches" else (),
        accelerate=way == "accelerated",
        max_steps=20_000,
    )
    top = torch.linalg.eigh(matrix).eigenvectors[:, -2:]
    right = torch.cat([top, draw(12, 3)], dim=1)
    together = factors.inverse(0.05) @ right
    steps = set()
    for j in range(5):
        inverse = factors.inverse(0.05)
        alone = inverse @ right[:, j : j + 1]
        assert off(together[:, j : j + 1], alone) < 1e-10
        steps.add(inverse.certificate.steps)
    assert len(steps) > 1


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.slow
def test_how_many_are_solved_at_once_does_not_matter(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make("mlp")
    influence = uw.Influence(case.model, case.loss, WAYS[way], damping=0.1).fit(case.train)
    whole = influence.scores(case.test).values
    p = sum(t.numel() for t in case.model.parameters())
    for rows in (1, 2):
        monkeypatch.setattr("upweight.influence.SOLVED_BYTES", rows * 3 * 8 * p)
        assert off(influence.scores(case.test).values, whole) < 1e-10


def test_steps_end_within_a_round_of_parts() -> None:
    matrix, parts = gram_parts(batch=4)
    counted = [Part(Counting(p.operator.matrix), p.share) for p in parts]  # type: ignore[attr-defined]
    factors = LissaFactors(Dense(matrix), counted, max_steps=5)
    before = sum(len(p.operator.calls) for p in counted)  # type: ignore[attr-defined]
    inverse, right = factors.inverse(0.05), draw(12, 3)
    with pytest.warns(uw.ResidualWarning, match="5 steps were not enough"):
        x = inverse @ right
    assert len(counted) == 10
    assert inverse.certificate.steps == 5
    assert sum(len(p.operator.calls) for p in counted) - before == 5  # type: ignore[attr-defined]
    true = residuals(matrix, 0.05, x, right)
    assert inverse.certificate.residual_max == pytest.approx(float(true.max()), rel=1e-9)
