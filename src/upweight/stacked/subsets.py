"""Subsets of n rows: as the caller gives them, and as sorted positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["positions", "subsets"]


def positions(rows: Any, n: int) -> Tensor:
    """Sorted positions (r,), from positions in any order or a mask (n,)."""
    found = torch.from_numpy(np.array(_on_cpu(rows)))
    if found.dtype == torch.bool and found.shape == (n,):
        found = found.nonzero().flatten()
    if found.ndim != 1 or not found.numel():
        raise ValueError(
            f"expected positions of at least one row or a mask ({n},); got an array "
            f"{tuple(found.shape)}"
        )
    if found.is_floating_point() or found.dtype == torch.bool:
        raise TypeError(f"expected positions of rows as integers; got {found.dtype}")
    found = found.long().sort().values
    if int(found[0]) < 0 or int(found[-1]) >= n or bool((found.diff() == 0).any()):
        raise ValueError(f"expected different positions from 0 to {n - 1}; got {rows!r}")
    return found


def subsets(masks: Any, seeds: Any, n: int) -> tuple[list[Tensor], list[int]]:
    """Sorted positions for each mask of (S, n), and as many seeds."""
    found = np.asarray(_on_cpu(masks))
    if found.dtype != np.bool_:
        raise TypeError(f"expected masks of bool; got {found.dtype}")
    if found.ndim != 2 or found.shape[1] != n:
        raise ValueError(f"expected masks (S, {n}); got {found.shape}")
    empty = np.flatnonzero(~found.any(1))
    if len(empty):
        raise ValueError(f"expected at least one row in every mask; none in {empty.tolist()}")
    numbers = np.asarray(_on_cpu(seeds))
    if numbers.shape != found.shape[:1] or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"expected {len(found)} integers as seeds, one for each mask; got {numbers.dtype} "
            f"{numbers.shape}"
        )
    return [torch.from_numpy(np.flatnonzero(mask)) for mask in found], numbers.tolist()


def _on_cpu(values: Any) -> Any:
    return values.detach().cpu() if isinstance(values, Tensor) else values
