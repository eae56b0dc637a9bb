"""Our side of the benchmarks against the truth: the same protocol as the runners in ``peers/``.

`METHODS` names them: a function from the problem to what is measured, so that a method more is a
line more. Nothing is certified, because the peers do not measure residuals either. Where no damping
is given it is ``"auto"``, with the record of the training where the problem has it, and with those
test rows as held-out rows that are drawn as the training rows are. A number after ``~`` is a rank
other than 30, or the dimension of a projection.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from common import Method, Problem, build_model, main
from problems import State

import upweight as uw
from upweight import Influence

RANK = 30
LARGER_RANK = 200
TRAK_DIMENSIONS = (64, 128, 256, 512)

Build = Callable[[Problem], Method]


def _fit(problem: Problem, recipe: Any, curvature: str, model: nn.Module) -> Influence:
    damping = "auto" if problem.damping is None else problem.damping
    record = None
    if problem.record:
        steps, rate, decay, momentum = problem.record
        record = uw.TrainingRecord(int(steps), rate, decay, momentum)
    found = Influence(
        model,
        F.cross_entropy,
        recipe,
        curvature=curvature,
        damping=damping,
        record=record,
        certify=0,
    )
    unseen = None
    if problem.held_out and damping == "auto":
        unseen = tuple(part[: problem.held_out] for part in problem.test)
    return found.fit(problem.train, held_out=unseen)


def influence(recipe: Any, curvature: str = "ggn") -> Build:
    """Influence functions of the model."""

    def build(problem: Problem) -> Method:
        return Method(
            partial(_fit, problem, recipe, curvature, build_model(problem)),
            lambda fitted: fitted.scores(problem.test).values,
            {"method": str(recipe), "curvature": curvature},
        )

    return build


def ensemble(recipe: Any, curvature: str = "ggn") -> Build:
    """Influence functions averaged over all models that were trained, one in memory at a time."""

    def build(problem: Problem) -> Method:
        models = [build_model(problem, state) for state in problem.models]

        def scores(_: None) -> Tensor:
            members = (_fit(problem, recipe, curvature, model) for model in models)
            return uw.ensemble(members, problem.test).values

        settings = {"method": str(recipe), "curvature": curvature, "models": len(models)}
        return Method(lambda: None, scores, settings)

    return build


def predictions(recipe: Any, *, every: bool = False) -> Build:
    """The margin of every test row after training on each subset, by one Newton step: (m, S)."""

    def build(problem: Problem) -> Method:
        states = problem.models if every else (problem.state,)
        models = [build_model(problem, state) for state in states]
        assert problem.masks is not None
        dropped = ~problem.masks

        def after(model: nn.Module) -> Tensor:
            fitted = _fit(problem, recipe, "ggn", model)
            return fitted.predict(problem.test, dropped, test_loss="margin").after

        def predict(_: None) -> Tensor:
            total = torch.stack([after(model) for model in models]).mean(0)
            return -total.T  # minus margins: lower is better

        settings = {"method": f"predict by {recipe}", "models": len(models)}
        return Method(lambda: None, predict, settings)

    return build


def scorer(
    score: Callable[[Problem, nn.Module], uw.Scores], *, damped: bool = False, **settings: Any
) -> Build:
    """Scores that are no influence functions, all of whose work is done at once."""

    def build(problem: Problem) -> Method:
        model = build_model(problem)
        return Method(lambda: None, lambda _: score(problem, model).values, settings, damped)

    return build


def _products(function: Callable[..., uw.Scores], problem: Problem, model: nn.Module) -> uw.Scores:
    return function(model, F.cross_entropy, problem.train, problem.test)


def _tracin(problem: Problem, model: nn.Module) -> uw.Scores:
    rows = problem.train, problem.test
    along = {"checkpoints": problem.checkpoints, "learning_rates": problem.rates}
    return uw.tracin(model, F.cross_entropy, *rows, **along)


def _trak(dimension: int, every: bool, problem: Problem, model: nn.Module) -> uw.Scores:
    models = [build_model(problem, state) for state in problem.models] if every else model
    rows = problem.train, problem.test
    parameters = sum(weight.numel() for weight in model.parameters())
    ridge = problem.damped("damping", parameters / dimension)  # in traker's units
    return uw.trak(models, F.cross_entropy, *rows, projection_dim=dimension, **ridge)


def trak(dimension: int, *, every: bool = False) -> Build:
    """TRAK with the model, or with all that were trained."""
    run = partial(_trak, dimension, every)
    return scorer(run, damped=True, projection_dim=dimension, default=False)


METHODS: dict[str, Build] = {
    "direct": influence(uw.Direct()),
    "direct-hessian": influence(uw.Direct(), "hessian"),
    "cg": influence(uw.CG(preconditioner=uw.Nystroem(rank=50))),
    "lissa": influence(uw.LiSSA()),
    "arnoldi": influence(uw.Arnoldi(rank=RANK)),
    f"arnoldi~{LARGER_RANK}": influence(uw.Arnoldi(rank=LARGER_RANK)),
    "nystroem": influence(uw.Nystroem(rank=RANK)),
    f"nystroem~{LARGER_RANK}": influence(uw.Nystroem(rank=LARGER_RANK)),
    "ekfac": influence(uw.EKFAC()),
    "kfac": influence(uw.KFAC()),
    "grad-dot": scorer(partial(_products, uw.grad_dot)),
    "grad-cos": scorer(partial(_products, uw.grad_cos)),
    **{f"trak~{dimension}": trak(dimension) for dimension in TRAK_DIMENSIONS},
}
WITH_CHECKPOINTS: dict[str, Build] = {"tracin": scorer(_tracin)}
# the number of models stands in the name, as it does with the peers
WITH_MODELS: dict[str, Build] = {
    f"trak-{{models}}~{dimension}": trak(dimension, every=True) for dimension in TRAK_DIMENSIONS
}
WITH_SUBSETS: dict[str, Build] = {"predict": predictions(uw.Direct())}
WITH_DIFFERENT_MODELS: dict[str, Build] = {
    "direct-ensemble": ensemble(uw.Direct()),
    "ekfac-ensemble": ensemble(uw.EKFAC()),
}


def _differ(states: Sequence[State]) -> bool:
    return any(not state[name].equal(states[0][name]) for state in states for name in state)


def make_methods(problem: Problem, batch_size: int) -> dict[str, Method]:
    """The methods that the problem has the weights for, by name."""
    builds = dict(METHODS)
    if problem.checkpoints:
        builds |= WITH_CHECKPOINTS
    if problem.models:
        builds |= WITH_MODELS
    if problem.masks is not None:
        builds |= WITH_SUBSETS
    if _differ(problem.models):
        builds |= WITH_DIFFERENT_MODELS
        if problem.masks is not None:
            builds["predict-ensemble"] = predictions(uw.Direct(), every=True)
    models = len(problem.models)
    return {name.format(models=models): build(problem) for name, build in builds.items()}


if __name__ == "__main__":
    main("upweight", make_methods, batch_size=0)
