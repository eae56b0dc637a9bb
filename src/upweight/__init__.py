"""upweight: which training points made a trained model behave as it does, and which are wrong.

Where each formula lives:

- ``influence``   I[j, i] = g_test[j]ᵀ (C + λI)⁻¹ g_train[i]: sign, scale, modes, self-influence
- ``risk``        L(θ) = 1/n Σ_i ℓ_i(θ) and its derivatives row by row
- ``curvature``   C: Hessian, generalised Gauss-Newton, Fisher, Kronecker factors
- ``inverse``     (C + λI)⁻¹ by factorisation, iteration, eigenpairs; and its certificate
- ``operator``    matrices known by their products, and the algebra on them
- ``recipes``     which inverse to compute, and what it costs
- ``methods``     `Influence`, the face
- ``damping``     λ at which predictions agree with what can be observed
- ``prediction``  what becomes of test rows when groups of training rows are removed
- ``trust``       whether scores can be believed
- ``scorers``     scores without curvature, and averages over models
- ``evaluate``    scores against retraining: linear datamodeling score, detection, removal
- ``stacked``     many small models trained at once
- ``comparison``  methods side by side
- ``tables``      a table of any kind becomes numbers
- ``valuation``   what rows are worth: Shapley and its family, nearest neighbours, trees
- ``auditing``    suspicion of every row of a table, from which findings follow
- ``report``      `audit`, plots, the reports and the command line
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight.auditing.audit import Audit
    from upweight.auditing.estimator import LabelAudit
    from upweight.auditing.settings import AuditSettings
    from upweight.comparison import Comparison, compare
    from upweight.curvature import GGN, Fisher, Hessian, KroneckerCurvature
    from upweight.damping import DampingChoice
    from upweight.datasets import Split, flip_labels, load_wine
    from upweight.inverse import (
        Certificate,
        DivergenceError,
        IndefiniteCurvatureWarning,
        NegativeCurvatureError,
        ResidualWarning,
    )
    from upweight.layerwise import GradientStore
    from upweight.losses import TokenLoss
    from upweight.margins import margin
    from upweight.methods import Influence, plan
    from upweight.operator import LinearOperator
    from upweight.planning import Auto, Plan
    from upweight.prediction import Prediction
    from upweight.recipes import (
        CG,
        EKFAC,
        KFAC,
        Arnoldi,
        Direct,
        Jacobi,
        LiSSA,
        Nystroem,
    )
    from upweight.record import TrainingRecord
    from upweight.report.audit_run import audit
    from upweight.risk import EmpiricalRisk
    from upweight.rows import Rows
    from upweight.scorers import ensemble, grad_cos, grad_dot, relatif, tracin, trak
    from upweight.scores import RowScores, Scores
    from upweight.stacked import Retraining
    from upweight.training import MLP, History, train
    from upweight.trust import Check, Finding
    from upweight.version import __version__

_HOME = {
    # the face: fit on training rows, score test rows
    "Influence": "methods",
    "Scores": "scores",
    "RowScores": "scores",
    "GradientStore": "layerwise",
    # how the damped inverse is computed; any recipe can precondition CG
    "Direct": "recipes",
    "CG": "recipes",
    "LiSSA": "recipes",
    "Arnoldi": "recipes",
    "Nystroem": "recipes",
    "EKFAC": "recipes",
    "KFAC": "recipes",
    "Jacobi": "recipes",
    "Auto": "planning",
    # what it will cost, how exact it was, and how methods compare
    "plan": "methods",
    "Plan": "planning",
    "compare": "comparison",
    "Comparison": "comparison",
    "Certificate": "inverse",
    "IndefiniteCurvatureWarning": "inverse",
    "ResidualWarning": "inverse",
    "NegativeCurvatureError": "inverse",
    "DivergenceError": "inverse",
    # whether it is true: damping, predicted removals, retraining (and `upweight.evaluate`)
    "DampingChoice": "damping",
    "TrainingRecord": "record",
    "Prediction": "prediction",
    "Check": "trust",
    "Finding": "trust",
    "Retraining": "stacked",
    "TokenLoss": "losses",
    "margin": "margins",
    # scores without curvature, and averages over models
    "grad_dot": "scorers",
    "grad_cos": "scorers",
    "tracin": "scorers",
    "trak": "scorers",
    "relatif": "scorers",
    "ensemble": "scorers",
    # from a table to the rows that are wrong
    "audit": "report.audit_run",
    "Audit": "auditing.audit",
    "AuditSettings": "auditing.settings",
    "LabelAudit": "auditing.estimator",
    # what it is made of: the mean loss over rows, its curvature, operators
    "EmpiricalRisk": "risk",
    "Rows": "rows",
    "GGN": "curvature",
    "Hessian": "curvature",
    "Fisher": "curvature",
    "KroneckerCurvature": "curvature",
    "LinearOperator": "operator",
    # for examples: small data, small networks
    "load_wine": "datasets",
    "flip_labels": "datasets",
    "Split": "datasets",
    "MLP": "training",
    "train": "training",
    "History": "training",
    "__version__": "version",
}

__all__ = [
    "Influence",
    "Scores",
    "RowScores",
    "GradientStore",
    "Direct",
    "CG",
    "LiSSA",
    "Arnoldi",
    "Nystroem",
    "EKFAC",
    "KFAC",
    "Jacobi",
    "Auto",
    "plan",
    "Plan",
    "compare",
    "Comparison",
    "Certificate",
    "IndefiniteCurvatureWarning",
    "ResidualWarning",
    "NegativeCurvatureError",
    "DivergenceError",
    "DampingChoice",
    "TrainingRecord",
    "Prediction",
    "Check",
    "Finding",
    "Retraining",
    "TokenLoss",
    "margin",
    "grad_dot",
    "grad_cos",
    "tracin",
    "trak",
    "relatif",
    "ensemble",
    "audit",
    "Audit",
    "AuditSettings",
    "LabelAudit",
    "EmpiricalRisk",
    "Rows",
    "GGN",
    "Hessian",
    "Fisher",
    "KroneckerCurvature",
    "LinearOperator",
    "load_wine",
    "flip_labels",
    "Split",
    "MLP",
    "train",
    "History",
    "__version__",
]


# Importing torch takes seconds; `upweight --help` and an import for one name should not.
def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'upweight' has no attribute {name!r}")
    value = getattr(import_module(f"upweight.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
