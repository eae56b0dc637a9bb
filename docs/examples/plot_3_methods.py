"""
Which method, and how exact is it?
==================================

There are several ways to the product with :math:`(C + \\lambda I)^{-1}`. They differ in what they
need and in how exact they are. On the small wine network all of them run, so that each can be
measured against the exact answer.
"""

# %%
# The same bottles and the same network as in :doc:`plot_1_wine`:

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import upweight as uw
from upweight.report import plots

wine = uw.load_wine(seed=2)
x, y = wine.train
y, flipped = uw.flip_labels(y, 10, seed=2)
model = uw.MLP([13, 16, 16, 3], nn.Tanh, seed=2)
epochs = 300
history = uw.train(
    model,
    F.cross_entropy,
    (x, y),
    wine.validation,
    epochs=epochs,
    optimizer=lambda p: torch.optim.Adam(p, lr=0.005, weight_decay=0.01),
    scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs),
    seed=2,
)

# %%
# Before anything runs
# --------------------
# `plan` estimates memory, products with the curvature and time of every method. It makes a few
# small products to see how fast they are on this machine, and proposes a method. The proposal is
# what ``method="auto"`` takes.

print(uw.plan(model, F.cross_entropy, (x, y), wine.test, damping=0.1, curvature="hessian"))

# %%
# Side by side
# ------------
# `compare` scores the same rows by several methods. The first line is the reference, here exact
# factorisation. The errors are those of the mean influence, one number per training bottle: as a
# percentage averaged over the bottles, and in the norm of all of them together. `residual` is the
# largest over the test bottles.

found = uw.compare(
    model, F.cross_entropy, (x, y), wine.test, damping=0.1, curvature="hessian", progress=False
)
columns = ["method", "error_percent", "relative_norm", "pearson", "spearman"]
forms = {"error_percent": "{:.3g}", "relative_norm": "{:.1e}"}
found.table[columns].style.hide(axis="index").format(forms, precision=4)

# %%
# What the answers took, and how well each solved its equations:

columns = ["method", "residual", "steps", "products", "seconds"]
forms = {"residual": "{:.1e}", "steps": "{:.0f}", "products": "{:,}", "seconds": "{:.2g}"}
found.table[columns].style.hide(axis="index").format(forms, na_rep="")

# %%
# The mean influence of each bottle by each method, against the reference. Bottles with a flipped
# label are circled. On the dashed line a method agrees with the reference. EK-FAC loses the sizes
# and keeps much of the order: it takes the curvature between layers as zero, while the layers of
# this network move together.

is_flipped = np.isin(np.arange(len(x)), flipped)
reference = found.mean[found.reference]
lines = -(-len(found.methods) // 2)
figure, axes = plt.subplots(lines, 2, figsize=(9, 4 * lines), layout="constrained")
figure.get_layout_engine().set(h_pad=0.15)
for ax, name in zip(axes.flat, found.methods, strict=False):
    plots.plot_method_comparison(reference, found.mean[name], is_flipped, ax=ax, name=name)
    ax.set_title(name)
for ax in axes.flat[len(found.methods) :]:
    ax.set_visible(False)

# %%
# The certificate
# ---------------
# A certificate says how well (C + λI) x = g was solved, with the exact curvature, whatever the
# method. 0 is exact. EK-FAC knows nothing of its error, so for some of the test bottles
# (``certify=8`` by default) the residual is measured, at one product with the exact curvature
# each.

ekfac = uw.Influence(model, F.cross_entropy, "ekfac", curvature="hessian", damping=0.1)
approximate = ekfac.fit((x, y)).scores(wine.test)
print(ekfac.certificate)

# %%
# A residual above 1 says that the sizes of these scores mean nothing here. It says nothing of their
# order, of which the plot above shows that much is kept.
#
# Conjugate gradients stop at a residual, so they always know it.

cg = uw.Influence(
    model,
    F.cross_entropy,
    uw.CG(preconditioner=uw.Nystroem(rank=5)),
    curvature="hessian",
    damping=0.1,
)
scores = cg.fit((x, y)).scores(wine.test)
print(cg.certificate)

# %%
# From approximate to exact
# -------------------------
# `refine` takes what was fitted as the preconditioner of conjugate gradients. Nothing is fitted
# again, and the scores become exact to the tolerance. How many steps that takes depends on the
# preconditioner: the certificates say that Nyström's directions are the better one here.

refined = ekfac.refine()
exact = refined.scores(wine.test)
print(refined.certificate)


def difference(a: uw.Scores, b: uw.Scores) -> float:
    return float((a.values - b.values).norm() / b.values.norm())


print(f"EK-FAC against conjugate gradients:  {difference(approximate, scores):.1e}")
print(f"refined against conjugate gradients: {difference(exact, scores):.1e}")

# %%
# Scores by layer
# ---------------
# Which layer does an influence go through? With ``by="layer"`` there are scores for every layer,
# and their sum is the whole. (Layers have the names of the modules, here positions in a
# ``Sequential``.)

by_layer = cg.scores(wine.test, by="layer")
whole = sum(part.values for part in by_layer.values())
print(f"largest difference of the sum: {(whole - scores.values).abs().max():.1e}")
for layer, part in by_layer.items():
    mean = part.mean().values
    print(f"layer {layer}: flipped {mean[is_flipped].mean():+.3f}, others", end=" ")
    print(f"{mean[~is_flipped].mean():+.3f}")

# %%
# When there is no answer
# -----------------------
# The Hessian of a network may have negative eigenvalues. With a damping below their size,
# :math:`C + \lambda I` is indefinite, and conjugate gradients are not defined. They stop at the
# first direction that shows it, and say what can be done:

small = uw.Influence(model, F.cross_entropy, "cg", curvature="hessian", damping=0.001)
small.fit((x, y))
try:
    small.scores(wine.test)
except uw.NegativeCurvatureError as error:
    print(error)

# %%
# The generalised Gauss-Newton matrix has no negative eigenvalue, so it takes any damping above
# zero:

ggn = uw.Influence(model, F.cross_entropy, "cg", curvature="ggn", damping=0.001)
mean = ggn.fit((x, y)).scores(wine.test).mean()
print(f"steps: {ggn.certificate.steps}, residual {ggn.certificate.residual_max:.0e}")
print(f"flipped among the ten lowest: {is_flipped[mean.values.argsort()[:10]].sum()}")
