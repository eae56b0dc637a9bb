"""`Influence`, the face of the library: fit on training rows, score test rows."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from tqdm import tqdm

from upweight.blocks import Block, BlockChoice, parameter_blocks
from upweight.choices import (
    CurvatureChoice,
    check_blocks,
    check_certify,
    check_dampings,
    choose_curvature,
    choose_method,
)
from upweight.fitted import Damping, Fitted
from upweight.influence import Mode, influence_blocks, mean_influence, self_influence
from upweight.inverse import Certificate
from upweight.operator import LinearOperator
from upweight.planning import Auto, Plan, make_plan
from upweight.recipes import CG, METHODS, Nystroem, Recipe
from upweight.risk import EmpiricalRisk
from upweight.rows import Rows
from upweight.scores import SIGN, SIGN_PERTURBATION, RowScores, Scores, write_meta
from upweight.stream import ArraySink, ZarrSink, atomic_directory
from upweight.version import __version__

__all__ = ["Influence", "plan"]

# Right-hand sides of one call whose residual is measured where the method does not know it.
CERTIFIED = 8


class Influence:
    """Influence of training rows on a trained model's test losses.

        I[j, i] = g_test[j]ᵀ (C + λI)⁻¹ g_train[i]

    with g the gradients of single losses, C the curvature of the mean training loss at the model's
    parameters, λ the damping. Positive = training row i helps test row j: up-weighting it lowers
    the test loss. There is no 1/n and no minus sign: leaving row i out of n raises the loss of
    test row j by about I[j, i] / n.

    Parameters
    ----------
    model
        A trained `torch.nn.Module`; used in evaluation mode, never changed.
    loss
        ``loss(output, target) → Tensor``, with any reduction over rows.
    method
        A recipe such as ``CG(preconditioner=EKFAC())``, or the name of one with its defaults:
        ``"direct"``, ``"cg"``, ``"lissa"``, ``"arnoldi"``, ``"nystroem"``, ``"ekfac"``, ``"kfac"``;
        ``"auto"`` takes the exact one that this model allows (see `plan`).
    curvature
        ``"ggn"`` (generalised Gauss-Newton, positive semi-definite), ``"hessian"``, ``"fisher"``
        (exact over the model's labels), or a function of an `EmpiricalRisk` that returns an
        operator.
    damping
        λ ≥ 0, in the units of C; with `blocks`, one number or one for every block by name. May be
        set again after `fit`, which re-uses what was computed.
    blocks
        ``"full"``, or which parameters are a block of their own: ``"layer"``, ``"parameter"``, or
        groups ``{"body": "body.*", "head": "head.*"}``. Between blocks C is taken as zero; the
        residuals of the certificate, against all of C, say what that costs.
    certify
        For how many right-hand sides of every call an approximate method measures its residual
        against the exact curvature, at one product with it each; None for all. Exact methods
        always know theirs.
    parameters
        Name patterns of the parameters to differentiate by; default: all with ``requires_grad``.
    forward, target, features
        How to use a batch that is not ``(x, y)``; see `EmpiricalRisk`.
    batch_size
        At most so many rows at once; default: as memory allows. Never changes a result.

    References
    ----------
    P. W. Koh, P. Liang, *Understanding black-box predictions via influence functions*, ICML 2017,
    §2.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.5], [0.0]])
    >>> influence = Influence(model, torch.nn.functional.mse_loss, damping=0.0).fit((x, y))
    >>> influence.scores((torch.tensor([[1.0]]), torch.tensor([[1.5]]))).values
    tensor([[ 0.5000, -1.0000]])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        method: str | Recipe = "direct",
        *,
        damping: Damping,
        curvature: CurvatureChoice = "ggn",
        blocks: Literal["full"] | BlockChoice = "full",
        certify: int | None = CERTIFIED,
        parameters: str | Sequence[str] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        target: Callable[[Any], Any] | None = None,
        features: Callable[[Any], Tensor] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.method: Recipe = choose_method(method)
        self.blocks = check_blocks(blocks)
        self.certify = check_certify(certify)
        self.curvature = curvature if callable(curvature) else str(curvature)
        self._make_curvature = choose_curvature(curvature)
        self._damping = check_dampings(damping, self.blocks)
        self._options: dict[str, Any] = {
            "parameters": parameters,
            "forward": forward,
            "target": target,
            "features": features,
            "batch_size": batch_size,
        }
        self._fit: Fitted | None = None

    def fit(self, train: Any, *, names: Sequence[Any] | None = None) -> Influence:
        """Compute the curvature of the mean loss over the training rows, and prepare its inverse.

        Parameters
        ----------
        train
            The rows that the model was trained on, as one argument: ``(x, y)``, a map-style data
            set, or a `DataLoader`, of which all rows are taken in the order of its data set.
        names
            One name per row; default: a pandas index, else positions.

        Returns
        -------
        Influence
            Itself.
        """
        with _telling("training data"):
            risk = self._new_risk(train, names)
        operator = self._make_curvature(risk)
        # all at once, at the end: after an error what an earlier fit computed still fits together
        self._fit = Fitted.of(risk, operator, self.method, self.blocks, self._damping)
        return self

    def risk(
        self, data: Any, *, names: Sequence[Any] | None = None, what: str = "data"
    ) -> EmpiricalRisk:
        """The mean loss over some rows, with this model, loss and parameters."""
        with _telling(what):
            # Model and loss have been probed by fit(): rows of the same form need no second time.
            known = None if self._fit is None else self._fit.risk.over(data, names)
            found = known or self._new_risk(data, names)
        if self._fit is not None and found.model.names != self._fit.risk.model.names:
            raise RuntimeError(
                "other parameters have requires_grad than at fit(): the curvature is of other "
                "parameters than these gradients. Call fit(train) again"
            )
        return found

    def _new_risk(self, data: Any, names: Sequence[Any] | None) -> EmpiricalRisk:
        return EmpiricalRisk(self.model, self.loss, data, names=names, **self._options)

    @property
    def damping(self) -> Damping:
        """λ. Setting it after `fit` re-uses everything that does not depend on it."""
        return self._damping

    @damping.setter
    def damping(self, damping: Damping) -> None:
        damping = check_dampings(damping, self.blocks)
        if self._fit is not None:
            self._fit.set_damping(damping)
        self._damping = damping

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
        fitted = self._fitted()
        test_risk = self.risk(test, what="test data")
        self._check_unchanged(test_risk)
        return fitted.measure(test_risk, rows)

    def refine(self, rtol: float | None = None, *, max_steps: int = 1000) -> Influence:
        """Exact scores from an approximate method: conjugate gradients with it as preconditioner.

        Nothing that `fit` has computed is computed again; the fitted influence stays as it is.

        Parameters
        ----------
        rtol
            The relative residual to stop at; default 1e-5 in float32, 1e-8 in float64.
        max_steps
            At most so many steps for each right-hand side.

        Returns
        -------
        Influence
            Fitted, with all of C even where this one takes it in blocks.
        """
        fitted = self._fitted()
        if isinstance(self._damping, Mapping):
            raise TypeError(
                "refine() solves (C + λI) x = g for one λ; this influence has one for every block. "
                "Set damping to one number first"
            )
        if getattr(self.method, "relative", None) is not None:
            raise TypeError(
                "refine() solves (C + λI) x = g for one λ; this method damps every layer relative "
                "to its eigenvalues. Use relative=None"
            )
        refined = copy.copy(self)
        refined.blocks = "full"
        refined.method = CG(preconditioner=self.method, rtol=rtol, max_steps=max_steps)
        refined._fit = fitted.refined(f"{self.method!r}, as fitted", rtol, max_steps)
        return refined

    def plan(self, train: Any = None, test: Any = None) -> Plan:
        """Memory, curvature products and time of every method, before any of them runs.

        Parameters
        ----------
        train
            The training rows; default: those of `fit`, if there were any.
        test
            The test rows, or how many there will be; default: as many as training rows.

        Returns
        -------
        Plan
            Print it. ``proposal`` is the recipe that ``method="auto"`` takes.
        """
        if train is None:
            risk = self._fitted().risk
        else:
            with _telling("training data"):
                risk = self._new_risk(train, None)
        rows = risk.n if test is None else test if isinstance(test, int) else len(Rows(test))
        methods: list[Recipe] = [make() for name, make in METHODS.items() if name != "jacobi"]
        methods.insert(2, CG(preconditioner=Nystroem(rank=50)))
        if self.method not in methods and not isinstance(self.method, Auto):
            methods.insert(0, self.method)
        damping = self._damping
        lowest = min(damping.values()) if isinstance(damping, Mapping) else damping
        return make_plan(self._make_curvature(risk), methods, lowest, rows)

    @overload
    def scores(
        self,
        test: Any,
        train: Any = None,
        *,
        mode: Mode = "up",
        names: Sequence[Any] | None = None,
        to: str | os.PathLike[str] | None = None,
        by: None = None,
    ) -> Scores: ...

    @overload
    def scores(
        self,
        test: Any,
        train: Any = None,
        *,
        mode: Mode = "up",
        names: Sequence[Any] | None = None,
        by: BlockChoice,
    ) -> dict[str, Scores]: ...

    def scores(
        self,
        test: Any,
        train: Any = None,
        *,
        mode: Mode = "up",
        names: Sequence[Any] | None = None,
        to: str | os.PathLike[str] | None = None,
        by: BlockChoice | None = None,
    ) -> Scores | dict[str, Scores]:
        """The influence of every training row on every test row.

        Parameters
        ----------
        test
            m test rows, in any form that `fit` takes.
        train
            Rows to score; default: those of `fit`.
        mode
            ``"up"``: one number per pair. ``"perturbation"``: its derivative by the features of the
            training row, (m, n, ...x).
        names
            One name per test row.
        to
            A directory to write to, block by block, so that memory does not grow with n. It appears
            when it is complete.
        by
            ``"layer"``, ``"parameter"`` or groups of parameters as in `blocks`: what each of them
            contributes to the scores, which are the sum. With ``blocks`` of the same choice these
            are the influences through each block alone.

        Returns
        -------
        Scores
            ``values`` (m, n) or (m, n, ...x): a tensor, or a zarr array with `to`. With `by`, one
            for every block by name.
        """
        train_risk, test_risk = self._pair(test, train, names, mode)
        shape = (test_risk.n, train_risk.n)
        if mode == "perturbation":
            shape = (*shape, *train_risk.feature_shape())
        dtype = train_risk.dtype
        if by is not None:
            if to is not None:
                raise ValueError("scores by block are kept in memory: leave out to=")
            blocks = parameter_blocks(train_risk.model, by)
            sinks = [ArraySink(shape, dtype) for _ in blocks]
            self._fill(sinks, train_risk, test_risk, mode, list(blocks.values()))
            provenance = self._provenance(mode, train_risk, test_risk)
            found = zip(blocks, [sink.finish() for sink in sinks], strict=True)
            names_of = test_risk.rows.names, train_risk.rows.names
            return {name: Scores(v, *names_of, {**provenance, "block": name}) for name, v in found}
        if to is None:
            sink = ArraySink(shape, dtype)
            self._fill([sink], train_risk, test_risk, mode)
            provenance = self._provenance(mode, train_risk, test_risk)
            return Scores(sink.finish(), test_risk.rows.names, train_risk.rows.names, provenance)
        with atomic_directory(to) as folder:
            zarr = ZarrSink(folder / "values", shape, dtype)
            self._fill([zarr], train_risk, test_risk, mode)
            provenance = self._provenance(mode, train_risk, test_risk)
            write_meta(folder, test_risk.rows.names, train_risk.rows.names, provenance)
        return Scores.load(to)

    def mean_scores(
        self,
        test: Any,
        train: Any = None,
        *,
        mode: Mode = "up",
    ) -> RowScores:
        """The mean influence of every training row over the test rows, by one solve.

        Equal to ``scores(test).mean()`` to round-off, whatever the number of test rows:
        1/m Σ_j I[j, i] = (1/m Σ_j g_test[j])ᵀ (C + λI)⁻¹ g_train[i].
        """
        train_risk, test_risk = self._pair(test, train, None, mode)
        inverse = self._fitted().ready(test_risk, self.certify)
        values = mean_influence(inverse, train_risk, test_risk, mode)
        provenance = {**self._provenance(mode, train_risk, test_risk), "reduced": "mean"}
        meaning = SIGN if mode == "up" else SIGN_PERTURBATION
        return RowScores(
            values.to("cpu", train_risk.dtype), train_risk.rows.names, provenance, meaning
        )

    def self_influence(self, train: Any = None) -> RowScores:
        """g_iᵀ (C + λI)⁻¹ g_i: how much each row's own loss rests on the row being there.

        Large for rows that the model had to learn by heart: outliers and wrong labels.
        """
        fitted = self._fitted().risk
        risk = fitted if train is None else self.risk(train, what="training data")
        self._check_unchanged(risk)
        inverse = self._fitted().ready(None, self.certify)
        values = self_influence(inverse, risk).to("cpu", risk.dtype)
        provenance = {**self._provenance("self", risk, risk), "reduced": "self"}
        meaning = "large = the row's own loss rests on the row being in the training data"
        return RowScores(values, risk.rows.names, provenance, meaning)

    # --- inner parts
    # -------------------------------------------------------------------------------

    def _fitted(self) -> Fitted:
        if self._fit is None:
            raise RuntimeError("no curvature yet: call fit(train) first")
        return self._fit

    def _pair(
        self, test: Any, train: Any, names: Sequence[Any] | None, mode: str
    ) -> tuple[EmpiricalRisk, EmpiricalRisk]:
        if mode not in ("up", "perturbation"):
            raise ValueError(f"expected mode 'up' or 'perturbation'; got {mode!r}")
        fitted = self._fitted().risk
        self._check_unchanged(fitted)
        test_risk = self.risk(test, names=names, what="test data")
        train_risk = fitted if train is None else self.risk(train, what="training data")
        if mode == "perturbation":
            train_risk.feature_shape()
        return train_risk, test_risk

    def _check_unchanged(self, risk: EmpiricalRisk) -> None:
        if risk.model.fingerprint() != self._fitted().fingerprint:
            raise RuntimeError(
                "the model's parameters or buffers have changed since fit(): the curvature belongs "
                "to the old ones. Call fit(train) again"
            )

    def _fill(
        self,
        sinks: Sequence[ArraySink | ZarrSink],
        train: EmpiricalRisk,
        test: EmpiricalRisk,
        mode: Mode,
        blocks: Sequence[Block] | None = None,
    ) -> None:
        inverse = self._fitted().ready(test, self.certify)
        parts = None if blocks is None else [block.entries for block in blocks]
        total = train.n * test.n * len(sinks)
        with tqdm(
            total=total, desc="scores", unit="pair", delay=2, disable=None, leave=False
        ) as bar:
            for rows, columns, at, block in influence_blocks(inverse, train, test, mode, parts):
                sinks[at].write(rows, columns, block)
                bar.update((rows.stop - rows.start) * (columns.stop - columns.start))

    def _provenance(self, mode: str, train: EmpiricalRisk, test: EmpiricalRisk) -> dict[str, Any]:
        fitted = self._fitted()
        return {
            "method": self.method.name,
            "recipe": repr(self.method),
            "blocks": self.blocks if isinstance(self.blocks, str) else dict(self.blocks),
            "curvature": getattr(fitted.operator, "name", type(fitted.operator).__name__),
            "damping": self._damping,
            "mode": mode,
            "train_rows": train.n,
            "test_rows": test.n,
            "parameters": train.p,
            "model": fitted.fingerprint,
            "certificate": self.certificate.to_dict(),
            "versions": {"upweight": __version__, "torch": torch.__version__},
        }

    def __repr__(self) -> str:
        state = "not fitted" if self._fit is None else f"fitted on {self._fit.risk.n} rows"
        curvature = self.curvature if isinstance(self.curvature, str) else "own curvature"
        damping = f"{self._damping:g}" if isinstance(self._damping, float) else str(self._damping)
        return f"<Influence: {self.method!r} on {curvature}, damping {damping}, {state}>"


@contextmanager
def _telling(what: str) -> Generator[None]:
    """Put the name of the data in front of an error about it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        # not type(error): a UnicodeDecodeError, say, is not made of one text
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what}: {error}") from error


def plan(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    train: Any,
    test: Any = None,
    *,
    damping: float,
    **options: Any,
) -> Plan:
    """Memory, curvature products and time of every method on this model and these rows.

    Parameters
    ----------
    model, loss, train
        As for `Influence`.
    test
        The test rows, or how many there will be; default: as many as training rows.
    damping
        λ.
    **options
        More for `Influence`: ``curvature``, ``method``, ``parameters``, …

    Examples
    --------
    >>> x, y = torch.randn(20, 3), torch.randint(2, (20,))
    >>> found = plan(nn.Linear(3, 2), nn.functional.cross_entropy, (x, y), test=5, damping=0.1)
    >>> found.proposal
    Direct()
    """
    return Influence(model, loss, damping=damping, **options).plan(train, test)
