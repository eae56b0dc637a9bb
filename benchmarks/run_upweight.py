"""Our side of a comparison: the same protocol as the peers' runners in ``peers/``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from common import Method, Problem, build_model, main, make_loader

import upweight as uw


def fit(problem: Problem, batch_size: int, method: Any, curvature: str) -> uw.Influence:
    """Everything from the model and the rows to the damped inverse."""
    influence = uw.Influence(
        build_model(problem),
        F.cross_entropy,
        method,
        curvature=curvature,
        damping=problem.damping,
    )
    return influence.fit(make_loader(problem.train, batch_size))


def scores(problem: Problem, influence: uw.Influence) -> Tensor:
    """All pairs of test and training rows."""
    return influence.scores(problem.test).values


def make_methods(problem: Problem, batch_size: int) -> dict[str, Method]:
    """The methods of the comparison by name."""
    choices = {
        "direct": ("direct", "hessian"),
        "direct-ggn": ("direct", "ggn"),
    }
    return {
        name: Method(
            fit=partial(fit, problem, batch_size, method, curvature),
            scores=partial(scores, problem),
            settings={"method": str(method), "curvature": curvature},
        )
        for name, (method, curvature) in choices.items()
    }


if __name__ == "__main__":
    main("upweight", make_methods, batch_size=32)
