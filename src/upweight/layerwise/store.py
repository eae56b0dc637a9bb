"""Gradients of training rows on disk, so that later questions need no pass through the model.

A store holds, for every block, what meets a test row, in the eigenbasis of the curvature: the
gradient itself (o·i numbers a row), or the sides (s·(o + i)) where they are less than half of it,
since they have to be multiplied out for every question. With `rank`
only the leading eigenvectors of each side are kept, which is a projection of the gradients onto the
directions that the data has most of.

Letters: n rows, b rows in a chunk, q groups, s positions, o outputs and i columns, r kept ones.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from upweight.curvature import KroneckerInverse
from upweight.layerwise.checking import check_sides
from upweight.layerwise.holding import Frames
from upweight.layerwise.sides import LayerGradients, Sides
from upweight.risk import CHUNK_BYTES, EmpiricalRisk
from upweight.rows import Rows
from upweight.shards import digest_rows
from upweight.stream import atomic_directory

__all__ = ["GradientStore", "Precision", "write_gradients"]

FORMAT = 1
Precision = Literal["float32", "float64", "float16", "bfloat16"]
KINDS = {
    "float32": (np.dtype("float32"), torch.float32),
    "float64": (np.dtype("float64"), torch.float64),
    "float16": (np.dtype("float16"), torch.float16),
    "bfloat16": (np.dtype("int16"), torch.bfloat16),  # numpy has no name for it
}


@dataclass(frozen=True)
class Span:
    """Rows start … stop - 1."""

    start: int
    stop: int


@dataclass(frozen=True)
class _Layout:
    """How the rows of one block lie on disk."""

    name: str
    formed: bool
    shape: tuple[int, int, int, int]  # (q, s, o, i)

    @property
    def files(self) -> dict[str, tuple[int, ...]]:
        """The shape of a row in each file."""
        q, s, o, i = self.shape
        if self.formed:
            return {"gradient": (q, o, i)}
        return {"left": (q, s, o), "right": (q, s, i)}

    def sides(self, parts: dict[str, Tensor]) -> Sides:
        """What was read, as sides."""
        if self.formed:
            return Sides(parts["gradient"].flatten(1)[:, None, None])
        return Sides(parts["left"], parts["right"])


class GradientStore:
    """Gradients of n rows by blocks, memory-mapped.

    Attributes
    ----------
    path
        The folder.
    names
        One for each row.
    nbytes
        On disk.
    kept
        The share of Σ (Λ/(Λ + λ))² that lies in the kept directions; 1 where all are kept.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        meta = _read_meta(self.path)
        self.meta = meta
        self.names = pd.Index(pd.read_parquet(self.path / "rows.parquet")["name"], name="row")
        self.rank: int | None = meta["rank"]
        self.kept = float(meta["kept"])
        self._rows = slice(0, len(self.names))
        self._device = torch.device("cpu")
        self._layouts = [
            _Layout(one["name"], one["formed"], tuple(one["shape"])) for one in meta["blocks"]
        ]
        self._maps = [self._open(at, layout) for at, layout in enumerate(self._layouts)]
        self.dtype: torch.dtype = getattr(torch, meta["dtype"])

    def __len__(self) -> int:
        return self._rows.stop - self._rows.start

    @property
    def n(self) -> int:
        """The number of rows."""
        return len(self)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.nbytes for maps in self._maps for part in maps.values())

    def _open(self, at: int, layout: _Layout) -> dict[str, np.ndarray]:
        kind, _ = KINDS[self.meta["precision"]]
        found: dict[str, np.ndarray] = {}
        for part, shape in layout.files.items():
            path = self.path / _file(at, part)
            whole = (len(self.names), *shape)
            size = path.stat().st_size if path.is_file() else 0
            if size != int(np.prod(whole)) * kind.itemsize:
                raise ValueError(
                    f"{path} has {size} bytes, expected {int(np.prod(whole)) * kind.itemsize}: the "
                    "store is damaged. Write it again"
                )
            # "c": private to this process. What may not be written to, torch takes with a warning
            found[part] = np.memmap(path, dtype=kind, mode="c", shape=whole)
        return found

    def frames(self, inverse: KroneckerInverse) -> Frames:
        """The coordinates of these rows, for the curvature that they were written with."""
        wanted = self.meta["curvature"]
        if (found := inverse.curvature.fingerprint()) != wanted:
            raise ValueError(
                f"{self.path} was written with another curvature ({wanted[:12]}…) than this one "
                f"({found[:12]}…): another model, other training rows or other settings of the "
                "method. Fit in the same way, or write the store again"
            )
        whole = leading_frames(inverse, self.rank)
        return Frames(
            whole.bases, whole.weights, whole.values, True, [one.formed for one in self._layouts]
        )

    def check_rows(self, rows: Rows) -> None:
        """Refuse rows of a fit that have changed since, as corrected labels have.

        Raises
        ------
        ValueError
            If the gradients here are those of the rows before.
        """
        if self.meta["content"] is not None and digest_rows(rows) != self.meta["content"]:
            raise ValueError(
                f"{self.path} holds gradients of the rows of an earlier fit(), whose content was "
                "another: labels, or features. Write the store again"
            )

    def first(self, rows: int) -> GradientStore:
        """The first few rows alone."""
        return self.part(slice(0, min(rows, len(self))))

    def part(self, rows: slice) -> GradientStore:
        """Consecutive rows alone; positions begin at 0."""
        other = object.__new__(GradientStore)
        other.__dict__.update(self.__dict__)
        start = self._rows.start
        other._rows = slice(start + rows.start, start + rows.stop)
        other.names = self.names[rows]
        return other

    def on(self, device: torch.device) -> GradientStore:
        """The same, with sides on another device."""
        other = object.__new__(GradientStore)
        other.__dict__.update(self.__dict__)
        other._device = device
        return other

    def chunks(self, row_bytes: float = 0.0) -> Iterator[tuple[Span, Sequence[Sides | None]]]:
        """All rows in order, with the sides of every block, read one block at a time."""
        largest = max(sum(map(math.prod, one.files.values())) for one in self._layouts)
        own = 3.0 * largest * self.dtype.itemsize
        size = max(1, int(CHUNK_BYTES / (own + row_bytes)))
        for start in range(0, len(self), size):
            span = Span(start, min(start + size, len(self)))
            yield span, _Stored(self, span)

    def read(self, block: int, rows: Span) -> Sides:
        """The sides of one block."""
        kind = KINDS[self.meta["precision"]][1]
        at = slice(self._rows.start + rows.start, self._rows.start + rows.stop)
        parts = {
            part: torch.from_numpy(stored[at]).view(kind).to(self._device, self.dtype)
            for part, stored in self._maps[block].items()
        }
        return self._layouts[block].sides(parts)

    def __repr__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank} ({100 * self.kept:.1f} % kept)"
        return (
            f"<GradientStore of {len(self)} rows at {self.path}: {self.nbytes / 2**20:,.1f} MiB in "
            f"{self.meta['precision']}{rank}>"
        )


class _Stored(Sequence["Sides | None"]):
    """The blocks of some rows, each read when it is asked for."""

    def __init__(self, store: GradientStore, rows: Span) -> None:
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._store.meta["blocks"])

    @overload
    def __getitem__(self, at: int) -> Sides: ...

    @overload
    def __getitem__(self, at: slice) -> list[Sides]: ...

    def __getitem__(self, at: int | slice) -> Sides | list[Sides]:
        if isinstance(at, slice):
            return [self[index] for index in range(len(self))[at]]
        if not 0 <= at < len(self):
            raise IndexError(at)
        return self._store.read(at, self._rows)


def write_gradients(
    path: str | os.PathLike[str],
    inverse: KroneckerInverse,
    risk: EmpiricalRisk,
    *,
    precision: Precision = "float32",
    rank: int | None = None,
    of_fit: bool = False,
) -> GradientStore:
    """Pass the rows through the model once, and keep what meets test rows.

    Raises
    ------
    FileExistsError
        If something is at `path`.
    ValueError
        If the precision or the rank is none, or rows come with different numbers of positions.
    """
    if precision not in KINDS:
        raise ValueError(f"expected a precision among {', '.join(KINDS)}; got {precision!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"expected a rank of at least 1, or None for all; got {rank!r}")
    frames = leading_frames(inverse, rank)
    with atomic_directory(path) as folder:
        writer: _Writer | None = None
        source = LayerGradients(inverse.curvature, risk)
        with tqdm(total=risk.n, desc="gradients", delay=2, disable=None, leave=False) as bar:
            for chunk, sides in source.chunks():
                check_sides(sides, chunk.start, "training")
                if writer is None:
                    writer = _Writer(
                        folder, inverse, frames, sides, rows=risk.n, precision=precision
                    )
                writer.write(chunk.start, sides)
                bar.update(len(chunk))
        assert writer is not None  # there is at least one row
        pd.DataFrame({"name": risk.rows.names}).to_parquet(folder / "rows.parquet")
        meta = {
            "format": FORMAT,
            "curvature": inverse.curvature.fingerprint(),
            "content": digest_rows(risk.rows) if of_fit else None,
            "dtype": str(risk.dtype).removeprefix("torch."),
            "precision": precision,
            "rank": rank,
            "kept": _kept(inverse, frames),
            "blocks": writer.described(),
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
    return GradientStore(path)


def leading_frames(inverse: KroneckerInverse, rank: int | None) -> Frames:
    """The eigenvectors of each side with the largest eigenvalues."""
    whole = Frames.of(inverse)
    if rank is None:
        return whole
    bases: list[tuple[Tensor | None, Tensor | None]] = []
    weights: list[Tensor] = []
    values: list[Tensor] = []
    for (left, right), weight, lam in zip(whole.bases, whole.weights, whole.values, strict=True):
        if left is None or right is None:
            bases.append((left, right))
            weights.append(weight)
            values.append(lam)
            continue
        bases.append((left[..., -rank:], right[..., -rank:]))  # eigenvalues ascend
        weights.append(weight[:, -rank:, -rank:].contiguous())
        values.append(lam[:, -rank:, -rank:].contiguous())
    return Frames(bases, weights, values, whole.turned, whole.formed)


def _kept(inverse: KroneckerInverse, frames: Frames) -> float:
    def total(some: Frames) -> float:
        pairs = zip(some.values, some.weights, strict=True)
        return sum(float((lam * weight).double().square().sum()) for lam, weight in pairs)

    whole = total(Frames.of(inverse))
    return total(frames) / whole if whole else 1.0


class _Writer:
    """Files that are filled chunk by chunk."""

    def __init__(
        self,
        folder: Path,
        inverse: KroneckerInverse,
        frames: Frames,
        sides: Sequence[Sides | None],
        *,
        rows: int,
        precision: Precision,
    ) -> None:
        self._frames = frames
        self._kind, self._torch = KINDS[precision]
        self._layouts: list[_Layout] = []
        self._maps: list[dict[str, np.ndarray]] = []
        for at, (block, own) in enumerate(zip(inverse.curvature.blocks, sides, strict=True)):
            q, o, i = frames.weights[at].shape
            s = 1 if own is None else own.positions
            formed = own is None or own.right is None or o * i <= 2 * s * (o + i)
            layout = _Layout(block.name, formed, (q, s, o, i))
            self._layouts.append(layout)
            self._maps.append(
                {
                    part: np.memmap(
                        folder / _file(at, part), dtype=self._kind, mode="w+", shape=(rows, *shape)
                    )
                    for part, shape in layout.files.items()
                }
            )

    def write(self, start: int, sides: Sequence[Sides | None]) -> None:
        """Set rows from `start` on."""
        for at, (layout, own) in enumerate(zip(self._layouts, sides, strict=True)):
            if own is None:
                continue  # what is not written is zero
            rotated = own.rotated(*self._frames.bases[at])
            rows = slice(start, start + len(own))
            if layout.formed:
                self._set(at, "gradient", rows, rotated.formed())
                continue
            if own.positions != layout.shape[1]:
                raise ValueError(
                    f"expected rows with {layout.shape[1]} positions in {layout.name}, as the "
                    f"first have; rows {start} to {rows.stop - 1} have {own.positions}. Pad all "
                    "rows to the same length"
                )
            assert rotated.right is not None
            self._set(at, "left", rows, rotated.left)
            self._set(at, "right", rows, rotated.right)

    def _set(self, at: int, part: str, rows: slice, values: Tensor) -> None:
        stored = values.to("cpu", self._torch)
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(
                f"gradients of {self._layouts[at].name} in rows {rows.start} to {rows.stop - 1} "
                f"are not finite in {str(self._torch)[6:]}: use bfloat16 or float32"
            )
        if self._torch == torch.bfloat16:
            stored = stored.view(torch.int16)
        self._maps[at][part][rows] = stored.numpy()

    def described(self) -> list[dict[str, Any]]:
        """The layouts, after all is on disk."""
        for maps in self._maps:
            for part in maps.values():
                part.flush()  # type: ignore[attr-defined]
        return [
            {"name": one.name, "formed": one.formed, "shape": list(one.shape)}
            for one in self._layouts
        ]


def _file(at: int, part: str) -> str:
    return f"block-{at:04d}.{part}.bin"


def _read_meta(path: Path) -> dict[str, Any]:
    if not (path / "meta.json").is_file():
        raise FileNotFoundError(f"no gradients at {path}: expected a directory with meta.json")
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    if meta.get("format") != FORMAT or "curvature" not in meta:
        raise ValueError(
            f"{path} holds no gradients of format {FORMAT}, which this version reads; got format "
            f"{meta.get('format')}"
        )
    return meta
