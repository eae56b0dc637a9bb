"""EK-FAC at scale beside kronfluence and bergson: processor seconds, memory and agreement.

    .venv/bin/python benchmarks/scale.py                     # all; about half an hour
    .venv/bin/python benchmarks/scale.py --problem digits    # one; the others stay as they were
    .venv/bin/python benchmarks/scale.py --ours-only         # the peers stay as they were

Three networks (`scale_problems`), random weights trained for a few steps, the same weights, rows
and damping on all sides, each side in a process of its own with one thread. Seconds are user and
system seconds of the process from after imports, model and rows; memory is its highest resident
memory above what it had then, and raw. Targets are printed beside what is reached, and nothing
about seconds is ever an error. Writes ``benchmarks/results/scale.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scale_linear import show_linear
from scale_phases import ENVIRONMENT
from scale_problems import PROBLEMS, build, many, save, tracked
from scale_run import FIFTH, LOOSE, missing
from scale_targets import NEARLY, agreement, judge, show_targets
from tables import HERE, PEERS, RESULTS, need_peers, stamp, write

BERGSON = HERE.parent / ".venv-bergson" / "bin" / "python"
RUNNERS = {
    "upweight": (Path(sys.executable), HERE / "scale_run.py"),
    "kronfluence": (PEERS, HERE / "peers" / "run_kronfluence_scale.py"),
    "bergson": (BERGSON, HERE / "peers" / "run_bergson.py"),
}
TIMEOUT = 3600  # seconds of a side
OURS = ("exact", "exact, other labels", "factored", "fifth")
ROWS, QUERIES = (1_000, 3_000, 10_000, 30_000, 100_000), (30, 100, 300, 1_000)
FEW, SOME = 100, 10_000  # queries while rows grow, rows while queries grow

Line = dict[str, Any]
Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """How the sides run on a problem: options by the name of a side."""

    title: str
    peers: dict[str, list[str]]
    ours: tuple[str, ...] = OURS
    repeats: int = 1  # of short runs; the one with the least seconds counts
    quick: tuple[str, ...] = ()
    apart: bool = False  # the eigenvalues' seconds of a row, by what K-FAC does without
    notes: list[str] = field(default_factory=list)


SETTINGS = {
    "digits": Setting(
        "Network 64-256-256-10 on digits",
        {
            "kronfluence": ["--batch-size", "64"],
            "kronfluence, empirical": ["--batch-size", "64", "--empirical"],
        },
        ours=(*OURS, "empirical"),
        repeats=3,
        quick=("exact", "factored", "fifth"),
    ),
    "mlp": Setting(
        "Network 784-1024-1024-1024-10 on clusters",
        {
            "kronfluence": [
                *("--batch-size", "32", "--query-batch-size", "50"),
                *("--eigenvalue-rows", "500"),
            ]
        },
        apart=True,
        notes=["kronfluence fits its eigenvalues on the first 500 rows, upweight on all"],
    ),
    "gpt": Setting(
        "GPT-2-shaped, 4 layers of width 256, rows of 128 tokens",
        {"kronfluence": ["--batch-size", "8"], "bergson": ["--token-batch-size", "1024"]},
        quick=("exact",),
    ),
}


def start(side: str, problem: Path, options: list[str], repeats: int = 1) -> tuple[Line, Any]:
    """What a runner found, in a process of its own: a line, and the scores if there are any."""
    library = side.partition(",")[0]
    python, runner = RUNNERS[library]
    best: tuple[Line, Any] | None = None
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.npz"
            command = [str(python), str(runner), str(problem), str(out), *options]
            load = os.getloadavg()[0]
            try:
                done = subprocess.run(
                    command,
                    env=os.environ | ENVIRONMENT,
                    stdout=sys.stderr,
                    stderr=subprocess.PIPE,
                    text=True,
                    timeout=TIMEOUT,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return {"error": f"no answer within {TIMEOUT} s"}, None
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                return {"error": said[-1]}, None
            with np.load(out, allow_pickle=False) as data:
                line = json.loads(str(data["told"])) | {"options": options, "load": load}
                scores = data["scores"].astype(np.float64) if "scores" in data.files else None
        if best is None or line["cpu_s"] < best[0]["cpu_s"]:
            best = line, scores
    assert best is not None
    return best


def sides_of(name: str, options: argparse.Namespace) -> dict[str, tuple[str, list[str], int]]:
    """By the name of a line: the side, its options, and how often it runs."""
    setting = SETTINGS[name]
    found: dict[str, tuple[str, list[str], int]] = {}
    repeats = 1 if options.quick else setting.repeats
    if not options.ours_only:
        for side, own in setting.peers.items():
            if side == "bergson" and not BERGSON.exists():
                continue
            found[side] = (side, own, repeats)
    for recipe in setting.quick if options.quick else setting.ours:
        found[f"upweight {recipe}"] = ("upweight", ["--recipe", recipe], repeats)
    if setting.apart and not options.quick:
        for recipe in ("exact", "K-FAC"):
            own = ["--recipe", recipe, "--fit-only"]
            found[f"upweight {recipe}, fit"] = ("upweight", own, 3)
    return found


def measure(name: str, options: argparse.Namespace, before: Line) -> Line:
    """All sides on a problem, and how they agree."""
    problem = PROBLEMS[name](quick=options.quick)
    model = build(problem)
    layers = tracked(model)
    lines: dict[str, Line] = {}
    scores: Scores = {}
    absent = missing()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        save(path, problem)
        for label, (side, own, repeats) in sides_of(name, options).items():
            if side == "upweight" and own[1] in absent:
                lines[label] = {"missing": True}
            else:
                lines[label], found = start(side, path, own, repeats)
                if found is not None:
                    scores[label] = found
            show_line(f"{name}: {label}", lines[label])
        second = None if options.quick else second_queries(path)
    if options.ours_only:  # theirs are of an earlier run
        kept = {k: v for k, v in before.get("sides", {}).items() if not k.startswith("upweight")}
        lines = kept | lines
    return {
        "title": SETTINGS[name].title,
        "train_rows": len(problem.x_train),
        "query_rows": len(problem.x_query),
        "parameters": sum(p.numel() for at in layers for p in model.get_submodule(at).parameters()),
        "damping": problem.damping,
        "notes": SETTINGS[name].notes,
        "sides": lines,
        "agreement": (before.get("agreement", {}) if options.ours_only else {}) | agree(scores),
        "second_queries": second,
    }


def agree(scores: Scores) -> dict[str, Line]:
    """How near scores are to others that should be the same, or nearly."""
    pairs = [(label, "upweight exact") for label in scores if label != "upweight exact"]
    pairs += [("upweight exact", "kronfluence"), ("bergson", "kronfluence")]
    pairs += [("upweight empirical", "kronfluence, empirical")]
    pairs = [pair for pair in pairs if pair[0].partition(",")[0] != "kronfluence"]
    return {
        f"{one} | {other}": agreement(scores[one], scores[other])
        for one, other in pairs
        if one in scores and other in scores
    }


def second_queries(problem: Path) -> Line | None:
    """A second set of queries against stored gradients, beside the first against the rows.

    Returns the processor seconds of the first (fit and scores), and for every kind of store those
    of the second, of keeping the store, its size, and the correlation with exact scores. The
    target is judged by the fastest store whose scores correlate with the exact ones as factored
    scores have to.
    """
    line, _ = start("upweight", problem, ["--recipe", "exact", "--twice"])
    if "error" in line:
        return line
    parts = {name: part["cpu_s"] for name, part in line["parts"].items()}
    stores = line["facts"]["stores"]
    for name, store in stores.items():
        store |= {"keep_cpu_s": parts[f"keep {name}"], "second_cpu_s": parts[f"second {name}"]}
    near = [name for name in stores if stores[name]["correlation"] >= NEARLY]
    best = min(near, key=lambda name: stores[name]["second_cpu_s"])
    return {
        "first_cpu_s": parts["fit"] + parts["scores"],
        "second_cpu_s": stores[best]["second_cpu_s"],
        "stores": stores,
    }


def linear(options: argparse.Namespace) -> dict[str, list[Line]]:
    """Cost and memory by the number of rows and of queries; scores go to disk."""
    sizes = {
        "rows": [(n, FEW) for n in (ROWS[:1] if options.quick else ROWS)],
        "queries": [] if options.quick else [(SOME, m) for m in QUERIES],
    }
    recipes = [r for r in ("exact", "factored") if r not in missing()][: 1 if options.quick else 2]
    found: dict[str, list[Line]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        for kind, pairs in sizes.items():
            found[kind] = []
            for n, m in pairs:
                save(path, many(n, m))
                for recipe in recipes:
                    line, _ = start("upweight", path, ["--recipe", recipe, "--to-disk"])
                    line |= {"rows": n, "queries": m, "recipe": recipe}
                    found[kind].append(line)
                    show_line(f"{n:,} x {m:,}: {recipe}", line)
    return found


def show_line(label: str, line: Line) -> None:
    """Print what a side took."""
    if "cpu_s" not in line:
        print(f"{label:36} {'missing' if 'missing' in line else 'failed: ' + line['error']}")
        return
    parts = "  ".join(f"{name} {part['cpu_s']:.2f}" for name, part in line["parts"].items())
    print(
        f"{label:36}{line['cpu_s']:9.2f} s of cpu {line['peak_mb']:8.0f} MiB"
        f" ({line['peak_raw_mb']:.0f} raw)  {parts}",
        flush=True,
    )


def versions(problems: dict[str, Line], before: dict[str, Any]) -> dict[str, Any]:
    """Of all libraries that ran now or before."""
    found = dict(before)
    for problem in problems.values():
        for label, line in problem["sides"].items():
            if "versions" in line:
                found[label.partition(" ")[0].rstrip(",")] = line["versions"]
    return found


def failures(result: Line) -> list[str]:
    """Our runs that gave an error."""
    lines = {
        f"{name}: {label}": line
        for name, problem in result["problems"].items()
        for label, line in problem["sides"].items()
    }
    for kind, found in result["linear"].items():
        lines |= {f"{kind}: {line['rows']} x {line['queries']}": line for line in found}
    return [
        f"{label}: {line['error']}"
        for label, line in lines.items()
        if "error" in line and "kronfluence" not in label and "bergson" not in label
    ]


def main() -> None:
    """Measure, print the ratios beside the targets, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--problem", choices=[*PROBLEMS, "linear"], help="one; default: all")
    parser.add_argument("--ours-only", action="store_true", help="no peers; theirs are kept")
    parser.add_argument("--quick", action="store_true", help="our side alone; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args()
    options.ours_only = options.ours_only or options.quick
    if not options.ours_only and options.problem != "linear":
        need_peers()
    torch.set_num_threads(1)
    before: Line = {}
    if options.out.exists() and not options.quick:
        before = json.loads(options.out.read_text(encoding="utf-8"))
    problems: dict[str, Line] = dict(before.get("problems", {}))
    for name in PROBLEMS:
        wanted = options.problem in (None, name) and (SETTINGS[name].quick or not options.quick)
        if wanted:
            problems[name] = measure(name, options, problems.get(name, {}))
    lines = before.get("linear", {})
    if options.problem in (None, "linear"):
        lines = linear(options)
    result = stamp() | {
        "versions": versions(problems, before.get("versions", {})),
        "recipes": {"factored": LOOSE, "fifth": FIFTH},
        "problems": problems,
        "linear": lines,
    }
    result["targets"] = judge(result)
    show_linear(lines)
    show_targets(result)
    if not options.quick:
        write(options.out, result)
    if failed := failures(result):
        sys.exit("\n".join(["ours gave no answer:", *failed]))


if __name__ == "__main__":
    main()
