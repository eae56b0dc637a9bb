"""`upweight audit`, `show`, `clean` and `verify`: what they print, write, refuse and resume."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import upweight as uw
import upweight.auditing.run as running
from audit_example import example, verified
from audit_quick import WRONG, frame, quick_audit, write_csv
from upweight.auditing.conditions import parse_condition
from upweight.auditing.folder import read_run, save
from upweight.report import audit_run, audit_terminal, cli
from upweight.report.terminal import cut, printable, table, width

FILES = {
    "columns.json",
    "config.yaml",
    "details.json",
    "findings.csv",
    "findings.parquet",
    "plots",
    "report.html",
    "rows.parquet",
    "summary.json",
}


def run(*arguments: str | Path) -> int:
    """The exit code of a command."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


WRITE_PAGES = audit_run.write_pages


def quick_pages(found: Any, stage: Path) -> None:
    (stage / "plots").mkdir()
    (stage / "plots" / "suspicion.svg").write_text("<svg/>")
    (stage / "report.html").write_text("a page")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a table, where an audit and its page take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "run_audit", quick_audit)
    monkeypatch.setattr(audit_run, "write_pages", quick_pages)
    write_csv(tmp_path / "table.csv")
    return tmp_path


@pytest.fixture
def audited(here: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run("audit", "table.csv", "--target", "kind", "--quiet") == 0
    capsys.readouterr()
    return here


# ---- audit --------------------------------------------------------------------------------------


def test_an_audit_prints_the_first_rows_and_what_comes_next(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("audit", "table.csv", "--target", "kind") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("table.csv: 80 rows, 2 feature columns, target kind (classification: ")
    line = r"^4 \(r004\) +label +large → small +0\.\d+ +the trees prefer small$"
    assert re.search(line, out, re.M)
    assert "helps" not in out  # a helpful row is no fault
    assert "3 suspected wrong labels (" in out
    assert "report: runs/table/report.html" in out
    commands = re.findall(r"upweight (\w+ .*)", out)
    assert [command.split()[0] for command in commands] == ["show", "clean", "verify"]
    assert {path.name for path in (here / "runs" / "table").iterdir()} == FILES
    for command in commands[:2]:
        assert run(*command.split()) == 0
    assert (here / "table.clean.csv").is_file()


def test_quiet_prints_the_path_of_the_report(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("audit", "table.csv", "--target", "kind", "--quiet", "--out", "my run") == 0
    assert capsys.readouterr() == (f"report: {Path('my run') / 'report.html'}\n", "")


def test_json_is_all_there_is_on_stdout(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("audit", "table.csv", "--target", "kind", "--json", "--top", "2") == 0
    out, err = capsys.readouterr()
    assert err == ""
    content = json.loads(out)
    assert set(content) == {"run", "report", "summary", "findings"}
    assert content["summary"]["flagged"] == 3
    assert len(content["findings"]) == 2
    first = content["findings"][0]
    assert (first["row"], first["kind"], first["column"]) == (12, "duplicate", None)


def test_every_option_becomes_a_setting(here: Path) -> None:
    options = ["--task", "classification", "--id", "id", "--kind", "size=category"]
    options += ["--kind", "weight=numeric", "--ignore", "weight", "--delimiter", ";"]
    options += ["--encoding", "utf-8", "--top", "7", "--seed", "3", "--no-influence"]
    options[options.index("weight=numeric")] = "size=category"
    assert run("audit", "table.csv", "--target", "kind", *options, "--out", "x", "--quiet") == 0
    settings = yaml.safe_load(Path("x/config.yaml").read_text())["settings"]
    assert settings == {
        "target": "kind",
        "task": "classification",
        "id": "id",
        "kinds": {"size": "category"},
        "ignore": ["weight"],
        "delimiter": ";",
        "encoding": "utf-8",
        "top": 7,
        "seed": 3,
        "folds": 5,
        "networks": 2,
        "trees": 300,
        "neighbours": 5,
        "influence": False,
        "planted": 3,
    }


def test_a_plan_is_printed_and_nothing_done(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "run_audit", None)
    assert run("audit", "table.csv", "--target", "kind", "--plan") == 0
    out = capsys.readouterr().out
    assert re.search(r"^size +numeric", out, re.M)
    assert run("audit", "table.csv", "--target", "kind", "--plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [column["name"] for column in plan["columns"]] == ["id", "size", "weight", "kind"]
    assert plan["task"] == "classification"
    assert plan["seconds"] == pytest.approx(sum(plan["steps"].values()))
    assert tree(here) == {"table.csv"}


def test_a_finished_run_is_read_and_not_run_again(
    audited: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "run_audit", None)
    assert run("audit", "table.csv", "--target", "kind") == 0
    out = capsys.readouterr().out
    assert "Already in runs/table; --overwrite audits again." in out
    assert "3 suspected wrong labels" in out


def test_other_settings_are_refused_with_what_differs(
    audited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (audited / "runs/table/config.yaml").read_bytes()
    assert run("audit", "table.csv", "--target", "kind", "--seed", "1") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "upweight: runs/table exists with other settings, as a run (seed 0, now 1): choose "
        "another --out, or --overwrite\n"
    )
    assert (audited / "runs/table/config.yaml").read_bytes() == before
    assert run("audit", "table.csv", "--target", "kind", "--seed", "1", "--overwrite") == 0
    assert read_run(audited / "runs/table").settings.seed == 1


def test_another_table_of_the_same_name_is_refused(
    audited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(audited / "table.csv", frame(60))
    assert run("audit", "table.csv", "--target", "kind") == 2
    assert "(the content of table.csv has changed)" in capsys.readouterr().err


# ---- stopped, and resumed -----------------------------------------------------------------------


def test_ctrl_c_leaves_what_the_same_command_resumes(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops(table: Any, settings: Any, *, steps: Any) -> Any:
        steps.run("features", lambda: {"x": np.full((80, 2), 0.5)})
        raise KeyboardInterrupt

    command = ("audit", "table.csv", "--target", "kind")
    monkeypatch.setattr(running, "run_audit", stops)
    assert run(*command) == 130
    assert capsys.readouterr().err == "upweight: stopped; the same command resumes\n"
    assert tree(here / "runs/table") == {".work", ".work/config.yaml", ".work/features.npz"}
    assert run("show", "runs/table") == 2
    assert "not finished: the command that began it resumes it" in capsys.readouterr().err
    assert run(*command, "--seed", "1") == 2
    assert "an unfinished run (seed 0, now 1)" in capsys.readouterr().err

    resumed: list[str] = []

    def goes_on(table: Any, settings: Any, *, steps: Any) -> Any:
        found = quick_audit(table, settings, steps=steps)
        resumed.extend(steps.resumed)
        return found

    monkeypatch.setattr(running, "run_audit", goes_on)
    assert run(*command) == 0
    assert resumed == ["features"]
    assert {path.name for path in (here / "runs/table").iterdir()} == FILES


def test_ctrl_c_before_the_first_step_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run_audit", stops)
    assert run("audit", "table.csv", "--target", "kind", "--out", "x") == 130
    assert tree(here) == {"table.csv"}


@pytest.mark.parametrize("at", ["step", "table", "page"])
@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_half_written(
    at: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    place = {
        "step": (np, "savez"),
        "table": (pd.DataFrame, "to_parquet"),
        "page": (audit_run, "write_pages"),
    }
    monkeypatch.setattr(*place[at], full)
    assert run("audit", "table.csv", "--target", "kind", "--out", "x") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("upweight: the disk is full: x")
    assert err.count("\n") == 1
    assert {name for name in tree(here) if not name.startswith("x/.work")} <= {"table.csv", "x"}
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(running, "run_audit", quick_audit)
    assert run("audit", "table.csv", "--target", "kind", "--out", "x") == 0


# ---- replay -------------------------------------------------------------------------------------


def test_config_replays_the_run(audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = audited / "runs/table"
    assert run("audit", "--config", there / "config.yaml", "--out", "again", "--quiet") == 0
    for name in ("rows.parquet", "findings.parquet", "findings.csv", "details.json"):
        assert (audited / "again" / name).read_bytes() == (there / name).read_bytes()
    assert read_run(audited / "again").settings == read_run(there).settings
    capsys.readouterr()
    assert run("audit", "--config", there) == 0  # in its own folder all of it is there
    assert "Already in" in capsys.readouterr().out


def test_options_beside_a_config_change_single_settings(audited: Path) -> None:
    config = audited / "runs/table/config.yaml"
    assert run("audit", "--config", config, "--out", "x", "--seed", "4", "--quiet") == 0
    settings = read_run(audited / "x").settings
    assert (settings.seed, settings.target) == (4, "kind")


def test_a_replay_wants_the_same_table(audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(audited / "table.csv", frame(60))
    config = audited / "runs/table/config.yaml"
    assert run("audit", "--config", config, "--out", "x") == 2
    assert "table.csv has changed since the run that is replayed" in capsys.readouterr().err
    assert run("audit", "table.csv", "--config", config, "--out", "x", "--quiet") == 0
    assert read_run(audited / "x").summary.rows == 60


# ---- from Python --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pd.DataFrame, pl.from_pandas, pa.Table.from_pandas])
def test_frames_are_audited_in_memory(make: Any, here: Path) -> None:
    found = uw.audit(make(frame()), target="kind", progress=False)
    assert isinstance(found, uw.Audit)
    assert set(found.suspects()["row"]) == set(WRONG)
    assert tree(here) == {"table.csv"}


def test_an_audit_in_python_writes_what_the_command_writes(audited: Path) -> None:
    found = uw.audit("table.csv", "kind", out="x", progress=False)
    assert found.settings == read_run(audited / "x").settings
    names = {path.name for path in (audited / "x").iterdir()}
    assert names == FILES
    for name in names - {"plots", "summary.json", "config.yaml"}:  # paths and seconds differ
        assert (audited / "x" / name).read_bytes() == (audited / "runs/table" / name).read_bytes()
    again = uw.audit("table.csv", "kind", out="x", progress=False)
    pd.testing.assert_frame_equal(again.rows, found.rows, check_dtype=False)
    with pytest.raises(FileExistsError, match="seed 0, now 1"):
        uw.audit("table.csv", "kind", out="x", seed=1, progress=False)


def test_a_single_column_to_ignore_may_be_a_word(here: Path) -> None:
    assert uw.audit(frame(), "kind", ignore="size", progress=False).settings.ignore == ("size",)


# ---- --fail-on ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "code", "told"),
    [
        (["rate>0.03"], 1, "rate>0.03: it is 0.0375"),
        (["rate>3%"], 1, "rate>0.03: it is 0.0375"),
        (["rate>0.04"], 0, ""),
        (["labels>=3"], 1, "labels>=3: it is 3"),
        (["labels>3"], 0, ""),
        (["duplicates>0", "leakage>0"], 1, "duplicates>0: it is 1"),
        (["conflicts>0", "features>0", "noise>0.05"], 0, ""),
        (["noise >= 0.04"], 1, "noise>=0.04: it is 0.04"),
    ],
)
def test_conditions_decide_the_exit_code_after_all_is_written(
    conditions: list[str],
    code: int,
    told: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [part for one in conditions for part in ("--fail-on", one)]
    assert run("audit", "table.csv", "--target", "kind", "--json", *options) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["summary"]["flagged"] == 3
    assert told in err
    assert err.count("\n") == (1 if told else 0)
    assert {path.name for path in (here / "runs/table").iterdir()} == FILES


@pytest.mark.parametrize("text", ["", "rate", "rate<1", "rate>", "rate>x", "rtae>1", "rate>1>2"])
def test_a_bad_condition_is_refused_before_any_work(
    text: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("upweight.report.audit_run.read_table", None)
    assert run("audit", "table.csv", "--target", "kind", "--fail-on", text) == 2
    assert "expected a condition such as rate>0.03" in capsys.readouterr().err


def test_a_number_that_was_not_estimated_cannot_be_judged() -> None:
    summary = example(30).summary
    object.__setattr__(summary, "noise", None)
    with pytest.raises(ValueError, match="noise was not estimated"):
        parse_condition("noise>0").holds(summary)


# ---- bad input ----------------------------------------------------------------------------------


def bad_tables() -> dict[str, tuple[Any, str]]:
    """Content of a CSV, and what must be told."""
    rows = frame().to_csv(index=False)
    lines = rows.splitlines()
    alone = [*lines[:-1], lines[-1].rsplit(",", 1)[0] + ",alone", ""]
    return {
        "missing target": (rows.replace("kind", "kin", 1), "did you mean 'kin'?"),
        "empty file": ("", "empty"),
        "only a header": (lines[0] + "\n", "no rows"),
        "one class only": (rows.replace("small", "large"), "in every row"),
        "a class with one row": ("\n".join(alone), "'alone'"),
        "target all missing": (re.sub(r",(small|large)", ",", rows), "missing in all"),
        "all columns missing": (
            "\n".join(["a,kind", *(f",{k}" for k in ["x", "y"] * 20)]),
            "no column is left",
        ),
        "duplicate column names": (rows.replace("size", "weight", 1), "weight"),
        "ragged": (rows.replace("\nr005,", "\nr005,1,2,3,4,5,", 1), "line 7"),
        "more classes than rows / 2": (
            "\n".join(["a,kind", *(f"{i},k{i // 2 if i < 4 else i}" for i in range(40))]),
            "classes",
        ),
        "infinite values": (rows.replace("r009,", "r009,inf\nr009,", 1), ""),
    }


@pytest.mark.parametrize("what", sorted(bad_tables()))
def test_bad_tables_end_with_one_line_and_nothing_written(
    what: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, told = bad_tables()[what]
    if what == "infinite values":
        table = frame()
        table["size"] = table["size"].where(table.index != 9, np.inf)
        content, told = table.to_csv(index=False), "infinite"
    monkeypatch.undo()
    monkeypatch.chdir(here)
    (here / "bad.csv").write_text(content)
    assert_refused(here, capsys, told, "bad.csv", "--target", "kind")


def assert_refused(
    here: Path, capsys: pytest.CaptureFixture[str], told: str, *arguments: str
) -> None:
    before = tree(here)
    assert run("audit", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("upweight: ")
    assert err.count("\n") == 1
    assert told in err
    assert "Traceback" not in err
    assert tree(here) == before


def test_a_target_that_is_no_number(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("table.csv", "--target", "kind", "--task", "regression")
    assert_refused(here, capsys, "is no number", *options)


def test_a_wrong_encoding(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bad.csv").write_bytes("größe,kind\n1,ä\n".encode("latin-1") * 20)
    assert_refused(here, capsys, "utf-8", "bad.csv", "--target", "kind", "--encoding", "utf-8")


def test_a_file_that_unpacks_to_more_than_there_is_memory(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = pa.table({"x": np.zeros(2_000_000), "kind": np.zeros(2_000_000)})
    pq.write_table(packed, here / "bomb.parquet", compression="zstd")
    assert (here / "bomb.parquet").stat().st_size < 100_000
    monkeypatch.setenv("UPWEIGHT_TABLE_LIMIT", "10MB")
    assert_refused(here, capsys, "over the limit of 10.0 MB", "bomb.parquet", "--target", "kind")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nope.csv", "--target", "kind"], "no file nope.csv"),
        ([".", "--target", "kind"], "is a folder"),
        (["table.csv"], "expected --target NAME"),
        ([], "expected the FILE to audit"),
        (["table.csv", "--target", "kind", "--kind", "size"], "expected --kind NAME=KIND"),
        (["table.csv", "--target", "kind", "--kind", "size=zebra"], "zebra"),
        (["table.csv", "--target", "kind", "--kind", "sze=text"], "did you mean 'size'"),
        (["table.csv", "--target", "kind", "--ignore", "kind"], "is the target"),
        (["table.csv", "--target", "kind", "--id", "nope"], "no column 'nope'"),
        (["table.csv", "--target", "kind", "--task", "ranking"], "ranking"),
        (["table.csv", "--target", "kind", "--top", "0"], "top"),
        (["table.csv", "--target", "kind", "--seed", "-1"], "seed"),
        (["table.csv", "--target", "kind", "--out", "table.csv"], "is a file"),
        (["table.csv", "--target", "kind", "--out", "table.csv/x"], "no folder to write to"),
        (["table.csv", "--target", "kind", "--out", "."], "no run of an audit"),
        (["--config", "nope.yaml"], "cannot be read"),
        (["table.csv", "--target", "kind", "--tarsk", "x"], "--tarsk"),
    ],
)
def test_bad_arguments_end_with_one_line(
    arguments: list[str], told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not arguments:
        arguments = ["--target", "kind"]
    assert_refused(here, capsys, told, *arguments)


def test_an_error_of_the_audit_itself_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("a reason")

    monkeypatch.setattr(running, "run_audit", fails)
    assert_refused(here, capsys, "a reason", "table.csv", "--target", "kind")


def test_names_cannot_write_to_the_terminal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bad.csv").write_text("a,\x1b[2Jb\u202e\n" + "1,2\n" * 20)
    assert_refused(here, capsys, "\\x1b[2Jb\\u202e", "bad.csv", "--target", "kind")


# ---- show ---------------------------------------------------------------------------------------


def test_show_lists_findings_of_a_kind(audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "runs/table", "--kind", "duplicate") == 0
    out = capsys.readouterr().out
    assert "a copy" in out
    assert "label" not in out
    assert run("show", "runs/table", "--top", "1") == 0
    out = capsys.readouterr().out
    assert "3 more in runs/table/findings.csv" in out
    assert run("show", "runs/table", "--kind", "leakage") == 0
    assert "no findings of the kind leakage" in capsys.readouterr().out
    assert run("show", "runs/table", "--json", "--kind", "label") == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {line["row"] for line in found} == set(WRONG)


@pytest.mark.parametrize("wanted", ["4", "r004"])
def test_show_tells_all_of_a_row(
    wanted: str, audited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", "runs/table", "--row", wanted) == 0
    out = capsys.readouterr().out
    assert out.startswith("row 4 (r004): given large, proposed small, suspicion 0.")
    for told in ("label: the trees prefer small", "cells that stand out", "1 (large)", "knn 0"):
        assert told in out
    assert run("show", "runs/table", "--row", wanted, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["row"]["name"] == "r004"
    assert content["detail"]["supporting"] == [0]
    assert content["row"]["duplicate_of"] is None


def test_show_of_rows_without_details(audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "runs/table", "--row", "12") == 0
    out = capsys.readouterr().out
    assert "the same as row 10" in out
    assert "only the 100 most suspicious rows have them" in out
    assert run("show", "runs/table", "--row", "20") == 0
    assert "no findings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["runs/nope"], "no run of an audit"),
        (["."], "no run of an audit"),
        (["runs/table", "--kind", "labels"], "expected a kind among label, features"),
        (["runs/table", "--row", "80"], "a position from 0 to 79; got '80'"),
        (["runs/table", "--row", "-1"], "-1"),
        (["runs/table", "--top", "0"], "at least 1"),
    ],
)
def test_what_show_refuses(
    arguments: list[str], told: str, audited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", *arguments) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_rows_that_share_a_name_are_not_guessed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(here / "table.csv", frame().assign(id=["twin"] * 2 + [f"r{i}" for i in range(78)]))
    assert run("audit", "table.csv", "--target", "kind", "--id", "id", "--quiet") == 0
    capsys.readouterr()
    assert run("show", "runs/table", "--row", "twin") == 2
    assert "2 rows are named 'twin': give the position of one, such as 0" in capsys.readouterr().err


def test_what_is_printed_of_hostile_text_is_printable(tmp_path: Path) -> None:
    audit = example(60, hostile=True)
    save(audit, tmp_path / "run")
    there = read_run(tmp_path / "run")
    texts = [audit_terminal.audited(audit, tmp_path / "run", found=True)]
    texts.append(audit_terminal.findings(there, None, 100, as_json=False))
    texts += [audit_terminal.row(there, str(row), as_json=False) for row in range(60)]
    for text in texts:
        assert text.replace("\n", "").isprintable()
        assert max(map(len, text.splitlines())) < 1000


# ---- clean and verify ---------------------------------------------------------------------------


def test_clean_writes_and_tells(audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("clean", "runs/table", "-o", "c.csv", "--drop", "label-errors,duplicates") == 0
    assert capsys.readouterr() == ("76 rows kept, 4 dropped: c.csv\n", "")
    assert run("clean", "runs/table", "-o", "c.csv") == 2
    assert "c.csv exists" in capsys.readouterr().err
    assert run("clean", "runs/table", "-o", "c.csv", "--relabel", "--overwrite") == 0
    assert capsys.readouterr().out == "80 rows kept, 0 dropped, 3 relabelled: c.csv\n"
    assert run("clean", "runs/table", "-o", "table.csv", "--overwrite") == 2
    assert "is the table that was audited" in capsys.readouterr().err
    assert run("clean", "runs/table", "-o", "no/such/folder.csv") == 2
    assert capsys.readouterr().err.count("\n") == 1
    shutil.move(audited / "table.csv", audited / "moved.csv")
    assert run("clean", "runs/table", "-o", "d.csv") == 2
    assert "--source" in capsys.readouterr().err
    assert run("clean", "runs/table", "-o", "d.csv", "--source", "moved.csv") == 0


@pytest.mark.slow
def test_verify_adds_to_the_run_and_to_its_report(
    audited: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit_run, "write_pages", WRITE_PAGES)
    folder = audited / "runs/table"
    before = {name: (folder / name).read_bytes() for name in FILES - {"plots", "report.html"}}
    command = ("verify", "runs/table", "--repeats", "2", "--model", "linear")
    assert run(*command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"^without flagged +2 +[01]\.\d{4}", out, re.M)
    assert "gain without the flagged rows: " in out
    assert out.endswith("report: runs/table/report.html\n")
    assert {path.name for path in folder.iterdir()} == FILES | {
        "verification.json",
        "verification.parquet",
    }
    assert (folder / "plots/verification.svg").is_file()
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert "balanced accuracy" in (folder / "report.html").read_text(encoding="utf-8")
    found = read_run(folder).verification
    assert found is not None
    assert run(*command, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert tuple(again["gain"]) == found.gain
    assert again["repeats"] == 2


@pytest.mark.parametrize(
    ("gain", "over_random", "told"),
    [
        ((0.03, 0.01, 0.05), (0.03, 0.01, 0.05), "Removing them helps, and more"),
        ((0.03, 0.01, 0.05), (0.01, -0.01, 0.03), "not clearly more so than without"),
        ((-0.03, -0.05, -0.01), (-0.03, -0.05, -0.01), "Removing them harms"),
        ((0.01, -0.01, 0.03), (0.03, 0.01, 0.05), "cannot be told"),
    ],
)
def test_the_verdict_follows_from_the_intervals(gain: Any, over_random: Any, told: str) -> None:
    audit = verified(example(40))
    assert audit.verification is not None
    found = replace(audit.verification, gain=gain, gain_over_random=over_random)
    text = audit_terminal.verified(replace(audit, verification=found), as_json=False)
    assert told in text
    assert f"{gain[0]:+.4f} ({gain[1]:+.4f} to {gain[2]:+.4f})" in text


def test_what_verify_refuses(audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "runs/nope") == 2
    assert "no run of an audit" in capsys.readouterr().err
    assert run("verify", "runs/table", "--repeats", "1") == 2
    assert "at least 2 repeats" in capsys.readouterr().err
    write_csv(audited / "table.csv", frame(60))
    assert run("verify", "runs/table") == 2
    assert "has changed since the audit" in capsys.readouterr().err
    assert tree(audited / "runs/table") & {"verification.json"} == set()


# ---- the terminal -------------------------------------------------------------------------------


def test_texts_fit_their_cells() -> None:
    assert printable("a\x1b[31mb\r\nc\u202e\u200b\ud800") == "a\\x1b[31mb c\\u202e\\u200b\\ud800"
    assert width("日本") == 4
    assert width("e\u0301") == 1
    assert cut("日本語", 5) == "日本…"
    assert cut("x" * 10_000, 4) == "xxx…"
    assert cut("four", 4) == "four"
    assert cut("\x1b" * 5, 6) == "\\x1b\\…"


@pytest.mark.parametrize("total", [30, 60, 200])
def test_a_table_is_as_wide_as_the_terminal(total: int) -> None:
    columns = {
        "row": ["1", "日本語" * 9],
        "label": ["x" * 40, ""],
        "why": ["because " * 20, "\x1b"],
    }
    lines = table(columns, right=["label"], last=total).splitlines()
    assert len(lines) == 3
    assert all(width(line) <= total for line in lines)
    assert all(line.isprintable() for line in lines)


# ---- as a process -------------------------------------------------------------------------------


def test_help_of_every_command_loads_nothing_heavy() -> None:
    code = (
        "import sys; from upweight.report.cli import main\n"
        "for command in ([], ['audit'], ['show'], ['clean'], ['verify']):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("--fail-on", "--relabel", "--repeats", "--row", "--config"):
        assert name in done.stdout


@pytest.mark.slow
def test_a_real_audit_from_the_table_to_the_clean_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "table.csv")
    assert run("audit", "table.csv", "--target", "kind", "--fail-on", "labels>0") == 1
    out = capsys.readouterr().out
    there = read_run("runs/table")
    assert set(WRONG) <= set(there.rows.loc[there.rows["label_flag"].fillna(False), "row"])
    assert "rows.parquet" in {path.name for path in Path("runs/table").iterdir()}
    assert "upweight clean" in out
    assert run("audit", "--config", "runs/table", "--out", "again", "--quiet") == 0
    for name in ("rows.parquet", "findings.parquet", "findings.csv", "details.json"):
        assert Path("again", name).read_bytes() == Path("runs/table", name).read_bytes()
    assert run("verify", "runs/table", "--repeats", "3", "--model", "linear") == 0
    assert run("clean", "runs/table", "-o", "clean.csv") == 0
    left = pd.read_csv("clean.csv", sep=";")
    assert not {f"r{row:03d}" for row in WRONG} & set(left["id"])
