"""Damped inverses (A + λI)⁻¹ of operators, as operators. Nothing here knows of data or models."""

from upweight.inverse.certificate import (
    Certificate,
    IndefiniteCurvatureWarning,
    ResidualWarning,
)
from upweight.inverse.direct import DirectFactors, DirectInverse

__all__ = [
    "Certificate",
    "DirectFactors",
    "DirectInverse",
    "IndefiniteCurvatureWarning",
    "ResidualWarning",
]
