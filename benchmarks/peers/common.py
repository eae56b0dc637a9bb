"""What the peers' runners share: measuring, and the command line.

A runner reads a problem file (see `problems`) and answers with another ``.npz`` file, keyed by
method:

=====================  ==========================================================================
``<method>/scores``    (n_test, n_train) float32, ``g_test[j]^T (C + damping I)^-1 g_train[i]``:
                       positive where the training row lowers the test loss, no factor 1/n
``<method>/fit_s``     seconds to fit, best of the timed runs
``<method>/scores_s``  seconds for the scores once fitted, best of the timed runs
``<method>/first_s``   seconds of fit and scores together in the warm-up, the first call at all
``<method>/peak_mb``   growth of resident memory during a timed run, in MiB
``<method>/runs``      number of timed runs; 0: the warm-up run used up the budget, so it counts
``<method>/settings``  JSON: the options the method ran with
``<method>/error``     why the method gave no result (then the other keys are missing)
``versions``           JSON: versions of Python, torch and the library
=====================  ==========================================================================

With ``--dampings 0.005,default,0.1`` every method is run for each of them in turn, in a process of
its own, and ``<method>`` above is ``<method>@<damping>``; a method without a damping is run once,
as ``<method>@none``. The first damping is timed like a single one, the others are repeated once.
Dampings for which ``--grid-budget`` leaves no seconds have an ``error`` that says so. What torch
loads when it first differentiates is loaded before, and counts for no library.

This module needs only NumPy and torch, so our own side of a comparison can import it too.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from problems import Problem, build_model, load_problem, make_loader, save_problem
from torch import Tensor

__all__ = [
    "ENVIRONMENT",
    "Method",
    "Options",
    "Problem",
    "build_model",
    "load_problem",
    "main",
    "make_loader",
    "save_problem",
]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
}

PATIENCE = 2


@dataclass(frozen=True)
class Method:
    """How to run one method: ``fit`` returns what ``scores`` takes."""

    fit: Callable[[], Any]
    scores: Callable[[Any], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    damped: bool = True  # whether the damping of the problem matters


@dataclass(frozen=True)
class Options:
    """How a method is measured."""

    repeat: int = 3
    budget_s: float = 120.0
    timeout_s: float = 900.0
    grid_s: float = 600.0
    memory_gb: float = 12.0
    seed: int = 0


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the peers draw from the global generator
    torch.manual_seed(seed)


def _resident_mb(key: str) -> float:
    """Read ``VmRSS`` or ``VmHWM`` (its high-water mark) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def _reset_peak() -> float:
    """Give freed memory back, reset the high-water mark and return the resident MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident_mb("VmRSS")


def _run_once(method: Method, seed: int) -> dict[str, Any]:
    """Fit and score once, measuring seconds and the growth of resident memory."""
    seed_everything(seed)
    resident = _reset_peak()
    start = time.perf_counter()
    fitted = method.fit()
    between = time.perf_counter()
    scores = method.scores(fitted)
    end = time.perf_counter()
    return {
        "fit_s": between - start,
        "scores_s": end - between,
        "peak_mb": _resident_mb("VmHWM") - resident,
        "scores": scores.detach().to(torch.float32).cpu().numpy(),
    }


def measure(method: Method, options: Options) -> dict[str, Any]:
    """Run a method: one warm-up, then up to ``repeat`` timed runs while the budget lasts."""
    start = time.perf_counter()
    warm_up = _run_once(method, options.seed)
    runs: list[dict[str, Any]] = []
    while len(runs) < options.repeat and time.perf_counter() - start < options.budget_s:
        runs.append(_run_once(method, options.seed))
    counted = runs or [warm_up]
    result: dict[str, Any] = {
        key: min(run[key] for run in counted) for key in ("fit_s", "scores_s")
    }
    result["peak_mb"] = max(run["peak_mb"] for run in counted)
    result["first_s"] = warm_up["fit_s"] + warm_up["scores_s"]
    return result | {"scores": counted[-1]["scores"], "runs": len(runs)}


def _child(method: Method, options: Options, connection: Connection) -> None:
    """Measure in a child process and send back the result or the error."""
    limit = int(options.memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        result = measure(method, options)
    except Exception as error:  # a peer may fail in any way; the other methods go on
        result = {"error": f"{type(error).__name__}: {error}"}
    connection.send(result)
    connection.close()


def measure_isolated(method: Method, options: Options) -> dict[str, Any]:
    """Measure in a forked process, so that crashes, time and memory stay its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(method, options, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(options.timeout_s):
            return receiver.recv()
        return {"error": f"no answer within {options.timeout_s:g} s"}
    except EOFError:
        process.join()
        return {"error": f"the process died with exit code {process.exitcode}"}
    finally:
        if process.is_alive():
            process.join(timeout=1)
        process.kill()
        process.join()


def _keep(
    results: dict[str, Any], key: str, found: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Add what was measured under its names, and print a line."""
    found = {**found, "settings": json.dumps(settings)}
    results |= {f"{key}/{name}": value for name, value in found.items()}
    print(f"{key:24s} {_describe(found)}", flush=True)


def run_methods(
    methods: Mapping[str, Method], names: Sequence[str], options: Options
) -> dict[str, Any]:
    """Measure the named methods one after the other and print a line about each."""
    results: dict[str, Any] = {}
    for name in names:
        found = measure_isolated(methods[name], options)
        _keep(results, name, found, methods[name].settings)
    return results


def run_grid(
    make: Callable[[float | None], dict[str, Method]],
    dampings: Mapping[str, float | None],
    names: Sequence[str],
    options: Options,
) -> dict[str, Any]:
    """Measure the named methods at every damping, as long as a method's seconds last."""
    results: dict[str, Any] = {}
    made = {label: make(value) for label, value in dampings.items()}
    first = next(iter(made.values()))
    for name in names:
        if not first[name].damped:
            found = measure_isolated(first[name], options)
            _keep(results, f"{name}@none", found, first[name].settings)
            continue
        begin, slowest, used = time.perf_counter(), 0.0, options
        for label, methods in made.items():
            if time.perf_counter() - begin + slowest > options.grid_s:
                found = {"error": f"not tried: it would take more than {options.grid_s:g} s"}
            else:
                found = measure_isolated(methods[name], used)
                slowest = max(slowest, found.get("first_s", 0.0))
            # another damping may not converge: it has a few times the seconds of the others
            limit = PATIENCE * slowest + PATIENCE if slowest else options.timeout_s
            repeat = min(1, options.repeat)
            used = replace(options, repeat=repeat, timeout_s=min(limit, options.timeout_s))
            _keep(results, f"{name}@{label}", found, methods[name].settings)
    return results


def _describe(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return f"ERROR {result['error']}"
    note = "" if np.isfinite(result["scores"]).all() else "  NOT FINITE"
    return (
        f"fit {result['fit_s']:.4f} s  scores {result['scores_s']:.4f} s"
        f"  first call {result['first_s']:.3f} s  peak {result['peak_mb']:.1f} MiB"
        f"  runs {result['runs']}{note}"
    )


def _restart_in_environment() -> None:
    """Start this program anew unless it already runs with one thread and without bars.

    NumPy, torch and tqdm read these variables when they are imported, which has happened.
    """
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | ENVIRONMENT)


def _versions(library: str) -> str:
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("torch", "numpy", library)}
    return json.dumps(found)


def _parser(batch_size: int) -> argparse.ArgumentParser:
    defaults = Options()
    parser = argparse.ArgumentParser()
    parser.add_argument("problem", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", default="", help="names joined by commas; all if left out")
    parser.add_argument("--skip", default="", help="variants, after ~, that are not run")
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, help="0: one batch of all training rows"
    )
    parser.add_argument("--repeat", type=int, default=defaults.repeat)
    parser.add_argument(
        "--dampings", default="", help="joined by commas; 'default' for the library's own"
    )
    for flag, default, text in (
        ("--budget", defaults.budget_s, "seconds after which a method is not repeated again"),
        ("--timeout", defaults.timeout_s, "seconds after which a method is given up"),
        ("--grid-budget", defaults.grid_s, "seconds after which no more dampings are tried"),
        ("--memory-gb", defaults.memory_gb, "address space of a method"),
    ):
        parser.add_argument(flag, type=float, default=default, help=f"{text} ({default:g})")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    return parser


def _preload() -> None:
    """Load what torch loads when a function is first differentiated: no method's seconds."""
    one = torch.ones(1)
    torch.func.jvp(torch.func.grad(lambda x: (x**2).sum()), (one,), (one,))


def _damping(label: str) -> float | None:
    return None if label == "default" else float(label)


def main(
    library: str, make_methods: Callable[[Problem, int], dict[str, Method]], batch_size: int
) -> None:
    """Run the command line of a runner whose default batch size is given."""
    parser = _parser(batch_size)
    args = parser.parse_args()
    _restart_in_environment()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    problem = load_problem(args.problem)
    methods = make_methods(problem, args.batch_size)
    names = args.methods.split(",") if args.methods else list(methods)
    skipped = args.skip.split(",") if args.skip else []
    names = [name for name in names if name.partition("~")[2] not in skipped or "~" not in name]
    if unknown := [name for name in names if name not in methods]:
        parser.error(f"unknown methods {unknown}; there are {list(methods)}")
    options = Options(
        args.repeat, args.budget, args.timeout, args.grid_budget, args.memory_gb, args.seed
    )
    if args.dampings:
        _preload()

        def make(damping: float | None) -> dict[str, Method]:
            return make_methods(replace(problem, damping=damping), args.batch_size)

        dampings = {label: _damping(label) for label in args.dampings.split(",")}
        results = run_grid(make, dampings, names, options)
    else:
        results = run_methods(methods, names, options)
    np.savez(args.out, versions=_versions(library), **results)
