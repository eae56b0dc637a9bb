"""A set of training rows → a number: what every value in this package is a function of."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.valuation.cache import UtilityCache
from upweight.valuation.checks import count

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Chained",
    "Evaluated",
    "FunctionUtility",
    "Utility",
    "UtilityError",
    "each",
    "row_names",
]


class UtilityError(RuntimeError):
    """The utility of a set could not be computed."""


@dataclass(frozen=True, eq=False)
class Evaluated:
    """Utilities of M sets.

    Attributes
    ----------
    values
        (M,) NaN where a set failed.
    errors
        Why, by the position of the set.
    """

    values: NDArray[np.float64]
    errors: dict[int, str] = field(default_factory=dict)


class Utility(ABC):
    """A set of rows → a number, such as the score on other rows of a model trained on the set.

    Attributes
    ----------
    n
        Rows there are.
    names
        Their n names, each of them once.
    cache
        Where utilities that were computed are kept.
    fingerprint
        A digest of all that utilities depend on but the set: the same text means the same
        utilities, in any process. None if that is not known; then nothing goes to disk.
    prefer
        What runs side by side: ``"threads"`` where Python's lock is released, or ``"processes"``.
    """

    n: int
    names: pd.Index
    cache: UtilityCache
    prefer: Literal["threads", "processes"] = "processes"

    @property
    @abstractmethod
    def fingerprint(self) -> str | None:
        """See above."""

    @abstractmethod
    def evaluate(self, masks: NDArray[np.bool_]) -> Evaluated:
        """Utilities of sets, without a look at the cache.

        Parameters
        ----------
        masks
            (M, n) True where a row is in the set. The utility of a set does not depend on which
            other sets are asked for with it.

        Returns
        -------
        Evaluated
        """

    def __getstate__(self) -> dict[str, Any]:
        # Workers return what they compute; what is known already need not travel.
        return {**self.__dict__, "cache": UtilityCache()}

    def __call__(self, rows: ArrayLike) -> float:
        """The utility of one set.

        Parameters
        ----------
        rows
            Positions of rows, 0 to n − 1, each once; or a mask, (n,) truth values.

        Raises
        ------
        ValueError
            If `rows` are neither.
        UtilityError
            If it could not be computed.
        """
        mask = _mask(rows, self.n)[None]
        keys = self.cache.keys(mask)
        problem = self.problem
        known = self.cache.get(problem, keys)
        if np.isnan(known[0]):
            found = self.evaluate(mask)
            if np.isnan(found.values[0]):
                raise UtilityError(found.errors.get(0, "gave nan"))
            self.cache.put(problem, keys, found.values)
            known = found.values
        return float(known[0])

    @cached_property
    def problem(self) -> str:
        """The fingerprint, or a name that no other utility has."""
        return self.fingerprint or f"object-{uuid.uuid4().hex}"


@runtime_checkable
class Chained(Protocol):
    """A utility that is faster when sets grow row by row."""

    def chains(self, orders: NDArray[np.intp]) -> NDArray[np.float64]:
        """(P, n + 1) utilities of the first 0, 1, …, n rows of each of (P, n) orders."""
        ...


class FunctionUtility(Utility):
    """Any function of a set of rows.

    Parameters
    ----------
    function
        ``function(rows) -> float`` of (s,) ascending positions; also of none. What it raises, and
        what is not finite, counts as a failure of that set.
    n
        Rows there are.
    names
        Their names; default 0, …, n − 1.
    fingerprint
        See `Utility`. Whoever gives one vouches that it changes with all that the function uses.
    cache
        Default: one in memory.
    prefer
        See `Utility`. Processes need a function that can be pickled.

    Examples
    --------
    >>> majority = FunctionUtility(lambda rows: float(len(rows) >= 2), 3)
    >>> majority([0, 2]), majority([1])
    (1.0, 0.0)
    """

    def __init__(
        self,
        function: Callable[[NDArray[np.intp]], float],
        n: int,
        *,
        names: Any = None,
        fingerprint: str | None = None,
        cache: UtilityCache | None = None,
        prefer: Literal["threads", "processes"] = "processes",
    ) -> None:
        self.n = count(n, "n", 1)
        self.names = row_names(names, self.n)
        self.cache = UtilityCache() if cache is None else cache
        self.prefer = prefer
        self._function = function
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> str | None:
        """As given."""
        return self._fingerprint

    def evaluate(self, masks: NDArray[np.bool_]) -> Evaluated:
        """Set by set."""
        return each(masks, self._function)


def each(masks: NDArray[np.bool_], function: Callable[[NDArray[np.intp]], float]) -> Evaluated:
    """Utilities set by set: an exception or a number that is not finite fails that set alone."""
    values, errors = np.full(len(masks), np.nan), dict[int, str]()
    for position, mask in enumerate(masks):
        try:
            value = float(function(np.flatnonzero(mask)))
        except Exception as error:
            errors[position] = f"{type(error).__name__}: {error}"
            continue
        if np.isfinite(value):
            values[position] = value
        else:
            errors[position] = f"gave {value}"
    return Evaluated(values, errors)


def _mask(rows: ArrayLike, n: int) -> NDArray[np.bool_]:
    given = np.asarray(rows)
    if given.dtype == np.bool_ and given.shape == (n,):
        return given
    empty = given.shape == (0,)
    if given.ndim != 1 or not (empty or given.dtype.kind in "iu"):
        raise ValueError(
            f"expected whole numbers, positions of rows, or a mask of shape ({n},); got "
            f"{given.dtype} of shape {given.shape}: for names, take "
            "utility.names.get_indexer(names)"
        )
    at, times = np.unique(given, return_counts=True)
    if not empty and (at[0] < 0 or at[-1] >= n or times.max() > 1):
        twice = at[times > 1]
        what = f"{twice[0]} twice" if len(twice) else f"{at[0] if at[0] < 0 else at[-1]}"
        raise ValueError(
            f"expected positions of rows from 0 to {n - 1}, each once; got {what}: a set has no "
            "row twice, and none is counted from its end"
        )
    mask = np.zeros(n, np.bool_)
    mask[at.astype(np.intp)] = True
    return mask


def row_names(names: Any, n: int, like: Any = None) -> pd.Index:
    """Names of n rows, each of them once; else a ValueError.

    Parameters
    ----------
    names
        As given. Default: the index of `like` where that is a frame or a series of pandas, or
        0, …, n − 1.
    n
        Rows.
    like
        What the rows are in.
    """
    import pandas as pd

    if names is None:
        if not isinstance(like, (pd.DataFrame, pd.Series)):
            return pd.RangeIndex(n, name="row")
        names = like.index
    if isinstance(names, pd.MultiIndex):
        names = names.to_flat_index()
    if isinstance(names, list | tuple) and any(isinstance(name, tuple) for name in names):
        flat = np.empty(len(names), object)  # a list of tuples would become levels
        flat[:] = names
        names = flat
    index = pd.Index(names, name="row")
    if len(index) != n:
        raise ValueError(f"expected {n} names, one for each row; got {len(index)}")
    twice = index[index.duplicated()]
    if len(twice):
        raise ValueError(
            f"expected every row to have a name of its own; {twice.tolist()[0]!r} occurs more than "
            f"once ({len(twice)} names are repeated): give other names, or reset the index"
        )
    return index
