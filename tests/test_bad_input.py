"""Every bad input gets one clear message, before any long work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import upweight as uw
from upweight.operator import Diagonal

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 4, generator=DRAW), torch.randint(3, (12,), generator=DRAW)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def fit(
    train: Any = (X, Y), model: nn.Module | None = None, loss: Any = F.cross_entropy, **options: Any
) -> uw.Influence:
    options = {"damping": 0.1, **options}
    return uw.Influence(model or network(), loss, **options).fit(train)


def changed(tensor: Tensor, row: int, value: float) -> Tensor:
    copy = tensor.clone()
    copy[row] = value
    return copy


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(X[0], Y[0])])


class Augmented(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i] + torch.randn(4), Y[i]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), x


class RandomForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, training=True)


class BatchStatistics(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Squeezed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


class Pooled(nn.Module):
    """A mean over positions, whether they are padding or not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mean(1)


class Undecodable(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> str:
        return b"\xff".decode()


@dataclass
class Batch:
    x: Tensor
    y: Tensor


def padded(rows: list[Any]) -> tuple[Tensor, Tensor]:
    x = nn.utils.rnn.pad_sequence([x for x, _ in rows], batch_first=True)
    return x, torch.stack([y for _, y in rows])


def with_penalty() -> uw.Influence:
    model = network()
    return fit(
        model=model,
        loss=lambda o, t: F.cross_entropy(o, t) + sum(p.square().sum() for p in model.parameters()),
    )


def forward_of_another_model() -> uw.Influence:
    other = network()
    return fit(forward=lambda m, b: other(b[0]))


def weighted_with_one_class_probed() -> uw.Influence:
    y = torch.zeros(60, dtype=torch.int64)
    y[[3, 20]] = 1  # not among the probed rows
    return fit(
        (torch.randn(60, 4), y),
        loss=lambda o, t: F.cross_entropy(o, t, weight=torch.tensor([1.0, 30.0, 1.0])),
    )


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), **options)


def frozen() -> nn.Module:
    return network().requires_grad_(False)


def diverged() -> nn.Module:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")  # type: ignore[index]
    return model


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "label out of range": (
        lambda: fit((X, changed(Y, 7, 3))),
        ValueError,
        r"training data: row 7: label 3 is out of range; the model has 3 outputs",
    ),
    "negative label": (lambda: fit((X, changed(Y, 2, -1))), ValueError, r"row 2: label -1"),
    "nan in features": (
        lambda: fit((changed(X, 5, float("nan")), Y)),
        ValueError,
        r"training data: row 5 is not finite \(NaN or inf\)",
    ),
    "inf in features": (
        lambda: fit((changed(X, 11, float("inf")), Y)),
        ValueError,
        r"row 11 is not finite",
    ),
    "no rows": (lambda: fit((X[:0], Y[:0])), ValueError, "at least one row"),
    "no test rows": (
        lambda: fit().scores((X[:0], Y[:0])),
        ValueError,
        "test data: expected at least one row",
    ),
    "lengths that differ": (
        lambda: fit((X, Y[:-1])),
        ValueError,
        r"same number of rows everywhere; data\[0\] has 12, data\[1\] has 11",
    ),
    "features of the wrong width": (
        lambda: fit((X[:, :3], Y)),
        ValueError,
        r"the model does not take these rows \(batch\[0\] \(8, 3\) float32",
    ),
    "no trainable parameter": (lambda: fit(model=frozen()), ValueError, 'parameters="head.\\*"'),
    "no parameter at all": (
        lambda: fit(model=nn.Flatten()),
        ValueError,
        "it has no parameters at all",
    ),
    "no parameter of that name": (
        lambda: fit(parameters="haed.*"),
        ValueError,
        r"no parameter matches 'haed.\*'; the model has: 0.weight, 0.bias",
    ),
    "parameters that are not finite": (
        lambda: fit(model=diverged()),
        ValueError,
        "parameter 0.weight is not finite",
    ),
    "damping below zero": (lambda: fit(damping=-1.0), ValueError, "λ ≥ 0; got -1"),
    "damping that is nan": (lambda: fit(damping=float("nan")), ValueError, "λ ≥ 0; got nan"),
    "no damping with a singular matrix": (
        lambda: fit(damping=0.0),
        ValueError,
        "singular.*larger damping|singular. Choose a damping above 0",
    ),
    "2-d class labels": (
        lambda: fit((X, Y[:, None])),
        ValueError,
        r"expected one class label per row.*y.squeeze\(1\)",
    ),
    "float class labels": (lambda: fit((X, Y.float())), ValueError, r"y.long\(\)"),
    "loss that returns nan": (
        lambda: fit(loss=lambda o, t: F.cross_entropy(o, t) * float("nan")),
        ValueError,
        "loss is not finite",
    ),
    "loss that is nan on one row": (
        lambda: fit(
            (torch.cat([X, -torch.ones(1, 4) * 9]), torch.cat([Y, Y[:1]])),
            loss=lambda o, t: F.cross_entropy(o, t, reduction="none"),
            forward=lambda m, b: torch.where((b[0] < -8).any(1, True), float("inf"), m(b[0])),
        ),
        ValueError,
        "not finite",
    ),
    "loss that does not return a tensor": (
        lambda: fit(loss=lambda o, t: 1.0),
        TypeError,
        "expected the loss to return a Tensor; got float",
    ),
    "loss that couples rows": (
        lambda: fit(loss=lambda o, t: F.cross_entropy(o - o.mean(0), t)),
        ValueError,
        # with some networks the first rows alone look like a mean
        "expected a loss that is the mean (or the sum )?of one loss per row",
    ),
    "class weights averaged over the batch": (
        lambda: fit(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 9.0]))),
        ValueError,
        "Class weights are averaged over the batch",
    ),
    "loss with several numbers per row": (
        lambda: fit((X, torch.randn(12, 3)), loss=nn.MSELoss(reduction="none")),
        ValueError,
        "expected a loss with one number per row",
    ),
    "output and target broadcast": (
        lambda: fit((X, torch.randn(12)), nn.Linear(4, 1), nn.MSELoss(reduction="sum")),
        ValueError,
        "broadcast against each other",
    ),
    "model with two outputs": (
        lambda: fit(model=Pair()),
        TypeError,
        r"one Tensor; got tuple.*forward=",
    ),
    "model that is random": (
        lambda: fit(model=RandomForward()),
        ValueError,
        "expected a deterministic model",
    ),
    "model that mixes rows": (
        lambda: fit(model=BatchStatistics()),
        ValueError,
        "do not depend on the other rows",
    ),
    "no module": (lambda: fit(model=lambda x: x), TypeError, "expected a torch.nn.Module"),
    "no loss function": (lambda: fit(loss="mse"), TypeError, "expected a loss function"),
    "stream of rows": (lambda: fit(Stream()), TypeError, r"list\(dataset\)"),
    "loader of a stream": (lambda: fit(DataLoader(Stream())), TypeError, r"list\(dataset\)"),
    "generator": (lambda: fit((X[i], Y[i]) for i in range(12)), TypeError, "no identity"),
    "loader that repeats rows": (
        lambda: fit(
            DataLoader(TensorDataset(X, Y), sampler=WeightedRandomSampler(torch.ones(12), 12))
        ),
        TypeError,
        "visits every row of its data set once.*Subset",
    ),
    "loader that draws rows anew": (
        lambda: fit(loader(sampler=RandomSampler(X, replacement=True))),
        TypeError,
        "with a RandomSampler",
    ),
    "loader of a batch sampler that repeats rows": (
        lambda: fit(
            loader(batch_sampler=BatchSampler(WeightedRandomSampler(torch.ones(12), 12), 4, False))
        ),
        TypeError,
        "with a WeightedRandomSampler",
    ),
    "loader of some batches": (
        lambda: fit(loader(batch_sampler=[[0, 1], [2, 3]])),
        TypeError,
        "visits every row",
    ),
    "class weights where the probed rows have one class": (
        weighted_with_one_class_probed,
        ValueError,
        "expected a loss that is the mean of one loss per row, as it is on the first rows",
    ),
    "loss with a penalty on parameters": (
        with_penalty,
        ValueError,
        r"uses parameters of the model by itself \(0.weight",
    ),
    "model without gradients": (
        lambda: fit(model=NoGrad()),
        ValueError,
        "does not depend on the chosen parameters.*no_grad",
    ),
    "forward of another model": (
        forward_of_another_model,
        ValueError,
        "does not depend on the chosen parameters.*another model",
    ),
    "output squeezed for one row": (
        lambda: fit((X, torch.randn(12)), Squeezed(nn.Linear(4, 1)), F.mse_loss),
        ValueError,
        r"got \(\).*Use squeeze\(-1\)",
    ),
    "padding that counts": (
        lambda: fit(
            DataLoader(
                [(torch.randn(2 + i % 3, 4), Y[i]) for i in range(12)],  # type: ignore[arg-type]
                collate_fn=padded,
            ),
            Pooled(),
        ),
        ValueError,
        "Padding that counts",
    ),
    "batch as a dataclass": (
        lambda: fit(loader(collate_fn=lambda rows: Batch(*map(torch.stack, zip(*rows))))),  # noqa: B905
        TypeError,
        "tensors in tuples, lists and dicts; got a Batch",
    ),
    "rows that cannot be read": (lambda: fit(Undecodable()), ValueError, "training data: 'utf-8'"),
    "damping below what double precision can tell": (
        lambda: fit(damping=1e-25),
        ValueError,
        "singular to working precision",
    ),
    "singular up to single precision": (
        lambda: fit((torch.randn(60, 4), torch.arange(60) % 3), nn.Linear(4, 3), damping=0.0),
        ValueError,
        r"A \+ 0·I is singular",
    ),
    "Fisher of labels that the loss ignores": (
        lambda: fit(
            (X, changed(Y, 4, -100)),
            loss=nn.CrossEntropyLoss(reduction="sum"),
            curvature="fisher",
        ),
        ValueError,
        "Fisher 'exact' is not defined where the loss ignores labels",
    ),
    "random augmentation": (lambda: fit(Augmented()), ValueError, "augmentation"),
    "text in an array": (
        lambda: fit((np.array([["a"]] * 12), Y)),
        TypeError,
        "Encode text and categories first",
    ),
    "one tensor only": (lambda: fit(X), TypeError, r"expected batches \(x, y\); got"),
    "three parts": (lambda: fit((X, Y, Y)), TypeError, "forward=lambda model, batch"),
    "names that are too few": (
        lambda: uw.Influence(network(), F.cross_entropy, damping=1.0).fit((X, Y), names=["a"]),
        ValueError,
        "one name per row, 12; got 1",
    ),
    "unknown mode": (lambda: fit().scores((X, Y), mode="upp"), ValueError, "'up' or 'perturb"),  # type: ignore[arg-type]
    "unknown method": (
        lambda: fit(method="dirct"),
        ValueError,
        r"one of \['arnoldi', 'cg', 'direct', .*'auto'\]; got 'dirct'",
    ),
    "method as a class": (lambda: fit(method=uw.Direct), TypeError, r"such as Direct\(\)"),
    "unknown curvature": (lambda: fit(curvature="gnn"), ValueError, "'ggn', 'hessian'"),
    "damping as text": (lambda: fit(damping="0.1"), TypeError, "a number for the damping"),
    "batch size as text": (lambda: fit(batch_size="8"), ValueError, "at least 1"),
    "parameters in place of their names": (
        lambda: fit(parameters=list(network().parameters())),
        TypeError,
        "name patterns such as 'head",
    ),
    "loss as a class": (
        lambda: fit(loss=nn.CrossEntropyLoss),
        TypeError,
        r"write CrossEntropyLoss\(\)",
    ),
    "int32 labels": (lambda: fit((X, Y.int())), ValueError, r"y.long\(\)"),
    "integer target of a binary loss": (
        lambda: fit((X, Y[:, None]), nn.Linear(4, 1), nn.BCEWithLogitsLoss()),
        ValueError,
        r"y.float\(\)",
    ),
    "batch size of zero": (lambda: fit(batch_size=0), ValueError, "at least 1"),
    "scores before fit": (
        lambda: uw.Influence(network(), F.cross_entropy, damping=1.0).scores((X, Y)),
        RuntimeError,
        r"call fit\(train\) first",
    ),
    "perturbation of integers": (
        lambda: fit(
            (torch.randint(5, (12, 4)), Y),
            nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(8, 3)),
        ).scores((torch.randint(5, (3, 4)), Y[:3]), mode="perturbation"),
        TypeError,
        r"batch\[0\] is int64.*use mode='up'",
    ),
    "perturbation with several features": (
        lambda: fit(
            {"a": X, "b": X, "y": Y},
            forward=lambda m, b: m(b["a"] + b["b"]),
            target=lambda b: b["y"],
        ).scores({"a": X, "b": X, "y": Y}, mode="perturbation"),
        TypeError,
        r"batch\['a'\], batch\['b'\]. Choose with features=",
    ),
    "features that are not in the batch": (
        lambda: fit(features=lambda b: b[0] * 2).scores((X, Y), mode="perturbation"),
        ValueError,
        "one of the batch's tensors",
    ),
}


@pytest.mark.parametrize("what", sorted(BAD))
def test_bad_input_is_told(what: str) -> None:
    action, kind, message = BAD[what]
    with pytest.raises(kind, match=f"(?s){message}"):
        action()


def test_the_message_is_one_line() -> None:
    with pytest.raises(ValueError, match="row 7") as caught:
        fit((X, changed(Y, 7, 3)))
    assert "\n" not in str(caught.value)


def test_pandas_index_names_the_rows() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(X.numpy(), index=[f"r{i}" for i in range(12)])
    scores = fit((frame, Y)).scores((X[:2], Y[:2]))
    assert list(scores.train_names[:2]) == ["r0", "r1"]
    assert list(scores.test_names) == [0, 1]


@pytest.mark.parametrize("kind", ["array", "series", "tensor"])
def test_names_of_any_kind_are_used(kind: str) -> None:
    pd = pytest.importorskip("pandas")
    wanted = np.arange(100, 112)
    names = {"array": wanted, "series": pd.Series(wanted), "tensor": torch.tensor(wanted)}[kind]
    assert list(uw.Rows((X, Y), names).names) == list(wanted)


def test_multi_index_names_rows_by_tuples() -> None:
    pd = pytest.importorskip("pandas")
    index = pd.MultiIndex.from_product([["a", "b"], range(6)])
    rows = uw.Rows((pd.DataFrame(X.numpy(), index=index), Y))
    assert rows.names[7] == ("b", 1)


def test_a_data_set_that_transforms_its_tensors_is_asked() -> None:
    class Scaled(TensorDataset):
        def __getitem__(self, i: int) -> tuple[Tensor, ...]:
            x, y = super().__getitem__(i)
            return 10 * x, y

    for rows in (uw.Rows(Scaled(X, Y)), uw.Rows(DataLoader(Scaled(X, Y), batch_size=5))):
        assert torch.equal(rows.batch(0, 12)[0], 10 * X)


def test_a_refit_that_fails_changes_nothing() -> None:
    influence = fit()
    wanted = influence.scores((X[:2], Y[:2])).values
    with pytest.raises(ValueError, match="not finite"):
        influence.fit((changed(X, 1, float("nan")), Y))

    def fails(risk: object) -> None:
        raise MemoryError

    influence._make_curvature = fails  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        influence.fit((2 * X, Y))
    assert torch.equal(influence.scores((X[:2], Y[:2])).values, wanted)
    with torch.no_grad():
        influence.model[0].weight.mul_(2)  # type: ignore[index]
    with pytest.raises(MemoryError):
        influence.fit((X, Y))
    with pytest.raises(RuntimeError, match="changed since fit"):
        influence.scores((X[:2], Y[:2]))


def test_other_parameters_than_at_fit_are_refused() -> None:
    influence = fit()
    influence.model[0].requires_grad_(False)  # type: ignore[index]
    assert influence.scores((X[:2], Y[:2])).shape == (2, 12)  # rows of the same form: as fitted
    with pytest.raises(RuntimeError, match="other parameters have requires_grad"):
        influence.scores((X[:2].double(), Y[:2]))


# --- losses that are finite where their gradient is not -------------------------------------------


def root_of_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(1).sqrt()


def fits_exactly(row: int, n: int = 8) -> tuple[Tensor, Tensor]:
    """Targets that a model of zeros meets in one row, where a root of the error has no slope."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, k, generator=generator) for k in (4, 2))
    return x, changed(y, row, 0.0)


def zeros() -> nn.Module:
    model = nn.Linear(4, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


GOOD = fits_exactly(slice(0, 0))  # type: ignore[arg-type]
CALLS: dict[str, tuple[str, Callable[[uw.Influence, Any], object]]] = {
    "scores": ("test", lambda i, rows: i.scores(rows)),
    "mean scores": ("test", lambda i, rows: i.mean_scores(rows)),
    "measure": ("test", lambda i, rows: i.measure(rows)),
    "scores of rows": ("training", lambda i, rows: i.scores(GOOD, rows)),
    "mean scores of rows": ("training", lambda i, rows: i.mean_scores(GOOD, rows)),
    "self-influence": ("training", lambda i, rows: i.self_influence(rows)),
    "perturbation": ("training", lambda i, rows: i.scores(GOOD, rows, mode="perturbation")),
    "mean perturbation": (
        "training",
        lambda i, rows: i.mean_scores(GOOD, rows, mode="perturbation"),
    ),
}


@pytest.mark.parametrize("call", sorted(CALLS))
@pytest.mark.parametrize("method", ["direct", uw.Arnoldi(rank=3, start="test")])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_row_without_a_finite_gradient_is_named(
    call: str, method: Any, batch_size: int | None
) -> None:
    options: dict[str, Any] = {"method": method, "batch_size": batch_size}
    influence = fit(GOOD, zeros(), root_of_error, **options)
    what, ask = CALLS[call]
    with pytest.raises(ValueError, match=rf"{what} data: row 5: .* is not finite"):
        ask(influence, fits_exactly(5))
    # and leaves nothing behind
    fresh = fit(GOOD, zeros(), root_of_error, **options)
    for other in (influence, fresh):
        other.mean_scores(GOOD)
    wanted = fresh.self_influence().values
    torch.testing.assert_close(influence.self_influence().values, wanted)


def test_a_row_fitted_on_without_a_finite_gradient_is_named() -> None:
    """Where the curvature does not tell first."""
    influence = fit(
        fits_exactly(5), zeros(), root_of_error, curvature=lambda risk: Diagonal(torch.ones(risk.p))
    )
    for ask in (influence.scores, influence.mean_scores, lambda _: influence.self_influence()):
        with pytest.raises(ValueError, match="training data: row 5: the gradient of its loss"):
            ask(GOOD)


def test_a_finite_gradient_without_a_finite_derivative() -> None:
    """|error|^1.5 has no second derivative at zero, which only a perturbation needs."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().pow(1.5).sum(1)

    influence = fit(GOOD, zeros(), loss)
    assert bool(torch.isfinite(influence.scores(GOOD, fits_exactly(5)).values).all())
    with pytest.raises(ValueError, match="training data: row 5: the derivative of its gradient"):
        influence.scores(GOOD, fits_exactly(5), mode="perturbation")
