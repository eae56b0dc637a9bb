"""Work side by side in threads, with results in the order of the work."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from upweight.valuation.checks import count

__all__ = ["in_order", "workers"]

T = TypeVar("T")


def workers(n_jobs: int) -> int:
    """How many threads: ``n_jobs``, where -1 means all cores, -2 all but one, …."""
    jobs = count(n_jobs, "n_jobs", -1024)
    if jobs == 0:
        raise ValueError("expected n_jobs at least 1, or -1 for all cores; got 0")
    if jobs > 0:
        return jobs
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores + 1 + jobs)


def in_order(work: Iterable[Callable[[], T]], n_jobs: int) -> Iterator[T]:
    """Results of the calls, in their order; never more than ``n_jobs`` + 1 of them are pending.

    Threads suffice: matrix products, sorting and trees release the interpreter's lock. BLAS is
    held to one thread of its own meanwhile.
    """
    threads = workers(n_jobs)
    if threads == 1:
        for call in work:
            yield call()
        return
    from threadpoolctl import threadpool_limits  # a dependency of scikit-learn

    pending: deque[Future[T]] = deque()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        try:
            for call in work:
                pending.append(pool.submit(call))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
