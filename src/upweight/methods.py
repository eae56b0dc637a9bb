"""`Influence`, the face of the library, and the recipes for the damped inverse.

A recipe is a small frozen dataclass: ``prepare(curvature)`` does everything that does not depend
on the damping, and ``.inverse(damping)`` of the result is the operator (C + λI)⁻¹.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from upweight.curvature import GGN, Fisher, Hessian
from upweight.influence import Mode, influence_blocks, mean_influence, self_influence
from upweight.inverse import Certificate, DirectFactors
from upweight.inverse.direct import check_damping
from upweight.operator import LinearOperator
from upweight.risk import EmpiricalRisk
from upweight.scores import SIGN, SIGN_PERTURBATION, RowScores, Scores, write_meta
from upweight.stream import ArraySink, ZarrSink, atomic_directory
from upweight.version import __version__

__all__ = ["Direct", "Influence"]


class Inverse(Protocol):
    """(C + λI)⁻¹ with a certificate."""

    certificate: Certificate

    def __matmul__(self, other: Tensor) -> Tensor:
        """(C + λI)⁻¹ @ other."""
        ...


class Prepared(Protocol):
    """What a recipe has computed for a curvature and any damping."""

    def inverse(self, damping: float) -> LinearOperator:
        """The operator (C + damping · I)⁻¹."""
        ...


class Recipe(Protocol):
    """A way to a damped inverse."""

    @property
    def name(self) -> str:
        """The short name, as in ``method="direct"``."""
        ...

    def prepare(self, curvature: LinearOperator) -> Prepared:
        """Everything that does not depend on the damping."""
        ...


@dataclass(frozen=True)
class Direct:
    """(C + λI)⁻¹ by factorisation: exact to round-off.

    Needs the p × p matrix in memory (or its n·o × n·o side where that is smaller), 8 bytes a
    number, and O(p³) operations: for networks up to some ten thousand parameters. A new damping
    costs one factorisation and no pass over the data.

    Examples
    --------
    >>> Direct()
    Direct()
    """

    @property
    def name(self) -> str:
        """``"direct"``."""
        return "direct"

    def prepare(self, curvature: LinearOperator) -> DirectFactors:
        """Form the matrix, or its smaller side."""
        return DirectFactors(curvature)


METHODS: dict[str, Callable[[], Recipe]] = {"direct": Direct}
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
        ``"direct"`` or a recipe such as ``Direct()``.
    curvature
        ``"ggn"`` (generalised Gauss-Newton, positive semi-definite), ``"hessian"``, ``"fisher"``
        (exact over the model's labels), or a function of an `EmpiricalRisk` that returns an
        operator.
    damping
        λ ≥ 0, in the units of C. May be set again after `fit`, which re-uses what was computed.
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
        damping: float,
        curvature: CurvatureChoice = "ggn",
        parameters: str | Sequence[str] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        target: Callable[[Any], Any] | None = None,
        features: Callable[[Any], Tensor] | None = None,
        batch_size: int | None = None,
    ) -> None:
        check_damping(damping)
        self.model = model
        self.loss = loss
        self.method = _choose(method, METHODS, "method")
        self.curvature = curvature if callable(curvature) else str(curvature)
        self._make_curvature = _choose_curvature(curvature)
        self._damping = float(damping)
        self._options: dict[str, Any] = {
            "parameters": parameters,
            "forward": forward,
            "target": target,
            "features": features,
            "batch_size": batch_size,
        }
        self._train: EmpiricalRisk | None = None
        self._prepared: Prepared | None = None
        self._inverse: LinearOperator | None = None
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
        prepared = self.method.prepare(operator)
        inverse = prepared.inverse(self._damping)
        # all at once, at the end: after an error what an earlier fit computed still fits together
        self._train, self._fingerprint = risk, fingerprint
        self._operator, self._prepared, self._inverse = operator, prepared, inverse
        return self

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
    def damping(self) -> float:
        """λ. Setting it after `fit` re-uses everything that does not depend on it."""
        return self._damping

    @damping.setter
    def damping(self, damping: float) -> None:
        check_damping(damping)
        if self._prepared is not None:
            self._inverse = self._prepared.inverse(float(damping))
        self._damping = float(damping)

    @property
    def inverse(self) -> LinearOperator:
        """(C + λI)⁻¹ as an operator, after `fit`."""
        return self._fitted()[0]

    @property
    def certificate(self) -> Certificate:
        """How exact the solves so far were: residuals, factorisation, negative eigenvalues."""
        inverse, train = self._fitted()
        certificate = cast(Inverse, inverse).certificate
        for note in train.notes:
            if note not in certificate.notes:
                certificate.notes.append(note)
        return certificate

    def scores(
        self,
        test: Any,
        train: Any = None,
        *,
        mode: Mode = "up",
        names: Sequence[Any] | None = None,
        to: str | os.PathLike[str] | None = None,
    ) -> Scores:
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

        Returns
        -------
        Scores
            ``values`` (m, n) or (m, n, ...x): a tensor, or a zarr array with `to`.
        """
        inverse, train_risk, test_risk = self._pair(test, train, names, mode)
        shape = (test_risk.n, train_risk.n)
        if mode == "perturbation":
            shape = (*shape, *train_risk.feature_shape())
        dtype = train_risk.dtype
        if to is None:
            sink = ArraySink(shape, dtype)
            self._fill(sink, inverse, train_risk, test_risk, mode)
            provenance = self._provenance(mode, train_risk, test_risk)
            return Scores(sink.finish(), test_risk.rows.names, train_risk.rows.names, provenance)
        with atomic_directory(to) as folder:
            self._fill(
                ZarrSink(folder / "values", shape, dtype), inverse, train_risk, test_risk, mode
            )
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
        inverse, train_risk, test_risk = self._pair(test, train, None, mode)
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
        inverse, fitted = self._fitted()
        risk = fitted if train is None else self.risk(train, what="training data")
        self._check_unchanged(risk)
        values = self_influence(inverse, risk).to("cpu", risk.dtype)
        provenance = {**self._provenance("self", risk, risk), "reduced": "self"}
        meaning = "large = the row's own loss rests on the row being in the training data"
        return RowScores(values, risk.rows.names, provenance, meaning)

    # --- inner parts
    # -------------------------------------------------------------------------------

    def _fitted(self) -> tuple[LinearOperator, EmpiricalRisk]:
        if self._inverse is None or self._train is None:
            raise RuntimeError("no curvature yet: call fit(train) first")
        return self._inverse, self._train

    def _pair(
        self, test: Any, train: Any, names: Sequence[Any] | None, mode: str
    ) -> tuple[LinearOperator, EmpiricalRisk, EmpiricalRisk]:
        if mode not in ("up", "perturbation"):
            raise ValueError(f"expected mode 'up' or 'perturbation'; got {mode!r}")
        inverse, fitted = self._fitted()
        self._check_unchanged(fitted)
        test_risk = self.risk(test, names=names, what="test data")
        train_risk = fitted if train is None else self.risk(train, what="training data")
        if mode == "perturbation":
            train_risk.feature_shape()
        return inverse, train_risk, test_risk

    def _check_unchanged(self, risk: EmpiricalRisk) -> None:
        if risk.model.fingerprint() != self._fingerprint:
            raise RuntimeError(
                "the model's parameters or buffers have changed since fit(): the curvature belongs "
                "to the old ones. Call fit(train) again"
            )

    def _fill(
        self,
        sink: ArraySink | ZarrSink,
        inverse: LinearOperator,
        train: EmpiricalRisk,
        test: EmpiricalRisk,
        mode: Mode,
    ) -> None:
        with tqdm(
            total=train.n * test.n, desc="scores", unit="pair", delay=2, disable=None, leave=False
        ) as bar:
            for rows, columns, block in influence_blocks(inverse, train, test, mode):
                sink.write(rows, columns, block)
                bar.update((rows.stop - rows.start) * (columns.stop - columns.start))

    def _provenance(self, mode: str, train: EmpiricalRisk, test: EmpiricalRisk) -> dict[str, Any]:
        return {
            "method": self.method.name,
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
        return f"<Influence: {self.method!r} on {curvature}, damping {self._damping:g}, {state}>"


def _choose(choice: str | Recipe, known: dict[str, Callable[[], Recipe]], what: str) -> Recipe:
    if isinstance(choice, str):
        if choice not in known:
            raise ValueError(f"expected {what} to be one of {sorted(known)}; got {choice!r}")
        return known[choice]()
    if isinstance(choice, type) or not hasattr(choice, "prepare"):
        raise TypeError(
            f"expected {what} to be a name or a recipe such as Direct(); got {choice!r}"
        )
    return choice


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
