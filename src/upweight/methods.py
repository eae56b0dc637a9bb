"""`Influence`, the face of the library: fit on training rows, score test rows."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from tqdm import tqdm

from upweight.blocks import Block, BlockChoice, parameter_blocks
from upweight.curvature import GGN, Fisher, Hessian
from upweight.influence import (
    Mode,
    gathered_gradients,
    influence_blocks,
    mean_influence,
    self_influence,
)
from upweight.inverse import BlockFactors, Certificate, CGFactors, check_damping
from upweight.operator import LinearOperator
from upweight.planning import Auto, Plan, make_plan
from upweight.recipes import CG, METHODS, Recipe, choose_recipe
from upweight.risk import EmpiricalRisk
from upweight.rows import Rows
from upweight.scores import SIGN, SIGN_PERTURBATION, RowScores, Scores, write_meta
from upweight.stream import ArraySink, ZarrSink, atomic_directory
from upweight.version import __version__

__all__ = ["Influence", "plan"]

# Right-hand sides of one call whose residual is measured where the method does not know it.
CERTIFIED = 8

CURVATURES: dict[str, Callable[[EmpiricalRisk], LinearOperator]] = {
    "ggn": GGN,
    "hessian": Hessian,
    "fisher": Fisher,
}
CurvatureChoice = Literal["ggn", "hessian", "fisher"] | Callable[[EmpiricalRisk], LinearOperator]


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
        damping: float | Mapping[str, float],
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
        self.method: Recipe = _choose(method)
        self.blocks = blocks
        self.certify = _check_certify(certify)
        self.curvature = curvature if callable(curvature) else str(curvature)
        self._make_curvature = _choose_curvature(curvature)
        self._damping = self._checked(damping)
        self._options: dict[str, Any] = {
            "parameters": parameters,
            "forward": forward,
            "target": target,
            "features": features,
            "batch_size": batch_size,
        }
        self._train: EmpiricalRisk | None = None
        self._prepared: Any = None
        self._inverse: Any = None
        self._operator: LinearOperator | None = None
        self._fingerprint = ""

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
        fingerprint = risk.model.fingerprint()
        operator = self._make_curvature(risk)
        prepared = self._prepare(operator, risk)
        waits = getattr(prepared, "waits", False)  # for the test rows
        inverse = None if waits else prepared.inverse(self._damping)
        # all at once, at the end: after an error what an earlier fit computed still fits together
        self._train, self._fingerprint = risk, fingerprint
        self._operator, self._prepared, self._inverse = operator, prepared, inverse
        return self

    def _prepare(self, operator: LinearOperator, risk: EmpiricalRisk) -> Any:
        if self.blocks == "full":
            return self.method.prepare(operator)
        blocks = parameter_blocks(risk.model, cast("BlockChoice", self.blocks))
        if isinstance(self._damping, Mapping) and set(self._damping) != set(blocks):
            raise ValueError(
                f"expected one damping for each of the blocks {list(blocks)}; got "
                f"{list(self._damping)}"
            )
        on_parameters: Any = getattr(operator, "on_parameters", None)
        if on_parameters is None:
            raise TypeError(
                f"blocks= needs a curvature that can be cut into them; got {operator!r}. Use "
                "curvature='ggn', 'hessian' or 'fisher'"
            )
        prepared = {
            name: self.method.prepare(on_parameters(block.parameters))
            for name, block in blocks.items()
        }
        return BlockFactors(operator, prepared, [b.entries for b in blocks.values()])

    def risk(
        self, data: Any, *, names: Sequence[Any] | None = None, what: str = "data"
    ) -> EmpiricalRisk:
        """The mean loss over some rows, with this model, loss and parameters."""
        with _telling(what):
            # Model and loss have been probed by fit(): rows of the same form need no second time.
            known = None if self._train is None else self._train.over(data, names)
            found = known or self._new_risk(data, names)
        if self._train is not None and found.model.names != self._train.model.names:
            raise RuntimeError(
                "other parameters have requires_grad than at fit(): the curvature is of other "
                "parameters than these gradients. Call fit(train) again"
            )
        return found

    def _new_risk(self, data: Any, names: Sequence[Any] | None) -> EmpiricalRisk:
        return EmpiricalRisk(self.model, self.loss, data, names=names, **self._options)

    @property
    def damping(self) -> float | Mapping[str, float]:
        """λ. Setting it after `fit` re-uses everything that does not depend on it."""
        return self._damping

    @damping.setter
    def damping(self, damping: float | Mapping[str, float]) -> None:
        damping = self._checked(damping)
        if self._inverse is not None:
            self._inverse = self._prepared.inverse(damping)
        self._damping = damping

    def _checked(self, damping: float | Mapping[str, float]) -> float | dict[str, float]:
        if isinstance(damping, Mapping):
            if self.blocks == "full":
                raise TypeError(
                    "expected one number for the damping λ; got one for every block. Say which: "
                    "blocks='layer'"
                )
            for value in damping.values():
                check_damping(value)
            return {name: float(value) for name, value in damping.items()}
        check_damping(damping)
        return float(damping)

    @property
    def inverse(self) -> LinearOperator:
        """(C + λI)⁻¹ as an operator, after `fit`."""
        return self._solver()

    @property
    def certificate(self) -> Certificate:
        """How exact the solves since `fit` were: residuals, steps, products, coverage, notes.

        Residuals are those of (C + λI) x = g for the exact curvature C, whatever the method.
        """
        certificate: Certificate = self._solver().certificate
        for note in self._trained().notes:
            certificate.note(note)
        return certificate

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
        self._ready(test_risk)
        inverse = self._prepared.inverse(self._damping)
        if hasattr(inverse, "budget"):
            inverse.budget = sys.maxsize if rows is None else rows
        for _, gradients in gathered_gradients(test_risk):
            _ = inverse @ gradients.T
        return inverse.certificate

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
        self._trained()
        assert self._operator is not None
        if isinstance(self._damping, Mapping):
            raise TypeError(
                "refine() solves (C + λI) x = g for one λ; this influence has one for every block. "
                "Set damping to one number first"
            )
        refined = copy.copy(self)
        refined.blocks = "full"
        refined.method = CG(preconditioner=self.method, rtol=rtol, max_steps=max_steps)
        refined._prepared = CGFactors(
            self._operator,
            self._prepared,
            described=f"{self.method!r}, as fitted",
            rtol=rtol,
            max_steps=max_steps,
        )
        refined._inverse = refined._prepared.inverse(self._damping)
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
            risk = self._trained()
        else:
            with _telling("training data"):
                risk = self._new_risk(train, None)
        rows = risk.n if test is None else test if isinstance(test, int) else len(Rows(test))
        methods: list[Recipe] = [make() for name, make in METHODS.items() if name != "jacobi"]
        methods.insert(2, CG(preconditioner="ekfac"))
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
        inverse = self._ready(test_risk)
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
        fitted = self._trained()
        risk = fitted if train is None else self.risk(train, what="training data")
        self._check_unchanged(risk)
        inverse = self._ready()
        values = self_influence(inverse, risk).to("cpu", risk.dtype)
        provenance = {**self._provenance("self", risk, risk), "reduced": "self"}
        meaning = "large = the row's own loss rests on the row being in the training data"
        return RowScores(values, risk.rows.names, provenance, meaning)

    # --- inner parts
    # -------------------------------------------------------------------------------

    def _trained(self) -> EmpiricalRisk:
        if self._train is None:
            raise RuntimeError("no curvature yet: call fit(train) first")
        return self._train

    def _solver(self) -> Any:
        """The inverse, made now if it waited for test rows until now."""
        self._trained()
        if self._inverse is None:
            self._inverse = self._prepared.inverse(self._damping)
        return self._inverse

    def _pair(
        self, test: Any, train: Any, names: Sequence[Any] | None, mode: str
    ) -> tuple[EmpiricalRisk, EmpiricalRisk]:
        if mode not in ("up", "perturbation"):
            raise ValueError(f"expected mode 'up' or 'perturbation'; got {mode!r}")
        fitted = self._trained()
        self._check_unchanged(fitted)
        test_risk = self.risk(test, names=names, what="test data")
        train_risk = fitted if train is None else self.risk(train, what="training data")
        if mode == "perturbation":
            train_risk.feature_shape()
        return train_risk, test_risk

    def _ready(self, test: EmpiricalRisk | None = None) -> LinearOperator:
        """The inverse for one call: told of the test rows, and with right-hand sides to measure."""
        inform = getattr(self._prepared, "inform", None)
        if test is not None and inform is not None and inform(test.gradient()):
            self._inverse = None
        inverse = self._solver()
        if hasattr(inverse, "budget"):
            inverse.budget = sys.maxsize if self.certify is None else self.certify
        return inverse

    def _check_unchanged(self, risk: EmpiricalRisk) -> None:
        if risk.model.fingerprint() != self._fingerprint:
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
        inverse = self._ready(test)
        parts = None if blocks is None else [block.entries for block in blocks]
        with tqdm(
            total=train.n * test.n, desc="scores", unit="pair", delay=2, disable=None, leave=False
        ) as bar:
            for rows, columns, found in influence_blocks(inverse, train, test, mode, parts):
                for sink, block in zip(sinks, found, strict=True):
                    sink.write(rows, columns, block)
                bar.update((rows.stop - rows.start) * (columns.stop - columns.start))

    def _provenance(self, mode: str, train: EmpiricalRisk, test: EmpiricalRisk) -> dict[str, Any]:
        return {
            "method": self.method.name,
            "recipe": repr(self.method),
            "blocks": self.blocks if isinstance(self.blocks, str) else dict(self.blocks),
            "curvature": getattr(self._operator, "name", type(self._operator).__name__),
            "damping": self._damping,
            "mode": mode,
            "train_rows": train.n,
            "test_rows": test.n,
            "parameters": train.p,
            "model": self._fingerprint,
            "certificate": self.certificate.to_dict(),
            "versions": {"upweight": __version__, "torch": torch.__version__},
        }

    def __repr__(self) -> str:
        state = "not fitted" if self._train is None else f"fitted on {self._train.n} rows"
        curvature = self.curvature if isinstance(self.curvature, str) else "own curvature"
        damping = f"{self._damping:g}" if isinstance(self._damping, float) else str(self._damping)
        return f"<Influence: {self.method!r} on {curvature}, damping {damping}, {state}>"


def _choose(choice: str | Recipe) -> Recipe:
    if isinstance(choice, str) and choice == "auto":
        return Auto()
    return choose_recipe(choice)


def _check_certify(certify: int | None) -> int | None:
    if certify is not None and (
        isinstance(certify, bool) or not isinstance(certify, int) or certify < 0
    ):
        raise ValueError(
            "expected certify to be how many right-hand sides are measured, at least 0, or None "
            f"for all; got {certify!r}"
        )
    return certify


def _choose_curvature(choice: CurvatureChoice) -> Callable[[EmpiricalRisk], LinearOperator]:
    if callable(choice):
        return choice
    if choice not in CURVATURES:
        raise ValueError(f"expected curvature to be one of {sorted(CURVATURES)}; got {choice!r}")
    return CURVATURES[choice]


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
