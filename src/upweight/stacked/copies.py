"""S copies of a small model as one stack of tensors, trained at once.

Letters: S copies, b rows in a step of each, p parameters of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from upweight.functional import FunctionalModel, default_target
from upweight.losses import RowLoss
from upweight.stacked.problem import Recipe
from upweight.training import diverged, row_orders

__all__ = ["CopyGradients", "stack", "train_copies", "unstack"]

ATEN: Any = torch.ops.aten
IDLE = (ATEN.detach.default, ATEN.expand.default, ATEN.view.default, ATEN._unsafe_view.default)

State = dict[str, Tensor]  # every parameter and buffer by name, (S, *shape)


def stack(modules: Sequence[nn.Module]) -> State:
    """Parameters and buffers of modules of one architecture, (S, *shape) each."""
    named = [dict(chain(m.named_parameters(), m.named_buffers())) for m in modules]
    forms = [
        {name: (t.shape, t.dtype, t.requires_grad) for name, t in one.items()} for one in named
    ]
    for i, form in enumerate(forms):
        if form != forms[0]:
            raise ValueError(
                "expected models whose parameters have the same names, shapes and requires_grad "
                f"for every seed; those of copy {i} differ from those of copy 0"
            )
    return {
        name: torch.stack([one[name].detach() for one in named]).requires_grad_(t.requires_grad)
        for name, t in named[0].items()
    }


def unstack(state: State, modules: Sequence[nn.Module]) -> None:
    """Write the stacked tensors into the modules."""
    with torch.no_grad():
        for i, module in enumerate(modules):
            for name, tensor in chain(module.named_parameters(), module.named_buffers()):
                tensor.copy_(state[name][i])


class CopyGradients:
    """The loss of each of S copies, on a batch of its own, and the gradients by one backward pass.

    ``(state, batch (S, b, …)) → losses (S,), gradients (S, *shape)`` in the order of the tensors
    that require one; None for a parameter that the loss does not depend on. A copy whose batch is
    shorter than b is filled up with rows of weight 0 in ``weights`` (S, b).

    Calls of one shape soon repeat what the first ones did operation by operation: `make_fx` writes
    the operations down after ``eager_calls`` calls, which spares the layers of `torch.func`.
    """

    def __init__(
        self,
        model: FunctionalModel,
        loss: Callable[[Any, Any], Tensor],
        row_loss: RowLoss,
        *,
        eager_calls: int = 64,
    ) -> None:
        self.model = model
        self._loss = loss
        self._row_loss = row_loss
        self._eager_calls = eager_calls
        self._calls: defaultdict[Any, int] = defaultdict(int)
        self._traced: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self, state: State, batch: Any, weights: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Losses (S,) and gradients, detached."""
        names = [name for name, tensor in state.items() if tensor.requires_grad]
        leaves = [state[name] for name in names]
        fixed = {name: tensor for name, tensor in state.items() if not tensor.requires_grad}

        def evaluate(leaves: list[Tensor], fixed: State, batch: Any, weights: Any) -> Any:
            theta = fixed | dict(zip(names, leaves, strict=True))
            in_dims = (0, 0, None if weights is None else 0)
            losses = vmap(self._one, in_dims, randomness="error")(theta, batch, weights)
            slopes = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
            return losses.detach(), list(slopes)

        key = (weights is None, *((t.shape, t.dtype) for t in tree_leaves((leaves, batch))))
        if key in self._traced:
            with torch.no_grad():
                return self._traced[key](leaves, fixed, batch, weights)
        self._calls[key] += 1
        if self._calls[key] > self._eager_calls:
            # buffers as copies: tracing runs the model, which may count its calls in one
            copies = {name: tensor.clone() for name, tensor in fixed.items()}
            traced = make_fx(evaluate)(leaves, copies, batch, weights)
            self._traced[key] = _without_idle_views(traced)
            return self(state, batch, weights)
        return evaluate(leaves, fixed, batch, weights)

    def _one(self, theta: State, batch: Any, weights: Tensor | None) -> Tensor:
        """The loss of one copy: what `train` takes the gradient of."""
        target = default_target(batch)
        with _ColumnsFirst():
            output = self.model(theta, batch)
            if weights is None:
                return self._loss(output, target).mean()
            return (self._row_loss(output, target) * weights).sum()

    def weights(self, counts: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """(S, b): what each row counts in the loss of its copy, the first ``counts`` being real."""
        real = torch.arange(width, device=counts.device) < counts[:, None]
        if self._row_loss.reduction == "sum":
            return real.to(dtype)
        return real / counts[:, None].to(dtype)


def _without_idle_views(traced: GraphModule) -> GraphModule:
    """The same without views of a tensor in the shape that it has, which are a third of all."""
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target in IDLE:
            (source, *_), value = node.args, node.meta.get("val")
            if value is not None and value.shape == source.meta["val"].shape:
                node.replace_all_uses_with(source)
                traced.graph.erase_node(node)
    traced.recompile()
    return traced


class _ColumnsFirst(TorchFunctionMode):
    """Linear layers and cross-entropy on transposed outputs: y = (W xᵀ + b)ᵀ.

    The same numbers. The products of a stack of small matrices and of their derivatives are then
    all between matrices as they lie in memory, and a softmax over ten numbers runs along rows
    instead of inside them: together a third less time on a CPU (torch 2.13).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func is F.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.ndim != 2:
        return F.linear(input, weight, bias)
    columns = weight @ input.mT  # (o, i) x (i, b) -> (o, b)
    return (columns if bias is None else columns + bias[:, None]).mT


def _cross_entropy(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    smoothed = kwargs.pop("label_smoothing", 0.0)
    if input.ndim != 2 or target.is_floating_point() or smoothed or len(args) > 5:
        return F.cross_entropy(input, target, *args, label_smoothing=smoothed, **kwargs)
    logarithms = torch.log_softmax(input.mT, 0).mT
    return F.nll_loss(logarithms, target, *args, **kwargs)


def stacked_optimizer(
    factory: Callable[[Any], Optimizer], template: nn.Module, state: State
) -> Optimizer:
    """The optimiser that a factory makes for one model, with stacked tensors in place of its own.

    What the factory decides by name, order or number of dimensions of a parameter stays as it is
    for one model.
    """
    made = factory(template.parameters())
    stacked: dict[Tensor, Tensor] = {p: state[name] for name, p in template.named_parameters()}
    for group in made.param_groups:
        group["params"] = [stacked[p] for p in group["params"]]
        # one pass over memory where the optimiser has such a loop and leaves the choice to torch,
        # which takes it for no CPU tensor (torch 2.13)
        where = {p.device.type for p in group["params"]}
        if where <= {"cpu", "cuda"} and group.get("fused", True) is group.get("foreach") is None:
            group["fused"] = True
    states: dict[Tensor, dict[str, Any]] = {}
    for p, values in made.state.items():
        s = stacked[p].shape[0]
        states[stacked[p]] = {
            key: value.expand(s, *p.shape).clone()
            if isinstance(value, Tensor) and value.shape == p.shape
            else value
            for key, value in values.items()
        }
    made.state = defaultdict(dict, states)
    return made


def train_copies(
    gradients: CopyGradients,
    state: State,
    recipe: Recipe,
    data: Any,
    *,
    chosen: Sequence[Tensor],
    seeds: Sequence[int],
) -> list[FloatingPointError | None]:
    """Train copy s on the rows ``chosen[s]`` in the order of ``seeds[s]``; changes ``state``.

    All copies take the same number of steps an epoch, as parameters, momenta and step counters go
    forward together. Returns for each copy the error that `train` would raise, or None.
    """
    sizes = torch.tensor([len(rows) for rows in chosen])
    b, width = recipe.batch_size, int(sizes.max())
    ragged = bool((sizes != width).any())
    device = gradients.model.device
    optimizer = stacked_optimizer(recipe.optimizer, gradients.model.model, state)
    schedule = None if recipe.scheduler is None else recipe.scheduler(optimizer)
    leaves = [tensor for tensor in state.values() if tensor.requires_grad]
    orders = [row_orders(len(rows), seed) for rows, seed in zip(chosen, seeds, strict=True)]
    errors: list[FloatingPointError | None] = [None] * len(chosen)
    # rows and their order, (S, width); copies with fewer rows are filled up with their first
    table = pad_sequence(list(chosen), batch_first=True)
    order = torch.zeros_like(table)
    for epoch in range(1, recipe.epochs + 1):
        for s, rows in enumerate(chosen):
            order[s, : len(rows)] = next(orders[s])
        index = table.gather(1, order).to(device)
        record: list[Tensor] = []
        for start in range(0, width, b):
            step = index[:, start : start + b]
            batch = _gather(data, step)
            weights = None
            if ragged and start + b >= width:
                counts = (sizes - start).to(device)
                weights = gradients.weights(counts, step.shape[1], gradients.model.vector_dtype)
            losses, slopes = gradients(state, batch, weights)
            for leaf, slope in zip(leaves, slopes, strict=True):
                # fused loops walk through both as they lie in memory
                leaf.grad = slope if slope is None else slope.contiguous()
            optimizer.step()
            record.append(losses)
        if schedule is not None:
            schedule.step()
        _note_divergence(torch.stack(record).cpu(), epoch, errors)
        if all(errors):
            break
    return errors


def _gather(data: Any, index: Tensor) -> Any:
    """Rows (S, b) of every tensor of the data: (S, b, …)."""
    flat = index.flatten()
    return tree_map(lambda leaf: leaf.index_select(0, flat).unflatten(0, index.shape), data)


def _note_divergence(losses: Tensor, epoch: int, errors: list[FloatingPointError | None]) -> None:
    """Errors for the copies with a loss in (steps, S) that is not finite, where there was none."""
    bad = ~losses.isfinite()
    for s in bad.any(0).nonzero().flatten().tolist():
        if errors[s] is None:
            first = int(bad[:, s].nonzero()[0])
            errors[s] = diverged(losses[first, s].item(), epoch)
