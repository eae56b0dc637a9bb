"""Digests of code: functions, classes, methods, by what they do and by what they refer to."""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import os
import pathlib
import sys
import sysconfig
import types
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from upweight.valuation.fingerprints import Digest

__all__ = [
    "Unknown",
    "add_builtin",
    "add_callable",
    "add_class",
    "add_code",
    "add_descriptor",
    "add_function",
    "add_method",
    "add_module",
    "add_partial",
    "add_ufunc",
    "version_of",
]

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


class Unknown(Exception):
    """Something of which nothing stable is known."""


def version_of(module: str) -> str | None:
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


def _installed(to: Digest, value: Any) -> bool:
    """Add the name and version of what is installed, if it can be found by that name."""
    module, name = str(getattr(value, "__module__", None)), str(getattr(value, "__qualname__", "<"))
    version = version_of(module)
    if version is None or "<" in name:  # <lambda>, <locals>
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part, None)
    if getattr(found, "__func__", found) is not value:  # static and class methods
        return False
    to.tag("installed", module, name, version)
    return True


def add_function(to: Digest, value: types.FunctionType) -> None:
    """A function: its bytecode, defaults, closure, and the globals that it names."""
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


def add_code(to: Digest, value: types.CodeType) -> None:
    """Bytecode, with its constants and names."""
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
                raise Unknown(name) from None
        to.add(found)


def add_class(to: Digest, value: type) -> None:
    """A class: its bases and what its author wrote in it."""
    if _installed(to, value):
        return
    if value.__module__ in sys.builtin_module_names:
        raise Unknown(value)
    to.tag("class", value.__module__, value.__qualname__)
    to.each("bases", [type(value), *value.__bases__])
    own = {name: part for name, part in vars(value).items() if name not in MADE}
    to.named("attributes", own)


def add_partial(to: Digest, value: functools.partial[Any]) -> None:
    """A function with some arguments."""
    to.each("partial", [value.func, value.args, value.keywords])


def add_method(to: Digest, value: types.MethodType) -> None:
    """A function and what it is bound to."""
    to.each("method", [value.__func__, value.__self__])


def add_descriptor(to: Digest, value: Any) -> None:
    """A property, static or class method."""
    name = type(value).__name__
    if isinstance(value, property):
        to.each(name, [value.fget, value.fset, value.fdel])
    elif isinstance(value, functools.cached_property):
        to.each(name, [value.func])
    elif isinstance(value, types.MemberDescriptorType):
        to.tag(name, value.__name__)
    else:
        to.each(name, [value.__func__])


def add_builtin(to: Digest, value: Any) -> None:
    """A function that is written in C."""
    owner = getattr(value, "__self__", getattr(value, "__objclass__", None))
    if owner is None or isinstance(owner, types.ModuleType):
        if not _installed(to, value):
            raise Unknown(value)
        return
    to.tag("builtin", value.__name__)
    to.add(owner)


def add_callable(to: Digest, value: Any) -> None:
    """Anything else with a name that can be called."""
    if _installed(to, value):
        return
    if not isinstance(value, CACHED):
        raise Unknown(value)
    to.each("cached", [value.__wrapped__])


def add_module(to: Digest, value: types.ModuleType) -> None:
    """A module that is installed, by its version."""
    version = version_of(value.__name__)
    if version is None:
        raise Unknown(value)
    to.tag("module", value.__name__, version)


def add_ufunc(to: Digest, value: np.ufunc) -> None:
    """A universal function of NumPy."""
    if getattr(np, value.__name__, None) is not value:
        raise Unknown(value)
    to.tag("ufunc", value.__name__, np.__version__)
