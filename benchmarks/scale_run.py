"""Our side of `scale.py`: one recipe on one problem, through the public face alone.

.venv/bin/python benchmarks/scale_run.py PROBLEM.npz OUT.npz --recipe exact
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scale_phases import Phases, answer, one_thread, preload
from scale_problems import ScaleProblem, build, load, tracked
from torch import nn

import upweight as uw
from upweight.losses import TokenLoss

# A share of the rows, and a share of the size of the scores, as the options have them.
FIFTH, LOOSE = 0.2, 0.05

# One place for the names of options: a recipe that raises TypeError is reported as missing.
RECIPES: dict[str, Callable[[], Any]] = {
    "exact": lambda: uw.EKFAC(fisher="sampled"),
    "exact, other labels": lambda: uw.EKFAC(fisher="sampled", seed=1),
    "factored": lambda: uw.EKFAC(fisher="sampled", factored=LOOSE),
    "fifth": lambda: uw.EKFAC(fisher="sampled", correction_rows=FIFTH),
    "empirical": lambda: uw.EKFAC(fisher="empirical"),
    "K-FAC": lambda: uw.KFAC(fisher="sampled"),
}


# How gradients are kept for a second set of queries.
STORES: dict[str, dict[str, Any]] = {
    "bfloat16": {"precision": "bfloat16"},
    "float32, factored": {"precision": "float32"},
    "rank 128": {"precision": "bfloat16", "rank": 128},
}
# ... and with which recipe it is answered, on the same factors, where not with that of the first.
AGAIN = {"float32, factored": "factored"}


def missing() -> list[str]:
    """The recipes that this version of the library does not have."""
    found: list[str] = []
    for name, make in RECIPES.items():
        try:
            make()
        except TypeError:
            found.append(name)
    return found


def influence_of(problem: ScaleProblem, recipe: Any) -> uw.Influence:
    """The face of the library on a problem."""
    model = build(problem)
    names = [f"{layer}.{kind}" for layer in tracked(model) for kind in ("weight", "bias")]
    loss = TokenLoss(reduction="sum") if problem.kind == "gpt" else nn.CrossEntropyLoss()
    return uw.Influence(
        model, loss, method=recipe, damping=problem.damping, certify=0, parameters=names
    )


def run(
    problem: ScaleProblem, recipe: Any, *, score: bool, to_disk: bool
) -> tuple[Phases, np.ndarray | None, dict[str, Any]]:
    """Fit and score."""
    influence = influence_of(problem, recipe)
    scores: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "scores" if to_disk else None
        phases = Phases()
        with phases("fit"):
            influence.fit(problem.train)
        if score:
            with phases("scores"):
                found = influence.scores(problem.query, to=to)
            if to is None:
                scores = np.asarray(found.values, dtype=np.float32)
    return phases, scores, {name: str(value) for name, value in influence.certificate.facts.items()}


def run_twice(problem: ScaleProblem, recipe: Any) -> tuple[Phases, dict[str, Any]]:
    """Fit and score, keep the gradients, and score again from what was kept.

    The second set has the queries in reverse, so that it can be compared with the first.
    """
    influence = influence_of(problem, recipe)
    facts: dict[str, Any] = {"stores": {}}
    again = tuple(part.flip(0) for part in problem.query)
    with tempfile.TemporaryDirectory() as folder:
        phases = Phases()
        factors = f"{folder}/factors"
        with phases("fit"):
            influence.fit(problem.train, factors=factors)
        with phases("scores"):
            first = influence.scores(problem.query).values.flip(0).flatten()
        for name, options in STORES.items():
            with phases(f"keep {name}"):
                store = influence.store_gradients(f"{folder}/{len(name)}", **options)
            asked = influence
            if name in AGAIN:
                asked = influence_of(problem, RECIPES[AGAIN[name]]())
                asked.fit(problem.train, factors=factors)
            with phases(f"second {name}"):
                found = asked.scores(again, store).values.flatten()
            together = torch.stack([first, found]).double()
            facts["stores"][name] = {
                "mib": store.nbytes / 2**20,
                "kept": store.kept,
                "correlation": float(torch.corrcoef(together)[0, 1]),
            }
            shutil.rmtree(store.path)
    return phases, facts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("problem", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", choices=list(RECIPES), default="exact")
    parser.add_argument("--fit-only", action="store_true")
    parser.add_argument("--twice", action="store_true", help="and again, from a store")
    parser.add_argument("--to-disk", action="store_true", help="scores go to a directory")
    options = parser.parse_args()
    one_thread()
    warnings.filterwarnings("ignore")
    preload()
    problem = load(options.problem)
    try:
        recipe = RECIPES[options.recipe]()
    except TypeError as error:
        sys.exit(f"missing: {error}")
    if options.twice:
        phases, facts = run_twice(problem, recipe)
        answer(options.out, "upweight", phases, None, facts=facts)
        return
    phases, scores, facts = run(
        problem, recipe, score=not options.fit_only, to_disk=options.to_disk
    )
    rows = len(problem.x_train)
    answer(options.out, "upweight", phases, scores, eigenvalue_rows=rows, facts=facts)


if __name__ == "__main__":
    main()
