"""The score of models that a function trains on a set of rows: many of them at once, if it can."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.valuation.cache import UtilityCache
from upweight.valuation.checks import count
from upweight.valuation.fingerprints import digest
from upweight.valuation.quiet import quiet
from upweight.valuation.utility import Evaluated, Utility, row_names

__all__ = ["RefitUtility"]

REVISION = 1  # raised when the same trainings get other utilities, so that no cache gives old ones
Refit: TypeAlias = Callable[[NDArray[np.intp], int], ArrayLike]


class RefitUtility(Utility):
    """u(S): the mean margin, or minus the mean loss, of models trained on the rows S.

    ::

        u(S) = ± 1/(R m) Σ_{r ≤ R} Σ_{t ≤ m} output_t(S, seed_r)

    with + for margins and − for losses, over m test rows and R trainings. All sets are trained with
    the same R seeds, so that two sets differ by their rows only.

    Parameters
    ----------
    refit
        ``refit(rows, seed) -> (m,)``: train on these ascending positions of training rows, and give
        a number for each test row. It may also offer what `upweight.Retraining` does:
        ``refit.many(masks, seeds) -> (b, m)``, which trains b models of masks (b, n) and seeds (b,)
        at once and is then used instead, NaN where a training failed; ``refit.n``,
        ``refit.output`` and ``refit.fingerprint``.
    n
        Training rows; default ``refit.n``.
    names
        Of the training rows; default 0, …, n − 1.
    output
        ``"loss"``, where lower is better, or ``"margin"``, where higher is; default
        ``refit.output``.
    empty
        The utility of no rows. Default: what `refit` gives for no rows, which it is asked when the
        utility is made. Many functions cannot be (`upweight.Retraining` cannot): then a number is
        needed, such as minus the loss, or the margin, of a constant prediction: with C classes
        −log C or −log (C − 1). In Shapley values it moves all values alike, by 1/n of it.
    seeds, seed
        R, and the seed that the seeds of the trainings are spawned from.
    at_once
        Models for one call of ``refit.many``.
    fingerprint
        A digest of all that `refit` depends on; default ``refit.fingerprint``. None: unknown.
    cache
        Default: one in memory.

    Raises
    ------
    ValueError
        If a setting does not make sense, or one that has no default is missing.

    Notes
    -----
    A set fails, alone, if one of its trainings raises or gives a number that is not finite. If a
    call of ``refit.many`` raises, it is made again for either half, until those that do are found.

    Where models are trained together, a utility may depend on the others by round-off: it is then
    the same to about 1e-6 of itself in float32, and not bitwise.

    Examples
    --------
    The model is the mean of the rows, the loss the squared error on two others.

    >>> x = np.array([1.0, 2.0, 6.0])
    >>> def refit(rows, seed):
    ...     return (x[rows].mean() - np.array([1.0, 3.0])) ** 2
    >>> utility = RefitUtility(refit, n=3, output="loss", empty=-5.0)
    >>> utility([0, 1, 2]), utility([])
    (-2.0, -5.0)
    """

    def __init__(
        self,
        refit: Refit,
        *,
        n: int | None = None,
        names: Any = None,
        output: Literal["loss", "margin"] | None = None,
        empty: float | None = None,
        seeds: int = 1,
        seed: int = 0,
        at_once: int = 64,
        fingerprint: str | None = None,
        cache: UtilityCache | None = None,
    ) -> None:
        rows = getattr(refit, "n", None) if n is None else n
        if rows is None:
            raise ValueError("expected n, how many training rows there are: refit.n is not there")
        self.n = count(rows, "n", 1)
        self.names = row_names(names, self.n)
        self.cache = UtilityCache() if cache is None else cache
        known = getattr(refit, "output", None) if output is None else output
        if known not in ("loss", "margin"):
            raise ValueError(
                "expected output 'loss', where lower is better, or 'margin', where higher is; got "
                f"{known!r}"
            )
        self.output: Literal["loss", "margin"] = known
        self._sign = -1.0 if known == "loss" else 1.0
        self._refit: Any = refit
        spawned = np.random.SeedSequence(count(seed, "seed", 0))
        self._seeds = spawned.generate_state(count(seeds, "seeds", 1)).astype(np.int64)
        self._at_once = count(at_once, "at_once", 1)
        self.empty = self._of_none() if empty is None else float(empty)
        if not np.isfinite(self.empty):
            raise ValueError(f"expected empty as a finite number; got {empty!r}")
        given = getattr(refit, "fingerprint", None) if fingerprint is None else fingerprint
        if not isinstance(given, str | None):
            raise ValueError(f"expected fingerprint as text or None; got {given!r}")
        settings = given, self.output, self.empty, self._seeds
        self._fingerprint = None if given is None else digest("RefitUtility", REVISION, *settings)

    @property
    def fingerprint(self) -> str | None:
        """A digest of that of `refit` and the settings; None if it has none."""
        return self._fingerprint

    def evaluate(self, masks: NDArray[np.bool_]) -> Evaluated:
        """Groups of sets, by ``refit.many`` if it is there."""
        values, errors = np.full(len(masks), self.empty), dict[int, str]()
        asked = np.flatnonzero(masks.any(axis=1))
        r = len(self._seeds)
        which, seeds = np.repeat(asked, r), np.tile(self._seeds, len(asked))
        found: list[float | str] = []
        size = self._at_once if hasattr(self._refit, "many") else 1
        for i in range(0, len(which), size):
            found += self._train(masks[which[i : i + size]], seeds[i : i + size])
        for j, position in enumerate(asked.tolist()):
            runs = found[j * r : (j + 1) * r]
            wrong = [run for run in runs if isinstance(run, str)]
            if wrong:
                values[position], errors[position] = np.nan, wrong[0]
            else:
                values[position] = sum(map(float, runs)) / r
        return Evaluated(values, errors)

    def _train(self, masks: NDArray[np.bool_], seeds: NDArray[np.int64]) -> list[float | str]:
        """The utility of each training, or why there is none."""
        many = getattr(self._refit, "many", None)
        try:
            if many is None:
                return [self._judged(self._refit(np.flatnonzero(masks[0]), int(seeds[0])))]
            with quiet(_of_trainings_that_failed):  # these are counted
                outputs = np.asarray(many(masks, seeds), np.float64)
            if outputs.ndim != 2 or len(outputs) != len(masks):
                raise ValueError(f"refit.many gave shape {outputs.shape}, not ({len(masks)}, m)")
            return [self._judged(row) for row in outputs]
        except Exception as error:
            if len(seeds) == 1:
                return [f"{type(error).__name__}: {error}"]
            half = len(seeds) // 2
            first = self._train(masks[:half], seeds[:half])
            return first + self._train(masks[half:], seeds[half:])

    def _judged(self, outputs: ArrayLike) -> float | str:
        array = np.asarray(outputs, np.float64)
        if array.ndim != 1 or array.size == 0:
            return f"gave shape {array.shape}, not (m,), one number for each test row"
        wrong = np.flatnonzero(~np.isfinite(array))
        if len(wrong):
            return f"gave {array[wrong[0]]} for test row {wrong[0]} ({len(wrong)} are not finite)"
        return self._sign * float(array.mean())

    def _of_none(self) -> float:
        nothing, found = np.zeros((1, self.n), np.bool_), list[float]()
        with quiet(_of_trainings_on_none):
            for seed in self._seeds:
                run = self._train(nothing, np.array([seed]))[0]
                if isinstance(run, str):
                    raise ValueError(
                        "expected empty, the utility of no rows, as a number: refit cannot be "
                        f"trained on none ({run})"
                    )
                found.append(run)
        return sum(found) / len(found)


def _of_trainings_on_none() -> None:
    warnings.simplefilter("ignore")


def _of_trainings_that_failed() -> None:
    warnings.simplefilter("ignore", RuntimeWarning)
