"""Run kronfluence's EK-FAC on a problem of `scale.py`, its steps measured apart.

    .venv-peers/bin/python benchmarks/peers/run_kronfluence_scale.py PROBLEM.npz OUT.npz \
        --batch-size 64

Labels of the Fisher are sampled from the model, or with ``--empirical`` those of the rows. The loss
and the measurement are the sum of the cross-entropies.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scale_phases import Phases, answer, one_thread, preload
from scale_problems import ScaleProblem, build, load, loss_sum, sample_labels, tracked


def make_task(names: list[str]) -> Any:
    """The task of its own examples, on these layers."""
    from kronfluence.task import Task

    class CrossEntropies(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, labels = batch
            logits = model(inputs)
            return loss_sum(logits, sample_labels(logits, labels) if sample else labels)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    return CrossEntropies()


def run(problem: ScaleProblem, options: argparse.Namespace) -> tuple[Phases, Tensor]:
    """Factors and scores."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    train, query = TensorDataset(*problem.train), TensorDataset(*problem.query)
    model = build(problem)
    task = make_task(tracked(model))
    factors = FactorArguments(
        strategy="ekfac",
        use_empirical_fisher=options.empirical,
        covariance_max_examples=None,
        lambda_max_examples=options.eigenvalue_rows or None,
    )
    with tempfile.TemporaryDirectory() as folder:
        phases = Phases()
        queries = options.query_batch_size or len(query)
        with phases("setup"):
            analyzer = Analyzer(
                "scale",
                prepare_model(model, task),
                task,
                cpu=True,
                disable_tqdm=True,
                output_dir=folder,
            )
        fitting = {"dataset": train, "factor_args": factors}
        size, small = options.batch_size, options.eigenvalue_batch_size or options.batch_size
        with phases("factors"):
            analyzer.fit_covariance_matrices("f", per_device_batch_size=size, **fitting)
        with phases("eigenvectors"):
            analyzer.perform_eigendecomposition("f", factor_args=factors)
        with phases("eigenvalues"):
            analyzer.fit_lambda_matrices("f", per_device_batch_size=small, **fitting)
        with phases("scores"):
            analyzer.compute_pairwise_scores(
                "s",
                "f",
                query_dataset=query,
                train_dataset=train,
                per_device_query_batch_size=queries,
                per_device_train_batch_size=options.batch_size,
                score_args=ScoreArguments(
                    damping_factor=problem.damping,
                    # all queries together in one pass over the training rows
                    query_gradient_accumulation_steps=math.ceil(len(query) / queries),
                ),
            )
            scores = analyzer.load_pairwise_scores("s")["all_modules"]
    return phases, scores


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("problem", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--query-batch-size", type=int, default=0, help="0: all")
    parser.add_argument("--eigenvalue-rows", type=int, default=0, help="0: all")
    parser.add_argument("--eigenvalue-batch-size", type=int, default=0)
    parser.add_argument("--empirical", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    one_thread()
    warnings.filterwarnings("ignore")
    torch.manual_seed(options.seed)
    preload()
    torch.compiler.reset()  # it calls this between its steps, and the first time is an import
    problem = load(options.problem)
    phases, scores = run(problem, options)
    rows = min(options.eigenvalue_rows or len(problem.x_train), len(problem.x_train))
    answer(options.out, "kronfluence", phases, scores, eigenvalue_rows=rows)


if __name__ == "__main__":
    main()
