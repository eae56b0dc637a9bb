"""Which rows are wrong? `upweight audit` on tables with planted faults, beside cleanlab.

    .venv/bin/python benchmarks/audit.py [--parts labels,cells,twins,scale] [--large]

Flipped labels, spoiled cells and copies of rows in eight tables, over five seeds, and seconds and
memory on 20,000 rows of 30 columns (a million with ``--large``, which takes up to an hour). Prints
tables and bounds and writes ``benchmarks/results/audit.json``; with ``--parts`` or ``--data`` the
rest of that file stays as it is.

How suspicion is made was chosen on seeds 100 to 399 of most of these tables; the seeds here begin
at 1000. So flips, corruptions and everything random are new, and so is the table ``mixed``; the
clean rows of the others are not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import audit_scale
import numpy as np
from audit_cases import Case, Line, caught, work
from audit_data import DATA, mixed_bayes
from audit_tables import bounds, sections
from tables import PEERS, RESULTS, need_peers, show_bounds, stamp, write

# `tables` has put the folder of peers on the path
from common import ENVIRONMENT  # isort: skip

from upweight.evaluate import detection

PARTS = ("labels", "cells", "twins", "scale")
FIRST_SEED = 1000
QUICK = ("wine", "iris")
# Long ones first, so that the processes end at about the same time.
LONG = ("digits", "mixed", "breast_cancer")


def tasks(options: argparse.Namespace, parts: list[str]) -> list[tuple[Any, ...]]:
    """A piece of work for every part, table and seed."""
    names = list(QUICK) if options.quick else options.data.split(",")
    present = []
    for name in names:
        if DATA[name](FIRST_SEED) is None:
            print(f"{name} is left out: its package is not in {PEERS.parent.parent.name}")
        else:
            present.append(name)
    present.sort(key=lambda name: LONG.index(name) if name in LONG else len(LONG))
    seeds = range(FIRST_SEED, FIRST_SEED + (1 if options.quick else options.seeds))
    return [
        (part, name, seed, options.quick)
        for part in parts
        if part != "scale"
        for name in present
        for seed in seeds
    ]


def spread(todo: list[tuple[Any, ...]], jobs: int) -> dict[str, tuple[list[Line], list[Case]]]:
    """All pieces of work, in their order, by part."""
    found: dict[str, tuple[list[Line], list[Case]]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for (part, name, seed, _), (lines, cases) in zip(todo, pool.map(work, todo), strict=True):
            print(f"{part}: {name}, seed {seed}", file=sys.stderr, flush=True)
            mine = found.setdefault(part, ([], []))
            mine[0].extend(lines)
            mine[1].extend(cases)
    return found


def add_cleanlab(lines: list[Line], cases: list[Case]) -> dict[str, str]:
    """What cleanlab finds in the same features and labels, into the lines; its versions."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "cases.npz", Path(folder) / "out.npz"
        arrays = {}
        for at, (x, y, _) in enumerate(cases):
            arrays |= {f"{at}/x": x, f"{at}/y": y}
        np.savez(given, **arrays)
        runner = Path(__file__).parent / "peers" / "run_cleanlab.py"
        subprocess.run(
            [PEERS, runner, given, out],
            check=True,
            env=os.environ | ENVIRONMENT,
            stdout=sys.stderr,
        )
        with np.load(out, allow_pickle=False) as found:
            for at, (line, (_, _, wrong)) in enumerate(zip(lines, cases, strict=True)):
                line["cleanlab"] = {}
                for method in ("features", "probabilities"):
                    scores, flags = (found[f"{at}/{method}/{of}"] for of in ("scores", "flags"))
                    area = {"auc": detection(scores, wrong).auc} if wrong.any() else {}
                    line["cleanlab"][method] = {**area, **caught(flags, wrong)}
            return json.loads(str(found["versions"]))


def scale(large: bool, earlier: list[Line]) -> list[Line]:
    """Lines of the sizes asked for; of a size that is not, the earlier ones."""
    rows = [audit_scale.SMALL, *([audit_scale.LARGE] if large else [])]
    kept = [line for line in earlier if line["rows"] not in rows]
    lines = []
    for size in rows:
        for threads in (2, 1) if size == audit_scale.SMALL else (2,):
            lines.append(audit_scale.measure(size, threads))
            print(f"scale: {size:,} rows, {threads} threads", file=sys.stderr, flush=True)
    return sorted([*lines, *kept], key=lambda line: (line["rows"], line["threads"]))


def main() -> None:
    """Plant, audit, judge, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", default=",".join(PARTS), help="joined by commas")
    parser.add_argument("--data", default=",".join(DATA), help="tables, joined by commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--large", action="store_true", help="a million rows too")
    parser.add_argument("--quick", action="store_true", help="our side alone; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS / "audit.json")
    options = parser.parse_args()
    parts = ["labels", "cells"] if options.quick else options.parts.split(",")
    if not options.quick:
        need_peers()
    result: dict[str, Any] = {}
    if options.out.exists() and not options.quick:
        result = json.loads(options.out.read_text(encoding="utf-8"))
    own = {name: version(name) for name in ("torch", "scikit-learn", "upweight")}
    result |= stamp()
    result.setdefault("versions", {})["upweight"] = {"python": platform.python_version(), **own}
    for part, (lines, cases) in spread(tasks(options, parts), options.jobs).items():
        if part == "labels" and not options.quick:
            result["versions"]["cleanlab"] = add_cleanlab(lines, cases)
        measured = {line["set"] for line in lines}
        kept = [line for line in result.get(part, ()) if line["set"] not in measured]
        result[part] = [*kept, *lines]
    if "scale" in parts:
        result["scale"] = scale(options.large, result.get("scale", []))
    result["mixed_bayes_accuracy"] = mixed_bayes()
    checks = bounds(result)
    if not options.quick:
        write(options.out, result | {"bounds": checks})
    for title, head, rows in sections(result):
        widths = [max(len(line[at]) for line in [head, *rows]) for at in range(len(head))]
        print(f"\n{title}")
        for line in [head, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    show_bounds(checks)


if __name__ == "__main__":
    main()
