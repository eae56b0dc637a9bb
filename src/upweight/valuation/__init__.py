"""Values of training rows from index sets and numbers alone: arrays in, arrays out, no model.

- ``knn``        rows judged by their nearest neighbours: exact KNN-Shapley, neighbours, votes
- ``oob``        rows judged by the trees of a forest that have not seen them: Data-OOB
- ``forests``    trees that are grown here, or those of a fitted forest, a few at a time
- ``judgement``  what neighbours say of rows, and would say of other labels
- ``selection``  the nearest of many rows, batch by batch
- ``order``      the smallest of many distances, in an order that nothing disturbs
- ``grid``       squared distances without rounding
- ``games``      the recursions for the values
"""

from upweight.valuation.judgement import KnnJudgement, knn_proba
from upweight.valuation.knn import knn_judge, knn_shapley, neighbours
from upweight.valuation.oob import OutOfBag, data_oob

__all__ = [
    "KnnJudgement",
    "OutOfBag",
    "data_oob",
    "knn_judge",
    "knn_proba",
    "knn_shapley",
    "neighbours",
]
