"""Our side of a comparison: the same protocol as the peers' runners in ``peers/``.

All methods use the Hessian, as the peers do. Nothing is certified: residuals cost products that the
peers do not spend. Methods with a random part take ``--seed``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from common import Method, Problem, build_model, main, make_loader

import upweight as uw

RANK = 30

RECIPES: dict[str, Callable[[], Any]] = {
    "direct": uw.Direct,
    "cg": partial(uw.CG, preconditioner=uw.Nystroem(rank=5)),
    "cg-nystroem-50": partial(uw.CG, preconditioner=uw.Nystroem(rank=50)),
    "cg-nystroem-50-loose": partial(uw.CG, preconditioner=uw.Nystroem(rank=50), rtol=1e-3),
    "cg-ekfac": partial(uw.CG, preconditioner=uw.EKFAC()),
    "lissa": uw.LiSSA,
    "lissa-loose": partial(uw.LiSSA, rtol=1e-2),
    "arnoldi": partial(uw.Arnoldi, rank=RANK),
    "arnoldi-test": partial(uw.Arnoldi, rank=RANK, start="test"),
    "nystroem": partial(uw.Nystroem, rank=RANK),
    "nystroem-15": partial(uw.Nystroem, rank=15, power=1),
    "kfac": uw.KFAC,
    "ekfac": uw.EKFAC,
}


def seeded(recipe: Any, seed: int) -> Any:
    """The recipe with this seed, and its preconditioner too, where they have one."""
    changes: dict[str, Any] = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name == "seed":
            changes["seed"] = seed
        elif field.name == "preconditioner" and value is not None:
            changes["preconditioner"] = seeded(value, seed)
    return replace(recipe, **changes)


def fit(problem: Problem, batch_size: int, recipe: Any, curvature: str) -> uw.Influence:
    """Everything from the model and the rows to what the method prepares."""
    influence = uw.Influence(
        build_model(problem),
        F.cross_entropy,
        seeded(recipe, torch.initial_seed()),  # as `measure` has set it
        curvature=curvature,
        damping=problem.damping,
        certify=0,
    )
    return influence.fit(make_loader(problem.train, batch_size))


def scores(problem: Problem, influence: uw.Influence) -> Tensor:
    """All pairs of test and training rows."""
    return influence.scores(problem.test).values


def make_methods(problem: Problem, batch_size: int) -> dict[str, Method]:
    """The methods of the comparison by name."""
    choices = {name: (make(), "hessian") for name, make in RECIPES.items()}
    choices["direct-ggn"] = (uw.Direct(), "ggn")
    return {
        name: Method(
            fit=partial(fit, problem, batch_size, recipe, curvature),
            scores=partial(scores, problem),
            settings={"loader_batch": batch_size, "method": str(recipe), "curvature": curvature},
        )
        for name, (recipe, curvature) in choices.items()
    }


if __name__ == "__main__":
    main("upweight", make_methods, batch_size=32)
