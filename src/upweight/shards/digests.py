"""Digests of rows and of their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

__all__ = ["digest_batches", "digest_names", "digest_rows"]

# Rows of a batch of which a digest is made. Another number makes other digests.
DIGEST_ROWS = 256


def digest_batches(batches: Iterable[Any]) -> str:
    """A digest of the content of rows, which come as batches: pytrees of tensors.

    It depends on where the batches are cut, so that they should always be cut alike.

    Examples
    --------
    >>> x = torch.arange(4.0)
    >>> digest_batches([(x, x > 1)]) == digest_batches([(x.clone(), x > 1)])
    True
    >>> digest_batches([(x, x > 1)]) == digest_batches([(x, x > 2)])
    False
    """
    found = hashlib.blake2b(digest_size=16)
    for batch in batches:
        for path, leaf in tree_flatten_with_path(batch)[0]:
            found.update("".join(map(str, path)).encode())
            if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
                leaf = torch.from_numpy(np.ascontiguousarray(leaf))
            if isinstance(leaf, Tensor):
                found.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
                flat = leaf.detach().contiguous().reshape(-1).cpu()
                found.update(flat.view(torch.uint8).numpy().data)
            elif isinstance(leaf, str | bytes | bool | int | float | None):
                found.update(repr(leaf).encode())
            else:  # its repr may be its address, which is another in every process
                found.update(type(leaf).__qualname__.encode())
    return found.hexdigest()


class Batched(Protocol):
    """Rows that can be taken some at a time."""

    def __len__(self) -> int: ...

    def batch(self, start: int, stop: int) -> Any:
        """Rows start … stop - 1."""
        ...


def digest_rows(rows: Batched, share: slice | None = None) -> str:
    """A digest of the content of all rows, or a share, cut into batches that are always alike."""
    share = share or slice(0, len(rows))
    starts = range(share.start, share.stop, DIGEST_ROWS)
    return digest_batches(rows.batch(at, min(at + DIGEST_ROWS, share.stop)) for at in starts)


def digest_names(names: Iterable[Any]) -> str:
    """A digest of names, by how they are written."""
    found = hashlib.blake2b(digest_size=16)
    for name in names:
        found.update(f"{type(name).__name__} {name!r}\n".encode())
    return found.hexdigest()
