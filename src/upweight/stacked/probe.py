"""Whether copies of a model can be trained as a stack, and how many of them fit in memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves

from upweight.functional import FunctionalModel, default_forward, default_target
from upweight.rows import Rows
from upweight.stacked.copies import CopyGradients, State, stack, train_copies
from upweight.stacked.problem import Problem, Recipe
from upweight.training import to_model

__all__ = ["bytes_of_copy", "why_not_stacked"]

PROBED_ROWS = 8


def why_not_stacked(problem: Problem, test: Rows) -> str | None:
    """The reason why copies cannot be trained as a stack with the results of `train`, if any."""
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            return _compare(problem, test)
    except Exception as error:  # whatever a model may do under vmap, `train` can do it
        told = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {told[0]}"


def _compare(problem: Problem, test: Rows) -> str | None:
    """Train two copies both ways, on few rows and with last batches of different sizes.

    In float64, where round-off cannot be mistaken for something else.
    """
    recipe = replace(problem.recipe, epochs=min(3, problem.recipe.epochs))
    problem = replace(problem, recipe=recipe)
    n = len(problem.rows)
    large, small = _probed_sizes(n, recipe)
    rows = problem.rows.subset([*range(large), *range(n - small, n)])
    chosen = [torch.arange(large), torch.arange(large, large + small)]
    alone, together, start = ([problem.make(s).double() for s in (0, 1)] for _ in range(3))
    data = to_model(alone[0], rows.batch(0, len(rows)))
    if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(data)):
        return "the batches hold something that is no tensor"
    for seed, module in enumerate(alone):
        problem.train_one(module, rows.subset(chosen[seed].tolist()), seed)
    model = FunctionalModel(problem.make(0).double().train(), parameters="*")
    gradients = CopyGradients(model, problem.loss, problem.row_loss, eager_calls=1)
    state = stack(together)
    train_copies(gradients, state, recipe, data, chosen=chosen, seeds=[0, 1])
    # max |θ_stacked − θ| / max |θ − θ_start|
    wanted = stack(alone)
    error = _distance(state, wanted) / max(_distance(wanted, stack(start)), 1e-12)
    if not error < 1e-6:
        return (
            "two copies trained as a stack and one by one end in different places (relative "
            f"difference {error:.1g}). The rows of a batch may see each other, as in batch "
            "normalisation, or the optimiser sees a parameter as a whole"
        )
    return _compare_predictions(problem, state, alone, test)


def _probed_sizes(n: int, recipe: Recipe) -> tuple[int, int]:
    """Two sizes with equally many batches, different if there are such: two batches if possible."""
    large = min(n, 2 * recipe.batch_size)
    if large > 1 and recipe.steps(large - 1) < recipe.steps(large):
        large -= 1
    return large, large - (large > 1 and recipe.steps(large - 1) == recipe.steps(large))


def _distance(a: State, b: State) -> float:
    """The largest entry of the difference; NaN if there is one."""
    return float(torch.stack([(a[k] - b[k]).detach().abs().max().double() for k in a]).max())


def _compare_predictions(
    problem: Problem, state: State, alone: list[nn.Module], test: Rows
) -> str | None:
    batch = to_model(alone[0], test.batch(0, min(PROBED_ROWS, len(test))))
    model = FunctionalModel(problem.make(0).double().eval(), parameters="*")
    with torch.no_grad():
        wanted = torch.stack([default_forward(module.eval(), batch) for module in alone])
        found = vmap(model, in_dims=(0, None))(state, batch)
    if not torch.allclose(found, wanted, rtol=1e-5, atol=1e-8):
        return "the predictions of a stack differ from those of its copies"
    return None


def bytes_of_copy(problem: Problem) -> int:
    """Roughly what a step of one copy takes."""
    template = problem.make(0).train()
    b = min(len(problem.rows), problem.recipe.batch_size)
    batch = to_model(template, problem.rows.batch(0, b))
    kept = sum(map(_bytes, tree_leaves(batch)))

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += _bytes(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        problem.loss(default_forward(template, batch), default_target(batch))
    # a parameter, its gradient, two moments, and what the optimiser computes on the way;
    # what is kept for the backward pass, and its derivatives
    return 6 * sum(map(_bytes, template.parameters())) + 2 * kept


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
