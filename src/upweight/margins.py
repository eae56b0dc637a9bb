"""What is measured of a test row, other than the loss: the margin of its label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["TestLoss", "choose_test_loss", "margin", "negative_margin"]

TestLoss = Literal["loss", "margin"] | Callable[[Any, Any], Tensor]


def margin(output: Tensor, target: Tensor) -> Tensor:
    """log p_y / (1 − p_y), the log odds of the label: (b, c), (b,) → (b,).

    Parameters
    ----------
    output
        Logits (b, c) for integer labels (b,); or one logit a row, (b,) or (b, 1), for labels 0 and
        1 of the same shape.
    target
        The labels.

    Raises
    ------
    ValueError
        For shapes that are neither.

    Notes
    -----
    Unlike the loss it does not saturate: a sum of effects on it is nearer to the effect of a group.

    References
    ----------
    S. M. Park et al., *TRAK: attributing model behavior at scale*, ICML 2023, §2.

    Examples
    --------
    >>> margin(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
    tensor([ 2., -2.])
    """
    if output.ndim == 2 and output.shape[1] > 1 and target.shape == output.shape[:1]:
        own = target[:, None].long()
        others = output.scatter(1, own, -torch.inf).logsumexp(1)
        return output.gather(1, own)[:, 0] - others
    if output.shape == target.shape and output[0].numel() == 1:
        return (output * (2 * target.to(output.dtype) - 1)).reshape(len(output))
    raise ValueError(
        "a margin needs logits (b, c) for integer labels (b,), or one logit a row for labels 0 and "
        f"1 of the same shape; got an output {tuple(output.shape)} and a target "
        f"{tuple(target.shape)}"
    )


def negative_margin(output: Tensor, target: Tensor) -> Tensor:
    """−log p_y / (1 − p_y): lower is better, as with a loss."""
    return -margin(output, target)


def choose_test_loss(
    test_loss: TestLoss, loss: Callable[[Any, Any], Tensor]
) -> Callable[[Any, Any], Tensor]:
    """``"loss"`` → `loss`, ``"margin"`` → `negative_margin`, a function → itself."""
    if callable(test_loss):
        return test_loss
    if test_loss == "loss":
        return loss
    if test_loss == "margin":
        return negative_margin
    raise ValueError(
        f"expected test_loss 'loss', 'margin' or a function (output, target) → loss; got "
        f"{test_loss!r}"
    )
