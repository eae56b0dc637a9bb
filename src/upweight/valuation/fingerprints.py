"""A digest of data, models and code that is the same in every process, or none."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import dis
import enum
import fractions
import functools
import hashlib
import importlib
import inspect
import os
import pathlib
import random
import struct
import sys
import sysconfig
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

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
# What a class has besides that its author wrote.
MADE = frozenset(
    (
        "__dict__",
        "__weakref__",
        "__doc__",
        "__module__",
        "__qualname__",
        "__annotations__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__firstlineno__",
        "__static_attributes__",
        "_abc_impl",
        "__abstractmethods__",
        "__orig_bases__",
        "__parameters__",
        "__dataclass_fields__",
        "__dataclass_params__",
        "__match_args__",
        "__slotnames__",
    )
)


CACHED = type(functools.lru_cache(len))


class _Unknown(Exception):
    """Something of which nothing stable is known."""


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
        return _Digest({}, {}).of(parts).hex()
    except (_Unknown, RecursionError):
        return None


class _Digest:
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
        raise _Unknown(kind)


# ------------------------------------------------------------------------------- plain values


def _container(to: _Digest, value: Any) -> None:
    kind = type(value)
    name = kind.__name__
    if kind in (set, frozenset):
        # every item as if it were the first
        parts = sorted(_Digest(to.above, dict(to.seen)).of(item) for item in value)
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


def _named_tuple(to: _Digest, value: Any) -> None:
    to.tag("namedtuple", type(value).__qualname__, *type(value)._fields)
    to.each("fields", tuple(value))


def _plain(to: _Digest, value: Any) -> None:
    if isinstance(value, datetime.datetime | datetime.time) and value.tzinfo is not None:
        to.tag(str(value.tzinfo))
    to.tag("plain", type(value).__name__, repr(value))


def _array(to: _Digest, value: Any) -> None:
    if isinstance(value, np.generic):
        to.tag("scalar")
        value = np.asarray(value)
    elif isinstance(value, np.ma.MaskedArray):
        to.each("masked", [np.ma.getmaskarray(value), value.filled()])
        return
    elif type(value) not in (np.ndarray, np.memmap):
        raise _Unknown(type(value))
    to.tag("array", repr(value.dtype), *map(str, value.shape), "")
    if value.dtype.hasobject or value.dtype.kind not in "biufcSUmMV":
        to.each("objects", value.ravel().tolist())
        return
    data = np.ascontiguousarray(value).reshape(-1)
    to.tag(data.nbytes)
    if data.nbytes:
        to.hash.update(data.view(np.uint8).data)


def _random(to: _Digest, value: Any) -> None:
    if isinstance(value, random.Random):
        to.each("random", value.getstate())
    elif isinstance(value, np.random.RandomState):
        to.each("RandomState", [value.get_state(legacy=False)])
    elif isinstance(value, np.random.SeedSequence):
        to.each("SeedSequence", [{**value.state}])
    else:
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value
        to.each("Generator", [type(value).__name__, bits.state, bits.seed_seq])


def _sparse(to: _Digest, value: Any) -> None:
    listed = value.tocoo()
    to.tag("sparse", type(value).__name__, *map(str, value.shape), "")
    to.each("entries", [listed.data, *(np.asarray(where) for where in listed.coords)])


def _pandas(to: _Digest, value: Any) -> None:
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
        raise _Unknown(type(value))


# ------------------------------------------------------------------------------------- models


def _estimator(to: _Digest, value: Any) -> None:
    to.each("estimator", [type(value)])
    to.named("parameters", value.get_params(deep=False))  # deep ones are parts of these


def _attributes(to: _Digest, value: Any) -> None:
    to.each("object", [type(value)])
    to.named("attributes", vars(value))


def _torch(to: _Digest, value: Any) -> None:
    torch: Any = sys.modules["torch"]
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
            raise _Unknown(type(value))
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


# --------------------------------------------------------------------------------------- code


def _version(module: str) -> str | None:
    """The version of the package, if it is installed: in a place where nobody edits it."""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None)
    if top in sys.builtin_module_names or top in sys.stdlib_module_names:
        stdlib = sysconfig.get_paths()["stdlib"]
        if file is None or str(file).startswith((stdlib, os.path.realpath(stdlib))):
            return sys.version.partition(" ")[0]
    if {"site-packages", "dist-packages"}.isdisjoint(pathlib.Path(file or "").parts):
        return None
    found = getattr(sys.modules.get(top), "__version__", None)
    if isinstance(found, str):
        return found
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(top)
    except PackageNotFoundError:
        return None


def _installed(to: _Digest, value: Any) -> bool:
    """Add the name and version of what is installed, if it can be found by that name."""
    module, name = str(getattr(value, "__module__", None)), str(getattr(value, "__qualname__", "<"))
    version = _version(module)
    if version is None or "<" in name:  # <lambda>, <locals>
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part, None)
    if getattr(found, "__func__", found) is not value:  # static and class methods
        return False
    to.tag("installed", module, name, version)
    return True


def _function(to: _Digest, value: types.FunctionType) -> None:
    if _installed(to, value):
        return
    to.tag("function", value.__module__ or "", value.__qualname__, sys.version.partition(" ")[0])
    to.each("code", [value.__code__, value.__defaults__, value.__kwdefaults__])
    # what was wrapped is in the closure
    to.named("attributes", {k: v for k, v in vars(value).items() if k != "__wrapped__"})
    cells = value.__closure__ or ()
    to.tag("closure", len(cells))
    for cell in cells:
        try:
            to.add(cell.cell_contents)
        except ValueError:
            to.tag("empty")
    for name in _globals_of(value.__code__):
        to.tag("global", name)
        built_in = vars(sys.modules["builtins"])
        if name in value.__globals__:
            to.add(value.__globals__[name])
        else:
            to.tag("built in" if name in built_in else "missing")


def _globals_of(code: types.CodeType) -> list[str]:
    names = {
        str(step.argval)
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_globals_of(constant))
    return sorted(names)


def _code(to: _Digest, value: types.CodeType) -> None:
    to.tag(value.co_name, value.co_flags, value.co_argcount, value.co_posonlyargcount)
    to.tag(value.co_kwonlyargcount, value.co_code, getattr(value, "co_exceptiontable", b""))
    to.each("names", [value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars])
    to.each("constants", value.co_consts)
    imported = [s.argval for s in dis.get_instructions(value) if s.opname == "IMPORT_NAME"]
    for name in imported:
        found = sys.modules.get(name)
        if found is None:
            try:
                found = importlib.import_module(name)
            except Exception:
                raise _Unknown(name) from None
        to.add(found)


def _class(to: _Digest, value: type) -> None:
    if _installed(to, value):
        return
    if value.__module__ in sys.builtin_module_names:
        raise _Unknown(value)
    to.tag("class", value.__module__, value.__qualname__)
    to.each("bases", [type(value), *value.__bases__])
    own = {name: part for name, part in vars(value).items() if name not in MADE}
    to.named("attributes", own)


def _partial(to: _Digest, value: functools.partial[Any]) -> None:
    to.each("partial", [value.func, value.args, value.keywords])


def _method(to: _Digest, value: types.MethodType) -> None:
    to.each("method", [value.__func__, value.__self__])


def _descriptor(to: _Digest, value: Any) -> None:
    name = type(value).__name__
    if isinstance(value, property):
        to.each(name, [value.fget, value.fset, value.fdel])
    elif isinstance(value, functools.cached_property):
        to.each(name, [value.func])
    elif isinstance(value, types.MemberDescriptorType):
        to.tag(name, value.__name__)
    else:
        to.each(name, [value.__func__])


def _builtin(to: _Digest, value: Any) -> None:
    owner = getattr(value, "__self__", getattr(value, "__objclass__", None))
    if owner is None or isinstance(owner, types.ModuleType):
        if not _installed(to, value):
            raise _Unknown(value)
        return
    to.tag("builtin", value.__name__)
    to.add(owner)


def _callable(to: _Digest, value: Any) -> None:
    if _installed(to, value):
        return
    if not isinstance(value, CACHED):
        raise _Unknown(value)
    to.each("cached", [value.__wrapped__])


def _module(to: _Digest, value: types.ModuleType) -> None:
    version = _version(value.__name__)
    if version is None:
        raise _Unknown(value)
    to.tag("module", value.__name__, version)


def _ufunc(to: _Digest, value: np.ufunc) -> None:
    if getattr(np, value.__name__, None) is not value:
        raise _Unknown(value)
    to.tag("ufunc", value.__name__, np.__version__)


def _enumeration(to: _Digest, value: enum.Enum) -> None:
    to.tag("enum", str(value.name))
    to.each("of", [type(value)] if isinstance(value.name, str) else [type(value), value.value])


def _dataclass(to: _Digest, value: Any) -> None:
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
        kind.__module__.partition(".")[0] in packages and _version(kind.__module__) is not None
    )


def _is_estimator(value: Any, kind: type) -> bool:
    return hasattr(kind, "get_params") and hasattr(kind, "set_params")


def _is_pandas(value: Any, kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "pandas"


def _is_sparse(value: Any, kind: type) -> bool:
    return kind.__module__.startswith("scipy.sparse") and hasattr(kind, "tocoo")


# The first that fits.
_KINDS: tuple[tuple[Callable[[Any, type], bool], Callable[[_Digest, Any], None]], ...] = (
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
    (_of(np.ufunc), _ufunc),
    (_of(enum.Enum), _enumeration),
    (_exactly(types.FunctionType), _function),
    (_exactly(types.CodeType), _code),
    (_exactly(types.MethodType), _method),
    (_exactly(functools.partial), _partial),
    (_exactly(types.BuiltinFunctionType, types.MethodDescriptorType), _builtin),
    (_exactly(types.WrapperDescriptorType, types.MethodWrapperType), _builtin),
    (_exactly(types.ModuleType), _module),
    (_exactly(property, staticmethod, classmethod, types.MemberDescriptorType), _descriptor),
    (_exactly(functools.cached_property), _descriptor),
    (_of(type), _class),
    (_is_named_tuple, _named_tuple),
    (_is_pandas, _pandas),
    (_is_sparse, _sparse),
    (_is_torch, _torch),
    (_is_torch_module, _attributes),
    (_is_estimator, _estimator),
    (lambda value, kind: dataclasses.is_dataclass(kind), _dataclass),
    (_from(*TRANSPARENT), _attributes),
    (lambda value, kind: callable(value) and hasattr(value, "__qualname__"), _callable),
)
