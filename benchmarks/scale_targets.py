"""What `scale.py` wants to reach, and whether it is reached."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scale_linear import exponent, memory_growth

# Peer's processor seconds over ours, at least, by problem and recipe.
FASTER = {
    ("digits", "exact"): 2.5,
    ("digits", "factored"): 6.0,
    ("mlp", "exact"): 2.5,
    ("mlp", "factored"): 20.0,
    ("gpt", "exact"): 1.3,
    ("gpt", "fifth"): 2.5,
}
# Correlation with our exact scores, at least.
NEARLY = 0.995  # correlation of a store's scores with the exact ones, to count
NEAR = {("digits", "factored"): 0.995, ("mlp", "factored"): 0.995, ("gpt", "fifth"): 0.99}
LEANER = 2.0  # peer's memory over ours, at least
EIGENVALUES = 100.0  # peer's seconds of a row over ours, on the MLP
SECOND = 20.0  # first seconds over those of a second set of queries
EMPIRICAL = 0.999  # correlation of the empirical Fisher's scores with the peer's
# What counts as linear in rows and queries, and as constant memory, over the largest sizes.
EXPONENT, GROWTH = 1.1, 1.25
PEER = "kronfluence"

Line = dict[str, Any]


def agreement(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Correlation over all pairs, the least over the queries, and the relative 2-norm."""
    rows = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(found, wanted, strict=True)]
    return {
        "pearson": float(np.corrcoef(found.ravel(), wanted.ravel())[0, 1]),
        "pearson_least": min(rows),
        "relative_error": float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)),
    }


def ratios(problem: Line) -> dict[str, dict[str, float]]:
    """Peer over each recipe of ours: seconds and memory, above the start and raw."""
    theirs = problem["sides"].get(PEER, {})
    return {
        label.removeprefix("upweight "): {
            key: theirs[key] / line[key] if line[key] > 0 else math.inf
            for key in ("cpu_s", "peak_mb", "peak_raw_mb")
        }
        for label, line in problem["sides"].items()
        if label.startswith("upweight") and not label.endswith(", fit")
        if "cpu_s" in line and "cpu_s" in theirs
    }


def eigenvalues_of_a_row(problem: Line) -> dict[str, float] | None:
    """Seconds of a row in the fit of the eigenvalues: ours are what EK-FAC takes beyond K-FAC."""
    sides = problem["sides"]
    theirs = sides.get(PEER, {})
    ours = [sides.get(f"upweight {recipe}, fit", {}) for recipe in ("exact", "K-FAC")]
    if "cpu_s" not in theirs or any("cpu_s" not in line for line in ours):
        return None
    whole, without = (line["parts"]["fit"]["cpu_s"] for line in ours)
    own = (whole - without) / problem["train_rows"]
    other = theirs["parts"]["eigenvalues"]["cpu_s"] / theirs["eigenvalue_rows"]
    ratio = other / own if own > 0 else math.nan
    return {PEER: other, "upweight": own, "ratio": ratio}


def judge(result: Line) -> list[Line]:
    """Every target: what is wanted, what is reached (None: not measured), and whether it is met."""
    problems, lines = result["problems"], result["linear"]
    found: list[Line] = []

    def add(of: str, what: str, limit: float, reached: float | None, least: bool = True) -> None:
        # written so that a NaN is not met
        met = reached is not None and (reached >= limit if least else reached <= limit)
        sign = ">=" if least else "<="
        found.append(
            {"of": of, "target": f"{what} {sign} {limit:g}".strip(), "reached": reached, "ok": met}
        )

    for (name, recipe), limit in FASTER.items():
        over = ratios(problems[name]).get(recipe, {}) if name in problems else {}
        add(f"{name}: {recipe}", f"times faster than {PEER}", limit, over.get("cpu_s"))
        add(f"{name}: {recipe}", f"{PEER}'s memory over ours", LEANER, over.get("peak_mb"))
        if near := NEAR.get((name, recipe)):
            pairs = problems.get(name, {}).get("agreement", {})
            reached = pairs.get(f"upweight {recipe} | upweight exact", {}).get("pearson")
            add(f"{name}: {recipe}", "correlation with exact", near, reached)
    pair = problems.get("digits", {}).get("agreement", {})
    pair = pair.get(f"upweight empirical | {PEER}, empirical", {})
    add("digits: empirical", f"correlation with {PEER}", EMPIRICAL, pair.get("pearson"))
    row = eigenvalues_of_a_row(problems["mlp"]) if "mlp" in problems else None
    add("mlp: eigenvalues of a row", "times faster", EIGENVALUES, row["ratio"] if row else None)
    for name, problem in problems.items():
        again = problem.get("second_queries")
        reached = again["first_cpu_s"] / again["second_cpu_s"] if again else None
        add(f"{name}: second queries", "times faster than the first", SECOND, reached)
    for kind in ("rows", "queries"):
        add(f"exponent in {kind}", "", EXPONENT, exponent(lines.get(kind, []), kind), least=False)
    add("memory in rows", "growth", GROWTH, memory_growth(lines.get("rows", [])), least=False)
    return found


def show_targets(result: Line) -> None:
    """Print ratios, agreement, and targets beside what is reached."""
    for problem in result["problems"].values():
        print(f"\n{problem['title']}: {problem['train_rows']} x {problem['query_rows']}")
        for recipe, over in ratios(problem).items():
            print(
                f"  {PEER} / {recipe:22} cpu {over['cpu_s']:7.2f}  memory {over['peak_mb']:6.2f}"
                f"  raw {over['peak_raw_mb']:6.2f}"
            )
        for pair, line in problem["agreement"].items():
            print(
                f"  {pair:50} r {line['pearson']:.5f}  least of a query "
                f"{line['pearson_least']:.5f}  relative error {line['relative_error']:.2e}"
            )
        if row := eigenvalues_of_a_row(problem):
            print(f"  eigenvalues of a row: {PEER} {row[PEER]:.2e} s, ours {row['upweight']:.2e} s")
    print(f"\n{'':28}{'target':40}{'reached':>12}  met")
    for line in result["targets"]:
        reached = "missing" if line["reached"] is None else f"{line['reached']:.4g}"
        answer = "-" if line["reached"] is None else "yes" if line["ok"] else "NO"
        print(f"{line['of']:28}{line['target']:40}{reached:>12}  {answer}")
