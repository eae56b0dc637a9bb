"""The user's network as a judge of rows that it has not learnt.

Letters: n rows, d features, C classes, K folds, s networks per fold.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from upweight.auditing.networks import (
    CHUNK,
    DECAYS,
    EPOCHS,
    LEARNING_RATE,
    SEARCHED,
    STEPS,
    Problem,
    fold_of_rows,
    left_out_loss,
)
from upweight.stacked import Retraining
from upweight.tables import Task
from upweight.training import to_model

__all__ = ["OPTIONS", "ModuleFit", "ModuleJudge"]

OPTIONS = ("epochs", "optimizer", "scheduler", "batch_size", "memory")


@dataclass(frozen=True, eq=False)
class ModuleFit:
    """Copies of a network trained without a fold each, and what they say of it.

    Attributes
    ----------
    fold
        (n,) of each row.
    mean
        (n, C) probabilities or (n,) numbers, of the copies without the fold of the row.
    modules
        K times s.
    """

    fold: NDArray[np.int16]
    mean: NDArray[np.float64]
    modules: list[list[nn.Module]]

    @property
    def folds(self) -> int:
        """K."""
        return len(self.modules)

    def network(self, problem: Problem, fold: int, number: int = 0) -> nn.Module:
        """One of those without a fold."""
        return self.modules[fold][number]


@dataclass(frozen=True, eq=False)
class ModuleJudge:
    """Cross-fitted copies of a network, for any targets of the rows.

    Layers begin anew in every copy, by their ``reset_parameters()``, but for those whose parameters
    are frozen; what has no such method begins as it is in the network that was given.

    Attributes
    ----------
    module
        From (b, d) to logits (b, C), in the order of the sorted classes; to (b, 1) or (b,) numbers
        in regression.
    x
        (n, d) float32.
    task
        Classification or regression.
    order
        (C,) the output that stands for a class; None in regression.
    folds
        K.
    training
        Options of `Retraining`; by default AdamW with learning rate 0.01, a cosine schedule, and
        as many epochs as make 800 steps, from 4 to 40.
    """

    module: nn.Module
    x: Tensor
    task: Task
    order: NDArray[np.intp] | None
    folds: int
    training: Mapping[str, Any]

    def __call__(self, rows: NDArray[np.intp], y: NDArray[Any], seed: int) -> NDArray[np.float64]:
        """Predictions (r, C) or (r,) for some rows with these targets."""
        return self.by_class(self.fit(rows, y, seed, 1).mean)

    def by_class(self, prediction: NDArray[np.float64]) -> NDArray[np.float64]:
        """Columns by output → by class."""
        return prediction if self.order is None else prediction[:, self.order]

    def problem(self, rows: NDArray[np.intp], y: NDArray[Any]) -> Problem:
        """Some rows with targets as the network has them.

        Raises
        ------
        ValueError
            If the outputs of the network do not fit.
        """
        x = self.x[torch.from_numpy(rows)]
        if self.order is not None:
            y = self.order[y]
        found = Problem.of(x.numpy(), y, self.task)
        if self.order is not None:  # a sample of the rows may miss a class
            found = replace(found, outputs=len(self.order))
        with torch.no_grad():
            model = copy.deepcopy(self.module).eval()
            output = model(to_model(model, found.x[:2]))
        self._check(output, found.outputs)
        if output.ndim == 2:
            return found
        return replace(found, y=found.y[:, 0])

    def decided(self, y: NDArray[Any], seed: int, networks: int) -> tuple[ModuleJudge, ModuleFit]:
        """With the weight decay that explains left-out rows best, if no optimiser is given.

        Decays are those of `cross_fit`, and so are the rows on which they are compared.

        Returns
        -------
        judge : ModuleJudge
            With that optimiser.
        fit : ModuleFit
            Its copies for all rows.
        """
        n = len(self.x)
        everyone = np.arange(n)
        if "optimizer" in self.training:
            return self, self.fit(everyone, y, seed, networks)
        few = n <= SEARCHED
        rows = everyone
        if not few:
            rows = np.sort(np.random.default_rng(seed).choice(n, SEARCHED, replace=False))
        sample = self.problem(rows, y[rows])
        best: tuple[float, ModuleJudge, ModuleFit] | None = None
        for decay in DECAYS:
            optimizer = partial(AdamW, lr=LEARNING_RATE, weight_decay=decay)
            judge = replace(self, training={**self.training, "optimizer": optimizer})
            fit = judge.fit(rows, y[rows], seed, networks if few else 1)
            loss = left_out_loss(sample, fit.mean)
            if best is None or loss < best[0]:
                best = loss, judge, fit
        assert best is not None
        _, judge, fit = best
        return judge, fit if few else judge.fit(everyone, y, seed, networks)

    def _check(self, output: Any, classes: int) -> None:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if self.task == "classification" and shape != (2, classes):
            raise ValueError(
                f"expected outputs (2, {classes}) of the network for two rows: a logit for each "
                f"class, in the order of the sorted classes; got {shape}"
            )
        if self.task == "regression" and shape not in ((2, 1), (2,)):
            raise ValueError(
                f"expected outputs (2, 1) or (2,) of the network for two rows; got {shape}"
            )

    def fit(self, rows: NDArray[np.intp], y: NDArray[Any], seed: int, networks: int) -> ModuleFit:
        """Train copies without one fold each.

        Raises
        ------
        FloatingPointError
            If a training diverges.
        """
        problem = self.problem(rows, y)
        n = len(problem.x)
        fold = fold_of_rows(y, self.task, self.folds, seed)
        copies = [k for k in range(self.folds) for _ in range(networks)]
        retraining = Retraining(
            lambda _: _anew(self.module),
            problem.loss,
            (problem.x, problem.y),
            (problem.x[:2], problem.y[:2]),
            output="loss",
            **_options(n, self.training),
        )
        trained = retraining.models(
            np.stack([fold != k for k in copies]), [seed + number for number in range(len(copies))]
        )
        shape = (n, problem.outputs) if self.order is not None else (n,)
        prediction = np.zeros(shape)
        for k, model in zip(copies, trained, strict=True):
            prediction[fold == k] += _said(model, problem, np.flatnonzero(fold == k)) / networks
        if not np.isfinite(prediction).all():
            raise FloatingPointError(
                "a copy of the network diverged; give it a lower learning rate, such as "
                "training={'optimizer': lambda p: torch.optim.AdamW(p, lr=0.001)}"
            )
        grouped = [trained[k * networks : (k + 1) * networks] for k in range(self.folds)]
        return ModuleFit(fold, prediction, grouped)


def _options(n: int, given: Mapping[str, Any]) -> dict[str, Any]:
    batch = int(given.get("batch_size", min(max(16, n // 20), 256 if n <= 100_000 else 2048)))
    enough = min(max(math.ceil(STEPS * batch / n), EPOCHS[0]), EPOCHS[1])
    epochs = int(given.get("epochs", enough))
    return {
        "optimizer": partial(AdamW, lr=LEARNING_RATE, weight_decay=DECAYS[0]),
        "scheduler": partial(CosineAnnealingLR, T_max=epochs),
        **given,
        "batch_size": batch,
        "epochs": epochs,
    }


def _anew(module: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(module)
    for layer in fresh.modules():
        own = list(layer.parameters())
        # attention layers have theirs with an underscore (torch 2.13)
        private: Any = getattr(layer, "_reset_parameters", None)
        reset: Any = getattr(layer, "reset_parameters", private)
        if callable(reset) and (not own or any(p.requires_grad for p in own)):
            reset()
    return fresh


def _said(model: nn.Module, problem: Problem, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    parts: list[NDArray[np.float64]] = []
    with torch.no_grad():
        for start in range(0, len(rows), CHUNK):
            x = problem.x[torch.from_numpy(rows[start : start + CHUNK])]
            output = model(to_model(model, x)).cpu()
            output = output if output.ndim == 2 else output[:, None]
            parts.append(problem.readable(output).double().numpy())
    return np.concatenate(parts)
