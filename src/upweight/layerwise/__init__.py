"""Scores of large models: what goes in and out of layers, contracted in the cheapest order.

Nothing here forms a vector of all parameters for a row.
"""

from upweight.layerwise.holding import Frames, Held, held_queries
from upweight.layerwise.planning import LayerPlan, plan_layers
from upweight.layerwise.scoring import (
    Source,
    against_rows,
    blocks_of_parts,
    column_queries,
    factored_error,
    own_influence,
)
from upweight.layerwise.sides import LayerGradients, Sides
from upweight.layerwise.store import GradientStore, Precision, write_gradients

__all__ = [
    "Frames",
    "GradientStore",
    "Held",
    "LayerGradients",
    "LayerPlan",
    "Precision",
    "Sides",
    "Source",
    "against_rows",
    "blocks_of_parts",
    "column_queries",
    "factored_error",
    "held_queries",
    "own_influence",
    "plan_layers",
    "write_gradients",
]
