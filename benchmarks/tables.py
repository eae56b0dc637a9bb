"""What the benchmarks share: starting runners, measuring scores, printing, bounds, results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

from common import ENVIRONMENT  # noqa: E402

from upweight.comparison import agreement  # noqa: E402

RESULTS = HERE / "results"
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
RUNNERS = {
    "upweight": (Path(sys.executable), HERE / "run_upweight.py"),
    "ours": (Path(sys.executable), HERE / "run_ours.py"),
    **{
        name: (PEERS, HERE / "peers" / f"run_{name}.py")
        for name in ("pydvl", "dattri", "kronfluence", "captum", "traker")
    },
}
# our method: the peer's name of it
PEER_METHODS = {
    "pydvl": {m: m for m in ("direct", "cg", "lissa", "arnoldi", "nystroem", "ekfac")},
    "dattri": {"direct": "explicit"} | {m: m for m in ("cg", "lissa", "arnoldi", "ekfac")},
}

TIMES = ("fit_s", "scores_s", "warm_s", "first_s")
AGREEMENT = (
    "error_percent",
    "pearson",
    "spearman",
    "pearson_top",
    "spearman_top",
    "relative_norm",
    "relative_norm_all",
)


def need_peers() -> None:
    """Stop where the peers are not installed."""
    if not PEERS.exists():
        sys.exit(f"no peers at {PEERS.parent.parent.name}: run make bench, or use --quick")


def run(
    library: str, problem: Path, methods: Sequence[str] = (), **options: float | str
) -> dict[str, Any]:
    """One runner in a process of its own, with its options (repeat, budget, seed): its file."""
    python, runner = RUNNERS[library]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npz"
        command = [python, runner, problem, out, "--methods", ",".join(methods)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", value]
        subprocess.run(
            list(map(str, command)), check=True, env=os.environ | ENVIRONMENT, stdout=sys.stderr
        )
        with np.load(out, allow_pickle=False) as data:
            return {key: data[key][()] for key in data.files}


def versions(found: Mapping[str, Any]) -> dict[str, str]:
    """Of Python, torch and the library behind a runner's file."""
    return json.loads(str(found["versions"]))


def accuracy(scores: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How far scores are from the reference: the mean over test rows, and all pairs (``_all``)."""
    scores, reference = scores.astype(np.float64), reference.astype(np.float64)
    mean, wanted = (torch.from_numpy(values.mean(0)) for values in (scores, reference))
    norm = float(np.linalg.norm(scores - reference) / np.linalg.norm(reference))
    found = agreement(wanted, mean, top=20) | {"relative_norm_all": norm}
    return {key: found[key] for key in AGREEMENT}


def times(rounds: Sequence[Mapping[str, Any]], method: str) -> dict[str, float]:
    """Best times over the rounds; fit and scores of one round belong together."""
    warm = min(rounds, key=lambda r: r[f"{method}/fit_s"] + r[f"{method}/scores_s"])
    return {
        "fit_s": float(warm[f"{method}/fit_s"]),
        "scores_s": float(warm[f"{method}/scores_s"]),
        "warm_s": float(warm[f"{method}/fit_s"] + warm[f"{method}/scores_s"]),
        "first_s": min(float(r[f"{method}/first_s"]) for r in rounds),
        "peak_mb": max(float(r[f"{method}/peak_mb"]) for r in rounds),
        "warm_runs": sum(int(r[f"{method}/runs"]) for r in rounds),
    }


def summary(
    rounds: Sequence[Mapping[str, Any]], method: str, reference: np.ndarray
) -> dict[str, Any]:
    """A line of a table: median figures over the rounds, and their ranges where they differ.

    A method that failed in a round has a line that says why, and nothing else.
    """
    settings = {"settings": json.loads(str(rounds[0][f"{method}/settings"]))}
    for found in rounds:
        if f"{method}/error" in found:
            return {"error": str(found[f"{method}/error"])} | settings
    each = [accuracy(found[f"{method}/scores"], reference) for found in rounds]
    line: dict[str, Any] = times(rounds, method)
    line |= {key: float(np.median([one[key] for one in each])) for key in AGREEMENT}
    ranges = {
        key: [min(one[key] for one in each), max(one[key] for one in each)] for key in each[0]
    }
    if any(low != high for low, high in ranges.values()):
        line["range"] = ranges
    return line | settings


def show(table: Mapping[str, Mapping[str, Any]]) -> None:
    """Print lines of `summary`, and the ranges of the error below."""
    print(
        f"{'':25}{'error %':>10}{'r':>9}{'rho':>8}{'r top':>8}{'rho top':>8}{'norm':>9}"
        f"{'norm all':>9}{'fit s':>9}{'scores s':>9}{'first s':>9}{'MiB':>7}"
    )
    for name, line in table.items():
        if "error" in line:
            print(f"{name:25} failed: {line['error']}")
            continue
        print(
            f"{name:25}{line['error_percent']:10.4g}{line['pearson']:9.5f}{line['spearman']:8.4f}"
            f"{line['pearson_top']:8.4f}{line['spearman_top']:8.4f}{line['relative_norm']:9.1e}"
            f"{line['relative_norm_all']:9.1e}{line['fit_s']:9.4f}{line['scores_s']:9.4f}"
            f"{line['first_s']:9.3f}{line['peak_mb']:7.1f}"
        )
    print("top: the twenty strongest rows; norm: relative 2-norm; all but norm all: of means")
    for name, line in table.items():
        if "range" in line:
            low, high = (f"{end:.4g}" for end in line["range"]["error_percent"])
            if low != high:
                print(f"  {name}: error {low} to {high} % over the seeds, the median above")


def ratio(table: Mapping[str, Mapping[str, Any]], peer: str, ours: str) -> dict[str, float]:
    """Peer over ours: above 1 we are faster."""
    if "error" in table[peer] or "error" in table[ours]:
        return {}
    return {key: table[peer][key] / table[ours][key] for key in TIMES}


@dataclass(frozen=True)
class Bound:
    """A figure of a line that must be at most, or at least, a limit."""

    line: str
    figure: str
    limit: float
    least: bool = False

    def check(self, table: Mapping[str, Mapping[str, Any]], where: str = "") -> dict[str, Any]:
        """The bound, the worst that was reached, and whether that is allowed."""
        found = table[self.line]
        reached = found.get(self.figure)
        if reached is not None and "range" in found:
            reached = found["range"][self.figure][0 if self.least else 1]
        # written so that a NaN fails
        good = reached is not None and (
            reached >= self.limit if self.least else reached <= self.limit
        )
        sign = ">=" if self.least else "<="
        return {
            "line": f"{where}{self.line}",
            "bound": f"{self.figure} {sign} {self.limit:g}",
            "reached": reached,
            "ok": bool(good),
        }


at_most: Callable[[str, str, float], Bound] = Bound
at_least: Callable[[str, str, float], Bound] = partial(Bound, least=True)


def show_bounds(checks: Iterable[Mapping[str, Any]]) -> None:
    """Print bound, reached, ok."""
    print(f"\n{'':34}{'bound':28}{'reached':>12}  ok")
    for check in checks:
        reached = "no answer" if check["reached"] is None else f"{check['reached']:.6g}"
        ok = "yes" if check["ok"] else "NO"
        print(f"{check['line']:34}{check['bound']:28}{reached:>12}  {ok}")


def stamp() -> dict[str, str]:
    """When and where."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per process",
    }


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Keep a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\n{path}")
