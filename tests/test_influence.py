"""Scores against the dense float64 reference, over the table of cases."""

from __future__ import annotations

import copy
from collections import UserDict
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

import upweight as uw
from cases import CASES, Case, make
from reference import Reference

DAMPING = 0.05
RTOL = {torch.float64: 1e-10, torch.float32: 2e-6}


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got.double() - wanted).norm() / wanted.norm())


def fitted(case: Case, curvature: str = "ggn", batch_size: int | None = None) -> uw.Influence:
    influence = uw.Influence(
        case.model,
        case.loss,
        curvature=curvature,
        damping=DAMPING,
        batch_size=batch_size,
        **case.options,
    )
    return influence.fit(case.train)


@pytest.mark.filterwarnings("ignore::upweight.IndefiniteCurvatureWarning")
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_up_equals_reference(case: Case, curvature: str) -> None:
    wanted = Reference(case).influence(curvature, DAMPING)
    scores = fitted(case, curvature).scores(case.test)
    assert error(scores.values, wanted) < RTOL[torch.float64]


@pytest.mark.filterwarnings("ignore::upweight.IndefiniteCurvatureWarning")
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_up_equals_reference_in_float32(case32: Case, curvature: str) -> None:
    wanted = Reference(case32).influence(curvature, DAMPING)
    scores = fitted(case32, curvature).scores(case32.test)
    assert scores.values.dtype == torch.float32
    # Float32 gradients of an ill-conditioned case carry their own round-off through the solve.
    assert error(scores.values, wanted) < 2e-5


@pytest.mark.parametrize("name", sorted(set(CASES) - {"embedding"}))
def test_perturbation_equals_reference(name: str) -> None:
    case = make(name)
    options = dict(case.options)
    if name == "dict_batches":
        options["features"] = case.features
    influence = uw.Influence(case.model, case.loss, damping=DAMPING, **options).fit(case.train)
    scores = influence.scores(case.test, mode="perturbation")
    assert error(scores.values, Reference(case).perturbation("ggn", DAMPING)) < 1e-9


@pytest.mark.parametrize("name", ["mlp", "conv2d", "batch_norm_and_dropout", "dict_batches"])
@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_batch_size_never_changes_a_result(name: str, mode: str) -> None:
    case = make(name)
    options = dict(case.options)
    if name == "dict_batches":
        options["features"] = case.features

    def scores(batch_size: int | None) -> torch.Tensor:
        influence = uw.Influence(
            case.model, case.loss, damping=DAMPING, batch_size=batch_size, **options
        )
        return influence.fit(case.train).scores(case.test, mode=mode).values

    whole = scores(None)
    for batch_size in range(1, case.n + 2):
        assert error(scores(batch_size), whole) < 1e-12


def test_row_order_only_reorders_columns() -> None:
    case = make("mlp")
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(0))
    plain = fitted(case).scores(case.test).values
    case.train = tuple(t[order] for t in case.train)
    assert error(fitted(case).scores(case.test).values, plain[:, order]) < 1e-12


def test_loader_data_set_and_tensors_agree() -> None:
    case = make("mlp")
    dataset = TensorDataset(*case.train)
    as_list = [dataset[i] for i in range(len(dataset))]
    wanted = fitted(case).scores(case.test).values
    for train in (
        dataset,
        as_list,
        DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True),
        DataLoader(as_list, batch_size=3, collate_fn=lambda rows: default_collate(list(rows))),
    ):
        influence = uw.Influence(case.model, case.loss, damping=DAMPING).fit(train)
        assert error(influence.scores(case.test).values, wanted) < 1e-12


@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_mean_scores_are_the_mean_of_scores(mode: str) -> None:
    case = make("mlp")
    influence = fitted(case)
    assert (
        error(
            influence.mean_scores(case.test, mode=mode).values,
            influence.scores(case.test, mode=mode).mean().values,
        )
        < 1e-12
    )
    assert influence.certificate.columns == 1 + case.m


def test_mean_scores_need_one_solve() -> None:
    case = make("mlp")
    influence = fitted(case)
    influence.mean_scores(case.test)
    assert influence.certificate.columns == 1


def test_self_influence_is_the_diagonal() -> None:
    case = make("mlp")
    influence = fitted(case)
    values = influence.scores(case.train).values.diagonal()
    assert error(influence.self_influence().values, values) < 1e-12


def test_other_training_rows_keep_the_curvature() -> None:
    case = make("mlp")
    influence = fitted(case)
    whole = influence.scores(case.test).values
    part = influence.scores(case.test, tuple(t[2:5] for t in case.train)).values
    assert error(part, whole[:, 2:5]) < 1e-12


@pytest.mark.filterwarnings("ignore::upweight.IndefiniteCurvatureWarning")
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_new_damping_needs_no_new_fit(curvature: str) -> None:
    case = make("regression")
    influence = fitted(case, curvature)
    products = influence.certificate.products
    influence.damping = 2.0
    assert influence.certificate.products == products
    wanted = Reference(case).influence(curvature, 2.0)
    assert error(influence.scores(case.test).values, wanted) < 1e-10


def test_scores_on_disk_are_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make("mlp")
    influence = fitted(case, batch_size=4)
    # three test gradients at once, so that blocks of test rows are really used
    monkeypatch.setattr("upweight.influence.SOLVED_BYTES", 3 * 3 * 8 * influence._fitted().risk.p)
    wanted = fitted(case).scores(case.test).values
    assert error(influence.scores(case.test).values, wanted) < 1e-12
    stored = influence.scores(case.test, to=tmp_path / "scores")
    assert error(torch.from_numpy(stored.values[:]), wanted) < 1e-12
    assert [p.name for p in tmp_path.iterdir()] == ["scores"]


def test_the_sign_is_that_of_retraining() -> None:
    """Leaving row i out changes the test loss by I[j, i]/n: checked by leaving it out."""
    torch.manual_seed(0)
    n, damping = 40, 0.1
    x, xt = torch.randn(n, 3).double(), torch.randn(9, 3).double()
    w = torch.randn(3, 1).double()
    y, yt = x @ w + 0.5 * torch.randn(n, 1).double(), xt @ w

    def solve(keep: torch.Tensor) -> torch.Tensor:
        """argmin 1/n Σ_{kept} (xw − y)² + λ/2 ‖w‖², with the full n."""
        a = 2 * x[keep].T @ x[keep] / n + damping * torch.eye(3).double()
        return torch.linalg.solve(a, 2 * x[keep].T @ y[keep] / n)

    model = torch.nn.Linear(3, 1, bias=False).double()
    everything = torch.ones(n, dtype=torch.bool)
    with torch.no_grad():
        model.weight.copy_(solve(everything).T)
    loss = torch.nn.functional.mse_loss
    influence = uw.Influence(model, loss, damping=damping).fit((x, y))
    predicted = influence.scores((xt, yt)).values / n
    actual = torch.empty_like(predicted)
    for i in range(n):
        keep = everything.clone()
        keep[i] = False
        before = (xt @ solve(everything) - yt).square()[:, 0]
        actual[:, i] = (xt @ solve(keep) - yt).square()[:, 0] - before
    slope = (predicted * actual).sum() / predicted.square().sum()
    correlation = torch.corrcoef(torch.stack([predicted.flatten(), actual.flatten()]))[0, 1]
    assert correlation > 0.98
    assert 0.9 < slope < 1.2


def test_the_model_is_not_touched() -> None:
    case = make("batch_norm_and_dropout")
    case.model.train()
    case.model[3].eval()  # a mixed state must come back mixed
    hooks: list[int] = []
    case.model.register_forward_hook(lambda *_: hooks.append(1))
    before = copy.deepcopy(case.model.state_dict())
    modes = [module.training for module in case.model.modules()]
    influence = fitted(case)
    influence.scores(case.test)
    with pytest.raises(ValueError, match="row"):
        influence.scores((case.test[0] * float("nan"), case.test[1]))
    assert [module.training for module in case.model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in case.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in case.model.parameters())
    assert len(case.model._forward_hooks) == 1


def test_a_model_that_changed_after_fit_is_refused() -> None:
    case = make("mlp")
    influence = fitted(case)
    with torch.no_grad():
        case.model[0].weight.data.add_(1e-3)  # past autograd's version counter
    with pytest.raises(RuntimeError, match="changed since fit"):
        influence.scores(case.test)


def test_parameters_by_name() -> None:
    case = make("mlp")
    head = uw.Influence(case.model, case.loss, damping=DAMPING, parameters="2.*").fit(case.train)
    case.model[0].requires_grad_(False)
    wanted = Reference(case).influence("ggn", DAMPING)
    assert error(head.scores(case.test).values, wanted) < 1e-10


def test_low_precision_accumulates_in_float32() -> None:
    case = make("linear_no_bias", torch.float32)
    wanted = fitted(case).scores(case.test).values.double()
    case.model.to(torch.bfloat16)
    got = fitted(case).scores(case.test).values
    assert got.dtype == torch.float32
    assert error(got, wanted) < 0.05


class Embedded(torch.nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(6, 3, **options)  # type: ignore[arg-type]
        self.head = torch.nn.Linear(3, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(tokens)).mean(1))


@pytest.mark.parametrize(
    "options", [{"padding_idx": 0}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}]
)
def test_forward_and_reverse_mode_agree_on_embeddings(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Embedded(**options).double()
    before = copy.deepcopy(model.state_dict())
    tokens, y = torch.randint(6, (9, 4)), torch.randint(2, (9,))
    risk = uw.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (tokens, y))
    rows = torch.cat([g for _, g in risk.row_gradients()])
    v = torch.randn(risk.p, 1, dtype=torch.float64)
    torch.testing.assert_close(risk.matmul(v), rows @ v)
    torch.testing.assert_close(risk.gradient(), rows.mean(0))
    for curvature in (uw.GGN(risk), uw.Hessian(risk)):
        torch.testing.assert_close(curvature @ v, curvature.dense() @ v)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert all(getattr(model.embedding, k) == value for k, value in options.items())
    assert not model.embedding._forward_hooks


class Remembering(torch.nn.Module):
    """Counts its calls in a buffer and keeps an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = self.linear(x)
        return self.seen


def test_what_a_forward_function_leaves_behind_is_undone() -> None:
    case = make("linear_no_bias")
    x, y = torch.randn(7, 4).double(), case.train[1]
    model = Remembering().double()
    influence = uw.Influence(model, case.loss, damping=DAMPING).fit((x, y))
    influence.scores((x, y))
    assert model.seen is None
    assert float(model.calls) == 0.0
    copy.deepcopy(model)
    model.calls += 1  # no part of state_dict()
    with pytest.raises(RuntimeError, match="changed since fit"):
        influence.scores((x, y))


def test_an_open_pass_leaves_the_callers_state_alone() -> None:
    case = make("batch_norm_and_dropout")
    case.model.train()
    risk = uw.EmpiricalRisk(case.model, case.loss, case.train, batch_size=2)
    columns = torch.randn(risk.p, 1, dtype=torch.float64)
    for _ in zip(risk.row_gradients(), risk.feature_gradients(columns), strict=False):
        assert torch.is_grad_enabled()
        assert case.model.training
    assert torch.is_grad_enabled()
    assert case.model.training


def test_grad_modes_of_the_caller_change_nothing() -> None:
    case = make("mlp")
    wanted = fitted(case).scores(case.test).values
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert error(fitted(case).scores(case.test).values, wanted) < 1e-12


def test_a_tied_weight_goes_by_both_names() -> None:
    case = make("tied_weights")
    risk = uw.EmpiricalRisk(case.model, case.loss, case.train, parameters="again.*")
    assert risk.model.names == ("encode.weight", "again.bias")


def test_batches_may_hold_text_and_nothing() -> None:
    case = make("mlp")
    wanted = fitted(case).scores(case.test).values

    def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> object:
        x, y = default_collate(rows)
        return UserDict(x=x, y=y, name=[f"row {i}" for i in range(len(rows))], mask=None)

    influence = uw.Influence(
        case.model,
        case.loss,
        damping=DAMPING,
        forward=lambda model, batch: model(batch["x"]),
        target=lambda batch: batch["y"],
    ).fit(DataLoader(TensorDataset(*case.train), collate_fn=collate))
    scores = influence.scores(DataLoader(TensorDataset(*case.test), collate_fn=collate))
    assert error(scores.values, wanted) < 1e-12


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
def test_padding_to_the_longest_of_a_batch_changes_nothing(batch_size: int | None) -> None:
    """Rows of several lengths, padded by the collate_fn; a label for every position."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3).double()
    rows = [(torch.randn(2 + i % 3, 2), torch.randint(3, (2 + i % 3,))) for i in range(7)]

    def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        pad = torch.nn.utils.rnn.pad_sequence
        return (
            pad([x for x, _ in rows], batch_first=True),
            pad([y for _, y in rows], batch_first=True, padding_value=-100),
        )

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        each = torch.nn.functional.cross_entropy(output, target, reduction="none")
        return each.sum(1) / (target != -100).sum(1)

    def scores(batch_size: int | None) -> torch.Tensor:
        loader = DataLoader(rows, collate_fn=collate)  # type: ignore[arg-type]
        influence = uw.Influence(
            model,
            loss,
            damping=DAMPING,
            batch_size=batch_size,
            forward=lambda m, batch: m(batch[0]).transpose(1, 2),
        )
        return influence.fit(loader).scores(loader).values

    assert error(scores(batch_size), scores(7)) < 1e-12


@pytest.mark.parametrize("name", ["tied_weights", "aliased_module"])
def test_shared_parameters_stay_parameters(name: str) -> None:
    case = make(name)
    before = {n: id(p) for n, p in case.model.named_parameters(remove_duplicate=False)}
    first = fitted(case).scores(case.test).values
    after = {n: id(p) for n, p in case.model.named_parameters(remove_duplicate=False)}
    assert after == before
    assert all(isinstance(p, torch.nn.Parameter) for p in case.model.parameters())
    assert torch.equal(fitted(case).scores(case.test).values, first)
