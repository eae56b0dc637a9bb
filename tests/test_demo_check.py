"""The check in the report of the demo, in its run folder and on the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re

import numpy as np
import pandas as pd
import pytest
import torch.nn.functional as F
import yaml
from matplotlib.figure import Figure as Canvas

from test_report import Page
from upweight.datasets import flip_labels, load_wine
from upweight.evaluate import Retrained, linear_datamodeling_score, random_subsets, retrain
from upweight.report import check_report, cli, demo_report, evaluation_plots
from upweight.report.check_report import blocks, told_of_damping
from upweight.report.demo import WineSettings, is_run, run_wine, write_run
from upweight.report.demo_check import in_a_line
from upweight.report.demo_settings import make_model, training_options
from upweight.report.page import Figure, Paragraph, Report, Section, Table, render
from upweight.stacked import Retraining
from upweight.trust import Check, Finding

TITLE = "Can these scores be believed?"
SMALL = WineSettings(epochs=40, curvature="ggn", halves=8, trainings=1, compare=False)
rng = np.random.default_rng(0)
ACTUAL = rng.normal(size=(6, 4)) + 3


def made(verdicts=("good",), predicted=ACTUAL, newton=(0.9, 0.8, 0.7), damping=0.1):
    """A check with these verdicts, Newton steps, and scores of them at λ/10, λ and 10 λ."""
    findings = tuple(Finding(f"<b>{v}", "value", v, "meaning " * 20) for v in verdicts)
    factors = np.array([0.1, 1.0, 10.0])
    columns = {"damping": factors * damping, "factor": factors, "sum": 0.5, "newton": newton}
    return Check(
        findings, "An <i>answer</i>.", predicted, 2 * ACTUAL, ACTUAL, pd.DataFrame(columns)
    )


def section(result):
    (found,) = (one for one in demo_report.build(result, 5).sections if one.title == TITLE)
    return found


def kinds(found, kind):
    return [block for block in found if isinstance(block, kind)]


@pytest.fixture(scope="module")
def result():
    return run_wine(SMALL, progress=False)


@pytest.fixture(scope="module")
def hessian():
    """With the Hessian, which is indefinite for some of the halves."""
    return run_wine(dataclasses.replace(SMALL, curvature="hessian", epochs=60), progress=False)


# ---- what is computed ---------------------------------------------------------------------------


def test_retraining_is_the_demos_own_training(result):
    found = result.check
    assert (found.curvature, found.unanswered, found.epochs) == (
        "ggn",
        None,
        result.history.best_epoch,
    )
    wine = load_wine(seed=SMALL.seed)
    y, _ = flip_labels(wine.train[1], SMALL.flipped, classes=3, seed=SMALL.seed)
    refit = Retraining(
        make_model,
        F.cross_entropy,
        (wine.train[0], y),
        wine.test,
        epochs=40,
        output="loss",
        **training_options(SMALL),
    )
    twin = retrain(refit, random_subsets(106, 8, share=0.5), seeds=1, progress=False)
    np.testing.assert_array_equal(found.retrained.masks, twin.masks)
    np.testing.assert_allclose(found.retrained.outputs, twin.outputs, rtol=1e-3, atol=1e-5)
    # All rows, with the seed of the demo: the network that the page is about.
    whole = refit(np.arange(106), SMALL.seed)
    model = result.model(wine.test[0])
    own = F.cross_entropy(model, wine.test[1], reduction="none").detach().numpy()
    np.testing.assert_allclose(whole, own, rtol=1e-3, atol=1e-5)


def test_scores_of_the_page_are_held_against_it(result):
    found = result.check
    twin = linear_datamodeling_score(
        result.scores.values,
        found.retrained.masks,
        found.retrained.mean,
        higher_is_better=False,
    )
    assert found.own.value == twin.value
    assert found.rank == pytest.approx(1)


def test_dampings_in_use_and_of_auto_are_all_tried(result):
    found, table = result.check, result.check.dampings
    assert [choice.value for choice in found.spoiled] == sorted(c.value for c in found.spoiled)
    assert len(found.spoiled) == 3
    wanted = {
        "in use": SMALL.damping,
        "best of those tried": found.check.dampings.set_index("damping")["newton"].idxmax(),
        "validation part as it is": found.clean.value,
        "lowest": found.spoiled[0].value,
        "highest": found.spoiled[-1].value,
    }
    for origin, damping in wanted.items():
        (line,) = table[table["origin"].str.contains(origin)].to_dict("records")
        assert line["damping"] == damping
    own = table.iloc[0]
    of_check = found.check.dampings.set_index("factor").loc[1.0]
    assert (own["sum"], own["newton"]) == pytest.approx((of_check["sum"], of_check["newton"]))
    actual = found.check.actual - found.check.actual.mean(0)
    predicted = found.check.predicted - found.check.predicted.mean(0)
    assert own["newton_slope"] == pytest.approx((actual * predicted).sum() / (predicted**2).sum())


@pytest.mark.slow
def test_hessian_that_is_indefinite_for_a_half_is_told_and_the_ggn_checked(hessian):
    found = hessian.check
    assert found.curvature == "ggn"
    assert found.unanswered.predicted is None
    assert 0.9 < found.rank < 1
    np.testing.assert_array_equal(found.unanswered.retrained.outputs, found.retrained.outputs)
    table = found.findings()
    assert table["curvature"].unique().tolist() == ["ggn", "of the scores"]
    sentence, warning = section(hessian).blocks[:2]
    assert sentence.text == found.check.sentence
    assert warning.tone == "warning"
    assert "This is the answer for the GGN. For the Hessian" in warning.text
    assert "not to rely on them yet, because of" in warning.text
    assert f"rank the bottles nearly alike (Spearman {found.rank:.3f})" in warning.text
    assert in_a_line(found).startswith(found.check.sentence + " (This is for the GGN. ")
    other = dataclasses.replace(hessian, check=dataclasses.replace(found, rank=0.3))
    assert "differently, so that this says little of this page" in section(other).blocks[1].text


def test_check_false_computes_nothing(monkeypatch):
    monkeypatch.setattr("upweight.report.demo.check_wine", None)
    none = run_wine(dataclasses.replace(SMALL, epochs=1, check=False), progress=False)
    assert none.check is None
    assert TITLE not in [one.title for one in demo_report.build(none, 5).sections]


@pytest.mark.slow
def test_without_wrong_labels_there_is_nothing_to_spoil():
    clean = run_wine(dataclasses.replace(SMALL, epochs=10, flipped=0, halves=4), progress=False)
    assert clean.check.spoiled == ()
    assert "spoiled" not in "".join(clean.check.dampings["origin"])
    assert "wrong labels among them" not in render(Report("t", "s", [section(clean)]))


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.slow
def test_run_folder_has_the_check(result, tmp_path):
    write_run(result, tmp_path / "run")
    out = tmp_path / "run"
    assert yaml.safe_load((out / "config.yaml").read_text())["settings"]["check"] is True
    assert len(pd.read_parquet(out / "check.parquet")) == len(result.check.check.findings)
    pd.testing.assert_frame_equal(
        pd.read_parquet(out / "check_dampings.parquet"), result.check.dampings
    )
    kept = Retrained.load(out / "retrained.npz")
    np.testing.assert_array_equal(kept.outputs, result.check.retrained.outputs)


@pytest.mark.slow
def test_settings_that_were_written_give_the_same_page(result, tmp_path):
    write_run(result, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    again = run_wine(WineSettings(**config["settings"]), progress=False)
    write_run(again, tmp_path / "again")
    first, second = (tmp_path / name / "report.html" for name in ("run", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_page_that_fails_leaves_no_folder(result, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("no page")

    monkeypatch.setattr(check_report, "blocks", fail)
    with pytest.raises(ValueError, match="no page"):
        write_run(result, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_check_without_an_answer_is_told(result, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ArithmeticError("<b>singular")

    monkeypatch.setattr("upweight.methods.check_influence", fail)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command = ["demo", "wine", "--epochs", "1", "--curvature", "ggn", "--no-compare"]
        cli.main([*command, "--out", str(tmp_path / "run")])
    assert "can these scores be believed? not known: <b>singular\n" in printed.getvalue()
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "That is not known: &lt;b&gt;singular." in page
    assert is_run(tmp_path / "run")
    assert not (tmp_path / "run" / "check.parquet").exists()


@pytest.mark.slow
def test_terminal_shows_the_sentence_on_one_line(result, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("upweight.report.demo.run_wine", lambda settings, progress: result)
    cli.main(["demo", "wine", "--no-compare", "--out", str(tmp_path / "run")])
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("can these")
    ]
    assert line == f"can these scores be believed? {result.check.check.sentence}"


@pytest.mark.parametrize(("flag", "wanted"), [((), True), (("--no-check",), False)])
def test_option_reaches_the_settings(flag, wanted, monkeypatch, tmp_path):
    seen = []

    def stop(settings, progress):
        seen.append(settings.check)
        raise ValueError("far enough")

    monkeypatch.setattr("upweight.report.demo.run_wine", stop)
    with pytest.raises(SystemExit):
        cli.main(["demo", "wine", "--out", str(tmp_path / "run"), *flag])
    assert seen == [wanted]


# ---- what the page shows ------------------------------------------------------------------------


def test_section_begins_with_the_sentence_and_says_how_it_was_trained(result):
    shown = section(result).blocks
    assert shown[0].text == result.check.check.sentence
    assert shown[0].tone == "plain"
    told = " ".join(block.text for block in kinds(shown, Paragraph))
    assert "On each of 8 random halves" in told
    assert "the network was trained once, with the same optimiser" in told
    assert "for 40 epochs: as many as the weights above were trained for" in told
    assert f"it is {result.check.own.value:.2f} (95 % interval" in told
    assert f'damping="auto" would choose λ = {result.check.clean.value:.3g}' in told
    low, high = (result.check.spoiled[i].value for i in (0, -1))
    assert f"λ from {low:.3g} to {high:.3g}, by which of them are wrong (3 draws)" in told
    assert ("too few to choose by" in told) is (high > 3 * low)
    assert len(kinds(shown, Figure)) == 3
    titles = [one.title for one in demo_report.build(result, 5).sections]
    assert titles[-1] == TITLE


def test_verdicts_have_a_mark_and_a_word_and_nothing_is_cut():
    found = made(("good", "fair", "poor"))
    html = render(Report("t", "s", [Section("check", blocks(found))]))
    page = Page(html)
    cells = [text for path, text in page.texts if "/td/" in path + "/" and text.strip()]
    assert cells[::3] == ["✓ good", "~ fair", "✗ poor"]
    assert cells[2] == "meaning " * 20
    assert "details" not in {tag for tag, _ in page.elements}
    assert "&lt;b&gt;fair" in html
    marked = [attributes.get("class") for tag, attributes in page.elements if tag == "tr"]
    assert marked == [None, None, None, "marked"]


def test_figures_show_effects_about_their_mean():
    sums, steps, dampings = kinds(blocks(made(), rows="<wines>"), Figure)
    about = ACTUAL - ACTUAL.mean(0)
    for figure, factor in ((sums, 2), (steps, 1)):
        points = figure.figure.axes[0].collections[0].get_offsets()
        np.testing.assert_allclose(points[:, 0], factor * about.ravel())
        np.testing.assert_allclose(points[:, 1], about.ravel())
        assert f"{1 / factor:.2f} times as large as predicted" in figure.caption
        assert f"slope {1 / factor:.2f}" in figure.alt
        assert "half of the <wines>" in figure.caption
    assert sums.caption.startswith("Sum of influences: ")
    assert steps.caption.startswith("One Newton step: ")
    assert steps.figure.axes[0].get_xlabel() == "one Newton step: harmful ← 0 → helpful"
    assert "0.1: 0.50 and 0.80" in dampings.alt
    assert dampings.alt.endswith("In use: 0.1.")


def test_plot_of_dampings_marks_the_one_in_use():
    table = made(newton=(0.9, np.nan, 0.7)).dampings[::-1]
    ax = Canvas().add_subplot()
    assert evaluation_plots.plot_damping(table, ax=ax) is ax
    lines = {one.get_label(): one for one in ax.lines}
    assert list(lines) == ["sum of influences", "one Newton step", "λ in use: 0.1"]
    np.testing.assert_allclose(lines["one Newton step"].get_xdata(), [0.01, 0.1, 1.0])
    np.testing.assert_array_equal(lines["one Newton step"].get_ydata(), [0.9, np.nan, 0.7])
    assert list(lines["λ in use: 0.1"].get_xdata()) == [0.1, 0.1]
    assert ax.get_xscale() == "log"
    assert "weak ← → strong" in ax.get_xlabel()
    assert "higher is better" in ax.get_ylabel()


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (made().dampings[:0], "at least one damping"),
        (made(damping=0.0).dampings, "above 0"),
        (made(damping=np.inf).dampings, "must be finite"),
    ],
)
def test_plot_of_dampings_refuses(table, says):
    with pytest.raises(ValueError, match=says):
        evaluation_plots.plot_damping(table)


def test_a_check_without_a_retraining_is_a_table_alone():
    found = Check(made().findings, "sentence")
    (only,) = blocks(found)
    assert isinstance(only, Table)
    assert told_of_damping(found) == ""


def test_damping_zero_has_no_logarithm_to_draw():
    assert len(kinds(blocks(made(damping=0.0)), Figure)) == 2


def test_predictions_that_are_missing_are_left_out():
    found = made(predicted=np.full_like(ACTUAL, np.nan))
    assert len(kinds(blocks(found), Figure)) == 2
    assert told_of_damping(found) == ""


@pytest.mark.parametrize(
    ("scale", "newton", "told"),
    [
        (0.4, (0.9, 0.8, 0.7), "λ = 0.1 is too large: actual effects are 2.50 times as large as "
         "Newton steps predict, and of those tried, λ = 0.01 orders the halves best, with an LDS "
         "of 0.90 for Newton steps instead of 0.80."),
        (2.0, (0.7, 0.8, 0.9), "is too small: actual effects are only 0.50 times what Newton steps "
         "predict, and of those tried, λ = 1 "),
        (1.0, (0.7, 0.8, 0.7), "is about right: predicted effects have about the right size (slope "
         "1.00), and no other λ that was tried orders the halves clearly better (LDS 0.80"),
        (1.0, (0.9, 0.8, 0.7), "is rather too large: predicted effects have about the right size"),
        (0.4, (0.7, 0.8, 0.81), "is rather too large: actual effects are 2.50 times"),
        (0.4, (0.7, 0.8, 0.9), "is too large by one measure and too small by another: "),
        (1.0, (np.nan, 0.8, 0.7), "is about right: "),
        (1.0, (0.9, np.nan, 0.7), ""),
    ],
)  # fmt: skip
def test_damping_is_judged_by_size_and_order(scale, newton, told):
    text = told_of_damping(made(predicted=scale * ACTUAL, newton=newton))
    assert told in text
    assert bool(text) is bool(told)


def test_section_is_plain_text_for_hostile_words(result):
    check = dataclasses.replace(result.check.check, sentence="<script>alert(1)</script>")
    page = render(
        Report("t", "s", [section(dataclasses.replace(
            result, check=dataclasses.replace(result.check, check=check)
        ))])
    )  # fmt: skip
    assert not re.search("<script", page)
    assert "&lt;script&gt;" in page
