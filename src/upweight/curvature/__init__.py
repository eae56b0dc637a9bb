"""Curvature of the mean training loss, as operators: exact, and by Kronecker factors."""

from upweight.curvature.exact import GGN, Fisher, Hessian
from upweight.curvature.inverted import KroneckerInverse
from upweight.curvature.kronecker import KroneckerCurvature

__all__ = ["GGN", "Fisher", "Hessian", "KroneckerCurvature", "KroneckerInverse"]
