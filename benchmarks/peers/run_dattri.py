"""Run dattri's attributors on a problem file (see `problems` and `common`).

All training rows go in one batch by default: dattri 0.3 sums the inverse products of the
batches, ``sum_b H_b^-1 v`` instead of ``(sum_b H_b)^-1 v``, so that its "explicit", CG and LiSSA
scores grow with the number of batches. With one batch that does not matter. The curvature is
the Hessian of the mean loss; of EK-FAC, DataInf and LoGra it is the empirical Fisher. Its matrix
is (train, test), ours the transpose; the sign is the same. A number after ``~`` is a rank or the
dimension of a projection; "arnoldi" alone has rank 30.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Method, Problem, build_model, main, make_loader
from problems import margins
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

RANK = 30
DEFAULT_RANK = 100
LISSA_SCALE = 10.0
LISSA_STEPS = 1000
LISSA_BATCH = 32
LOGRA_DIMENSIONS = (4096, 256, 1024)  # squares; the first is the default
LOGRA_SCALE = 100.0  # from a damping to a share of the mean eigenvalue: 0.005 is a half of it
TRAK_DIMENSIONS = (512, 128, 2048)  # the first is the default


def _task(problem: Problem, output: Callable[[Tensor, Tensor], Tensor], states: Any) -> Any:
    """Describe model and loss, or another output, to dattri."""
    from dattri.task import AttributionTask

    model = build_model(problem)

    def function(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        # LiSSA hands labels over as floats; EK-FAC's hooks need the module itself called.
        return output(functional_call(model, params, (data[0],)), data[1].long())

    return AttributionTask(loss_func=function, model=model, checkpoints=states)


def _influence_methods(problem: Problem, batch_size: int) -> dict[str, Method]:
    """Those that have a curvature, and a loss."""
    from dattri.algorithm import influence_function as dattri

    def fit(build: Callable[..., Any], settings: dict[str, Any]) -> Any:
        attributor = build(_task(problem, cross_entropy, problem.state), **settings)
        attributor.cache(make_loader(problem.train, batch_size))
        return attributor

    def scores(attributor: Any) -> Tensor:
        train, test = make_loader(problem.train, 0), make_loader(problem.test, 0)
        with torch.no_grad():  # as its README does; LiSSA else keeps the graph of every step
            return attributor.attribute(train, test).T

    def method(build: Callable[..., Any], **settings: Any) -> Method:
        shown = {"loader_batch": batch_size} | settings
        return Method(partial(fit, build, settings), scores, shown)

    regularized = partial(method, **problem.damped("regularization"))
    arnoldi = partial(regularized, dattri.IFAttributorArnoldi)
    return {
        "explicit": regularized(dattri.IFAttributorExplicit),
        "cg": regularized(dattri.IFAttributorCG, max_iter=10),
        # Its fixed point is (H + damping * scaling)^-1 v, hence the division.
        "lissa": method(
            dattri.IFAttributorLiSSA,
            batch_size=LISSA_BATCH,
            recursion_depth=LISSA_STEPS,
            scaling=LISSA_SCALE,
            **problem.damped("damping", 1 / LISSA_SCALE),
        ),
        f"arnoldi~{DEFAULT_RANK}": arnoldi(proj_dim=DEFAULT_RANK),
        "arnoldi": arnoldi(proj_dim=RANK),
        "ekfac": method(dattri.IFAttributorEKFAC, **problem.damped("damping")),
        "datainf": regularized(dattri.IFAttributorDataInf),
    }


class _Rows(nn.Sequential):
    """A network that takes a single row too: LoGra tries it on the first, without its dimension."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(torch.atleast_2d(rows))


def _logra_methods(problem: Problem) -> dict[str, Method]:
    """Projected gradients and their Fisher; the damping is a share of the mean eigenvalue."""
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    def loss(model: Any, batch: tuple[Tensor, Tensor], device: str) -> Tensor:
        inputs, labels = (part.to(device) for part in batch)
        return cross_entropy(model(inputs), labels)

    def fit(settings: dict[str, Any]) -> Any:
        model = _Rows(*build_model(problem))
        task = AttributionTask(loss_func=loss, model=model, checkpoints=problem.state)
        folder = tempfile.TemporaryDirectory()  # where it writes sizes of batches, always
        attributor = LoGraAttributor(
            task, hessian="eFIM", offload="none", cache_dir=folder.name, **settings
        )
        attributor.cache(make_loader(problem.train, 0))
        return attributor, folder

    def scores(fitted: Any) -> Tensor:
        attributor, folder = fitted
        train, test = make_loader(problem.train, 0), make_loader(problem.test, 0)
        found = attributor.attribute(train, test).T
        folder.cleanup()
        return found

    def method(dimension: int) -> Method:
        settings = {"proj_dim": dimension} | problem.damped("damping", LOGRA_SCALE)
        return Method(partial(fit, settings), scores, settings)

    return {f"logra~{dimension}": method(dimension) for dimension in LOGRA_DIMENSIONS}


def _trajectory_methods(problem: Problem) -> dict[str, Method]:
    """Dot products of gradients, unprojected."""
    from dattri.algorithm.tracin import TracInAttributor

    def fit(states: list[Any], weights: list[float], normalized: bool) -> Any:
        task = _task(problem, cross_entropy, states)
        attributor = TracInAttributor(task, torch.tensor(weights), normalized_grad=normalized)
        attributor.projector_kwargs = None  # the argument None means 512 dimensions
        return attributor

    def scores(attributor: Any) -> Tensor:
        train, test = make_loader(problem.train, 0), make_loader(problem.test, 0)
        with torch.no_grad():
            return attributor.attribute(train, test).T

    def method(states: Any, weights: Any, normalized: bool = False) -> Method:
        shown = {"checkpoints": len(states), "normalized_grad": normalized}
        run = partial(fit, list(states), list(weights), normalized)
        return Method(run, scores, shown, damped=False)

    found = {
        "grad-dot": method([problem.state], [1.0]),
        "grad-cos": method([problem.state], [1.0], normalized=True),
    }
    if problem.checkpoints:
        found["tracin"] = method(problem.checkpoints, problem.rates)
    return found


def _trak_methods(problem: Problem) -> dict[str, Method]:
    """TRAK with one model and with all, for some dimensions of the projection."""
    from dattri.algorithm.trak import TRAKAttributor

    model = build_model(problem)

    def output(outputs: Tensor, labels: Tensor) -> Tensor:
        return margins(outputs, labels).sum()

    def probability(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        logits = functional_call(model, params, (data[0][None],))
        return torch.exp(-cross_entropy(logits, data[1][None]))

    def fit(states: list[Any], dimension: int, ridge: dict[str, float]) -> Any:
        task = _task(problem, output, states)
        attributor = TRAKAttributor(
            task=task,
            correct_probability_func=probability,
            projector_kwargs={"device": "cpu", "proj_dim": dimension},
            **ridge,
        )
        with torch.no_grad():
            attributor.cache(make_loader(problem.train, 0))
        return attributor

    def scores(attributor: Any) -> Tensor:
        with torch.no_grad():
            return attributor.attribute(make_loader(problem.test, 0)).T

    def method(states: Any, dimension: int) -> Method:
        # added to a sum over rows of features that are divided by the root of their number
        ridge = problem.damped("regularization", len(problem.x_train) / dimension)
        run = partial(fit, list(states), dimension, ridge)
        return Method(run, scores, {"proj_dim": dimension, "models": len(states), **ridge})

    return {
        f"{name}~{dimension}": method(states, dimension)
        for name, states in problem.ensembles("trak").items()
        for dimension in TRAK_DIMENSIONS
    }


def make_methods(problem: Problem, batch_size: int) -> dict[str, Method]:
    """Name the methods; the library is imported here, after warnings are silenced."""
    return {
        **_influence_methods(problem, batch_size),
        **_logra_methods(problem),
        **_trajectory_methods(problem),
        **_trak_methods(problem),
    }


if __name__ == "__main__":
    main("dattri", make_methods, batch_size=0)
