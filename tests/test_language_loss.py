"""The loss of tokens, its distribution of labels, and the curvatures that rest on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from upweight import GGN, EmpiricalRisk, Fisher, KroneckerCurvature
from upweight.losses import TokenCategorical, TokenLoss, output_distribution, output_hessian

IGNORED = -100


def draw(b: int, t: int, c: int, seed: int, share: float = 0.4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, t, c, generator=generator, dtype=torch.float64)
    labels = torch.randint(c, (b, t), generator=generator)
    labels[torch.rand(b, t, generator=generator) < share] = IGNORED
    return logits, labels


def slow_loss(logits: Tensor, labels: Tensor, reduction: str, *, shift: bool) -> Tensor:
    """One position at a time."""
    rows: list[Tensor] = []
    for z, y in zip(logits, labels, strict=True):
        parts = [
            F.cross_entropy(z[s - 1 if shift else s][None], y[s][None])
            for s in range(1 if shift else 0, len(y))
            if int(y[s]) != IGNORED
        ]
        total = torch.stack(parts).sum() if parts else z.new_zeros(())
        rows.append(total / len(parts) if reduction == "mean" and parts else total)
    return torch.stack(rows)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(2, 4)),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    reduction=st.sampled_from(["sum", "mean"]),
    shift=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_loss_is_the_sum_or_mean_over_labelled_positions(
    shape: tuple[int, int, int], seed: int, share: float, reduction: Any, shift: bool
) -> None:
    logits, labels = draw(*shape, seed, share)
    loss = TokenLoss(reduction, shift=shift)
    torch.testing.assert_close(
        loss(logits, labels), slow_loss(logits, labels, reduction, shift=shift)
    )
    total = loss.tokens(logits, labels).sum(1)
    torch.testing.assert_close(total, slow_loss(logits, labels, "sum", shift=shift))
    assert bool((loss.tokens(logits, labels)[labels == IGNORED] == 0).all())


def test_softmax_of_half_precision_is_in_float32() -> None:
    logits, labels = draw(3, 4, 50, 0)
    half = (20 * logits).to(torch.bfloat16)
    got = TokenLoss()(half, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, TokenLoss()(half.float(), labels))


def test_what_is_no_loss_of_tokens_is_refused() -> None:
    logits, labels = draw(2, 3, 4, 0)
    with pytest.raises(ValueError, match=r"logits \(b, t, c\)"):
        TokenLoss()(logits, labels[:, :2])
    with pytest.raises(ValueError, match="integer labels"):
        TokenLoss()(logits, labels.double())
    with pytest.raises(ValueError, match="'sum' or 'mean'"):
        TokenLoss("none")  # pyright: ignore[reportArgumentType]


class Bigrams(nn.Module):
    """Logits of the next token from the token, through one hidden layer."""

    def __init__(self, words: int, wide: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, wide)
        self.hidden = nn.Linear(wide, wide)
        self.head = nn.Linear(wide, words)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(ids))))


def risk_of(
    *, n: int = 6, t: int = 4, c: int = 3, batch_size: int | None = None, **options: Any
) -> EmpiricalRisk:
    torch.manual_seed(0)
    model = Bigrams(c, 3).double()
    ids = torch.randint(c, (n, t), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :2] = IGNORED
    labels[1] = IGNORED  # a row without a loss
    labels[3, 3] = IGNORED
    loss = TokenLoss(shift=True, **options)
    chosen = ["hidden.*", "head.*"]
    return EmpiricalRisk(model, loss, (ids, labels), parameters=chosen, batch_size=batch_size)


def slow_ggn(risk: EmpiricalRisk) -> Tensor:
    """1/n Σ Jᵀ H J with the whole Jacobian and output Hessian of each row."""
    total = torch.zeros(risk.p, risk.p, dtype=torch.float64)
    theta = risk.model.flatten({k: v[None] for k, v in risk.model.parameters().items()})[0]
    for i in range(risk.n):
        batch = risk.rows.take([i])

        def outputs(flat: Tensor, batch: Any = batch) -> Tensor:
            tree = {k: v[0] for k, v in risk.model.unflatten(flat[None]).items()}
            return risk.model(tree, batch)[0].flatten()

        jacobian: Any = torch.autograd.functional.jacobian(outputs, theta)
        z = risk.model(risk.model.parameters(), batch)[0]
        hessian = output_hessian(risk.row_loss, z, batch[1][0])
        total += jacobian.T @ hessian @ jacobian
    return total / risk.n


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ggn_and_exact_fisher_are_the_dense_matrix(reduction: str) -> None:
    risk = risk_of(reduction=reduction)
    wanted = slow_ggn(risk)
    assert float(wanted.abs().max()) > 1e-3
    torch.testing.assert_close(GGN(risk).dense(), wanted)
    torch.testing.assert_close(Fisher(risk).dense(), wanted)
    columns = torch.randn(risk.p, 3, dtype=torch.float64)
    torch.testing.assert_close(GGN(risk) @ columns, wanted @ columns)
    torch.testing.assert_close(Fisher(risk) @ columns, wanted @ columns)


@pytest.mark.slow
def test_ggn_of_a_wide_output_needs_no_roots() -> None:
    risk = risk_of(c=40, t=16)  # more than 512 numbers in the output of a row
    columns = torch.randn(risk.p, 2, dtype=torch.float64)
    torch.testing.assert_close(GGN(risk) @ columns, slow_ggn(risk) @ columns)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.slow
def test_sampled_fisher_approaches_the_exact_one(reduction: str) -> None:
    risk = risk_of(reduction=reduction)
    wanted = slow_ggn(risk)
    sampled = Fisher(risk, "sampled", samples=4000).dense()
    assert float((sampled - wanted).norm() / wanted.norm()) < 0.1
    few = Fisher(risk, "sampled", samples=1).dense()
    assert float((few - wanted).norm() / wanted.norm()) > 0.2


@pytest.mark.parametrize("batch_size", [1, 4])
def test_sampled_labels_do_not_depend_on_the_batch(batch_size: int) -> None:
    wanted = Fisher(risk_of(), "sampled", samples=2, seed=3).dense()
    got = Fisher(risk_of(batch_size=batch_size), "sampled", samples=2, seed=3).dense()
    torch.testing.assert_close(got, wanted)
    other = Fisher(risk_of(), "sampled", samples=2, seed=4).dense()
    assert not torch.allclose(other, wanted)


def test_roots_are_zero_where_there_is_no_label() -> None:
    logits, labels = draw(3, 4, 5, 0)
    labelled = labels != IGNORED
    known = TokenCategorical()
    noise = known.noise(logits, torch.Generator().manual_seed(0))
    root = known.sampled_root(logits, noise, labelled)
    assert bool((root[~labelled] == 0).all())
    assert bool((root[labelled].abs().sum(1) > 0).all())
    assert float(root.sum(-1).abs().max()) < 1e-12  # p − e adds up to zero
    closed = known.roots(logits, labelled).flatten(2)  # (b, K, o)
    u = torch.randn(2, *logits.shape, dtype=torch.float64)
    wanted = torch.einsum("bro,brq,kbq->kbo", closed, closed, u.flatten(2))
    torch.testing.assert_close(known.multiply(logits, u, labelled).flatten(2), wanted)


def test_labels_are_drawn_by_the_model() -> None:
    """Over many rows with the same logits, labels come as often as the softmax says."""
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).expand(20_000, 1, 3)
    known = TokenCategorical()
    noise = known.noise(logits, torch.Generator().manual_seed(0))
    root = known.sampled_root(logits, noise, torch.ones(20_000, 1, dtype=torch.bool))
    drawn = (logits.softmax(-1) - root).mean((0, 1))
    torch.testing.assert_close(drawn, logits[0, 0].softmax(-1), atol=0.015, rtol=0)


def test_kronecker_factors_take_it() -> None:
    risk = risk_of()
    assert output_distribution(risk.loss) == TokenCategorical("sum")
    exact = KroneckerCurvature(risk, fisher="exact")
    assert exact.coverage == 1.0
    # the trace of EK-FAC is that of C
    assert float(exact.dense().trace()) == pytest.approx(float(slow_ggn(risk).trace()))
    sampled = KroneckerCurvature(risk, fisher="sampled", seed=1)
    assert float(sampled.dense().trace()) == pytest.approx(
        float(Fisher(risk, "sampled", seed=1).dense().trace())
    )


def test_its_distribution_is_for_its_loss_alone() -> None:
    model = nn.Linear(3, 2)
    rows = torch.randn(4, 3), torch.randint(2, (4,))
    risk = EmpiricalRisk(model, F.cross_entropy, rows)
    with pytest.raises(TypeError, match="expected a TokenLoss"):
        Fisher(risk, distribution=TokenCategorical()).dense()
