"""Small networks that judge the rows that they have not seen.

Letters: n rows, d features, C classes, K folds, s networks per fold, p parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from upweight.auditing.stackednets import Training, forward, train_stack
from upweight.tables import Task
from upweight.training import MLP

__all__ = ["CrossFit", "Problem", "cross_fit", "fold_of_rows", "left_out_loss"]

DECAYS = (0.1, 1.0, 3.0)  # from a network that bends to one that is nearly linear
LEARNING_RATE = 0.01
HIDDEN = 64
STEPS = 800  # of the optimiser at least, if 40 epochs are enough for that
EPOCHS = (4, 40)
SEARCHED = 5_000  # rows on which the weight decay is chosen
CHUNK = 2**15


@dataclass(frozen=True, eq=False)
class Problem:
    """Rows as tensors, and what to predict.

    Attributes
    ----------
    x
        (n, d) float32.
    y
        (n,) positions of the classes, or standardised numbers (n, 1).
    task
        Classification or regression.
    outputs
        C, or 1.
    centre, scale
        Of the numbers before they were standardised.
    """

    x: Tensor
    y: Tensor
    task: Task
    outputs: int
    centre: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, x: NDArray[np.float32], y: NDArray[Any], task: Task) -> Problem:
        """From arrays."""
        features = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
        if task == "classification":
            codes = torch.from_numpy(y.astype(np.int64))
            return cls(features, codes, task, int(codes.max()) + 1)
        low, centre, high = np.quantile(y, [0.25, 0.5, 0.75])
        scale = float(high - low) / 1.349 or float(np.std(y)) or 1.0
        numbers = torch.from_numpy(((y - centre) / scale).astype(np.float32))[:, None]
        return cls(features, numbers, task, 1, float(centre), scale)

    @property
    def loss(self) -> Callable[[Any, Any], Tensor]:
        """Cross-entropy; for numbers Huber's loss, which a wrong one does not dominate."""
        return F.cross_entropy if self.task == "classification" else F.smooth_l1_loss

    def model(self, seed: int) -> nn.Module:
        """A network with initial weights of this seed."""
        return MLP([self.x.shape[1], HIDDEN, self.outputs], seed=seed)

    def readable(self, output: Tensor) -> Tensor:
        """Probabilities (…, C), or numbers (…)."""
        if self.task == "classification":
            return torch.softmax(output, dim=-1)
        return output[..., 0] * self.scale + self.centre

    def take(self, rows: NDArray[np.intp]) -> Problem:
        """Some rows; of the same classes."""
        at = torch.from_numpy(rows)
        return Problem(self.x[at], self.y[at], self.task, self.outputs, self.centre, self.scale)


@dataclass(frozen=True, eq=False)
class CrossFit:
    """Networks trained without a fold each, and what they say of it.

    Attributes
    ----------
    fold
        (n,) of each row.
    prediction
        (s, n, C) probabilities or (s, n) numbers, of the networks without the fold of the row.
    weights
        (K, s, p) of the networks.
    decay
        The weight decay that explained left-out rows best.
    """

    fold: NDArray[np.int16]
    prediction: NDArray[np.float32]
    weights: NDArray[np.float32]
    decay: float

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> CrossFit:
        """From arrays by name, as a step keeps them."""
        decay = float(arrays["decay"])
        return cls(arrays["fold"], arrays["prediction"], arrays["weights"], decay)

    @property
    def folds(self) -> int:
        """K."""
        return len(self.weights)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Over the networks of a fold."""
        return self.prediction.mean(axis=0, dtype=np.float64)

    def network(self, problem: Problem, fold: int, number: int = 0) -> nn.Module:
        """One of the networks."""
        model = problem.model(0)
        vector_to_parameters(
            torch.from_numpy(self.weights[fold, number].copy()), model.parameters()
        )
        return model.eval()


def cross_fit(
    problem: Problem,
    *,
    folds: int = 5,
    networks: int = 2,
    seed: int = 0,
    decay: float | None = None,
    tell: Callable[[float], None] = lambda share: None,
) -> CrossFit:
    """Train networks without one fold each.

    One hidden layer of 64 rectified units, AdamW with a cosine schedule. Its weight decay, 0.1, 1
    or 3, is the one with the lowest loss on left-out rows (of at most 5,000): noisy labels and few
    rows want a network that is nearly linear.

    Parameters
    ----------
    problem
        Rows and targets.
    folds, networks, seed
        K, s; of everything random.
    decay
        Weight decay to use instead of the best one.
    tell
        Called with the share that is done.

    Raises
    ------
    FloatingPointError
        If no network has finite predictions.
    """
    n = len(problem.x)
    few = n <= SEARCHED
    if decay is None:
        rows = np.arange(n)
        if not few:
            rows = np.sort(np.random.default_rng(seed).choice(n, SEARCHED, replace=False))
        sample = problem.take(rows)
        part = 1.0 if few else 0.1
        found = _fit(
            sample,
            DECAYS,
            lambda share: tell(part * share),
            folds=folds,
            networks=networks if few else 1,
            seed=seed,
        )
        best = min(found, key=lambda fit: left_out_loss(sample, fit.mean))
        if few:
            return _finite(best)
        decay = best.decay
    fits = _fit(problem, (decay,), tell, folds=folds, networks=networks, seed=seed)
    return _finite(fits[0])


def _finite(fit: CrossFit) -> CrossFit:
    if not np.isfinite(fit.prediction).all():
        raise FloatingPointError(
            "the predictions of the networks are not finite: the table has numbers that they "
            "cannot be trained on"
        )
    return fit


def fold_of_rows(y: NDArray[Any], task: Task, folds: int, seed: int) -> NDArray[np.int16]:
    """Folds with equal shares of every class, however rare, up to one row; (n,)."""
    order = np.random.default_rng(seed).permutation(len(y))
    if task == "classification":
        order = order[np.argsort(y[order], kind="stable")]  # rows of a class follow each other
    fold = np.empty(len(y), dtype=np.int16)
    fold[order] = np.arange(len(y)) % folds
    return fold


def _fit(
    problem: Problem,
    decays: Sequence[float],
    tell: Callable[[float], None],
    *,
    folds: int,
    networks: int,
    seed: int,
) -> list[CrossFit]:
    """Cross-fits by decay, all of their networks trained at once."""
    n = len(problem.x)
    fold = fold_of_rows(problem.y.numpy(), problem.task, folds, seed)
    batch = min(max(16, n // 20), 256 if n <= 100_000 else 2048)
    epochs = min(max(math.ceil(STEPS * batch / n), EPOCHS[0]), EPOCHS[1])
    kept = torch.from_numpy(np.stack([fold != k for k in range(folds) for _ in range(networks)]))
    parameters = train_stack(
        problem.x,
        problem.y,
        Training(problem.outputs, HIDDEN, epochs, batch, LEARNING_RATE, seed),
        weights=kept.repeat(len(decays), 1),
        decays=torch.tensor(decays).repeat_interleave(len(kept)),
        tell=tell,
    )
    found: list[CrossFit] = []
    for number, decay in enumerate(decays):
        mine = [p[number * len(kept) : (number + 1) * len(kept)] for p in parameters]
        # (S, inputs, outputs) → the order of parameters of torch.nn.Linear, flat
        flat = [p.transpose(1, 2).flatten(1) for p in mine]
        weights = torch.cat(flat, dim=1).view(folds, networks, -1)
        prediction = _left_out(problem, mine, fold, networks)
        found.append(CrossFit(fold, prediction, weights.numpy(), decay))
    return found


def _left_out(
    problem: Problem, parameters: list[Tensor], fold: NDArray[np.int16], networks: int
) -> NDArray[np.float32]:
    n = len(fold)
    shape = (networks, n, problem.outputs) if problem.task == "classification" else (networks, n)
    prediction = np.zeros(shape, dtype=np.float32)
    for k in range(len(parameters[0]) // networks):
        mine = [p[k * networks : (k + 1) * networks] for p in parameters]
        rows = np.flatnonzero(fold == k)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            output = forward(mine, problem.x[torch.from_numpy(part)])
            prediction[:, part] = problem.readable(output).numpy()
    return prediction


def left_out_loss(problem: Problem, said: NDArray[np.float64]) -> float:
    """Mean loss of predictions (n, C) or (n,) for left-out rows; not finite counts as the worst."""
    targets = problem.y.numpy()
    if problem.task == "classification":
        given = said[np.arange(len(targets)), targets]
        value = float(-np.log(np.clip(given, 1e-6, 1)).mean())
    else:
        off = np.abs((said - problem.centre) / problem.scale - targets.reshape(-1))
        value = float(np.where(off < 1, 0.5 * off**2, off - 0.5).mean())
    return value if math.isfinite(value) else math.inf
