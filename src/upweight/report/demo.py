"""The wine walk-through: spoil ten labels, train, and let the influence of the rows find them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save as serialize
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn

from upweight.comparison import Comparison, compare
from upweight.datasets import Split, flip_labels, load_wine
from upweight.inverse import Certificate
from upweight.methods import Influence
from upweight.report import demo_report, page
from upweight.report.demo_check import WineCheck, check_wine
from upweight.report.demo_settings import WineSettings, make_model, training_options
from upweight.scores import RowScores, Scores
from upweight.stream import atomic_directory
from upweight.training import History, train
from upweight.version import __version__

__all__ = ["WineResult", "WineSettings", "run_wine", "write_run"]


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
    check
        Whether the scores can be believed, or a text that says why that is not known; None where
        it was not asked for.
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
    check: WineCheck | str | None
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
    """Load, spoil, train, score, check, compare.

    Raises
    ------
    ValueError
        If a setting does not make sense.
    """
    wine = load_wine(seed=settings.seed)
    x, y = wine.train
    y, flipped = flip_labels(y, settings.flipped, classes=3, seed=settings.seed)
    model = make_model(settings.seed)
    influence = Influence(
        model, F.cross_entropy, curvature=settings.curvature, damping=settings.damping
    )
    history = train(
        model,
        F.cross_entropy,
        (x, y),
        wine.validation,
        epochs=settings.epochs,
        seed=settings.seed,
        progress=progress,
        **training_options(settings),
    )
    influence.fit((x, y))
    scores = influence.scores(wine.test)
    mean = scores.mean()
    by_feature = influence.mean_scores(wine.test, mode="perturbation").values.mean(0)
    values = {
        "mean_influence": mean.values.numpy(),
        "self_influence": influence.self_influence().values.numpy(),
    }
    rows = _rows(wine, y, flipped, _classes(model, x), values)
    predicted = _classes(model, wine.test[0])
    check = None
    if settings.check:
        epochs = history.best_epoch
        check = check_wine(settings, model, wine, (x, y), scores, epochs=epochs, progress=progress)
    return WineResult(
        settings=settings,
        data=wine,
        model=model,
        history=history,
        test_predicted=predicted,
        f1=float(f1_score(wine.test[1].numpy(), predicted, average="weighted")),
        scores=scores,
        mean=mean,
        rows=rows,
        features=pd.DataFrame(x.numpy(), columns=pd.Index(wine.feature_names)),
        feature_influence=pd.Series(by_feature.numpy(), index=list(wine.feature_names)),
        certificate=influence.certificate,
        check=check,
        comparison=_compared(settings, model, (x, y), wine.test, progress),
    )


def _compared(
    settings: WineSettings, model: nn.Module, rows: Any, test: Any, progress: bool
) -> Comparison | None:
    if not settings.compare:
        return None
    return compare(
        model,
        F.cross_entropy,
        rows,
        test,
        damping=settings.damping,
        curvature=settings.curvature,
        reference="direct",
        progress=progress,
    )


def _classes(model: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(x).argmax(1).numpy()


def _rows(
    wine: Split,
    given: Tensor,
    flipped: Tensor,
    predicted: np.ndarray,
    scores: Mapping[str, np.ndarray],
) -> pd.DataFrame:
    is_flipped = np.zeros(len(given), dtype=bool)
    is_flipped[flipped.numpy()] = True
    names = np.asarray(wine.class_names)
    return pd.DataFrame(
        {
            "row": np.arange(len(given)),
            "bottle": wine.train_rows,
            "given": names[given.numpy()],
            "predicted": names[predicted],
            **scores,
            "flipped": is_flipped,
        }
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
        if isinstance(result.check, WineCheck):
            result.check.findings().to_parquet(folder / "check.parquet")
            result.check.dampings.to_parquet(folder / "check_dampings.parquet")
            result.check.retrained.save(folder / "retrained.npz")
        if result.comparison is not None:
            result.comparison.table.to_parquet(folder / "methods.parquet")
            result.comparison.mean.to_parquet(folder / "method_scores.parquet")
        weights = serialize(dict(result.model.state_dict()))
        (folder / "model.safetensors").write_bytes(weights)
        text = json.dumps(result.certificate.to_dict(), indent=2)
        (folder / "certificate.json").write_text(text, encoding="utf-8")
        page.write(demo_report.build(result, top), folder / "report.html")
    return final / "report.html"


def is_run(path: Path) -> bool:
    """Whether a folder was written by a command of upweight."""
    return (path / CONFIG).is_file() and (path / "report.html").is_file()
