"""Problem files of the benchmarks, and the model that they hold.

A *problem* is an ``.npz`` file without pickle that holds ``x_train``, ``y_train``, ``x_test``,
``y_test``, the widths ``sizes`` of a multilayer perceptron, its ``activation``, its weights
``state/<i>.weight`` and ``state/<i>.bias`` (names as in ``torch.nn.Sequential``) and the
``damping`` (NaN: what the library takes by default). It may hold weights of models trained in the
same way, ``models/<k>/<name>``, and of moments of the training, ``checkpoints/<k>/<name>``, with
their learning rates ``rates``; ``held_out`` counts the first of the test rows that are unseen rows
drawn as the training rows were, wrong labels included; ``record`` is what the training was (steps,
mean learning rate, weight decay, momentum), and ``masks`` the subsets that were trained on.

This module needs only NumPy and torch, so our own side of a comparison can import it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
PARTS = ("x_train", "y_train", "x_test", "y_test")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """Rows, weights and damping of one comparison, in float32 (labels in int64)."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    sizes: tuple[int, ...]
    activation: str
    state: State
    damping: float | None  # None: the library's default
    models: tuple[State, ...] = ()
    checkpoints: tuple[State, ...] = ()
    rates: tuple[float, ...] = ()
    held_out: int = 0  # so many of the first test rows are drawn as the training rows were
    record: tuple[float, ...] = ()  # steps, mean learning rate, weight decay, momentum
    masks: Tensor | None = None  # (S, n): the rows of each subset that was trained on

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Training inputs and labels."""
        return self.x_train, self.y_train

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """Test inputs and labels."""
        return self.x_test, self.y_test

    def damped(self, name: str, scale: float = 1.0) -> dict[str, float]:
        """The damping as a keyword argument of that name; none where the default is wanted."""
        return {} if self.damping is None else {name: self.damping * scale}

    def ensembles(self, name: str) -> dict[str, tuple[State, ...]]:
        """By name: the weights of the model, and those of all models with their number."""
        found = {name: (self.state,)}
        if self.models:
            found[f"{name}-{len(self.models)}"] = self.models
        return found


def _floats(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _labels(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64))


def _state(data: Mapping[str, np.ndarray], prefix: str) -> State:
    names = [key for key in data if key.startswith(prefix)]
    return {name.removeprefix(prefix): _floats(data[name]) for name in names}


def _states(data: Mapping[str, np.ndarray], kind: str) -> tuple[State, ...]:
    count = len({key.split("/")[1] for key in data if key.startswith(f"{kind}/")})
    return tuple(_state(data, f"{kind}/{k}/") for k in range(count))


def load_problem(path: str | Path) -> Problem:
    """Read a problem file."""
    with np.load(path, allow_pickle=False) as data:
        damping = float(data["damping"])
        return Problem(
            x_train=_floats(data["x_train"]),
            y_train=_labels(data["y_train"]),
            x_test=_floats(data["x_test"]),
            y_test=_labels(data["y_test"]),
            sizes=tuple(int(width) for width in data["sizes"]),
            activation=str(data["activation"]),
            state=_state(data, "state/"),
            damping=None if math.isnan(damping) else damping,
            models=_states(data, "models"),
            checkpoints=_states(data, "checkpoints"),
            rates=tuple(map(float, data["rates"])),
            held_out=int(data["held_out"]),
            record=tuple(map(float, data["record"])),
            masks=torch.from_numpy(data["masks"]) if data["masks"].size else None,
        )


def save_problem(path: str | Path, problem: Problem) -> None:
    """Write a problem file, the inverse of `load_problem`."""
    arrays: dict[str, Any] = {name: getattr(problem, name).numpy() for name in PARTS}
    arrays |= {f"state/{name}": t.numpy() for name, t in problem.state.items()}
    for kind in ("models", "checkpoints"):
        for k, state in enumerate(getattr(problem, kind)):
            arrays |= {f"{kind}/{k}/{name}": t.numpy() for name, t in state.items()}
    np.savez(
        path,
        sizes=np.array(problem.sizes),
        activation=np.array(problem.activation),
        damping=np.array(math.nan if problem.damping is None else problem.damping),
        rates=np.array(problem.rates),
        held_out=np.array(problem.held_out),
        record=np.array(problem.record),
        masks=np.empty((0, 0), dtype=bool) if problem.masks is None else problem.masks.numpy(),
        **arrays,
    )


def build_model(problem: Problem, state: State | None = None) -> nn.Sequential:
    """Build the multilayer perceptron of the problem with its weights, in eval mode."""
    activation = ACTIVATIONS[problem.activation]
    layers: list[nn.Module] = []
    for width_in, width_out in zip(problem.sizes, problem.sizes[1:], strict=False):
        layers += [nn.Linear(width_in, width_out), activation()]
    model = nn.Sequential(*layers[:-1])
    model.load_state_dict(problem.state if state is None else state)
    return model.eval()


def make_loader(rows: tuple[Tensor, Tensor], batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Serve the rows in order, in batches (a size of 0 means one batch of all rows)."""
    return DataLoader(TensorDataset(*rows), batch_size=batch_size or len(rows[0]), shuffle=False)


def margins(outputs: Tensor, labels: Tensor) -> Tensor:
    """log p/(1 − p) of the labels, a number per row: the logit minus logsumexp of the others.

    The gradient of a test row's loss is a negative multiple of that of its margin, so that both
    rank the training rows alike.
    """
    labels = labels[..., None]
    others = outputs.scatter(-1, labels, -math.inf)
    return outputs.gather(-1, labels)[..., 0] - others.logsumexp(-1)
