"""The fast dense form of the curvatures of linear layers: equal to the reference, or declined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upweight as uw
from cases import CASES, Case, classes, draw, labels, make
from reference import Reference
from upweight import layers
from upweight.curvature import linear


class Skip(nn.Module):
    """Linear layers beside and around each other, one behind a reshaped output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.left = nn.Linear(3, 3, bias=False)
        self.right = nn.Linear(3, 2)
        self.last = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        left = hidden + F.softplus(self.left(hidden))
        right = hidden[:, :2] * self.right(input=hidden**2)
        return self.last(torch.cat([left, right], 1)).unflatten(1, (3, 2))


def sequential(*layers: nn.Module, c: int = 3, d: int = 4, n: int = 9) -> Case:
    return classes(nn.Sequential(*layers), (d,), c, n=n)


def relu_in_place() -> Case:
    return sequential(
        nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    )


def skip() -> Case:
    train, test = (draw(8, 4), labels(8, 3)), (draw(3, 4), labels(3, 3))
    model = Skip()
    loss = lambda output, y: F.cross_entropy(output.sum(2), y) + 0.1 * output.square().mean()  # noqa: E731
    return Case(model, loss, train, test)


def skip_regression() -> Case:
    case = skip()
    return Case(case.model, nn.MSELoss(), (draw(8, 4), draw(8, 3, 2)), (draw(3, 4), draw(3, 3, 2)))


def wide_and_narrow() -> Case:
    """Every choice of which product is formed first, on and off the diagonal."""
    return sequential(
        nn.Linear(12, 2), nn.Tanh(), nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 1), nn.SiLU(),
        nn.Linear(1, 3), d=12,
    )  # fmt: skip


def linear_loss() -> Case:
    """Nothing but A is left of the Hessian."""
    case = sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 3))
    case.loss = lambda output, y: output.gather(1, y[:, None])[:, 0]
    return case


def frozen_bias() -> Case:
    case = sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    case.model[0].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    case.model[2].requires_grad_(False)  # type: ignore[index]
    return case


def biases_only() -> Case:
    case = sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_("bias" in name)
    return case


def frozen_convolution() -> Case:
    trained = nn.Linear(9, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), *trained)
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)
    return classes(model, (2, 4), 2)


LINEAR: dict[str, Callable[[], Case]] = {
    name: CASES[name]
    for name in (
        "mlp",
        "linear_no_bias",
        "more_columns_than_parameters",
        "one_row_each",
        "one_logit",
        "regression",
        "regression_sum",
        "per_row_loss",
        "frozen_layer",
        "aliased_module",
        "dict_batches",
    )
} | {
    f.__name__: f
    for f in (
        relu_in_place,
        skip,
        skip_regression,
        wide_and_narrow,
        frozen_bias,
        biases_only,
        frozen_convolution,
        linear_loss,
    )
}


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Elsewhere(Twice):
    """A weight that is also used without its layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x))) + x @ self.head.weight.T


class Upstream(Twice):
    """A weight that is also used in front of another layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x * self.head.weight[0])))


class Turned(Twice):
    """Rows that are in another order inside."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x.flip(0))).flip(0))


class Positions(Twice):
    """Three positions in every row."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x.unflatten(1, (1, 4)).repeat(1, 3, 1)))).mean(1)


class Folded(Twice):
    """Three positions in every row, as rows of the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x.repeat_interleave(3, 0)))).unflatten(
            0, (-1, 3)
        ).mean(1)  # fmt: skip


class Unused(Twice):
    """A layer that is never called."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, :3]


def patched() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].forward = lambda x: F.linear(x, model[0].weight ** 3, model[0].bias)  # type: ignore[method-assign]
    return model


def parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))


OTHER: dict[str, Callable[[], Case]] = {
    name: CASES[name] for name in CASES if name not in LINEAR
} | {
    f.__name__: lambda f=f: classes(f(), (4,), 3)
    for f in (Twice, Elsewhere, Upstream, Turned, Positions, Folded, Unused, patched, parametrised)
}


RTOL = {torch.float64: 1e-12, torch.float32: 1e-6}


def made(table: dict[str, Callable[[], Case]], name: str, dtype: torch.dtype) -> Case:
    if name in CASES:
        return make(name, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        case = table[name]()
    case.model.to(dtype)
    return case


def risk_of(case: Case, **options: Any) -> uw.EmpiricalRisk:
    return uw.EmpiricalRisk(case.model, case.loss, case.train, **case.options, **options)


def gram(operator: uw.GGN | uw.Fisher, few: bool) -> Tensor | None:
    """By roots if they are few, or by unit vectors."""
    form = operator.form
    count = form.root_count if few else 10**6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "FORMED", 0)
        return linear.dense_gram(operator.risk, count, form.roots, form.multiply)


def close(got: Tensor | None, wanted: Tensor, rtol: float) -> None:
    assert got is not None
    assert got.dtype == torch.float64
    assert float((got - wanted).norm()) <= rtol * float(wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", sorted(LINEAR))
@pytest.mark.slow
def test_hessian_equals_reference(name: str, dtype: torch.dtype) -> None:
    case = made(LINEAR, name, dtype)
    wanted = Reference(case).hessian()
    for batch_size in (None, 1, 3):
        found = linear.dense_hessian(risk_of(case, batch_size=batch_size))
        assert found is not None
        close(found[0], wanted, RTOL[dtype])
        assert torch.equal(found[0], found[0].T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", sorted(set(LINEAR) - {"linear_loss"}))
def test_ggn_and_fisher_equal_reference(name: str, dtype: torch.dtype) -> None:
    case = made(LINEAR, name, dtype)
    ggn, empirical = Reference(case).ggn(), Reference(case).empirical_fisher()
    for batch_size in (None, 1, 3):
        risk = risk_of(case, batch_size=batch_size)
        for few in (True, False):
            close(gram(uw.GGN(risk), few), ggn, RTOL[dtype])
            close(gram(uw.Fisher(risk, "empirical"), few), empirical, RTOL[dtype])


def test_nothing_is_left_of_a_hessian_without_curvature() -> None:
    case = made(LINEAR, "linear_loss", torch.float64)
    case.model = case.model[2]  # type: ignore[index]
    case.train = (draw(9, 5), case.train[1])
    found = linear.dense_hessian(risk_of(case))
    assert found is not None
    assert not found[0].any()


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
def test_fisher_equals_its_factor(kind: str) -> None:
    for name in ("mlp", "one_logit", "regression"):
        fisher = uw.Fisher(risk_of(make(name)), kind, samples=2)  # type: ignore[arg-type]
        blocks = fisher.factor_rows()
        assert blocks is not None
        rows = torch.cat(list(blocks))
        close(gram(fisher, few=True), rows.T @ rows, 1e-12)
        close(fisher.dense(), rows.T @ rows, 1e-12)


@pytest.mark.parametrize("name", sorted(OTHER))
@pytest.mark.slow
def test_declines_what_it_does_not_hold_for(name: str) -> None:
    case = made(OTHER, name, torch.float64)
    risk = risk_of(case)
    assert linear.dense_hessian(risk) is None
    assert gram(uw.GGN(risk), few=False) is None
    reference = Reference(case)
    if name not in ("patched", "parametrised"):  # a deep copy is no copy of these
        close(uw.Hessian(risk).dense(), reference.hessian(), 1e-11)
        close(uw.GGN(risk).dense(), reference.ggn(), 1e-11)


@pytest.mark.parametrize("name", ["mlp", "skip", "wide_and_narrow", "relu_in_place"])
@pytest.mark.parametrize(
    ("limit", "value"), [("COTANGENT_BYTES", 1), ("SUMMED_ROWS", 2**19), ("PIECE", 1)]
)
def test_limits_of_memory_do_not_matter(
    name: str, limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    risk = risk_of(made(LINEAR, name, torch.float64))
    hessian, ggn = uw.Hessian(risk).dense(), uw.GGN(risk).dense()
    monkeypatch.setattr(layers if limit == "COTANGENT_BYTES" else linear, limit, value)
    if limit == "SUMMED_ROWS":
        monkeypatch.setattr("upweight.risk.CHUNK_BYTES", 2**20)
        monkeypatch.setattr(linear, "CHUNK_BYTES", 2**20 * 2**18)  # four rows each
    close(uw.Hessian(risk).dense(), hessian, 1e-14)
    close(uw.GGN(risk).dense(), ggn, 1e-14)


def test_declines_rows_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    risk = risk_of(make("mlp"))
    monkeypatch.setattr(linear, "ROW_BYTES", 1)
    assert linear.dense_hessian(risk) is None


def test_declines_a_gram_of_few_inputs() -> None:
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))
    ggn = uw.GGN(uw.EmpiricalRisk(model, nn.MSELoss(), (draw(5, 1), draw(5, 1))))
    assert linear.dense_gram(ggn.risk, 1, ggn.form.roots, ggn.form.multiply) is None
    assert gram(ggn, few=True) is not None


def test_declines_half_precision() -> None:
    risk = risk_of(make("mlp", torch.bfloat16))
    assert linear.dense_hessian(risk) is None


def test_directions_are_counted() -> None:
    risk = risk_of(make("mlp"))  # 4 → 5 → 3
    hessian, ggn, empirical = uw.Hessian(risk), uw.GGN(risk), uw.Fisher(risk, "empirical")
    for operator in (hessian, ggn, empirical):
        operator.dense()
    assert hessian.products == (5 + 3) + 5
    assert ggn.products == 3
    assert empirical.products == 1


def test_hooks_of_the_user_work_and_ours_go() -> None:
    case = make("mlp")
    first, _, last = case.model
    last.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    first.register_forward_hook(lambda module, args, output: output.sin())
    first.register_forward_hook(lambda module, args, output: output + 1.0)
    hooks = dict(first._forward_hooks), dict(last._forward_hooks)
    risk = risk_of(case)
    found = linear.dense_hessian(risk)
    assert found is not None
    close(found[0], Reference(case).hessian(), 1e-12)
    assert (dict(first._forward_hooks), dict(last._forward_hooks)) == hooks


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_grad_modes_of_the_caller_change_nothing(mode: Callable[[], Any]) -> None:
    case = make("mlp")
    wanted = Reference(case).hessian()
    with mode():
        found = linear.dense_hessian(risk_of(case))
    assert found is not None
    close(found[0], wanted, 1e-12)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_hooks_go_after_errors(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    risk = risk_of(make("mlp"))

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(linear.Sums, "add_curved", fail)
    with pytest.raises(error):
        linear.dense_hessian(risk)
    assert not any(module._forward_hooks for module in risk.model.model.modules())


@pytest.mark.slow
def test_inputs_that_depend_on_a_layer_in_some_rows_only() -> None:
    """ReLU units that are dead in one chunk and alive in the next: the columns are joined."""
    case = made(LINEAR, "relu_in_place", torch.float64)
    x, y = case.train
    case.train = (torch.cat([x.abs() * 3, -x.abs() * 3]), torch.cat([y, y]))
    wanted = Reference(case).hessian()
    for batch_size in (1, 2, 9, None):
        close(uw.Hessian(risk_of(case, batch_size=batch_size)).dense(), wanted, 1e-12)
