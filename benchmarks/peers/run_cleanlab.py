"""Run cleanlab's Datalab on cases: features and given labels, some of which are wrong.

    .venv-peers/bin/python benchmarks/peers/run_cleanlab.py CASES.npz OUT.npz

The first file has ``<case>/x`` (n, d), ``<case>/y`` (n,) positions of classes; the second
``<case>/<method>/scores`` (n,), low = suspicious, and ``<case>/<method>/flags`` (n,), and
``versions``, a JSON. Methods:

- *features*: ``find_issues(features=x)``, which judges a row by its nearest neighbours.
- *probabilities*: ``find_issues(pred_probs=…)`` of a logistic regression on the same features,
  cross-validated in five folds, as cleanlab's own tutorial for tables does.

Both are held to the check for label errors; all other settings are the defaults.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from cleanlab import Datalab
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

FOLDS = 5


def label_issues(y: np.ndarray, **given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and flags of the check for label errors."""
    lab = Datalab({"label": y}, label_name="label", task="classification", verbosity=0)
    lab.find_issues(**given, issue_types={"label": {}})
    found = lab.get_issues("label")
    return found["label_score"].to_numpy(), found["is_label_issue"].to_numpy(dtype=bool)


def probabilities(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, C) of models that have not seen the row."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    model = LogisticRegression(max_iter=1000)
    return cross_val_predict(model, x, y, cv=folds, method="predict_proba")


def main() -> None:
    """Read, run and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    with np.load(options.cases, allow_pickle=False) as cases:
        for case in dict.fromkeys(key.rsplit("/", 1)[0] for key in cases.files):
            x, y = cases[f"{case}/x"].astype(np.float64), cases[f"{case}/y"]
            for method, given in {
                "features": {"features": x},
                "probabilities": {"pred_probs": probabilities(x, y)},
            }.items():
                scores, flags = label_issues(y, **given)
                found |= {f"{case}/{method}/scores": scores, f"{case}/{method}/flags": flags}
    names = ("cleanlab", "scikit-learn", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    np.savez_compressed(options.out, versions=np.array(json.dumps(versions)), **found)


if __name__ == "__main__":
    main()
