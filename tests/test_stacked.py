"""Retraining many copies at once, against `train` one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import upweight as uw
from upweight.margins import margin
from upweight.stacked import Retraining

N, M = 23, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(n: int, c: int) -> Tensor:
    return torch.randint(c, (n,), generator=torch.Generator().manual_seed(n))


CLASSES = (draw(N, 5), labels(N, 3)), (draw(M, 5, seed=1), labels(M, 3))
BINARY = (
    (draw(N, 5), labels(N, 2)[:, None].double()),
    (draw(M, 5, seed=1), labels(M, 2)[:, None].double()),
)
NUMBERS = (draw(N, 5), draw(N, 2, seed=2)), (draw(M, 5, seed=1), draw(M, 2, seed=3))


def mlp(seed: int, outputs: int = 3) -> nn.Module:
    return uw.MLP([5, 7, outputs], nn.Tanh, seed=seed)


class Tied(nn.Module):
    """One weight that is used twice, and goes by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Named(nn.Module):
    """Takes a dict, has a buffer that differs from seed to seed and a parameter without use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(5, 3), nn.Parameter(torch.ones(2))
        self.register_buffer("shift", torch.randn(5))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.layer(left * right + self.shift)


def frozen(seed: int) -> nn.Module:
    model = mlp(seed)
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    return model


def convolution(seed: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)
    )


def by_dimension(parameters: Any) -> torch.optim.Optimizer:
    """Weight decay for matrices only."""
    every = list(parameters)
    groups = [
        {"params": [p for p in every if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=0.01)


def momentum(p: Any) -> torch.optim.Optimizer:
    return SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)


@dataclass
class Problem:
    make: Callable[[int], nn.Module] = mlp
    loss: Callable[..., Tensor] = F.cross_entropy
    data: tuple[Any, Any] = CLASSES
    output: Any = "margin"
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        return {"epochs": 5, "batch_size": 4, "optimizer": momentum} | self.options

    def maker(self, dtype: torch.dtype) -> Callable[[int], nn.Module]:
        return lambda seed: self.make(seed).to(dtype)

    def refit(self, dtype: torch.dtype = torch.float64, **more: Any) -> Retraining:
        settings = self.settings() | {"output": self.output} | more
        return Retraining(self.maker(dtype), self.loss, *self.data, **settings)

    def naive(self, rows: np.ndarray, seed: int, dtype: torch.dtype = torch.float64) -> np.ndarray:
        """One by one, by `train`."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.maker(dtype)(seed)
        uw.train(
            model,
            self.loss,
            uw.Rows(self.data[0]).subset(np.sort(rows).tolist()),
            seed=seed,
            progress=False,
            **self.settings(),
        )
        x, y = uw.Rows(self.data[1]).batch(0, M)
        y = y.to(dtype) if y.is_floating_point() else y
        with torch.no_grad():
            if isinstance(x, dict):
                z = model(**{name: value.to(dtype) for name, value in x.items()})
            else:
                z = model(x.to(dtype))
            if self.output == "margin":
                return margin(z, y).double().numpy()
            one_by_one = [self.loss(z[j : j + 1], y[j : j + 1]).reshape(()) for j in range(M)]
            return torch.stack(one_by_one).double().numpy()


def mse_rows(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(1)


PROBLEMS = {
    "sgd": Problem(),
    "plain sgd": Problem(options={"optimizer": lambda p: SGD(p, lr=0.1)}),
    "adam": Problem(options={"optimizer": lambda p: Adam(p, lr=0.02, amsgrad=True)}),
    "adamw": Problem(options={"optimizer": by_dimension}),
    "rmsprop": Problem(options={"optimizer": lambda p: RMSprop(p, lr=0.01, centered=True)}),
    "adagrad": Problem(
        options={"optimizer": lambda p: Adagrad(p, lr=0.1, initial_accumulator_value=0.1)}
    ),
    "foreach": Problem(options={"optimizer": lambda p: Adam(p, lr=0.02, foreach=True)}),
    "cosine": Problem(options={"scheduler": lambda o: CosineAnnealingLR(o, 5)}),
    "step": Problem(
        options={"optimizer": Adam, "scheduler": lambda o: StepLR(o, 2, 0.3), "epochs": 7}
    ),
    "single rows": Problem(options={"batch_size": 1, "epochs": 2}),
    "one batch": Problem(options={"batch_size": 64, "epochs": 12}),
    "many epochs": Problem(options={"epochs": 25}),  # long enough to be traced
    "mse": Problem(lambda s: mlp(s, 2), F.mse_loss, NUMBERS, "loss"),
    "mse sum": Problem(
        lambda s: mlp(s, 2),
        nn.MSELoss(reduction="sum"),
        NUMBERS,
        "loss",
        {"optimizer": lambda p: SGD(p, lr=0.01)},
    ),
    "mse per row": Problem(lambda s: mlp(s, 2), mse_rows, NUMBERS, "loss"),
    "binary": Problem(lambda s: mlp(s, 1), F.binary_cross_entropy_with_logits, BINARY),
    "entropy sum": Problem(loss=nn.CrossEntropyLoss(reduction="sum")),
    "entropy per row": Problem(loss=nn.CrossEntropyLoss(reduction="none")),
    "smoothed": Problem(loss=nn.CrossEntropyLoss(label_smoothing=0.1), output="loss"),
    "tied": Problem(lambda seed: Tied()),
    "frozen": Problem(frozen),
    "convolution": Problem(convolution),
    "dict": Problem(
        lambda seed: Named(),
        data=(
            ({"left": CLASSES[0][0], "right": draw(N, 5, seed=5)}, CLASSES[0][1]),
            ({"left": CLASSES[1][0], "right": draw(M, 5, seed=6)}, CLASSES[1][1]),
        ),
    ),
}


def subsets(*sizes: int) -> np.ndarray:
    masks = np.zeros((len(sizes), N), dtype=bool)
    for s, size in enumerate(sizes):
        masks[s, np.random.default_rng(s).permutation(N)[:size]] = True
    return masks


# four sizes that make four batches of up to 4, one that makes three, one that makes one
UNEQUAL = subsets(16, 13, 14, 9, 16, 2)
SEEDS = np.array([3, 1, 4, 1, 5, 9])


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.slow
def test_copies_end_where_training_one_by_one_ends(name: str) -> None:
    problem = PROBLEMS[name]
    refit = problem.refit()
    assert refit.reason is None
    found = refit.many(UNEQUAL, SEEDS)
    for s, seed in enumerate(SEEDS.tolist()):
        wanted = problem.naive(np.flatnonzero(UNEQUAL[s]), seed)
        np.testing.assert_allclose(found[s], wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["sgd", "adam", "mse", "binary", "many epochs"])
@pytest.mark.slow
def test_single_precision(name: str) -> None:
    problem = PROBLEMS[name]
    found = problem.refit(torch.float32).many(UNEQUAL, SEEDS)
    for s, seed in enumerate(SEEDS.tolist()):
        wanted = problem.naive(np.flatnonzero(UNEQUAL[s]), seed, torch.float32)
        np.testing.assert_allclose(found[s], wanted, rtol=2e-3, atol=2e-3)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return self.layer(x) * (1 + 0.1 * self.calls)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z if z.sum() > 0 else 2 * z


class Normed(torch.optim.Optimizer):
    """A step of one length: looks at a parameter as a whole."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])


ALONE = {
    "dropout": (
        Problem(lambda s: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))),
        "random",
    ),
    "batch norm": (
        Problem(lambda s: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))),
        "batch",
    ),
    "state": (Problem(lambda s: Noisy()), "different places"),
    "branch": (Problem(lambda s: Branching()), "data-dependent"),
    "norm": (Problem(options={"optimizer": Normed}), "as a whole"),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.slow
def test_what_does_not_stack_is_trained_one_by_one(name: str) -> None:
    problem, reason = ALONE[name]
    refit = problem.refit()
    assert not refit.stackable
    assert reason in str(refit.reason)
    masks = subsets(16, 14, 10)  # batch normalisation refuses to train on a single row
    found = refit.many(masks, SEEDS[:3])
    models = refit.models(masks, SEEDS[:3])
    x = CLASSES[1][0].double()
    for s, seed in enumerate(SEEDS[:3].tolist()):
        wanted = problem.naive(np.flatnonzero(masks[s]), seed)
        np.testing.assert_allclose(found[s], wanted, rtol=1e-9)
        if name != "state":
            with torch.no_grad():
                z = margin(models[s](x), CLASSES[1][1])
            np.testing.assert_allclose(z, wanted, rtol=1e-9)


@pytest.mark.slow
def test_neighbours_and_groups_do_not_matter() -> None:
    problem = PROBLEMS["adam"]
    together = problem.refit().many(UNEQUAL, SEEDS)
    narrow = problem.refit(memory=1)
    assert narrow._most_at_once == 1
    np.testing.assert_allclose(narrow.many(UNEQUAL, SEEDS), together, rtol=1e-10)
    back = problem.refit().many(UNEQUAL[::-1], SEEDS[::-1])[::-1]
    np.testing.assert_allclose(back, together, rtol=1e-10)
    one = problem.refit()
    for s, seed in enumerate(SEEDS.tolist()):
        rows = np.flatnonzero(UNEQUAL[s])
        np.testing.assert_allclose(one(rows[::-1], seed), together[s], rtol=1e-10)
        np.testing.assert_allclose(one(UNEQUAL[s], seed), together[s], rtol=1e-10)


def test_models_are_those_whose_outputs_are_given() -> None:
    problem = PROBLEMS["dict"]
    refit = problem.refit()
    models = refit.models(UNEQUAL, SEEDS)
    x, y = problem.data[1]
    with torch.no_grad():
        found = [
            margin(model(**{name: value.double() for name, value in x.items()}), y)
            for model in models
        ]
    assert not any(model.training for model in models)
    np.testing.assert_allclose(torch.stack(found), refit.many(UNEQUAL, SEEDS), rtol=1e-10)


def test_a_training_that_diverges_does_not_spoil_the_others() -> None:
    (x, y), test = NUMBERS
    x = x.clone()
    x[0] = 1e4
    problem = Problem(mlp_relu, F.mse_loss, ((x, y), test), "loss", {"epochs": 30})
    masks = subsets(12, 12, 12, 12)
    masks[:, 0] = [False, True, False, True]
    refit = problem.refit()
    with pytest.warns(RuntimeWarning, match=r"2 of 4 trainings diverged, at positions \[1, 3\]"):
        found = refit.many(masks, [0, 1, 2, 3])
    assert np.isnan(found).all(1).tolist() == [False, True, False, True]
    for s in (0, 2):
        wanted = problem.naive(np.flatnonzero(masks[s]), s)
        np.testing.assert_allclose(found[s], wanted, rtol=1e-8)
    with pytest.raises(FloatingPointError) as stacked:
        refit(masks[1], 1)
    with pytest.raises(FloatingPointError) as alone:
        problem.naive(np.flatnonzero(masks[1]), 1)
    assert str(stacked.value) == str(alone.value)
    with pytest.warns(RuntimeWarning, match="diverged"):
        models = refit.models(masks[:2], [0, 1])
    assert all(bool(p.isfinite().all()) for p in models[0].parameters())
    assert all(bool(p.isnan().all()) for p in models[1].parameters())


def mlp_relu(seed: int) -> nn.Module:
    return uw.MLP([5, 7, 2], seed=seed)


def test_divergence_one_by_one() -> None:
    options = {"optimizer": lambda p: SGD(p, lr=1e200)}
    refit = Problem(lambda s: mlp(s, 2), F.mse_loss, NUMBERS, "loss", options).refit()
    assert "diverged" in str(refit.reason)
    with pytest.warns(RuntimeWarning, match="2 of 2"):
        assert np.isnan(refit.many(UNEQUAL[:2], [0, 1])).all()


def test_a_module_is_a_start_and_nothing_is_touched() -> None:
    start = mlp(7)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    state = torch.random.get_rng_state()
    train, test = CLASSES
    refit = Retraining(start, F.cross_entropy, train, test, epochs=3, batch_size=5)
    found = refit.many(UNEQUAL, SEEDS)
    shared = Retraining(lambda seed: start, F.cross_entropy, train, test, epochs=3, batch_size=5)
    np.testing.assert_allclose(shared.many(UNEQUAL, SEEDS), found, rtol=1e-6)
    assert torch.equal(state, torch.random.get_rng_state())
    assert start.training
    assert all(torch.equal(before[name], value) for name, value in start.state_dict().items())
    model = mlp(7)
    rows = uw.Rows(train).subset(np.flatnonzero(UNEQUAL[0]).tolist())
    uw.train(model, F.cross_entropy, rows, epochs=3, batch_size=5, seed=3, progress=False)
    with torch.no_grad():
        np.testing.assert_allclose(found[0], margin(model(test[0]), test[1]), rtol=1e-4, atol=1e-5)


def test_a_function_reads_the_outputs() -> None:
    def distance(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().sum(1).mean()

    problem = Problem(lambda s: mlp(s, 2), F.mse_loss, NUMBERS)
    refit = problem.refit(output=distance)
    (model,) = refit.models(UNEQUAL[:1], [0])
    x, y = NUMBERS[1]
    wanted = (model(x.double()) - y).abs().sum(1).detach()
    np.testing.assert_allclose(refit(UNEQUAL[0], 0), wanted, rtol=1e-10)


def test_fingerprint_knows_data_settings_and_start() -> None:
    train, test = CLASSES
    changed = (train[0] + 1e-3 * torch.eye(N, 5), train[1])
    base = Problem().refit().fingerprint
    assert base == Problem().refit().fingerprint
    others = [
        Problem(data=(changed, test)),
        Problem(data=(train, (test[0][:5], test[1][:5]))),
        Problem(lambda s: mlp(s + 1)),
        Problem(loss=nn.CrossEntropyLoss(label_smoothing=0.1)),
        Problem(output="loss"),
        Problem(options={"epochs": 6}),
        Problem(options={"batch_size": 3}),
        Problem(options={"optimizer": lambda p: SGD(p, lr=0.05)}),
        Problem(options={"scheduler": lambda o: StepLR(o, 2)}),
        Problem(options={"scheduler": lambda o: StepLR(o, 3)}),
    ]
    assert len({base, *(other.refit().fingerprint for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("masks", "seeds", "error", "message"),
    [
        (UNEQUAL.astype(int), SEEDS, TypeError, "masks of bool"),
        (UNEQUAL[:, 1:], SEEDS, ValueError, r"masks \(S, 23\); got \(6, 22\)"),
        (UNEQUAL[0], SEEDS[:1], ValueError, r"masks \(S, 23\)"),
        (UNEQUAL & (np.arange(6) != 2)[:, None], SEEDS, ValueError, r"none in \[2\]"),
        (UNEQUAL, SEEDS[:5], ValueError, "6 integers as seeds"),
        (UNEQUAL, SEEDS / 2, ValueError, "integers"),
    ],
)
def test_bad_masks_are_refused(masks: Any, seeds: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Problem().refit().many(masks, seeds)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "at least one row"),
        ([0, 0], ValueError, "different positions from 0 to 22"),
        ([23], ValueError, "different positions"),
        ([-1, 2], ValueError, "different positions"),
        ([0.5], TypeError, "integers"),
        (np.ones(22, dtype=bool), TypeError, "integers"),
    ],
)
def test_bad_rows_are_refused(rows: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Problem().refit()(rows, 0)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="epochs"):
        Problem(options={"epochs": 0}).refit()
    with pytest.raises(ValueError, match="output 'margin'"):
        Problem(output="accuracy").refit()
    with pytest.raises(ValueError, match="logits"):
        Problem(lambda s: mlp(s, 2), F.mse_loss, NUMBERS, "margin").refit()
    with pytest.raises(TypeError, match="closure"):
        Problem(options={"optimizer": torch.optim.LBFGS}).refit()
    with pytest.raises(TypeError, match="make_model"):
        Retraining(lambda seed: None, F.cross_entropy, *CLASSES, epochs=1)  # type: ignore[arg-type,return-value]
    refit = Problem(lambda s: uw.MLP([5, 4 + s // 5, 3])).refit()
    with pytest.raises(ValueError, match="every seed"):
        refit.many(UNEQUAL, SEEDS)
