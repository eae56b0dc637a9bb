"""Networks with one hidden layer, many at once: the same rows, each with its own left-out fold.

Letters: S networks, b rows in a minibatch, d inputs, h hidden units, o outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Training", "forward", "train_stack"]

BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True, eq=False)
class Training:
    """How networks are trained: AdamW with a cosine schedule, minibatches in the same order.

    Attributes
    ----------
    outputs, hidden
        Units of the last layer, and of the one before.
    epochs, batch_size, learning_rate, seed
        As everywhere.
    """

    outputs: int
    hidden: int
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int


def train_stack(
    x: Tensor,
    y: Tensor,
    training: Training,
    *,
    weights: Tensor,
    decays: Tensor,
    tell: Callable[[float], None] = lambda share: None,
) -> list[Tensor]:
    """Train S networks, network s on the rows of weight 1.

    A step is that of AdamW (Loshchilov, Hutter 2019) on
    Σ_s Σ_{i∈B} w_si ℓ(f_s(x_i), y_i) / Σ_{i∈B} w_si, with a weight decay for each network.

    Parameters
    ----------
    x, y
        (n, d); (n,) class positions, or (n, 1) numbers.
    training
        See there.
    weights
        (S, n) bool: the rows of each network.
    decays
        (S,).
    tell
        Called with the share that is done.

    Returns
    -------
    list of Tensor
        Weights (S, d, h), biases (S, 1, h), weights (S, h, o), biases (S, 1, o).
    """
    n, d = x.shape
    copies = len(weights)
    generator = torch.Generator().manual_seed(training.seed)
    parameters = _initial(copies, (d, training.hidden, training.outputs), generator)
    states = [_AdamW(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    rows = weights.T.float().contiguous()  # (n, S)
    per_epoch = math.ceil(n / training.batch_size)
    steps = training.epochs * per_epoch
    step = 0
    with torch.enable_grad():
        for _ in range(training.epochs):
            order = torch.randperm(n, generator=generator)
            for at in order.split(training.batch_size):
                loss = _losses(parameters, x[at], y[at])  # (S, b)
                mask = rows[at].T
                total = (loss * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
                gradients = torch.autograd.grad(total.sum(), parameters)
                rate = 0.5 * training.learning_rate * (1 + math.cos(math.pi * step / steps))
                step += 1
                with torch.no_grad():
                    for state, gradient in zip(states, gradients, strict=True):
                        state.step(gradient, step, rate, decays)
            tell(step / steps)
    return [parameter.detach() for parameter in parameters]


def forward(parameters: list[Tensor], x: Tensor) -> Tensor:
    """Outputs (S, b, o) of all networks for the same rows."""
    w1, b1, w2, b2 = parameters
    shared = x.expand(len(w1), *x.shape)
    return torch.baddbmm(b2, torch.relu(torch.baddbmm(b1, shared, w1)), w2)


def _losses(parameters: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    output = forward(parameters, x)
    copies, rows, width = output.shape
    if y.ndim == 1:
        flat = F.cross_entropy(
            output.reshape(-1, width), y.expand(copies, rows).reshape(-1), reduction="none"
        )
        return flat.view(copies, rows)
    return F.smooth_l1_loss(output, y.expand(copies, *y.shape), reduction="none")[..., 0]


def _initial(copies: int, sizes: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    """Uniform in ±1/√inputs, as torch.nn.Linear has it."""
    found: list[Tensor] = []
    for inputs, outputs in pairwise(sizes):
        bound = 1 / math.sqrt(inputs)
        for shape in ((copies, inputs, outputs), (copies, 1, outputs)):
            values = (2 * torch.rand(shape, generator=generator) - 1) * bound
            found.append(values.requires_grad_())
    return found


@dataclass(frozen=True, eq=False)
class _AdamW:
    """A parameter and the running means of its gradient and of the square of that."""

    parameter: Tensor
    first: Tensor
    second: Tensor

    def step(self, gradient: Tensor, number: int, rate: float, decays: Tensor) -> None:
        self.parameter.mul_(1 - rate * decays.view(-1, 1, 1))
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        size = self.second.sqrt().div_(math.sqrt(1 - BETAS[1] ** number)).add_(EPSILON)
        self.parameter.addcdiv_(self.first, size, value=-rate / (1 - BETAS[0] ** number))
