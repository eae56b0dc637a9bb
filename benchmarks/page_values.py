"""The section of docs/benchmarks.md on `values.py`, whose tables and targets are made here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Line = dict[str, Any]
Section = tuple[str, str, list[str], list[list[str]]]
OWN, PEER = "upweight", "pydvl"
NOTHING = "–"

VALUES = """## Data values beside pyDVL

The same estimator on the same rows, with the same seed and the same number of utilities, in
processes with one thread each, one after the other. *CPU s* are user and system seconds of the
processor, those of all workers included, from after imports; the best of several calls where one
takes less than a second. *×* is pyDVL's over ours: above 1 upweight needs less. A *utility* is what
a set of rows is worth: where nothing else is said the accuracy, on rows that are not in training,
of a logistic regression that is trained on the set. `benchmarks/values.py` measures,
`benchmarks/peers/run_pydvl_values.py` has how pyDVL is called.
"""

NOTES = {
    "KNN-Shapley": """\
Exact values of {knn_rows}. The largest difference of two values is {knn_apart:.1e}; their standard
deviation is of the order 1e-3.""",
    "Banzhaf values of a utility that costs nothing": """\
The utility is a sum over the rows of the set, so that what is measured is the sampling and the
estimate alone. Milliseconds of the processor for one subset. For each subset pyDVL makes a new
result for each row, which costs the square of the number of rows.{exponent}""",
    "Shapley values by permutations": """\
A logistic regression is trained for each set. pyDVL does 50 truncated permutations, with its
default truncation; ours is truncated at the same share, and goes on until it has asked for at
least as many utilities as pyDVL with one worker. *Seconds* are those of the clock, the start of
the workers included. The *second call*, of other permutations, follows in the same process: pyDVL
starts its workers anew at every call, ours live on. *CPU s*, those of the workers included, are
with two workers those of both calls. *Models* are those that the first call has trained, or tried
to: with two workers pyDVL trains some that it then drops.""",
    "The same sets once more": """\
Processor seconds of calls on wine that follow one another and share a cache: first 300 random
subsets, then permutations. *Again* is the same call once more, *another method* a different value
of the same sets, *read out* a value from the samples of the earlier result, without looking at a
cache. × is here how much less a step takes than the one that had to train. pyDVL's cache was told
to keep everything: as it comes, it keeps nothing that took less than 0.3 s.""",
    "Finding wrong labels": """\
{flipped:.0%} of the training labels are another class. Area under the ROC curve of finding them by
a low value, mean over {seeds} splits; in brackets that over {more_seeds} splits, for methods that
are quick enough. Then the processor seconds, mean over the splits. Rows that are valued and rows
that judge: iris 75 and 30, wine 90 and 40, digits 300 and 200; columns of one unit keep their
proportions, those of the wines are standardised. pyDVL's budgets are 100, 100 and 10 permutations,
2,000, 2,000 and 500 subsets; ours are at least as many utilities as its permutations took where a
logistic regression is trained, and 2,000 everywhere else.
*Ridge*: `RidgeUtility` with the log-likelihood; Banzhaf with rows drawn with probability p and the
regression read-out. A few splits of small tables: differences of a hundredth say nothing.""",
    "Data-OOB": """\
500 trees on 1,000 rows of digits, growing them included. *Same forest*: a fitted random forest of
scikit-learn judges with hard votes, as pyDVL has it; the largest difference of two values is
{oob_apart:.1e}.""",
    "A million rows": """\
KNN-Shapley of {rows:,} training rows of 32 columns by 1,000 test rows: highest resident memory and
seconds of a process that does nothing else, imports and the drawing of the rows included.""",
}

# How much less time than pyDVL, or than computing, was to be needed.
TIMES = {"knn": 50.0, "free": 20.0, "tmc": 2.0, "cache": 10.0, "semivalues": 100.0}
AREAS = {"iris": 0.90, "wine": 0.97, "digits": 0.97}
SELF_JUDGED, OOB_AREA, MEMORY_MB = 0.995, 0.995, 2_000.0
ITSELF, SEMIVALUE = "KNN-Shapley, rows judge each other", "Banzhaf p = 0.05, ridge"


def number(value: float) -> str:
    """In two or three digits."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


def pick(lines: Iterable[Line], **wanted: Any) -> list[Line]:
    """Lines that have these entries, in the line or in its options, and no error."""
    return [
        line
        for line in lines
        if "error" not in line
        and all((line | line["options"]).get(key) == value for key, value in wanted.items())
    ]


def seconds(lines: list[Line], key: str = "cpu_s") -> float | None:
    """The mean of that figure; None of no lines."""
    known = [line[key] for line in lines if key in line]
    return float(np.mean(known)) if known else None


def shown(value: float | None) -> str:
    return NOTHING if value is None else number(value)


def times(theirs: float | None, ours: float | None) -> str:
    return NOTHING if theirs is None or not ours else f"{number(theirs / ours)} ×"


def over(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or not ours else theirs / ours


# ---- tables --------------------------------------------------------------------------------------


def _knn(found: Line) -> Section:
    ours, theirs = (seconds(pick(found["lines"], library=side)) for side in (OWN, PEER))
    head = ["rows", "", "pyDVL, CPU s", "upweight, CPU s", "×"]
    rows = [["1,000 by 300", "", shown(theirs), shown(ours), times(theirs, ours)]]
    return "KNN-Shapley", "", head, rows


def per_subset(found: Line, library: str, n: int, many: bool = False) -> float | None:
    """Milliseconds for a subset; of our calls with the most subsets if `many`."""
    lines = pick(found["lines"], library=library, n=n)
    if not lines:
        return None
    line = sorted(lines, key=lambda line: line["options"]["subsets"])[-1 if many else 0]
    return 1e3 * line["cpu_s"] / line["options"]["subsets"]


def exponent(found: Line) -> float | None:
    """b of "cost ~ rows^b" over our calls with many subsets."""
    sizes = sorted({line["options"]["n"] for line in pick(found["lines"], library=OWN)})
    costs = [per_subset(found, OWN, n, many=True) for n in sizes]
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(np.array(costs, float)), 1)[0])


def _free(found: Line) -> Section:
    head = ["rows", "subsets", "pyDVL, ms", "upweight, ms", "×", "upweight, many subsets, ms"]
    rows: list[list[str]] = []
    for n in sorted({line["options"]["n"] for line in pick(found["lines"], library=OWN)}):
        lines = pick(found["lines"], library=OWN, n=n)
        fewest = min(line["options"]["subsets"] for line in lines)
        theirs, ours = (per_subset(found, side, n) for side in (PEER, OWN))
        many = per_subset(found, OWN, n, many=True)
        rows.append(
            [f"{n:,}", f"{fewest:,}", shown(theirs), shown(ours), times(theirs, ours), shown(many)]
        )
    return "Banzhaf values of a utility that costs nothing", "", head, rows


def _tmc(found: Line) -> Section:
    head = ["rows", "library", "workers", "seconds", "×", "second call, seconds", "×"]
    head += ["CPU s", "models"]
    rows: list[list[str]] = []
    for line in sorted(
        pick(found["lines"]), key=lambda line: (line["set"], line["workers"], line["library"])
    ):
        alike = {"set": line["set"], "workers": line["workers"]}
        peer = pick(found["lines"], library=PEER, **alike) if line["library"] == OWN else []
        row = [line["set"], line["library"], str(line["workers"])]
        for key in ("once_s", "again_s"):
            theirs, took = seconds(peer, key), line.get(key)
            row += [shown(took), times(theirs, took) if peer and took else ""]
        rows.append([*row, number(line["cpu_s"]), f"{line['models']:,}"])
    return "Shapley values by permutations", "", head, rows


def _cache(found: Line) -> Section:
    steps = {side: pick(found["lines"], library=side) for side in (PEER, OWN)}
    known = {side: lines[0]["steps"] if lines else {} for side, lines in steps.items()}
    head = ["step", "", "pyDVL, CPU s", "×", "upweight, CPU s", "×"]
    rows: list[list[str]] = []
    for step in dict.fromkeys([*known[PEER], *known[OWN]]):
        row = [step, ""]
        first = step.split(",")[0].removesuffix(" again")
        for side in (PEER, OWN):
            took = known[side].get(step)
            row += [shown(took), "" if step == first else times(known[side].get(first), took)]
        rows.append(row)
    return "The same sets once more", "", head, rows


def _mislabel(found: Line) -> Section:
    lines, few = found["lines"], found["seeds"]
    sets = list(dict.fromkeys(line["set"] for line in lines))
    head = ["library", "method", *(f"{name}, AUC" for name in sets)]
    head += [f"{name}, CPU s" for name in sets]
    rows: list[list[str]] = []
    for library, method in dict.fromkeys((line["library"], line["method"]) for line in lines):
        areas: list[str] = []
        costs: list[str] = []
        for name in sets:
            all_of_it = pick(lines, library=library, method=method, set=name)
            first = [line for line in all_of_it if line["seed"] < few]
            area = seconds(first, "auc")
            more = len(all_of_it) > len(first)
            tail = f" ({seconds(all_of_it, 'auc'):.3f})" if more else ""
            areas.append(NOTHING if area is None else f"{area:.3f}{tail}")
            costs.append(shown(seconds(first)))
        rows.append([library, method, *areas, *costs])
    return "Finding wrong labels", "", head, rows


def _oob(found: Line) -> Section:
    head = ["library", "trees", "AUC", "CPU s", "of which growing trees", "×"]
    theirs = pick(found["lines"], library=PEER)
    names = {"oob_forest": "same forest", "oob": "its own, soft votes"}
    rows: list[list[str]] = []
    for line in pick(found["lines"]):
        own = line["library"] == OWN
        rows.append(
            [
                line["library"],
                names[line["method"]] if own else "random forest",
                f"{line['auc']:.3f}",
                number(line["cpu_s"]),
                shown(line.get("forest_cpu_s")) if "forest_cpu_s" in line else "",
                times(seconds(theirs), line["cpu_s"]) if own else "",
            ]
        )
    return "Data-OOB", "", head, rows


def _memory(found: Line) -> Section:
    head = ["rows", "", "MiB", "CPU s", "of which the values"]
    row = [f"{found['rows']:,}", "", number(found["peak_mb"])]
    row += [number(found["cpu_seconds"]), number(found["knn_cpu_s"])]
    return "A million rows", "", head, [row]


TABLES: dict[str, Callable[[Line], Section]] = {
    "knn": _knn,
    "free": _free,
    "tmc": _tmc,
    "cache": _cache,
    "mislabel": _mislabel,
    "oob": _oob,
    "memory": _memory,
}


def _facts(found: Line) -> Line:
    b = exponent(found["free"]) if "free" in found else None
    return {
        "knn_rows": "1,000 rows of digits by 300 others, K = 5",
        "knn_apart": found.get("knn", {}).get("largest_difference", np.nan),
        "oob_apart": found.get("oob", {}).get("largest_difference", np.nan),
        "exponent": "" if b is None else f" Ours grows with the power {b:.2f} of the rows.",
        "flipped": 0.1,
        "seeds": found.get("mislabel", {}).get("seeds", 0),
        "more_seeds": found.get("mislabel", {}).get("more_seeds", 0),
        "rows": found.get("memory", {}).get("rows", 0),
    }


def sections(found: Line) -> list[Section]:
    """Title, note, head and rows of each table that there is."""
    facts = _facts(found)
    made = [make(found[part]) for part, make in TABLES.items() if part in found]
    return [(title, NOTES[title].format(**facts), head, rows) for title, _, head, rows in made]


# ---- targets -------------------------------------------------------------------------------------


def _check(line: str, figure: str, limit: float, reached: float | None, **how: bool) -> Line:
    least, required = how.get("least", True), how.get("required", False)
    good = reached is not None and (reached >= limit if least else reached <= limit)
    bound = f"{figure} {'>=' if least else '<='} {limit:g}"
    return {"line": line, "bound": bound, "reached": reached, "ok": good, "required": required}


def _speed(found: Line) -> list[Line]:
    checks: list[Line] = []
    if "knn" in found:
        ours, theirs = (seconds(pick(found["knn"]["lines"], library=s)) for s in (OWN, PEER))
        checks.append(_check("KNN-Shapley", "CPU ×", TIMES["knn"], over(theirs, ours)))
    if "free" in found:
        for n in sorted(
            {line["options"]["n"] for line in pick(found["free"]["lines"], library=PEER)}
        ):
            theirs, ours = (per_subset(found["free"], side, n) for side in (PEER, OWN))
            checks.append(
                _check(f"Banzhaf, {n:,} rows", "CPU ×", TIMES["free"], over(theirs, ours))
            )
        power = exponent(found["free"])
        checks.append(_check("Banzhaf", "power of rows", 1.1, power, least=False))
    for name in dict.fromkeys(line["set"] for line in found.get("tmc", {}).get("lines", ())):
        two = [
            pick(found["tmc"]["lines"], library=side, set=name, workers=2) for side in (PEER, OWN)
        ]
        for call, key in (("", "once_s"), (", second call", "again_s")):
            ratio = over(*(seconds(lines, key) for lines in two))
            line = f"permutations, {name}, 2 workers{call}"
            checks.append(_check(line, "seconds ×", TIMES["tmc"], ratio))
    for line in pick(found.get("cache", {}).get("lines", ()), library=OWN):
        for step, took in line["steps"].items():
            first = step.split(",")[0].removesuffix(" again")
            if step != first:
                ratio = over(line["steps"][first], took)
                checks.append(_check(f"cache: {step}", "computing ×", TIMES["cache"], ratio))
    return checks


def _quality(found: Line) -> list[Line]:
    checks: list[Line] = []
    lines, few = found["lines"], found["seeds"]
    for name in dict.fromkeys(line["set"] for line in lines):

        def first(library: str, method: str, of: str = name) -> list[Line]:
            kept = pick(lines, library=library, method=method, set=of)
            return [line for line in kept if line["seed"] < few]

        for method, least in (
            (ITSELF, SELF_JUDGED),
            ("Data-OOB", OOB_AREA),
            (SEMIVALUE, AREAS[name]),
        ):
            area = seconds(first(OWN, method), "auc")
            checks.append(_check(f"{method}, {name}", "AUC", least, area))
        ours = seconds(first(OWN, SEMIVALUE))
        slow = [seconds(first(PEER, m)) for m in ("Shapley, logistic", "Banzhaf, logistic")]
        known = [value for value in slow if value is not None]
        ratio = over(min(known), ours) if known else None
        checks.append(_check(f"{SEMIVALUE}, {name}", "CPU ×", TIMES["semivalues"], ratio))
    return checks


def targets(found: Line) -> list[Line]:
    """What was to be reached; only equal values are required."""
    checks: list[Line] = []
    for part, line in (("knn", "KNN-Shapley"), ("oob", "Data-OOB, same forest")):
        if "largest_difference" in found.get(part, {}):
            reached = found[part]["largest_difference"]
            limit = found["equal"]
            checks.append(_check(line, "difference", limit, reached, least=False, required=True))
    checks += _speed(found)
    if "mislabel" in found:
        checks += _quality(found["mislabel"])
    if "memory" in found:
        peak = found["memory"]["peak_mb"] * 2**20 / 1e6
        checks.append(_check("a million rows", "MB", MEMORY_MB, peak, least=False))
    return checks


def values_part(found: Line, table: Callable[[list[str], list[list[str]]], str]) -> str:
    """The tables of values.json, what was to be reached, and where it is not."""
    parts = [VALUES.rstrip()]
    for title, note, head, rows in sections(found):
        parts += [f"### {title}", note, table(head, rows)]
    checks = targets(found)
    rows = [
        [
            check["line"],
            check["bound"],
            NOTHING if check["reached"] is None else f"{check['reached']:.4g}",
            "yes" if check["ok"] else "**no**",
        ]
        for check in checks
    ]
    reached = sum(check["ok"] for check in checks)
    parts += [
        "### Targets of data values",
        f"{reached} of {len(checks)} are reached.",
        table(["", "target", "reached", "ok"], rows),
    ]
    return "\n\n".join(parts)
