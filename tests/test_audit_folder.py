"""The folder of a run: whole or not at all, and the same when it is read."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from audit_example import HOSTILE, example, verified
from audit_quick import frame, quick_audit, write_csv
from upweight.auditing import config as configs
from upweight.auditing.audit import Audit, Summary, Verification
from upweight.auditing.config import Config, differences, read_config, write_config
from upweight.auditing.folder import (
    begin,
    check_folder,
    give_up,
    load,
    read_run,
    save,
    save_verification,
    state_of,
)
from upweight.auditing.plain import from_plain, to_plain
from upweight.auditing.settings import AuditSettings
from upweight.auditing.staging import safe_csv_cell
from upweight.auditing.steps import WORK, Steps
from upweight.tables import Source, TableError, read_table

FILES = [
    "columns.json",
    "config.yaml",
    "details.json",
    "findings.csv",
    "findings.parquet",
    "rows.parquet",
    "summary.json",
]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    path = write_csv(tmp_path_factory.mktemp("data") / "table.csv")
    return quick_audit(read_table(path), AuditSettings("kind"), steps=Steps())


@pytest.fixture
def audited(made: Audit, tmp_path: Path) -> Audit:
    """The same audit of a table of one's own."""
    path = tmp_path / "table.csv"
    shutil.copyfile(made.table.source.path or "", path)
    source = replace(made.table.source, path=str(path))
    return replace(made, table=replace(made.table, source=source))


# ---- what is written is what is read ------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{}, {"task": "regression"}, {"hostile": True}, {"rows": 30, "top": 0}],
    ids=["plain", "regression", "hostile", "small"],
)
def test_a_run_is_read_as_it_was_written(how: dict[str, Any], tmp_path: Path) -> None:
    audit = verified(example(**how))
    save(audit, tmp_path / "run")
    run = read_run(tmp_path / "run")
    pd.testing.assert_frame_equal(run.rows, audit.rows)
    pd.testing.assert_frame_equal(run.findings, audit.findings)
    assert to_plain(run.summary) == to_plain(audit.summary)
    assert to_plain(run.details) == to_plain(audit.details)
    assert run.columns == list(audit.columns)
    assert run.settings == audit.settings
    assert run.source == audit.table.source
    assert run.verification is not None
    assert audit.verification is not None
    pd.testing.assert_frame_equal(run.verification.table, audit.verification.table)
    assert run.verification.gain == audit.verification.gain
    assert names(tmp_path / "run") == sorted([*FILES, "verification.json", "verification.parquet"])


def test_the_same_audit_is_written_as_the_same_bytes(audited: Audit, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save(audited, tmp_path / folder)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_load_reads_the_table_as_well(audited: Audit, tmp_path: Path) -> None:
    save(audited, tmp_path / "run")
    again = load(tmp_path / "run")
    pd.testing.assert_frame_equal(again.table.frame, audited.table.frame)
    assert again.table.source.digest == audited.table.source.digest
    assert again.suspects()["row"].tolist() == audited.suspects()["row"].tolist()


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    audit = example(30)
    odd = replace(audit, summary=replace(audit.summary, noise=float("nan"), recall=float("-inf")))
    save(odd, tmp_path / "run")
    text = (tmp_path / "run" / "summary.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    summary = read_run(tmp_path / "run").summary
    assert np.isnan(summary.noise)
    assert summary.recall == float("-inf")


def test_columns_of_mixed_types_are_written_as_text(tmp_path: Path) -> None:
    audit = example(30)
    mixed = audit.rows.assign(name=pd.Series([1, "b"] * 15, dtype=object))
    save(replace(audit, rows=mixed), tmp_path / "run")
    assert read_run(tmp_path / "run").rows["name"].tolist() == ["1", "b"] * 15


# ---- spreadsheets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("-1", "-1"),
        ("+3.5e-7", "+3.5e-7"),
        ("-", "'-"),
        ("-1 = -1", "'-1 = -1"),
        ("a=1", "a=1"),
        ("", ""),
        (-1.5, -1.5),
        (None, None),
    ],
)
def test_formulas_are_turned_into_text(cell: Any, written: Any) -> None:
    assert safe_csv_cell(cell) == written


@given(st.text())
def test_no_text_begins_a_formula(text: str) -> None:
    safe = safe_csv_cell(text)
    assert safe == text or safe == "'" + text
    if safe[:1] in tuple("=+-@\t\r"):
        float(safe)


def test_findings_csv_is_safe_and_complete(tmp_path: Path) -> None:
    audit = example(hostile=True)
    save(audit, tmp_path / "run")
    path = tmp_path / "run" / "findings.csv"
    assert not path.read_bytes().startswith(b"\xef\xbb\xbf")
    found = pd.read_csv(path, dtype=str, keep_default_na=False, lineterminator="\n")
    assert len(found) == len(audit.findings)
    texts = found[["name", "given", "proposed", "column", "evidence"]].to_numpy().ravel()
    formulas = [text for text in texts if text.startswith(("=", "@", "\t", "\r"))]
    assert formulas == []
    assert any(text.startswith("'=HYPERLINK") for text in texts)
    assert any(text in HOSTILE for text in texts)  # others are as they were


# ---- whole or not at all ------------------------------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """The call of os.replace with this number, from 0, fails."""
    moved: list[Any] = []
    move = os.replace

    def replaces(source: Any, target: Any) -> None:
        moved.append(target)
        if len(moved) > number:
            monkeypatch.undo()
            raise error
        move(source, target)

    monkeypatch.setattr(os, "replace", replaces)


@pytest.mark.parametrize("number", range(len(FILES)))
def test_an_interrupted_save_leaves_nothing(
    number: int, audited: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, number, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save(audited, tmp_path / "runs" / "x")
    assert not (tmp_path / "runs" / "x").exists()
    save(audited, tmp_path / "runs" / "x")
    assert names(tmp_path / "runs" / "x") == FILES


@pytest.mark.parametrize("number", range(len(FILES)))
def test_an_interrupted_save_leaves_what_resumes(
    number: int, audited: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    config = Config.of(audited.table.source, audited.settings)
    begin(folder, config)
    Steps(folder, config.digest).run("judge", lambda: {"x": np.ones(3)})
    fail_at(monkeypatch, number, OSError("cable"))
    with pytest.raises(OSError, match="cable"):
        save(audited, folder)
    assert names(folder) == [f"{WORK}/config.yaml", f"{WORK}/judge.npz"]
    assert begin(folder, config) == "unfinished"
    with pytest.raises(FileNotFoundError, match="not finished: the command that began it resumes"):
        read_run(folder)


@pytest.mark.parametrize("call", ["to_parquet", "to_csv"])
def test_a_full_disk_is_told_and_leaves_what_was_there(
    call: str, audited: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    save(audited, folder)
    before = contents(folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, call, full)
    other = replace(audited, settings=AuditSettings("kind", seed=5))
    with pytest.raises(OSError, match=r"the disk is full: .*run was not written; free") as told:
        save(other, folder, overwrite=True)
    assert told.value.errno == errno.ENOSPC
    assert contents(folder) == before
    with pytest.raises(OSError, match="the disk is full"):
        save(other, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_extra_appears_with_the_rest(audited: Audit, tmp_path: Path) -> None:
    def extra(stage: Path) -> None:
        (stage / "report.html").write_text("page")
        (stage / "plots").mkdir()
        (stage / "plots" / "a.svg").write_text("<svg/>")

    def fails(stage: Path) -> None:
        extra(stage)
        raise RuntimeError("drawing")

    with pytest.raises(RuntimeError, match="drawing"):
        save(audited, tmp_path / "run", extra=fails)
    assert not (tmp_path / "run").exists()
    save(audited, tmp_path / "run", extra=extra)
    assert names(tmp_path / "run") == sorted([*FILES, "plots/a.svg", "report.html"])


def test_a_new_run_has_nothing_of_the_old_one(audited: Audit, tmp_path: Path) -> None:
    def extra(*figures: str) -> Any:
        def write(stage: Path) -> None:
            (stage / "plots").mkdir()
            for figure in figures:
                (stage / "plots" / figure).write_text("<svg/>")

        return write

    folder = tmp_path / "run"
    table = pd.DataFrame({"what": ["all rows"], "removed": [0], "score": [0.5]})
    found = Verification("accuracy", table, (0, -1, 1), (0, -1, 1), 3, "all")
    save(replace(audited, verification=found), folder, extra=extra("old.svg", "both.svg"))
    (folder / "notes.txt").write_text("mine")
    save(audited, folder, overwrite=True, extra=extra("both.svg", "new.svg"))
    assert names(folder) == sorted([*FILES, "notes.txt", "plots/both.svg", "plots/new.svg"])
    assert read_run(folder).verification is None


def test_a_verification_is_added(audited: Audit, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    table = pd.DataFrame({"what": ["all rows"], "removed": [0], "score": [0.5]})
    found = Verification("accuracy", table, (0.1, float("-inf"), 1.0), (0.0, -1.0, 1.0), 3, "all")
    with pytest.raises(FileNotFoundError, match="no finished run"):
        save_verification(found, folder)
    save(audited, folder)
    before = contents(folder)
    save_verification(found, folder)
    read = read_run(folder).verification
    assert read is not None
    assert read.gain == (0.1, float("-inf"), 1.0)
    assert {name: contents(folder)[name] for name in before} == before
    assert set(names(folder)) - set(before) == {"verification.json", "verification.parquet"}


# ---- other runs, other folders ------------------------------------------------------------------


def config_of(audited: Audit, **settings: Any) -> Config:
    return Config.of(audited.table.source, replace(audited.settings, **settings))


def test_a_folder_of_others_is_refused_and_kept(audited: Audit, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"no run of an audit \(it has 'thesis.txt'\)"):
            begin(folder, config_of(audited), overwrite=overwrite)
        with pytest.raises(FileExistsError, match="no run of an audit"):
            save(audited, folder, overwrite=overwrite)
    with pytest.raises(FileExistsError, match="is a file"):
        check_folder(folder / "thesis.txt")
    assert names(folder) == ["thesis.txt"]


def test_a_run_of_another_command_is_refused(audited: Audit, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("command: demo wine\nsettings: {}\n")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="of the command 'demo wine'"):
        begin(tmp_path, config_of(audited), overwrite=True)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(FileExistsError, match="no run of an audit"):
        begin(tmp_path, config_of(audited), overwrite=True)


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_with_other_settings_is_refused(
    finished: bool, audited: Audit, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    begin(folder, config_of(audited))
    if finished:
        save(audited, folder)
    before = contents(folder)
    kind = "a run" if finished else "an unfinished run"
    told = rf"exists with other settings, as {kind} \(id None, now 'id'; seed 0, now 1\): choose"
    with pytest.raises(FileExistsError, match=told):
        begin(folder, config_of(audited, seed=1, id="id"))
    assert contents(folder) == before
    assert begin(folder, config_of(audited, seed=1), overwrite=True) == "new"
    assert (folder / WORK / "config.yaml").is_file()
    assert read_config(folder / WORK / "config.yaml").settings.seed == 1
    assert {k: v for k, v in contents(folder).items() if WORK not in k} == {
        k: v for k, v in before.items() if WORK not in k
    }  # the old run stays until the new one is finished


def test_another_table_or_version_is_another_run(
    audited: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = audited.table.source
    there = config_of(audited)
    assert differences(there, config_of(audited)) == ""
    other = Config.of(replace(source, digest="0"), audited.settings)
    assert differences(there, other) == "the content of table.csv has changed"
    other = Config.of(replace(source, digest="0", name="b.csv"), audited.settings)
    assert differences(there, other) == "table table.csv, now b.csv"
    monkeypatch.setattr(configs, "__version__", "99.0")
    assert differences(there, config_of(audited)).endswith("now 99.0")
    assert config_of(audited).digest != there.digest


@pytest.mark.parametrize(
    "changed",
    [
        {"target": "size"},
        {"task": "regression"},
        {"kinds": {"size": "category"}},
        {"ignore": ("size",)},
        {"encoding": "latin-1"},
        {"top": 5},
        {"influence": False},
    ],
    ids=str,
)
def test_every_setting_counts(changed: dict[str, Any], audited: Audit) -> None:
    there, now = config_of(audited), config_of(audited, **changed)
    assert next(iter(changed)) in differences(there, now)
    assert there.digest != now.digest


def test_the_life_of_a_folder(audited: Audit, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", config_of(audited)
    assert state_of(folder) == ("new", None)
    assert begin(folder, config) == "new"
    assert begin(folder, config) == "unfinished"
    give_up(folder, [folder])
    assert not folder.exists()
    begin(folder, config)
    Steps(folder, config.digest).run("judge", lambda: {"x": np.ones(3)})
    give_up(folder)  # a finished step is worth keeping
    assert begin(folder, config, overwrite=True) == "unfinished"
    save(audited, folder)
    assert names(folder) == FILES
    assert begin(folder, config) == "finished"
    assert begin(folder, config, overwrite=True) == "new"
    give_up(folder)
    assert names(folder) == FILES


def test_what_a_killed_process_left_is_removed(audited: Audit, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", config_of(audited)
    begin(folder, config)
    (folder / ".1234abcd.partial").mkdir()
    (folder / "rows.parquet").write_text("half")
    assert begin(folder, config) == "unfinished"
    save(audited, folder)
    assert names(folder) == FILES


def test_a_finished_run_is_not_replaced_unasked(audited: Audit, tmp_path: Path) -> None:
    save(audited, tmp_path / "run")
    with pytest.raises(FileExistsError, match="has a run already"):
        save(audited, tmp_path / "run")


# ---- reading ------------------------------------------------------------------------------------


def test_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run of an audit in .*nope"):
        read_run(tmp_path / "nope")
    with pytest.raises(FileNotFoundError, match="no run of an audit"):
        read_run(Path(__file__).parent)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "empty", "half"])
def test_a_damaged_run_is_told(name: str, damage: str, audited: Audit, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    save(audited, folder)
    path = folder / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    if name == "findings.csv":  # for others to read
        read_run(folder)
        return
    with pytest.raises((ValueError, FileNotFoundError), match="run") as told:
        read_run(folder)
    assert str(folder) in str(told.value)


def test_a_newer_format_is_refused(audited: Audit, tmp_path: Path) -> None:
    save(audited, tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="format is not 1"):
        read_run(tmp_path / "run")


def test_the_table_must_be_there_and_the_same(audited: Audit, tmp_path: Path) -> None:
    save(audited, tmp_path / "run")
    path = tmp_path / "table.csv"
    moved = tmp_path / "moved.csv"
    shutil.move(path, moved)
    with pytest.raises(TableError, match=r"no longer at .*table.csv: give its new place"):
        load(tmp_path / "run")
    assert len(load(tmp_path / "run", source=moved).table) == 80
    moved.write_bytes(moved.read_bytes().replace(b"large", b"LARGE", 1))
    with pytest.raises(TableError, match=r"moved\.csv has changed since the audit"):
        load(tmp_path / "run", source=moved)


def test_a_frame_must_be_given_again(tmp_path: Path) -> None:
    audit = quick_audit(read_table(frame()), AuditSettings("kind"), steps=Steps())
    save(audit, tmp_path / "run")
    with pytest.raises(TableError, match="frame in memory"):
        load(tmp_path / "run")
    assert len(load(tmp_path / "run", source=frame()).table) == 80
    with pytest.raises(TableError, match="has changed"):
        load(tmp_path / "run", source=frame().assign(size=1.0))


def test_run_and_table_may_move_together(audited: Audit, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    path = write_csv(old / "table.csv")
    audit = quick_audit(read_table(path), AuditSettings("kind"), steps=Steps())
    save(audit, old / "runs" / "x")
    shutil.move(old, new)
    assert Path(load(new / "runs" / "x").table.source.path or "") == new / "table.csv"


# ---- config.yaml --------------------------------------------------------------------------------


def test_config_says_what_replays_the_run(audited: Audit, tmp_path: Path) -> None:
    save(audited, tmp_path / "run")
    content = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert content["command"] == "audit"
    assert content["source"]["relative"] == "../table.csv"
    assert content["source"]["delimiter"] == ";"
    assert content["source"]["digest"] == audited.table.source.digest
    assert content["settings"] == to_plain(audited.settings)
    assert set(content["versions"]) > {"upweight", "torch", "scikit-learn"}
    config = read_config(tmp_path / "run" / "config.yaml")
    assert config.settings == audited.settings
    assert config.digest == config_of(audited).digest


TEXT = st.text(st.characters(exclude_categories=()))  # halves of surrogate pairs among them
SETTINGS = st.builds(
    AuditSettings,
    TEXT,
    id=st.none() | TEXT,
    kinds=st.dictionaries(TEXT, st.sampled_from(["numeric", "category", "text"]), max_size=3),
    ignore=st.lists(TEXT, max_size=3).map(tuple),
    seed=st.integers(0, 2**40),
)


SOURCE = Source("a.csv", "a.csv", "csv", ";", "utf-8", "ab" * 32)


@given(SETTINGS)
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_settings_are_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, settings: AuditSettings
) -> None:
    config = Config(SOURCE, settings, {"upweight": "1"})
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    write_config(config, path, path.parent)
    read = read_config(path)
    assert (read.settings, read.digest) == (config.settings, config.digest)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no YAML"),
        ("", "of another program"),
        ("- a", "of another program"),
        ("command: demo wine", "of the command 'demo wine'"),
        ("command: audit", "has no source"),
        ("!!python/object/apply:os.system ['touch owned']", "is no YAML"),
    ],
)
def test_a_bad_config_is_refused(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_config(tmp_path / "config.yaml")
    assert names(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("seed", "x", "expected int for seed; got 'x'"),
        ("seed", True, "expected int for seed"),
        ("task", "clustering", "task"),
        ("kinds", {"a": "zebra"}, "kinds"),
        ("colour", "red", r"got also \['colour'\]"),
        ("target", None, "expected str for target"),
    ],
)
def test_a_setting_that_was_edited_wrongly_is_named(
    name: str, value: Any, told: str, audited: Audit, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    write_config(config_of(audited), path, tmp_path)
    content = yaml.safe_load(path.read_text())
    content["settings"][name] = value
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=told):
        read_config(path)


def test_plain_values_have_the_types_of_the_dataclass() -> None:
    summary = from_plain(
        Summary,
        {"rows": 1, "judged": 1, "task": "regression", "features": 2, "precision": [1, 0.5, "NaN"]},
    )
    assert summary.precision is not None
    assert isinstance(summary.precision, tuple)
    assert isinstance(summary.precision[0], float)
    with pytest.raises(ValueError, match="expected all fields of Summary"):
        from_plain(Summary, {"rows": 1})
    with pytest.raises(ValueError, match="precision"):
        from_plain(Summary, {**to_plain(summary), "precision": [1.0]})
