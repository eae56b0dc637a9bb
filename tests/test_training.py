"""Data sets, label flips, networks and training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import upweight as uw


def test_wine_is_split_and_scaled_on_the_training_part() -> None:
    wine = uw.load_wine()
    x, y = wine.train
    assert [len(part[0]) for part in (wine.train, wine.validation, wine.test)] == [106, 18, 54]
    assert x.min() == 0.0
    assert x.max() == 1.0
    assert float(wine.test[0].max()) != 1.0
    rows = [*wine.train_rows, *wine.validation_rows, *wine.test_rows]
    assert sorted(rows) == list(range(178))
    assert len(wine.feature_names) == x.shape[1] == 13
    assert set(y.tolist()) == {0, 1, 2}


def test_wine_depends_on_its_seed_only() -> None:
    assert torch.equal(uw.load_wine(seed=3).train[0], uw.load_wine(seed=3).train[0])
    assert not torch.equal(uw.load_wine(seed=3).train[0], uw.load_wine(seed=4).train[0])
    with pytest.raises(ValueError, match=r"train \+ test < 1"):
        uw.load_wine(0.8, 0.3)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 30), c=st.integers(2, 5), data=st.data())
def test_flipped_rows_and_no_others_change(n: int, c: int, data: st.DataObject) -> None:
    labels = torch.randint(c, (n,), generator=torch.Generator().manual_seed(n))
    count = data.draw(st.integers(0, n))
    changed, flipped = uw.flip_labels(labels, count, classes=c, seed=c)
    assert len(flipped) == count
    assert (changed != labels).nonzero().flatten().tolist() == flipped.tolist()
    assert int(changed.min()) >= 0
    assert int(changed.max()) < c


def test_flips_that_make_no_sense_are_refused() -> None:
    y = torch.tensor([0, 1, 1])
    for action, message in (
        (lambda: uw.flip_labels(y), "either count or rows"),
        (lambda: uw.flip_labels(y, 1, rows=[0]), "either count or rows"),
        (lambda: uw.flip_labels(y, 4), "from 0 to 3; got 4"),
        (lambda: uw.flip_labels(y.float(), 1), "integer labels"),
        (lambda: uw.flip_labels(torch.zeros(3).long(), 1), "at least two classes"),
    ):
        with pytest.raises(ValueError, match=message):
            action()


def data(n: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-1, 1, n)[:, None]
    return x, 3 * x + 1


def fit(**options: object) -> tuple[nn.Module, uw.History]:
    model = uw.MLP([1, 1], seed=0)
    settings = {"epochs": 60, "optimizer": lambda p: torch.optim.Adam(p, lr=0.1), **options}
    return model, uw.train(model, F.mse_loss, data(), **settings)


def test_training_finds_the_line() -> None:
    model, history = fit()
    assert history.losses["train"].iloc[-1] < 1e-3
    assert history.steps == 60 * 2  # batches of 32 and 18
    assert not model.training


def test_recorded_losses_are_means_over_rows() -> None:
    for loss in (F.mse_loss, nn.MSELoss(reduction="sum"), nn.MSELoss(reduction="none")):
        model = uw.MLP([1, 1], seed=0)
        history = uw.train(
            model, loss, data(), epochs=1, optimizer=lambda p: torch.optim.SGD(p, lr=1e-6)
        )
        with torch.no_grad():
            wanted = float(F.mse_loss(model(data()[0]), data()[1]))
        assert history.losses["train"].item() == pytest.approx(wanted, rel=1e-5)


def test_seed_decides_everything_and_global_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    a, b, c = fit(seed=1)[0], fit(seed=1)[0], fit(seed=2)[0]
    assert torch.equal(a[0].weight, b[0].weight)  # type: ignore[index]
    assert not torch.equal(a[0].weight, c[0].weight)  # type: ignore[index]
    assert torch.equal(state, torch.random.get_rng_state())


def test_early_stopping_goes_back_to_the_best_weights() -> None:
    x = torch.linspace(-1, 1, 9)[:, None]
    held_out = (x, -3 * x)  # the opposite of what is learnt: the validation loss soon rises
    model, history = fit(validation=held_out, patience=4)
    losses = history.losses["validation"]
    assert len(losses) < 60
    assert history.best_epoch == losses.idxmin()
    with torch.no_grad():
        assert float(F.mse_loss(model(x), held_out[1])) == pytest.approx(losses.min(), rel=1e-5)


def test_schedule_is_stepped_once_an_epoch() -> None:
    _, history = fit(epochs=4, scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4))
    assert history.losses["learning_rate"].tolist() == pytest.approx(
        [0.1, 0.08535534, 0.05, 0.01464466]
    )


def test_bad_training_is_refused() -> None:
    with pytest.raises(ValueError, match="epochs"):
        fit(epochs=0)
    with pytest.raises(ValueError, match="validation"):
        fit(patience=3)
    with pytest.raises(ValueError, match="two positive widths"):
        uw.MLP([3])
    with pytest.raises(FloatingPointError, match="diverged"):
        fit(optimizer=lambda p: torch.optim.SGD(p, lr=1e30))


def test_numpy_features_are_cast_to_the_model() -> None:
    x = np.random.default_rng(0).normal(size=(8, 3))
    history = uw.train(uw.MLP([3, 1], seed=0), nn.functional.mse_loss, (x, x[:, :1]), epochs=1)
    assert history.steps == 1


def test_the_record_is_that_of_stochastic_gradient_descent():
    x = torch.linspace(-1, 1, 10)[:, None]

    def record(optimizer, **options):
        model = uw.MLP([1, 1], seed=0)
        options = {"epochs": 4, "batch_size": 4, "optimizer": optimizer, **options}
        return uw.train(model, F.mse_loss, (x, 2 * x), progress=False, **options).record

    halved = {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5)}
    found = record(lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5, weight_decay=0.1), **halved)
    assert (found.steps, found.weight_decay, found.momentum) == (12, 0.1, 0.5)
    assert found.learning_rate == pytest.approx(0.15)
    assert found.damping == pytest.approx(0.1 + 0.5 / (0.15 * 12))
    assert record(torch.optim.Adam) is None
    assert record(lambda p: torch.optim.SGD([{"params": p}], lr=0.1, maximize=True)) is None
