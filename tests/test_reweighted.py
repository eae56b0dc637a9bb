"""Curvatures of other sets of rows for every column, against sums of curvatures of single rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import upweight as uw
from cases import Case, make
from matrices import draw, off
from reference import Reference
from upweight.curvature.reweighted import Reweighted
from upweight.operator import Dense, LinearOperator

DAMPING = 0.05
CURVATURES: dict[str, Callable[[uw.EmpiricalRisk], LinearOperator]] = {
    "ggn": uw.GGN,
    "hessian": uw.Hessian,
    "fisher": uw.Fisher,
    "fisher-empirical": lambda risk: uw.Fisher(risk, "empirical"),
}


def risk_of(case: Case, batch_size: int | None = None) -> uw.EmpiricalRisk:
    return uw.EmpiricalRisk(
        case.model, case.loss, case.train, batch_size=batch_size, **case.options
    )


def kept_rows(n: int, k: int = 4) -> Tensor:
    """(n, k): all rows, the first alone, and random ones."""
    kept = torch.rand(n, k, generator=torch.Generator().manual_seed(0)) < 0.6
    kept[:, 0] = True
    kept[:, 1] = False
    kept[0] = True
    return kept


def rows_alone(case: Case, kind: str) -> Tensor:
    """c_i of every row, (n, p, p), in float64."""
    reference = Reference(case)
    found: list[Tensor] = []
    for i in range(case.n):
        if kind == "fisher-empirical":
            g = reference.flat_grad(reference.row_loss(reference.row(reference.train, i)))
            found.append(torch.outer(g, g))
        elif kind == "hessian":
            loss = reference.row_loss(reference.row(reference.train, i))
            grad = reference.flat_grad(loss, create_graph=True)
            rows = [
                reference.flat_grad(g) if g.requires_grad else torch.zeros_like(grad) for g in grad
            ]
            found.append(torch.stack(rows).detach())
        else:
            output, jacobian = reference.jacobian(i)
            found.append(jacobian.T @ reference.output_hessian(i, output) @ jacobian)
    return torch.stack(found)


def wanted(alone: Tensor, kept: Tensor, columns: Tensor) -> Tensor:
    """(C_j + λI) v_j, one column after the other."""
    found: list[Tensor] = []
    for mask, v in zip(kept.T, columns.T, strict=True):
        found.append(alone[mask].mean(0) @ v + DAMPING * v)
    return torch.stack(found, dim=1)


def test_the_ggn_of_every_case(case: Case) -> None:
    curvature, kept = uw.GGN(risk_of(case)), kept_rows(case.n)
    columns = draw(curvature.size, kept.shape[1])
    got = Reweighted(curvature, kept, DAMPING) @ columns
    # weights in float32 would leave 1e-8
    assert off(got, wanted(rows_alone(case, "ggn"), kept, columns)) < 1e-12


@pytest.mark.parametrize("kind", sorted(CURVATURES))
@pytest.mark.parametrize(
    "name", ["mlp", "regression", "conv2d_uneven", "positions", "dict_batches"]
)
def test_every_curvature(name: str, kind: str) -> None:
    case = make(name)
    kept = kept_rows(case.n)
    alone = rows_alone(case, kind)
    columns = draw(alone.shape[1], kept.shape[1])
    for batch_size in (None, 2):
        curvature = CURVATURES[kind](risk_of(case, batch_size))
        got = Reweighted(curvature, kept, DAMPING) @ columns
        assert off(got, wanted(alone, kept, columns)) < 1e-10


@pytest.mark.parametrize("kind", ["ggn", "hessian", "fisher"])
def test_float32(kind: str) -> None:
    case = make("mlp", torch.float32)
    kept, curvature = kept_rows(case.n), CURVATURES[kind](risk_of(case))
    columns = draw(curvature.size, 4).float()
    got = Reweighted(curvature, kept, DAMPING) @ columns
    assert got.dtype == torch.float32
    assert off(got, wanted(rows_alone(case, kind), kept, columns.double())) < 1e-5


def test_sampled_labels_are_those_of_the_whole() -> None:
    case = make("mlp")
    fisher = uw.Fisher(risk_of(case), "sampled", samples=2, seed=3)
    alone = torch.stack([fisher.on_rows([i]).dense() for i in range(case.n)])
    kept, columns = kept_rows(case.n), draw(fisher.size, 4)
    assert off(Reweighted(fisher, kept, DAMPING) @ columns, wanted(alone, kept, columns)) < 1e-12


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_some_columns(kind: str) -> None:
    case = make("mlp")
    curvature, kept = CURVATURES[kind](risk_of(case)), kept_rows(case.n)
    whole, columns = Reweighted(curvature, kept, DAMPING), draw(43, 4)
    chosen = torch.tensor([3, 1])
    part = whole.at(chosen)
    assert off(part @ columns[:, chosen], (whole @ columns)[:, chosen]) < 1e-13
    assert off(part.at(torch.tensor([1])) @ columns[:, 1:2], (whole @ columns)[:, 1:2]) < 1e-13
    # two, one, and twice all four
    assert whole.products == part.products == 11


def test_all_rows_are_the_curvature_itself() -> None:
    case = make("attention")
    curvature = uw.GGN(risk_of(case))
    columns = draw(curvature.size, 2)
    all_rows = torch.ones(case.n, 2, dtype=torch.bool)
    assert off(Reweighted(curvature, all_rows, 0.0) @ columns, curvature @ columns) < 1e-12


def test_what_is_refused() -> None:
    case = make("mlp")
    curvature, kept = uw.GGN(risk_of(case)), kept_rows(case.n)
    with pytest.raises(TypeError, match="curvature of some rows"):
        Reweighted(Dense(torch.eye(43)), kept, DAMPING)
    with pytest.raises(ValueError, match="expected masks of 11 rows"):
        Reweighted(curvature, kept[:-1], DAMPING)
    with pytest.raises(ValueError, match="at least one kept row"):
        Reweighted(curvature, kept & False, DAMPING)
    with pytest.raises(ValueError, match="expected 4 columns"):
        Reweighted(curvature, kept, DAMPING) @ draw(43, 3)
