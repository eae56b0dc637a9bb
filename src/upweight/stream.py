"""Blocks of numbers on their way to memory or to disk, where all appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "ArraySink",
    "Sink",
    "ZarrSink",
    "atomic_directory",
    "atomic_write",
    "load_tensors",
    "save_tensors",
]

# What a file of `save_tensors` holds beside its tensors. One key: safetensors keeps several in no
# fixed order, and the same content is to be the same bytes.
META_KEY = "upweight"
TENSORS_FORMAT = 1


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, replace: bool = False) -> Generator[Path]:
    """A fresh directory to write into, which takes its name `path` when the block ends well.

    After an error `path` is as it was, and nothing is left beside it.

    Raises
    ------
    FileExistsError
        If something is at `path` already, and it is not to be replaced.
    """
    final = Path(path)
    if final.exists() and not replace:
        raise FileExistsError(f"{final} exists already: choose another path, or remove it first")
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        old = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.old")
        moved = final.exists()
        if moved and not replace:  # another process was faster
            raise FileExistsError(f"{final} has appeared meanwhile: choose another path")
        if moved:  # a directory cannot be replaced in one step, only moved away
            os.replace(final, old)
        try:
            os.replace(partial, final)
        except BaseException:
            if moved:
                os.replace(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Generator[Path]:
    """A path to write one file to, which replaces `path` when the block ends well."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> Path:
    """Write tensors with a description to one safetensors file, whole or not at all.

    Parameters
    ----------
    path
        Replaced if it is there. The file is on disk when this returns.
    tensors
        By name; of any shape, dtype and device. They come back on the CPU.
    meta
        Whatever JSON can hold.

    Raises
    ------
    TypeError
        If `meta` holds what JSON cannot.
    OSError
        If the file cannot be written; one that was there before is as it was.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_tensors(f"{folder}/a", {"x": torch.ones(2)}, {"layer": "head"})
    ...     load_tensors(path)
    ({'x': tensor([1., 1.])}, {'layer': 'head'})
    """
    from safetensors.torch import save_file

    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory
        own[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    text = json.dumps(dict(meta), sort_keys=True)
    about = {"format": TENSORS_FORMAT, "meta": text, "blake2b": _checksum(own, text)}
    with atomic_write(path) as partial:
        save_file(own, partial, {META_KEY: json.dumps(about)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    return Path(path)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` has written: tensors by name, on the CPU, and their description.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    ValueError
        If it is not of `save_tensors`, was cut off, or does not have its checksum.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of tensors at {path}; there is none")
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(META_KEY)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as tensors ({error}): it was cut off, damaged, or is another "
            "kind of file. Remove it, and make it again"
        ) from error
    about = _read_about(about)
    if about.get("format") != TENSORS_FORMAT:
        raise ValueError(
            f"{path} was not written by this version of upweight: expected tensors of format "
            f"{TENSORS_FORMAT}; got {about.get('format', 'none')}. Make it again"
        )
    if _checksum(found, str(about.get("meta"))) != about.get("blake2b"):
        raise ValueError(
            f"{path} does not have its checksum: it was changed or damaged on disk. Remove it, and "
            "make it again"
        )
    return found, json.loads(about["meta"])


def _read_about(text: str | None) -> dict[str, Any]:
    try:
        about = json.loads(text or "{}")
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Sink(Protocol):
    """A matrix (m, n, …) that is filled block by block."""

    def write(self, rows: slice, columns: slice, block: Tensor) -> None:
        """Set the block at these test rows and training columns."""
        ...

    def finish(self) -> Any:
        """The whole: a tensor, or an array that is read lazily."""
        ...


class ArraySink:
    """A matrix in memory."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._values = torch.empty(tuple(shape), dtype=dtype)

    def write(self, rows: slice, columns: slice, block: Tensor) -> None:
        """Set the block at these test rows and training columns."""
        self._values[rows, columns] = block.to("cpu", self._values.dtype)

    def finish(self) -> Tensor:
        """The tensor."""
        return self._values


class ZarrSink:
    """A matrix in a zarr array on disk; only the chunks at hand are in memory."""

    # About 8 MB a chunk in float64, long in the training rows: that is how they are read.
    CHUNK = (256, 4096)
    NUMBERS = 256 * 4096
    # Columns that wait for the rest of their chunk take no more than this.
    HELD_BYTES = 2**26

    def __init__(
        self, path: str | os.PathLike[str], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        import zarr

        kind = np.dtype(str(dtype).removeprefix("torch."))
        chunks = self._chunks(shape)
        # Scores hardly compress, and reading uncompressed chunks is a plain copy.
        self._array = zarr.create_array(
            store=os.fspath(path), shape=tuple(shape), chunks=chunks, dtype=kind, compressors=None
        )
        self._held: list[np.ndarray] = []
        self._rows, self._first, self._next = slice(0, 0), 0, 0

    @classmethod
    def _chunks(cls, shape: Sequence[int]) -> tuple[int, ...]:
        """Fewer rows in a chunk where every pair has many numbers (``mode="perturbation"``)."""
        pairs = max(1, cls.NUMBERS // max(1, math.prod(shape[2:])))
        columns = min(cls.CHUNK[1], shape[1], pairs)
        return (min(cls.CHUNK[0], shape[0], max(1, pairs // columns)), columns, *shape[2:])

    def write(self, rows: slice, columns: slice, block: Tensor) -> None:
        """Set the block at these test rows and training columns.

        Neighbours wait for each other up to the end of a chunk of columns: to change a part of a
        chunk, zarr reads and writes all of it.
        """
        if self._held and (rows != self._rows or columns.start != self._next):
            self._flush(self._next)
        if not self._held:
            self._rows, self._first = rows, columns.start
        self._held.append(block.cpu().numpy().astype(self._array.dtype, copy=False))
        self._next = columns.stop
        width = self._array.chunks[1]
        if self._next == self._array.shape[1] or sum(b.nbytes for b in self._held) >= (
            self.HELD_BYTES
        ):
            self._flush(self._next)
        elif self._next // width > self._first // width:
            self._flush(self._next // width * width)

    def _flush(self, stop: int) -> None:
        """Write what is held of the columns before `stop`."""
        whole = np.concatenate(self._held, axis=1)
        self._array[self._rows, self._first : stop] = whole[:, : stop - self._first]
        rest = whole[:, stop - self._first :]
        self._held, self._first = ([rest.copy()] if rest.shape[1] else []), stop

    def finish(self) -> Any:
        """The zarr array."""
        if self._held:
            self._flush(self._next)
        return self._array
