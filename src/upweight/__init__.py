"""upweight: which training points made a trained model behave as it does, and which are wrong.

Where each formula lives:

- ``influence``   I[j, i] = g_test[j]ᵀ (C + λI)⁻¹ g_train[i]: sign, scale, modes, self-influence
- ``risk``        L(θ) = 1/n Σ_i ℓ_i(θ) and its derivatives row by row
- ``curvature``   C: Hessian, generalised Gauss-Newton, Fisher
- ``inverse``     (C + λI)⁻¹ and its certificate
- ``operator``    matrices known by their products, and the algebra on them
- ``methods``     `Influence`, the face, and its recipes
- ``audit``       plots, the report and the command line
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight.curvature import GGN, Fisher, Hessian
    from upweight.datasets import Split, flip_labels, load_wine
    from upweight.inverse import Certificate, IndefiniteCurvatureWarning, ResidualWarning
    from upweight.methods import Direct, Influence
    from upweight.operator import LinearOperator
    from upweight.risk import EmpiricalRisk
    from upweight.rows import Rows
    from upweight.scores import RowScores, Scores
    from upweight.training import MLP, History, train
    from upweight.version import __version__

_HOME = {
    # the face: fit on training rows, score test rows
    "Influence": "methods",
    "Direct": "methods",
    "Scores": "scores",
    "RowScores": "scores",
    "Certificate": "inverse",
    "IndefiniteCurvatureWarning": "inverse",
    "ResidualWarning": "inverse",
    # what it is made of: the mean loss over rows, its curvature, operators
    "EmpiricalRisk": "risk",
    "Rows": "rows",
    "GGN": "curvature",
    "Hessian": "curvature",
    "Fisher": "curvature",
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
    "Direct",
    "Scores",
    "RowScores",
    "Certificate",
    "IndefiniteCurvatureWarning",
    "ResidualWarning",
    "EmpiricalRisk",
    "Rows",
    "GGN",
    "Hessian",
    "Fisher",
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
