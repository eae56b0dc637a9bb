"""Data, jobs and the stop watch of `values.py`; both of its runners import this.

Needs NumPy, scikit-learn and joblib, which both environments have. A runner reads a file with

- ``<data>/x, y, x_test, y_test``: rows whose values are wanted and rows that judge them,
- ``jobs``: JSON, a list of `Job`,

and answers with ``<key>/values`` (n,), ``<key>/told``, a JSON with ``cpu_s``, ``wall_s`` and what
else the task tells, or ``error``; and ``versions``, a JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

ENVIRONMENT = {
    name: "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TQDM_DISABLE")
} | {"PYTHONWARNINGS": "ignore"}
CALLS = "UPWEIGHT_BENCHMARK_CALLS"
REPEATED_UNTIL_S = 1.0
TIMEOUT_S = 900.0

SETS = {"iris": load_iris, "wine": load_wine, "digits": load_digits}
MANY_UNITS = ("wine",)
FLIPPED = 0.1
# Rows that are valued and rows that judge.
SIZES = {"iris": (75, 30), "wine": (90, 40), "digits": (300, 200)}

Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Data:
    """Rows to value, rows that judge, and which labels of the former are wrong."""

    x: Values
    y: np.ndarray[Any, np.dtype[np.int64]]
    x_test: Values
    y_test: np.ndarray[Any, np.dtype[np.int64]]
    wrong: np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Job:
    """One call of a library: the name of the answer, what to do, with which data and options.

    Quick calls are repeated, `repeat` times at most and for about a second; the best counts.
    """

    key: str
    task: str
    data: str
    options: dict[str, Any] = field(default_factory=dict)
    repeat: int = 1


# What a task returns: values and what else there is to tell.
Task = Callable[..., tuple[Values | None, dict[str, Any]]]


# ---- data ----------------------------------------------------------------------------------------


def split(
    name: str,
    train: int,
    test: int,
    seed: int,
    *,
    flipped: float = FLIPPED,
    standardised: bool | None = None,
) -> Data:
    """A stratified split; a share of its training labels is changed.

    Columns of one unit keep their proportions; those of the wines, of many units, are standardised,
    if nothing else is said.
    """
    x, y = SETS[name](return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        x, y, train_size=train, test_size=test, stratify=y, random_state=seed
    )
    if name in MANY_UNITS if standardised is None else standardised:
        scaler = StandardScaler().fit(x)
        x, x_test = scaler.transform(x), scaler.transform(x_test)
    else:
        x, x_test = x / x.max(), x_test / x.max()
    rng = np.random.default_rng([seed, 10])
    wrong = np.zeros(train, np.bool_)
    wrong[rng.choice(train, round(flipped * train), replace=False)] = True
    classes = len(np.unique(y))
    given = np.where(wrong, (y + rng.integers(1, classes, train)) % classes, y)
    return Data(x, given, x_test, y_test, wrong)


def weights(n: int) -> Values:
    """Of a utility that is a sum over the rows in the set: its values, whatever the method."""
    return np.random.default_rng(n).normal(size=n)


def save(path: Path, data: Mapping[str, Data], jobs: Sequence[Job]) -> None:
    """Write what a runner reads."""
    arrays = {
        f"{name}/{kind}": getattr(one, kind)
        for name, one in data.items()
        for kind in ("x", "y", "x_test", "y_test")
    }
    np.savez(path, jobs=json.dumps([asdict(job) for job in jobs]), **arrays)


def load(path: Path) -> tuple[dict[str, Data], list[Job]]:
    """Read what `save` wrote; nobody is told which labels are wrong."""
    with np.load(path, allow_pickle=False) as file:
        jobs = [Job(**job) for job in json.loads(str(file["jobs"]))]
        names = dict.fromkeys(key.split("/")[0] for key in file.files if "/" in key)
        kinds = ("x", "y", "x_test", "y_test")
        nobody = np.zeros(0, np.bool_)
        data = {name: Data(*(file[f"{name}/{k}"] for k in kinds), nobody) for name in names}
    return data, jobs


# ---- what both sides evaluate --------------------------------------------------------------------


class CountedRegression(LogisticRegression):
    """A logistic regression that leaves a byte in a file for each fit, in whatever process."""

    def fit(self, x: Any, y: Any, sample_weight: Any = None) -> Any:
        tick()
        return super().fit(x, y, sample_weight)


def regression() -> LogisticRegression:
    """The model that is trained again and again."""
    return CountedRegression(max_iter=1000)


def calls() -> int:
    """Models trained so far."""
    path = os.environ.get(CALLS)
    return Path(path).stat().st_size if path else 0


def tick() -> None:
    """Count."""
    if path := os.environ.get(CALLS):
        with open(path, "ab", buffering=0) as file:
            file.write(b".")


def twice(
    call: Callable[[int], Values], seed: int, again: bool
) -> tuple[Values | None, dict[str, Any]]:
    """The values by that seed; the seconds of it and of a second call, with the next seed."""
    began = time.perf_counter()
    values = call(seed)
    ended = time.perf_counter()
    told: dict[str, Any] = {"models": calls(), "once_s": ended - began}
    if again:
        call(seed + 1)
        told["again_s"] = time.perf_counter() - ended
    return values, told


# ---- the stop watch ------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """User and system seconds of this process and of those that it started and that ended."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def end_workers() -> None:
    """End joblib's workers, so that their seconds are known."""
    from joblib.externals.loky import get_reusable_executor

    if "joblib.externals.loky.reusable_executor" in sys.modules:
        get_reusable_executor().shutdown(wait=True, kill_workers=True)
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def once(task: Task, data: Data, job: Job) -> tuple[Values | None, dict[str, Any]]:
    """Do it once, with the seconds it took."""
    with tempfile.NamedTemporaryFile() as file:
        os.environ[CALLS] = file.name
        cpu, start = cpu_seconds(), time.perf_counter()
        values, told = task(data, **job.options)
        wall = time.perf_counter() - start
        if job.options.get("n_jobs", 1) != 1:
            end_workers()
        measured = {"cpu_s": cpu_seconds() - cpu, "wall_s": wall}
        trained = {"models": calls()} if calls() else {}
    return values, measured | trained | told


def measure(task: Task, data: Data, job: Job) -> tuple[Values | None, dict[str, Any]]:
    """The values, and the quickest of several times."""
    runs: list[dict[str, Any]] = []
    values = None
    while len(runs) < job.repeat and sum(run["cpu_s"] for run in runs) < REPEATED_UNTIL_S:
        values, told = once(task, data, job)
        runs.append(told)
    best = min(runs, key=lambda run: run["cpu_s"])
    return values, best | {"first_cpu_s": runs[0]["cpu_s"], "runs": len(runs)}


def _child(task: Task, data: Data, job: Job, connection: Connection) -> None:
    os.setsid()
    warnings.simplefilter("ignore")
    try:
        connection.send(measure(task, data, job))
    except Exception as error:  # the other jobs go on
        connection.send((None, {"error": f"{type(error).__name__}: {error}"}))
    connection.close()


def isolated(task: Task, data: Data, job: Job) -> tuple[Values | None, dict[str, Any]]:
    """Measure in a forked process, which ends with all that it has started."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, data, job, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(TIMEOUT_S):
            return receiver.recv()
        return None, {"error": f"no answer within {TIMEOUT_S:g} s"}
    except EOFError:
        return None, {"error": "the process died"}
    finally:
        process.join(timeout=1)
        with suppress(ProcessLookupError):
            if process.pid:
                os.killpg(process.pid, signal.SIGKILL)
        process.join()


def main(library: str, tasks: Mapping[str, Task]) -> None:
    """The command line of a runner."""
    parser = argparse.ArgumentParser()
    parser.add_argument("problem", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | ENVIRONMENT)
    data, jobs = load(options.problem)
    found: dict[str, Any] = {}
    for job in jobs:
        values, told = isolated(tasks[job.task], data.get(job.data, NOTHING), job)
        if values is not None:
            found[f"{job.key}/values"] = values
        found[f"{job.key}/told"] = json.dumps(told)
        said = told.get("error") or f"{told['cpu_s']:.4g} CPU s, {told['wall_s']:.4g} s"
        print(f"{library}: {job.key}: {said}", flush=True)
    names = ("torch", "numpy", "scikit-learn", library)
    versions = {"python": platform.python_version()} | {name: version(name) for name in names}
    np.savez(options.out, versions=json.dumps(versions), **found)


_NONE = np.zeros((0, 0))
NOTHING = Data(_NONE, *(np.zeros(0, np.int64), _NONE, np.zeros(0, np.int64)), np.zeros(0, np.bool_))
