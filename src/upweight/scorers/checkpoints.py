"""Weights from along the training, loaded into a copy of the model one after the other."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["Checkpoint", "Checkpoints"]

Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str] | nn.Module


class Checkpoints:
    """Copies of a model with the weights of every checkpoint; the model itself stays as it is.

    Parameters
    ----------
    model
        A module of the same architecture.
    sources
        State dicts, files that hold one (``.safetensors``, or as `torch.save` writes it; nothing is
        unpickled but tensors), or modules.

    Raises
    ------
    ValueError
        If there is none, or the names or shapes of one do not match the model's. All are looked at
        before any is used.
    """

    def __init__(self, model: nn.Module, sources: Sequence[Checkpoint]) -> None:
        if isinstance(sources, str | os.PathLike | nn.Module | Mapping):
            raise TypeError(f"expected a list of checkpoints; got one {type(sources).__name__}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module; got {type(model).__name__}")
        self.model = model
        self.sources = list(sources)
        if not self.sources:
            raise ValueError("expected at least one checkpoint; got none")
        found = model.state_dict(keep_vars=True)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        first: dict[int, str] = {}
        self._tied = {name: first.setdefault(id(t), name) for name, t in found.items()}
        for at, source in enumerate(self.sources):
            self._check(_shapes(source), at)

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> Iterator[nn.Module]:
        """The same copy every time, with the weights of the next checkpoint."""
        model = copy.deepcopy(self.model)
        for at, source in enumerate(self.sources):
            state = _load(source)
            for name, tensor in state.items():
                first = self._tied[name]
                if first != name and first in state and not torch.equal(state[first], tensor):
                    raise ValueError(
                        f"checkpoint {at}: {first} and {name} are one tensor in the model, and two "
                        "different ones here"
                    )
            # a file may hold a tied weight under one of its names only; the rest was checked
            model.load_state_dict(state, strict=False)
            yield model

    def _check(self, shapes: dict[str, tuple[int, ...]], at: int) -> None:
        present = {self._tied.get(name) for name in shapes}
        wrong = {
            "missing": [name for name, first in self._tied.items() if first not in present],
            "not in the model": [name for name in shapes if name not in self._shapes],
            "of another shape": [
                f"{name} {shape} instead of {self._shapes[name]}"
                for name, shape in shapes.items()
                if self._shapes.get(name, shape) != shape
            ],
        }
        told = [f"{what}: {', '.join(names)}" for what, names in wrong.items() if names]
        if told:
            raise ValueError(
                f"checkpoint {at} does not match the model's state dict; {'; '.join(told)}"
            )


def _shapes(source: Checkpoint) -> dict[str, tuple[int, ...]]:
    if isinstance(source, str | os.PathLike) and Path(source).suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(os.fspath(source), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {name: tuple(tensor.shape) for name, tensor in _load(source).items()}


def _load(source: Checkpoint) -> Mapping[str, Tensor]:
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, str | os.PathLike):
        return _read(Path(source))
    if not isinstance(source, Mapping):
        raise TypeError(
            f"expected a state dict, a file or a module as checkpoint; got {type(source).__name__}"
        )
    return _tensors(source, "a checkpoint")


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as tensors alone; write it by "
            "torch.save(model.state_dict(), path), or as .safetensors"
        ) from error
    return _tensors(state, str(path))


def _tensors(state: Any, what: str) -> Mapping[str, Tensor]:
    if not isinstance(state, Mapping):
        raise TypeError(f"expected a state dict in {what}; got a {type(state).__name__}")
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"expected tensors by name in {what}; {others[0]!r} is "
            f"{type(state[others[0]]).__name__}. Pass the part that is the model's state dict"
        )
    return cast("Mapping[str, Tensor]", state)
