"""Curvature of the mean training loss, as operators: exact products, and (dense) matrices."""

from upweight.curvature.exact import GGN, Fisher, Hessian

__all__ = ["GGN", "Fisher", "Hessian"]
