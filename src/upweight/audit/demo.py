"""The wine walk-through: spoil ten labels, train, and let the influence of the rows find them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save as serialize
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn

from upweight.audit import demo_report, report
from upweight.comparison import Comparison, compare
from upweight.datasets import Split, flip_labels, load_wine
from upweight.inverse import Certificate
from upweight.methods import Influence
from upweight.scores import RowScores, Scores
from upweight.stream import atomic_directory
from upweight.training import MLP, History, train
from upweight.version import __version__

__all__ = ["WineResult", "WineSettings", "run_wine", "write_run"]


@dataclass(frozen=True)
class WineSettings:
    """What the walk-through does; written to ``config.yaml`` of its run.

    Attributes
    ----------
    seed
        Of the split, the flipped rows, the initial weights and the order of training.
    flipped
        How many training rows get the label of another cultivar.
    epochs, learning_rate, weight_decay, batch_size
        Of Adam with a cosine schedule on a 13-16-16-3 tanh network.
    damping, curvature
        λ and C of the influence.
    compare
        Whether methods for large models score the same rows, to be compared.
    """

    seed: int = 2
    flipped: int = 10
    epochs: int = 300
    learning_rate: float = 0.005
    weight_decay: float = 0.01
    batch_size: int = 32
    damping: float = 0.1
    curvature: Literal["hessian", "ggn", "fisher"] = "hessian"
    compare: bool = True


@dataclass(frozen=True)
class WineResult:
    """Everything that the walk-through found.

    Attributes
    ----------
    rows
        A line per training row: ``row`` (position), ``bottle`` (row of the original table),
        ``given`` and ``predicted`` class, ``mean_influence``, ``self_influence``, ``flipped``.
    features
        The scaled features, (n, 13), in the order of `rows`.
    feature_influence
        Mean over training and test rows of the influence of a feature, (13,).
    comparison
        Other methods on the same rows, with the direct one as the reference; None where it was not
        asked for.
    """

    settings: WineSettings
    data: Split
    model: nn.Module
    history: History
    test_predicted: np.ndarray
    f1: float
    scores: Scores
    mean: RowScores
    rows: pd.DataFrame
    features: pd.DataFrame
    feature_influence: pd.Series
    certificate: Certificate
    comparison: Comparison | None

    @property
    def corrupted_mean(self) -> float:
        """Mean influence of the flipped rows."""
        return float(self.rows.loc[self.rows["flipped"], "mean_influence"].mean())

    @property
    def other_mean(self) -> float:
        """Mean influence of all other rows."""
        return float(self.rows.loc[~self.rows["flipped"], "mean_influence"].mean())

    @property
    def auc(self) -> float:
        """ROC AUC of the negated mean influence against the flipped rows."""
        flipped = self.rows["flipped"].to_numpy()
        if flipped.all() or not flipped.any():
            return float("nan")
        return float(roc_auc_score(flipped, -self.rows["mean_influence"].to_numpy()))

    def suspects(self, k: int) -> pd.DataFrame:
        """The k rows with the lowest mean influence, lowest first."""
        return self.rows.sort_values("mean_influence", kind="stable").head(k)


def run_wine(settings: WineSettings, *, progress: bool = True) -> WineResult:
    """Load, spoil, train, score.

    Raises
    ------
    ValueError
        If a setting does not make sense.
    """
    wine = load_wine(seed=settings.seed)
    x, y = wine.train
    y, flipped = flip_labels(y, settings.flipped, classes=3, seed=settings.seed)
    model = MLP([x.shape[1], 16, 16, 3], nn.Tanh, seed=settings.seed)
    influence = Influence(
        model, F.cross_entropy, curvature=settings.curvature, damping=settings.damping
    )
    history = train(
        model,
        F.cross_entropy,
        (x, y),
        wine.validation,
        epochs=settings.epochs,
        optimizer=lambda p: torch.optim.Adam(
            p, lr=settings.learning_rate, weight_decay=settings.weight_decay
        ),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, settings.epochs),
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=progress,
    )
    influence.fit((x, y))
    scores = influence.scores(wine.test)
    mean = scores.mean()
    by_feature = influence.mean_scores(wine.test, mode="perturbation").values.mean(0)
    comparison = None
    if settings.compare:
        comparison = compare(
            model,
            F.cross_entropy,
            (x, y),
            wine.test,
            damping=settings.damping,
            curvature=settings.curvature,
            reference="direct",
            progress=progress,
        )
    with torch.no_grad():
        predicted = model(x).argmax(1).numpy()
        test_predicted = model(wine.test[0]).argmax(1).numpy()
    is_flipped = np.zeros(len(y), dtype=bool)
    is_flipped[flipped.numpy()] = True
    names = np.asarray(wine.class_names)
    rows = pd.DataFrame(
        {
            "row": np.arange(len(y)),
            "bottle": wine.train_rows,
            "given": names[y.numpy()],
            "predicted": names[predicted],
            "mean_influence": mean.values.numpy(),
            "self_influence": influence.self_influence().values.numpy(),
            "flipped": is_flipped,
        }
    )
    return WineResult(
        settings=settings,
        data=wine,
        model=model,
        history=history,
        test_predicted=test_predicted,
        f1=float(f1_score(wine.test[1].numpy(), test_predicted, average="weighted")),
        scores=scores,
        mean=mean,
        rows=rows,
        features=pd.DataFrame(x.numpy(), columns=pd.Index(wine.feature_names)),
        feature_influence=pd.Series(by_feature.numpy(), index=list(wine.feature_names)),
        certificate=influence.certificate,
        comparison=comparison,
    )


CONFIG = "config.yaml"


def write_run(result: WineResult, path: str | os.PathLike[str], *, top: int = 20) -> Path:
    """Write the run folder: report, tables, scores, model and settings; whole or not at all.

    A folder that an earlier run wrote is replaced, any other refused.

    Returns
    -------
    Path
        Of ``report.html``.
    """
    final = Path(path)
    with atomic_directory(final, replace=is_run(final)) as folder:
        config = {
            "command": "demo wine",
            "settings": asdict(result.settings),
            "versions": {"upweight": __version__, "torch": str(torch.__version__)},
        }
        (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        result.rows.to_parquet(folder / "rows.parquet")
        result.suspects(top).to_parquet(folder / "findings.parquet")
        result.history.losses.to_parquet(folder / "losses.parquet")
        result.feature_influence.rename("influence").to_frame().to_parquet(
            folder / "feature_influence.parquet"
        )
        result.scores.save(folder / "scores")
        if result.comparison is not None:
            result.comparison.table.to_parquet(folder / "methods.parquet")
            result.comparison.mean.to_parquet(folder / "method_scores.parquet")
        weights = serialize(dict(result.model.state_dict()))
        (folder / "model.safetensors").write_bytes(weights)
        text = json.dumps(result.certificate.to_dict(), indent=2)
        (folder / "certificate.json").write_text(text, encoding="utf-8")
        report.write(demo_report.build(result, top), folder / "report.html")
    return final / "report.html"


def is_run(path: Path) -> bool:
    """Whether a folder was written by a command of upweight."""
    return (path / CONFIG).is_file() and (path / "report.html").is_file()
