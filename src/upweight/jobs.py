"""Calls side by side through joblib, with results as they finish."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import nullcontext, suppress
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, TypeVar

__all__ = ["WorkerDied", "unordered"]

T = TypeVar("T")

if TYPE_CHECKING:
    WorkerDied: tuple[type[Exception], ...]


def unordered(
    function: Callable[..., T],
    tasks: Iterable[tuple[Any, ...]],
    n_jobs: int | None = 1,
    *,
    prefer: Literal["threads", "processes"] = "processes",
) -> Generator[T]:
    """Results of ``function(*task)``, each when it is there.

    Parameters
    ----------
    function
        For processes it must be one that can be pickled, by cloudpickle if need be.
    tasks
        Arguments of each call. They are taken as workers become free, perhaps in another thread,
        some more than there are workers; and also while nobody asks for results.
    n_jobs
        Workers, as in joblib: -1 for all cores, None for what ``joblib.parallel_config`` says. One
        is no worker: each call is made here, when its result is asked for.
    prefer
        ``"processes"``: those of joblib's loky, with one BLAS and OpenMP thread each.
        ``"threads"``: with one BLAS thread each, in the whole process until the end.
        A backend that the caller chose by ``joblib.parallel_config`` is used in place of either.

    Yields
    ------
    T
        In no order. If the generator is closed early, the calls that have been handed out are
        waited for, and no other is begun: workers live on.

    Raises
    ------
    WorkerDied
        If a worker process was killed, as a system out of memory does. Which call it was is not
        known; those whose results were not yielded are lost, and the other workers are stopped.
        The next call of `unordered` starts new ones. (``WorkerDied`` is a tuple of exceptions, to
        be used as ``except jobs.WorkerDied``: joblib is imported when that is looked up. It is of
        loky's workers. joblib waits forever for those of its multiprocessing and dask backends.)
    Exception
        What a call raised. Processes are then stopped, and other results are lost.

    Examples
    --------
    >>> sorted(unordered(pow, [(2, 3), (3, 2)], 2, prefer="threads"))
    [8, 9]
    """
    if prefer not in ("threads", "processes"):
        raise ValueError(f"expected prefer 'threads' or 'processes'; got {prefer!r}")
    if n_jobs == 1:
        yield from (function(*task) for task in tasks)
        return
    from joblib import delayed

    closed = False
    parallel, limits = _parallel(n_jobs, prefer)
    with limits:
        wanted = takewhile(lambda _: not closed, tasks)
        results = iter(parallel(delayed(function)(*task) for task in wanted))
        try:
            # `yield from` would close joblib's generator, which kills its workers
            for result in results:  # noqa: UP028
                yield result
        except GeneratorExit:
            closed = True
            with suppress(Exception):
                for _ in results:
                    pass
            raise


def _parallel(n_jobs: int | None, prefer: str) -> tuple[Any, Any]:
    """The `joblib.Parallel`, and a context to use it in."""
    from joblib import Parallel, parallel_config
    from joblib.parallel import get_active_backend
    from threadpoolctl import threadpool_limits  # a dependency of scikit-learn

    backend: Any = get_active_backend()[0]
    # a backend that nobody chose is a new object each time
    chosen = get_active_backend()[0] is backend or getattr(backend, "uses_threads", False)
    config, limits = nullcontext(), nullcontext()
    if prefer == "threads" and not chosen:
        config = parallel_config("threading")
        limits = threadpool_limits(1, user_api="blas")
    elif backend.supports_inner_max_num_threads and backend.inner_max_num_threads is None:
        config = parallel_config("loky", inner_max_num_threads=1)
    with config:
        lazy = "generator_unordered" if backend.supports_return_generator else "list"
        return Parallel(n_jobs, return_as=lazy), limits


def __getattr__(name: str) -> Any:
    if name != "WorkerDied":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    return (TerminatedWorkerError,)
