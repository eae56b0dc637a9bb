"""What the wine walk-through does: its settings, its network and how that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from upweight.training import MLP

__all__ = ["WineSettings", "make_model", "training_options"]


@dataclass(frozen=True)
class WineSettings:
    """What the walk-through does; written to ``config.yaml`` of its run.

    Attributes
    ----------
    seed
        Of the split, the flipped rows, the initial weights and the order of training.
    flipped
        How many training rows get the label of another cultivar.
    epochs, learning_rate, weight_decay, batch_size
        Of Adam with a cosine schedule on a 13-16-16-3 tanh network.
    damping, curvature
        λ and C of the influence.
    check
        Whether the network is trained again on random halves of the rows, to see if the scores can
        be believed.
    halves, trainings
        How many halves, and how many trainings of each.
    compare
        Whether methods for large models score the same rows, to be compared.
    """

    seed: int = 2
    flipped: int = 10
    epochs: int = 300
    learning_rate: float = 0.005
    weight_decay: float = 0.01
    batch_size: int = 32
    damping: float = 0.1
    curvature: Literal["hessian", "ggn", "fisher"] = "hessian"
    check: bool = True
    halves: int = 30
    trainings: int = 2
    compare: bool = True


def make_model(seed: int) -> nn.Module:
    """The network with initial weights of this seed."""
    return MLP([13, 16, 16, 3], nn.Tanh, seed=seed)


def training_options(settings: WineSettings) -> dict[str, Any]:
    """Optimiser, schedule and size of minibatches, as `train` and `Retraining` take them."""
    return {
        "optimizer": lambda parameters: Adam(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        ),
        "scheduler": lambda optimizer: CosineAnnealingLR(optimizer, settings.epochs),
        "batch_size": settings.batch_size,
    }
