"""Can these scores be believed? From gradients and spectrum to a few retrainings."""

from upweight.trust.check import Check, check_influence
from upweight.trust.questions import Finding

__all__ = ["Check", "Finding", "check_influence"]
