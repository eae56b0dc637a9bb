"""Blocks of parameters by name: a layer, a parameter, or groups of the user's own."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from upweight.functional import FunctionalModel

__all__ = ["Block", "BlockChoice", "parameter_blocks"]

BlockChoice = Literal["layer", "parameter"] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Block:
    """Parameters by name, and where they are in θ: positions (size,)."""

    parameters: tuple[str, ...]
    entries: Tensor


def parameter_blocks(model: FunctionalModel, choice: BlockChoice) -> dict[str, Block]:
    """The blocks that θ falls into, every parameter in one.

    Parameters
    ----------
    model
        Its chosen parameters are θ.
    choice
        ``"layer"``: the parameters of one module are a block, by the module's name.
        ``"parameter"``: every tensor is one. Or groups by name, each with one or several name
        patterns: ``{"body": "body.*", "head": ["head.weight", "head.bias"]}``.

    Raises
    ------
    ValueError
        If a parameter is in no group or in several, or a pattern matches none.
    """
    if isinstance(choice, Mapping):
        groups = _matched(model.names, choice)
    elif choice in ("layer", "parameter"):
        groups = {}
        for name in model.names:
            layer = name.rpartition(".")[0] or "(model)"
            groups.setdefault(layer if choice == "layer" else name, []).append(name)
    else:
        raise ValueError(
            "expected blocks by 'layer' or 'parameter', or a mapping from names to patterns such "
            f"as {{'head': 'head.*'}}; got {choice!r}"
        )
    starts = dict(zip(model.names, _starts(model.sizes), strict=True))
    return {
        group: Block(
            tuple(names),
            torch.cat([starts[n] + torch.arange(model.sizes[model.names.index(n)]) for n in names]),
        )
        for group, names in groups.items()
    }


def _starts(sizes: Sequence[int]) -> list[int]:
    total, found = 0, list[int]()
    for size in sizes:
        found.append(total)
        total += size
    return found


def _matched(
    names: Sequence[str], choice: Mapping[str, str | Sequence[str]]
) -> dict[str, list[str]]:
    owner: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for group, patterns in choice.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(
                    f"block {group!r}: no parameter matches {pattern!r}; there are "
                    f"{', '.join(names)}"
                )
            for name in matched:
                if owner.setdefault(name, group) != group:
                    raise ValueError(
                        f"expected every parameter in one block; {name} is in {owner[name]!r} and "
                        f"{group!r}"
                    )
                if name not in groups.setdefault(group, []):
                    groups[group].append(name)
    missing = [name for name in names if name not in owner]
    if missing:
        raise ValueError(f"expected every parameter in one block; in none: {', '.join(missing)}")
    # in the order of θ, whatever that of the patterns
    return {group: [name for name in names if owner[name] == group] for group in groups}
