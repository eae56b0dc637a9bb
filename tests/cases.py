"""Small models with data: the table that numerical tests run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def xy_forward(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def xy_target(batch: Any) -> Any:
    return batch[1]


def xy_with_features(batch: Any, x: Tensor) -> Any:
    return (x, *batch[1:])


@dataclass
class Case:
    """A model, a loss, n training and m test rows."""

    model: nn.Module
    loss: Callable[..., Tensor]
    train: Any
    test: Any
    forward: Callable[[nn.Module, Any], Any] = xy_forward
    target: Callable[[Any], Any] = xy_target
    features: Callable[[Any], Tensor] | None = None
    with_features: Callable[[Any, Tensor], Any] = xy_with_features
    default_adapters: bool = True

    @property
    def n(self) -> int:
        return count(self.train)

    @property
    def m(self) -> int:
        return count(self.test)

    @property
    def options(self) -> dict[str, Any]:
        """What `Influence` and `EmpiricalRisk` need to be told."""
        if self.default_adapters:
            return {}
        return {"forward": self.forward, "target": self.target}


def count(data: Any) -> int:
    if isinstance(data, Tensor):
        return len(data)
    values = data.values() if isinstance(data, dict) else data
    return count(next(iter(values)))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


def labels(n: int, c: int) -> Tensor:
    return torch.randint(c, (n,))


def _x(batch: Any) -> Tensor:
    return batch[0]


def classes(model: nn.Module, shape: tuple[int, ...], c: int, n: int = 7, m: int = 5) -> Case:
    """A classifier on random rows of this shape."""
    return Case(
        model,
        F.cross_entropy,
        (draw(n, *shape), labels(n, c)),
        (draw(m, *shape), labels(m, c)),
        features=_x,
    )


def mlp() -> Case:
    return classes(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,), 3, n=11)


def linear_no_bias() -> Case:
    return classes(nn.Linear(3, 2, bias=False), (3,), 2)


def more_columns_than_parameters() -> Case:
    return classes(nn.Linear(1, 2, bias=False), (1,), 2, n=6, m=13)


def one_row_each() -> Case:
    return classes(nn.Linear(3, 2), (3,), 2, n=1, m=1)


def one_logit() -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    train = (draw(7, 3), labels(7, 2).float()[:, None])
    test = (draw(5, 3), labels(5, 2).float()[:, None])
    return Case(model, nn.BCEWithLogitsLoss(), train, test, features=_x)


def regression() -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2))
    return Case(
        model, nn.MSELoss(), (draw(7, 3), draw(7, 2)), (draw(9, 3), draw(9, 2)), features=_x
    )


def regression_sum() -> Case:
    case = regression()
    case.loss = nn.MSELoss(reduction="sum")
    return case


def per_row_loss() -> Case:
    case = mlp()
    case.loss = nn.CrossEntropyLoss(reduction="none")
    return case


def conv1d() -> Case:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2))
    return classes(model, (2, 5), 2)


def conv2d() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)
    )
    return classes(model, (2, 4, 4), 3)


def conv3d() -> Case:
    model = nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))
    return classes(model, (1, 3, 3, 3), 2)


def conv1d_strided() -> Case:
    """Stride, dilation and two kinds of padding; no bias."""
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3, stride=2, dilation=2, padding=3, bias=False),
        nn.Tanh(),
        nn.Conv1d(3, 2, 2, padding="same", padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    return classes(model, (2, 6), 2)


def conv2d_uneven() -> Case:
    """Every setting differs between the two axes, and the groups have biases."""
    first = nn.Conv2d(
        4, 2, (2, 3), stride=(1, 2), padding=(1, 2), dilation=(2, 1), groups=2,
        padding_mode="reflect",
    )  # fmt: skip
    return classes(nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(32, 2)), (4, 4, 5), 2)


class Sequence(nn.Module):
    """Linear layers on sequences (b, t, d), and on all positions of all rows as (b·t, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.flat = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        h = torch.tanh(self.flat(h.flatten(0, 1)))
        return self.head(h).view(*x.shape[:2], 2).mean(1)


def sequence() -> Case:
    return classes(Sequence(), (5, 3), 2)


def layer_norm() -> Case:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    return classes(model, (4,), 3)


def batch_norm_and_dropout() -> Case:
    """Given in train mode, with running statistics that differ from those of the rows."""
    norm = nn.BatchNorm1d(5)
    with torch.no_grad():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))
    return classes(model.train(), (4,), 3)


def frozen_layer() -> Case:
    case = mlp()
    case.model[0].requires_grad_(False)  # type: ignore[operator]
    return case


class Tied(nn.Module):
    """One weight under two names, and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.encode.weight
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.3))  # a parameter without dimensions

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encode(x))
        h = torch.tanh(self.encode(h))
        return self.scale * self.head(torch.tanh(self.again(h)))


def tied_weights() -> Case:
    return classes(Tied(), (4,), 3)


class Aliased(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3)])
        self.head = self.layers[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layers[0](x)))


def aliased_module() -> Case:
    return classes(Aliased(), (4,), 3)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def lstm() -> Case:
    return classes(Recurrent(), (4, 2), 2, n=5, m=3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def attention() -> Case:
    return classes(Attention(), (3, 4), 2, n=5, m=3)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)).mean(1))


def embedding() -> Case:
    train = (torch.randint(6, (7, 4)), labels(7, 2))
    test = (torch.randint(6, (5, 4)), labels(5, 2))
    return Case(Bag(), F.cross_entropy, train, test, features=None)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(left) + self.right(right)))


def dict_batches() -> Case:
    def rows(n: int) -> dict[str, Tensor]:
        return {"left": draw(n, 3), "right": draw(n, 2), "label": labels(n, 2)}

    return Case(
        TwoInputs(),
        F.cross_entropy,
        rows(7),
        rows(5),
        forward=lambda model, batch: model(batch["left"], batch["right"]),
        target=lambda batch: batch["label"],
        features=lambda batch: batch["left"],
        with_features=lambda batch, x: {**batch, "left": x},
        default_adapters=False,
    )


def positions() -> Case:
    """Class labels at every position of a sequence; the loss averages over them."""
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Tanh(), nn.Conv1d(4, 3, 1))
    train = (draw(6, 2, 4), torch.randint(3, (6, 4)))
    test = (draw(5, 2, 4), torch.randint(3, (5, 4)))
    return Case(model, F.cross_entropy, train, test, features=_x)


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        mlp,
        linear_no_bias,
        more_columns_than_parameters,
        one_row_each,
        one_logit,
        regression,
        regression_sum,
        per_row_loss,
        conv1d,
        conv2d,
        conv3d,
        conv1d_strided,
        conv2d_uneven,
        sequence,
        layer_norm,
        batch_norm_and_dropout,
        frozen_layer,
        tied_weights,
        aliased_module,
        lstm,
        attention,
        embedding,
        dict_batches,
        positions,
    )
}


def make(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """The case of this name, with the same weights and rows every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        case = CASES[name]()
    case.model.to(dtype)
    return case
