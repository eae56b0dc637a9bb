"""What the score loses without a row, one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from upweight.valuation.engine import Evaluator
from upweight.valuation.telling import tell_failed
from upweight.valuation.utility import Utility
from upweight.valuation.values import Values

__all__ = ["leave_one_out"]


def leave_one_out(utility: Utility, *, n_jobs: int = 1, progress: bool = True) -> Values:
    """What the score loses without a row: v_i = u(all) − u(all but i), from n + 1 evaluations.

    Exact, and of little use where a row among many moves the score by less than noise does: with
    accuracy, most values are 0.

    Parameters
    ----------
    utility
        A `Utility`; one with a method ``all_but_one()``, such as `RidgeUtility`, is asked for all
        n at once.
    n_jobs, progress
        As in `shapley`.

    Returns
    -------
    Values

    Raises
    ------
    TypeError
        If `utility` is none.
    UtilityError
        As in `shapley`.

    Examples
    --------
    >>> from upweight.valuation import FunctionUtility
    >>> square = FunctionUtility(lambda rows: float(len(rows) ** 2), 3)
    >>> leave_one_out(square).values
    array([5., 5., 5.])
    """
    if not isinstance(utility, Utility):
        raise TypeError(
            "expected a Utility, such as ModelUtility or FunctionUtility; got "
            f"{type(utility).__name__}"
        )
    n = utility.n
    quick: Any = getattr(utility, "all_but_one", None)
    with Evaluator(utility, n_jobs=n_jobs, progress=progress, total=n) as evaluator:
        found = evaluator.masks(~np.eye(n, dtype=np.bool_)) if quick is None else quick()
        failures, failed, computed = evaluator.failures, evaluator.failed, evaluator.computed
        ends = evaluator.ends
    tell_failed(failed, n, failures, "these rows have no value")
    provenance = {
        "method": "leave-one-out",
        "evaluations": n,
        "computed": computed,
        "failed": failed,
        "utility": utility.fingerprint,
        "ends": list(ends),
    }
    return Values(
        ends[1] - found,
        np.where(np.isnan(found), np.nan, 0.0),
        np.where(np.isnan(found), 0, 1).astype(np.int64),
        utility.names,
        provenance,
        stopped="every row left out once",
        failures=failures,
    )
