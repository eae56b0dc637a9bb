"""Small models trained by the hundred, each on rows and from a seed of its own."""

from upweight.stacked.retraining import Output, Retraining

__all__ = ["Output", "Retraining"]
