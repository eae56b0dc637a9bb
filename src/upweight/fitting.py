"""What `Influence` is before it scores: options, fitting, damping, certificates."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from upweight.blocks import BlockChoice
from upweight.choices import (
    CurvatureChoice,
    check_blocks,
    check_certify,
    check_dampings,
    choose_curvature,
    choose_method,
)
from upweight.costs import Memory
from upweight.curvature import GGN
from upweight.damping import BLOCK_SCALE, DampingChoice, choose_damping
from upweight.fitted import Damping, Fitted
from upweight.gathering import on_all_ranks
from upweight.inverse import Certificate, LanczosFactors, NystroemFactors
from upweight.inverse.lowrank import smallest_kept
from upweight.inverse.spectrum import lowest_eigenvalue
from upweight.margins import TestLoss, choose_test_loss
from upweight.meter import return_at_once
from upweight.operator import LinearOperator
from upweight.ranks import check_unwrapped, check_whole
from upweight.recipes import EKFAC, KFAC, Recipe
from upweight.record import TrainingRecord
from upweight.risk import EmpiricalRisk
from upweight.version import __version__

if TYPE_CHECKING:
    from upweight.cluster import Cluster

__all__ = ["Fitting", "telling"]

# Right-hand sides of one call whose residual is measured where the method does not know it, unless
# rows times parameters are more than this: a product with the exact curvature takes as long as
# several passes of a method by layers.
CERTIFIED = 8
CERTIFIED_WORK = 10**9


class Fitting:
    """Model, loss and options; after `fit` the damped inverse of a curvature of training rows."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        method: str | Recipe = "direct",
        *,
        damping: Damping | Literal["auto"],
        curvature: CurvatureChoice = "ggn",
        blocks: Literal["full"] | BlockChoice = "full",
        certify: int | Literal["auto"] | None = "auto",
        record: TrainingRecord | None = None,
        parameters: str | Sequence[str] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        target: Callable[[Any], Any] | None = None,
        features: Callable[[Any], Tensor] | None = None,
        batch_size: int | None = None,
        cluster: bool | Cluster | None = None,
        memory: str | int | None = None,
    ) -> None:
        check_whole(model)
        self.model = model
        self.loss = loss
        self.method: Recipe = choose_method(method)
        self.blocks = check_blocks(blocks)
        self.certify = check_certify(certify)
        self.curvature = curvature if callable(curvature) else str(curvature)
        self._make_curvature = choose_curvature(curvature)
        self._auto = isinstance(damping, str)
        self._damping: Damping = _chosen_later(damping, self.blocks)
        self.damping_choice: DampingChoice | None = None
        if record is not None and not isinstance(record, TrainingRecord):
            raise TypeError(f"expected a TrainingRecord as record; got {record!r}")
        self.record = record
        self._options: dict[str, Any] = {
            "parameters": parameters,
            "forward": forward,
            "target": target,
            "features": features,
            "batch_size": batch_size,
            "memory": Memory.of(memory),
        }
        if memory is not None:
            return_at_once()
        self._fit: Fitted | None = None
        self.cluster: Cluster | None = self._join(cluster) if cluster else None

    def _join(self, wanted: bool | Cluster) -> Cluster:
        """The processes that fit and score together, if this is what they can."""
        if not isinstance(self.method, EKFAC | KFAC) or self.blocks != "full" or self._auto:
            given = "auto" if self._auto else self._damping
            raise ValueError(
                "cluster= is for the methods EKFAC and KFAC, with blocks='full' and a damping that "
                f"is a number; this influence has {self.method!r}, blocks={self.blocks!r} and "
                f"damping={given!r}. Leave cluster= out, and use one process"
            )
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module; got {type(self.model).__name__}")
        check_unwrapped(self.model)
        from upweight.cluster import Cluster

        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return Cluster.of(wanted, device)

    def _check_alone(self, what: str) -> None:
        if self.cluster is not None:
            raise ValueError(
                f"{what} is not spread over the ranks of a cluster. Call it in one process, on an "
                "Influence without cluster=; fit(train, factors=…) brings the factors there"
            )

    @on_all_ranks
    def fit(
        self,
        train: Any,
        *,
        names: Sequence[Any] | None = None,
        held_out: Any = None,
        factors: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Compute the curvature of the mean loss over the training rows, and prepare its inverse.

        Parameters
        ----------
        train
            The rows that the model was trained on, as one argument: ``(x, y)``, a map-style data
            set, or a `DataLoader`, of which all rows are taken in the order of its data set.
        names
            One name per row; default: a pandas index, else positions.
        held_out
            For ``damping="auto"``: rows that the model has not seen, drawn as the training rows
            were, wrong labels included.
        factors
            For the methods EKFAC and KFAC: a file that keeps the factors. They are read from it if
            it is there, and written to it if not. One of another model, other rows or settings is
            refused.

        Returns
        -------
        Influence
            Itself.
        """
        if held_out is not None and not self._auto:
            raise ValueError(
                f"held_out is for damping='auto'; this influence has damping {self._damping}"
            )
        with telling("training data"):
            risk = self._new_risk(train, names)
        operator = self._make_curvature(risk)
        damping, choice = self._damping, None
        if self._auto:
            with telling("held-out data"):
                unseen = None if held_out is None else self._new_risk(held_out, None)
            operator, choice = self._choose_damping(operator, risk, unseen)
            damping = choice.value
        # all at once, at the end: after an error what an earlier fit computed still fits together
        fit = Fitted.of(risk, operator, self.method, self.blocks, damping, factors=factors)
        if choice is not None:
            choice = _above_the_cut(fit, choice)
            damping = choice.value
        self._fit, self._damping, self.damping_choice = fit, damping, choice
        return self

    def _choose_damping(
        self, curvature: LinearOperator, train: EmpiricalRisk, held_out: EmpiricalRisk | None
    ) -> tuple[LinearOperator, DampingChoice]:
        """λ, and the curvature to use with it: the GGN where C + λI is indefinite."""
        if getattr(self.method, "relative", None) is not None:
            why = (
                f"a share of the mean eigenvalue, as {self.method!r} takes it, which neither "
                "held-out rows nor a record can tell"
            )
            return curvature, DampingChoice(BLOCK_SCALE, "scale", why)
        # the search removes rows, which an indefinite curvature does not survive at a small damping
        definite = curvature if curvature.semidefinite else _ggn(train)
        by_block = self.blocks != "full" or bool(getattr(self.method, "by_block", False))
        choice = choose_damping(
            definite or curvature, train, held_out, self.record, blocks=by_block
        )
        if definite is None or definite is curvature:
            return curvature, choice
        lowest = lowest_eigenvalue(curvature)
        if lowest + choice.value > 0:
            return curvature, choice
        why = (
            f"{choice.why}. The GGN takes the place of the "
            f"{getattr(curvature, 'name', 'curvature')}, whose lowest eigenvalue is {lowest:.3g} "
            "or less: with this damping it is indefinite"
        )
        return definite, replace(choice, why=why)

    def risk(
        self,
        data: Any,
        *,
        names: Sequence[Any] | None = None,
        what: str = "data",
        test_loss: TestLoss = "loss",
    ) -> EmpiricalRisk:
        """The mean loss over some rows, with this model and parameters."""
        loss = choose_test_loss(test_loss, self.loss)
        with telling(what):
            # Model and loss have been probed by fit(): rows of the same form need no second time.
            known = self._fit is not None and loss is self.loss
            found = self._fitted().risk.over(data, names) if known else None
            found = found or self._new_risk(data, names, loss)
        if self._fit is not None:
            found.memory = self._fit.risk.memory  # of which the method keeps a part
        if self._fit is not None and found.model.names != self._fit.risk.model.names:
            raise RuntimeError(
                "other parameters have requires_grad than at fit(): the curvature is of other "
                "parameters than these gradients. Call fit(train) again"
            )
        return found

    def _new_risk(self, data: Any, names: Sequence[Any] | None, loss: Any = None) -> EmpiricalRisk:
        return EmpiricalRisk(
            self.model,
            loss or self.loss,
            data,
            names=names,
            cluster=self.cluster,
            **self._options,
        )

    def settings(self) -> dict[str, str]:
        """What must be the same on all ranks, beside model and rows."""
        return {
            "method": repr(self.method),
            "damping": repr(self._damping),
            "curvature": self.curvature if isinstance(self.curvature, str) else "own curvature",
            "loss": getattr(self.loss, "__qualname__", type(self.loss).__qualname__),
            "parameters": repr(self._options["parameters"]),
            "certify": repr(self.certify),
            "memory": repr(self._options["memory"].limit),
            "version of upweight": __version__,
            "version of torch": torch.__version__,
        }

    @property
    def damping(self) -> Damping:
        """λ. Setting it after `fit` re-uses everything that does not depend on it.

        With ``"auto"`` it is known after `fit`, and `damping_choice` says why it is what it is.
        """
        if self._auto and self.damping_choice is None:
            raise RuntimeError("damping='auto' is chosen by fit(train): call it first")
        return self._damping

    @damping.setter
    def damping(self, damping: Damping) -> None:
        damping = check_dampings(damping, self.blocks)
        if self._fit is not None:
            self._fit.set_damping(damping)
        self._damping, self._auto, self.damping_choice = damping, False, None

    def budget(self, *, stored: bool = False) -> int | None:
        """For how many right-hand sides of the next call the residual is measured."""
        if not isinstance(self.certify, str):
            return self.certify
        risk = self._fitted().risk
        if not stored and risk.n * risk.p <= CERTIFIED_WORK:
            return CERTIFIED
        why = (
            "it would pass the training rows through the model"
            if stored
            else "with so many rows and parameters it would take longer than the scores"
        )
        self.certificate.note(
            f"no residual is measured: {why}. measure(test, rows=1) does it, or certify= for every "
            "call"
        )
        return 0

    @property
    def inverse(self) -> LinearOperator:
        """(C + λI)⁻¹ as an operator, after `fit`."""
        return self._fitted().solver()

    @property
    def certificate(self) -> Certificate:
        """How exact the solves since `fit` were: residuals, steps, products, coverage, notes.

        A new damping begins a new one, and so do other test rows where a method begins with them.
        Residuals are those of (C + λI) x = g for the exact curvature C, whatever the method.
        """
        return self._fitted().certificate()

    @on_all_ranks
    def measure(self, test: Any, rows: int | None = None) -> Certificate:
        """How exact this method is for some test rows, on a certificate of its own.

        Parameters
        ----------
        test
            The test rows, whose gradients are the right-hand sides.
        rows
            For how many of them the residual is measured, at one product with the exact curvature
            each; None for all.
        """
        test_risk = self.risk(test, what="test data")
        self._check_unchanged(test_risk)
        return self.certify_rows(test_risk, rows)

    # --- what the parts of the library need of it
    # -------------------------------------------------------------------------------

    @property
    def training(self) -> EmpiricalRisk:
        """The mean loss over the training rows, after `fit`."""
        return self._fitted().risk

    @property
    def curvature_operator(self) -> LinearOperator:
        """C, all of it, after `fit`."""
        return self._fitted().operator

    def fitted_with(self, damping: float) -> Fitted:
        """What `fit` has found, as a copy with another λ."""
        return self._fitted().copied(damping)

    def certify_rows(self, test: EmpiricalRisk, rows: int | None) -> Certificate:
        """The certificate of the gradients of some rows alone."""
        return self._fitted().measure(test, rows)

    def risk_like(self, risk: EmpiricalRisk) -> EmpiricalRisk:
        """The rows and loss of another risk, with this model."""
        return self._new_risk(risk.rows, None, risk.loss)

    # --- inner parts
    # -------------------------------------------------------------------------------

    def _fitted(self) -> Fitted:
        if self._fit is None:
            raise RuntimeError("no curvature yet: call fit(train) first")
        return self._fit

    def _check_unchanged(self, risk: EmpiricalRisk) -> None:
        if risk.model.fingerprint() != self._fitted().fingerprint:
            raise RuntimeError(
                "the model's parameters or buffers have changed since fit(): the curvature belongs "
                "to the old ones. Call fit(train) again"
            )

    def __repr__(self) -> str:
        state = "not fitted" if self._fit is None else f"fitted on {self._fit.risk.n} rows"
        curvature = self.curvature if isinstance(self.curvature, str) else "own curvature"
        damping = f"{self._damping:g}" if isinstance(self._damping, float) else str(self._damping)
        damping = "auto" if self._auto and self.damping_choice is None else damping
        return f"<Influence: {self.method!r} on {curvature}, damping {damping}, {state}>"


def _chosen_later(damping: Any, blocks: str | BlockChoice) -> Damping:
    """A damping that is fine, or NaN in place of ``"auto"`` until `fit`."""
    if damping == "auto":
        return float("nan")
    if isinstance(damping, str):
        raise TypeError(f"expected a number for the damping λ, or 'auto'; got {damping!r}")
    return check_dampings(damping, blocks)


def _above_the_cut(fit: Fitted, choice: DampingChoice) -> DampingChoice:
    """λ, at least the smallest eigenvalue that a low-rank method keeps."""
    prepared = fit.prepared
    if not isinstance(prepared, LanczosFactors | NystroemFactors) or fit.inverse is None:
        return choice
    cut = smallest_kept(prepared)
    if cut <= choice.value:
        return choice
    fit.set_damping(cut)
    why = (
        f"{choice.value:.3g} in principle ({choice.why}), but {fit.method} knows no eigenvalue "
        f"below {cut:.3g}, and takes all others as zero"
    )
    return replace(choice, value=cut, how="cut", why=why, low=None, high=None)


def _ggn(train: EmpiricalRisk) -> LinearOperator | None:
    try:
        return GGN(train)
    except ValueError:  # a loss that is not convex in the output has none
        return None


@contextmanager
def telling(what: str) -> Generator[None]:
    """Put the name of the data in front of an error about it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        # not type(error): a UnicodeDecodeError, say, is not made of one text
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what}: {error}") from error
