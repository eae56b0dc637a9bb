"""A digest of what a retraining depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from upweight.functional import FunctionalModel, default_forward, default_target
from upweight.losses import RowLoss
from upweight.rows import Rows
from upweight.stacked.problem import Recipe
from upweight.training import to_model

__all__ = ["digest"]

PROBED_ROWS = 8


def digest(template: nn.Module, recipe: Recipe, readings: Iterable[tuple[Rows, RowLoss]]) -> str:
    """Of an initial model (which is spent), how it is trained, and rows with what is read of them.

    Functions are known by their names and by what they give for the first rows.
    """
    found = hashlib.blake2b(digest_size=16)
    found.update(f"{template!r} {recipe.epochs} {recipe.batch_size}".encode())
    found.update(FunctionalModel(template, parameters="*").fingerprint().encode())
    template.eval()
    for rows, reading in readings:
        for leaf in tree_leaves(rows.batch(0, len(rows))):
            found.update(_bytes(leaf))
        batch = to_model(template, rows.batch(0, min(PROBED_ROWS, len(rows))))
        with torch.no_grad():
            values = reading(default_forward(template, batch), default_target(batch))
        # few digits, as another machine may round differently
        name = getattr(reading.loss, "__qualname__", type(reading.loss).__qualname__)
        found.update(repr((name, [f"{v:.3e}" for v in values.tolist()])).encode())
    found.update(repr(_schedule(template, recipe)).encode())
    return found.hexdigest()


def _bytes(leaf: Any) -> bytes:
    if not isinstance(leaf, Tensor):
        return repr(leaf).encode()
    flat = leaf.detach().contiguous().flatten().cpu()
    return f"{tuple(leaf.shape)}{leaf.dtype}".encode() + flat.view(torch.uint8).numpy().tobytes()


def _schedule(template: nn.Module, recipe: Recipe) -> list[Any]:
    """Settings of the optimiser, and its learning rates epoch by epoch."""
    optimizer = recipe.optimizer(template.parameters())
    found: list[Any] = [repr(optimizer)]
    if recipe.scheduler is not None:
        schedule = recipe.scheduler(optimizer)
        for _ in range(recipe.epochs):
            found.append([float(group["lr"]) for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
    return found
