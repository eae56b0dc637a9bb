"""
Can the scores be believed?
===========================

A score is a claim: without this training row, the loss of that test row would be so much higher.
Such a claim can be tested, by training again without the row. Here it is tested on a small network
for handwritten digits: first without training anything again, then with a few dozen trainings.
"""

# %%
# Data and model
# --------------
# 500 images of 8 × 8 pixels to train on, 150 to ask questions about. Another 500 are held out. They
# are drawn as the training rows were, and neither the training nor the test sees them.

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import upweight as uw
from upweight import evaluate
from upweight.report import evaluation_plots as plots

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, held_out, test = [(x[rows], y[rows]) for rows in order[:1150].split([500, 500, 150])]

# %%
# How the network is trained is written down once, since it will be trained again:

epochs = 60
training = {
    "epochs": epochs,
    "batch_size": 50,
    "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "scheduler": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs),
}


def make_model(seed: int) -> nn.Module:
    return uw.MLP([64, 32, 10], nn.Tanh, seed=seed)


model = make_model(0)
history = uw.train(model, F.cross_entropy, train, **training)
with torch.no_grad():
    print(f"right on test rows: {(model(test[0]).argmax(1) == test[1]).float().mean():.1%}")

# %%
# The damping
# -----------
# With ``damping="auto"``, `fit` chooses the damping λ from the held-out rows. It takes away a
# twentieth of the training rows, predicts their loss without them by one Newton step, and does so
# for every twentieth. A small λ predicts a large loss, a large one the training loss. The loss that
# rows have without being trained on is known: it is that of the held-out rows. λ is where the two
# agree.

influence = uw.Influence(model, F.cross_entropy, damping="auto")
influence.fit(train, held_out=held_out)
choice = influence.damping_choice
print(f"λ = {choice.value:.2g} ({choice.low:.2g} to {choice.high:.2g}), by {choice.how}")

# %%
# In parentheses, where the two differ by one standard error. The λ that were tried, with the
# standard error of what they predict:

with torch.no_grad():
    loss = F.cross_entropy(model(held_out[0]), held_out[1], reduction="none")
tried = choice.tried
figure, ax = plt.subplots(layout="constrained")
ax.errorbar(tried.index, tried["predicted"], tried["error"], fmt="o-", capsize=3)
ax.axhline(loss.mean(), color="grey", linestyle="--")
ax.annotate("loss of held-out rows", (tried.index[-1], loss.mean()), ha="right", va="bottom")
ax.axvline(choice.value, color="grey", linewidth=0.8)
ax.annotate(f" λ = {choice.value:.2g}", (choice.value, tried["predicted"].max()), va="top")
ax.set(xscale="log", xlabel="damping λ", ylabel="predicted loss of left-out rows")
ax.spines[["top", "right"]].set_visible(False)

# %%
# Where no rows can be spared, the record of the training gives an estimate. It needs the steps, the
# mean learning rate, the weight decay and the momentum:

record = uw.TrainingRecord(
    steps=history.steps,
    learning_rate=history.losses["learning_rate"].mean(),
    weight_decay=1e-3,
    momentum=0.9,
)
print(f"λ = {record.damping:.2g}")

# %%
# A check without retraining
# --------------------------
# `check` looks at what can be seen of a trained model. Is it near a minimum of its loss? Is the
# system solved, and does the order of the rows hang on λ? And how many rows can go before the
# model leaves the region in which it is nearly linear in its parameters?

influence.check(test)

# %%
# *Minimum* is fair: sixty epochs end before the loss is minimal. The damping stands for that.
# *Other dampings* says that λ should not be guessed here.
#
# A check with retraining
# -----------------------
# Nothing of this proves that the scores are true. So the network is trained on thirty random halves
# of the rows, with three seeds each. `Retraining` trains copies of a small model together, which
# makes the ninety trainings cheap. It takes the same options as `train`.

refit = uw.Retraining(make_model, F.cross_entropy, train, test, **training)
check = influence.check(test, refit=refit, subsets=30, seeds=3)
check

# %%
# *LDS*, the linear datamodeling score, is a rank correlation: for a test row, do the predictions
# order the thirty halves as the retrained networks do? 1 is perfect, 0 is chance. What is compared
# is the margin of a test row, the log odds of its label, which does not saturate as a loss does.
#
# All halves and test rows in one plot: how much worse than on average each test row does after a
# half is left out, as predicted and as it came out.

figure, axes = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
actual = check.actual - check.actual.mean(0)
for ax, values in zip(axes, (check.first_order, check.predicted), strict=True):
    plots.plot_predicted_vs_actual(values - values.mean(0), actual, ax=ax)
for ax, title in zip(axes, ("sum of influences", "one Newton step"), strict=True):
    ax.set_title(title, loc="right")

# %%
# The Newton step has the right sizes. The sum has much of the order, but its effects are too small:
# where the missing rows held the model in place, those that are left hold it less.
#
# The check has looked at other dampings too. Held-out rows know nothing of retraining, and the λ
# that they chose is near the top of both curves. A λ that is much too small costs more than one
# that is too large, above all in the Newton step.

ax = plots.plot_damping(check.dampings, plt.subplots(layout="constrained")[1])

# %%
# What if a group were gone?
# --------------------------
# `predict` answers without training. The groups may be anything: here random ones of growing size,
# all rows of one digit but five, and the rows that help the test rows most.

generator = torch.Generator().manual_seed(1)
shuffled = torch.randperm(500, generator=generator)
mean = influence.mean_scores(test)
groups = {
    "5 at random": shuffled[:5],
    "50 at random": shuffled[5:55],
    "150 at random": shuffled[55:205],
    "25 most helpful": mean.top(25)["row"].to_numpy(),
    "25 most harmful": mean.top(25, harmful=True)["row"].to_numpy(),
    "nearly all eights": (train[1] == 8).nonzero()[5:, 0],
}
prediction = influence.predict(test, groups)
prediction

# %%
# `nonlinearity` compares the predicted losses with their linear part. Where it comes near 1, the
# step is too long to be trusted. Now the same groups by training without them, five seeds each. For
# a loss, lower is better; a positive effect says that the group helps.

refit_loss = uw.Retraining(make_model, F.cross_entropy, train, test, **training, output="loss")
effects = evaluate.actual_effects(
    refit_loss, 500, list(groups.values()), higher_is_better=False, seeds=5
)
table = prediction.summary()[["rows", "first_order", "change", "nonlinearity"]]
table.assign(actual=effects.mean(1)).style.format(precision=4)

# %%
# A few rows at random hardly matter: what they do is lost in the noise of training. For the other
# groups the Newton step (`change`) has the right sign and much of the size. It is least right about
# the eights, where a `nonlinearity` above 1 has warned of it. The sum of influences (`first_order`)
# does not see that rows of a kind stand in for each other. It takes nearly all eights for
# dispensable, since each of them is, as long as the others are there.
#
# Other scores
# ------------
# The retrained halves can judge any scores. Products of gradients (`grad_dot`, `grad_cos`) know no
# curvature. An ensemble averages over networks of several seeds: part of every score is the luck of
# one training. The networks are at hand, since `Retraining` returns models as well.

masks, outputs = check.retrained.masks, check.retrained.mean
dropped = torch.from_numpy(~masks)
models = refit.models(np.ones((5, 500), dtype=bool), range(5))
members = [uw.Influence(m, F.cross_entropy, damping=choice.value).fit(train) for m in models]


def newton(member: uw.Influence) -> np.ndarray:
    # minus the margin, which is lower where the model does better
    return -member.predict(test, dropped, test_loss="margin").after.numpy()


by_newton = {
    "Newton step, 5 networks": np.mean([newton(member) for member in members], axis=0),
    "Newton step": newton(influence),
}
by_sum = {
    "influence, 5 networks": uw.ensemble(m.scores(test, test_loss="margin") for m in members),
    "influence": influence.scores(test, test_loss="margin"),
    "grad_cos": uw.grad_cos(model, F.cross_entropy, train, test),
    "grad_dot": uw.grad_dot(model, F.cross_entropy, train, test),
}
found = {name: evaluate.prediction_score(p, outputs) for name, p in by_newton.items()}
found |= {name: evaluate.lds(s.values, masks, outputs) for name, s in by_sum.items()}
for name, one in found.items():
    print(f"{name:24} {one}")

# %%
# Retrained outputs vary by seed, too. The noise ceiling is what the truth itself, without the luck
# of three seeds, would score: no method can be expected to pass it.

ceiling = evaluate.noise_ceiling(check.retrained.outputs)
print(ceiling)
ax = plots.plot_lds(found, ceiling.ceiling, ax=plt.subplots(layout="constrained")[1])
