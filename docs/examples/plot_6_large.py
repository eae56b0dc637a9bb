"""
What does it cost, and what does the factored form lose?
========================================================

For large networks scores come from what goes in and out of layers: no vector of all parameters is
formed for any row. This example measures what that costs as rows and questions grow, and how close
factored scores are to exact ones. :doc:`../howto/large-models` has the way from a model to scores,
:doc:`../theory` the formulas.
"""

# %%
# A network with wide layers, trained a little on ten clusters in 128 dimensions:

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import upweight as uw

centres = torch.randn(10, 128, generator=torch.Generator().manual_seed(7)) / 2


def rows(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(10, (n,), generator=generator)
    return centres[label] + torch.randn(n, 128, generator=generator), label


model = uw.MLP([128, 256, 256, 10], torch.nn.ReLU, seed=0)
train, test = rows(8000, 0), rows(200, 1)
history = uw.train(model, F.cross_entropy, train, epochs=2)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %%
# Exact scores, and factored ones
# -------------------------------
# Both rest on the same EK-FAC factors, which are fitted once and kept in a file. With
# ``factored=0.05`` the damped inverse of every layer's eigenvalues, :math:`1/(\Lambda + \lambda)`,
# is taken as a short sum of products :math:`\sum_k u_k v_k^\top`, with an expected relative error
# of scores of at most 5 %. ``certify=0`` leaves out the comparison with the exact curvature, which
# would take most of the time here.

folder = tempfile.TemporaryDirectory()
factors = Path(folder.name) / "factors.safetensors"


def fitted(rows_of_fit: int, factored: float | None, factors: Path | None = None) -> uw.Influence:
    method = uw.EKFAC(factored=factored)
    influence = uw.Influence(model, F.cross_entropy, method, damping=0.001, certify=0)
    some = train[0][:rows_of_fit], train[1][:rows_of_fit]
    return influence.fit(some, factors=factors)


exact = fitted(8000, None, factors)
factored = fitted(8000, 0.05, factors)  # reads the file
few = test[0][:50], test[1][:50]
truth, found = exact.scores(few).values, factored.scores(few).values
correlation = np.corrcoef(truth.flatten(), found.flatten())[0, 1]
print(factored.certificate)
print()
print(f"relative error {float((found - truth).norm() / truth.norm()):.4f}")
print(f"correlation    {correlation:.6f}")

# %%
# "Factored scores" says how many terms each layer took, and which error was expected of them;
# "error of factored scores" what came out for some pairs. One dot is one pair of a test and a
# training row. Scores span many sizes, so both axes are linear near zero and logarithmic beyond.
# The error is small beside the large scores, not beside each: the smallest may even change sign.

chosen = torch.randperm(truth.numel(), generator=torch.Generator().manual_seed(0))[:20_000]
figure, ax = plt.subplots(figsize=(5.5, 5), layout="constrained")
largest = float(truth.abs().max())
ax.plot([-largest, largest], [-largest, largest], color="0.6", linewidth=1, zorder=0)
ax.scatter(truth.flatten()[chosen], found.flatten()[chosen], s=3, linewidths=0, rasterized=True)
ax.set_xscale("symlog", linthresh=0.001)
ax.set_yscale("symlog", linthresh=0.001)
ticks = [-10, -0.1, -0.001, 0.001, 0.1, 10]
ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
ax.set_xlabel("exact score")
ax.set_ylabel("factored score")
ax.set_aspect("equal")

# %%
# Cost against rows and questions
# -------------------------------
# Seconds of the processor, once with the number of training rows growing and 50 test rows, once
# with 2,000 training rows and the number of test rows growing. A fit depends on the training rows
# alone.


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


lines = {"fit": [], "exact scores": [], "factored scores": []}
many = [1000, 2000, 4000, 8000]
for n in many:
    kept = Path(folder.name) / f"{n}.safetensors"
    lines["fit"].append(seconds(lambda n=n, kept=kept: fitted(n, None, kept)))
    influence, short = fitted(n, None, kept), fitted(n, 0.05, kept)
    lines["exact scores"].append(seconds(lambda i=influence: i.scores(few)))
    lines["factored scores"].append(seconds(lambda i=short: i.scores(few)))

asked = [25, 50, 100, 200]
kept = Path(folder.name) / "2000.safetensors"
influence, short = fitted(2000, None, kept), fitted(2000, 0.05, kept)
by_test = {"exact scores": [], "factored scores": []}
for m in asked:
    some = test[0][:m], test[1][:m]
    by_test["exact scores"].append(seconds(lambda s=some: influence.scores(s)))
    by_test["factored scores"].append(seconds(lambda s=some: short.scores(s)))

colors = {"fit": "0.45", "exact scores": "tab:blue", "factored scores": "tab:orange"}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
for name, values in lines.items():
    left.plot(many, values, marker="o", color=colors[name], label=name)
for name, values in by_test.items():
    right.plot(asked, values, marker="o", color=colors[name], label=name)
for ax, at, label in ((left, many, "training rows"), (right, asked, "test rows")):
    ax.set(xscale="log", yscale="log", xlabel=label)
    ax.set_xticks(at, [f"{n:,}" for n in at])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
left.set_ylabel("seconds of the processor")
left.legend(frameon=False)

# %%
# On these axes a straight line of slope one is a cost that grows in proportion. Below that are the
# parts that do not grow, such as eigenvectors, and the search for :math:`u_k` and :math:`v_k`.

slopes = np.log2(lines["exact scores"][-1] / lines["exact scores"][0]) / np.log2(8)
print(f"exact scores: twice the rows take {2**slopes:.2f} times as long")
ratio = lines["exact scores"][-1] / lines["factored scores"][-1]
print(f"8,000 rows, 50 test rows: factored scores take 1/{ratio:.1f} of the time of exact ones")

# %%
# A store for later questions
# ---------------------------
# The gradients of the training rows, as inputs and derivatives of layers, can be kept. A later
# question is then answered from the file, and no training row goes through the model.

store = factored.store_gradients(Path(folder.name) / "gradients")
print(store)
again = exact.scores(few, store).values
print(f"difference of exact scores: {float((again - truth).norm() / truth.norm()):.1e}")
print(f"from the model: {seconds(lambda: factored.scores(few)):.2f} s")
print(f"from the store: {seconds(lambda: factored.scores(few, store)):.2f} s")

# %%
# With a ``rank`` it is smaller, and answers differ: it keeps the leading eigenvectors of each side
# of a layer alone. "Kept" is the share of :math:`\sum (\Lambda/(\Lambda + \lambda))^2` that lies
# in them.

for rank in (16, 64):
    small = factored.store_gradients(Path(folder.name) / f"rank{rank}", rank=rank)
    approximate = factored.scores(few, small).values
    correlation = np.corrcoef(truth.flatten(), approximate.flatten())[0, 1]
    share = f"{small.nbytes / store.nbytes:.2f} of the bytes, {small.kept:.2f} kept"
    print(f"rank {rank}: {share}, correlation {correlation:.3f}")
folder.cleanup()
