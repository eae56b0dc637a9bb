"""A curvature of training rows with its damped inverse, as `Influence` keeps it after `fit`."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from upweight.blocks import BlockChoice, parameter_blocks
from upweight.influence import gathered_gradients, mean_gradient
from upweight.inverse import BlockFactors, Certificate, CGFactors
from upweight.operator import LinearOperator
from upweight.recipes import EKFAC, KFAC, Recipe
from upweight.risk import EmpiricalRisk

__all__ = ["Damping", "Fitted"]

Damping = float | Mapping[str, float]


@dataclass
class Fitted:
    """What `Influence.fit` found.

    Attributes
    ----------
    risk
        The mean loss over the training rows.
    fingerprint
        Of the model's parameters and buffers.
    operator
        C, all of it.
    prepared
        What the method has computed of it for any damping.
    method
        The name of the method.
    inverse
        (C + λI)⁻¹; None while it waits for test rows.
    """

    risk: EmpiricalRisk
    fingerprint: str
    operator: LinearOperator
    prepared: Any
    damping: Damping
    method: str
    inverse: Any = None

    @classmethod
    def of(
        cls,
        risk: EmpiricalRisk,
        operator: LinearOperator,
        method: Recipe,
        blocks: str | BlockChoice,
        damping: Damping,
        *,
        factors: str | os.PathLike[str] | None = None,
    ) -> Fitted:
        """Do everything that needs no test row."""
        fingerprint = risk.model.fingerprint()
        if factors is None:
            prepared = _prepare(method, operator, risk, blocks, damping)
        else:
            prepared = _prepare_factors(method, operator, blocks, factors)
        fitted = cls(risk, fingerprint, operator, prepared, damping, method.name)
        if getattr(prepared, "waits", False):
            fitted.set_damping(damping)
        else:
            fitted.solver()
        return fitted

    def solver(self) -> Any:
        """The inverse, made now if it has waited until now."""
        if self.inverse is None:
            self.inverse = self.prepared.inverse(self.damping)
        return self.inverse

    def set_damping(self, damping: Damping) -> None:
        """Another λ, from what is prepared."""
        check = getattr(self.prepared, "check", None)
        if self.inverse is None and check is not None:
            check(damping)  # now, and not when the test rows come
        inverse = None if self.inverse is None else self.prepared.inverse(damping)
        self.damping, self.inverse = damping, inverse

    def ready(self, test: EmpiricalRisk | None, budget: int | None) -> LinearOperator:
        """The inverse for one call: told of the test rows, and with right-hand sides to measure."""
        inform = getattr(self.prepared, "inform", None)
        if test is not None and inform is not None and inform(mean_gradient(test)):
            self.inverse = None
        inverse = self.solver()
        if hasattr(inverse, "budget"):
            inverse.budget = sys.maxsize if budget is None else budget
        return inverse

    def copied(self, damping: Damping | None = None) -> Fitted:
        """The same, with another λ if given. What it does leaves no trace in this one.

        Other test rows may be another start, and every solve goes into a certificate.
        """
        damping = self.damping if damping is None else damping
        return replace(self, prepared=copy.copy(self.prepared), damping=damping, inverse=None)

    def measure(self, test: EmpiricalRisk, budget: int | None) -> Certificate:
        """A certificate of the gradients of these rows alone."""
        other = self.copied()
        inverse = other.ready(test, budget)
        for _, gradients in gathered_gradients(test):
            _ = inverse @ gradients.T
        return other.certificate()

    def certificate(self) -> Certificate:
        """That of the inverse, with the slower ways that derivatives had to take."""
        if self.inverse is None and getattr(self.prepared, "waits", False):
            waiting = Certificate(self.method, self.damping, self.risk.p)
            waiting.note("nothing computed yet: the method begins with the test rows")
            return waiting
        certificate: Certificate = self.solver().certificate
        for note in self.risk.notes:
            certificate.note(note)
        return certificate

    def refined(self, described: str, rtol: float | None, max_steps: int) -> Fitted:
        """Conjugate gradients on all of C, with what is prepared as preconditioner."""
        # a copy: its test rows may be another start than those of this one
        own = copy.copy(self.prepared)
        prepared = CGFactors(
            self.operator, own, described=described, rtol=rtol, max_steps=max_steps
        )
        fitted = replace(self, prepared=prepared, inverse=None, method="cg")
        if not prepared.waits:
            fitted.solver()
        return fitted


def _prepare_factors(
    method: Recipe,
    operator: LinearOperator,
    choice: str | BlockChoice,
    factors: str | os.PathLike[str],
) -> Any:
    """Kronecker factors that are kept in a file."""
    if not isinstance(method, EKFAC | KFAC) or choice != "full":
        raise TypeError(
            "factors= keeps the factors of EKFAC and KFAC, with blocks='full'; this influence has "
            f"{method!r} and blocks={choice!r}. Leave factors= out"
        )
    return method.prepare(operator, factors=factors)


def _prepare(
    method: Recipe,
    operator: LinearOperator,
    risk: EmpiricalRisk,
    choice: str | BlockChoice,
    damping: Damping,
) -> Any:
    if choice == "full":
        return method.prepare(operator)
    blocks = parameter_blocks(risk.model, cast("BlockChoice", choice))
    if isinstance(damping, Mapping) and set(damping) != set(blocks):
        raise ValueError(
            f"expected one damping for each of the blocks {list(blocks)}; got {list(damping)}"
        )
    on_parameters: Any = getattr(operator, "on_parameters", None)
    if on_parameters is None:
        raise TypeError(
            f"blocks= needs a curvature that can be cut into them; got {operator!r}. Use "
            "curvature='ggn', 'hessian' or 'fisher'"
        )
    prepared: dict[str, Any] = {}
    for name, block in blocks.items():
        within = getattr(method, "within", None)
        own = method if within is None else within(len(block.entries))
        prepared[name] = own.prepare(on_parameters(block.parameters))
    return BlockFactors(operator, prepared, [block.entries for block in blocks.values()])
