"""RelatIF: influence relative to how much a training row moves the whole model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from upweight.margins import TestLoss
from upweight.methods import Influence
from upweight.scores import Scores

__all__ = ["relatif"]


def relatif(
    influence: Influence,
    test: Any,
    kind: Literal["loss", "parameters"] = "loss",
    *,
    test_loss: TestLoss = "loss",
) -> Scores:
    """RelatIF: the influence of a training row relative to its effect on everything else.

        kind "loss":          I[j, i] / √(g_iᵀ (C + λI)⁻¹ g_i)
        kind "parameters":    I[j, i] / ‖(C + λI)⁻¹ g_i‖

    Plain influence ranks outliers and wrong labels first for nearly every test row, since they move
    the model most. Divided by how far they move the loss, or the parameters, what is left is the
    rows that matter to this test row in particular. Positive = training row i helps, as ever.

    It explains single test rows. Sums over training rows no longer say what leaving them out does,
    because every row is measured in a unit of its own: for groups and removal take `Influence`.

    Parameters
    ----------
    influence
        A fitted `Influence`.
    test
        m test rows.
    kind
        Relative to the root of the self-influence, or to the step of the parameters.
    test_loss
        What is measured of the test rows: as for `grad_dot`.

    Returns
    -------
    Scores
        ``values`` (m, n). A row with a zero gradient has score 0, and is told of in
        ``provenance["notes"]``.

    Raises
    ------
    ValueError
        If a self-influence is negative, as it can be where C + λI is not positive definite.

    References
    ----------
    E. Barshan, M.-E. Brunet, G. K. Dziugaite, *RelatIF: identifying explanatory training examples
    via relative influence*, AISTATS 2020, §4.

    Examples
    --------
    >>> x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.5], [0.0]])
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> fitted = Influence(model, torch.nn.functional.mse_loss, damping=0.0).fit((x, y))
    >>> relatif(fitted, (x[:1], y[:1]), "parameters").values  # gradients −1 and 2
    tensor([[ 1., -1.]])
    """
    if kind not in ("loss", "parameters"):
        raise ValueError(f"expected kind 'loss' or 'parameters'; got {kind!r}")
    scores = influence.scores(test, test_loss=test_loss)
    sizes = _self_influence(influence) if kind == "loss" else _steps(influence)
    zero = sizes == 0
    values = scores.values / sizes.masked_fill(zero, 1.0)
    values[:, zero] = 0.0
    provenance = {**scores.provenance, "method": f"relatif({scores.provenance['method']})"}
    provenance["relative_to"] = kind
    if bool(zero.any()):
        count, first = int(zero.sum()), int(zero.nonzero()[0])
        provenance["notes"] = [
            f"{count} training row(s) have a zero gradient, and a score of 0: the first is row "
            f"{first}"
        ]
    return Scores(values.to(sizes.dtype), scores.test_names, scores.train_names, provenance)


def _self_influence(influence: Influence) -> Tensor:
    """√(g_iᵀ (C + λI)⁻¹ g_i), (n,)."""
    own = influence.self_influence().values
    if bool((own < 0).any()):
        worst = int(own.argmin())
        raise ValueError(
            f"expected gᵀ(C + λI)⁻¹g ≥ 0 for every training row; row {worst} has "
            f"{float(own[worst]):.3g}: C + λI is not positive definite. Use curvature='ggn', or a "
            "larger damping"
        )
    return own.sqrt()


def _steps(influence: Influence) -> Tensor:
    """‖(C + λI)⁻¹ g_i‖, (n,)."""
    inverse = influence.inverse
    risk = influence._fitted().risk  # pyright: ignore[reportPrivateUsage]
    parts = [(inverse @ gradients.T).norm(dim=0) for _, gradients in risk.row_gradients()]
    return torch.cat(parts).to("cpu", risk.dtype)
