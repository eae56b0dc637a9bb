"""Other ways to score the same rows, as `Scores` with the sign of `Influence`.

- ``gradients``   `grad_dot`, `grad_cos`, `tracin`: products of gradients, no curvature
- ``sketches``    `trak`: the influence on margins, in random projections, over several models
- ``relative``    `relatif`: influence relative to how far a row moves the whole model
- ``ensembles``   `ensemble`: the mean over several models, and how far they agree

``pairs`` multiplies gradients, ``projection`` draws random matrices, ``checkpoints`` loads weights,
``sides`` holds the rows.
"""

from upweight.scorers.ensembles import ensemble
from upweight.scorers.gradients import grad_cos, grad_dot, tracin
from upweight.scorers.relative import relatif
from upweight.scorers.sketches import trak

__all__ = ["ensemble", "grad_cos", "grad_dot", "relatif", "tracin", "trak"]
