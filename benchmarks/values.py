"""Data values beside pyDVL: the same estimator, rows, seed and number of utilities on both sides.

    .venv/bin/python benchmarks/values.py [--parts knn,free,tmc,cache,mislabel,oob,memory]

Each call has a forked process with one thread. Prints tables and targets and writes
``benchmarks/results/values.json``; with ``--parts`` the rest of that file stays as it is. Fails if
values that must be equal are not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from page_values import sections, targets
from tables import HERE, PEERS, RESULTS, need_peers, show_bounds, stamp, write
from values_data import ENVIRONMENT, SIZES, Data, Job, Values, save, split

from upweight.evaluate import detection

RUNNERS = {
    "pydvl": (PEERS, HERE / "peers" / "run_pydvl_values.py"),
    "upweight": (Path(sys.executable), HERE / "run_upweight_values.py"),
}
MORE_SEEDS = 10
DIGITS, DIGITS_SIZE = "digits-1000", (1000, 300)
K, TREES = 5, 500
# Rows: subsets of both sides; pyDVL's work for a subset is quadratic in the rows.
FREE = {75: 200, 300: 60, 1000: 15}
FREE_OURS, FREE_SUBSETS = (75, 300, 1000, 3000), 2_000
TMC_SETS, TMC_PERMUTATIONS = ("iris", "wine"), 50
CACHE = {"subsets": 300, "permutations": 5, "seed": 0}
# Permutations and subsets of pyDVL, utilities of ours.
BUDGETS = {"iris": (100, 2_000), "wine": (100, 2_000), "digits": (10, 500)}
EVALUATIONS = 2_000
ROWS, QUICK_ROWS = 1_000_000, 20_000
EQUAL = 1e-6
LOGISTIC, TRUNCATION = "Shapley, logistic", 0.01  # the share at which pyDVL truncates

Line = dict[str, Any]
Answer = tuple[Values | None, Line]


class Side:
    """One library's runner; each call of it starts a process."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.versions: dict[str, str] = {}

    def __call__(self, data: dict[str, Data], jobs: Sequence[Job]) -> list[Answer]:
        """The values of each job, and what was measured."""
        python, runner = RUNNERS[self.library]
        used = {job.data: data[job.data] for job in jobs if job.data}
        with tempfile.TemporaryDirectory() as folder:
            problem, out = Path(folder) / "problem.npz", Path(folder) / "out.npz"
            save(problem, used, jobs)
            subprocess.run(
                [python, runner, problem, out],
                check=True,
                env=os.environ | ENVIRONMENT,
                stdout=sys.stderr,
            )
            with np.load(out, allow_pickle=False) as found:
                self.versions = json.loads(str(found["versions"]))
                return [
                    (
                        found.get(f"{job.key}/values"),
                        json.loads(str(found[f"{job.key}/told"])),
                    )
                    for job in jobs
                ]


Sides = dict[str, Side]


def lines(
    sides: Sides, data: dict[str, Data], jobs: dict[str, list[Job]], labels: dict[str, Line]
) -> tuple[list[Line], dict[tuple[str, str], Values]]:
    """A line for each job of each library: its label (by key) and what was measured; the values."""
    found: list[Line] = []
    kept: dict[tuple[str, str], Values] = {}
    for library, side in sides.items():
        if not jobs.get(library):
            continue
        for job, (values, told) in zip(jobs[library], side(data, jobs[library]), strict=True):
            line = {"library": library, "method": job.task, "set": job.data} | labels.get(
                job.key, {}
            )
            if values is not None:
                kept[library, job.key] = values
                wrong = data[job.data].wrong if job.data else np.zeros(0)
                if wrong.any():
                    line["auc"] = detection(values, wrong).auc
            found.append(line | {"options": job.options} | told)
    return found, kept


def apart(kept: dict[tuple[str, str], Values], ours: str, theirs: str) -> Line:
    """How far our values are from theirs; nothing where there are none."""
    sides = kept.get(("upweight", ours)), kept.get(("pydvl", theirs))
    if sides[0] is None or sides[1] is None:
        return {}
    return {"largest_difference": float(np.abs(sides[0] - sides[1]).max())}


# ---- the parts -----------------------------------------------------------------------------------


def part_knn(sides: Sides, quick: bool, splits: int) -> Line:
    """Exact KNN-Shapley values of 1,000 rows of digits by 300 others."""
    # Of columns that are not standardised many distances are equal, and ties are broken at will.
    data = {DIGITS: split("digits", *DIGITS_SIZE, 0, standardised=True)}
    job = Job("knn", "knn", DIGITS, {"k": K}, 20)
    found, kept = lines(sides, data, {library: [job] for library in sides}, {})
    return {"lines": found} | apart(kept, "knn", "knn")


def part_free(sides: Sides, quick: bool, splits: int) -> Line:
    """Banzhaf values of a utility that costs nothing."""

    def jobs(subsets: dict[int, int], repeat: int) -> list[Job]:
        return [
            Job(f"{n}, {m}", "free", "", {"n": n, "subsets": m, "seed": 0}, repeat)
            for n, m in subsets.items()
        ]

    ours = [*jobs(FREE, 20), *jobs(dict.fromkeys(FREE_OURS, 200 if quick else FREE_SUBSETS), 3)]
    found, _ = lines(sides, {}, {"pydvl": jobs(FREE, 1), "upweight": ours}, {})
    return {"lines": found}


def part_tmc(sides: Sides, quick: bool, splits: int) -> Line:
    """Shapley values by permutations of a logistic regression, in one process and in two."""
    found: list[Line] = []
    for name in TMC_SETS[: 1 if quick else None]:
        data = {name: split(name, *SIZES[name], 0)}
        budget = 300
        for n_jobs in (1, 2):
            label = {"tmc": {"workers": n_jobs}}
            more: Line = {"seed": 0, "n_jobs": n_jobs, "again": n_jobs > 1}
            if "pydvl" in sides:
                job = Job("tmc", "tmc", name, {"permutations": TMC_PERMUTATIONS} | more)
                line = lines(sides, data, {"pydvl": [job]}, label)[0][0]
                # pyDVL trains a model for each utility; with two workers some that it drops, so
                # that the budget is what one needs. Ours does not begin an order that it may not
                # be able to end, hence an order more: never fewer models than pyDVL's.
                if n_jobs == 1 and "models" in line:
                    budget = line["models"] + SIZES[name][0]
                found.append(line)
            more["truncation"] = TRUNCATION
            job = Job("tmc", "shapley", name, {"evaluations": budget} | more)
            found += lines(sides, data, {"upweight": [job]}, label)[0]
    return {"lines": found}


def part_cache(sides: Sides, quick: bool, splits: int) -> Line:
    """The same sets of rows asked for again."""
    data = {"wine": split("wine", *SIZES["wine"], 0)}
    options = {**CACHE, "subsets": 50, "permutations": 1} if quick else CACHE
    job = Job("cache", "cache", "wine", options)
    return {"lines": lines(sides, data, {library: [job] for library in sides}, {})[0]}


def ours_for(name: str, quick: bool) -> dict[str, tuple[str, Line, bool]]:
    """Our methods: task, options, and whether it is quick enough for more splits."""
    evaluations = {"evaluations": 300 if quick else EVALUATIONS}
    ridge = {"model": "ridge", "scoring": "log_likelihood"}
    semivalue = ridge | evaluations | {"readout": "regression"}
    found: dict[str, tuple[str, Line, bool]] = {
        "KNN-Shapley, rows judge each other": ("knn", {"k": K, "itself": True}, True),
        "KNN-Shapley": ("knn", {"k": K}, True),
        "Data-OOB": ("oob", {"trees": 100 if quick else TREES}, True),
        "Banzhaf p = 0.05, ridge": ("banzhaf", semivalue | {"p": 0.05}, True),
        "Banzhaf p = 0.1, ridge": ("banzhaf", semivalue | {"p": 0.1}, True),
        "Banzhaf p = 0.05, ridge, rows judge each other": (
            "banzhaf",
            semivalue | {"p": 0.05, "itself": True},
            True,
        ),
        "Shapley, ridge": ("shapley", ridge | evaluations, True),
        "leave one out, ridge": ("loo", ridge, True),
    }
    if not quick:
        # at least as many utilities as pyDVL's, which `part_mislabel` fills in
        found[LOGISTIC] = ("shapley", {"evaluations": 0, "truncation": TRUNCATION}, False)
        found["leave one out, logistic"] = ("loo", {}, False)
    return found


def peers_for(name: str) -> dict[str, tuple[str, Line, bool]]:
    """pyDVL's methods, likewise."""
    permutations, subsets = BUDGETS[name]
    return {
        "KNN-Shapley": ("knn", {"k": K}, True),
        "Data-OOB": ("oob", {"trees": TREES}, True),
        LOGISTIC: ("tmc", {"permutations": permutations}, False),
        "Banzhaf, logistic": ("msr", {"subsets": subsets}, False),
        "leave one out, logistic": ("loo", {}, False),
    }


SEEDED = ("oob", "shapley", "banzhaf", "tmc", "msr")


def part_mislabel(sides: Sides, quick: bool, splits: int) -> Line:
    """Flipped labels, on some splits; the quick methods on more."""
    found: list[Line] = []
    for name in ("iris",) if quick else SIZES:
        seeds = range(1 if quick else max(MORE_SEEDS, splits))
        data = {f"{name}, {seed}": split(name, *SIZES[name], seed) for seed in seeds}
        budgets: dict[int, int] = {}
        for library, side in sides.items():
            methods = peers_for(name) if library == "pydvl" else ours_for(name, quick)
            jobs: list[Job] = []
            labels: dict[str, Line] = {}
            for method, (task, options, is_quick) in methods.items():
                for seed in seeds if is_quick else range(splits):
                    key = f"{method}, {name}, {seed}"
                    labels[key] = {"method": method, "set": name, "seed": seed}
                    more: Line = {"seed": seed} if task in SEEDED else {}
                    if options.get("evaluations") == 0:
                        more["evaluations"] = budgets.get(seed, BUDGETS[name][0] * SIZES[name][0])
                    jobs.append(Job(key, task, f"{name}, {seed}", options | more, 3))
            new = lines({library: side}, data, {library: jobs}, labels)[0]
            budgets |= {
                line["seed"]: line["models"] + SIZES[name][0]  # see part_tmc
                for line in new
                if line["method"] == LOGISTIC and "models" in line
            }
            found += new
    return {"lines": found, "seeds": splits, "more_seeds": max(MORE_SEEDS, splits)}


def part_oob(sides: Sides, quick: bool, splits: int) -> Line:
    """Data-OOB of 1,000 rows of digits."""
    data = {DIGITS: split("digits", *DIGITS_SIZE, 0)}
    options = {"trees": 50 if quick else TREES, "seed": 0}
    own = [Job(task, task, DIGITS, options) for task in ("oob", "oob_forest")]
    jobs = {"pydvl": [Job("oob", "oob", DIGITS, options)], "upweight": own}
    found, kept = lines(sides, data, jobs, {})
    return {"lines": found} | apart(kept, "oob_forest", "oob")


def part_memory(sides: Sides, quick: bool, splits: int) -> Line:
    """A million rows of 32 columns, valued by their neighbours of 1,000 test rows."""
    rows = QUICK_ROWS if quick else ROWS
    python, runner = RUNNERS["upweight"]
    with tempfile.TemporaryDirectory() as folder:
        measured, out = Path(folder) / "measured.json", Path(folder) / "out.json"
        command = [python, HERE / "measured.py", measured, python, runner, "--rows", rows, out]
        subprocess.run(list(map(str, command)), check=True, env=os.environ | ENVIRONMENT)
        found = json.loads(measured.read_text(encoding="utf-8"))
        if found.pop("exit_code"):
            raise RuntimeError(f"KNN-Shapley failed on {rows:,} rows")
        return {"rows": rows, **found, **json.loads(out.read_text(encoding="utf-8"))}


PARTS: dict[str, Callable[[Sides, bool, int], Line]] = {
    "knn": part_knn,
    "free": part_free,
    "tmc": part_tmc,
    "cache": part_cache,
    "mislabel": part_mislabel,
    "oob": part_oob,
    "memory": part_memory,
}


def show(found: Line) -> None:
    """Print the tables."""
    for title, _, head, rows in sections(found):
        widths = [max(len(line[at]) for line in [head, *rows]) for at in range(len(head))]
        print(f"\n{title}")
        for line in [head, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", default=",".join(PARTS), help="joined by commas")
    parser.add_argument("--splits", type=int, default=3, help="for slow methods")
    parser.add_argument("--quick", action="store_true", help="our side alone; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS / "values.json")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"unknown parts {unknown}; there are {list(PARTS)}")
    if not options.quick:
        need_peers()
    sides = {
        library: Side(library) for library in RUNNERS if not options.quick or library != "pydvl"
    }
    partial = options.out.exists() and not options.quick
    result = json.loads(options.out.read_text(encoding="utf-8")) if partial else {}
    result |= stamp()
    checks: list[Any] = []
    for part in parts:
        result[part] = PARTS[part](sides, options.quick, options.splits)
        versions = result.setdefault("versions", {})
        versions |= {library: side.versions for library, side in sides.items() if side.versions}
        result["equal"] = EQUAL
        checks = targets(result)
        if not options.quick:  # what is done is kept, whatever the next part does
            write(options.out, result | {"targets": checks})
    show(result)
    show_bounds(checks)
    if any(check["required"] and not check["ok"] for check in checks):
        sys.exit("values that must be equal are not")


if __name__ == "__main__":
    main()
