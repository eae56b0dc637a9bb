"""Scores of large models: what goes in and out of layers, contracted in the cheapest order.

Nothing here forms a vector of all parameters for a row.
"""

from upweight.layerwise.holding import Held, held_queries
from upweight.layerwise.scoring import (
    against_rows,
    blocks_of_parts,
    column_queries,
    factored_error,
    own_influence,
)
from upweight.layerwise.sides import LayerGradients, Sides

__all__ = [
    "Held",
    "LayerGradients",
    "Sides",
    "against_rows",
    "blocks_of_parts",
    "column_queries",
    "factored_error",
    "held_queries",
    "own_influence",
]
