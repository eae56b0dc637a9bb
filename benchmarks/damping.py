"""Which rule finds the damping that predicts retraining best?

    .venv/bin/python benchmarks/damping.py [--quick]

Writes ``benchmarks/results/damping.json``. For several trainings on several tables, half subsets
are retrained (`upweight.Retraining`, several seeds each) and every rule's λ is judged by the linear
datamodeling score (LDS) of the model that was trained on all rows: for sums of influences, and for
one Newton step on the remaining rows. The rules see no retrained model.

============  ====================================================================================
``held-out``  where the predicted loss of left-out training rows is that of held-out rows
``record``    weight decay + (1 − momentum) / (mean learning rate × steps)
``plain``     weight decay + 1 / (mean learning rate × steps), without the momentum
``scale``     the mean eigenvalue of the curvature
``decay``     the weight decay alone, where there is any
``auto, …``   what ``damping="auto"`` takes with held-out rows, and with the record: the larger of
              theirs and the mean eigenvalue, unless the model is linear in its parameters
``best``      the best of a grid, chosen by looking at the truth
============  ====================================================================================
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from tables import RESULTS, stamp, write
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import upweight as uw
from upweight.damping import DampingChoice, by_held_out, choose_damping
from upweight.evaluate import prediction_score, random_subsets, retrain
from upweight.inverse.spectrum import mean_eigenvalue

OUT = RESULTS / "damping.json"
GRID = tuple(float(x) for x in np.geomspace(1e-4, 1.0, 13))
# Of the mean eigenvalue of the curvature.
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """A table and a training."""

    name: str
    table: str
    hidden: int
    epochs: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    adam: bool = False
    cosine: bool = False
    batch_size: int = 50
    wrong: float = 0.0  # share of the labels of training and held-out rows that are flipped


SETTINGS = (
    Setting("digits, cosine, decay 1e-3", "digits", 32, 100, 0.1, 0.9, 1e-3, cosine=True),
    Setting("digits, cosine, decay 1e-4", "digits", 32, 100, 0.1, 0.9, 1e-4, cosine=True),
    Setting("digits, short, no momentum", "digits", 32, 40, 0.1),
    Setting("digits, momentum, no decay", "digits", 32, 40, 0.02, 0.9),
    Setting("digits, Adam", "digits", 32, 40, 0.003, adam=True),
    Setting("digits, 10 % wrong labels", "digits", 32, 60, 0.1, 0.9, 1e-3, cosine=True, wrong=0.1),
    Setting("digits, linear", "digits", 0, 100, 0.1, 0.9, 1e-3, cosine=True),
    Setting("wine", "wine", 16, 200, 0.1, 0.9, 1e-3, cosine=True, batch_size=16),
    Setting("breast cancer", "breast_cancer", 16, 100, 0.1, 0.9, 1e-3, cosine=True, batch_size=32),
)


def split(setting: Setting) -> tuple[Pair, Pair, Pair, int]:
    """Training rows (half of the table, at most 600), held-out rows and test rows; the classes."""
    load: Any = {"digits": load_digits, "wine": load_wine, "breast_cancer": load_breast_cancer}
    bunch = load[setting.table]()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x, y = np.asarray(bunch.data)[order], np.asarray(bunch.target)[order]
    n = min(600, len(y) // 2)
    low, high = x[:n].min(0), x[:n].max(0)
    x = (x - low) / np.where(high > low, high - low, 1.0)
    inputs, labels = torch.tensor(x).float(), torch.tensor(y).long()
    m = min(300, (len(y) - n) // 2)
    parts = [(inputs[a:b], labels[a:b]) for a, b in ((0, n), (n, n + m), (n + m, n + 2 * m))]
    classes = int(labels.max()) + 1
    for i in (0, 1):
        count = round(setting.wrong * len(parts[i][1]))
        parts[i] = parts[i][0], uw.flip_labels(parts[i][1], count, classes=classes)[0]
    return parts[0], parts[1], parts[2], classes


def optimizer(setting: Setting) -> Callable[[Any], torch.optim.Optimizer]:
    """As `upweight.train` takes it."""
    if setting.adam:
        return lambda p: torch.optim.Adam(p, lr=setting.lr)
    return lambda p: torch.optim.SGD(
        p, lr=setting.lr, momentum=setting.momentum, weight_decay=setting.weight_decay
    )


def rules(setting: Setting, curvature: Any, train: Any, held_out: Any) -> dict[str, Any]:
    """Each rule's λ; None where it does not apply."""
    held = by_held_out(curvature, train, held_out)
    found: dict[str, Any] = {
        "held-out": held.value if isinstance(held, DampingChoice) else None,
        "scale": mean_eigenvalue(curvature),
        "decay": setting.weight_decay or None,
        "auto, held-out": choose_damping(curvature, train, held_out).value,
    }
    if not setting.adam:
        steps = setting.epochs * -(-train.n // setting.batch_size)
        rate = setting.lr * (0.5 if setting.cosine else 1.0)
        decay = setting.weight_decay
        record = uw.TrainingRecord(steps, rate, decay, setting.momentum)
        found["record"] = record.damping
        found["plain"] = uw.TrainingRecord(steps, rate, decay).damping
        found["auto, record"] = choose_damping(curvature, train, record=record).value
        found["auto, both"] = choose_damping(curvature, train, held_out, record).value
    return found


def measure(setting: Setting, subsets: int, seeds: int) -> dict[str, Any]:
    """The λ of every rule, and the LDS at it."""
    train, held_out, test, classes = split(setting)
    sizes = [train[0].shape[1], *([setting.hidden] if setting.hidden else []), classes]
    schedule = (lambda o: CosineAnnealingLR(o, setting.epochs)) if setting.cosine else None
    options: dict[str, Any] = {
        "epochs": setting.epochs,
        "optimizer": optimizer(setting),
        "scheduler": schedule,
        "batch_size": setting.batch_size,
    }
    start = time.perf_counter()
    refit = uw.Retraining(
        lambda seed: uw.MLP(sizes, nn.ReLU, seed=seed), F.cross_entropy, train, test, **options
    )
    masks = random_subsets(len(train[0]), subsets)
    actual = retrain(refit, masks, seeds=seeds).mean
    seconds = time.perf_counter() - start
    model = uw.MLP(sizes, nn.ReLU, seed=1000)
    uw.train(model, F.cross_entropy, train, seed=1000, progress=False, **options)
    influence = uw.Influence(model, F.cross_entropy, damping=1.0).fit(train)
    found = rules(
        setting, influence.curvature_operator, influence.training, influence.risk(held_out)
    )

    def lds(damping: float) -> dict[str, float]:
        influence.damping = damping
        predicted = influence.predict(test, torch.from_numpy(~masks), test_loss="margin")
        sums, newton = (-v.numpy() for v in (predicted.first_order, predicted.after))
        return {
            "damping": damping,
            "sum": prediction_score(sums, actual, bootstrap=0).value,
            "newton": prediction_score(newton, actual, bootstrap=0).value,
        }

    grid = [lds(damping) for damping in GRID]
    lines = {rule: lds(value) for rule, value in found.items() if value is not None}
    mean = mean_eigenvalue(influence.curvature_operator)
    blocks = uw.Influence(model, F.cross_entropy, "ekfac", damping=1.0, certify=0).fit(train)
    shares: list[dict[str, float]] = []
    for share in SHARES:
        blocks.damping = share * mean
        scores = np.asarray(blocks.scores(test, test_loss="margin"))
        line = {"share": share, "exact": lds(share * mean)["sum"]}
        ekfac = prediction_score(masks @ scores.T, actual, bootstrap=0).value
        shares.append(line | {"ekfac": ekfac})
    lines["best"] = max(grid, key=lambda line: line["sum"])
    lines["best for a step"] = max(grid, key=lambda line: line["newton"])
    return {
        "rules": lines,
        "grid": grid,
        "shares": shares,
        "retraining_s": seconds,
        "parameters": influence.training.p,
    }


def main() -> None:
    """Measure all settings, print and keep them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one small setting; writes nothing")
    parser.add_argument("--subsets", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=type(OUT), default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = SETTINGS[-2:-1] if options.quick else SETTINGS
    subsets, seeds = (20, 2) if options.quick else (options.subsets, options.seeds)
    table: dict[str, Any] = {}
    for setting in chosen:
        table[setting.name] = found = measure(setting, subsets, seeds)
        print(f"\n{setting.name} ({found['parameters']} parameters)")
        for rule, line in found["rules"].items():
            print(
                f"  {rule:16} λ {line['damping']:.2e}   LDS of sums {line['sum']:.3f}   "
                f"of a Newton step {line['newton']:.3f}",
                flush=True,
            )
        print("  share of the mean eigenvalue: LDS of sums, exact and by EK-FAC")
        for line in found["shares"]:
            print(f"  {line['share']:16g}   {line['exact']:.3f}   {line['ekfac']:.3f}", flush=True)
    if not options.quick:
        versions = {"upweight": uw.__version__, "torch": torch.__version__}
        settings = {"subsets": subsets, "seeds": seeds}
        write(options.out, stamp() | {"versions": versions, "settings": settings, "table": table})


if __name__ == "__main__":
    main()
