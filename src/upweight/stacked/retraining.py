"""Retraining on hundreds of subsets of the rows: what influence scores are to predict."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map

from upweight.functional import FunctionalModel, default_forward, default_target
from upweight.margins import margin
from upweight.rows import Rows
from upweight.stacked.copies import CopyGradients, State, stack, train_copies, unstack
from upweight.stacked.digest import digest
from upweight.stacked.probe import bytes_of_copy, why_not_stacked
from upweight.stacked.problem import Problem, Recipe, check_step, maker
from upweight.stacked.subsets import positions, subsets
from upweight.training import find_row_loss, to_model

__all__ = ["Output", "Retraining"]

Output = Literal["margin", "loss"] | Callable[[Any, Any], Tensor]


class Retraining:
    """Train a small model again and again: on subsets of the rows, from other seeds.

    Copy s of the model starts from ``make_model(seed_s)`` and is trained on the rows of subset s,
    as by ``train(make_model(seed_s), loss, subset_s, seed=seed_s, …)`` with the options given here,
    to round-off: the same minibatches in the same order, the mean loss of each as the objective,
    the same optimiser and schedule. Up to the limit of ``memory``, copies with the same number of
    steps per epoch are trained as one: parameters are stacked, ``(S, *shape)``, a step is ::

        θ_s ← θ_s − update(∇ 1/|B_s| Σ_{i∈B_s} ℓ(f(x_i; θ_s), y_i)),    s = 1 … S,

    by one forward and one backward pass, and one step of the optimiser on the stacked tensors.

    Parameters
    ----------
    make_model
        From a seed to a module with its initial weights, of one architecture for all seeds. It is
        called with torch's random state set to the seed. Or a module: every copy starts from the
        weights that it has now. Neither it nor the global random state is changed.
    loss
        ``loss(output, target)``, as `train` takes it.
    train, test
        Rows as `Rows` takes them, in batches ``(x, y)``: n to train on, m to look at.
    epochs, optimizer, scheduler, batch_size
        As in `train`.
    output
        What is measured of a test row after training, in evaluation mode. ``"margin"``: the log
        odds of its label, log p_y / (1 − p_y), *higher* is better (see `margin`). ``"loss"``: its
        loss, *lower* is better. Or a function ``(output, target)`` of one number per row or their
        mean or sum, with the sign that it has.
    memory
        Bytes that the copies that are trained at once may take, roughly. Results do not depend on
        it beyond round-off.

    Attributes
    ----------
    n, m
        Training and test rows.
    output
        As given.

    Raises
    ------
    ValueError
        If settings do not make sense, or loss or output are not one number per row.
    TypeError
        If ``make_model`` makes no module, or the optimiser's step needs a closure (L-BFGS).

    Notes
    -----
    Whether copies can be stacked is found by training two small subsets both ways in float64 and
    comparing parameters: `stackable`, `reason`. What cannot be (active dropout, batch
    normalisation, control flow that depends on data, an optimiser that looks at a parameter as a
    whole) is trained one by one, with the same results.

    Copies with another number of steps per epoch are another stack, so subsets of one size, or of
    sizes that make equally many batches, are fastest.

    Examples
    --------
    >>> x = torch.linspace(-1, 1, 12)[:, None]
    >>> refit = Retraining(
    ...     nn.Linear(1, 1),
    ...     nn.functional.mse_loss,
    ...     (x, 2 * x),
    ...     (x[:2], 2 * x[:2]),
    ...     epochs=40,
    ...     optimizer=lambda p: torch.optim.SGD(p, lr=0.3),
    ...     output="loss",
    ... )
    >>> masks = np.ones((3, 12), dtype=bool)
    >>> masks[1, :6] = masks[2, 6:] = False
    >>> refit.many(masks, seeds=[0, 1, 2]).shape, refit.stackable
    ((3, 2), True)
    """

    def __init__(
        self,
        make_model: Callable[[int], nn.Module] | nn.Module,
        loss: Callable[[Any, Any], Tensor],
        train: Any,
        test: Any,
        *,
        epochs: int,
        optimizer: Callable[[Any], Optimizer] = Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        batch_size: int = 32,
        output: Output = "margin",
        memory: int = 2**28,
    ) -> None:
        if epochs < 1 or batch_size < 1 or memory < 1:
            raise ValueError(
                f"expected epochs, batch_size and memory ≥ 1; got {epochs}, {batch_size} and "
                f"{memory}"
            )
        make = maker(make_model)
        self._template = template = make(0).eval()
        check_step(optimizer(template.parameters()))
        rows, self._test = Rows(train), Rows(test)
        self.n, self.m = len(rows), len(self._test)
        self.output: Output = output
        recipe = Recipe(epochs, batch_size, optimizer, scheduler)
        row_loss = find_row_loss(template, loss, rows)
        self._problem = Problem(make, loss, row_loss, rows, recipe)
        self._reading = find_row_loss(template, _choose_output(output, loss), self._test)
        self._memory = memory

    def __call__(self, rows: Sequence[int] | np.ndarray | Tensor, seed: int) -> np.ndarray:
        """One training: the outputs of the test rows, (m,) float64.

        Parameters
        ----------
        rows
            Positions of the rows to train on, each at most once and in any order (they are sorted);
            or a mask (n,) bool.
        seed
            Of the initial weights and the order of rows.

        Raises
        ------
        ValueError, TypeError
            If there are no rows, or a position is out of range, repeated or no integer.
        FloatingPointError
            If the training diverged.
        """
        ((trained, values),) = self._outputs([positions(rows, self.n)], [int(seed)])
        for error in trained.errors:
            if error is not None:
                raise error
        return values[0]

    def many(self, masks: Any, seeds: Any) -> np.ndarray:
        """S trainings: the outputs of the test rows after each, (S, m) float64.

        Parameters
        ----------
        masks
            (S, n) bool: the rows that each copy is trained on, at least one.
        seeds
            S integers.

        Returns
        -------
        np.ndarray
            A copy whose training diverged has NaN, and there is a `RuntimeWarning`; the others do
            not notice.

        Raises
        ------
        ValueError, TypeError
            If masks or seeds are not as described.
        """
        chosen, seeds = subsets(masks, seeds, self.n)
        found = np.full((len(chosen), self.m), np.nan)
        errors: dict[int, FloatingPointError] = {}
        for trained, values in self._outputs(chosen, seeds):
            found[trained.copies] = values
            errors |= trained.failures()
        _warn_of(errors, len(chosen))
        return found

    def models(self, masks: Any, seeds: Any) -> list[nn.Module]:
        """The S trained modules, in evaluation mode; arguments and warnings as for `many`.

        A copy whose training diverged has NaN for all its parameters.
        """
        chosen, seeds = subsets(masks, seeds, self.n)
        found: dict[int, nn.Module] = {}
        errors: dict[int, FloatingPointError] = {}
        for trained in self._trainings(chosen, seeds):
            found |= zip(trained.copies, trained.finished(), strict=True)
            errors |= trained.failures()
        _warn_of(errors, len(chosen))
        return [found[i] for i in range(len(chosen))]

    @property
    def stackable(self) -> bool:
        """Whether copies are trained as a stack."""
        return self.reason is None

    @cached_property
    def reason(self) -> str | None:
        """Why copies are trained one by one; None if they are stacked."""
        return why_not_stacked(self._problem, self._test)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of data, settings, initial weights (of seed 0), loss and output.

        Functions are known by their names and what they give for a few rows, the optimiser by its
        settings, the schedule by its learning rates.
        """
        readings = (self._problem.rows, self._problem.row_loss), (self._test, self._reading)
        return digest(self._problem.make(0), self._problem.recipe, readings)

    # --- training

    @cached_property
    def _gradients(self) -> CopyGradients:
        problem = self._problem
        model = FunctionalModel(problem.make(0).train(), parameters="*")
        return CopyGradients(model, problem.loss, problem.row_loss)

    @cached_property
    def _predictor(self) -> FunctionalModel:
        return FunctionalModel(self._template, parameters="*")

    @cached_property
    def _data(self) -> Any:
        return to_model(self._template, self._problem.rows.batch(0, self.n))

    def _trainings(self, chosen: list[Tensor], seeds: list[int]) -> Iterator[_Trained]:
        if not self.stackable:
            for i, (rows, seed) in enumerate(zip(chosen, seeds, strict=True)):
                yield self._train_alone(i, rows, seed)
            return
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for i, rows in enumerate(chosen):
            groups[self._problem.recipe.steps(len(rows))].append(i)
        for group in groups.values():
            for start in range(0, len(group), self._most_at_once):
                part = group[start : start + self._most_at_once]
                yield self._train_stack(part, [chosen[i] for i in part], [seeds[i] for i in part])

    def _train_alone(self, i: int, rows: Tensor, seed: int) -> _Trained:
        problem = self._problem
        module, error = problem.make(seed), None
        try:
            problem.train_one(module, problem.rows.subset(rows.tolist()), seed)
        except FloatingPointError as raised:
            error = raised
        return _Trained([i], [module], [error], None)

    def _train_stack(self, part: list[int], chosen: list[Tensor], seeds: list[int]) -> _Trained:
        modules = [self._problem.make(seed) for seed in seeds]
        state = stack(modules)
        with torch.random.fork_rng(), torch.enable_grad():
            errors = train_copies(
                self._gradients, state, self._problem.recipe, self._data, chosen=chosen, seeds=seeds
            )
        return _Trained(part, modules, errors, state)

    @cached_property
    def _most_at_once(self) -> int:
        return max(1, self._memory // bytes_of_copy(self._problem))

    def _outputs(
        self, chosen: list[Tensor], seeds: list[int]
    ) -> Iterator[tuple[_Trained, np.ndarray]]:
        for trained in self._trainings(chosen, seeds):
            values = np.full((len(trained.copies), self.m), np.nan)
            # a loss may refuse the NaN that a diverged copy predicts
            fine = [s for s, error in enumerate(trained.errors) if error is None]
            if fine:
                values[fine] = self._measure(trained, fine).double().cpu().numpy()
            yield trained, values

    def _measure(self, trained: _Trained, fine: list[int]) -> Tensor:
        b = max(64, 2 * self._problem.recipe.batch_size)
        parts: list[Tensor] = []
        with torch.no_grad():
            for start in range(0, self.m, b):
                batch = self._test.batch(start, min(start + b, self.m))
                batch = to_model(self._template, batch)
                outputs = self._predict(trained, batch)[fine].flatten(0, 1)  # (S·b, …)
                target = _repeat(default_target(batch), len(fine))
                parts.append(self._reading(outputs, target).unflatten(0, (len(fine), -1)))
        return torch.cat(parts, dim=1)

    def _predict(self, trained: _Trained, batch: Any) -> Tensor:
        """Outputs (S, b, …)."""
        if trained.state is not None:
            return vmap(self._predictor, in_dims=(0, None))(trained.state, batch)
        return torch.stack([default_forward(module.eval(), batch) for module in trained.modules])


@dataclass(frozen=True)
class _Trained:
    """Copies (positions among all) after training: modules, or a stack that goes into them."""

    copies: list[int]
    modules: list[nn.Module]
    errors: list[FloatingPointError | None]
    state: State | None

    def finished(self) -> list[nn.Module]:
        """The modules with what was learnt."""
        if self.state is not None:
            unstack(self.state, self.modules)
        for module, error in zip(self.modules, self.errors, strict=True):
            module.eval()
            if error is not None:
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.fill_(torch.nan)
        return self.modules

    def failures(self) -> dict[int, FloatingPointError]:
        """Errors by copy."""
        pairs = zip(self.copies, self.errors, strict=True)
        return {i: error for i, error in pairs if error is not None}


def _choose_output(
    output: Output, loss: Callable[[Any, Any], Tensor]
) -> Callable[[Any, Any], Tensor]:
    if callable(output):
        return output
    if output == "loss":
        return loss
    if output == "margin":
        return margin
    raise ValueError(
        f"expected output 'margin', 'loss' or a function (output, target); got {output!r}"
    )


def _repeat(target: Any, s: int) -> Any:
    """The targets of b rows for each of S copies, (S·b, …)."""

    def repeat(leaf: Any) -> Any:
        return leaf.repeat(s, *[1] * (leaf.ndim - 1)) if isinstance(leaf, Tensor) else leaf

    return tree_map(repeat, target)


def _warn_of(errors: Mapping[int, FloatingPointError], of: int) -> None:
    if errors:
        first = min(errors)
        warnings.warn(
            f"{len(errors)} of {of} trainings diverged, at positions {sorted(errors)[:20]}; what "
            f"they give is NaN. Copy {first}: {errors[first]}",
            RuntimeWarning,
            stacklevel=3,
        )
