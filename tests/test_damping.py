"""The damping that is chosen by `fit`: by held-out rows, by the record of a training, by scale."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upweight as uw
import upweight.damping
import upweight.prediction
from cases import make
from matrices import draw, with_spectrum
from upweight.damping import (
    BLOCK_SCALE,
    FOLDS,
    SCALE,
    by_held_out,
    choose_damping,
    is_linear,
)
from upweight.inverse.spectrum import lowest_eigenvalue, mean_eigenvalue, top_eigenvalue
from upweight.operator import Dense

DECAY = 0.02
DIMENSIONS = 30
Pair = tuple[Tensor, Tensor]


def noisy_rows(n: int, seed: int, wrong: float = 0.1) -> Pair:
    """Rows of three classes in 30 dimensions, some of them with another label."""
    x = draw(n, DIMENSIONS, seed=seed)
    y = (x @ draw(DIMENSIONS, 3, seed=100) + draw(n, 3, seed=seed + 1)).argmax(1)
    other = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < wrong
    return x, torch.where(other, (y + 1) % 3, y)


def solved_logistic(x: Tensor, y: Tensor, decay: float) -> nn.Linear:
    """Softmax regression with weight decay at its minimum, by L-BFGS."""
    model = nn.Linear(x.shape[1], 3).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss = loss + decay / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return model


TRAIN, HELD_OUT = noisy_rows(200, 1), noisy_rows(3000, 5)
MODEL = solved_logistic(*TRAIN, decay=DECAY)


def fitted(held_out: Any = None, model: nn.Module = MODEL, **options: Any) -> uw.Influence:
    options = {"damping": "auto", **options}
    method = options.pop("method", "direct")
    influence = uw.Influence(model, F.cross_entropy, method, **options)
    return influence.fit(TRAIN, held_out=held_out)


def predicted_loss(influence: uw.Influence, damping: float, rows: int = 200) -> Tensor:
    """Losses of left-out training rows by the same folds, each by `predict`, in their order."""
    search = upweight.damping._Search(influence.curvature_operator, influence.training, 0)
    assert len(torch.cat(search.folds).unique()) == rows
    assert len(search.folds) == FOLDS
    own = uw.Influence(MODEL, F.cross_entropy, damping=damping).fit(TRAIN)
    found = own.predict(TRAIN, search.dropped, rtol=1e-10)
    order = search.dropped.T.nonzero()
    return found.after[order[:, 1], order[:, 0]]


# --- by held-out rows
# -------------------------------------------------------------------------------


def test_held_out_rows_find_the_weight_decay() -> None:
    """In truth, the two losses agree at w; but both are means over some rows."""
    influence = fitted(HELD_OUT)
    choice = influence.damping_choice
    assert choice is not None
    assert choice.how == "held-out"
    assert choice.value == influence.damping
    assert choice.high is not None
    assert choice.low is None or choice.low < choice.value
    assert choice.value < DECAY < choice.high
    # the standard error of the losses of 200 left-out rows, 10 % of them, is worth a factor of 3
    assert DECAY / 3 < choice.value < 3 * DECAY


@pytest.mark.slow
def test_the_weight_decay_on_average() -> None:
    found: list[float] = []
    for seed in range(12):
        train = noisy_rows(200, 10 * seed + 11)
        influence = uw.Influence(solved_logistic(*train, DECAY), F.cross_entropy, damping="auto")
        choice = influence.fit(train, held_out=HELD_OUT).damping_choice
        assert choice is not None
        found.append(math.log(choice.value / DECAY) if choice.how == "held-out" else math.nan)
    logs = torch.tensor(found)
    assert int(logs.isnan().sum()) <= 4
    assert abs(float(logs.nanmedian())) < math.log(2)


@pytest.mark.slow
def test_the_prediction_agrees_with_the_held_out_loss() -> None:
    influence = fitted(HELD_OUT)
    with torch.no_grad():
        wanted = float(F.cross_entropy(MODEL(HELD_OUT[0]), HELD_OUT[1]))
    losses = predicted_loss(influence, float(influence.damping))
    assert float(losses.mean()) == pytest.approx(wanted, rel=2e-3)
    choice = influence.damping_choice
    assert choice is not None
    # every λ tried, to the tolerance of the search
    for damping, line in choice.tried.iterrows():
        losses = predicted_loss(influence, float(damping))  # type: ignore[arg-type]
        assert line["predicted"] == pytest.approx(float(losses.mean()), rel=1e-3)
        assert line["error"] == pytest.approx(float(losses.std()) / math.sqrt(200), rel=1e-2)
    assert choice.tried["predicted"].is_monotonic_decreasing


def test_a_step_predicts_the_losses_of_retrained_models() -> None:
    """What the search rests on: left-out losses at λ = w are those after training without them."""
    influence = fitted(HELD_OUT)
    search = upweight.damping._Search(influence.curvature_operator, influence.training, 0)
    predicted = search.predicted(DECAY)
    actual = []
    for fold in search.folds:
        kept = torch.ones(200, dtype=torch.bool)
        kept[fold] = False
        again = solved_logistic(TRAIN[0][kept], TRAIN[1][kept], DECAY)
        with torch.no_grad():
            loss = F.cross_entropy(again(TRAIN[0][fold]), TRAIN[1][fold], reduction="none")
        actual.append(loss)
    with torch.no_grad():
        trained = float(F.cross_entropy(MODEL(TRAIN[0]), TRAIN[1]))
    wanted = float(torch.cat(actual).mean())
    assert predicted - trained == pytest.approx(wanted - trained, rel=0.05)


@pytest.mark.parametrize("method", ["cg", "lissa", uw.Nystroem(rank=93), "auto"])
def test_the_method_does_not_matter(method: Any) -> None:
    assert fitted(HELD_OUT, method=method).damping == pytest.approx(float(fitted(HELD_OUT).damping))


@pytest.mark.slow
def test_batches_and_blocks_of_folds_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = fitted(HELD_OUT).damping
    monkeypatch.setattr(upweight.prediction, "STEP_BYTES", 64 * 93 * 7)
    for batch_size in (70,):
        assert fitted(HELD_OUT, batch_size=batch_size).damping == pytest.approx(wanted, rel=1e-4)


def test_float32() -> None:
    model = nn.Linear(DIMENSIONS, 3)
    model.load_state_dict(MODEL.state_dict())
    assert fitted(HELD_OUT, model).damping == pytest.approx(
        float(fitted(HELD_OUT).damping), rel=0.01
    )


def test_more_rows_than_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows stand for all: their change is added to the mean loss of all."""
    monkeypatch.setattr(upweight.damping, "FOLDED_ROWS", 100)
    with torch.no_grad():
        trained = float(F.cross_entropy(MODEL(TRAIN[0]), TRAIN[1]))
    # far above all eigenvalues nothing changes
    search = upweight.damping._Search(uw.GGN(fitted().training), fitted().training, 0)
    assert search.predicted(1e6) == pytest.approx(trained, rel=1e-5)
    change = (
        predicted_loss(fitted(), DECAY, 100) - fitted().training.losses()[search.dropped.any(0)]
    )
    assert search.predicted(DECAY) == pytest.approx(trained + float(change.mean()), rel=1e-3)


def mean_loss_of(target: float) -> Pair:
    """Rows whose mean loss is this: some held-out ones, right and wrong."""
    with torch.no_grad():
        losses = F.cross_entropy(MODEL(HELD_OUT[0]), HELD_OUT[1], reduction="none")
    order = losses.argsort()
    # the first k of the sorted losses have a mean that grows with k
    means = losses[order].cumsum(0) / torch.arange(1, len(order) + 1)
    rows = order[: int((means <= target).sum()) + 1]
    return HELD_OUT[0][rows], HELD_OUT[1][rows]


def test_a_damping_above_all_eigenvalues() -> None:
    influence = fitted()
    with torch.no_grad():
        trained = float(F.cross_entropy(MODEL(TRAIN[0]), TRAIN[1]))
    top = top_eigenvalue(influence.curvature_operator)
    little = predicted_loss(influence, 30 * top).mean()
    assert trained < float(little)
    choice = fitted(mean_loss_of(float(little))).damping_choice
    assert choice is not None
    assert choice.how == "held-out"
    assert 15 * top < choice.value < 60 * top


def test_held_out_rows_that_nothing_predicts() -> None:
    with torch.no_grad():
        right = MODEL(HELD_OUT[0]).argmax(1)
    better = fitted((HELD_OUT[0], right)).damping_choice
    assert better is not None
    assert better.how == "scale"
    assert "is not above the training loss" in better.why
    wrong = MODEL(HELD_OUT[0]).argmin(1)
    worse = fitted((5 * HELD_OUT[0], wrong)).damping_choice
    assert worse is not None
    assert worse.how == "scale"
    assert "the held-out rows differ from the training rows" in worse.why


def test_in_float32_the_search_does_not_end_at_round_off() -> None:
    """Rows that no λ predicts must not find the λ at which C + λI becomes singular."""
    x, y = TRAIN
    model = nn.Linear(2 * DIMENSIONS, 3)
    # every feature twice: half of the eigenvalues are zero
    model.weight.data = torch.cat([MODEL.weight, MODEL.weight], dim=1).float() / 2
    model.bias.data = MODEL.bias.detach().float()
    train = uw.EmpiricalRisk(model, F.cross_entropy, (torch.cat([x, x], 1), y))
    other = 5 * HELD_OUT[0]
    held_out = uw.EmpiricalRisk(
        model, F.cross_entropy, (torch.cat([other, other], 1), MODEL(HELD_OUT[0]).argmin(1))
    )
    found = by_held_out(uw.GGN(train), train, held_out)
    assert isinstance(found, str)


@pytest.mark.parametrize("n", [1, 2, 3, 15])
def test_few_rows(n: int) -> None:
    train = TRAIN[0][:n], TRAIN[1][:n]
    model = solved_logistic(*train, decay=0.1)
    influence = uw.Influence(model, F.cross_entropy, damping="auto").fit(train, held_out=HELD_OUT)
    choice = influence.damping_choice
    assert choice is not None
    assert choice.value > 0
    assert (n > 1) or "one training row only" in choice.why
    one = uw.Influence(model, F.cross_entropy, damping="auto")
    one.fit(train, held_out=(HELD_OUT[0][:1], HELD_OUT[1][:1]))
    assert one.damping_choice is not None
    assert "inf" not in str(one.damping_choice)


def test_an_outlier() -> None:
    """Overflow counts as a large loss."""
    train = TRAIN[0].clone(), TRAIN[1]
    train[0][0] *= 1e4
    influence = uw.Influence(MODEL, F.cross_entropy, damping="auto")
    choice = influence.fit(train, held_out=HELD_OUT).damping_choice
    assert choice is not None
    assert choice.value > 0
    assert not choice.tried.isna().any().any()


def test_a_network_gets_no_less_than_the_mean_eigenvalue() -> None:
    """Unlike a model that is linear in its parameters."""
    case = make("mlp")
    influence = uw.Influence(
        case.model, case.loss, damping="auto", record=uw.TrainingRecord(10**6, 0.1)
    )
    choice = influence.fit(case.train).damping_choice
    assert choice is not None
    assert choice.how == "scale"
    assert "a network is linear only near its weights" in choice.why
    assert choice.value == pytest.approx(SCALE * mean_eigenvalue(influence.curvature_operator))
    assert "1e-05, by record" in choice.why
    risk = fitted().training
    assert is_linear(risk)
    assert not is_linear(influence.training)


def test_linearity_is_decided_once_and_before_products(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(what: str, answer: object) -> object:
        asked.append(what)
        return answer

    monkeypatch.setattr(upweight.damping, "is_linear", lambda risk: noted("linear", True))
    monkeypatch.setattr(upweight.damping, "mean_eigenvalue", lambda c: noted("mean", 1.0))
    record = uw.TrainingRecord(1000, 0.1)
    assert fitted(HELD_OUT, record=record).damping == record.damping
    assert asked == ["linear"]
    fitted(HELD_OUT)
    assert asked == ["linear"] * 2
    assert fitted().damping == SCALE
    assert asked == ["linear", "linear", "mean"]


# --- by the record and by scale
# -------------------------------------------------------------------------------


def test_the_record() -> None:
    record = uw.TrainingRecord(steps=1000, learning_rate=0.1, weight_decay=0.01, momentum=0.5)
    influence = fitted(record=record)
    assert influence.damping == record.damping == pytest.approx(0.01 + 0.5 / 100)
    assert influence.damping_choice is not None
    assert influence.damping_choice.how == "record"
    assert "1000 steps" in influence.damping_choice.why
    with_rows = fitted(HELD_OUT, record=record).damping_choice
    assert with_rows is not None
    assert with_rows.how == "record"


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"weight_decay": -1.0},
        {"momentum": 1.0},
    ],
)
def test_a_record_that_no_training_has(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected steps"):
        uw.TrainingRecord(**{"steps": 10, "learning_rate": 0.1, **wrong})  # type: ignore[arg-type]


def test_the_record_stands_for_a_training_that_ended_early() -> None:
    """On a quadratic, gradient descent for K steps answers to the data about as with that λ."""
    eigenvalues = torch.logspace(-3, 0, 13).double()
    for momentum in (0.0, 0.9):
        record = uw.TrainingRecord(steps=2000, learning_rate=0.05, momentum=momentum)
        # θ of gradient descent from 0 on ½hθ² − θ, beside 1/(h + λ)
        theta = speed = torch.zeros(13).double()
        for _ in range(record.steps):
            speed = momentum * speed + eigenvalues * theta - 1
            theta = theta - record.learning_rate * speed
        ratio = theta * (eigenvalues + record.damping)
        assert 0.9 < float(ratio.min()) < float(ratio.max()) < 1.35


def test_the_scale() -> None:
    choice = fitted().damping_choice
    assert choice is not None
    dense = fitted().curvature_operator.dense()
    assert choice.value == pytest.approx(SCALE * float(dense.trace()) / 93, rel=0.05)
    assert "Held-out rows" in choice.why
    assert str(choice).startswith("damping 0.1")


@pytest.mark.parametrize(
    "options", [{"method": "ekfac"}, {"method": "kfac"}, {"blocks": "parameter"}]
)
def test_blocks_take_the_scale(options: dict[str, Any]) -> None:
    record = uw.TrainingRecord(100, 0.1)
    influence = fitted(HELD_OUT, record=record, **options)
    assert influence.damping_choice is not None
    assert influence.damping_choice.how == "scale"
    assert influence.damping_choice.why.startswith("between blocks the curvature is taken as zero")
    share = BLOCK_SCALE / SCALE
    assert influence.damping == pytest.approx(share * float(fitted().damping))


def test_a_relative_damping_is_a_share() -> None:
    influence = fitted(HELD_OUT, method=uw.EKFAC(relative="layer"))
    assert influence.damping == BLOCK_SCALE
    assert influence.damping_choice is not None
    assert "neither held-out rows nor a record" in influence.damping_choice.why


def test_no_scale() -> None:
    risk = uw.EmpiricalRisk(MODEL, F.cross_entropy, TRAIN)
    with pytest.raises(ValueError, match="Give a number for the damping"):
        choose_damping(Dense(torch.zeros(93, 93).double()), risk)
    indefinite = Dense(with_spectrum([-3.0, *[0.01] * 92]))
    choice = choose_damping(indefinite, risk)
    assert choice.value == pytest.approx(3 * SCALE, rel=0.05)
    assert "mean is not above 0" in choice.why


# --- indefinite curvatures
# -------------------------------------------------------------------------------


def test_an_indefinite_hessian_gives_way_to_the_ggn() -> None:
    case = make("mlp")
    influence = uw.Influence(case.model, case.loss, curvature="hessian", damping="auto")
    influence.fit(case.train)
    assert influence.damping_choice is not None
    assert "The GGN takes the place of the hessian" in influence.damping_choice.why
    assert isinstance(influence.curvature_operator, uw.GGN)
    assert influence.scores(case.test).values.isfinite().all()


def test_a_definite_hessian_stays() -> None:
    influence = fitted(HELD_OUT, curvature="hessian")
    assert isinstance(influence.curvature_operator, uw.Hessian)
    assert influence.damping == pytest.approx(float(fitted(HELD_OUT).damping), rel=1e-6)


def test_a_curvature_without_a_ggn() -> None:
    """A loss that is not convex in the output: the search itself meets negative curvature."""
    model = nn.Linear(DIMENSIONS, 1).double()
    x = TRAIN[0]
    train = x, x[:, :1] + 0.3 * draw(200, 1, seed=3)
    more = HELD_OUT[0], HELD_OUT[0][:, :1] + 0.6 * draw(3000, 1, seed=4)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (1 + (output - target).square()).log().mean()

    model.weight.data = torch.eye(DIMENSIONS)[:1].double()
    model.bias.data.zero_()
    influence = uw.Influence(model, loss, curvature="hessian", damping="auto")
    influence.fit(train, held_out=more)
    lowest = lowest_eigenvalue(influence.curvature_operator)
    assert lowest + float(influence.damping) > 0


def test_spectrum() -> None:
    matrix = Dense(with_spectrum([-0.5, 0.1, 1.0, 3.0]))
    assert top_eigenvalue(matrix) == pytest.approx(3.0, rel=0.02)
    assert lowest_eigenvalue(matrix) == pytest.approx(-0.5, rel=1e-6)
    assert mean_eigenvalue(matrix) == pytest.approx(0.9, rel=0.5)


# --- what an influence tells of it
# -------------------------------------------------------------------------------


def test_before_and_after_fit() -> None:
    influence = uw.Influence(MODEL, F.cross_entropy, damping="auto")
    assert "damping auto, not fitted" in repr(influence)
    assert influence.damping_choice is None
    with pytest.raises(RuntimeError, match="chosen by fit"):
        _ = influence.damping
    influence.fit(TRAIN)
    first = influence.damping
    assert f"damping {first:g}, fitted" in repr(influence)
    assert influence.scores(HELD_OUT, TRAIN).provenance["damping"] == first
    influence.fit(TRAIN, held_out=HELD_OUT)
    assert influence.damping_choice is not None
    assert influence.damping_choice.how == "held-out"
    influence.damping = 0.5
    assert influence.damping_choice is None
    assert influence.damping == 0.5
    assert influence.inverse.damping == 0.5  # type: ignore[attr-defined]
    influence.fit(TRAIN)
    assert influence.damping == 0.5
    with pytest.raises(ValueError, match="held_out is for damping='auto'"):
        influence.fit(TRAIN, held_out=HELD_OUT)


def test_a_failed_fit_changes_nothing() -> None:
    influence = fitted(HELD_OUT)
    before, choice = influence.damping, influence.damping_choice
    with pytest.raises(ValueError, match="held-out data"):
        influence.fit(TRAIN, held_out=(HELD_OUT[0][:, :3], HELD_OUT[1]))
    assert influence.damping == before
    assert influence.damping_choice is choice


def test_scores_are_those_of_the_number() -> None:
    chosen = fitted(HELD_OUT)
    given = uw.Influence(MODEL, F.cross_entropy, damping=float(chosen.damping)).fit(TRAIN)
    test = HELD_OUT[0][:5], HELD_OUT[1][:5]
    assert torch.equal(chosen.scores(test).values, given.scores(test).values)


def test_a_plan_before_fit() -> None:
    plan = uw.Influence(MODEL, F.cross_entropy, damping="auto").plan(TRAIN, 10)
    assert plan.proposal == uw.Direct()
    assert math.isfinite(plan.work.condition)


@pytest.mark.parametrize("damping", ["Auto", "foo", ""])
def test_words_that_are_no_damping(damping: str) -> None:
    with pytest.raises(TypeError, match="or 'auto'; got"):
        uw.Influence(MODEL, F.cross_entropy, damping=damping)  # type: ignore[arg-type]


@pytest.mark.parametrize("damping", [-0.1, math.nan, math.inf])
def test_numbers_that_are_no_damping(damping: float) -> None:
    with pytest.raises(ValueError, match="expected a damping"):
        uw.Influence(MODEL, F.cross_entropy, damping=damping)


def test_a_record_that_is_none() -> None:
    with pytest.raises(TypeError, match="expected a TrainingRecord"):
        uw.Influence(MODEL, F.cross_entropy, damping="auto", record=0.1)  # type: ignore[arg-type]


BAD_ROWS: dict[str, Any] = {
    "no rows": (HELD_OUT[0][:0], HELD_OUT[1][:0]),
    "other features": (HELD_OUT[0][:, :5], HELD_OUT[1]),
    "another number of classes": (HELD_OUT[0], HELD_OUT[1] + 1),
    "no number": (HELD_OUT[0] * math.nan, HELD_OUT[1]),
    "no labels": HELD_OUT[0],
    "other lengths": (HELD_OUT[0], HELD_OUT[1][:-1]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_held_out_rows_of_the_wrong_form(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^held-out data: "):
        fitted(BAD_ROWS[name])


def test_a_choice_is_a_plain_record() -> None:
    choice = fitted(HELD_OUT).damping_choice
    assert choice is not None
    assert set(dataclasses.asdict(choice)) == {"value", "how", "why", "low", "high", "tried"}
    assert " to " in str(choice)


@pytest.mark.slow
def test_a_network_is_given_the_larger_of_record_and_held_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upweight.damping, "is_linear", lambda risk: False)
    monkeypatch.setattr(upweight.damping, "SCALE", 0.0)
    alone = fitted(HELD_OUT).damping_choice
    assert alone.how == "held-out"
    short, long = uw.TrainingRecord(1, 0.1), uw.TrainingRecord(10**9, 1.0)
    assert fitted(HELD_OUT, record=long).damping == alone.value
    chosen = fitted(HELD_OUT, record=short).damping_choice
    assert (chosen.value, chosen.how) == (short.damping, "record")
    assert f"held-out alone says {alone.value:.3g}" in chosen.why
