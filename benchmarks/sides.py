"""What the benchmarks against a truth share: all libraries on one problem, and their methods."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tables import run, versions

# `tables` has put the folder of peers on the path
from common import Problem, save_problem  # isort: skip

# library: its runner
LIBRARIES = {
    "upweight": "ours",
    "pydvl": "pydvl",
    "dattri": "dattri",
    "kronfluence": "kronfluence",
    "captum": "captum",
    "traker": "traker",
}
OWN = "upweight"
DEFAULT = "default"
# a library's name of a method: ours
SYNONYMS = {
    ("pydvl", "direct"): "direct-hessian",
    ("dattri", "explicit"): "direct-hessian",
    ("captum", "naive"): "direct-hessian",
    ("kronfluence", "identity"): "grad-dot",
}


@dataclass(frozen=True)
class Entry:
    """One run of a method: with which variant and damping, and what came of it."""

    library: str
    method: str
    variant: str
    damping: str
    found: dict[str, Any]

    @property
    def error(self) -> str | None:
        """Why there are no scores that one can use."""
        if "error" in self.found:
            return str(self.found["error"])
        return None if np.isfinite(self.found["scores"]).all() else "scores are not finite"

    def line(self) -> dict[str, Any]:
        """What is kept of it beside its quality."""
        line: dict[str, Any] = {
            "variant": self.variant,
            "damping": self.damping,
            "settings": json.loads(str(self.found["settings"])),
        }
        if self.error:
            return line | {"error": self.error}
        line |= {key: float(self.found[key]) for key in ("first_s", "peak_mb")}
        if self.found["runs"]:
            line["warm_s"] = float(self.found["fit_s"] + self.found["scores_s"])
        return line


def entries(library: str, found: Mapping[str, Any]) -> Iterator[Entry]:
    """The runs in the file of a runner, in its order."""
    names = dict.fromkeys(key.split("/")[0] for key in found if key != "versions")
    for name in names:
        label, damping = name.split("@")
        method, _, variant = label.partition("~")
        values = {k.split("/")[1]: v for k, v in found.items() if k.split("/")[0] == name}
        yield Entry(library, SYNONYMS.get((library, method), method), variant, damping, values)


def measure(
    problem: Problem, dampings: list[str], quick: bool, **options: float | str
) -> tuple[list[Entry], dict[str, dict[str, str]]]:
    """Every method of every library at the dampings, and the versions of the libraries.

    Peers try their defaults second, so that a slow method has been given a damping that suits it.
    We try ours first: it is what a user gets.
    """
    found: list[Entry] = []
    of: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        save_problem(path, problem)
        for library, runner in LIBRARIES.items():
            if quick and library != OWN:
                continue
            order = [dampings[0], DEFAULT, *dampings[1:]]
            ours = [DEFAULT] if quick else [DEFAULT, *dampings]
            tried = ",".join(ours if library == OWN else order)
            try:
                file = run(runner, path, dampings=tried, **options)
            except subprocess.CalledProcessError as error:
                if library == OWN:
                    raise
                print(f"{library} did not run: {error}", file=sys.stderr)
                continue
            of[library] = versions(file)
            found += entries(library, file)
    return found, of


def group(found: list[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """By library and method."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        groups.setdefault((entry.library, entry.method), []).append(entry)
    return groups


def summary(lines: list[dict[str, Any]], quality: str) -> dict[str, Any]:
    """All runs of a method, which was the best by that figure, and which ones are its default.

    The best was chosen by looking at the answer. The default is the first variant with what the
    library takes where no damping is given, or the first one of a method without a damping, unless
    its settings say that the library has no default.
    """
    good = [line for line in lines if quality in line]
    result: dict[str, Any] = {"runs": lines}
    if not good:
        return result | {"error": lines[0]["error"]}
    result["best"] = max(good, key=lambda line: line[quality])
    standard = [
        line
        for line in lines
        if line["damping"] in (DEFAULT, "none") and line["settings"].get("default", True)
    ]
    if standard and quality in standard[0]:
        result["default"] = standard[0]
    return result


def show(
    title: str, table: list[dict[str, Any]], quality: str, spread: str, also: str | None = None
) -> None:
    """Print a line for each method, the best first: its figure, the ends of that, and another."""
    extra = f"{also:>10}" if also else ""
    print(
        f"\n{title}\n{'':34}{quality:>7}{spread:>17}{'at':>16}{'default':>9}{extra}{'s':>8}{'MiB':>8}"
    )
    for line in sorted(table, key=lambda line: -line.get("best", {quality: -1})[quality]):
        name = f"{line['library']:12}{line['method']:22}"
        if "best" not in line:
            print(f"{name}no answer: {line['error'][:80]}")
            continue
        best = line["best"]
        low, high = best[spread]
        at = "~".join(filter(None, (best["damping"], best["variant"])))
        default = f"{line['default'][quality]:.3f}" if "default" in line else "-"
        extra = f"{best[also]:10.3f}" if also else ""
        print(
            f"{name}{best[quality]:7.3f}   {low:6.3f} … {high:.3f}{at:>16}{default:>9}{extra}"
            f"{best['first_s']:8.2f}{best['peak_mb']:8.0f}"
        )
