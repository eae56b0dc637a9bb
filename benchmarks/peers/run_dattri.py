"""Run dattri's influence attributors on a problem file (see `common`).

All training rows go in one batch by default: dattri 0.3 sums the inverse products of the
batches, ``sum_b H_b^-1 v`` instead of ``(sum_b H_b)^-1 v``, so that its "explicit", CG and LiSSA
scores grow with the number of batches. With one batch that does not matter. The curvature is
the Hessian of the mean loss, for EK-FAC the empirical Fisher. Its matrix is (train, test), ours
the transpose; the sign is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Method, Problem, build_model, main, make_loader
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

RANK = 30
LISSA_SCALE = 10.0
LISSA_STEPS = 1000
LISSA_BATCH = 32


def _task(problem: Problem) -> Any:
    """Describe model and mean loss to dattri."""
    from dattri.task import AttributionTask

    model = build_model(problem)

    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        # LiSSA hands labels over as floats; EK-FAC's hooks need the module itself called.
        return cross_entropy(functional_call(model, params, (data[0],)), data[1].long())

    return AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())


def make_methods(problem: Problem, batch_size: int) -> dict[str, Method]:
    """Name the methods; the library is imported here, after warnings are silenced."""
    from dattri.algorithm import influence_function as dattri

    def fit(build: Callable[..., Any], settings: dict[str, Any]) -> Any:
        attributor = build(_task(problem), **settings)
        attributor.cache(make_loader(problem.train, batch_size))
        return attributor

    def scores(attributor: Any) -> Tensor:
        train, test = make_loader(problem.train, 0), make_loader(problem.test, 0)
        with torch.no_grad():  # as its README does; LiSSA else keeps the graph of every step
            return attributor.attribute(train, test).T

    def method(build: Callable[..., Any], **settings: Any) -> Method:
        shown = {"loader_batch": batch_size} | settings
        return Method(partial(fit, build, settings), scores, shown)

    damping = problem.damping
    return {
        "explicit": method(dattri.IFAttributorExplicit, regularization=damping),
        "cg": method(dattri.IFAttributorCG, max_iter=10, regularization=damping),
        # Its fixed point is (H + damping * scaling)^-1 v, hence the division.
        "lissa": method(
            dattri.IFAttributorLiSSA,
            batch_size=LISSA_BATCH,
            recursion_depth=LISSA_STEPS,
            scaling=LISSA_SCALE,
            damping=damping / LISSA_SCALE,
        ),
        "arnoldi": method(dattri.IFAttributorArnoldi, proj_dim=RANK, regularization=damping),
        "ekfac": method(dattri.IFAttributorEKFAC, damping=damping),
    }


if __name__ == "__main__":
    main("dattri", make_methods, batch_size=0)
