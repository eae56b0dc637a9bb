"""Kronecker factors in a file, so that a fit need not be made twice.

Letters: q groups of a block with o outputs and i columns of inputs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upweight.curvature.rotated import Block, Kind, Rotated
from upweight.risk import EmpiricalRisk
from upweight.shards import digest_rows
from upweight.stream import load_tensors, save_tensors
from upweight.version import __version__

__all__ = ["ROOTS", "Saved", "find_work", "load_operators", "save_blocks", "work_of"]

# What is asked of the loss, of which there is no digest.
ROOTS = "square of the roots of some rows"


def work_of(risk: EmpiricalRisk, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What factors depend on, by names for an error message."""
    return {
        "model": risk.model.fingerprint(),
        "parameters": list(risk.model.names),
        "number of training rows": risk.n,
        "content of training rows": digest_rows(risk.rows),
        # a loss or a forward function has no digest; what it gives has
        "mean loss": f"{float(risk.losses().double().mean()):.6g}",
        "dtype": str(risk.dtype),
        "version of upweight": __version__,
        **settings,
    }


def find_work(
    risk: EmpiricalRisk, settings: Mapping[str, Any], path: str | os.PathLike[str]
) -> tuple[dict[str, Any], bool]:
    """What factors depend on, and whether their file is there; in a cluster rank 0 looks."""
    cluster = risk.cluster
    if cluster is None:
        return work_of(risk, settings), Path(path).exists()
    found = [work_of(risk, settings), Path(path).exists()] if cluster.main else None
    work, there = cluster.tell("the file of factors", found)
    return work, there


def save_blocks(
    path: str | os.PathLike[str],
    blocks: Sequence[Block],
    work: Mapping[str, Any],
    notes: Sequence[str],
    declined: Mapping[str, str],
) -> None:
    """Write eigenvalues and eigenvectors of all blocks, whole or not at all.

    `declined` are the sites without factors that only a pass over all rows has shown.
    """
    tensors: dict[str, Tensor] = {}
    for at, block in enumerate(blocks):
        operator = block.operator
        for part in ("left", "right", "values"):
            tensor = getattr(operator, part)
            if tensor is not None:
                tensors[f"{at:04d}.{part}"] = tensor
    described = [{"name": block.name, "kind": block.kind} for block in blocks]
    meta = {
        "work": dict(work),
        "blocks": described,
        "notes": list(notes),
        "declined": dict(declined),
    }
    save_tensors(path, tensors, meta)


@dataclass(frozen=True)
class Saved:
    """What a file of factors holds of the blocks, in order, and which sites have none."""

    names: list[str]
    kinds: list[Kind]
    operators: list[Rotated]
    notes: list[str]
    declined: dict[str, str]


def load_operators(
    path: str | os.PathLike[str], work: Mapping[str, Any], device: torch.device
) -> Saved:
    """The blocks in a file.

    Raises
    ------
    ValueError
        If the file is of other work, and which part of it is another.
    """
    tensors, meta = load_tensors(path)
    before = meta.get("work", {})
    names = [name for name, now in work.items() if before.get(name) != now]
    if len(names) > 1:  # it follows from the others
        names = [name for name in names if name != ROOTS]
    if names:
        changed = [
            f"{name}: {_short(before.get(name))} in the file, {_short(work[name])} here"
            for name in names
        ]
        raise ValueError(
            f"the factors at {Path(path)} are of other work. {'; '.join(changed)}. Remove the "
            "file, or name another one"
        )
    operators: list[Rotated] = []
    for at in range(len(meta["blocks"])):
        left, right, values = (
            tensors[name].to(device) if (name := f"{at:04d}.{part}") in tensors else None
            for part in ("left", "right", "values")
        )
        assert values is not None
        operators.append(Rotated(left, right, values))
    return Saved(
        [one["name"] for one in meta["blocks"]],
        [one["kind"] for one in meta["blocks"]],
        operators,
        meta["notes"],
        meta["declined"],
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:36]} …"
