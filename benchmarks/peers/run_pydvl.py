"""Run pyDVL's influence methods on a problem file (see `problems` and `common`).

Options are those of pyDVL's own wine walk-through. Its ``up`` scores already have our sign
and scale: ``g_test^T (H + damping I)^-1 g_train``, positive where the row helps. A number after
``~`` is a rank other than the walk-through's 30.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from common import Method, Problem, build_model, main, make_loader
from torch import Tensor
from torch.nn.functional import cross_entropy

RANK = 30
LARGER_RANK = 200
PRECONDITIONER_RANK = 5


def make_methods(problem: Problem, batch_size: int) -> dict[str, Method]:
    """Name the methods; the library is imported here, after warnings are silenced."""
    from pydvl.influence import InfluenceMode
    from pydvl.influence import torch as pydvl
    from pydvl.influence.torch.preconditioner import NystroemPreconditioner

    def fit(build: Callable[..., Any], settings: dict[str, Any]) -> Any:
        return build(build_model(problem), **settings).fit(make_loader(problem.train, batch_size))

    def scores(fitted: Any) -> Tensor:
        return fitted.influences(*problem.test, *problem.train, mode=InfluenceMode.Up)

    def method(build: Callable[..., Any], **settings: Any) -> Method:
        shown = {"loader_batch": batch_size} | settings
        shown.pop("loss", None)
        return Method(partial(fit, build, settings), scores, shown)

    def cg(*args: Any, **settings: Any) -> Any:
        preconditioner = NystroemPreconditioner(rank=settings.pop("preconditioner_rank"))
        return pydvl.CgInfluence(*args, cross_entropy, preconditioner=preconditioner, **settings)

    damping = problem.damped("regularization")
    damped = partial(method, loss=cross_entropy, **damping)
    return {
        "direct": damped(pydvl.DirectInfluence),
        "cg": method(
            cg,
            **damping,
            solve_simultaneously=True,
            preconditioner_rank=PRECONDITIONER_RANK,
            rtol=1e-4,
            warn_on_max_iteration=False,
        ),
        "lissa": damped(
            pydvl.LissaInfluence, maxiter=1000, scale=10.0, warn_on_max_iteration=False
        ),
        "arnoldi": damped(pydvl.ArnoldiInfluence, rank=RANK, tol=1e-6),
        f"arnoldi~{LARGER_RANK}": damped(pydvl.ArnoldiInfluence, rank=LARGER_RANK, tol=1e-6),
        "nystroem": damped(pydvl.NystroemSketchInfluence, rank=RANK),
        f"nystroem~{LARGER_RANK}": damped(pydvl.NystroemSketchInfluence, rank=LARGER_RANK),
        "ekfac": method(
            pydvl.EkfacInfluence, update_diagonal=True, **problem.damped("hessian_regularization")
        ),
    }


if __name__ == "__main__":
    main("pydvl", make_methods, batch_size=32)
