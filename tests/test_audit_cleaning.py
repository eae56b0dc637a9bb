"""`clean`: the table without what was found, every other byte as it was."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit_quick import CSV_HEAD, WRONG, frame, quick_audit, write_csv
from upweight.auditing.audit import Audit
from upweight.auditing.cleaning import clean, parse_drop
from upweight.auditing.folder import save
from upweight.auditing.settings import AuditSettings
from upweight.auditing.steps import Steps
from upweight.tables import TableError, read_table

COPY, ODD = 12, 7


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    audit = quick_audit(
        read_table(write_csv(folder / "table.csv")), AuditSettings("kind"), steps=Steps()
    )
    assert sorted(audit.suspects()["row"]) == list(WRONG)
    return save(audit, folder / "run")


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("drop", "gone"),
    [
        ("label-errors", WRONG),
        ("duplicates", [COPY]),
        ("features", [ODD]),
        ("top:3", WRONG),
        ("duplicates,features", [COPY, ODD]),
        (" label-errors , duplicates ", [*WRONG, COPY]),
        ("top:3,label-errors", WRONG),
    ],
)
def test_the_right_lines_are_left_as_they_were(
    drop: str, gone: Any, run: Path, tmp_path: Path
) -> None:
    done = clean(run, tmp_path / "clean.csv", drop=drop)
    header, *rows = lines_of(run.parent / "table.csv")
    kept = [row for at, row in enumerate(rows) if at not in gone]
    assert lines_of(done.path) == [header, *kept]
    assert (done.kept, done.dropped, done.relabelled) == (len(kept), len(set(gone)), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["clean.csv"]


def test_top_takes_the_most_suspicious(run: Path, tmp_path: Path) -> None:
    done = clean(run, tmp_path / "clean.csv", drop="top:10")
    assert done.dropped == 10
    left = pd.read_csv(done.path, sep=";")["id"].tolist()
    assert not {f"r{row:03d}" for row in WRONG} & set(left)


def test_relabelled_rows_are_kept_with_the_proposal(run: Path, tmp_path: Path) -> None:
    done = clean(run, tmp_path / "clean.csv", relabel=True)
    header, *rows = lines_of(run.parent / "table.csv")
    turned = {b"large": b"small", b"small": b"large"}
    for at in WRONG:
        label = rows[at].rsplit(b";", 1)[1].strip()
        rows[at] = rows[at].replace(label, turned[label])
    assert lines_of(done.path) == [header, *rows]
    assert (done.kept, done.dropped, done.relabelled, done.unchanged) == (80, 0, 3, 0)


def test_relabelling_and_dropping_together(run: Path, tmp_path: Path) -> None:
    done = clean(run, tmp_path / "clean.csv", drop="label-errors,duplicates", relabel=True)
    assert (done.kept, done.dropped, done.relabelled) == (79, 1, 3)


def test_a_proposal_that_is_missing_or_the_same_changes_nothing(tmp_path: Path) -> None:
    audit = quick_audit(read_table(frame()), AuditSettings("kind"), steps=Steps())
    rows = audit.rows.astype({"proposed": object})
    rows.loc[WRONG[0], "proposed"] = None
    rows.loc[WRONG[1], "proposed"] = rows.loc[WRONG[1], "given"]
    done = clean(replace(audit, rows=rows), tmp_path / "clean.csv", relabel=True)
    assert (done.kept, done.relabelled, done.unchanged) == (80, 1, 1)


def test_numbers_are_corrected_in_the_format_of_the_column(tmp_path: Path) -> None:
    table = frame().drop(columns="kind").assign(kind=np.arange(80) * 1.5)
    path = write_csv(tmp_path / "table.csv", table)
    audit = quick_audit(read_table(path), AuditSettings("kind", task="regression"), steps=Steps())
    rows = audit.rows.assign(label_flag=pd.array(audit.rows["row"] == 5, dtype="boolean"))
    rows.loc[5, "proposed"] = 8.25
    done = clean(replace(audit, rows=rows), tmp_path / "clean.csv", relabel=True)
    assert done.relabelled == 1
    before, after = lines_of(path), lines_of(done.path)
    assert [at for at in range(81) if before[at] != after[at]] == [6]
    assert after[6] == before[6].replace(b";7,5\r", b";8,25\r")


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".jsonl", ".csv.gz"])
def test_other_formats(suffix: str, tmp_path: Path) -> None:
    table, path = frame(), tmp_path / f"table{suffix}"
    writer = {
        ".parquet": lambda: table.to_parquet(path),
        ".feather": lambda: table.to_feather(path),
        ".jsonl": lambda: table.to_json(path, orient="records", lines=True),
        ".csv.gz": lambda: table.to_csv(path, index=False),
    }
    writer[suffix]()
    audit = quick_audit(read_table(path), AuditSettings("kind"), steps=Steps())
    save(audit, tmp_path / "run")
    out = tmp_path / f"clean{suffix}"
    clean(tmp_path / "run", out, drop="label-errors")
    expected = read_table(path).frame.drop(index=list(WRONG)).reset_index(drop=True)
    pd.testing.assert_frame_equal(read_table(out).frame, expected)


def test_frames_are_written_by_the_name_of_the_file(tmp_path: Path) -> None:
    audit = quick_audit(read_table(frame()), AuditSettings("kind"), steps=Steps())
    clean(audit, tmp_path / "clean.parquet")
    expected = frame().drop(index=list(WRONG)).reset_index(drop=True)
    pd.testing.assert_frame_equal(
        read_table(tmp_path / "clean.parquet").frame, read_table(expected).frame
    )
    save(audit, tmp_path / "run")
    clean(tmp_path / "run", tmp_path / "again.parquet", source=frame())
    assert len(read_table(tmp_path / "again.parquet")) == 77


def test_rows_without_a_target_are_never_on_top(tmp_path: Path) -> None:
    audit = quick_audit(read_table(frame()), AuditSettings("kind"), steps=Steps())
    suspicion = audit.rows["suspicion"].where(audit.rows["row"] < 5)
    flags = audit.rows["label_flag"].where(audit.rows["row"] < 5)
    rows = audit.rows.assign(suspicion=suspicion, label_flag=flags)
    done = clean(replace(audit, rows=rows), tmp_path / "clean.csv", drop="top:100,label-errors")
    assert done.dropped == 5


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "drop", ["", "labels", "top", "top:", "top:0", "top:-1", "top:x", "a,b", "label-errors,"]
)
def test_a_wrong_drop_is_refused(drop: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected label-errors, duplicates, features, top:K"):
        clean(run, tmp_path / "clean.csv", drop=drop)
    assert list(tmp_path.iterdir()) == []


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_drop(text)
    except ValueError:
        return
    assert set(found) <= {"label-errors", "duplicates", "features", "top"}


def test_the_source_is_never_written_to(run: Path, tmp_path: Path) -> None:
    source = run.parent / "table.csv"
    before = source.read_bytes()
    link = tmp_path / "link.csv"
    link.symlink_to(source)
    for path in (source, link):
        with pytest.raises(ValueError, match="is the table that was audited"):
            clean(run, path, overwrite=True)
    assert source.read_bytes() == before


def test_an_existing_file_is_kept_unless_asked(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "clean.csv"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"clean\.csv exists"):
        clean(run, out)
    assert out.read_text() == "mine"
    clean(run, out, overwrite=True)
    assert out.read_text().startswith(CSV_HEAD)
    with pytest.raises(FileExistsError, match="exists"):
        clean(run, tmp_path, overwrite=True)


def test_a_table_that_has_changed_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent, tmp_path / "data")
    changed = tmp_path / "data" / "table.csv"
    changed.write_bytes(changed.read_bytes() + b"r;1,0;2,0;small\r\n")
    with pytest.raises(TableError, match=r"table\.csv has changed since the audit"):
        clean(tmp_path / "data" / "run", tmp_path / "clean.csv", source=changed)
    assert not (tmp_path / "clean.csv").exists()
    audit = quick_audit(read_table(changed), AuditSettings("kind"), steps=Steps())
    changed.write_bytes(changed.read_bytes() + b"r;1,0;2,0;small\r\n")
    with pytest.raises(TableError, match="has changed"):
        clean(audit, tmp_path / "clean.csv")
    assert not (tmp_path / "clean.csv").exists()


def test_nothing_left_and_nothing_to_relabel(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing would be left: top:80 is every one of the 80"):
        clean(run, tmp_path / "clean.csv", drop="top:80")
    with pytest.raises(ValueError, match="leave relabel out, or add one of them"):
        clean(run, tmp_path / "clean.csv", drop="duplicates", relabel=True)
    with pytest.raises(ValueError, match=r"format of table\.csv"):
        clean(run, tmp_path / "clean.parquet")
    assert list(tmp_path.iterdir()) == []


def test_an_audit_needs_no_source(tmp_path: Path) -> None:
    audit: Audit = quick_audit(read_table(frame()), AuditSettings("kind"), steps=Steps())
    with pytest.raises(TypeError, match="leave source out"):
        clean(audit, tmp_path / "clean.csv", source=frame())
