"""The section of docs/benchmarks.md on `scale.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from scale_linear import plot_linear
from scale_targets import eigenvalues_of_a_row, ratios

SCALE = """## EK-FAC at scale

Factors and scores of all pairs, the same weights, rows and damping on all sides, each side in a
process of its own with one thread. The weights are random with a seed and trained for a few steps;
the damping is a tenth of the mean eigenvalue of the Fisher matrix. Seconds are those of the
processor, user and system, from after imports, model and rows; memory is the highest resident
memory above what there was then, in brackets all of it. *×* is kronfluence's over ours: above 1
upweight needs less. Labels of the Fisher matrix are drawn from the model, and each library draws
its own, so that scores differ as those of two seeds do (*other labels*): *r* is the correlation
over all pairs, *error* the relative 2-norm of the difference. How far these are apart on the
networks with one label a row says how little one drawn label is: upweight's default,
`fisher="exact"`, draws none.

- *exact*: `EKFAC(fisher="sampled")`.
- *factored*: `EKFAC(fisher="sampled", factored={factored:g})`, scores by factors of 1/(Λ + λ).
- *fifth*: `EKFAC(fisher="sampled", correction_rows={fifth:g})`, eigenvalues from a random fifth of
  the rows.
- *empirical*: the labels are those of the rows, on both sides, so that nothing is drawn.
"""

Table = Callable[[list[str], list[list[str]]], str]
Number = Callable[[float], str]
# labels of lines that are in no table
APART = ", fit"


def scale_part(
    found: dict[str, Any], docs: Path, figures: Path, table: Table, number: Number
) -> str:
    """The tables and the figure of scale.json, and what was to be reached."""
    parts = [SCALE.format(**found["recipes"]).rstrip()]
    for problem in found["problems"].values():
        parts += [f"### {problem['title']}", _told(problem), _sides(problem, table, number)]
        parts.append(_agreement(problem, table))
        if row := eigenvalues_of_a_row(problem):
            parts.append(
                "The fit of the eigenvalues takes, for a row, "
                f"{1e3 * row['kronfluence']:.3g} ms with kronfluence and "
                f"{1e3 * row['upweight']:.3g} ms here, as the difference of EK-FAC and K-FAC."
            )
    if any(found["linear"].values()):
        path = figures / "scale.svg"
        plot_linear(found["linear"], docs / path)
        parts += [
            "### By rows and queries",
            "A 64-256-256-10 network on generated rows; scores go to disk. On the left 100 "
            "queries, on the right 10,000 rows.",
            f"![Processor seconds and memory by rows and queries]({path})",
        ]
    parts += ["### Targets", _targets(found["targets"], table)]
    return "\n\n".join(filter(None, parts))


def _told(problem: dict[str, Any]) -> str:
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in problem["notes"])
    return (
        f"{problem['parameters']:,} parameters in the layers that count, "
        f"{problem['train_rows']:,} training and {problem['query_rows']:,} query rows, "
        f"λ = {problem['damping']:g}.{notes}"
    )


def _sides(problem: dict[str, Any], table: Table, number: Number) -> str:
    over = ratios(problem)
    rows: list[list[str]] = []
    for label, line in problem["sides"].items():
        if label.endswith(APART):
            continue
        side, _, recipe = label.partition(" ")
        head = [side.rstrip(","), recipe]
        if "cpu_s" not in line:
            rows.append([*head, "no answer", *[""] * 4])
            continue
        times = over.get(recipe, {}) if side == "upweight" else {}
        parts = ", ".join(
            f"{name} {number(part['cpu_s'])}"
            for name, part in line["parts"].items()
            if name not in ("setup", "all")
        )
        rows.append(
            [
                *head,
                number(line["cpu_s"]),
                f"{number(times['cpu_s'])} ×" if times else "",
                f"{number(line['peak_mb'])} ({number(line['peak_raw_mb'])})",
                f"{number(times['peak_mb'])} ×" if times else "",
                parts,
            ]
        )
    return table(["library", "", "cpu s", "×", "MiB", "×", "of which"], rows)


def _agreement(problem: dict[str, Any], table: Table) -> str:
    rows = [
        [
            *pair.split(" | "),
            f"{line['pearson']:.5f}",
            f"{line['pearson_least']:.5f}",
            f"{line['relative_error']:.2g}",
        ]
        for pair, line in problem["agreement"].items()
    ]
    return table(["scores of", "beside", "r", "least of a query", "error"], rows) if rows else ""


def _targets(targets: list[dict[str, Any]], table: Table) -> str:
    rows = [
        [
            line["of"],
            line["target"],
            "–" if line["reached"] is None else f"{line['reached']:.4g}",
            "–" if line["reached"] is None else "yes" if line["ok"] else "**no**",
        ]
        for line in targets
    ]
    return table(["", "target", "reached", "met"], rows)
