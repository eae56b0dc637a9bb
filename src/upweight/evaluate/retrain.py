"""Train on many subsets: the expensive part of every check, so that it is never lost."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.evaluate.store import RunStore
from upweight.evaluate.subsets import check_masks
from upweight.files import write_atomically
from upweight.frames import users_frame
from upweight.jobs import unordered

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Protocol",
    "Refit",
    "RetrainOptions",
    "Retrained",
    "RetrainingWarning",
    "mean_over_seeds",
    "retrain",
]

Refit: TypeAlias = Callable[[NDArray[np.intp], int], ArrayLike]
Protocol: TypeAlias = Literal["random-seed", "fixed-seed"]
Result: TypeAlias = NDArray[np.float64] | str  # outputs of a run, or why there are none

GIVE_UP_AFTER = 8  # a function that has failed that often and never worked will not begin to


class RetrainingWarning(UserWarning):
    """Some runs failed, and results are of the others."""


class RetrainOptions(TypedDict, total=False):
    """Keyword arguments of `retrain` that functions which retrain hand on to it."""

    seeds: int | Sequence[int]
    protocol: Protocol
    n_jobs: int | None
    at_once: int
    store: str | os.PathLike[str] | None
    progress: bool


@dataclass(frozen=True)
class Retrained:
    """Outputs of models that were trained on subsets.

    Attributes
    ----------
    masks
        (S, n) which rows each subset has.
    seeds
        (S, R) the seeds that each subset was trained with.
    outputs
        (S, R, m) a number for each test row; NaN where the run failed.
    failures
        A line for each run that failed: ``subset``, ``seed``, ``error``.
    """

    masks: NDArray[np.bool_]
    seeds: NDArray[np.int64]
    outputs: NDArray[np.float64]
    failures: pd.DataFrame

    @property
    def mean(self) -> NDArray[np.float64]:
        """(S, m) mean over the seeds that worked; NaN where none did."""
        return mean_over_seeds(self.outputs)

    def to_frame(self) -> pd.DataFrame:
        """A line for each number: ``subset``, ``seed``, ``test``, ``output``; failed runs not."""
        import pandas as pd

        subset, seed, test = np.nonzero(~np.isnan(self.outputs))
        return pd.DataFrame(
            {
                "subset": subset,
                "seed": self.seeds[subset, seed],
                "test": test,
                "output": self.outputs[subset, seed, test],
            }
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.npz`` file, failures as JSON in it; no pickle."""
        failures = json.dumps(self.failures.to_dict("list")).encode()
        write_atomically(
            Path(path),
            lambda file: np.savez_compressed(
                file,
                masks=self.masks,
                seeds=self.seeds,
                outputs=self.outputs,
                failures=np.frombuffer(failures, dtype=np.uint8),
            ),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Retrained:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as data:
            failures = json.loads(data["failures"].tobytes())
            return cls(data["masks"], data["seeds"], data["outputs"], _failures(failures))


def retrain(
    refit: Refit,
    masks: ArrayLike,
    *,
    seeds: int | Sequence[int] = 1,
    protocol: Protocol = "random-seed",
    n_jobs: int | None = 1,
    at_once: int = 64,
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Retrained:
    """Train on every subset with every seed, and keep the outputs on the test rows.

    Parameters
    ----------
    refit
        ``refit(rows, seed) -> outputs``: train on these positions of training rows and give one
        number for each test row, such as its margin: (m,). It may also offer
        ``refit.many(masks, seeds) -> (b, m)``, which trains the b models of ``masks`` (b, n) and
        ``seeds`` (b,) at once and is then used instead; and ``refit.fingerprint``, a string that
        tells this model and data from others. Without one, a store cannot see that they changed.
    masks
        (S, n) subsets.
    seeds
        R different numbers ≥ 0, or how many of them: 0 … R - 1.
    protocol
        ``"random-seed"``: every subset is trained with R seeds of its own, spawned from these, so
        that outputs vary by subset *and* by seed. ``"fixed-seed"``: all subsets are trained with
        these very seeds, so that two subsets differ by their rows only.
    n_jobs
        Workers, as in joblib. By default they are processes, each with one BLAS, OpenMP and torch
        thread; ``with joblib.parallel_config(...)`` takes another backend, and None its number.
    at_once
        Models for one call of ``refit.many``.
    store
        A folder. Each finished run is kept there, and a later call with the same settings goes on
        where this one was stopped. Failed runs are tried again.
    progress
        Whether a bar tells how far it is, on a terminal.

    Returns
    -------
    Retrained
        If ``refit`` gives the same for the same arguments, independent of ``n_jobs``, ``at_once``
        and of how often it was stopped.

    Raises
    ------
    ValueError
        If an argument is wrong, or the store is of other settings: which, the message tells.
    RuntimeError
        If every run failed, or the first 8 or more did.

    Warns
    -----
    RetrainingWarning
        If some runs failed: ``refit`` raised, or gave another shape than most or a number that is
        not finite. A call of ``refit.many`` that raises is made again for either half, until the
        one that does it is found.

    Examples
    --------
    The model is the mean of the rows, and its output is that.

    >>> x = np.array([1.0, 2.0, 6.0])
    >>> done = retrain(lambda rows, seed: [x[rows].mean()], [[1, 1, 0], [0, 1, 1]])
    >>> done.mean
    array([[1.5], [4. ]])
    """
    from tqdm import tqdm

    masks = check_masks(masks)
    if at_once < 1:
        raise ValueError(f"expected at_once of at least 1; got {at_once}")
    given = _seeds(seeds)
    every = _spread(given, len(masks), protocol)  # (S, R)
    manifest = _manifest(refit, masks, given, protocol)
    kept = None if store is None else RunStore(store, manifest)
    runs = {} if kept is None else kept.read()
    errors: dict[int, str] = {}
    waiting = [run for run in range(every.size) if run not in runs]
    size = at_once if hasattr(refit, "many") else 1
    tasks = [
        (group, masks[np.array(group) // len(given)], every.ravel()[group])
        for group in (waiting[a : a + size] for a in range(0, len(waiting), size))
    ]
    with tqdm(
        total=every.size,
        initial=len(runs),
        desc="retraining",
        unit="run",
        disable=None if progress else True,
    ) as bar:
        hopeless = False
        # what has begun is waited for: joblib does not stop workers cleanly
        going_on = takewhile(lambda _: not hopeless, tasks)
        for group, results in unordered(partial(_run, refit), going_on, n_jobs):
            for run, result in zip(group, results, strict=True):
                if isinstance(result, str):
                    errors[run] = result
                    continue
                runs[run] = result
                if kept:
                    kept.write(run, result)
            bar.update(len(group))
            hopeless = not runs and len(errors) >= GIVE_UP_AFTER
    return _collect(masks, every, runs, errors)


def mean_over_seeds(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(S, R, m) -> (S, m): mean over the seeds whose run is there; NaN where none is."""
    there = ~np.isnan(values[:, :, 0])  # (S, R)
    total = np.where(there[:, :, None], values, 0.0).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return total / there.sum(axis=1)[:, None]


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    if isinstance(seeds, int | np.integer) and not isinstance(seeds, bool):
        seeds = range(int(seeds))
    given = np.asarray(seeds)
    distinct = given.ndim == 1 and given.size == len(np.unique(given)) > 0
    if not distinct or given.dtype.kind not in "iu" or given.min() < 0:
        raise ValueError(
            f"expected how many seeds (≥ 1), or different whole numbers ≥ 0; got {seeds!r}"
        )
    return [int(seed) for seed in given]


def _spread(seeds: list[int], count: int, protocol: str) -> NDArray[np.int64]:
    """(S, R) the seed of every run."""
    if protocol not in get_args(Protocol):
        raise ValueError(f"expected a protocol among {get_args(Protocol)}; got {protocol!r}")
    if protocol == "fixed-seed":
        return np.tile(np.array(seeds, dtype=np.int64), (count, 1))
    spawned = [
        [np.random.SeedSequence(seed, spawn_key=(i,)).generate_state(1)[0] for seed in seeds]
        for i in range(count)
    ]
    return np.array(spawned, dtype=np.int64)


def _manifest(
    refit: Refit, masks: NDArray[np.bool_], seeds: list[int], protocol: str
) -> dict[str, Any]:
    fingerprint = getattr(refit, "fingerprint", None)
    if not isinstance(fingerprint, str | None):
        raise TypeError(f"expected refit.fingerprint to be a string; got {fingerprint!r}")
    return {
        "format": 1,
        "subsets": masks.shape[0],
        "rows": masks.shape[1],
        "masks": hashlib.sha256(np.packbits(masks, axis=1).tobytes()).hexdigest(),
        "seeds": seeds,
        "protocol": protocol,
        "refit": fingerprint,
    }


def _run(
    refit: Refit, group: list[int], masks: NDArray[np.bool_], seeds: NDArray[np.int64]
) -> tuple[list[int], list[Result]]:
    return group, _attempt(refit, masks, seeds)


def _attempt(refit: Refit, masks: NDArray[np.bool_], seeds: NDArray[np.int64]) -> list[Result]:
    many = getattr(refit, "many", None)
    try:
        if many is None:
            return [_judge(refit(np.flatnonzero(masks[0]), int(seeds[0])))]
        outputs = np.asarray(many(masks, seeds), dtype=np.float64)
        if outputs.ndim != 2 or len(outputs) != len(masks):
            raise ValueError(f"refit.many gave shape {outputs.shape}, not ({len(masks)}, m)")
        return [_judge(row) for row in outputs]
    except Exception as error:
        if len(seeds) == 1:
            return [f"{type(error).__name__}: {error}"]
        half = len(seeds) // 2
        return [
            *_attempt(refit, masks[:half], seeds[:half]),
            *_attempt(refit, masks[half:], seeds[half:]),
        ]


def _judge(outputs: ArrayLike) -> Result:
    array = np.array(outputs, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        return f"gave shape {array.shape}, not (m,), one number for each test row"
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        return f"gave {array[wrong[0]]} for test row {wrong[0]} ({wrong.size} are not finite)"
    return array


def _collect(
    masks: NDArray[np.bool_],
    seeds: NDArray[np.int64],
    runs: dict[int, NDArray[np.float64]],
    errors: dict[int, str],
) -> Retrained:
    if not runs:
        first = errors[min(errors)]
        raise RuntimeError(
            f"no run worked: {len(errors)} of {seeds.size} were tried, and the first ended with "
            f"{first!r}"
        )
    # in the order of runs, so that a tie does not depend on which finished first
    (m, _), *_ = Counter(len(runs[run]) for run in sorted(runs)).most_common()
    outputs = np.full((seeds.size, m), np.nan)
    for run, result in runs.items():
        if len(result) == m:
            outputs[run] = result
        else:
            errors[run] = f"gave {len(result)} numbers where most runs gave {m}"
    failed = sorted(errors)
    failures = _failures(
        {
            "subset": [run // seeds.shape[1] for run in failed],
            "seed": [int(seeds.flat[run]) for run in failed],
            "error": [errors[run] for run in failed],
        }
    )
    if failed:
        warnings.warn(
            f"{len(failed)} of {seeds.size} runs failed and are left out (see .failures); the "
            f"first, on subset {failures['subset'][0]}: {errors[failed[0]]}",
            RetrainingWarning,
            stacklevel=users_frame(),
        )
    return Retrained(masks, seeds, outputs.reshape(*seeds.shape, m), failures)


def _failures(columns: dict[str, list[Any]]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(columns, columns=pd.Index(["subset", "seed", "error"]))
    return frame.astype({"subset": np.int64, "seed": np.int64, "error": object})
