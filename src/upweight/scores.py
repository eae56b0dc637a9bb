"""Influence scores with row names, the meaning of their sign, and where they come from.

A score is positive where the training row helps: up-weighting it lowers the test loss.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from upweight import grouping
from upweight.stream import ZarrSink, atomic_directory

__all__ = ["SIGN", "RowScores", "Scores", "meaning_of"]

FORMAT = 1
BLOCK_NUMBERS = 2**25


def meaning_of(provenance: dict[str, Any], ndim: int = 2) -> str:
    """What a positive and a negative score say, of what was measured of the test rows."""
    measured = str(provenance.get("test_loss", "loss"))
    better, worse = ("raises", "lowers") if measured == "margin" else ("lowers", "raises")
    of_what = f"the test {measured}" if measured in ("loss", "margin") else f"test {measured}"
    if ndim == 2:
        return (
            f"positive = the training row helps (up-weighting it {better} {of_what}), negative = "
            "it harms"
        )
    return (
        f"positive = increasing this feature of the training row {better} {of_what}, negative = "
        f"{worse} it"
    )


SIGN = meaning_of({})


class RowScores:
    """One score per training row: a mean over test rows, or a self-influence.

    Parameters
    ----------
    values
        (n,), or (n, ...x) for ``mode="perturbation"``.
    names
        The n names of the training rows.
    provenance
        How the scores came about: method, curvature, damping, mode, versions, certificate.
    meaning
        What a positive and a negative value say.

    Examples
    --------
    >>> import pandas as pd, torch
    >>> scores = RowScores(torch.tensor([0.5, -2.0, 0.1]), pd.Index(["a", "b", "c"]))
    >>> scores.top(1, harmful=True)
      row  score  rank
    0   b   -2.0     1
    """

    def __init__(
        self,
        values: Tensor,
        names: pd.Index,
        provenance: dict[str, Any] | None = None,
        meaning: str = SIGN,
    ) -> None:
        self.values = values
        self.names = names
        self.provenance = provenance or {}
        self.meaning = meaning

    def top(self, k: int = 10, *, harmful: bool = False) -> pd.DataFrame:
        """The k highest scores, or with ``harmful=True`` the k lowest, as row, score, rank."""
        values = _ranked_values(self.values, 1)[None]
        frame = grouping.ranked("of", pd.Index([0]), self.names, values, k=k, harmful=harmful)
        return frame.drop(columns="of").rename(columns={"train_row": "row"})

    def group(self, labels: Any) -> pd.DataFrame:
        """The scores of groups of training rows, such as classes, sources or clusters.

        Parameters
        ----------
        labels
            One label a row; see `Scores.group`.

        Returns
        -------
        DataFrame
            A line for every group: ``sum``, ``mean``, ``count``, and ``negative``, the share of its
            rows with a score below zero.

        Examples
        --------
        >>> scores = RowScores(torch.tensor([0.5, -2.0, 1.0]), pd.Index(["a", "b", "c"]))
        >>> scores.group(["web", "web", "book"])
               sum  mean  count  negative
        group
        book   1.0  1.00      1       0.0
        web   -1.5 -0.75      2       0.5
        """
        values = _ranked_values(self.values, 1)
        return grouping.group_values(values, grouping.make_groups(labels, self.names, "training"))

    def to_frame(self) -> pd.DataFrame:
        """One line per training row; one column ``score``, or one per feature."""
        values = self.values.reshape(len(self.values), -1).numpy()
        columns = ["score"] if self.values.ndim == 1 else range(values.shape[1])
        return pd.DataFrame(values, index=self.names, columns=pd.Index(columns))

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values.numpy(), dtype=dtype)

    def __repr__(self) -> str:
        n, *features = self.values.shape
        shape = f"{n} training rows" + "".join(f" × {size}" for size in features)
        shape += " features" if features else ""
        lines = [f"<RowScores of {shape}{_told(self.provenance)}>", self.meaning]
        if self.values.ndim == 1:
            k = min(3, len(self))
            lines.append("lowest:  " + _few(self.top(k, harmful=True)))
            lines.append("highest: " + _few(self.top(k)))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        caption = (
            f"{html.escape(_told(self.provenance).strip(' ,'))}<br>{html.escape(self.meaning)}"
        )
        if self.values.ndim != 1:
            return f"<p>RowScores {tuple(self.values.shape)}<br>{caption}</p>"
        return f"<p>{caption}</p>" + self.top(10, harmful=True).to_html(index=False, escape=True)


class Scores:
    """Influence of n training rows on m test rows.

    Parameters
    ----------
    values
        (m, n), or (m, n, ...x) for ``mode="perturbation"``: a tensor, or a zarr array on disk.
    test_names, train_names
        m and n row names.
    provenance
        How the scores came about: method, curvature, damping, mode, versions, certificate.

    Notes
    -----
    ``values[j, i]`` is g_test[j]ᵀ (C + λI)⁻¹ g_train[i]: positive where row i helps test row j.
    Leaving row i out of n training rows changes the loss of test row j by about ``values[j, i] /
    n``.

    Examples
    --------
    >>> import pandas as pd, torch
    >>> names = pd.Index(["a", "b"])
    >>> scores = Scores(torch.tensor([[1.0, -3.0], [2.0, 1.0]]), pd.Index(["t", "u"]), names)
    >>> scores.mean().values
    tensor([ 1.5000, -1.0000])
    >>> scores.top(1)
      test_row train_row  score  rank
    0        t         a    1.0     1
    1        u         a    2.0     1
    """

    def __init__(
        self,
        values: Any,
        test_names: pd.Index,
        train_names: pd.Index,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        expected = (len(test_names), len(train_names))
        if tuple(values.shape[:2]) != expected:
            raise ValueError(
                f"expected values of shape {expected} for these names; got {tuple(values.shape)}"
            )
        self.values = values
        self.test_names = test_names
        self.train_names = train_names
        self.provenance = provenance or {}

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n, …)."""
        return tuple(int(s) for s in self.values.shape)

    @property
    def meaning(self) -> str:
        """What a positive and a negative score say."""
        return meaning_of(self.provenance, len(self.shape))

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Values of consecutive test rows in memory: (first test row, (b, n, …)).

        By default as many rows at once, at most 256, as keep a block below 32 million numbers.
        """
        rows = rows or max(1, min(256, BLOCK_NUMBERS // max(1, math.prod(self.shape[1:]))))
        for start in range(0, self.shape[0], rows):
            block = self.values[start : start + rows]
            yield start, block if isinstance(block, Tensor) else torch.from_numpy(np.asarray(block))

    def mean(self) -> RowScores:
        """The mean over test rows: one score per training row, low where it harms on average."""
        total = sum(block.to(torch.float64).sum(0) for _, block in self.blocks())
        assert isinstance(total, Tensor)
        dtype = next(self.blocks(1))[1].dtype
        mean = (total / self.shape[0]).to(dtype)
        return RowScores(
            mean, self.train_names, {**self.provenance, "reduced": "mean"}, self.meaning
        )

    def top(self, k: int = 10, *, harmful: bool = False, by: Any = None) -> pd.DataFrame:
        """For every test row the k training rows that help it (``harmful=True``: harm it) most.

        Parameters
        ----------
        k, harmful
            How many, and from which end.
        by
            A label for every test row, as in `group`: the training rows that help or harm the rows
            with one label most on average.

        Returns
        -------
        DataFrame
            Columns ``test_row``, or ``group`` with `by`; ``train_row``, ``score``, ``rank`` from 1.
        """
        options: Any = {"k": k, "harmful": harmful}
        if by is not None:
            groups = grouping.make_groups(by, self.test_names, "test")
            means = grouping.grouped_mean(self._ranked_blocks(), groups)
            return grouping.ranked("group", groups.names, self.train_names, means, **options)
        frames = [
            grouping.ranked(
                "test_row", self.test_names[at : at + len(b)], self.train_names, b, **options
            )
            for at, b in self._ranked_blocks()
        ]
        return pd.concat(frames, ignore_index=True)

    def group(
        self, train: Any, test: Any = None, *, reduce: grouping.Reduce = "sum"
    ) -> pd.DataFrame:
        """The influence of groups of training rows: S[j, g] = Σ_{i in g} I[j, i].

        Leaving group g out raises the loss of test row j by about S[j, g] / n, to first order: the
        smaller the group, the truer.

        Parameters
        ----------
        train
            One label for every training row, by position; a Series that is indexed by the names of
            the rows, by name. Rows without one (None, NaN) are the group ``"(missing)"``.
        test
            One label for every test row: the mean over the test rows of each label.
        reduce
            ``"sum"`` over the training rows of a group, or ``"mean"``.

        Returns
        -------
        DataFrame
            Test rows or their groups down, groups of training rows across. The numbers of rows by
            group are in ``attrs["train_rows"]`` and ``attrs["test_rows"]``.

        Examples
        --------
        >>> values = torch.tensor([[1.0, -3.0, 0.5], [2.0, 1.0, -0.5]])
        >>> scores = Scores(values, pd.Index(["t", "u"]), pd.Index(["a", "b", "c"]))
        >>> frame = scores.group(["web", "web", "book"])
        >>> frame
        group  book  web
        t       0.5 -2.0
        u      -0.5  3.0
        >>> frame.attrs["train_rows"]
        {'book': 1, 'web': 2}
        """
        groups = grouping.make_groups(train, self.train_names, "training")
        own = None if test is None else grouping.make_groups(test, self.test_names, "test")
        return grouping.group_scores(self._ranked_blocks(), groups, own, self.test_names, reduce)

    def _ranked_blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start, block in self.blocks():
            yield start, _ranked_values(block, 2)

    def to_frame(self) -> pd.DataFrame:
        """Test rows down, training rows across."""
        values = _ranked_values(torch.cat([b for _, b in self.blocks()]), 2)
        return pd.DataFrame(values.numpy(), index=self.test_names, columns=self.train_names)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(np.asarray(self.values[:]), dtype=dtype)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a directory with ``values`` (zarr), the names (parquet) and ``meta.json``."""
        with atomic_directory(path) as folder:
            dtype = next(self.blocks(1))[1].dtype
            sink = ZarrSink(folder / "values", self.shape, dtype)
            for start, block in self.blocks():
                sink.write(slice(start, start + len(block)), slice(0, self.shape[1]), block)
            write_meta(folder, self.test_names, self.train_names, self.provenance)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Open what `save` or ``scores(…, to=path)`` has written; values are read lazily."""
        import zarr

        folder = Path(path)
        if not (folder / "meta.json").is_file():
            partial = folder.with_name(f".{folder.name}.partial")
            rest = (
                f"; {partial.name} has unfinished ones, with which the call that began them goes on"
            )
            raise FileNotFoundError(
                f"no scores at {folder}: expected a directory with meta.json"
                f"{rest if partial.exists() else ''}"
            )
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta.get("format") != FORMAT:
            raise ValueError(
                f"{folder} has scores of format {meta.get('format')}; this version reads {FORMAT}"
            )
        return cls(
            zarr.open_array(store=os.fspath(folder / "values"), mode="r"),
            _read_names(folder / "test.parquet"),
            _read_names(folder / "train.parquet"),
            meta["provenance"],
        )

    def __repr__(self) -> str:
        m, n = self.shape[:2]
        where = "" if isinstance(self.values, Tensor) else ", on disk"
        what = f"<Scores of {n} training rows on {m} test rows{_told(self.provenance)}{where}>"
        return f"{what}\n{self.meaning}"

    def _repr_html_(self) -> str:
        m, n = self.shape[:2]
        told = f"{n} training rows on {m} test rows{_told(self.provenance)}"
        head = f"<p>{html.escape(told)}<br>{html.escape(self.meaning)}</p>"
        if len(self.shape) > 2:
            return head
        return (
            head
            + "<p>Most harmful on average:</p>"
            + self.mean().top(10, harmful=True).to_html(index=False, escape=True)
        )


def write_meta(
    folder: Path, test_names: pd.Index, train_names: pd.Index, provenance: dict[str, Any]
) -> None:
    """Names and provenance beside the values, as `Scores.load` reads them."""
    for name, index in (("test", test_names), ("train", train_names)):
        # A column of a table has one type, an index may have several, or one that no table knows.
        path = folder / f"{name}.parquet"
        try:
            if index.inferred_type.startswith("mixed"):
                raise TypeError
            pd.DataFrame({"name": index}).to_parquet(path)
        except (TypeError, ValueError, OverflowError, NotImplementedError):
            pd.DataFrame({"name": [str(n) for n in index]}).to_parquet(path)
    sign = meaning_of(provenance, 3 if provenance.get("mode") == "perturbation" else 2)
    meta = {"format": FORMAT, "sign": sign, "provenance": provenance}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _read_names(path: Path) -> pd.Index:
    return pd.Index(pd.read_parquet(path)["name"], name="row")


def _ranked_values(values: Tensor, ndim: int) -> Tensor:
    if values.ndim != ndim:
        raise ValueError(
            "scores of mode='perturbation' have one number per feature, so rows have no rank; "
            "reduce the features first, as in values.abs().sum(-1): got shape "
            f"{tuple(values.shape)}"
        )
    return values


def _told(provenance: dict[str, Any]) -> str:
    """', mode up, direct on ggn, damping 0.1' — as much of it as is known."""
    parts = [f"mode {provenance['mode']}"] if "mode" in provenance else []
    if "method" in provenance:
        curvature = f" on {provenance['curvature']}" if "curvature" in provenance else ""
        parts.append(f"{provenance['method']}{curvature}")
    if "damping" in provenance:
        damping = provenance["damping"]
        parts.append(
            f"damping {damping:g}"
            if isinstance(damping, int | float)
            else "damping by block: " + ", ".join(f"{k} {v:g}" for k, v in damping.items())
        )
    return "".join(f", {part}" for part in parts)


def _few(top: pd.DataFrame) -> str:
    return ", ".join(f"{r} ({s:.3g})" for r, s in zip(top["row"], top["score"], strict=True))
