"""`LabelAudit`: an audit of arrays, in the manner of scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, is_classifier, is_outlier_detector, is_regressor
from sklearn.utils.validation import check_scalar
from torch import nn

from upweight.auditing.crossvalidated import CrossValidated, skorch_net
from upweight.auditing.effects import Effects, row_effects
from upweight.auditing.inputs import Inputs, read_inputs
from upweight.auditing.judging import SUSPICIOUS, Judgement, Other, judge
from upweight.auditing.modules import OPTIONS, ModuleFit, ModuleJudge
from upweight.auditing.networks import CrossFit, Problem
from upweight.auditing.settings import AuditSettings
from upweight.auditing.steps import Steps
from upweight.tables import Task

__all__ = ["LabelAudit"]

LEAST = {"folds": 2, "networks": 1, "trees": 20, "neighbours": 1, "planted": 0, "seed": 0}


class LabelAudit(BaseEstimator):
    """Find the rows whose label, or number, is probably wrong.

    Every row is judged by models that have not seen it: a forest by the trees that have not drawn
    the row, its nearest rows, small networks trained without its fold, and, where one is given, an
    estimator or a network fitted without its fold. With p_j(c | x_i) what judge j says, ::

        suspicion_i = 1 − Σ_j w_j p_j(y_i | x_i),   w maximises Σ_i log Σ_j w_j p_j(y_i | x_i)

    over w ≥ 0, Σ_j w_j = 1. In regression ŷ_i = Σ_j w_j ŷ_ij with weights of least squares, and ::

        suspicion_i = P(|t| < |y_i − ŷ_i| / s_i)

    for Student's t with 4 degrees of freedom, s_i being the robust scale of the residuals of rows
    with similar ŷ.

    To see what a suspicion means, wrong labels are planted into the data and everything is judged
    again, by all judges: how suspicious the planted rows are tells the threshold above which a row
    is flagged, the share of wrong labels, and how many of the flagged rows are truly wrong.

    It has no ``predict``: rows are audited where they are, as `fit` gets them.

    Parameters
    ----------
    estimator
        A further judge. None: those that are built in alone. Or

        - a classifier or regressor in the manner of scikit-learn, such as a `Pipeline` or a net of
          skorch, which is cloned and gets the rows as they are given, frames included, and the
          labels as they are (a net of skorch: float32, and positions in `classes_`). Its
          ``predict_proba`` is used, or softmax(f / T) of its ``decision_function`` f, or
          ``predict`` with its error rate; temperature T and error rate explain the given labels of
          left-out rows best;
        - a `torch.nn.Module` from (b, d) float32 to logits (b, C) in the order of `classes_`, or to
          one number for a row in regression. It gets the columns with mean 0 and standard deviation
          1, and in regression is trained on (y − median) / (interquartile range / 1.349) by
          Huber's loss. Layers begin anew in every copy; give an untrained network. `influence_` is
          computed through it.
    task
        ``"classification"`` or ``"regression"``. None: that of the estimator; else classification
        unless y are numbers that have decimals, or integers of too many values (see `audit`).
    folds
        K of the cross-fitting.
    trees
        In the forest, at least 20.
    neighbours
        K of KNN-Shapley, which is not part of the suspicion.
    networks
        Networks per fold, from different initial weights; also of a given `torch.nn.Module`.
    planted
        How often wrong labels are planted, at most; 0 leaves out what they tell.
    influence
        Whether influences are computed, through the built-in networks if none is given.
    training
        Options by which a given `torch.nn.Module` is trained, as `Retraining` takes them:
        ``epochs``, ``optimizer``, ``scheduler``, ``batch_size``, ``memory``. By default AdamW with
        learning rate 0.01 and the weight decay of 0.1, 1 and 3 that has the lowest loss on left-out
        rows, a cosine schedule over the epochs, minibatches of n / 20 rows (from 16 to 256), and
        epochs for 800 steps (from 4 to 40).
    seed
        Of everything random, parameters ``random_state=None`` of the estimator included.

    Attributes
    ----------
    suspicion_ : ndarray of shape (n,)
        In [0, 1].
    label_flag_ : ndarray of shape (n,), bool
        Suspicion above the threshold, and in classification another label is more probable.
    proposed_ : ndarray of shape (n,)
        The most probable label, in the type of y; in regression ŷ.
    expected_precision_ : tuple of 3 floats, or None
        Expected share of truly wrong rows among the flagged: estimate, and an interval of 90 %.
        None where nothing was planted, or no more are flagged than look wrong in clean tables.
    noise_ : float or None
        Estimated share of wrong labels; None where nothing was planted, or planted labels look like
        any other.
    threshold_ : float
        0.9 where nothing was planted.
    judges_ : dict of str to ndarray
        Out-of-sample probabilities (n, C), or numbers (n,), of ``"forest"``, ``"network"``,
        ``"neighbours"`` and ``"estimator"``.
    weights_ : dict of str to float
        w_j.
    influence_, self_influence_ : ndarray of shape (n,)
        I_i on the mean loss of left-out rows, negative where the row raises it, and on its own
        loss, large where it was learnt by heart; by EK-FAC, not divided by n. Only with
        `influence` or a `torch.nn.Module`.
    classes_ : ndarray of shape (C,)
        Sorted labels; only in classification.
    task_ : str
        Classification or regression.
    n_features_in_ : int
        Columns of X.
    feature_names_in_ : ndarray
        Their names, if all are texts.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> X, y = load_iris(return_X_y=True)
    >>> y[3], y[96] = 2, 0
    >>> audit = LabelAudit(LogisticRegression(max_iter=1000), trees=100, networks=1).fit(X, y)
    >>> worst = np.sort(audit.suspicion_.argsort()[-2:])
    >>> worst, y[worst], audit.proposed_[worst]
    (array([ 3, 96]), array([2, 0]), array([0, 1]))
    """

    def __init__(
        self,
        estimator: Any = None,
        *,
        task: Task | None = None,
        folds: int = 5,
        trees: int = 300,
        neighbours: int = 5,
        networks: int = 2,
        planted: int = 3,
        influence: bool = False,
        training: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.estimator = estimator
        self.task: Task | None = task
        self.folds = folds
        self.trees = trees
        self.neighbours = neighbours
        self.networks = networks
        self.planted = planted
        self.influence = influence
        self.training = training
        self.seed = seed

    def fit(self, X: ArrayLike | Any, y: ArrayLike | None = None) -> Self:
        """Judge every row.

        Parameters
        ----------
        X
            (n, d) numbers, of which some may be missing (NaN), if the estimator can do without; or
            a frame of pandas or polars with columns of any kind.
        y
            (n,) labels of any type that can be sorted, or numbers.

        Returns
        -------
        LabelAudit

        Raises
        ------
        ValueError
            If parameters, rows or targets do not make sense, or the outputs of the estimator or
            network are not as described.
        TypeError
            If a parameter has the wrong type, or X is sparse.
        FloatingPointError
            If the training of a network diverges.
        """
        settings = self._settings()
        task = self._task()
        inputs = read_inputs(self, X, y, task, settings.seed)
        if 2 * settings.folds > len(inputs.y):
            raise ValueError(
                f"expected folds of two rows or more; got folds={self.folds} for "
                f"{len(inputs.y)} rows"
            )
        given = self._given(inputs, settings)
        others = {} if given is None else {"estimator": given.other}
        judged = judge(inputs.x, inputs.y, inputs.task, settings, Steps(), others=others)
        self._keep(inputs, judged)
        self._keep_influence(inputs, judged, given)
        return self

    def __sklearn_tags__(self) -> Any:
        """Targets are required, and numbers may be missing."""
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.allow_nan = True
        tags.input_tags.string = tags.input_tags.categorical = True
        return tags

    def _settings(self) -> AuditSettings:
        whole: dict[str, Any] = {
            name: int(check_scalar(getattr(self, name), name, Integral, min_val=least))
            for name, least in LEAST.items()
        }
        if self.task not in (None, "classification", "regression"):
            raise ValueError(
                f"expected the task 'classification', 'regression' or None; got {self.task!r}"
            )
        return AuditSettings("y", influence=bool(self.influence), **whole)

    def _task(self) -> Task | None:
        """What the estimator is for; None if nobody says."""
        estimator = self.estimator
        if self.training is not None:
            unknown = sorted(set(self.training) - set(OPTIONS))
            if not isinstance(estimator, nn.Module) or unknown:
                raise ValueError(
                    f"expected training with options of {', '.join(OPTIONS)} for a torch.nn.Module "
                    f"as the estimator; got {unknown or type(estimator).__name__}"
                )
        if estimator is None or isinstance(estimator, nn.Module):
            return self.task
        fits = all(hasattr(estimator, name) for name in ("fit", "predict", "get_params"))
        if isinstance(estimator, type) or not fits or is_outlier_detector(estimator):
            kind = f"the class {estimator.__name__}" if isinstance(estimator, type) else estimator
            raise TypeError(
                "expected a classifier or regressor of scikit-learn, a torch.nn.Module, or None; "
                f"got {kind!r}"
            )
        found: Task | None = "regression" if is_regressor(estimator) else None
        if is_classifier(estimator):
            found = "classification"
        if self.task is not None and found not in (None, self.task):
            raise ValueError(
                f"expected an estimator for {self.task}; {type(estimator).__name__} is for {found}"
            )
        return self.task or found

    def _given(self, inputs: Inputs, settings: AuditSettings) -> _Given | None:
        """The estimator, cross-fitted before the judges that cost more."""
        everyone, y, labels = np.arange(len(inputs.y)), inputs.y, inputs.labels
        if self.estimator is None:
            return None
        if isinstance(self.estimator, nn.Module):
            module = ModuleJudge(
                self.estimator,
                _standardised(inputs.numbers),
                inputs.task,
                None if labels is None else labels.order,
                settings.folds,
                self.training or {},
            )
            module, fit = module.decided(y, settings.seed, settings.networks)
            other = Other(module.by_class(fit.mean), module)
            return _Given(other, (module.problem(everyone, y), fit))
        named = None
        if labels is not None:
            positions = skorch_net(self.estimator) is not None
            named = labels.order if positions else labels.classes[labels.order]
        fold_by_fold = CrossValidated(
            self.estimator, inputs.raw, inputs.task, named, settings.folds
        )
        return _Given(Other(fold_by_fold(everyone, y, settings.seed), fold_by_fold))

    def _keep(self, inputs: Inputs, judged: Judgement) -> None:
        labels, blend, views = inputs.labels, judged.blend, judged.views
        self.task_ = inputs.task
        if labels is not None:
            self.classes_ = labels.classes
            views = {name: labels.by_name(view) for name, view in views.items()}
        self.judges_ = views
        self.weights_ = dict(zip(views, blend.weights.tolist(), strict=True))
        self.suspicion_ = judged.suspicion
        best = blend.prediction
        self.proposed_ = best if labels is None else labels.classes[labels.order][best.argmax(1)]
        calibration = judged.calibration() if len(judged.planted) else None
        self.threshold_ = SUSPICIOUS if calibration is None else calibration.threshold
        self.label_flag_ = judged.flags(calibration)
        self.noise_ = None if calibration is None else calibration.noise
        self.expected_precision_ = None if calibration is None else calibration.precision

    def _keep_influence(self, inputs: Inputs, judged: Judgement, given: _Given | None) -> None:
        found: Effects | None = None
        if given is not None and given.network is not None:
            found = row_effects(*given.network)
        elif self.influence:
            problem = Problem.of(inputs.x, inputs.y, inputs.task)
            found = row_effects(problem, CrossFit.of(judged.network))
        if found is not None:
            self.influence_, self.self_influence_ = found.influence, found.self_influence


@dataclass(frozen=True, eq=False)
class _Given:
    """What the user's estimator says; and the network, if it is one."""

    other: Other
    network: tuple[Problem, ModuleFit] | None = None


def _standardised(numbers: NDArray[Any] | None) -> torch.Tensor:
    """Columns of mean 0 and standard deviation 1, float32."""
    if numbers is None:
        raise ValueError(
            "expected columns of numbers for a torch.nn.Module; others need an estimator that "
            "takes them, such as a Pipeline that encodes them and ends with a net of skorch"
        )
    table = numbers.astype(np.float64)
    bad = np.flatnonzero(np.isnan(table).any(axis=1))
    if len(bad):
        raise ValueError(
            f"X is missing in {len(bad)} rows, the first is row {bad[0]}: a torch.nn.Module needs "
            "all numbers; impute them"
        )
    centred = table - table.mean(axis=0)
    spread = centred.std(axis=0)
    return torch.from_numpy((centred / np.where(spread > 0, spread, 1)).astype(np.float32))
