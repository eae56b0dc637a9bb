"""Language models of Hugging Face: rows of tokens, models from folders, scores of tokens.

What needs the packages of the extra ``hf`` imports them when it runs.
"""

from upweight.language.attribution import check_rows, influence_for, token_scores
from upweight.language.data import read_rows
from upweight.language.doctor import Finding, examine
from upweight.language.model import Loaded, default_parameters, load_model
from upweight.language.tokens import TokenRows

__all__ = [
    "Finding",
    "Loaded",
    "TokenRows",
    "check_rows",
    "default_parameters",
    "examine",
    "influence_for",
    "load_model",
    "read_rows",
    "token_scores",
]
