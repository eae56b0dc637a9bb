"""`upweight value`: what it writes, prints, refuses and resumes."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from audit_html import Page, text_of
from upweight.report import cli, value_folder, value_run
from upweight.report.value_settings import ValueSettings, command
from upweight.valuation import Values, knn_shapley

FILES = {"config.yaml", "report.html", "values.csv", "values.npz", "values.parquet"}
WRONG = (4, 31, 50)
EVIL = '</script><img src=x onerror="alert(1)">'


def make(rows: int = 60) -> pd.DataFrame:
    """Two classes that size tells apart, with three wrong labels."""
    rng = np.random.default_rng(0)
    large = np.arange(rows) % 2 == 1
    frame = pd.DataFrame(
        {
            "key": [f"r{at:03d}" for at in range(rows)],
            "size": (4.0 * large + rng.normal(0, 0.7, rows)).round(3),
            "colour": rng.choice(["red", "blue"], rows),
            "kind": np.where(large, "large", "small"),
            "price": (10 + 5 * large + rng.normal(0, 0.5, rows)).round(2),
        }
    )
    for at in (at for at in WRONG if at < rows):
        frame.loc[at, "kind"] = "small" if large[at] else "large"
    frame.loc[7, "colour"] = EVIL
    frame.loc[8, "key"] = "=cmd|'/c calc'!A1"
    return frame


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make().to_csv(tmp_path / "t.csv", index=False)
    return tmp_path


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes most of the time of a short run."""
    from upweight.report import value_page

    monkeypatch.setattr(value_page, "write", lambda outcome, path: path.write_text("a page"))


def run(*arguments: object) -> int:
    """The exit code of a command."""
    try:
        cli.main(["value", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


KIND = ("t.csv", "--target", "kind", "--ignore", "price", "--id", "key")
BANZHAF = (*KIND, "--method", "banzhaf", "--out", "b")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("upweight: ")
    assert err.count("\n") == 1
    return err


# ---- what is written and printed -----------------------------------------------------------------


def test_by_default_rows_judge_each_other_and_the_wrong_ones_come_first(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*KIND, "--top", "5") == 0
    out, err = capsys.readouterr()
    assert err == ""
    first = re.findall(r"^(\d+) \(r\d+\) ", out, re.M)
    assert {int(row) for row in first[:3]} == set(WRONG)
    assert out.startswith("t.csv: 60 rows, 2 feature columns, target kind (classification: ")
    assert "KNN-Shapley, K = 5: rows judge each other; exact" in out
    assert "exact" in out
    assert "that other rows have too" not in out
    folder = here / "runs" / "t-knn-shapley"
    assert f"report: {folder.relative_to(here) / 'report.html'}" in out
    assert {path.name for path in folder.iterdir()} == FILES

    frame = pd.read_parquet(folder / "values.parquet")
    columns = ["row", "name", "given", "value", "error", "low", "high", "rank"]
    assert list(frame) == columns
    assert frame["given"].tolist() == make()["kind"].tolist()
    assert frame.loc[frame["rank"] == 1, "value"].item() == frame["value"].max()
    assert (frame["error"] == 0).all()
    values = Values.load(folder / "values.npz")
    assert values.names.tolist() == frame["name"].tolist()
    settings = ValueSettings("kind", ignore=("price",), id="key")
    ready = value_run.ready(Path("t.csv"), settings)
    assert np.array_equal(values.values, knn_shapley(ready.x, ready.y, k=5).values)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["command"] == "value"
    assert config["settings"]["k"] == 5
    csv = pd.read_csv(folder / "values.csv")
    assert csv["name"][8] == "'=cmd|'/c calc'!A1"
    assert csv["value"].to_numpy() == pytest.approx(frame["value"].to_numpy())


def test_ids_that_repeat_name_the_rows_with_their_numbers(
    here: Path, no_page: None, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = make()
    frame.loc[[3, 7], "key"] = "twin"
    frame.to_csv("t.csv", index=False)
    assert run(*KIND) == 0
    told = "2 rows have a name that other rows have too, such as “twin”: behind it is the number"
    assert told in " ".join(capsys.readouterr().out.split())
    names = pd.read_parquet(here / "runs" / "t-knn-shapley" / "values.parquet")["name"].tolist()
    assert names[2:4] == [frame["key"][2], "twin (row 3)"]
    assert names[7] == "twin (row 7)"
    assert len(set(names)) == len(names) == 60


def test_ids_keep_their_names_where_a_number_behind_another_is_taken(
    here: Path, no_page: None, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = make()
    frame.loc[[3, 7, 9], "key"] = ["twin", "twin", "twin (row 3)"]
    frame.to_csv("t.csv", index=False)
    assert run(*KIND) == 0
    names = pd.read_parquet(here / "runs" / "t-knn-shapley" / "values.parquet")["name"].tolist()
    given = frame["key"].tolist()
    given[3], given[7] = "twin (row 3) (row 3)", "twin (row 7)"
    assert names == given


def test_ids_that_repeat_are_told_on_the_page(here: Path) -> None:
    page = here / "runs" / "t-knn-shapley" / "report.html"
    frame = make()
    frame.loc[[3, 7], "key"] = EVIL
    frame.to_csv("t.csv", index=False)
    assert run(*KIND, "--quiet") == 0
    told = text_of(page.read_text())
    assert "2 rows have a name that other rows have too, such as “&lt;/script" in told
    assert EVIL not in page.read_text()


def test_no_interval_is_told_where_there_is_none(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*KIND, "--method", "tmc", "--evaluations", "59", "--out", "few", "--top", "3") == 0
    out = capsys.readouterr().out
    assert np.isnan(Values.load(here / "few" / "values.npz").errors).all()
    page = text_of((here / "few" / "report.html").read_text())
    for told in (" ".join(out.split()), page):
        assert "Too few samples to say how far off the values are" in told
        assert "95 % interval" not in told
        assert "intervals overlap" not in told


@pytest.mark.slow
def test_a_sampled_run_says_whether_it_converged_and_lists_intervals(
    here: Path, no_page: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*BANZHAF, "--evaluations", "300", "--json", "--top", "4") == 0
    out, err = capsys.readouterr()
    assert err == ""
    told = json.loads(out)
    assert told["method"] == "banzhaf"
    assert told["converged"] is False
    assert told["evaluations"] <= 300
    assert told["failed"] == 0
    assert {one["row"] for one in told["lowest"][:3]} == set(WRONG)
    assert len(told["highest"]) == 4
    assert told["highest"][0]["rank"] == 1
    for one in told["lowest"]:
        assert one["low"] < one["value"] < one["high"]
    assert {path.name for path in Path("b").iterdir()} == FILES | {"utilities.db"}

    assert run(*BANZHAF, "--evaluations", "300", "--top", "4") == 0  # from the folder
    out, err = capsys.readouterr()
    assert "Not converged" in out
    assert re.search(r"^next: +upweight value .*--evaluations \d+.* --overwrite$", out, re.M)
    assert "finished before" in out
    assert "95 % interval" in out


@pytest.mark.slow
def test_stable_ranks_end_a_run(here: Path, no_page: None, capsys: Any) -> None:
    options = ("--until-stable", "0.3", "--evaluations", "5000", "--json")
    assert run(*BANZHAF, *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["converged"] is True
    assert told["stability"]["low"] >= 0.3
    assert told["evaluations"] < 5000
    assert run(*BANZHAF, *options[:-1]) == 0
    assert "Converged: after" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["oob", "tmc", "shapley", "beta", "loo"])
def test_every_method_finds_the_wrong_rows(
    here: Path, no_page: None, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    more = () if method in ("oob", "loo") else ("--evaluations", "1500")
    assert run(*KIND, "--method", method, *more, "--json", "--out", "x") == 0
    told = json.loads(capsys.readouterr().out)
    lowest = [one["row"] for one in told["lowest"]]
    assert set(WRONG) <= set(lowest[: 5 if method != "loo" else 12])


@pytest.mark.slow
def test_numbers_are_valued_too(here: Path, no_page: None, capsys: Any) -> None:
    frame = make()
    frame.loc[9, "price"] = 80.0
    frame.to_csv("t.csv", index=False)
    options = ("t.csv", "--target", "price", "--ignore", "kind", "--json")
    for at, method in enumerate(("knn-shapley", "banzhaf")):
        more = ("--evaluations", "1000") if method == "banzhaf" else ()
        assert run(*options, "--method", method, *more, "--out", f"x{at}") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["task"] == "regression"
        assert told["lowest"][0]["row"] == 9


@pytest.mark.slow
def test_other_models_and_scores(here: Path, no_page: None, capsys: Any) -> None:
    more = ("--model", "logistic", "--scoring", "brier", "--evaluations", "60", "--json")
    assert run(*BANZHAF, *more) == 0
    told = json.loads(capsys.readouterr().out)
    assert "brier of a logistic regression" in told["what"]


def test_test_rows_judge(here: Path, no_page: None, capsys: pytest.CaptureFixture[str]) -> None:
    frame = make(80)
    test = frame.iloc[60:].copy()
    test.loc[61, "kind"] = None  # is no judge
    test["extra"] = 1
    test.to_csv("test.csv", index=False)
    for method in ("knn-shapley", "banzhaf"):
        more = ("--evaluations", "600") if method == "banzhaf" else ()
        options = (*KIND, "--method", method, "--test", "test.csv", "--out", method, "--json")
        assert run(*options, *more) == 0
        told = json.loads(capsys.readouterr().out)
        assert "19 rows of test.csv judge the rows" in told["what"]
        assert told["rows"] == 60
        assert {one["row"] for one in told["lowest"][:3]} == set(WRONG)


def test_the_given_rows_without_a_target_are_left_out(here: Path, no_page: None) -> None:
    frame = make()
    frame.loc[[0, 20], "kind"] = None
    frame.to_csv("t.csv", index=False)
    assert run(*KIND, "--out", "x", "--quiet") == 0
    rows = pd.read_parquet("x/values.parquet")["row"].tolist()
    assert rows == [at for at in range(60) if at not in (0, 20)]


def test_a_plan_says_what_is_made_of_columns_and_what_it_takes(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*BANZHAF, "--plan") == 0
    out = capsys.readouterr().out
    assert re.search(r"^size +numeric", out, re.M)
    assert re.search(r"^price +ignored", out, re.M)
    assert "at most 6,000 evaluations, about " in out
    assert run(*KIND, "--plan", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["evaluations"] is None
    assert {one["name"]: one["kind"] for one in told["columns"]}["kind"] == "target"
    assert [path.name for path in here.iterdir()] == ["t.csv"]


def test_the_command_of_a_run_does_the_same_again() -> None:
    settings = ValueSettings(
        "the kind", "banzhaf", kinds={"a b": "category"}, ignore=("$x",), p=0.1, seed=3
    ).completed()
    told = command(settings, "t.csv", Path("my run"))
    assert told == (
        "upweight value t.csv --target 'the kind' --method banzhaf --p 0.1 --seed 3 "
        "--kind 'a b=category' --ignore '$x' --out 'my run'"
    )


# ---- the page ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_loads_nothing_escapes_all_and_says_what_is_not_known(here: Path) -> None:
    assert run(*BANZHAF, "--evaluations", "400", "--quiet", "--top", "60") == 0
    html = Path("b/report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.all("script")
    assert not page.all("img")
    assert "default-src 'none'" in html
    assert not re.search(r"https?://(?!www\.w3\.org)", html)
    assert "&lt;/script&gt;&lt;img src=x" in html
    text = text_of(html)
    assert "Not converged" in text
    assert "What is not known" in text
    assert "r004" in text
    assert "upweight value t.csv --target kind --method banzhaf" in text
    assert len(page.all("svg")) == 3
    assert run(*BANZHAF, "--evaluations", "400", "--quiet", "--top", "60", "--overwrite") == 0
    again = Path("b/report.html").read_text(encoding="utf-8")
    told = r">\d[\d,]* of them were known before<|>all by this run<|<bdi>\d+(\.\d)?</bdi></td>"
    assert re.sub(told, "", again) == re.sub(told, "", html)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--k", "3", "--method", "tmc"], "--k is no option of --method tmc, but of knn-shapley"),
        (["--p", "0.1"], "--p is no option of --method knn-shapley, but of banzhaf"),
        (["--evaluations", "9", "--method", "loo"], "--evaluations is no option of --method loo"),
        (["--until-stable", "0.9", "--method", "oob"], "--until-stable is no option of"),
        (["--model", "ridge"], "--model is no option of --method knn-shapley"),
        (["--test", "t.csv", "--method", "oob"], "--test is no option of --method oob"),
        (["--method", "banzhaf", "--p", "1.5"], "--p between 0 and 1; got 1.5"),
        (["--method", "banzhaf", "--minutes", "0"], "--minutes above 0"),
        (["--method", "banzhaf", "--until-stable", "1"], "--until-stable between 0 and 1"),
        (["--k", "0"], "--k of at least 1"),
        (["--k", "60"], "--k below the number of rows"),
        (["--top", "0"], "--top of at least 1"),
        (["--jobs", "0"], "--jobs of at least 1"),
        (["--target", "kid"], "did you mean 'kind'"),
        (["--kind", "size"], "expected --kind NAME=KIND"),
        (["--method", "tmc", "--scoring", "r2"], "for a classification; got 'r2'"),
        (["--method", "tmc", "--model", "logistic", "--target", "price"], "is for classes"),
        (["--method", "magic"], "magic"),
        (["--test", "none.csv"], "no file none.csv"),
        (["--out", "t.csv"], "t.csv is a file"),
    ],
)
def test_mistakes_end_with_one_line_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    target = [] if "--target" in options else ["--target", "kind"]
    assert told in refused(capsys, "t.csv", *target, *options)
    assert [path.name for path in here.iterdir()] == ["t.csv"]


def test_tables_that_teach_nothing_are_refused(here: Path, capsys: Any) -> None:
    make().assign(kind="small").to_csv("one.csv", index=False)
    make(8).to_csv("few.csv", index=False)
    assert "nothing to predict" in refused(capsys, "one.csv", "--target", "kind")
    assert "at least 10 are needed" in refused(capsys, "few.csv", "--target", "kind")
    make().assign(kind="new").to_csv("test.csv", index=False)
    assert "which no row of the table has" in refused(capsys, *KIND, "--test", "test.csv")
    make().drop(columns="size").to_csv("test.csv", index=False)
    assert "it has no 'size'" in refused(capsys, *KIND, "--test", "test.csv")


def test_another_run_is_not_replaced_unless_asked(here: Path, no_page: None, capsys: Any) -> None:
    assert run(*BANZHAF, "--evaluations", "100", "--quiet") == 0
    capsys.readouterr()
    told = refused(capsys, *BANZHAF, "--evaluations", "200")
    assert "as a run (evaluations 100, now 200)" in told
    before = Path("b/values.npz").read_bytes()
    assert run(*BANZHAF, "--evaluations", "200", "--overwrite", "--quiet") == 0
    after = Values.load("b/values.npz")
    assert Path("b/values.npz").read_bytes() != before
    assert after.provenance["computed"] <= 110  # the first hundred were known
    assert after.provenance["evaluations"] > 150
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    assert "is no run of upweight value (it has 'thesis.txt')" in refused(
        capsys, *KIND, "--out", "mine", "--overwrite"
    )


def test_a_folder_is_whole_or_as_it_was(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from upweight.report import value_page

    def broken(*_: Any) -> None:
        raise OSError("no page")

    with monkeypatch.context() as patched:
        patched.setattr(value_page, "write", broken)
        refused(capsys, *KIND, "--out", "new/run", "--quiet")
        assert not Path("new").exists()  # nothing was computed that could be used again
        refused(capsys, *BANZHAF, "--evaluations", "100", "--quiet")
        assert {path.name for path in Path("b").iterdir()} == {".work", "utilities.db"}
    assert "as an unfinished run (evaluations 100, now 90)" in refused(
        capsys, *BANZHAF, "--evaluations", "90"
    )
    assert run(*BANZHAF, "--evaluations", "100", "--quiet") == 0
    values = Values.load("b/values.npz")
    assert values.provenance["computed"] == 0
    assert {path.name for path in Path("b").iterdir()} == FILES | {"utilities.db"}


# ---- stopped -------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_computed(
    here: Path, no_page: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from upweight.valuation.ridge_utility import RidgeUtility

    whole = RidgeUtility.evaluate
    calls: list[int] = []

    def stopped(self: RidgeUtility, masks: Any) -> Any:
        calls.append(len(masks))
        if sum(calls) > 300:
            raise KeyboardInterrupt
        return whole(self, masks)

    with monkeypatch.context() as patched:
        patched.setattr(RidgeUtility, "evaluate", stopped)
        assert run(*BANZHAF, "--evaluations", "600", "--quiet") == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "upweight: stopped; utilities are kept: the same command resumes\n"
    kept = sum(calls) - calls[-1] - 2  # those of no rows and of all are not counted
    assert kept > 100
    assert {path.name for path in Path("b").iterdir()} == {".work", "utilities.db"}

    assert run(*BANZHAF, "--evaluations", "600", "--quiet") == 0
    assert run(*BANZHAF[:-1], "c", "--evaluations", "600", "--quiet") == 0
    resumed, plain = Values.load("b/values.npz"), Values.load("c/values.npz")
    assert resumed.provenance["computed"] == plain.provenance["computed"] - kept
    assert np.array_equal(resumed.values, plain.values)
    assert np.array_equal(resumed.errors, plain.errors)


def kept_in(path: Path) -> int:
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5) as connection:
            ((number,),) = connection.execute("SELECT count(*) FROM utilities")
    except sqlite3.OperationalError:
        return 0
    return int(number)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_goes_on(here: Path, no_page: None, sent: signal.Signals) -> None:
    options = [*BANZHAF, "--model", "logistic", "--evaluations", "300", "--until-stable", "0.999"]
    program = "import sys; from upweight.report.cli import main; main(sys.argv[1:])"
    line = [sys.executable, "-c", program, "value", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while kept_in(here / "b" / "utilities.db") < 10 and time.monotonic() < limit:
        assert process.poll() is None, "it ended before it was stopped"
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    if sent == signal.SIGINT:
        assert "the same command resumes" in err
        assert "Traceback" not in err
    kept = kept_in(here / "b" / "utilities.db")
    assert kept >= 10
    assert not (here / "b" / "values.npz").exists()

    assert run(*options, "--quiet") == 0
    resumed = Values.load("b/values.npz")
    evaluations = resumed.provenance["evaluations"]
    assert resumed.provenance["computed"] <= evaluations + 2 - kept
    assert resumed.provenance["computed"] < evaluations
    assert value_folder.state_of(here / "b")[0] == "finished"
