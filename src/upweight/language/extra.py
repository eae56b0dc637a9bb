"""The optional packages: imported when they are needed, told where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

__all__ = ["peft", "quiet", "transformers"]

INSTALL = "pip install 'upweight[hf]'"


def transformers() -> Any:
    """The package, or an error that says how to install it.

    Raises
    ------
    ImportError
        If it is not there.
    """
    if "transformers" not in sys.modules and importlib.util.find_spec("transformers") is not None:
        _hide_broken_vision()
    return _found("transformers")


def peft() -> Any:
    """The package for adapters, or an error that says how to install it.

    Raises
    ------
    ImportError
        If it is not there.
    """
    transformers()
    return _found("peft")


def _found(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(
            f"language models need the package {name}, which is not installed: {INSTALL}"
        ) from error


def _hide_broken_vision() -> None:
    """Let transformers take a torchvision that cannot be imported for one that is not there.

    One that was built for another torch raises a RuntimeError deep in the import of any model, also
    of those without pictures (transformers 5.24, torchvision 0.28).
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
        return
    except Exception:  # of any kind: it is their import that fails
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    sys.modules["torchvision"] = None  # pyright: ignore[reportArgumentType]
    try:
        utils: Any = importlib.import_module("transformers.utils.import_utils")
        utils.is_torchvision_available()  # remembers what it finds
    finally:
        del sys.modules["torchvision"]


@contextmanager
def quiet() -> Generator[None]:
    """No progress bars, no advice and no warnings of transformers; what was set comes back."""
    transformers()
    logging: Any = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
