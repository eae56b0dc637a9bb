"""Utilities of many sets: from the cache, side by side, with failures counted and named."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from upweight import jobs
from upweight.valuation.parallel import workers
from upweight.valuation.utility import Chained, Evaluated, Utility, UtilityError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Evaluator"]

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]

CHUNK = 512  # sets that a worker is given at once, at most
CHAINS = 32  # orders, likewise
MASKS = 2**27  # bytes of masks at once
PATIENCE = 5  # beginnings of an order in a row that must be close to all rows
NAMED = 1_000  # failures that are told one by one
HOPELESS = 20  # sets of which none could be evaluated
ATTEMPTS = 3  # with workers that die
FIRST = 8  # sets at once, as long as nobody knows how long they take
PORTION = 1.0  # seconds of work that a worker is given at once
HELD_BACK = 1.0  # seconds between writes to the cache


class Evaluator:
    """Evaluates sets for one run.

    Parameters
    ----------
    utility
        Of what.
    n_jobs
        Workers, -1 for all cores: threads or processes, as the utility prefers, or what
        `joblib.parallel_config` names. Results do not depend on it.
    progress
        Whether to show a bar; on a terminal only.
    total
        Evaluations that are expected.

    Attributes
    ----------
    ends
        Utilities of no rows and of all rows.
    asked, computed
        Sets that were asked for, and those of them that were not in the cache.
    failed
        How many failed.

    Raises
    ------
    UtilityError
        If the utility of all rows or that of none fails, or all of the first sets do.
    """

    def __init__(
        self,
        utility: Utility,
        *,
        n_jobs: int = 1,
        progress: bool = True,
        total: float | None = None,
    ) -> None:
        from tqdm.auto import tqdm

        self.utility = utility
        self.asked = self.computed = self.failed = 0
        self._n_jobs, self._jobs = n_jobs, workers(n_jobs)
        self._problem = utility.problem
        self._failures: list[tuple[NDArray[np.intp], str]] = []
        self._pace: dict[str, float] = {}  # seconds that a set, or an order, takes
        self._bar: Any = tqdm(
            total=total, desc="utilities", unit="set", disable=None if progress else True
        )
        try:
            self.ends = self._ends()
            self.computed = 0  # both are given, and not asked for
        except BaseException:
            self._bar.close()
            raise

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if isinstance(error, KeyboardInterrupt):
            kept = self.utility.cache.path
            where = "in memory, with the utility" if kept is None else f"in {kept}"
            error.add_note(
                f"{self.computed:,} utilities were computed, and are kept {where}: the same call "
                "goes on from there"
            )

    def masks(self, masks: Masks) -> Floats:
        """(M,) utilities of (M, n) sets, NaN for those that failed."""
        self.asked += len(masks)
        failed = self.failed
        found = self._masks(masks)
        some = masks.any(axis=1) & ~masks.all(axis=1)
        self._refuse_hopeless(found[some], self.failed - failed, HOPELESS)
        return found

    def orders(
        self, orders: NDArray[np.int32], length: int, tolerance: float | None
    ) -> tuple[Floats, NDArray[np.int32]]:
        """Utilities of the beginnings of orders.

        Parameters
        ----------
        orders
            (P, n).
        length
            Longest beginning that is needed.
        tolerance
            None, or a share of u(all) − u(none): an order ends where five beginnings in a row are
            as close to all rows as that. (One alone may be so by chance.)

        Returns
        -------
        utilities : ndarray
            (P, n + 1), NaN where they failed or are not needed.
        lengths : ndarray
            (P,) the longest beginning that was asked for.
        """
        count, n = orders.shape
        failed = self.failed
        close = None if tolerance is None else tolerance * abs(self.ends[1] - self.ends[0])
        found = np.full((count, n + 1), np.nan)
        if isinstance(self.utility, Chained) and length == n:
            found[:] = self._chains(orders, self.utility)
        elif close is None and n > 1:
            inner = np.arange(1, min(length, n - 1) + 1)
            some = max(1, MASKS // (n * max(1, len(inner))))
            for at in range(0, count, some):
                masks = _beginnings(orders[at : at + some], inner).reshape(-1, n)
                found[at : at + some, 1 : len(inner) + 1] = self._masks(masks).reshape(
                    -1, len(inner)
                )
        found[:, 0], found[:, n] = self.ends
        if close is None:
            lengths = np.full(count, length, np.int32)
        else:
            lengths = self._until_close(orders, found, length, close)
        self._refuse_hopeless(found[:, 1:n], self.failed - failed, HOPELESS)
        found[np.arange(n + 1) > lengths[:, None]] = np.nan
        self.asked += int(np.minimum(lengths, max(1, n - 1)).sum())
        return found, lengths

    @property
    def failures(self) -> pd.DataFrame:
        """A line for each of the first failures: ``size``, ``rows`` (some names), ``error``."""
        import pandas as pd

        names = self.utility.names
        lines = [
            (len(rows), ", ".join(str(names[row]) for row in rows[:20]), error)
            for rows, error in self._failures
        ]
        return pd.DataFrame(lines, columns=pd.Index(["size", "rows", "error"]))

    def _ends(self) -> tuple[float, float]:
        n = self.utility.n
        masks = np.zeros((2, n), np.bool_)
        masks[1] = True
        none, every = self._masks(masks)
        for what, value in (("no rows", none), (f"all {n} rows", every)):
            if np.isnan(value):
                reason = self._failures[0][1]
                raise UtilityError(f"the utility of {what} could not be computed: {reason}")
        return float(none), float(every)

    def _until_close(
        self, orders: NDArray[np.int32], found: Floats, length: int, close: float
    ) -> NDArray[np.int32]:
        """Fill `found` step by step, all orders side by side; where each of them ended."""
        count, n = orders.shape
        lengths = np.full(count, length, np.int32)
        near = np.zeros(count, np.int32)
        known = not np.isnan(found[:, 1:n]).all()
        # Steps at once: more than needed is wasted, fewer leave workers idle.
        stride = 1 if self._jobs == 1 else PATIENCE
        going = np.arange(count)
        for start in range(1, length + 1, stride):
            inner = np.arange(start, min(start + stride, length + 1, n))
            if len(inner) and not known:
                masks = _beginnings(orders[going], inner).reshape(-1, n)
                found[going[:, None], inner] = self._masks(masks, of_a_size=True).reshape(
                    len(going), len(inner)
                )
            for step in range(start, min(start + stride, length + 1)):
                apart = np.abs(found[going, step] - self.ends[1])
                near[going] = np.where(apart <= close, near[going] + 1, 0)
                ended = near[going] >= PATIENCE
                lengths[going[ended]] = step
                going = going[~ended]
            if not len(going):
                break
        return lengths

    def _refuse_hopeless(self, found: Floats, failed: int, most: int) -> None:
        """Not where one was found, in the cache too: small sets may fail by right."""
        if failed >= most and np.isnan(found).all():
            raise UtilityError(
                f"none of {failed} sets could be evaluated; the first ended with: "
                f"{self._failures[0][1]}"
            )

    def _masks(self, masks: Masks, *, of_a_size: bool = False) -> Floats:
        cache = self.utility.cache
        keys = cache.keys(masks)
        found = cache.get(self._problem, keys)
        missing = np.flatnonzero(np.isnan(found))
        if len(missing):
            first: dict[bytes, int] = {}
            for at in missing:
                first.setdefault(keys[at], int(at))
            once = np.array(list(first.values()), np.intp)
            # where all have about one size, all may fail by right
            most = len(masks) + 1 if of_a_size else max(HOPELESS, 2 * self.utility.n)
            self._evaluate(masks, once, keys, found, most)
            for at in missing:  # the same set twice
                found[at] = found[first[keys[at]]]
        self._bar.update(len(masks) - len(missing))
        return found

    def _evaluate(
        self,
        masks: Masks,
        wanted: NDArray[np.intp],
        keys: list[bytes],
        found: Floats,
        hopeless: int,
    ) -> None:
        packed = np.packbits(masks[wanted], axis=1)
        size = _chunk(len(wanted), self._jobs, CHUNK)
        n, errors, told = masks.shape[1], dict[int, str](), len(self._failures)
        inner = masks.any(axis=1) & ~masks.all(axis=1)

        def tell() -> None:
            some = sorted(errors)[: NAMED - told]
            self._failures[told:] = [(np.flatnonzero(masks[at]), errors[at]) for at in some]

        def tasks(left: list[int], size: int) -> Iterable[Any]:
            for chosen in self._portions(left, size, "set"):
                yield self.utility, chosen, packed[chosen], n

        def keep(done: tuple[NDArray[np.intp], Evaluated, float]) -> NDArray[np.intp]:
            chosen, evaluated, seconds = done
            self._pace["set"] = seconds / len(chosen)
            at = wanted[chosen]
            found[at] = evaluated.values
            self.computed += len(at)
            self._bar.update(len(at))
            errors.update({int(at[i]): error for i, error in evaluated.errors.items()})
            if len(errors) >= hopeless and np.isnan(found[inner]).all():
                tell()
                self._refuse_hopeless(found[inner], len(errors), hopeless)
            return chosen

        def store(chosen: NDArray[np.intp]) -> None:
            at = wanted[chosen]
            self.utility.cache.put(self._problem, [keys[i] for i in at], found[at])

        self._run(_task, tasks, size=size, many=len(wanted), keep=keep, store=store)
        self.failed += len(errors)
        tell()

    def _chains(self, orders: NDArray[np.int32], utility: Chained) -> Floats:
        """(P, n + 1); an order is taken from the cache if all of it is there."""
        count, n = orders.shape
        cache = self.utility.cache
        found = np.empty((count, n + 1))
        keys = [
            cache.keys(_beginnings(order[None], np.arange(n + 1)).reshape(-1, n))
            for order in orders
        ]
        for at in range(count):
            found[at] = cache.get(self._problem, keys[at])
        missing = np.flatnonzero(np.isnan(found).any(axis=1))
        self._bar.update((count - len(missing)) * (n - 1))

        def tasks(left: list[int], size: int) -> Iterable[Any]:
            for chosen in self._portions(left, size, "order"):
                yield utility, chosen, orders[missing[chosen]]

        def keep(done: tuple[NDArray[np.intp], Floats, dict[Any, str], float]) -> NDArray[np.intp]:
            chosen, values, errors, seconds = done
            self._pace["order"] = seconds / len(chosen)
            found[missing[chosen]] = values
            for order, place in np.argwhere(np.isnan(values)):
                self.failed += 1
                if len(self._failures) < NAMED:
                    rows = orders[missing[chosen[order]], :place].astype(np.intp)
                    self._failures.append((rows, errors.get((order, place), "gave nan")))
            self.computed += len(chosen) * (n - 1)
            self._bar.update(len(chosen) * (n - 1))
            return chosen

        def store(chosen: NDArray[np.intp]) -> None:
            for at in missing[chosen]:
                cache.put(self._problem, keys[at], found[at])

        size = _chunk(len(missing), self._jobs, CHAINS)
        self._run(_chain_task, tasks, size=size, many=len(missing), keep=keep, store=store)
        return found

    def _portions(self, left: list[int], most: int, what: str) -> Iterable[NDArray[np.intp]]:
        """So many at once as take about a second: what is not finished is lost by a kill."""
        at = 0
        while at < len(left):
            pace = self._pace.get(what)
            size = FIRST if pace is None else int(PORTION / max(pace, 1e-9))
            size = max(1, min(size, most))
            yield np.array(left[at : at + size], np.intp)
            at += size

    def _run(
        self,
        function: Callable[..., Any],
        tasks: Callable[[list[int], int], Iterable[Any]],
        *,
        size: int,
        many: int,
        keep: Callable[[Any], NDArray[np.intp]],
        store: Callable[[NDArray[np.intp]], None],
    ) -> None:
        """Work through tasks; what is done goes to the cache at once, whatever happens next."""
        left = dict.fromkeys(range(many))
        for attempt in range(1, ATTEMPTS + 1):
            pending: list[NDArray[np.intp]] = []
            since = time.monotonic()
            try:
                for done in jobs.unordered(
                    function,
                    tasks(list(left), size),
                    self._n_jobs,
                    prefer=self.utility.prefer,
                ):
                    pending.append(keep(done))
                    if time.monotonic() - since > HELD_BACK:
                        store(np.concatenate(pending))
                        for chosen in pending:
                            _forget(left, chosen)
                        pending, since = [], time.monotonic()
                return
            except jobs.WorkerDied as error:
                if attempt == ATTEMPTS:
                    error.add_note(
                        "workers died again and again, perhaps for want of memory: try fewer with "
                        "n_jobs; what was computed is in the cache"
                    )
                    raise
                size = 1
            finally:
                if pending:
                    store(np.concatenate(pending))
                    for chosen in pending:
                        _forget(left, chosen)


def _task(
    utility: Utility, chosen: NDArray[np.intp], packed: NDArray[np.uint8], n: int
) -> tuple[NDArray[np.intp], Evaluated, float]:
    began = time.perf_counter()
    masks = np.unpackbits(packed, axis=1, count=n).view(np.bool_)
    return chosen, utility.evaluate(masks), time.perf_counter() - began


def _chain_task(
    utility: Any, chosen: NDArray[np.intp], orders: NDArray[np.intp]
) -> tuple[NDArray[np.intp], Floats, dict[tuple[int, int], str], float]:
    """Utilities; and why some failed, by order and place: set by set where a chain raises."""
    began, errors = time.perf_counter(), dict[tuple[int, int], str]()
    try:
        found = utility.chains(orders)
    except Exception:
        count, n = orders.shape
        masks = _beginnings(orders.astype(np.int32), np.arange(n + 1)).reshape(-1, n)
        evaluated = utility.evaluate(masks)
        found = evaluated.values.reshape(count, n + 1)
        for at, error in evaluated.errors.items():
            order, place = divmod(at, n + 1)
            errors[order, place] = error
    return chosen, found, errors, time.perf_counter() - began


def _beginnings(orders: NDArray[np.int32], lengths: NDArray[np.intp]) -> Masks:
    """(P, L, n) the first so many rows of each order."""
    count, n = orders.shape
    place = np.empty((count, n), np.int32)
    np.put_along_axis(place, orders.astype(np.intp), np.arange(n, dtype=np.int32)[None], axis=1)
    return place[:, None] < lengths[:, None]


def _chunk(many: int, jobs: int, most: int) -> int:
    return max(1, min(most, -(-many // (8 * jobs))))


def _forget(left: dict[int, None], chosen: NDArray[np.intp]) -> None:
    for at in chosen:
        left.pop(int(at), None)
