"""Run traker, the reference implementation of TRAK, on a problem file (see `problems`, `common`).

Its fast projection needs CUDA, so this is its basic projector with normal entries, in single
precision as half is of no use to a CPU. A number after ``~`` is the dimension of the projection.
The output is the margin; scores are positive where the row helps, but their scale is lost. Its
ridge is added to a sum over rows, so the damping of the mean is multiplied by their number.
"""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from typing import Any

import torch
from common import Method, Problem, build_model, main, make_loader
from problems import State
from torch import Tensor

DIMENSIONS = (2048, 128, 512)  # the first is the default


def make_methods(problem: Problem, batch_size: int) -> dict[str, Method]:
    """Name the methods; the library is imported here, after warnings are silenced."""
    from trak import TRAKer

    ridge = problem.damped("lambda_reg", len(problem.x_train))

    def fit(states: tuple[State, ...], dimension: int) -> Any:
        folder = tempfile.TemporaryDirectory()
        traker = TRAKer(
            model=build_model(problem),
            task="image_classification",
            train_set_size=len(problem.x_train),
            save_dir=folder.name,
            device="cpu",
            proj_dim=dimension,
            use_half_precision=False,
            **ridge,
            logging_level=logging.ERROR,
        )
        for k, state in enumerate(states):
            traker.load_checkpoint(state, model_id=k)
            for batch in make_loader(problem.train, batch_size):
                traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
        return traker, states, folder

    def scores(fitted: Any) -> Tensor:
        traker, states, folder = fitted
        for k, state in enumerate(states):
            traker.start_scoring_checkpoint(
                "test", state, model_id=k, num_targets=len(problem.y_test)
            )
            for batch in make_loader(problem.test, batch_size):
                traker.score(batch=batch, num_samples=len(batch[0]))
        found = torch.tensor(traker.finalize_scores("test").T)
        folder.cleanup()
        return found

    def method(states: tuple[State, ...], dimension: int) -> Method:
        settings = {"proj_dim": dimension, "models": len(states), "use_half_precision": False}
        return Method(partial(fit, states, dimension), scores, settings | ridge)

    return {
        f"{name}~{dimension}": method(states, dimension)
        for name, states in problem.ensembles("trak").items()
        for dimension in DIMENSIONS
    }


if __name__ == "__main__":
    main("traker", make_methods, batch_size=0)
