"""A digest of data, models and code that is the same in every process, or none."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import pathlib
import random
import struct
import sys
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from upweight.valuation.code_digests import (
    Unknown,
    add_builtin,
    add_callable,
    add_class,
    add_code,
    add_descriptor,
    add_function,
    add_method,
    add_module,
    add_partial,
    add_ufunc,
    version_of,
)

__all__ = ["digest"]

# Their repr is all that they are.
PLAIN = (
    datetime.date,
    datetime.time,
    datetime.datetime,
    datetime.timedelta,
    datetime.timezone,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    range,
    complex,
    type(Ellipsis),
    type(NotImplemented),
)
# Packages of which an object is its class and its attributes.
TRANSPARENT = ("sklearn", "skorch")


def digest(*parts: Any) -> str | None:
    """A digest of what the parts are, the same in every process; None if it cannot be told.

    Parameters
    ----------
    parts
        Of these kinds, also one inside another:

        - None, numbers, text, bytes, dates, paths (as text), enumerations;
        - tuples, lists, dicts (in their order), sets (in any order), dataclasses;
        - arrays (type, shape, content), random generators (their state);
        - frames, series and indexes of pandas: content, types, and the *names of rows and columns*,
          as a model may look at them; sparse matrices of SciPy (format, stored entries);
        - estimators: class and parameters, as `get_params` gives them. What was fitted is left
          out, as it is by `sklearn.base.clone`. Other objects of scikit-learn and skorch, such as
          scorers: class and attributes;
        - modules and tensors of torch: class, attributes, content;
        - functions, methods, partials, classes: the bytecode, with defaults, closure and the
          globals that the code names; those that are installed: name and version of the package.

    Returns
    -------
    str or None
        32 hexadecimal digits. None for other objects, such as open files and instances of
        classes that are none of these, and for code that uses a module that is not installed.

    Notes
    -----
    Seen is what code says, not what it reads elsewhere: a file, the environment, attributes that
    are set from outside. Bytecode is of one version of Python: another gives another digest.

    Examples
    --------
    >>> digest(np.arange(3), {"C": 1.0}) == digest(np.arange(3), {"C": 1.0})
    True
    >>> digest("ab", "c") == digest("a", "bc")
    False
    >>> digest(object()) is None
    True
    """
    try:
        return Digest({}, {}).of(parts).hex()
    except (Unknown, RecursionError):
        return None


class Digest:
    """The hash of one value.

    ``above`` has the values that this one is part of, ``seen`` the code that was met: by identity,
    and numbered in the order in which they came.
    """

    def __init__(self, above: dict[int, int], seen: dict[int, tuple[int, Any]]) -> None:
        self.hash = hashlib.blake2b(digest_size=16)
        self.above = above
        self.seen = seen

    def of(self, value: Any) -> bytes:
        """The digest of a value."""
        self.add(value)
        return self.hash.digest()

    def tag(self, *texts: str | bytes | int) -> None:
        """Short texts, each with its length."""
        for text in texts:
            data = text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogatepass")
            self.hash.update(len(data).to_bytes(8, "little"))
            self.hash.update(data)

    def add(self, value: Any) -> None:
        """Any value."""
        kind = type(value)
        if value is None or kind in (bool, int, str, bytes):
            self.tag(kind.__name__, value if isinstance(value, str | bytes) else repr(value))
            return
        if kind is float:
            self.tag("float", struct.pack("<d", value))
            return
        if id(value) in self.above:
            self.tag("inside", self.above[id(value)])  # a list that has itself as an item
            return
        if isinstance(value, types.FunctionType | type):  # they call one another
            if id(value) in self.seen:
                self.tag("again", self.seen[id(value)][0])
                return
            self.seen[id(value)] = len(self.seen), value
        self.above[id(value)] = len(self.above)
        try:
            self._compound(value, kind)
        finally:
            del self.above[id(value)]

    def each(self, name: str, values: Iterable[Any]) -> None:
        """Values in their order."""
        values = list(values)
        self.tag(name, len(values))
        for value in values:
            self.add(value)

    def named(self, name: str, values: dict[str, Any]) -> None:
        """Attributes, in the order of their names."""
        self.tag(name, len(values))
        for key in sorted(values):
            self.tag(key)
            self.add(values[key])

    def _compound(self, value: Any, kind: type) -> None:
        for test, add in _KINDS:
            if test(value, kind):
                add(self, value)
                return
        raise Unknown(kind)


# ------------------------------------------------------------------------------- plain values


def _container(to: Digest, value: Any) -> None:
    kind = type(value)
    name = kind.__name__
    if kind in (set, frozenset):
        # every item as if it were the first
        parts = sorted(Digest(to.above, dict(to.seen)).of(item) for item in value)
        to.tag(name, len(parts), *parts)
        return
    if issubclass(kind, dict):
        if kind is defaultdict:
            to.add(value.default_factory)
        to.each(name, (part for item in value.items() for part in item))
        return
    to.each(name, value)


def _is_named_tuple(value: Any, kind: type) -> bool:
    return isinstance(value, tuple) and hasattr(kind, "_fields") and "_make" in dir(kind)


def _named_tuple(to: Digest, value: Any) -> None:
    to.tag("namedtuple", type(value).__qualname__, *type(value)._fields)
    to.each("fields", tuple(value))


def _plain(to: Digest, value: Any) -> None:
    if isinstance(value, datetime.datetime | datetime.time) and value.tzinfo is not None:
        to.tag(str(value.tzinfo))
    to.tag("plain", type(value).__name__, repr(value))


def _array(to: Digest, value: Any) -> None:
    if isinstance(value, np.generic):
        to.tag("scalar")
        value = np.asarray(value)
    elif isinstance(value, np.ma.MaskedArray):
        to.each("masked", [np.ma.getmaskarray(value), value.filled()])
        return
    elif type(value) not in (np.ndarray, np.memmap):
        raise Unknown(type(value))
    to.tag("array", repr(value.dtype), *map(str, value.shape), "")
    if value.dtype.hasobject or value.dtype.kind not in "biufcSUmMV":
        to.each("objects", value.ravel().tolist())
        return
    data = np.ascontiguousarray(value).reshape(-1)
    to.tag(data.nbytes)
    if data.nbytes:
        to.hash.update(data.view(np.uint8).data)


def _random(to: Digest, value: Any) -> None:
    if isinstance(value, random.Random):
        to.each("random", value.getstate())
    elif isinstance(value, np.random.RandomState):
        to.each("RandomState", [value.get_state(legacy=False)])
    elif isinstance(value, np.random.SeedSequence):
        to.each("SeedSequence", [{**value.state}])
    else:
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value
        to.each("Generator", [type(value).__name__, bits.state, bits.seed_seq])


def _sparse(to: Digest, value: Any) -> None:
    listed = value.tocoo()
    to.tag("sparse", type(value).__name__, *map(str, value.shape), "")
    to.each("entries", [listed.data, *(np.asarray(where) for where in listed.coords)])


def _pandas(to: Digest, value: Any) -> None:
    import pandas as pd

    name = type(value).__name__
    if isinstance(value, pd.DataFrame):
        columns = [value.iloc[:, at].array for at in range(value.shape[1])]
        to.each(name, [value.index, value.columns, *columns])
    elif isinstance(value, pd.Series):
        to.each(name, [value.index, value.name, value.array])
    elif isinstance(value, pd.MultiIndex):
        to.each(
            name, [list(value.names), *(value.get_level_values(i) for i in range(value.nlevels))]
        )
    elif isinstance(value, pd.RangeIndex):
        to.each("Index", [value.name, value.to_numpy()])
    elif isinstance(value, pd.Index):
        to.each("Index", [value.name, value.array])
    elif isinstance(value, pd.Categorical):
        to.each(name, [value.codes, value.categories, bool(value.ordered)])
    elif isinstance(value, pd.api.extensions.ExtensionArray):
        if isinstance(value, pd.arrays.NumpyExtensionArray) or isinstance(value.dtype, np.dtype):
            to.each("values", [value.to_numpy()])
        else:
            to.each(str(value.dtype), value.to_numpy(dtype=object).tolist())
    elif value is pd.NA or value is pd.NaT:
        to.tag(name)
    elif isinstance(value, pd.Timestamp | pd.Timedelta | pd.Period | pd.Interval):
        to.tag(name, repr(value))
    else:
        raise Unknown(type(value))


# ------------------------------------------------------------------------------------- models


def _estimator(to: Digest, value: Any) -> None:
    to.each("estimator", [type(value)])
    to.named("parameters", value.get_params(deep=False))  # deep ones are parts of these


def _attributes(to: Digest, value: Any) -> None:
    to.each("object", [type(value)])
    to.named("attributes", vars(value))


def _torch(to: Digest, value: Any) -> None:
    torch: Any = sys.modules["torch"]
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
            raise Unknown(type(value))
        plain = value.detach().cpu().contiguous().reshape(-1)
        to.tag("tensor", str(value.dtype), str(value.requires_grad), *map(str, value.shape), "")
        to.add(plain.resolve_conj().resolve_neg().view(torch.uint8).numpy())
    elif isinstance(value, torch.Generator):
        to.each("torch.Generator", [value.get_state()])
    elif isinstance(value, torch.Size):
        to.each("torch.Size", tuple(value))
    else:
        to.tag("torch", type(value).__name__, str(value))  # a dtype or device


def _is_torch(value: Any, kind: type) -> bool:
    torch: Any = sys.modules.get("torch")
    names = ("Tensor", "Generator", "Size", "dtype", "device", "layout", "memory_format")
    return torch is not None and isinstance(value, tuple(getattr(torch, name) for name in names))


def _is_torch_module(value: Any, kind: type) -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


# --------------------------------------------------------------------------------- which is which


def _enumeration(to: Digest, value: enum.Enum) -> None:
    to.tag("enum", str(value.name))
    to.each("of", [type(value)] if isinstance(value.name, str) else [type(value), value.value])


def _dataclass(to: Digest, value: Any) -> None:
    to.each("dataclass", [type(value)])
    to.named("fields", {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})


def _is_mark(value: Any, kind: type) -> bool:
    """Whether it is one that generated code of dataclasses refers to."""
    marks = ("_HAS_DEFAULT_FACTORY_CLASS", "_MISSING_TYPE")
    return kind.__module__ == "dataclasses" and kind.__name__ in marks


def _of(*kinds: Any) -> Callable[[Any, type], bool]:
    return lambda value, kind: isinstance(value, kinds)


def _exactly(*kinds: type) -> Callable[[Any, type], bool]:
    return lambda value, kind: kind in kinds


def _from(*packages: str) -> Callable[[Any, type], bool]:
    return lambda value, kind: (
        kind.__module__.partition(".")[0] in packages and version_of(kind.__module__) is not None
    )


def _is_estimator(value: Any, kind: type) -> bool:
    return hasattr(kind, "get_params") and hasattr(kind, "set_params")


def _is_pandas(value: Any, kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "pandas"


def _is_sparse(value: Any, kind: type) -> bool:
    return kind.__module__.startswith("scipy.sparse") and hasattr(kind, "tocoo")


# The first that fits.
_KINDS: tuple[tuple[Callable[[Any, type], bool], Callable[[Digest, Any], None]], ...] = (
    (_exactly(tuple, list, set, frozenset, dict, OrderedDict), _container),
    (_exactly(defaultdict, Counter, deque), _container),
    (_exactly(types.MappingProxyType), lambda to, value: to.each("proxy", [dict(value)])),
    (_exactly(*PLAIN), _plain),
    (_is_mark, lambda to, value: to.tag("mark", type(value).__name__)),
    (_exactly(bytearray), lambda to, value: to.each("bytearray", [bytes(value)])),
    (_exactly(slice), lambda to, value: to.each("slice", [value.start, value.stop, value.step])),
    (_of(pathlib.PurePath), lambda to, value: to.tag("path", type(value).__name__, str(value))),
    (_of(np.ndarray, np.generic), _array),
    (_of(np.dtype), lambda to, value: to.tag("dtype", repr(value))),
    (_of(np.random.RandomState, np.random.Generator, np.random.BitGenerator), _random),
    (_of(np.random.SeedSequence), _random),
    (_exactly(random.Random), _random),
    (_of(np.ufunc), add_ufunc),
    (_of(enum.Enum), _enumeration),
    (_exactly(types.FunctionType), add_function),
    (_exactly(types.CodeType), add_code),
    (_exactly(types.MethodType), add_method),
    (_exactly(functools.partial), add_partial),
    (_exactly(types.BuiltinFunctionType, types.MethodDescriptorType), add_builtin),
    (_exactly(types.WrapperDescriptorType, types.MethodWrapperType), add_builtin),
    (_exactly(types.ModuleType), add_module),
    (_exactly(property, staticmethod, classmethod, types.MemberDescriptorType), add_descriptor),
    (_exactly(functools.cached_property), add_descriptor),
    (_of(type), add_class),
    (_is_named_tuple, _named_tuple),
    (_is_pandas, _pandas),
    (_is_sparse, _sparse),
    (_is_torch, _torch),
    (_is_torch_module, _attributes),
    (_is_estimator, _estimator),
    (lambda value, kind: dataclasses.is_dataclass(kind), _dataclass),
    (_from(*TRANSPARENT), _attributes),
    (lambda value, kind: callable(value) and hasattr(value, "__qualname__"), add_callable),
)
