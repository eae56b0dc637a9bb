"""A small network and a training loop, for examples, audits and retraining."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map
from tqdm import tqdm

from upweight.functional import default_forward, default_target
from upweight.losses import RowLoss
from upweight.record import TrainingRecord
from upweight.rows import Rows

__all__ = ["MLP", "History", "train"]


class MLP(nn.Sequential):
    """A fully connected network: Linear, activation, Linear, …, Linear.

    Parameters
    ----------
    sizes
        Widths from input to output, at least two.
    activation
        A module class for between the layers.
    seed
        Of the initial weights; the global random state is not touched. None draws from it.

    Examples
    --------
    >>> model = MLP([13, 16, 16, 3], nn.Tanh, seed=0)
    >>> sum(p.numel() for p in model.parameters())
    547
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Callable[[], nn.Module] = nn.ReLU,
        *,
        seed: int | None = None,
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"expected at least two positive widths; got {list(sizes)}")
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            layers: list[nn.Module] = []
            for i, (inputs, outputs) in enumerate(pairwise(sizes)):
                layers += [activation()] if i else []
                layers += [nn.Linear(inputs, outputs)]
        super().__init__(*layers)


@dataclass
class History:
    """The record of a training.

    Attributes
    ----------
    losses
        A line per epoch: ``train``, ``validation`` (if there was any): mean loss per row in
        evaluation mode after the epoch; ``learning_rate`` of the epoch.
    steps
        Optimiser steps taken.
    best_epoch
        The epoch whose weights the model has: the last one, or with early stopping the best.
    settings
        Epochs, batch size, seed, optimiser.
    record
        What ``damping="auto"`` of `Influence` makes use of, up to the best epoch; None where the
        optimiser is not SGD with one setting for all parameters.
    """

    losses: pd.DataFrame
    steps: int
    best_epoch: int
    settings: dict[str, Any] = field(default_factory=lambda: {})
    record: TrainingRecord | None = None


def train(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    data: Any,
    validation: Any = None,
    *,
    epochs: int,
    optimizer: Callable[[Any], Optimizer] = Adam,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    batch_size: int = 32,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train a model in place by minibatches, shuffled anew every epoch.

    Parameters
    ----------
    model
        The module; trained in place, left in evaluation mode.
    loss
        ``loss(output, target)``; a loss per row is averaged.
    data, validation
        Rows as `Rows` takes them, in batches ``(x, y)``.
    epochs
        How many passes over the data at most.
    optimizer
        From parameters to an optimiser: ``lambda p: Adam(p, lr=0.005, weight_decay=0.01)``.
    scheduler
        From the optimiser to a learning rate schedule, stepped once an epoch.
    batch_size
        Rows per step; the last batch of an epoch may be smaller.
    patience
        Stop after so many epochs without a lower validation loss and go back to the best weights.
    seed
        Of the order of rows and of dropout. The global random state is not touched.
    progress
        Show a progress bar when on a terminal.

    Returns
    -------
    History
        Losses per epoch, steps, and settings.

    Raises
    ------
    ValueError
        If settings do not make sense.
    FloatingPointError
        If the loss is no longer finite: the training diverged.

    Examples
    --------
    >>> x = torch.linspace(-1, 1, 20)[:, None]
    >>> history = train(MLP([1, 1], seed=0), nn.functional.mse_loss, (x, 2 * x), epochs=2)
    >>> history.steps, list(history.losses.columns)
    (2, ['train', 'learning_rate'])
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"expected epochs and batch_size ≥ 1; got {epochs} and {batch_size}")
    if patience is not None and validation is None:
        raise ValueError("early stopping (patience) needs validation data")
    rows = Rows(data)
    held_out = None if validation is None else Rows(validation)
    row_loss = find_row_loss(model, loss, rows)
    steps = optimizer(model.parameters())
    schedule = None if scheduler is None else scheduler(steps)
    orders = row_orders(len(rows), seed)
    table: list[dict[str, float]] = []
    best: tuple[float, int, dict[str, Any]] | None = None
    count = 0
    bar = tqdm(range(1, epochs + 1), desc="train", disable=None if progress else True, leave=False)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        for epoch in bar:
            order = next(orders).tolist()
            rate = float(steps.param_groups[0]["lr"])
            model.train()
            for start in range(0, len(rows), batch_size):
                _step(model, loss, steps, rows.take(order[start : start + batch_size]), epoch)
                count += 1
            if schedule is not None:
                schedule.step()
            line = {"train": mean_loss(model, row_loss, rows)}
            if held_out is not None:
                line["validation"] = mean_loss(model, row_loss, held_out)
            table.append({**line, "learning_rate": rate})
            bar.set_postfix({k: f"{v:.3g}" for k, v in line.items()})
            if patience is not None:
                if best is None or line["validation"] < best[0]:
                    best = (line["validation"], epoch, copy.deepcopy(model.state_dict()))
                elif epoch - best[1] >= patience:
                    break
    if best is not None:
        model.load_state_dict(best[2])
    model.eval()
    best_epoch = best[1] if best else len(table)
    return History(
        pd.DataFrame(table, index=pd.RangeIndex(1, len(table) + 1, name="epoch")),
        count,
        best_epoch,
        {"epochs": epochs, "batch_size": batch_size, "seed": seed, "optimizer": repr(steps)},
        _record(steps, [line["learning_rate"] for line in table[:best_epoch]], count // len(table)),
    )


def _record(optimizer: Optimizer, rates: list[float], steps: int) -> TrainingRecord | None:
    """Of the epochs with these learning rates, of so many steps each."""
    groups = optimizer.param_groups
    rate = sum(rates) / len(rates)
    if type(optimizer) is not SGD or len(groups) > 1 or rate <= 0:
        return None
    found = groups[0]
    if found["maximize"] or found["dampening"] or found["momentum"] >= 1:
        return None
    return TrainingRecord(steps * len(rates), rate, found["weight_decay"], found["momentum"])


def row_orders(rows: int, seed: int) -> Iterator[Tensor]:
    """The order of the rows in each epoch, a new permutation of their positions every time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(rows, generator=generator)


def to_model(model: nn.Module, batch: Any) -> Any:
    """A batch on the device of the model, its floating tensors in the dtype of the model."""
    first = next(model.parameters())

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        # numpy's floats are float64: the model's own dtype is meant, as in `EmpiricalRisk`
        return leaf.to(first.device, first.dtype if leaf.is_floating_point() else None)

    return tree_map(move, batch)


def diverged(loss: float, epoch: int) -> FloatingPointError:
    """The error of a training whose loss is no longer finite."""
    return FloatingPointError(
        f"the loss is {loss} in epoch {epoch}: the training diverged. Lower the learning rate, or "
        "look for extreme values in the features"
    )


def _step(model: nn.Module, loss: Any, optimizer: Optimizer, batch: Any, epoch: int) -> None:
    batch = to_model(model, batch)
    optimizer.zero_grad(set_to_none=True)
    value = loss(default_forward(model, batch), default_target(batch)).mean()
    if not bool(torch.isfinite(value)):
        raise diverged(value.item(), epoch)
    value.backward()
    optimizer.step()


def mean_loss(model: nn.Module, loss: RowLoss, rows: Rows) -> float:
    """The mean loss per row in evaluation mode, whatever the reduction of the loss."""
    training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), 1024):
            batch = to_model(model, rows.batch(start, min(start + 1024, len(rows))))
            total += float(loss(default_forward(model, batch), default_target(batch)).sum())
    model.train(training)
    return total / len(rows)


def find_row_loss(model: nn.Module, loss: Callable[[Any, Any], Tensor], rows: Rows) -> RowLoss:
    """The loss of single rows, found on a few of them."""
    training = model.training
    model.eval()
    with torch.no_grad():
        batch = to_model(model, rows.batch(0, min(8, len(rows))))
        found = RowLoss(loss, default_forward(model, batch), default_target(batch))
    model.train(training)
    return found
