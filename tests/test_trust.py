"""`Influence.check`: what it finds in good and bad models, and against retraining."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upweight as uw
from cases import make
from matrices import draw
from upweight.evaluate import RetrainingWarning
from upweight.trust import Check, Finding
from upweight.trust.check import DAMPINGS

DECAY = 0.03


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = draw(n, 4, seed=seed)
    return x, (x @ draw(4, 3, seed=100) + draw(n, 3, seed=seed + 1)).argmax(1)


TRAIN, TEST = rows(80, 1), rows(20, 5)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, weight_decay=DECAY)


def make_model(seed: int) -> nn.Module:
    return uw.MLP([4, 3], seed=seed).double()


TRAINING: dict[str, Any] = {"epochs": 150, "optimizer": sgd, "batch_size": 100}


@functools.cache
def trained(seed: int = 0) -> nn.Module:
    model = make_model(seed)
    uw.train(model, F.cross_entropy, TRAIN, seed=seed, progress=False, **TRAINING)
    return model


def fit(model: nn.Module | None = None, method: Any = "direct", **options: Any) -> uw.Influence:
    options = {"damping": DECAY, **options}
    influence = uw.Influence(model or trained(), F.cross_entropy, method, **options)
    return influence.fit(TRAIN)


def by_name(found: Check) -> dict[str, Finding]:
    return {finding.what: finding for finding in found.findings}


WITHOUT_REFIT = ["minimum", "loss", "solves", "damping", "other dampings", "nonlinearity"]


def test_a_good_model() -> None:
    found = fit().check(TEST)
    assert [f.what for f in found.findings] == WITHOUT_REFIT
    verdicts = {f.what: f.verdict for f in found.findings}
    assert verdicts.pop("damping") == "fair"  # given by hand
    assert set(verdicts.values()) == {"good"}
    assert found.verdict == "fair"
    assert found.sentence.startswith("Nothing speaks strongly against these scores. Damping: given")
    # the weight decay shows in the gradient
    assert f"beside a weight decay of {DECAY}" in by_name(found)["minimum"].value
    assert found.predicted is found.actual is found.retrained is None


def test_a_damping_by_held_out_rows_is_good() -> None:
    influence = uw.Influence(trained(), F.cross_entropy, damping="auto")
    found = influence.fit(TRAIN, held_out=rows(40, 9)).check(TEST)
    assert influence.damping_choice is not None
    assert influence.damping_choice.how == "held-out"
    assert by_name(found)["damping"].verdict == "good"
    assert found.sentence == (
        "These scores can be believed as far as can be seen without retraining."
    )


def test_a_model_that_was_not_trained() -> None:
    found = fit(make_model(3)).check(TEST)
    assert by_name(found)["minimum"].verdict == "poor"
    assert found.verdict == "poor"
    assert found.sentence.startswith("Do not rely on these scores yet. Minimum: the model is not")


def test_a_huge_damping() -> None:
    finding = by_name(fit(damping=100.0).check(TEST))["damping"]
    assert finding.verdict == "poor"
    assert "products of gradients" in finding.meaning


@pytest.mark.slow
def test_an_approximation() -> None:
    model = uw.MLP([4, 6, 3], nn.Tanh, seed=0).double()
    uw.train(model, F.cross_entropy, TRAIN, progress=False, **TRAINING)
    finding = by_name(fit(model, "ekfac").check(TEST))["solves"]
    assert finding.verdict == "fair"
    assert finding.value.startswith("ekfac: largest residual")
    assert by_name(fit(model, "ekfac").refine().check(TEST))["solves"].verdict == "good"


@pytest.mark.parametrize(
    "method", ["cg", uw.LiSSA(), uw.Arnoldi(rank=5), uw.Arnoldi(rank=5, start="test"), "auto"]
)
def test_every_method_can_be_checked(method: Any) -> None:
    influence = fit(method=method)
    before = influence.certificate.to_dict()
    found = influence.check(TEST)
    assert [f.what for f in found.findings] == WITHOUT_REFIT
    assert "no answer" not in repr(found)
    assert influence.certificate.to_dict() == before
    assert influence.damping == DECAY


@pytest.mark.parametrize("method", ["direct", "cg"])
def test_an_indefinite_curvature_is_a_finding_and_no_error(method: str) -> None:
    case = make("mlp")
    influence = uw.Influence(case.model, case.loss, method, curvature="hessian", damping=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("upweight.inverse.direct.warn_of_indefinite", _note_alone)
        found = influence.fit(case.train).check(case.test)
    findings = by_name(found)
    assert findings["damping"].verdict == "poor"
    assert "C + λI is indefinite" in findings["damping"].meaning
    assert findings["nonlinearity"].value == "no answer"
    assert "curvature='ggn'" in findings["nonlinearity"].meaning
    assert found.sentence.startswith("Do not rely")


def _note_alone(certificate: Any, shifted: Tensor, damping: float) -> None:
    certificate.facts["negative eigenvalues"] = int((shifted < 0).sum())


def test_nothing_is_touched() -> None:
    case = make("batch_norm_and_dropout")
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    influence = uw.Influence(case.model, case.loss, damping=0.05).fit(case.train)
    influence.scores(case.test)
    told, scores = influence.certificate.to_dict(), influence.scores(case.test).values
    told = influence.certificate.to_dict()
    influence.check(case.test)
    assert influence.certificate.to_dict() == told
    assert case.model.training
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())
    assert torch.equal(influence.scores(case.test).values, scores)


def test_a_loss_that_may_be_negative() -> None:
    """Likelihoods: the gain is relative to the size of the loss."""
    case = make("regression")

    def likelihood(output: Tensor, target: Tensor) -> Tensor:
        return ((output - target).square() / 2 - 10.0).mean()

    influence = uw.Influence(case.model, likelihood, damping=0.05).fit(case.train)
    finding = by_name(influence.check(case.test))["minimum"]
    # the mean loss is about −10, and no step gains 10
    assert 0 < float(finding.value.split()[-2].rstrip(",")) < 100


@pytest.mark.parametrize("n", [2, 3, 7])
def test_few_rows(n: int) -> None:
    train = TRAIN[0][:n], TRAIN[1][:n]
    influence = uw.Influence(trained(), F.cross_entropy, damping=0.1).fit(train)
    value = by_name(influence.check(TEST))["nonlinearity"].value
    # one row is the least that can be taken away
    assert value.startswith({2: "50 %", 3: "33 %", 7: "14 %"}[n])


# --- other seeds
# -------------------------------------------------------------------------------


def test_other_seeds() -> None:
    found = fit().check(TEST, others=[fit(trained(1)), fit(trained(2))])
    finding = by_name(found)["other seeds"]
    # the problem is convex: all seeds end at one model
    assert finding.verdict == "good"
    assert "over 2 other model(s)" in finding.value
    assert "rank correlation 1.00" in finding.value
    worse = by_name(fit().check(TEST, others=[fit(make_model(7))]))["other seeds"]
    assert worse.verdict == "poor"
    few = uw.Influence(trained(1), F.cross_entropy, damping=0.1)
    with pytest.raises(ValueError, match="same 80 training rows; got one fitted on 20"):
        fit().check(TEST, others=[few.fit(TEST)])
    with pytest.raises(RuntimeError, match="call fit"):
        fit().check(TEST, others=[uw.Influence(trained(1), F.cross_entropy, damping=0.1)])


# --- against retraining
# -------------------------------------------------------------------------------


def retraining(**options: Any) -> uw.Retraining:
    return uw.Retraining(make_model, F.cross_entropy, TRAIN, TEST, **{**TRAINING, **options})


@functools.cache
def checked() -> Check:
    return fit().check(TEST, refit=retraining(), subsets=20, seeds=2)


def test_against_retraining() -> None:
    found = checked()
    assert found.retrained is not None
    assert found.predicted is not None
    assert found.first_order is not None
    assert found.actual is not None
    finding = found.findings[-1]
    assert finding.what == "retraining"
    assert finding.verdict == "good"
    assert found.sentence.startswith("These scores can be believed: retraining agrees with them (")
    assert found.predicted.shape == found.first_order.shape == found.actual.shape == (20, 20)
    # margins with a minus: lower is better
    assert np.allclose(found.actual, -found.retrained.outputs.mean(1))
    predicted = fit().predict(TEST, ~found.retrained.masks, test_loss="margin")
    assert np.allclose(found.predicted, predicted.after.numpy(), atol=1e-3)
    table = found.dampings.set_index("factor")
    assert list(table.index) == list(DAMPINGS)
    assert np.allclose(table["damping"], DECAY * np.array(DAMPINGS))
    assert table.loc[1.0, "newton"] > 0.9
    assert f"LDS {table.loc[1.0, 'sum']:.2f} for sums" in finding.value
    # the training is the same for all seeds but for round-off
    assert "noise allows 1.00" in finding.value
    slope = float(finding.value.split("slope ")[1].split()[0])
    assert 0.8 < slope < 1.25


@pytest.mark.slow
def test_losses_instead_of_margins() -> None:
    own = retraining(output="loss")
    found = fit().check(TEST, refit=own, subsets=4, seeds=1)
    assert found.retrained is not None
    assert found.actual is not None
    assert np.allclose(found.actual, found.retrained.outputs.mean(1))
    assert "noise" not in found.findings[-1].value  # one seed does not tell

    def refit(chosen: np.ndarray, seed: int) -> np.ndarray:
        return own(chosen, seed)

    plain = fit().check(TEST, refit=refit, subsets=4, seeds=1)
    assert plain.actual is not None
    assert np.allclose(plain.actual, found.actual)


def test_a_refit_that_has_nothing_to_do_with_the_rows() -> None:
    def refit(chosen: np.ndarray, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=20)

    found = fit().check(TEST, refit=refit, subsets=20, seeds=2)
    finding = found.findings[-1]
    assert finding.verdict == "poor"
    assert "take more seeds" in finding.meaning
    assert "Retraining: sums of the scores order 20 random halves of the rows not as" in (
        found.sentence
    )


def test_a_refit_of_constants() -> None:
    found = fit().check(TEST, refit=lambda chosen, seed: np.arange(20.0), subsets=5)
    finding = found.findings[-1]
    assert (finding.what, finding.verdict) == ("retraining", "poor")
    assert finding.value == "the same outputs from every subset"
    assert "does not depend on its rows" in found.sentence
    assert found.retrained is not None
    assert "nan" not in repr(found)


def test_some_test_rows_that_never_move() -> None:
    own = retraining(output="loss")

    def refit(chosen: np.ndarray, seed: int) -> np.ndarray:
        outputs = own(chosen, seed)
        outputs[:5] = 1.0
        return outputs

    finding = fit().check(TEST, refit=refit, subsets=4, seeds=1).findings[-1]
    assert "nan" not in finding.value


@pytest.mark.slow
def test_some_runs_that_fail() -> None:
    own = retraining()
    count = 0

    def refit(chosen: np.ndarray, seed: int) -> np.ndarray:
        nonlocal count
        count += 1
        if count <= 4:
            raise FloatingPointError("diverged")
        return own(chosen, seed)

    with pytest.warns(RetrainingWarning, match="4 of 16 runs failed"):
        found = fit().check(TEST, refit=refit, test_loss="margin", subsets=8, seeds=2)
    assert found.actual is not None
    # both seeds of the first two subsets
    assert found.actual.shape == (6, 20)
    assert "6 random halves" in found.findings[-1].meaning


def test_too_few_runs_that_work() -> None:
    own, runs = retraining(), iter(range(16))

    def refit(chosen: np.ndarray, seed: int) -> np.ndarray:
        if next(runs) >= 2:
            raise FloatingPointError("diverged")
        return own(chosen, seed)

    with pytest.warns(RetrainingWarning, match="14 of 16 runs failed"):
        found = fit().check(TEST, refit=refit, test_loss="margin", subsets=16, seeds=1)
    assert found.findings[-1].value == "2 of 16 subsets worked"
    assert "fewer than three" in found.sentence
    assert found.retrained is not None
    assert len(found.retrained.failures) == 14


@pytest.mark.slow
def test_a_damping_that_cannot_be_solved_is_a_gap_in_the_table() -> None:
    """The Hessian with a tenth of this λ is indefinite, with λ it is not."""
    case = make("mlp")
    hessian = uw.Hessian(uw.EmpiricalRisk(case.model, case.loss, case.train)).dense()
    lowest = float(torch.linalg.eigvalsh(hessian).min())
    influence = uw.Influence(case.model, case.loss, curvature="hessian", damping=-8 * lowest)
    outputs = draw(40, case.m).numpy()
    found = influence.fit(case.train).check(
        case.test, refit=lambda chosen, seed: outputs[chosen].mean(0), subsets=8, seeds=1
    )
    table = found.dampings.set_index("factor")
    assert np.isnan(table.loc[0.1, "newton"])
    assert not np.isnan(table.loc[0.1, "sum"])
    assert not table.loc[1.0].isna().any()
    assert by_name(found)["other dampings"].verdict in ("good", "fair", "poor")


@pytest.mark.slow
def test_a_store_resumes(tmp_path: Path) -> None:
    calls = 0
    own = retraining()

    def refit(chosen: np.ndarray, seed: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        return own(chosen, seed)

    refit.fingerprint = own.fingerprint  # type: ignore[attr-defined]
    options: dict[str, Any] = {"test_loss": "margin", "subsets": 4, "seeds": 1, "store": tmp_path}
    first = fit().check(TEST, refit=refit, **options)
    assert calls == 4
    again = fit().check(TEST, refit=refit, **options)
    assert calls == 4
    assert again.sentence == first.sentence


# --- text
# -------------------------------------------------------------------------------


def test_it_is_json_and_html() -> None:
    found = Check((Finding("<b>", "v" * 80 + "<i>", "fair", "m" * 80),), "Is <1.")
    html = found._repr_html_()
    assert "<b>" not in html
    assert "<i>" not in html
    assert "v" * 80 in html  # whole sentences
    assert "Is &lt;1." in html
    told = json.loads(json.dumps(checked().to_dict()))
    assert told["verdict"] == checked().verdict
    assert told["sentence"] == checked().sentence
    assert [f["what"] for f in told["findings"]] == [*WITHOUT_REFIT, "retraining"]
    frame = checked().to_frame()
    assert list(frame.columns) == ["what", "value", "verdict", "meaning"]
    assert repr(checked()).endswith(checked().sentence)


# --- what is refused, before anything is trained
# -------------------------------------------------------------------------------


def no_training(chosen: np.ndarray, seed: int) -> np.ndarray:
    raise AssertionError("nothing should be trained")


def test_bad_arguments() -> None:
    influence = fit()
    for subsets in (0, 2):
        with pytest.raises(ValueError, match=f"at least 3 subsets to rank; got {subsets}"):
            influence.check(TEST, refit=no_training, subsets=subsets)
    with pytest.raises(ValueError, match="expected how many seeds"):
        influence.check(TEST, refit=no_training, seeds=0)
    with pytest.raises(TypeError, match="expected refit"):
        influence.check(TEST, refit=3)
    fewer = uw.Retraining(make_model, F.cross_entropy, TRAIN, rows(3, 1), **TRAINING)
    with pytest.raises(ValueError, match="the same 20 test rows; that one has 3"):
        influence.check(TEST, refit=fewer)
    other = uw.Retraining(make_model, F.cross_entropy, TEST, TEST, **TRAINING)
    with pytest.raises(ValueError, match="the same 80 training rows; that one has 20"):
        influence.check(TEST, refit=other)
    with pytest.raises(ValueError, match="measures 'margin' of the test rows"):
        influence.check(TEST, refit=retraining(), test_loss="loss")
    with pytest.raises(ValueError, match="one number for each of the 20 test rows; it gave 3"):
        influence.check(TEST, refit=lambda chosen, seed: np.ones(3), subsets=3, seeds=1)
    one = uw.Influence(trained(), F.cross_entropy, damping=0.1)
    one.fit((TRAIN[0][:1], TRAIN[1][:1]))
    with pytest.raises(ValueError, match="two training rows; got one"):
        one.check(TEST)
    with pytest.raises(TypeError, match="one λ"):
        fit(blocks="parameter", damping={"0.weight": 0.1, "0.bias": 0.1}).check(TEST)
    with pytest.raises(ValueError, match="test data"):
        influence.check((TEST[0][:, :2], TEST[1]))
