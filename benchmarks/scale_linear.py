"""Cost and memory by the number of rows and of queries: figures of `scale.py`'s lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

Line = dict[str, Any]

LABELS = {"rows": "training rows", "queries": "query rows"}
FROM = 10_000  # rows; below it, what does not depend on rows weighs in


def _exact(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line["recipe"] == "exact" and "cpu_s" in line]


def exponent(lines: list[Line], kind: str) -> float | None:
    """d log(seconds) / d log(size) over the two largest sizes of the exact scores."""
    found = _exact(lines)[-2:]
    if len(found) < 2:
        return None
    (one, other) = found
    return math.log(other["cpu_s"] / one["cpu_s"]) / math.log(other[kind] / one[kind])


def memory_growth(lines: list[Line]) -> float | None:
    """The most memory over the least, from ten thousand rows on."""
    peaks = [line["peak_mb"] for line in _exact(lines) if line["rows"] >= FROM]
    return max(peaks) / min(peaks) if len(peaks) > 1 else None


def show_linear(lines: dict[str, list[Line]]) -> None:
    """Print seconds of a thousand rows, or of ten queries, and memory."""
    for kind, found in lines.items():
        if not found:
            continue
        print(f"\n{'recipe':12}{'rows':>9}{'queries':>9}{'cpu s':>9}{'MiB':>8}  ms for a pair")
        for line in found:
            if "cpu_s" not in line:
                continue
            pair = 1e3 * line["cpu_s"] / line["rows"] / line["queries"]
            print(
                f"{line['recipe']:12}{line['rows']:9,}{line['queries']:9,}{line['cpu_s']:9.2f}"
                f"{line['peak_mb']:8.0f}  {pair:.2e}"
            )
        print(f"exponent in {kind}: {exponent(found, kind)}")


def plot_linear(lines: dict[str, list[Line]], path: Path) -> None:
    """Seconds and memory by rows and by queries, on logarithmic axes."""
    from figures import STYLE  # needs matplotlib, which a run without a page does not
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, sides = plt.subplots(2, 2, figsize=(9, 6), sharex="col", sharey="row")
        for column, (kind, found) in enumerate(lines.items()):
            for recipe in dict.fromkeys(line["recipe"] for line in found):
                own = [line for line in found if line["recipe"] == recipe and "cpu_s" in line]
                sizes = [line[kind] for line in own]
                for row, key in enumerate(("cpu_s", "peak_mb")):
                    values = [line[key] for line in own]
                    sides[row][column].plot(sizes, values, marker="o", label=f"{recipe} scores")
            for axes in sides[:, column]:
                axes.set_xscale("log")
                axes.set_yscale("log")
            sides[1][column].set_xlabel(LABELS[kind])
        sides[0][0].set_ylabel("processor seconds")
        sides[1][0].set_ylabel("memory, MiB")
        sides[0][0].legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
