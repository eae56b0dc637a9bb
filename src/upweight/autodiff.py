"""Derivatives of functions of a parameter dictionary, for many directions and many rows at once.

Every function has a fast way (vectorised by `torch.func.vmap`, forward mode) and slower ways that
ask less of the operations in the model. The first way that works is kept and told in `notes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.func import vjp as _vjp
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["Autodiff", "gradient", "vjp"]

Tensors = Any  # a pytree of tensors


def vjp(function: Callable[[Any], Tensors], point: Any) -> tuple[Any, Callable[[Any], Any]]:
    """f(point), and u ↦ uᵀJ there."""
    found = _vjp(function, point)
    return found[0], lambda cotangent: found[1](cotangent)[0]


def gradient(function: Callable[[Any], Tensor]) -> Callable[[Any], Any]:
    """∇f for a scalar function f of one pytree."""

    def inner(argument: Any) -> Any:
        value, pullback = vjp(function, argument)
        return pullback(torch.ones_like(value))

    return inner


def _slices(arguments: Sequence[Tensors], index: int) -> list[Tensors]:
    return [tree_map(lambda leaf: leaf[index], a) for a in arguments]


def _loop(function: Callable[..., Tensors], arguments: Sequence[Tensors], length: int) -> Tensors:
    results = [function(*_slices(arguments, i)) for i in range(length)]
    return tree_map(lambda *leaves: torch.stack(leaves), results[0], *results[1:])


def _jvp(function: Callable[[Any], Tensors], point: Any, direction: Any) -> Tensors:
    return jvp(function, (point,), (direction,))[1]


def _jvp_by_reverse(function: Callable[[Any], Tensors], point: Any, direction: Any) -> Tensors:
    """J v as the derivative of u ↦ Jᵀu, for operations without a forward-mode rule."""
    output, pullback = vjp(function, point)
    zeros = tree_map(torch.zeros_like, output)
    _, pullback_again = vjp(pullback, zeros)
    return pullback_again(direction)


class Autodiff:
    """Directional derivatives with memory of what the model's operations can do.

    Examples
    --------
    >>> import torch
    >>> ad = Autodiff()
    >>> square = lambda p: p["w"] ** 2
    >>> ad.pushforward(square, {"w": torch.tensor([3.0])}, {"w": torch.tensor([[1.0], [2.0]])})
    tensor([[ 6.],
            [12.]])
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._chosen: dict[str, int] = {}

    def pushforward(self, function: Callable[[Any], Tensors], point: Any, tangents: Any) -> Tensors:
        """J v_j for k directions v_j, stacked in front: k tangents (k, …) → outputs (k, …)."""
        k = _length(tangents)

        def vectorised() -> Tensors:
            return vmap(lambda v: _jvp(function, point, v))(tangents)

        def one_by_one() -> Tensors:
            return _loop(lambda v: _jvp(function, point, v), [tangents], k)

        def reverse() -> Tensors:
            return _loop(lambda v: _jvp_by_reverse(function, point, v), [tangents], k)

        return self._first(
            "directional derivatives",
            (vectorised, "vectorised"),
            (one_by_one, "one direction at a time: an operation has no vmap rule"),
            (reverse, "by reverse mode twice: an operation has no forward-mode rule"),
        )

    def pullback(self, function: Callable[[Any], Tensors], point: Any, cotangents: Any) -> Any:
        """u_jᵀ J for k cotangents u_j, stacked in front: (k, …) → like point, with k in front."""
        return self.pulled(vjp(function, point)[1], cotangents)

    def pulled(self, pull: Callable[[Tensors], Any], cotangents: Tensors) -> Any:
        """The same for u ↦ uᵀJ as `vjp` gives it, whose pass forward serves for all cotangents."""
        k = _length(cotangents)
        return self._first(
            "transposed products",
            (lambda: vmap(pull)(cotangents), "vectorised"),
            (
                lambda: _loop(pull, [cotangents], k),
                "one direction at a time: an operation has no vmap rule",
            ),
        )

    def rows(self, function: Callable[..., Tensors], *arguments: Tensors, what: str) -> Tensors:
        """function(row of each argument) for every row, stacked.

        Leaves that are no tensors (None, text, a number) belong to every row as they are.
        """
        leaves, spec = tree_flatten(arguments)
        mapped = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def one(*tensors: Tensor) -> Tensors:
            filled = list(leaves)
            for i, tensor in zip(mapped, tensors, strict=True):
                filled[i] = tensor
            return function(*tree_unflatten(filled, spec))

        tensors = [leaves[i] for i in mapped]
        return self._first(
            what,
            (lambda: vmap(one)(*tensors), "vectorised"),
            (
                lambda: _loop(one, tensors, _length(tensors)),
                "one row at a time: an operation has no vmap rule",
            ),
        )

    def _first(self, what: str, *ways: tuple[Callable[[], Tensors], str]) -> Tensors:
        first = self._chosen.get(what, 0)
        failure: Exception | None = None
        for i in range(first, len(ways)):
            way, told = ways[i]
            try:
                result = way()
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                failure = failure or error
                continue
            if i != first:
                self.notes.append(f"{what} {told}")
            self._chosen[what] = i
            return result
        assert failure is not None
        raise failure


def _length(tree: Tensors) -> int:
    found: list[int] = []
    tree_map(lambda leaf: found.append(leaf.shape[0]), tree)
    return found[0]
