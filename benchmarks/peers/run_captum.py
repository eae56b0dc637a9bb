"""Run captum's influence methods on a problem file (see `problems` and `common`).

Its Hessian is that of the sum over rows, so the damping of the mean is multiplied by the number of
rows; ours are its scores times that number, which changes no ranking and is done here too. The sign
is ours. The naive influence function keeps all eigenvectors instead of fifty. A pair of numbers
after ``~`` is the dimension of the Krylov subspace and of the projection instead of 200 and 50.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from common import Method, Problem, build_model, main, make_loader
from torch import Tensor, nn

ARNOLDI = ((200, 50), (200, 200), (400, 400))  # the first is the default


def _load(model: nn.Module, checkpoint: Any) -> float:
    state, rate = checkpoint
    model.load_state_dict(state)
    return rate


def make_methods(problem: Problem, batch_size: int) -> dict[str, Method]:
    """Name the methods; the library is imported here, after warnings are silenced."""
    from captum.influence import TracInCP
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
    from captum.influence._core.influence_function import NaiveInfluenceFunction

    rows = len(problem.x_train)

    def fit(build: Callable[..., Any], settings: dict[str, Any]) -> Any:
        return build(
            build_model(problem),
            make_loader(problem.train, batch_size),
            checkpoints_load_func=_load,
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            sample_wise_grads_per_batch=True,
            **settings,
        )

    def scores(scale: int, fitted: Any) -> Tensor:
        return fitted.influence(problem.test).detach() * scale

    def method(
        build: Callable[..., Any], damped: bool, states: dict[str, Any], **settings: Any
    ) -> Method:
        run = partial(fit, build, {**states, **settings})
        shown = {"loader_batch": batch_size, **settings}
        return Method(run, partial(scores, rows if damped else 1), shown, damped)

    damping = problem.damped("hessian_reg", rows)
    one = {"checkpoint": (problem.state, 1.0)}
    found = {
        "arnoldi" if (krylov, kept) == ARNOLDI[0] else f"arnoldi~{krylov}-{kept}": method(
            ArnoldiInfluenceFunction,
            True,
            one,
            arnoldi_dim=krylov,
            projection_dim=kept,
            **damping,
        )
        for krylov, kept in ARNOLDI
    }
    found["naive"] = method(NaiveInfluenceFunction, True, one, projection_dim=None, **damping)
    if problem.checkpoints:
        states = list(zip(problem.checkpoints, problem.rates, strict=True))
        found["tracin"] = method(TracInCP, False, {"checkpoints": states})
    return found


if __name__ == "__main__":
    main("captum", make_methods, batch_size=0)
