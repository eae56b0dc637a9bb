"""The page of the wine walk-through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from upweight.report import check_report, comparison_report, plots
from upweight.report.demo_check import WineCheck
from upweight.report.page import (
    Block,
    Fact,
    Facts,
    Figure,
    Paragraph,
    Report,
    Section,
    Table,
)

if TYPE_CHECKING:
    from upweight.report.demo import WineResult

TIMES = {1: "once", 2: "twice"}
APART = 3.0  # times as large: dampings that are no longer called the same
ALIKE = 0.95  # rank correlation from which two rankings are called nearly alike


def build(result: WineResult, top: int) -> Report:
    """The report of a walk-through, with the `top` lowest rows in its table."""
    settings = result.settings
    return Report(
        kicker="upweight demo wine",
        title="Which bottles carry the wrong label?",
        summary=_summary(result),
        sections=[
            Section("Is there a model worth asking?", _model(result)),
            Section("How the training rows score", _distribution(result)),
            Section("The rows to look at first", _suspects(result, top)),
            Section("Which way the measurements push", _features(result)),
            Section("How exact these numbers are", _certificate(result)),
            *_check(result),
            *_comparison(result),
        ],
        footer=(
            f"Settings: seed {settings.seed}, {settings.epochs} epochs of Adam (learning rate "
            f"{settings.learning_rate:g}, weight decay {settings.weight_decay:g}, batches of "
            f"{settings.batch_size}), curvature {settings.curvature}, damping "
            f"{settings.damping:g}. All of them are in config.yaml beside this page."
        ),
    )


def _flipped_rows(rows: pd.DataFrame) -> int:
    return int(np.count_nonzero(rows["flipped"].to_numpy()))


def _summary(result: WineResult) -> list[Block]:
    n, flipped = len(result.rows), _flipped_rows(result.rows)
    found = _flipped_rows(result.suspects(flipped))
    told = (
        f"{n} bottles of wine train a small network to tell three cultivars apart from thirteen "
        f"measurements. {flipped} of the labels were made wrong on purpose, and nobody told the "
        "network which. Influence functions ask of every training bottle: if it counted for a "
        "little more, would the network do better or worse on bottles that it has never seen? A "
        "negative score means worse. "
    )
    if flipped and found == flipped:
        told += (
            f"The {flipped} bottles with the lowest scores are the {flipped} with a wrong label."
        )
    elif flipped:
        told += f"Of the {flipped} bottles with the lowest scores, {found} have a wrong label."
    facts = [
        Fact("F1 on the test bottles", f"{result.f1:.3f}", "weighted over the classes"),
        Fact(
            "Wrong labels: mean score",
            f"{result.corrupted_mean:+.3f}",
            "below zero: they harm",
            "bad",
        ),
        Fact("Other bottles: mean score", f"{result.other_mean:+.3f}", "above zero: they help"),
        Fact(
            "Found",
            f"{found} of {flipped}",
            f"among the {flipped} lowest scores; ROC AUC {result.auc:.3f}",
            "good" if found else "plain",
        ),
    ]
    return [Paragraph(told), Facts(facts)]


def _model(result: WineResult) -> list[Block]:
    losses = result.history.losses.filter(["train", "validation"])
    names = list(result.data.class_names)
    actual = [names[i] for i in result.data.test[1].tolist()]
    predicted = [names[i] for i in result.test_predicted.tolist()]
    return [
        Paragraph(
            "Influence functions describe a model at a minimum of its training loss, so the curves "
            "should have become flat. The network also has to be right often enough for its "
            "opinion of the training rows to mean something."
        ),
        Figure(
            plots.draw(plots.plot_losses, losses),
            "Mean loss per bottle after every epoch, on the training part (with its wrong labels) "
            "and on the validation part.",
            f"Loss curves; the last training loss is {losses.iloc[-1, 0]:.3f}, the last "
            f"validation loss {losses.iloc[-1, 1]:.3f}.",
        ),
        Figure(
            plots.draw(plots.plot_confusion, actual, predicted, labels=names),
            f"Given and predicted label of the {len(actual)} test bottles.",
            f"Confusion matrix; weighted F1 {result.f1:.3f}.",
        ),
    ]


def _distribution(result: WineResult) -> list[Block]:
    scores = result.rows["mean_influence"].to_numpy()
    flipped = result.rows["flipped"].to_numpy()
    return [
        Paragraph(
            "A score is the mean, over all test bottles, of g_test (C + λI)⁻¹ g_train: how fast "
            "the test loss falls when the training bottle is up-weighted. Positive = helps, "
            "negative = harms. Taking a bottle out changes the mean test loss by about its score "
            f"divided by the {len(scores)} training bottles."
        ),
        Figure(
            plots.draw(plots.plot_score_distribution, scores, flipped),
            "Mean influence of every training bottle on the test loss. Bottles with a flipped "
            "label are in red. The count axis is logarithmic, so that a single bottle can be seen.",
            f"Histogram of scores; wrong labels average {result.corrupted_mean:.3f}, the others "
            f"{result.other_mean:.3f}.",
        ),
    ]


def _suspects(result: WineResult, top: int) -> list[Block]:
    suspects = result.suspects(top)
    features = result.features.iloc[suspects["row"].to_numpy()].reset_index(drop=True)
    frame = pd.DataFrame(
        {
            "row": suspects["row"].to_numpy(),
            "score": suspects["mean_influence"].to_numpy(),
            "given label": suspects["given"].to_numpy(),
            "network says": suspects["predicted"].to_numpy(),
            "label was flipped": np.where(suspects["flipped"], "yes", "no"),
        }
    )
    frame = pd.concat([frame, features], axis=1)
    marked = np.flatnonzero(suspects["flipped"].to_numpy()).tolist()
    return [
        Paragraph(
            "The most harmful bottles first. Whoever owns the data would open this list at the "
            "top. Where the network says the same as a wrong label, it has learnt that label."
        ),
        Table(
            frame,
            "The lowest mean scores, with the measurements scaled to 0…1 over the training part. "
            "The table scrolls, also to the right.",
            formats={"score": "{:+.3f}", **{name: "{:.2f}" for name in result.features.columns}},
            highlight_rows=marked,
            highlight_label="label was flipped",
            highlight_column="score",
        ),
    ]


def _features(result: WineResult) -> list[Block]:
    influence = result.feature_influence
    return [
        Paragraph(
            "The same question for a single measurement: if this feature of the training bottles "
            "were a little larger, would the test loss fall (positive) or rise (negative)? The "
            "bars are means over all training and test bottles, per unit of the scaled feature; "
            "where bottles pull in different directions, they cancel."
        ),
        Figure(
            plots.draw(
                plots.plot_feature_influence,
                influence.to_numpy(),
                [str(name).replace("_", " ") for name in influence.index],
                height=4.2,
            ),
            "Mean influence of every feature (mode “perturbation”).",
            f"Bars; the strongest is {influence.abs().idxmax()}.",
        ),
    ]


def _certificate(result: WineResult) -> list[Block]:
    lines = result.certificate.lines()
    return [
        Paragraph(
            "The scores come from solving (C + λI) x = g: for the gradients g of all test bottles, "
            "for their mean (which the features are scored with), and for the training bottles "
            "themselves (self-influence). The residual says how well these equations hold; below "
            "1e-6 the solve adds no error that matters beside single-precision gradients."
        ),
        Table(pd.DataFrame(lines, columns=["", "value"]), "Certificate of the solves."),
    ]


def _check(result: WineResult) -> list[Section]:
    found = result.check
    if found is None:
        return []
    title = "Can these scores be believed?"
    if isinstance(found, str):
        return [Section(title, [Paragraph(f"That is not known: {found}.", "warning")])]
    told = check_report.told_of_damping(found.check)
    blocks: list[Block] = [
        Paragraph(found.check.sentence),
        *_other_curvature(result, found),
        *([Paragraph(told, "note")] if told else []),
        Paragraph(_retraining(result, found)),
        *check_report.blocks(found.check, rows="bottles"),
        *[Paragraph(text) for text in _auto(result, found)],
        _dampings(found),
    ]
    return [Section(title, blocks)]


def _retraining(result: WineResult, found: WineCheck) -> str:
    count = result.settings.trainings
    low, high = found.own.interval
    return (
        "What the scores claim can be tried out: take bottles away, train again, and look at the "
        f"test bottles. On each of {found.own.subsets} random halves of the bottles the network "
        f"was trained {TIMES.get(count, f'{count} times')}, with the same optimiser and schedule, "
        f"from other initial weights, for {found.epochs} epochs: as many as the weights above were "
        "trained for. (Networks that are all trained at once cannot stop early, each at its best "
        "epoch.) The linear datamodeling score (LDS) is the rank correlation, over the halves, of "
        "predicted and actual losses of a test bottle, averaged over the test bottles: 1 is the "
        "same order, 0 none. For the scores of this page, summed over the bottles of a half, it "
        f"is {found.own.value:.2f} (95 % interval {low:.2f} to {high:.2f})."
    )


def _other_curvature(result: WineResult, found: WineCheck) -> list[Paragraph]:
    if found.unanswered is None:
        return []
    name, other = result.settings.curvature.capitalize(), found.curvature.upper()
    alike = found.rank > ALIKE
    how = "nearly alike" if alike else "differently, so that this says little of this page"
    against = [f"“{f.what}”" for f in found.unanswered.findings if f.verdict == "poor"]
    text = (
        f"This is the answer for the {other}. For the {name}, which the scores of this page are "
        f"of, it is not to rely on them yet, because of {' and '.join(against)}: with this λ the "
        f"{name} of the bottles that remain is indefinite for some groups, and no step can be "
        f"predicted for them. The mean scores by both rank the bottles {how} (Spearman "
        f"{found.rank:.3f})."
    )
    return [Paragraph(text, "warning")]


def _auto(result: WineResult, found: WineCheck) -> list[str]:
    n = len(result.data.validation[1])
    clean = (
        f'With the {n} validation bottles as held-out rows, damping="auto" would choose λ = '
        f"{found.clean.value:.3g}, by {found.clean.how}: {found.clean.why}. "
        f"{_against_own(result, found, found.clean.value)}"
    )
    if not found.spoiled:
        return [clean]
    low, high = found.spoiled[0].value, found.spoiled[-1].value
    few = f": {n} bottles are too few to choose by" if high > APART * low else ""
    spoiled = (
        "Held-out rows should be drawn as the training rows were, but the labels of the validation "
        "bottles are all right. With the same share of wrong labels among them, it would choose "
        f"λ from {low:.3g} to {high:.3g}, by which of them are wrong ({len(found.spoiled)} "
        f"draws){few}."
    )
    return [clean, spoiled]


def _against_own(result: WineResult, found: WineCheck, damping: float) -> str:
    """Whether retraining speaks for this λ or for the one in use."""
    score = found.dampings.set_index("damping")["newton"].to_dict()
    own, other = score[result.settings.damping], score[damping]
    if np.isnan(own) or np.isnan(other):
        return "There is no prediction for one of the two to compare."
    word = "better" if other > own else "worse" if other < own else "no different"
    return (
        f"By the retraining that is {word}: LDS {other:.2f} for Newton steps, and {own:.2f} with λ "
        "in use."
    )


def _dampings(found: WineCheck) -> Table:
    names = {
        "damping": "λ",
        "origin": "which",
        "sum": "LDS of sums",
        "newton": "LDS of Newton steps",
        "sum_slope": "slope for sums",
        "newton_slope": "slope for Newton steps",
    }
    frame = pd.DataFrame({name: found.dampings[key] for key, name in names.items()})
    numbers = list(names.values())[2:]
    return Table(
        frame,
        "What the same retraining says of some λ. Slope: how many times as large actual effects "
        "are as predicted ones; 1 is right. “Best” is in hindsight, by these very halves.",
        formats={"λ": "{:.3g}", **dict.fromkeys(numbers, "{:.2f}")},
        whole=True,
    )


def _comparison(result: WineResult) -> list[Section]:
    if result.comparison is None:
        return []
    blocks = comparison_report.blocks(
        result.comparison,
        result.rows["flipped"].to_numpy(),
        rows="bottles",
        marked_label="flipped label",
    )
    return [Section("Do methods for large models agree?", blocks)]
