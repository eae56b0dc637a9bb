"""
Find the wrong labels among bottles of wine
===========================================

178 bottles of wine, thirteen measurements each, three cultivars. We give ten training bottles a
wrong label, train a small network, and let influence functions tell which bottles harm it.
"""

# %%
# Data
# ----
# The test part is large on purpose: the mean influence over it is what finds the wrong labels, and
# a mean over more bottles is less noisy. `flip_labels` returns which rows it has changed.

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn

import upweight as uw
from upweight.report import plots

wine = uw.load_wine(seed=2)
x, y = wine.train
y, flipped = uw.flip_labels(y, 10, seed=2)
print(f"{len(x)} training bottles, flipped: {flipped.tolist()}")

# %%
# A model
# -------
# Any trained ``nn.Module`` would do; here is a 13-16-16-3 network and a training loop.

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
# Influence functions describe a model at a minimum of its training loss, so the curves should have
# become flat. And the network should be right often enough for its opinion to count.

x_test, y_test = wine.test
with torch.no_grad():
    predicted = model(x_test).argmax(1)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
plots.plot_losses(history.losses[["train", "validation"]], ax=left)
plots.plot_confusion(y_test, predicted, labels=range(3), ax=right)
print(f"F1 score: {f1_score(y_test, predicted, average='weighted'):.3f}")

# %%
# Influence of rows
# -----------------
# Entry (j, i) of the scores is :math:`g_j^\top (C + \lambda I)^{-1} g_i`, for test bottle j and
# training bottle i. Positive means that the training bottle helps: up-weighting it lowers the test
# loss. Here C is the Hessian of the mean training loss; without ``curvature="hessian"`` it would be
# the generalised Gauss-Newton matrix, which is never indefinite.

influence = uw.Influence(model, F.cross_entropy, curvature="hessian", damping=0.1)
influence.fit((x, y))
scores = influence.scores(wine.test)
print(scores)
print(scores.shape)

# %%
# The mean over all test bottles is one number per training bottle. The flipped ones are far below
# zero.

mean = scores.mean()
is_flipped = np.isin(np.arange(len(x)), flipped)
print(f"flipped: {mean.values[is_flipped].mean():+.3f}")
print(f"others:  {mean.values[~is_flipped].mean():+.3f}")
print(f"ROC AUC: {roc_auc_score(is_flipped, -mean.values):.3f}")
ax = plots.plot_score_distribution(
    mean.values, is_flipped, ax=plt.subplots(layout="constrained")[1]
)

# %%
# These are the rows to look at first:

mean.top(10, harmful=True)

# %%
# Where only the mean is wanted, there is a shortcut. It solves one system of equations instead of
# one per test bottle, whatever the number of test bottles, and gives the same numbers.

quick = influence.mean_scores(wine.test)
print(f"largest difference: {(quick.values - mean.values).abs().max():.1e}")

# %%
# How exact is this?
# ------------------
# The certificate says how well the equations were solved, and what was found on the way.

print(influence.certificate)

# %%
# Damping
# -------
# The damping λ decides which directions of parameter space count. It may be changed after `fit`;
# the Hessian is not computed again. Where λ is smaller than the size of the most negative
# eigenvalue, the damped Hessian is indefinite, and a warning says so.

for damping in (0.05, 0.1, 1.0):
    influence.damping = damping
    values = influence.mean_scores(wine.test).values
    print(f"damping {damping:4}: ROC AUC {roc_auc_score(is_flipped, -values):.3f}")

# %%
# Influence of features
# ---------------------
# In mode "perturbation" every feature of every training bottle has a score: would the test loss
# fall (positive) or rise (negative) if this feature were a little larger? Averaged over all
# training and test bottles:

influence.damping = 0.1
by_feature = influence.mean_scores(wine.test, mode="perturbation")
print(by_feature.values.shape)
names = [name.replace("_", " ") for name in wine.feature_names]
ax = plots.plot_feature_influence(
    by_feature.values.mean(0), names, ax=plt.subplots(layout="constrained")[1]
)

# %%
# Without test data
# -----------------
# Self-influence asks how much a row's own loss rests on the row being there. Rows that had to be
# learnt by heart stand out, and no clean test data is needed.

own = influence.self_influence()
print(f"ROC AUC: {roc_auc_score(is_flipped, own.values):.3f}")
own.top(5)
