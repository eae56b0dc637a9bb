"""The digits truths of ``benchmarks/data``: models, rows, and what retraining did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from upweight.evaluate import lds, prediction_score

FOLDER = Path(__file__).parents[1] / "benchmarks" / "data"
needed = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no {FOLDER}")


@dataclass(frozen=True)
class Truth:
    """One of the two: ``"logistic"`` or ``"mlp"``."""

    name: str
    data: dict[str, np.ndarray]

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        return self._pair("X", "y")

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        return self._pair("Xt", "yt")

    @property
    def masks(self) -> np.ndarray:
        return self.data["masks"].astype(bool)

    def _pair(self, x: str, y: str) -> tuple[Tensor, Tensor]:
        dtype = next(self.model().parameters()).dtype
        return torch.from_numpy(self.data[x]).to(dtype), torch.from_numpy(self.data[y])

    def model(self, prefix: str = "base", at: int | None = None) -> nn.Module:
        mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        net = mlp if self.name == "mlp" else nn.Sequential(nn.Linear(64, 10)).double()
        found = {name: self.data[f"{prefix}/{name}"] for name in net.state_dict()}
        net.load_state_dict(
            {k: torch.from_numpy(v if at is None else v[at]) for k, v in found.items()}
        )
        return net

    def models(self, prefix: str) -> list[nn.Module]:
        """All of those that were kept under this name."""
        return [self.model(prefix, at) for at in range(len(self.data[f"{prefix}/0.weight"]))]

    def lds(self, scores: object) -> float:
        """Of scores (m, n), positive where a row helps."""
        return lds(np.asarray(scores), self.masks, self.data["margin"], bootstrap=0).value

    def lds_of_losses(self, after: Tensor) -> float:
        """Of predicted negative margins (S, m) on the subsets."""
        return prediction_score(-after.numpy(), self.data["margin"], bootstrap=0).value


def truth(name: str) -> Truth:
    with np.load(FOLDER / f"digits_{name}_truth.npz") as data:
        return Truth(name, dict(data))
