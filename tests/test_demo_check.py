"""The check in the report of the demo, in its run folder and on the terminal."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import yaml

from test_report import Page
from upweight.audit import check_report, cli, demo_report
from upweight.audit.check_report import blocks, effects, told_of_damping
from upweight.audit.demo import WineSettings, run_wine, write_run
from upweight.audit.demo_check import WineCheck
from upweight.audit.demo_settings import training_options
from upweight.audit.report import Figure, Paragraph, Report, Section, Table, render
from upweight.evaluate import Retrained, linear_datamodeling_score, random_subsets, retrain
from upweight.stacked import Retraining
from upweight.trust import Check, Finding

TITLE = "Can these scores be believed?"
SMALL = WineSettings(epochs=60, curvature="ggn", halves=8, trainings=1, compare=False)
rng = np.random.default_rng(0)
ACTUAL = rng.normal(size=(6, 4)) + 3


def made(
    verdicts=("good",), predicted=ACTUAL, first=ACTUAL, actual=ACTUAL, newton=(0.9, 0.8, 0.7)
):
    """A check of these verdicts, predictions and scores at λ = 0.01, 0.1 (in use) and 1."""
    findings = tuple(Finding(f"<b>{v}", "value", v, "meaning " * 20) for v in verdicts)
    dampings = pd.DataFrame(
        {
            "damping": [0.01, 0.1, 1.0],
            "factor": [0.1, 1.0, 10.0],
            "sum": [0.5, 0.6, 0.4],
            "newton": newton,
        }
    )
    return Check(findings, "The <i>answer</i>.", predicted, first, actual, dampings)


def section(report):
    (found,) = (one for one in report.sections if one.title == TITLE)
    return found


def texts(found):
    return [block.text for block in found.blocks if isinstance(block, Paragraph)]


@pytest.fixture(scope="module")
def result():
    return run_wine(SMALL, progress=False)


@pytest.fixture(scope="module")
def hessian():
    """With the Hessian, some halves of which are indefinite at λ = 0.1."""
    return run_wine(dataclasses.replace(SMALL, curvature="hessian", epochs=300), progress=False)


# ---- what is computed ---------------------------------------------------------------------------


def test_scores_are_held_against_retraining_with_the_demos_own_settings(result):
    found = result.check
    assert (found.curvature, found.why, found.epochs) == ("ggn", "", 60)
    assert found.rank == pytest.approx(1)
    masks = random_subsets(106, 8, share=0.5)
    y = result.data.train[1].clone()
    wrong = result.rows["flipped"].to_numpy()
    y[wrong] = (y[wrong] + 1) % 3
    refit = Retraining(
        lambda seed: type(result.model)([13, 16, 16, 3], __import__("torch").nn.Tanh, seed=seed),
        __import__("torch").nn.functional.cross_entropy,
        (result.data.train[0], y),
        result.data.test,
        epochs=result.history.best_epoch,
        output="loss",
        **training_options(SMALL),
    )
    twin = retrain(refit, masks, seeds=1, progress=False)
    np.testing.assert_array_equal(found.retrained.masks, masks)
    np.testing.assert_allclose(found.retrained.outputs, twin.outputs, rtol=1e-4, atol=1e-6)
    own = linear_datamodeling_score(
        result.scores.values, masks, twin.mean, higher_is_better=False, bootstrap=0
    )
    assert found.own.value == pytest.approx(own.value, abs=0.01)
