"""Damped inverses (A + λI)⁻¹ of operators, as operators. Nothing here knows of data or models."""

from upweight.inverse.approximate import ApproximateInverse, Prepared
from upweight.inverse.blocks import BlockFactors
from upweight.inverse.certificate import (
    Certificate,
    DivergenceError,
    IndefiniteCurvatureWarning,
    NegativeCurvatureError,
    ResidualWarning,
    check_damping,
)
from upweight.inverse.cg import CGFactors, CGInverse, conjugate_gradients
from upweight.inverse.direct import DirectFactors, DirectInverse
from upweight.inverse.jacobi import JacobiFactors
from upweight.inverse.lissa import LissaFactors, LissaInverse, Part
from upweight.inverse.lowrank import LanczosFactors, NystroemFactors

__all__ = [
    "ApproximateInverse",
    "BlockFactors",
    "CGFactors",
    "CGInverse",
    "Certificate",
    "DirectFactors",
    "DirectInverse",
    "DivergenceError",
    "IndefiniteCurvatureWarning",
    "JacobiFactors",
    "LanczosFactors",
    "LissaFactors",
    "LissaInverse",
    "NegativeCurvatureError",
    "NystroemFactors",
    "Part",
    "Prepared",
    "ResidualWarning",
    "check_damping",
    "conjugate_gradients",
]
