"""Groups of rows as players: values of labels, sources or clusters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.valuation.cache import UtilityCache
from upweight.valuation.utility import Evaluated, Utility

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MISSING", "GroupedUtility"]

MISSING = "(missing)"


class GroupedUtility(Utility):
    """Groups of rows as players: the utility of a set of groups is that of all their rows.

    ::

        u(T) = utility(rows whose group is in T)

    Parameters
    ----------
    utility
        Of sets of rows.
    labels
        The group of each row, such as its label, source or cluster: a sequence in the order of the
        rows, or a Series by the names of the rows. Tuples are labels too; numbers are one label if
        they are equal, as 1 and 1.0. Rows without one (None, NaN) are the group ``"(missing)"``,
        which then may not be a label.

    Attributes
    ----------
    n
        Groups there are.
    names
        Their labels, in the order in which they first occur.

    Raises
    ------
    ValueError
        If there are not as many labels as rows, a Series does not have every row's name once,
        labels cannot be hashed, or labels that differ would be one group, such as 1 and True.

    Notes
    -----
    Nothing is computed twice: a set of groups is looked up, and kept, in the cache of the utility
    as the set of rows that it is.

    Examples
    --------
    >>> from upweight.valuation.utility import FunctionUtility
    >>> different = FunctionUtility(lambda rows: len(set(rows // 2)), 5)
    >>> u = GroupedUtility(different, ["web", "book", "web", None, "book"])
    >>> u.names.tolist()
    ['web', 'book', '(missing)']
    >>> u([0, 1]), u([2]), different([3])  # of rows 0, 1, 2, 4; of row 3; and again
    (3.0, 1.0, 1.0)
    """

    def __init__(self, utility: Utility, labels: ArrayLike | Sequence[Any] | pd.Series) -> None:
        import pandas as pd

        values = pd.Series(_by_position(utility, labels), dtype=object)
        _check_apart(values)
        codes, found = pd.factorize(values.where(values.notna(), MISSING))
        self.utility = utility
        self.names = pd.Index(np.asarray(found).tolist(), name="group", tupleize_cols=False)
        self.n = len(self.names)
        self.prefer = utility.prefer
        self._groups = codes.astype(np.intp)
        # The engine asks `cache` for keys, and finds those of rows.
        self.cache = cast(UtilityCache, _CacheOfRows(utility, self._groups))

    @property
    def fingerprint(self) -> str | None:
        """Of the utility, and of which rows are in which group."""
        from upweight.valuation.fingerprints import digest

        inner = self.utility.fingerprint
        groups = self._groups, self.names.tolist()
        return None if inner is None else digest("GroupedUtility", inner, *groups)

    @cached_property
    def problem(self) -> str:
        """That of the utility, because keys are those of sets of rows."""
        return self.utility.problem

    def __getstate__(self) -> dict[str, Any]:
        """All of it: what `cache` looks through to stays behind with the utility's."""
        return dict(self.__dict__)

    def expand(self, masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Sets of groups (M, groups) as sets of rows (M, rows)."""
        return masks[:, self._groups]

    def evaluate(self, masks: NDArray[np.bool_]) -> Evaluated:
        """As the utility evaluates the sets of rows."""
        return self.utility.evaluate(self.expand(masks))


class _CacheOfRows:
    """The cache of a utility of rows, for sets of groups."""

    def __init__(self, utility: Utility, groups: NDArray[np.intp]) -> None:
        self._utility, self._groups = utility, groups

    def keys(self, masks: NDArray[np.bool_]) -> list[bytes]:
        return self._utility.cache.keys(masks[:, self._groups])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while it is unpickled, and has no utility yet
            raise AttributeError(name)
        return getattr(self._utility.cache, name)

    def __len__(self) -> int:
        return len(self._utility.cache)


def _check_apart(labels: pd.Series) -> None:
    """A ValueError where equal labels are not the same."""
    known = labels[labels.notna()].tolist()
    firsts: dict[Any, Any] = {}
    for label in known:
        try:
            first = firsts.setdefault(label, label)
        except TypeError:
            raise ValueError(
                f"expected labels that can be hashed, such as text; got {type(label).__name__}: "
                "make text, or tuples, of them"
            ) from None
        if _truths(first) != _truths(label):
            raise ValueError(
                f"expected labels of one kind; got {first!r} and {label!r}, which count as equal: "
                "make text of them"
            )
    if len(known) < len(labels) and MISSING in firsts:
        raise ValueError(
            f"expected no label {MISSING!r}, which rows without a label are called; got both: "
            "rename one of them"
        )


def _truths(label: Any) -> Any:
    """Whether it is a truth value; in a tuple, which of its items are."""
    if isinstance(label, tuple):
        return tuple(map(_truths, cast(tuple[Any, ...], label)))
    return isinstance(label, bool | np.bool_)


def _by_position(utility: Utility, labels: Any) -> NDArray[Any]:
    import pandas as pd

    if isinstance(labels, pd.Series):
        twice = labels.index[labels.index.duplicated()]
        absent = utility.names.difference(labels.index, sort=False)
        if len(twice) or len(absent):
            why = f"{twice[0]!r} twice" if len(twice) else f"none for {absent[0]!r}"
            raise ValueError(
                "expected a Series of labels with the name of every row once; it has "
                f"{why}: for labels in the order of the rows, give labels.to_numpy()"
            )
        return labels.loc[utility.names].astype(object).to_numpy()
    values = list(labels)
    if len(values) != utility.n:
        raise ValueError(
            f"expected a label for each of {utility.n} rows; got {len(values)}: rows without a "
            "group have None"
        )
    found = np.empty(len(values), object)
    found[:] = values
    return found
