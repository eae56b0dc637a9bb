"""Hessian, GGN and Fisher against dense references and curvlinops, over the table of cases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upweight as uw
from cases import Case, make
from reference import Reference
from upweight import losses


def risk_of(case: Case, **options: object) -> uw.EmpiricalRisk:
    return uw.EmpiricalRisk(case.model, case.loss, case.train, **case.options, **options)


def close(got: torch.Tensor, wanted: torch.Tensor, rtol: float = 1e-11) -> None:
    assert float((got.double() - wanted).norm()) <= rtol * float(wanted.norm())


MAKE = {
    "hessian": uw.Hessian,
    "ggn": uw.GGN,
    "fisher": uw.Fisher,
    "fisher-empirical": lambda risk: uw.Fisher(risk, "empirical"),
}


@pytest.mark.parametrize("kind", sorted(MAKE))
def test_dense_and_products_equal_reference(case: Case, kind: str) -> None:
    wanted = Reference(case).curvature(kind)
    operator = MAKE[kind](risk_of(case))
    close(operator.dense(), wanted)
    columns = torch.randn(operator.size, 3, dtype=torch.float64)
    close(operator @ columns, wanted @ columns)


@pytest.mark.parametrize("kind", sorted(MAKE))
@pytest.mark.parametrize("name", ["mlp", "conv2d"])
@pytest.mark.slow
def test_chunks_of_rows_and_columns_do_not_matter(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(name)
    whole = MAKE[kind](risk_of(case))
    columns = torch.randn(whole.size, 9, dtype=torch.float64)
    wanted, dense = whole @ columns, whole.dense()
    monkeypatch.setattr("upweight.curvature.form.COLUMN_BYTES", 1)  # one column at a time
    for batch_size in (1, 2, 3, 5):
        operator = MAKE[kind](risk_of(case, batch_size=batch_size))
        close(operator @ columns, wanted, 1e-13)
        close(operator.dense(), dense, 1e-13)


def test_ggn_equals_hessian_for_a_linear_model() -> None:
    case = make("linear_no_bias")
    close(uw.GGN(risk_of(case)).dense(), uw.Hessian(risk_of(case)).dense())


@pytest.mark.parametrize("name", ["mlp", "one_logit", "regression", "regression_sum", "positions"])
@pytest.mark.slow
def test_sampled_fisher_tends_to_the_exact_one(name: str) -> None:
    risk = risk_of(make(name))
    exact = uw.Fisher(risk).dense()
    errors = [
        float((uw.Fisher(risk, "sampled", samples=k, seed=1).dense() - exact).norm() / exact.norm())
        for k in (100, 6400)
    ]
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 3  # 64 times the samples: an eighth of the error


def test_sampled_labels_depend_on_row_and_seed_only() -> None:
    case = make("mlp")
    a, b = (
        uw.Fisher(risk_of(case, batch_size=size), "sampled", samples=3, seed=5) for size in (2, 11)
    )
    close(a.dense(), b.dense(), 1e-13)
    other = uw.Fisher(risk_of(case), "sampled", samples=3, seed=6)
    assert float((a.dense() - other.dense()).norm()) > 1e-3


def test_blocks_of_noise_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upweight.curvature.exact.NOISE_ROWS", 4)
    case = make("mlp")
    a, b = (uw.Fisher(risk_of(case, batch_size=size), "sampled") for size in (3, 11))
    close(a.dense(), b.dense(), 1e-13)


def test_wide_outputs_are_multiplied_without_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("positions")
    wanted = Reference(case).ggn()
    monkeypatch.setattr("upweight.curvature.form.ROOT_OUTPUTS", 3)
    ggn = uw.GGN(risk_of(case))
    assert ggn.factor_rows() is None
    assert ggn.rank_bound == ggn.size
    close(ggn.dense(), wanted)
    assert ggn.products == ggn.size
    close(ggn.diagonal(), wanted.diagonal())
    assert ggn.products == 2 * ggn.size


def test_factor_rows_are_a_root(case: Case) -> None:
    ggn = uw.GGN(risk_of(case, batch_size=2))
    blocks = ggn.factor_rows()
    assert blocks is not None
    rows = torch.cat(list(blocks))
    assert rows.shape == (ggn.rank_bound, ggn.size)
    close(rows.T @ rows, Reference(case).ggn())


def test_products_are_counted() -> None:
    hessian = uw.Hessian(risk_of(make("mlp")))
    hessian @ torch.ones(hessian.size, 7, dtype=torch.float64)
    assert hessian.products == 7


@pytest.mark.parametrize("name", ["mlp", "conv2d", "regression", "layer_norm"])
@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher-empirical"])
def test_curvlinops_agrees(name: str, kind: str) -> None:
    if (name, kind) == ("layer_norm", "hessian"):
        # curvlinops 3.0.1 on torch 2.13 returns a matrix that is not symmetric there.
        pytest.skip("no oracle")
    curvlinops = pytest.importorskip("curvlinops")
    case = make(name)
    case.model.eval()
    x, y = case.train[0].double(), case.train[1]
    y = y.double() if y.is_floating_point() else y
    loss = nn.MSELoss() if name == "regression" else nn.CrossEntropyLoss()
    cls = {
        "hessian": curvlinops.HessianLinearOperator,
        "ggn": curvlinops.GGNLinearOperator,
        "fisher-empirical": curvlinops.EFLinearOperator,
    }[kind]
    parameters = list(case.model.parameters())
    theirs = cls(case.model, loss, parameters, [(x[:4], y[:4]), (x[4:], y[4:])])
    ours = MAKE[kind](risk_of(case))
    columns = torch.randn(ours.size, 2, dtype=torch.float64)
    wanted = theirs @ columns
    factor = 1.0
    if kind == "fisher-empirical" and name == "regression":
        # Theirs takes the gradient of Σ over the outputs, scaled once; ours that of the row's mean.
        factor = 1.0 / y[0].numel()
    close(ours @ columns, factor * torch.as_tensor(np.asarray(wanted)), 1e-10)


def test_a_loss_that_is_not_convex_in_the_output_is_refused() -> None:
    case = make("regression")
    case.loss = lambda output, target: (output - target).sin().mean()
    with pytest.raises(ValueError, match="convex"):
        uw.GGN(risk_of(case))
    uw.Hessian(risk_of(case)).dense()


@pytest.mark.slow
def test_a_loss_linear_in_the_output_is_refused_by_the_ggn_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)).double()
    data = (torch.randn(6, 4).double(), torch.randint(3, (6,)))
    risk = uw.EmpiricalRisk(model, F.nll_loss, data)
    with pytest.raises(ValueError, match="linear in the model's output"):
        uw.GGN(risk)
    # the same model with its nonlinearity in the loss
    joined = uw.EmpiricalRisk(model, F.cross_entropy, data, forward=lambda m, batch: m[0](batch[0]))
    close(uw.Fisher(risk).dense(), uw.GGN(joined).dense())
    sampled = uw.Fisher(risk, "sampled", samples=6400).dense()
    close(sampled, uw.GGN(joined).dense(), 0.1)


def test_fisher_without_a_distribution_is_refused() -> None:
    case = make("regression")
    case.loss = F.l1_loss
    with pytest.raises(ValueError, match="distribution"):
        uw.Fisher(risk_of(case))
    uw.Fisher(risk_of(case), "empirical").dense()
    with pytest.raises(ValueError, match="expected kind"):
        uw.Fisher(risk_of(case), "true")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one sample"):
        uw.Fisher(risk_of(make("mlp")), "sampled", samples=0)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.ones(3), reduction="sum"),
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(1)),
        nn.L1Loss(),
    ],
)
def test_losses_whose_distribution_is_not_known(loss: nn.Module) -> None:
    assert losses.output_distribution(loss) is None


def test_fisher_of_an_output_without_dimensions() -> None:
    """One number per row, (b,): the products as the dense matrix."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0)).double()
    rows = (torch.randn(6, 3).double(), torch.randn(6).double())
    risk = uw.EmpiricalRisk(model, torch.nn.functional.mse_loss, rows)
    v = torch.randn(risk.p, 2, dtype=torch.float64)
    torch.testing.assert_close(uw.Fisher(risk) @ v, uw.GGN(risk).dense() @ v)


def soft_labels() -> Case:
    """Targets that are probabilities, and do not all add up to one."""
    case = make("mlp")
    weights = torch.rand(case.n, 3)
    case.train = (case.train[0], weights)
    return case


def ignored_labels() -> Case:
    case = make("positions")
    labels = case.train[1].clone()
    labels[::2, 1] = 2
    case.train = (case.train[0], labels)
    case.loss = nn.CrossEntropyLoss(ignore_index=2, reduction="sum")
    return case


@pytest.mark.parametrize("build", [soft_labels, ignored_labels])
@pytest.mark.parametrize("closed", [0, 64])
def test_closed_forms_are_left_where_they_do_not_hold(
    build: Callable[[], Case], closed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upweight.curvature.exact.CLOSED_OUTPUTS", closed)
    case = build()
    ggn, wanted = uw.GGN(risk_of(case)), Reference(case).ggn()
    close(ggn.dense(), wanted)
    columns = torch.randn(ggn.size, 2, dtype=torch.float64)
    close(ggn @ columns, wanted @ columns)
    rows = torch.cat(list(ggn.factor_rows() or []))
    close(rows.T @ rows, wanted)
