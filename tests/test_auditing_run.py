"""The audit as a whole, on tables with planted faults."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_diabetes, load_iris, load_wine
from sklearn.metrics import f1_score, roc_auc_score

from upweight.auditing.audit import Audit
from upweight.auditing.run import plan_audit, run_audit
from upweight.auditing.settings import AuditSettings
from upweight.auditing.steps import Steps
from upweight.tables import TableError, read_table

QUICK = {"trees": 100, "networks": 1, "planted": 2}


def run(frame, target="kind", **settings):
    return run_audit(
        read_table(frame), AuditSettings(target, **{**QUICK, **settings}), steps=Steps()
    )


def bottles(seed=0, flips=0, names=("Barolo", "Grignolino", "Barbera")):
    data = load_wine(as_frame=True)
    frame = data.data.copy()
    rng = np.random.default_rng(seed)
    y = data.target.to_numpy().copy()
    rows = rng.choice(len(y), flips, replace=False)
    y[rows] = (y[rows] + rng.integers(1, 3, flips)) % 3
    frame["kind"] = np.array(names)[y]
    return frame, np.isin(np.arange(len(y)), rows)


@pytest.fixture(scope="module")
def spoiled():
    frame, wrong = bottles(flips=18)
    frame.loc[40, "proline"] *= 1000
    frame.loc[77, "alcohol"] /= 10
    frame = pd.concat([frame, frame.iloc[[100, 12]]], ignore_index=True)
    conflict = frame.iloc[[150]].assign(kind="Grignolino")
    frame = pd.concat([frame, conflict], ignore_index=True)
    frame.loc[5, "kind"] = None
    return frame, np.append(wrong, [False, False, False]), run(frame)


def test_flipped_labels_are_flagged_with_the_right_proposal(spoiled):
    frame, wrong, audit = spoiled
    rows = audit.rows
    judged = rows["suspicion"].notna().to_numpy()
    assert roc_auc_score(wrong[judged], rows["suspicion"][judged]) > 0.98
    flags = rows["label_flag"].fillna(value=False).to_numpy(bool)
    assert f1_score(wrong, flags) > 0.75
    original = np.array(["Barolo", "Grignolino", "Barbera"])[load_wine().target]
    both = np.flatnonzero(flags & wrong)
    assert (rows["proposed"].to_numpy()[both] == original[both]).mean() > 0.9
    assert (rows["given"].to_numpy()[both] == frame["kind"].to_numpy()[both]).all()


def test_every_kind_of_finding(spoiled):
    _, _, audit = spoiled
    found = audit.findings.set_index("row")
    kinds = audit.findings["kind"]
    features = audit.findings[kinds == "features"]
    assert features["row"].tolist()[:2] == [40, 77]
    assert features["column"].tolist()[:2] == ["proline", "alcohol"]
    assert "another unit?" in features["evidence"].iloc[0]
    assert audit.findings.loc[kinds == "duplicate", "row"].tolist() == [178, 179]
    assert set(audit.findings.loc[kinds == "conflict", "row"]) == {150, 180}
    assert audit.findings.loc[kinds == "no-target", "row"].tolist() == [5]
    assert (found.loc[found["kind"] == "harmful", "score"] < 0).all()
    assert (found.loc[found["kind"] == "helpful", "score"] > 0).all()
    label = audit.findings[kinds == "label"]
    assert (np.diff(label["score"]) <= 0).all()
    assert audit.summary.counts == kinds.value_counts().to_dict()
    assert label["evidence"].str.len().between(40, 500).all()


def test_every_row_of_the_table_is_there(spoiled):
    frame, _, audit = spoiled
    rows = audit.rows
    assert rows["row"].tolist() == list(range(len(frame)))
    assert rows["suspicion"].isna().tolist() == frame["kind"].isna().tolist()
    assert pd.isna(rows["label_flag"].iloc[5])
    assert rows["suspicion"].dropna().between(0, 1).all()
    assert rows["feature_suspicion"].dropna().between(0, 1).all()
    signals = ["knn", "votes", "oob", "network", "loss", "margin", "disagreement", "influence"]
    assert rows.loc[~frame["kind"].isna(), signals].notna().all().all()


def test_details_explain_the_suspects(spoiled):
    _, _, audit = spoiled
    details = audit.details
    assert len(details) == 100
    flagged = audit.findings.loc[audit.findings["kind"] == "label", "row"]
    assert set(flagged) <= set(details)
    assert details[40].stand_out[0].column == "proline"
    assert details[40].stand_out[0].rank > 0.99
    for row in flagged:
        detail = details[row]
        assert detail.contradicting
        given = audit.rows["given"]
        assert all(given[r] != given[row] for r in detail.contradicting)
        assert all(given[r] == given[row] for r in detail.supporting)
        assert all(value < 0 for _, value in detail.behind)
        assert 5 not in [r for r, _ in detail.behind]


def test_expected_precision_is_near_the_true_one(spoiled):
    _, wrong, audit = spoiled
    flags = audit.rows["label_flag"].fillna(value=False).to_numpy(bool)
    estimate, low, high = audit.summary.precision
    assert low <= estimate <= high
    assert estimate == pytest.approx(wrong[flags].mean(), abs=0.2)
    assert json.dumps(asdict(audit.summary))
    assert json.dumps(audit.to_dict())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_audit(spoiled):
    frame, _, audit = spoiled
    again = run(frame)
    pd.testing.assert_frame_equal(audit.rows, again.rows)
    pd.testing.assert_frame_equal(audit.findings, again.findings)
    assert audit.details == again.details


@pytest.mark.parametrize("load", [load_wine, load_iris])
@pytest.mark.slow
def test_a_clean_table_is_hardly_flagged(load):
    data = load(as_frame=True)
    frame = data.data.copy()
    frame["kind"] = data.target
    audit = run(frame, task="classification", influence=False)
    assert audit.rows["label_flag"].mean() < 0.02
    assert audit.rows["feature_flag"].mean() < 0.02


@pytest.mark.slow
def test_numbers_of_other_rows_are_found():
    data = load_diabetes(as_frame=True)
    frame = data.data.copy()
    rng = np.random.default_rng(3)
    y = np.array(100 * frame["bmi"] + 50 * frame["bp"] + 0.2 * rng.normal(size=len(frame)))
    rows = rng.choice(len(y), 40, replace=False)
    wrong = np.isin(np.arange(len(y)), rows)
    y[rows] = rng.permutation(y)[:40]
    frame["level"] = y
    audit = run(frame, target="level")
    assert audit.summary.task == "regression"
    assert audit.summary.classes is None
    assert roc_auc_score(wrong, audit.rows["suspicion"]) > 0.8
    top = audit.suspects(10)
    assert wrong[top["row"]].mean() >= 0.8
    finding = audit.findings[audit.findings["kind"] == "label"].iloc[0]
    assert float(finding["proposed"]) == pytest.approx(
        audit.rows["proposed"][finding["row"]], rel=1e-3
    )


@pytest.mark.slow
def test_only_categories_and_an_id():
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, 200)
    frame = pd.DataFrame({f"c{j}": np.where(rng.random(200) < 0.9, y, 1 - y) for j in range(8)})
    frame = frame.replace({0: "low", 1: "high"}).astype(str)
    frame.insert(0, "key", [f"K-{i:04d}" for i in range(200)])
    frame["kind"] = np.array(["no", "yes"])[y]
    frame.loc[17, "kind"] = "no" if y[17] else "yes"
    audit = run(frame)
    assert audit.rows["name"].iloc[17] == "K-0017"
    assert audit.suspects(1)["row"].item() == 17
    assert not audit.rows["feature_flag"].any()
    assert audit.rows["suspect_column"].isna().all()


@pytest.mark.slow
def test_a_leak_is_told_and_hides_nothing_else():
    frame, _ = bottles(1, flips=10)
    frame["code"] = frame["kind"].str.upper()
    audit = run(frame, influence=False)
    leak = audit.findings[audit.findings["kind"] == "leakage"]
    assert leak["column"].tolist() == ["code"]
    assert leak["row"].isna().all()
    assert any("“code” alone" in note for note in audit.summary.notes)


def test_without_planted_faults_there_is_no_expected_precision():
    frame, _ = bottles(2, flips=10)
    audit = run(frame, planted=0, influence=False)
    assert audit.summary.precision is None
    assert not audit.summary.expected
    assert any("No faults were planted" in note for note in audit.summary.notes)
    assert "influence" not in audit.rows


@pytest.mark.slow
def test_columns_that_tell_nothing_are_noted():
    rng = np.random.default_rng(5)
    frame = pd.DataFrame(rng.normal(size=(200, 4))).rename(columns=str)
    frame["kind"] = rng.choice(["a", "b"], 200)
    audit = run(frame, influence=False)
    assert "hardly tell the target" in audit.summary.notes[0]
    assert audit.rows["label_flag"].mean() < 0.1
    assert audit.summary.noise is None


@pytest.mark.slow
def test_rows_in_another_order_are_judged_alike():
    frame, _ = bottles(3, flips=10)
    order = np.random.default_rng(6).permutation(len(frame))
    one = run(frame, influence=False).rows["suspicion"].to_numpy()
    other = run(frame.iloc[order].reset_index(drop=True), influence=False).rows["suspicion"]
    # folds and trees are drawn by position, so that the judges are others of the same kind
    assert np.corrcoef(one[order], other)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("setting", "value"),
    [("folds", 1), ("trees", 0), ("top", 0), ("neighbours", 0), ("planted", -1), ("networks", 1.5)],
)
def test_settings_are_checked_before_work(setting, value):
    frame, _ = bottles()
    with pytest.raises(TableError, match=setting):
        plan_audit(read_table(frame), AuditSettings("kind", **{setting: value}))


@pytest.mark.slow
def test_the_plan_names_columns_and_costs():
    frame, _ = bottles()
    plan = plan_audit(read_table(frame), AuditSettings("kind"))
    text = str(plan)
    assert "proline" in text
    assert "classification of 3 classes" in text
    assert plan.seconds > 0
    assert plan.memory > 2**20
    names = [name for name, _ in plan.steps]
    steps = Steps()
    run_audit(read_table(frame), AuditSettings("kind", **QUICK), steps=steps)
    assert set(steps.seconds) == set(names)
    assert isinstance(plan.judged, int)


def test_suspects_by_count_and_by_flag(spoiled):
    audit: Audit = spoiled[2]
    assert len(audit.suspects(7)) == 7
    assert len(audit.suspects()) == audit.summary.flagged
    assert audit.suspects(3)["suspicion"].is_monotonic_decreasing
