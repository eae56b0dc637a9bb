"""The measured tables of docs/howto/choose-a-method.md, as Markdown, measured here and now.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/method_guide.py wine
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/method_guide.py digits
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/method_guide.py preconditioners

Run it from the root of the repository. With --curvature ggn, or another damping, the first two
measure those.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

import upweight as uw


def wine() -> tuple[Any, Any, Any]:
    """The network of tests/test_published.py with its rows."""
    sys.path.insert(0, "tests")
    from test_published import wine as case

    found = case(torch.float32)
    return found.model, found.train, found.test


def digits() -> tuple[Any, Any, Any]:
    """The network of benchmarks/digits.py with its rows."""
    sys.path[:0] = ["benchmarks", "benchmarks/peers"]
    from common import build_model
    from digits import digits_problem

    found = digits_problem(damping=0.1)
    return build_model(found), (found.x_train, found.y_train), (found.x_test, found.y_test)


def methods(batch_size: int) -> dict[str, Any]:
    """By the expressions that the page shows."""
    return {
        "CG()": uw.CG(),
        "CG(Nystroem(rank=5))": uw.CG(uw.Nystroem(rank=5)),
        "CG(Nystroem(rank=50))": uw.CG(uw.Nystroem(rank=50)),
        "CG(Jacobi())": uw.CG(uw.Jacobi()),
        "CG(EKFAC())": uw.CG(uw.EKFAC()),
        "LiSSA()": uw.LiSSA(),
        f"LiSSA(batch_size={batch_size})": uw.LiSSA(batch_size=batch_size),
        "Arnoldi()": uw.Arnoldi(),
        'Arnoldi(start="test")': uw.Arnoldi(start="test"),
        "Nystroem()": uw.Nystroem(),
        "KFAC()": uw.KFAC(),
        "EKFAC()": uw.EKFAC(),
    }


def markdown(found: uw.Comparison) -> str:
    """The table of a comparison, as the page has it."""
    lines = [
        "| method | error % | norm | r | ρ | residual | steps | products | s | MiB |",
        "|---|" + "--:|" * 9,
    ]
    for line in found.table.to_dict("records"):
        method = "Direct()" if line["method"] == found.reference else str(line["method"])
        if method not in found.mean.columns and method != "Direct()":
            lines.append(f"| `{method}` | no answer |" + " |" * 8)
            continue
        steps = "" if pd.isna(line["steps"]) else f"{line['steps']:.0f}"
        error = f"{line['error_percent']:{'.0f' if line['error_percent'] >= 100 else '.2g'}}"
        lines.append(
            f"| `{method}` | {error} | {line['relative_norm']:.1e} "
            f"| {line['pearson']:.4f} | {line['spearman']:.4f} | {line['residual']:.1e} "
            f"| {steps} | {line['products']:,.0f} | {line['seconds']:.2g} "
            f"| {line['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def preconditioners() -> str:
    """Steps of conjugate gradients with the GGN: networks and dampings down, recipes across."""
    recipes = {
        "none": None,
        "`Nystroem(rank=5)`": uw.Nystroem(rank=5),
        "`Nystroem(rank=50)`": uw.Nystroem(rank=50),
        "`Jacobi()`": uw.Jacobi(),
        "`EKFAC()`": uw.EKFAC(),
    }
    lines = ["| | " + " | ".join(recipes) + " |", "|---|" + "--:|" * len(recipes)]
    for setting, problem, rows, dampings in (
        ("wine", wine, 54, (0.1, 0.01)),
        ("digits", digits, 20, (0.1, 0.01, 0.001)),
    ):
        model, train, test = problem()
        some = tuple(part[:rows] for part in test)
        for damping in dampings:
            cells = [f"{setting}, λ = {damping:g}"]
            for recipe in recipes.values():
                influence = uw.Influence(model, F.cross_entropy, uw.CG(recipe), damping=damping)
                influence.fit(train).scores(some)
                cells.append(str(influence.certificate.steps))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("setting", choices=["wine", "digits", "preconditioners"])
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--curvature", choices=["hessian", "ggn", "fisher"], default="hessian")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.setting == "preconditioners":
        print(preconditioners())
        return
    model, train, test = wine() if options.setting == "wine" else digits()
    found = uw.compare(
        model,
        F.cross_entropy,
        train,
        test,
        methods(batch_size=32 if options.setting == "wine" else 100),
        damping=options.damping,
        curvature=options.curvature,
    )
    print(markdown(found))


if __name__ == "__main__":
    main()
