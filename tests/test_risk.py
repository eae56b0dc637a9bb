"""Losses, gradients and products of the mean loss over rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upweight as uw
from cases import Case, make
from reference import Reference
from upweight.autodiff import Autodiff


def risk_of(case: Case, **options: object) -> uw.EmpiricalRisk:
    return uw.EmpiricalRisk(case.model, case.loss, case.train, **case.options, **options)


def test_losses_and_gradients_equal_reference(case: Case) -> None:
    risk, reference = risk_of(case), Reference(case)
    rows = reference.gradients(reference.train, case.n)
    torch.testing.assert_close(risk.losses(), reference.losses(reference.train, case.n))
    torch.testing.assert_close(torch.cat([g for _, g in risk.row_gradients()]), rows)
    torch.testing.assert_close(risk.gradient(), rows.mean(0))


@pytest.mark.parametrize("k", [1, 2, 3, 20])
@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_products_with_gradients_in_both_ways(case: Case, k: int, batch_size: int | None) -> None:
    """Few columns go by forward and reverse mode, many by the rows: the same numbers."""
    risk = risk_of(case, batch_size=batch_size)
    rows = torch.cat([g for _, g in risk.row_gradients()])
    columns = torch.randn(risk.p, k, dtype=torch.float64)
    weights = torch.randn(risk.n, k, dtype=torch.float64)
    torch.testing.assert_close(risk.matmul(columns), rows @ columns)
    torch.testing.assert_close(risk.rmatmul(weights), rows.T @ weights)


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (nn.MSELoss(), "mean"),
        (nn.MSELoss(reduction="sum"), "sum"),
        (lambda o, t: (o - t).square().mean(1), "none"),
        (lambda o, t: (o - t).square().mean(1, keepdim=True), "none"),
        (F.huber_loss, "mean"),
    ],
)
def test_reduction_is_found(loss: object, reduction: str) -> None:
    case = make("regression")
    case.loss = loss  # type: ignore[assignment]
    assert risk_of(case).row_loss.reduction == reduction


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reduction_changes_no_row(reduction: str) -> None:
    case = make("mlp")
    wanted = risk_of(case).gradient()
    case.loss = nn.CrossEntropyLoss(reduction=reduction)
    torch.testing.assert_close(risk_of(case).gradient(), wanted)


def test_a_row_on_which_the_loss_fails_is_named() -> None:
    case = make("regression")

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if bool((target > 900).any()):
            raise RuntimeError("out of range")
        return F.mse_loss(output, target)

    x, y = torch.randn(40, 3), torch.randn(40, 2)
    y[9] = 1000.0  # not among the probed rows
    with pytest.raises(ValueError, match="row 9: out of range"):
        uw.EmpiricalRisk(case.model, loss, (x, y))


def test_memory_bound_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("mlp")
    whole = torch.cat([g for _, g in risk_of(case).row_gradients()])
    monkeypatch.setattr("upweight.risk.CHUNK_BYTES", 1)
    chunks = [(len(c), g) for c, g in risk_of(case).row_gradients()]
    assert [size for size, _ in chunks] == [1] * case.n
    torch.testing.assert_close(torch.cat([g for _, g in chunks]), whole)


def test_outputs_are_those_of_evaluation_mode() -> None:
    case = make("batch_norm_and_dropout")
    risk = risk_of(case)
    wanted = case.model.eval()(case.train[0].double())
    torch.testing.assert_close(risk.outputs(), wanted)


def test_what_is_done_a_slower_way_is_told() -> None:
    """The per-row gradients of an LSTM have no vmap rule; the certificate says so."""
    case = make("lstm")
    influence = uw.Influence(case.model, case.loss, damping=0.1).fit(case.train)
    influence.scores(case.test)
    assert any("one row at a time" in note for note in influence.certificate.notes)


def test_wrong_shapes_of_products_are_told() -> None:
    risk = risk_of(make("mlp"))
    with pytest.raises(ValueError, match=r"expected a matrix \(43, k\)"):
        risk.matmul(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"expected a matrix \(11, k\)"):
        risk.rmatmul(torch.ones(11))


def test_subset_of_rows_keeps_names() -> None:
    rows = uw.Rows((torch.arange(5.0)[:, None], torch.arange(5)), names=list("abcde"))
    part = rows.subset([3, 1])
    assert list(part.names) == ["d", "b"]
    assert part.batch(0, 2)[1].tolist() == [3, 1]
    assert part.take([1])[1].tolist() == [1]


def square(p: dict[str, torch.Tensor]) -> torch.Tensor:
    return p["w"] ** 3


class NoForwardMode(torch.autograd.Function):
    """x³ with a backward rule only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: object, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 3 * x**2 * grad


def test_pushforward_without_forward_mode_goes_by_reverse() -> None:
    point = {"w": torch.tensor([1.0, 2.0])}
    tangents = {"w": torch.tensor([[1.0, 1.0], [0.0, 5.0], [2.0, 0.0]])}
    ad = Autodiff()
    wanted = ad.pushforward(square, point, tangents)
    assert ad.notes == []
    got = ad.pushforward(lambda p: NoForwardMode.apply(p["w"]), point, tangents)
    torch.testing.assert_close(got, wanted)
    assert any("reverse mode twice" in note for note in ad.notes)


class Branching(nn.Module):
    """Rows with a large first feature skip a layer: a way that the probed rows do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1 and float(x[0, 0]) > 50:
            return self.second(x)
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("name", ["mlp", "regression", "one_logit", "frozen_layer"])
def test_gradients_through_taps_are_those_of_vmap(name: str) -> None:
    case = make(name)
    tapped = risk_of(case)
    assert tapped.taps() is not None
    plain = risk_of(case)
    plain._taps_sought = True  # as if there were none
    rows = torch.cat([g for _, g in tapped.row_gradients()])
    torch.testing.assert_close(rows, torch.cat([g for _, g in plain.row_gradients()]))


def test_rows_that_take_another_way_than_the_probed_ones() -> None:
    torch.manual_seed(0)
    model, x, y = Branching().double(), torch.randn(40, 3).double(), torch.randint(2, (40,))
    x[17, 0] = 100.0
    risk = uw.EmpiricalRisk(model, F.cross_entropy, (x, y), batch_size=1)
    assert risk.taps() is not None
    wanted = [
        torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(
                    model.parameters(),
                    torch.autograd.grad(
                        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]),
                        list(model.parameters()),
                        allow_unused=True,
                    ),
                    strict=True,
                )
            ]
        )
        for i in range(40)
    ]
    torch.testing.assert_close(torch.cat([g for _, g in risk.row_gradients()]), torch.stack(wanted))
