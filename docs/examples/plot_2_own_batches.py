"""
Your own model, your own batches
================================

Batches need not be ``(x, y)``, and not every parameter has to take part. Two small adapters say
how a batch is used, and everything else stays the same.
"""

# %%
# A model with two inputs, trained elsewhere on dictionaries:

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upweight as uw

torch.manual_seed(0)


class Pair(nn.Module):
    """Compares a measurement with a token."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.1))
        self.token = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, measured: Tensor, token: Tensor) -> Tensor:
        return self.head(self.body(measured) * self.token(token))


def rows(n: int) -> dict[str, Tensor]:
    measured, token = torch.randn(n, 4), torch.randint(5, (n,))
    return {"measured": measured, "token": token, "label": (measured[:, 0] > 0).long()}


model, train, test = Pair(), rows(60), rows(30)

# %%
# ``forward`` says how the model is called on a batch, ``target`` what the loss gets beside the
# output, and ``features`` what mode "perturbation" differentiates by. Dropout is used as in
# evaluation, and the model comes back in the mode in which it was given.

influence = uw.Influence(
    model,
    F.cross_entropy,
    damping=0.05,
    forward=lambda model, batch: model(batch["measured"], batch["token"]),
    target=lambda batch: batch["label"],
    features=lambda batch: batch["measured"],
)
influence.fit(train, names=[f"measurement {i}" for i in range(60)])
influence.scores(test).top(2).head(6)

# %%
# Only the parameters of the head, by name pattern: a smaller and faster problem, often used for
# large networks.

head = uw.Influence(
    model,
    F.cross_entropy,
    damping=0.05,
    parameters="head.*",
    forward=lambda model, batch: model(batch["measured"], batch["token"]),
    target=lambda batch: batch["label"],
).fit(train)
print(head)
print(head.certificate)

# %%
# Scores can go to disk, block by block, so that memory does not grow with the number of training
# rows. The folder appears when it is complete, and is read lazily.

import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    stored = influence.scores(test, to=Path(folder) / "scores")
    print(stored)
    print(uw.Scores.load(Path(folder) / "scores").mean().top(3))

# %%
# What does not fit is refused before any long work, and the message says what to do:

broken = {**train, "label": torch.full((60,), 2)}
try:
    influence.fit(broken)
except ValueError as error:
    print(error)
