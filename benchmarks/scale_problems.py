"""The problems of `scale.py`: networks, rows, weights and damping, in files that all sides read.

Needs only NumPy and torch (and scikit-learn to make the digits), so that the runners of the peers
can import it. Weights are random with a seed and trained for a few steps, so that rows differ in
their gradients; nothing here is a well trained model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of the mean eigenvalue of the Fisher matrix, which is found on so many rows.
DAMPING, DAMPING_ROWS = 0.1, 64
NO_LABEL = -100  # of the last token of a row, whose successor is not known
PARTS = ("x_train", "y_train", "x_query", "y_query")


@dataclass(frozen=True)
class ScaleProblem:
    """Rows, weights and damping. `shape` is what `build` makes the network of."""

    kind: str  # "mlp" or "gpt"
    shape: tuple[int, ...]
    x_train: Tensor
    y_train: Tensor
    x_query: Tensor
    y_query: Tensor
    state: dict[str, Tensor]
    damping: float

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Training inputs and labels."""
        return self.x_train, self.y_train

    @property
    def query(self) -> tuple[Tensor, Tensor]:
        """Query inputs and labels."""
        return self.x_query, self.y_query


class Block(nn.Module):
    """Attention and a network of two layers, each behind a norm, as in GPT-2."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def attention(self, x: Tensor) -> Tensor:
        """Written out, because not every way to differentiate goes through the fused one."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (b, h, t, d/h)
        weights = q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)  # (b, h, t, t)
        later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        weights = weights.masked_fill(later, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, d))

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) → (b, t, d)."""
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 without dropout, its head tied to no embedding: token numbers (b, t) → (b, t, V)."""

    def __init__(
        self, layers: int, width: int, heads: int, *, inner: int, vocabulary: int, tokens: int
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        x = self.token(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make_network(kind: str, shape: tuple[int, ...]) -> nn.Module:
    """A network with random weights."""
    if kind == "gpt":
        layers, width, heads, inner, vocabulary, tokens = shape
        return GPT(layers, width, heads, inner=inner, vocabulary=vocabulary, tokens=tokens)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(shape):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def build(problem: ScaleProblem) -> nn.Module:
    """The network of a problem with its weights."""
    model = make_network(problem.kind, problem.shape)
    model.load_state_dict(problem.state)
    return model.eval()


def tracked(model: nn.Module) -> list[str]:
    """The names of the layers that influence goes through: embeddings and head are left out."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if name != "head"]


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ of the cross-entropies of all rows, and of all positions where there are any."""
    return F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=NO_LABEL
    )


def sample_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels drawn from the model wherever there is a label."""
    drawn = torch.multinomial(logits.detach().flatten(0, -2).softmax(-1), 1)
    return torch.where(labels == NO_LABEL, NO_LABEL, drawn.reshape(labels.shape))


# --- making them ---------------------------------------------------------------------------------


def digits(quick: bool = False) -> ScaleProblem:
    """64-256-256-10 on scikit-learn's digits: 1,500 training and 297 query rows."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x = torch.from_numpy(found.data[order] / 16).float()
    y = torch.from_numpy(found.target[order]).long()
    n, m = (300, 40) if quick else (1500, 297)
    rows = x[:n], y[:n], x[n : n + m], y[n : n + m]
    shape = (64, 64, 10) if quick else (64, 256, 256, 10)
    return _trained("mlp", shape, rows, steps=300, batch=128, rate=1e-3)


def mlp(quick: bool = False) -> ScaleProblem:
    """784-1024-1024-1024-10 on images of Gaussian clusters, a tenth of the labels at random."""
    n, m = (300, 20) if quick else (5000, 200)
    shape = (784, 128, 128, 10) if quick else (784, 1024, 1024, 1024, 10)
    return _trained("mlp", shape, _clusters(n, m, shape[0]), steps=40, batch=128, rate=3e-4)


def gpt(quick: bool = False) -> ScaleProblem:
    """A GPT-2-shaped model with rows of tokens from a random Markov chain."""
    shape = (2, 32, 4, 64, 50, 16) if quick else (4, 256, 4, 1024, 2000, 128)
    n, m = (40, 6) if quick else (500, 20)
    vocabulary, tokens = shape[-2:]
    rng = np.random.default_rng(0)
    following = rng.integers(vocabulary, size=(vocabulary, 8))
    rows = np.empty((n + m, tokens), dtype=np.int64)
    rows[:, 0] = rng.integers(vocabulary, size=n + m)
    for t in range(1, tokens):
        rows[:, t] = following[rows[:, t - 1], rng.integers(8, size=n + m)]
    x = torch.from_numpy(rows)
    y = F.pad(x[:, 1:], (0, 1), value=NO_LABEL)
    return _trained("gpt", shape, (x[:n], y[:n], x[n:], y[n:]), steps=40, batch=8, rate=1e-3)


def many(rows: int, queries: int) -> ScaleProblem:
    """The network of the digits on rows of Gaussian clusters, as many as wanted."""
    shape = (64, 256, 256, 10)
    return _trained("mlp", shape, _clusters(rows, queries, 64), steps=100, batch=128, rate=1e-3)


PROBLEMS: dict[str, Callable[..., ScaleProblem]] = {"digits": digits, "mlp": mlp, "gpt": gpt}


def _clusters(n: int, m: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten Gaussian clusters, a tenth of the labels at random."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, width, generator=generator) * (4 / math.sqrt(width))
    y = torch.randint(10, (n + m,), generator=generator)
    x = centres[y] + torch.randn(n + m, width, generator=generator)
    wrong = torch.rand(n + m, generator=generator) < 0.1
    y = torch.where(wrong, torch.randint(10, (n + m,), generator=generator), y)
    return x[:n], y[:n], x[n:], y[n:]


def _trained(
    kind: str,
    shape: tuple[int, ...],
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    steps: int,
    batch: int,
    rate: float,
) -> ScaleProblem:
    torch.manual_seed(0)
    model = make_network(kind, shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    x, y = rows[:2]
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,))
        optimizer.zero_grad()
        (loss_sum(model(x[chosen]), y[chosen]) / y[chosen].numel()).backward()
        optimizer.step()
    model.eval()
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return ScaleProblem(kind, shape, *rows, state=state, damping=_damping(model, x, y))


def _damping(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """A tenth of the mean eigenvalue of the Fisher matrix, tr F / p, with labels drawn once."""
    names = tracked(model)
    theta = [p for name in names for p in model.get_submodule(name).parameters()]
    total = 0.0
    for row in range(min(DAMPING_ROWS, len(x))):
        logits = model(x[row : row + 1])
        drawn = sample_labels(logits, y[row : row + 1])
        slopes = torch.autograd.grad(loss_sum(logits, drawn), theta)
        total += sum(float(slope.double().square().sum()) for slope in slopes)
    rows = min(DAMPING_ROWS, len(x))
    return float(f"{DAMPING * total / rows / sum(p.numel() for p in theta):.3g}")


# --- files ---------------------------------------------------------------------------------------


def save(path: str | Path, problem: ScaleProblem) -> None:
    """Write a problem."""
    arrays: dict[str, Any] = {name: getattr(problem, name).numpy() for name in PARTS}
    arrays |= {f"state/{name}": value.numpy() for name, value in problem.state.items()}
    kind, shape = np.array(problem.kind), np.array(problem.shape)
    np.savez(path, kind=kind, shape=shape, damping=np.array(problem.damping), **arrays)


def load(path: str | Path) -> ScaleProblem:
    """Read a problem."""
    with np.load(path, allow_pickle=False) as data:
        state = {
            name.removeprefix("state/"): torch.from_numpy(data[name])
            for name in data.files
            if name.startswith("state/")
        }
        parts = [torch.from_numpy(data[name]) for name in PARTS]
        shape = tuple(int(size) for size in data["shape"])
        return ScaleProblem(
            str(data["kind"]), shape, *parts, state=state, damping=float(data["damping"])
        )
