"""What the peers' runners share: problem files, the model, measuring, the command line.

A *problem* is an ``.npz`` file without pickle that holds ``x_train``, ``y_train``, ``x_test``,
``y_test``, the widths ``sizes`` of a multilayer perceptron, its ``activation``, its weights
``state/<i>.weight`` and ``state/<i>.bias`` (names as in ``torch.nn.Sequential``) and the
``damping``. A runner answers with another ``.npz`` file, keyed by method:

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
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
}


@dataclass(frozen=True)
class Problem:
    """Rows, weights and damping of one comparison, in float32 (labels in int64)."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    sizes: tuple[int, ...]
    activation: str
    state: dict[str, Tensor]
    damping: float

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Training inputs and labels."""
        return self.x_train, self.y_train

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """Test inputs and labels."""
        return self.x_test, self.y_test


@dataclass(frozen=True)
class Method:
    """How to run one method: ``fit`` returns what ``scores`` takes."""

    fit: Callable[[], Any]
    scores: Callable[[Any], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """How a method is measured."""

    repeat: int = 3
    budget_s: float = 120.0
    timeout_s: float = 900.0
    memory_gb: float = 12.0
    seed: int = 0


def _floats(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _labels(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64))


def load_problem(path: str | Path) -> Problem:
    """Read a problem file."""
    with np.load(path, allow_pickle=False) as data:
        names = [key for key in data.files if key.startswith("state/")]
        return Problem(
            x_train=_floats(data["x_train"]),
            y_train=_labels(data["y_train"]),
            x_test=_floats(data["x_test"]),
            y_test=_labels(data["y_test"]),
            sizes=tuple(int(width) for width in data["sizes"]),
            activation=str(data["activation"]),
            state={name.removeprefix("state/"): _floats(data[name]) for name in names},
            damping=float(data["damping"]),
        )


def save_problem(path: str | Path, problem: Problem) -> None:
    """Write a problem file, the inverse of `load_problem`."""
    arrays: dict[str, Any] = {f"state/{name}": t.numpy() for name, t in problem.state.items()}
    for name in ("x_train", "y_train", "x_test", "y_test"):
        arrays[name] = getattr(problem, name).numpy()
    np.savez(
        path,
        sizes=np.array(problem.sizes),
        activation=np.array(problem.activation),
        damping=np.array(problem.damping),
        **arrays,
    )


def build_model(problem: Problem) -> nn.Sequential:
    """Build the multilayer perceptron of the problem with its weights, in eval mode."""
    activation = ACTIVATIONS[problem.activation]
    layers: list[nn.Module] = []
    for width_in, width_out in zip(problem.sizes, problem.sizes[1:], strict=False):
        layers += [nn.Linear(width_in, width_out), activation()]
    model = nn.Sequential(*layers[:-1])
    model.load_state_dict(problem.state)
    return model.eval()


def make_loader(rows: tuple[Tensor, Tensor], batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Serve the rows in order, in batches (a size of 0 means one batch of all rows)."""
    return DataLoader(TensorDataset(*rows), batch_size=batch_size or len(rows[0]), shuffle=False)


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


def run_methods(
    methods: Mapping[str, Method], names: Sequence[str], options: Options
) -> dict[str, Any]:
    """Measure the named methods one after the other and print a line about each."""
    results: dict[str, Any] = {}
    for name in names:
        result = measure_isolated(methods[name], options)
        result["settings"] = json.dumps(methods[name].settings)
        results |= {f"{name}/{key}": value for key, value in result.items()}
        print(f"{name:9s} {_describe(result)}", flush=True)
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
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, help="0: one batch of all training rows"
    )
    parser.add_argument("--repeat", type=int, default=defaults.repeat)
    for flag, default, text in (
        ("--budget", defaults.budget_s, "seconds after which a method is not repeated again"),
        ("--timeout", defaults.timeout_s, "seconds after which a method is given up"),
        ("--memory-gb", defaults.memory_gb, "address space of a method"),
    ):
        parser.add_argument(flag, type=float, default=default, help=f"{text} ({default:g})")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    return parser


def main(
    library: str, make_methods: Callable[[Problem, int], dict[str, Method]], batch_size: int
) -> None:
    """Run the command line of a runner whose default batch size is given."""
    parser = _parser(batch_size)
    args = parser.parse_args()
    _restart_in_environment()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    methods = make_methods(load_problem(args.problem), args.batch_size)
    names = args.methods.split(",") if args.methods else list(methods)
    if unknown := [name for name in names if name not in methods]:
        parser.error(f"unknown methods {unknown}; there are {list(methods)}")
    options = Options(args.repeat, args.budget, args.timeout, args.memory_gb, args.seed)
    results = run_methods(methods, names, options)
    np.savez(args.out, versions=_versions(library), **results)
