"""Values of training rows, from index sets and numbers alone: no model of PyTorch is seen here.

How much is a row worth? Asked of a *utility*, a set of rows → a number:

- ``utility``      `Utility`; `FunctionUtility` of any function
- ``model_utility``  `ModelUtility`: the score on other rows of an estimator trained on the set
- ``ridge_utility``, ``knn_utility``, ``refit_utility``  utilities that are fast: in closed form,
  by neighbours, by many networks trained at once
- ``grouped``      groups of rows in place of rows
- ``semivalues``   `shapley`, `banzhaf`, `beta_shapley`: one function a name
- ``least_core``, ``classwise``  the least core; Shapley's value class by class
- ``sampling``     which orders are asked for; ``subsets``: which sets
- ``engine``, ``cache``  evaluating them side by side, and never twice
- ``laws``, ``readouts``, ``regressions``  from samples to values and errors: linear algebra
- ``stopping``     when it is enough
- ``values``       `Values`, what all of them return

Or of nearest neighbours and trees, in closed form:

- ``knn``        rows judged by their nearest neighbours: exact KNN-Shapley, neighbours, votes
- ``oob``        rows judged by the trees of a forest that have not seen them: Data-OOB
- ``forests``    trees that are grown here, or those of a fitted forest, a few at a time
- ``judgement``  what neighbours say of rows, and would say of other labels
- ``selection``  the nearest of many rows, batch by batch
- ``order``      the smallest of many distances, in an order that nothing disturbs
- ``grid``       squared distances without rounding
- ``games``      the recursions for the values
"""

from upweight.valuation.cache import CacheWarning, UtilityCache
from upweight.valuation.classwise import class_wise_shapley
from upweight.valuation.drawing import Sampler
from upweight.valuation.grouped import GroupedUtility
from upweight.valuation.judgement import KnnJudgement, knn_proba
from upweight.valuation.knn import knn_judge, knn_shapley, neighbours
from upweight.valuation.knn_utility import KnnUtility
from upweight.valuation.least_core import least_core
from upweight.valuation.leaving_out import leave_one_out
from upweight.valuation.model_utility import ModelUtility
from upweight.valuation.oob import OutOfBag, data_oob, oob_judge
from upweight.valuation.refit_utility import RefitUtility
from upweight.valuation.ridge_utility import RidgeUtility
from upweight.valuation.sampling import Permutations, Stratified
from upweight.valuation.semivalues import (
    banzhaf,
    beta_shapley,
    delta_shapley,
    semivalue,
    shapley,
)
from upweight.valuation.stopping import (
    Evaluations,
    Minutes,
    RankStability,
    StandardError,
    Stopping,
)
from upweight.valuation.subsets import (
    BernoulliSubsets,
    EverySubset,
    KernelSubsets,
    OwenSubsets,
    WeightedSubsets,
)
from upweight.valuation.telling import ValueWarning
from upweight.valuation.utility import FunctionUtility, Utility, UtilityError
from upweight.valuation.values import Values

__all__ = [
    "BernoulliSubsets",
    "CacheWarning",
    "Evaluations",
    "EverySubset",
    "FunctionUtility",
    "GroupedUtility",
    "KernelSubsets",
    "KnnJudgement",
    "KnnUtility",
    "Minutes",
    "ModelUtility",
    "OutOfBag",
    "OwenSubsets",
    "Permutations",
    "RankStability",
    "RefitUtility",
    "RidgeUtility",
    "Sampler",
    "StandardError",
    "Stopping",
    "Stratified",
    "Utility",
    "UtilityCache",
    "UtilityError",
    "ValueWarning",
    "Values",
    "WeightedSubsets",
    "banzhaf",
    "beta_shapley",
    "class_wise_shapley",
    "data_oob",
    "delta_shapley",
    "knn_judge",
    "knn_proba",
    "knn_shapley",
    "least_core",
    "leave_one_out",
    "neighbours",
    "oob_judge",
    "semivalue",
    "shapley",
]
