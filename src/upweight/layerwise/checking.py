"""Rows whose loss has no finite gradient, found and named."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upweight.layerwise.sides import Sides

__all__ = ["check_scores", "check_sides"]

ADVICE = (
    "the gradient of its loss is not finite (NaN or inf), though the loss is. Has the loss a root "
    "or a logarithm of zero there, as the square root of an error has where the fit is exact?"
)


def check_sides(sides: Sequence[Sides | None], start: int, what: str) -> None:
    """Refuse rows with a side that is not finite; `start` is the position of the first."""
    for own in sides:
        # a NaN or inf anywhere shows in the sum, which is faster than looking at each
        if own is not None and not bool(torch.isfinite(own.left.sum())):
            _name(own.left.flatten(1), start, what)


def check_scores(block: Tensor, start: int) -> None:
    """Refuse scores (m, b) that are not finite; `start` is the position of the first column."""
    if not bool(torch.isfinite(block.sum())):
        _name(block.T, start, "training")


def _name(by_row: Tensor, start: int, what: str) -> None:
    bad = (~torch.isfinite(by_row)).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(f"{what} data: row {start + int(bad[0])}: {ADVICE}")
