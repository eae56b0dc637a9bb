"""The training and the test side of a scorer, and what its scores say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from upweight.fitting import telling
from upweight.losses import Gaussian, output_distribution
from upweight.margins import TestLoss, choose_test_loss
from upweight.risk import EmpiricalRisk
from upweight.rows import Rows
from upweight.version import __version__

__all__ = ["ScorerOptions", "Sides", "make_sides"]


class ScorerOptions(TypedDict, total=False):
    """What every scorer takes beside its own options.

    Attributes
    ----------
    parameters, forward, target, batch_size
        As for `Influence`.
    train_names, test_names
        One name per row; default: a pandas index, else positions.
    """

    parameters: str | Sequence[str] | None
    forward: Callable[[nn.Module, Any], Any] | None
    target: Callable[[Any], Any] | None
    batch_size: int | None
    train_names: Sequence[Any] | None
    test_names: Sequence[Any] | None


@dataclass(frozen=True)
class Sides:
    """Training and test rows, and what is differentiated on each side."""

    train: Rows
    test: Rows
    loss: Callable[[Any, Any], Tensor]
    test_loss: Callable[[Any, Any], Tensor]
    measured: str
    options: dict[str, Any] = field(default_factory=lambda: {})

    def train_risk(
        self, model: nn.Module, loss: Callable[[Any, Any], Tensor] | None = None
    ) -> EmpiricalRisk:
        """The mean loss of a model over the training rows."""
        with telling("training data"):
            return EmpiricalRisk(model, loss or self.loss, self.train, **self.options)

    def test_risk(self, train: EmpiricalRisk) -> EmpiricalRisk:
        """The mean test loss of the same model over the test rows."""
        with telling("test data"):
            # a loss that has been probed on rows of the same form needs no second time
            known = train.over(self.test) if self.test_loss is train.loss else None
            model = train.model.model
            return known or EmpiricalRisk(model, self.test_loss, self.test, **self.options)

    def provenance(self, method: str, parameters: int, model: Any) -> dict[str, Any]:
        """How the scores came about, under the same keys as those of `Influence`."""
        return {
            "method": method,
            "test_loss": self.measured,
            "mode": "up",
            "train_rows": len(self.train),
            "test_rows": len(self.test),
            "parameters": parameters,
            "model": model,
            "versions": {"upweight": __version__, "torch": torch.__version__},
        }


def make_sides(
    loss: Callable[[Any, Any], Tensor],
    train: Any,
    test: Any,
    test_loss: TestLoss,
    **options: Unpack[ScorerOptions],
) -> Sides:
    """The rows of both sides, with what is common to all scorers checked."""
    unknown = sorted(set(options) - set(ScorerOptions.__annotations__))
    if unknown:
        known = ", ".join(ScorerOptions.__annotations__)
        raise TypeError(f"expected options among {known}; got {', '.join(unknown)}")
    measured = choose_test_loss(test_loss, loss)
    if test_loss == "margin" and isinstance(output_distribution(loss), Gaussian):
        raise ValueError(
            "test_loss='margin' is of the label of a classifier; got a squared error. Use "
            "test_loss='loss'"
        )
    with telling("training data"):
        train_rows = Rows(train, options.pop("train_names", None))
    with telling("test data"):
        test_rows = Rows(test, options.pop("test_names", None))
    name = getattr(test_loss, "__name__", repr(test_loss)) if callable(test_loss) else test_loss
    return Sides(train_rows, test_rows, loss, measured, name, dict(options))
