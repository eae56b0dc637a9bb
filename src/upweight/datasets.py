"""Small real data sets for examples and tests, and a way to spoil their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Split", "flip_labels", "load_wine"]


@dataclass(frozen=True)
class Split:
    """A table in three parts, features scaled to [0, 1] over the training part.

    Attributes
    ----------
    train, validation, test
        ``(x, y)``: x (rows, features) float32, y (rows,) int64.
    train_rows, validation_rows, test_rows
        The positions of the rows in the original table.
    feature_names, class_names
        As the table has them.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    train_rows: np.ndarray
    validation_rows: np.ndarray
    test_rows: np.ndarray
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]


def load_wine(train: float = 0.6, test: float = 0.3, *, seed: int = 0) -> Split:
    """178 bottles of wine: 13 measurements each, from one of 3 cultivars.

    Parameters
    ----------
    train, test
        Shares of the rows; the rest is for validation. Classes keep their shares in every part.
    seed
        Of the split.

    Returns
    -------
    Split
        106, 18 and 54 rows by default.

    Notes
    -----
    The table is part of scikit-learn (``sklearn.datasets.load_wine``). Min-max scaling is fitted
    on the training part alone, so features of the other parts may leave [0, 1].

    Examples
    --------
    >>> wine = load_wine()
    >>> [len(x) for x, y in (wine.train, wine.validation, wine.test)]
    [106, 18, 54]
    """
    from sklearn.datasets import load_wine as load
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import MinMaxScaler

    if train <= 0 or test <= 0 or train + test >= 1:
        raise ValueError(
            f"expected positive shares with train + test < 1; got train={train}, test={test}"
        )
    bunch: Any = load()
    features, labels = np.asarray(bunch.data), np.asarray(bunch.target)
    everything = np.arange(len(labels))
    rest, test_rows = map(
        np.asarray,
        train_test_split(everything, test_size=test, random_state=seed, stratify=labels),
    )
    count = int(train * len(labels))
    train_rows, validation_rows = map(
        np.asarray,
        train_test_split(rest, train_size=count, random_state=seed, stratify=labels[rest]),
    )
    scaler = MinMaxScaler().fit(features[train_rows])

    def part(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        scaled = scaler.transform(features[rows])
        return torch.tensor(scaled, dtype=torch.float32), torch.tensor(labels[rows])

    return Split(
        train=part(train_rows),
        validation=part(validation_rows),
        test=part(test_rows),
        train_rows=train_rows,
        validation_rows=validation_rows,
        test_rows=test_rows,
        feature_names=tuple(str(name) for name in bunch.feature_names),
        class_names=tuple(str(name) for name in bunch.target_names),
    )


def flip_labels(
    labels: Tensor,
    count: int | None = None,
    *,
    rows: Sequence[int] | None = None,
    classes: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Give some rows the next label, (y + 1) mod c.

    Parameters
    ----------
    labels
        (n,) integers from 0.
    count
        How many rows, drawn at random with `seed`; or give
    rows
        their positions.
    classes
        c; default: the largest label plus one.
    seed
        Of the draw.

    Returns
    -------
    labels : Tensor
        A changed copy, (n,).
    flipped : Tensor
        The positions of the changed rows, ascending.

    Examples
    --------
    >>> labels, flipped = flip_labels(torch.tensor([0, 1, 2, 0]), rows=[1, 2])
    >>> labels, flipped
    (tensor([0, 2, 0, 0]), tensor([1, 2]))
    """
    if (count is None) == (rows is None):
        raise ValueError("expected either count or rows to say which labels to flip")
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"expected integer labels of shape (n,); got {str(labels.dtype)[6:]} "
            f"{tuple(labels.shape)}"
        )
    if count is not None:
        if not 0 <= count <= len(labels):
            raise ValueError(f"expected a count from 0 to {len(labels)}; got {count}")
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(labels), generator=generator)[:count]
    else:
        chosen = torch.as_tensor(rows, dtype=torch.int64)
    c = int(labels.max()) + 1 if classes is None else classes
    if c < 2:
        raise ValueError(f"expected at least two classes to flip between; got {c}")
    flipped = chosen.sort().values
    changed = labels.clone()
    changed[flipped] = (labels[flipped] + 1) % c
    return changed, flipped
