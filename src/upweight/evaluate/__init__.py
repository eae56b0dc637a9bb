"""Is it true what scores claim of retraining? Arrays in, tables out; nothing here knows a model.

All that is asked of one is a function ``refit(rows, seed) -> outputs`` (m,): see `retrain`.

- ``subsets``    masks of training rows: random halves, leave-k-out
- ``retrain``    every subset × seed, in groups or side by side, kept on disk as they finish
- ``truth``      what leaving out rows, or groups of them, does
- ``lds``        the linear datamodeling score, and that of exact effects of single rows
- ``noise``      what the seeds of training leave to predict
- ``detection``  do low scores find the rows that are known to be wrong?
- ``removal``    outputs as rows go or come by score; how many rows it takes to flip a prediction
"""

from upweight.evaluate.detection import Detection, detection
from upweight.evaluate.lds import (
    LinearDatamodelingScore,
    additive_ceiling,
    lds,
    linear_datamodeling_score,
    prediction_score,
)
from upweight.evaluate.noise import NoiseCeiling, noise_ceiling
from upweight.evaluate.removal import brittleness, removal_curve
from upweight.evaluate.retrain import (
    Protocol,
    Refit,
    Retrained,
    RetrainingWarning,
    RetrainOptions,
    retrain,
)
from upweight.evaluate.subsets import check_masks, leave_out, random_subsets
from upweight.evaluate.truth import actual_effects, leave_one_out

__all__ = [
    "Detection",
    "LinearDatamodelingScore",
    "NoiseCeiling",
    "Protocol",
    "Refit",
    "RetrainOptions",
    "Retrained",
    "RetrainingWarning",
    "actual_effects",
    "additive_ceiling",
    "brittleness",
    "check_masks",
    "detection",
    "lds",
    "leave_one_out",
    "leave_out",
    "linear_datamodeling_score",
    "noise_ceiling",
    "prediction_score",
    "random_subsets",
    "removal_curve",
    "retrain",
]
