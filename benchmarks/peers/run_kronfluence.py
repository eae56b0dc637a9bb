"""Run kronfluence on a problem file (see `problems` and `common`).

The task is that of its own classification examples: labels sampled from the model's outputs for the
Fisher, the sum of the cross-entropy over the batch as loss and as measurement. Without a damping
its heuristic is taken, a tenth of the mean eigenvalue of each layer. Its scores have our sign,
positive where the row helps, and our scale.
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from common import Method, Problem, build_model, main
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

STRATEGIES = ("ekfac", "kfac", "diagonal", "identity")


def _task() -> Any:
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, labels = batch
            logits = model(inputs)
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.softmax(-1), 1).flatten()
            return cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    return Classification()


def make_methods(problem: Problem, batch_size: int) -> dict[str, Method]:
    """Name the methods; the library is imported here, after warnings are silenced."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    train, test = TensorDataset(*problem.train), TensorDataset(*problem.test)
    size = batch_size or len(train)

    def fit(strategy: str) -> Any:
        folder = tempfile.TemporaryDirectory()
        task = _task()
        analyzer = Analyzer(
            "benchmark",
            prepare_model(build_model(problem), task),
            task,
            cpu=True,
            disable_tqdm=True,
            output_dir=folder.name,
        )
        analyzer.fit_all_factors(
            "factors",
            train,
            per_device_batch_size=size,
            factor_args=FactorArguments(strategy=strategy),
        )
        return analyzer, folder

    def scores(fitted: Any) -> Tensor:
        analyzer, folder = fitted
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=test,
            train_dataset=train,
            per_device_query_batch_size=len(test),
            per_device_train_batch_size=size,
            score_args=ScoreArguments(damping_factor=problem.damping),
        )
        found = analyzer.load_pairwise_scores("scores")["all_modules"]
        folder.cleanup()
        return found

    settings = {"loader_batch": batch_size, "damping_factor": problem.damping}
    return {
        strategy: Method(partial(fit, strategy), scores, settings, damped=strategy != "identity")
        for strategy in STRATEGIES
    }


if __name__ == "__main__":
    main("kronfluence", make_methods, batch_size=0)
