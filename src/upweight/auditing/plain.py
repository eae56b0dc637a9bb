"""Dataclasses as plain values for JSON and YAML, and back by their annotations."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

__all__ = ["from_plain", "to_plain"]

T = TypeVar("T")
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_plain(value: Any) -> Any:
    """Dictionaries, lists, text and numbers. Numbers that JSON does not know become text.

    Examples
    --------
    >>> to_plain({3: (1.5, float("nan"), None)})
    {'3': [1.5, 'NaN', None]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return to_plain(value.tolist())
    if isinstance(value, list | tuple | AbstractSet):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # one of NOT_FINITE
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def from_plain(kind: type[T], value: Mapping[str, Any]) -> T:
    """The dataclass that `to_plain` made these values of.

    Fields that are missing take their defaults.

    Raises
    ------
    ValueError
        If a value is not what the dataclass says, or belongs to no field.
    """
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # pyright: ignore[reportArgumentType]
    strange = sorted(set(value) - set(known))
    if strange:
        raise ValueError(f"expected {kind.__name__} to have {known}; got also {strange}")
    try:
        return kind(**{k: _read(hints[k], v, k) for k, v in value.items()})
    except TypeError as error:
        raise ValueError(f"expected all fields of {kind.__name__}; {error}") from error


def _read(hint: Any, value: Any, name: str) -> Any:
    """A value by its annotation; refused where it is something else."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _first(hint, [i for i in inner if i is not type(None)], value, name)
    if origin is Literal:
        return value if value in inner else _refuse(hint, value, name)
    if is_dataclass(hint) and isinstance(value, Mapping):
        return from_plain(hint, value)  # pyright: ignore[reportArgumentType]
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {_key(inner[0], k, name): _read(inner[1], v, name) for k, v in value.items()}
    if origin is not None and isinstance(value, list):
        return _items(hint, origin, inner, value, name)
    return _scalar(hint, value, name)


def _first(hint: Any, choices: Sequence[Any], value: Any, name: str) -> Any:
    for choice in choices:
        try:
            return _read(choice, value, name)
        except ValueError:
            continue
    return _refuse(hint, value, name)


def _items(hint: Any, origin: Any, inner: tuple[Any, ...], value: list[Any], name: str) -> Any:
    if origin is tuple and (len(inner) != 2 or inner[1] is not Ellipsis):
        if len(inner) != len(value):
            return _refuse(hint, value, name)
        return tuple(_read(i, v, name) for i, v in zip(inner, value, strict=True))
    read = [_read(inner[0], v, name) for v in value]
    if issubclass(origin, AbstractSet):
        return frozenset(read)
    return tuple(read) if origin is tuple or not issubclass(origin, list) else read


def _key(hint: Any, key: Any, name: str) -> Any:
    if hint is not int:
        return _read(hint, str(key), name)
    try:
        return int(key)
    except ValueError:
        return _refuse(hint, key, name)


def _scalar(hint: Any, value: Any, name: str) -> Any:
    if hint is float and isinstance(value, str) and value in NOT_FINITE:
        return NOT_FINITE[value]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool):
        return _refuse(hint, value, name)
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    return _refuse(hint, value, name)


def _refuse(hint: Any, value: Any, name: str) -> Any:
    wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ValueError(f"expected {wanted} for {name}; got {str(value)!r:.80}")
