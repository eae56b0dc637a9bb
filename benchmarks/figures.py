"""The figures of the page of results, as SVG files that depend on the results alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from sides import LIBRARIES, OWN

COLOURS = dict(zip(LIBRARIES, plt.get_cmap("tab10").colors, strict=False))
STYLE = {
    "svg.hashsalt": "upweight",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}

Names = Mapping[str, str]
Label = tuple[str, list[float], Any]  # text, point, colour
# of a label, in points: its size, the width of a letter, and how far it may be from its point
SIZE, LETTER, FARTHEST = 7, 3.9, 60


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _place(axes: Any, labels: list[Label]) -> None:
    """Write the labels beside their points, above or below others; a crowd has some left out."""
    placed: list[tuple[float, float, float]] = []  # left, right, bottom
    points = 72 / axes.figure.dpi
    for text, at, colour in labels:
        x, y = axes.transData.transform(at) * points
        left, right = x + 4, x + 4 + LETTER * len(text)
        for step in range(0, FARTHEST, 2):
            for shift in (3 + step, -3 - SIZE - step):
                bottom = y + shift
                if all(
                    right < other[0] or left > other[1] or abs(bottom - other[2]) > SIZE
                    for other in placed
                ):
                    break
            else:
                continue
            placed.append((left, right, bottom))
            axes.annotate(
                text,
                at,
                xytext=(4, shift),
                textcoords="offset points",
                fontsize=SIZE,
                color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.3} if step > 6 else None,
            )
            break


def seconds_of(line: Mapping[str, Any]) -> float:
    """Of a call that is not the first where there is one."""
    return line.get("warm_s", line["first_s"])


def quality_by_seconds(
    methods: list[dict[str, Any]], quality: str, label: str, names: Names, path: Path
) -> None:
    """A point for each method at its best setting: what it takes, and how good it is."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 6))
        labels: list[Label] = []
        for library, colour in COLOURS.items():
            lines = [m for m in methods if m["library"] == library and "best" in m]
            x = [seconds_of(m["best"]) for m in lines]
            y = [m["best"][quality] for m in lines]
            own = library == OWN
            axes.scatter(
                x, y, color=colour, label=library, marker="o" if own else "s", s=36, zorder=3
            )
            labels += [
                (names.get(m["method"], m["method"]), at, colour)
                for m, *at in zip(lines, x, y, strict=True)
            ]
        axes.set_xscale("log")
        axes.set_xlabel("seconds to fit and score all pairs, one thread")
        axes.set_ylabel(label)
        axes.legend(frameon=False, loc="lower right", fontsize=8)
        _place(axes, labels)
        _save(figure, path)


def quality_by_damping(
    methods: list[dict[str, Any]], quality: str, label: str, names: Names, path: Path
) -> None:
    """How good each method is over the dampings, its best variant at each; ours on the left."""
    with plt.rc_context(STYLE):
        figure, sides = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True)
        for axes, own in zip(sides, (True, False), strict=True):
            chosen = [m for m in methods if (m["library"] == OWN) == own]
            # more than one palette has: the second time round with another line
            looks = product(("-", "--", ":"), plt.get_cmap("tab20").colors)
            for method in chosen:
                curve: dict[float, float] = {}
                for run in method["runs"]:
                    if quality in run and run["damping"] not in ("default", "none"):
                        damping = float(run["damping"])
                        curve[damping] = max(run[quality], curve.get(damping, -1.0))
                if len(curve) < 2:
                    continue
                x = sorted(curve)
                name = names.get(method["method"], method["method"])
                line, colour = next(looks)
                axes.plot(
                    x,
                    [curve[damping] for damping in x],
                    marker=".",
                    color=colour,
                    linestyle=line,
                    label=name if own else f"{method['library']}: {name}",
                )
            axes.set_xscale("log")
            axes.set_xlabel("damping")
            axes.set_title("upweight" if own else "other libraries", fontsize=9)
            axes.legend(frameon=False, fontsize=7)
        sides[0].set_ylabel(label)
        _save(figure, path)
