"""The folder of a run: everything an audit found, whole or not at all, and read again.

::

    runs/churn/
        config.yaml         replays the run: upweight audit --config runs/churn/config.yaml
        rows.parquet        a line per row of the table
        findings.parquet    a line per finding
        findings.csv        the same for spreadsheets
        columns.json        what was made of each column
        details.json        why the most suspicious rows are suspected
        summary.json        the audit in numbers; written last, a run without it is not finished
        verification.*      what `verify` found
        report.html, plots/
        .work/              steps of a run that is not finished

In ``findings.csv`` a text that a spreadsheet would take for a formula has an apostrophe before it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd

from upweight.auditing.audit import Audit, RowDetail, Summary, Verification
from upweight.auditing.config import Config, differences, read_config, write_config
from upweight.auditing.plain import from_plain, to_plain
from upweight.auditing.settings import AuditSettings
from upweight.auditing.staging import safe_csv, staged, storable, write_json
from upweight.auditing.steps import WORK, no_space_told
from upweight.tables import Column, Source, Table, TableError, read_table

__all__ = [
    "CONFIG",
    "Run",
    "begin",
    "check_folder",
    "give_up",
    "load",
    "missing",
    "read_run",
    "save",
    "save_verification",
    "state_of",
]

FORMAT = 1
CONFIG = "config.yaml"
SUMMARY = "summary.json"
VERIFICATION = "verification.json"
Extra = Callable[[Path], object]


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder holds. The table itself is not in it: see `load`."""

    folder: Path
    config: Config
    columns: list[Column]
    rows: pd.DataFrame
    findings: pd.DataFrame
    summary: Summary
    details: Mapping[int, RowDetail] = field(default_factory=dict[int, RowDetail])
    verification: Verification | None = None

    @property
    def source(self) -> Source:
        """Of the table."""
        return self.config.source

    @property
    def settings(self) -> AuditSettings:
        """Of the audit."""
        return self.config.settings

    def with_table(self, table: Table) -> Audit:
        """The audit, with the table that it is of."""
        return Audit(
            settings=self.settings,
            table=table,
            columns=self.columns,
            rows=self.rows,
            findings=self.findings,
            summary=self.summary,
            details=self.details,
            verification=self.verification,
        )


# ---- the life of a folder -----------------------------------------------------------------------


def state_of(folder: Path) -> tuple[str, Config | None]:
    """``"new"``, ``"unfinished"`` or ``"finished"``, and the config of what is there.

    Raises
    ------
    FileExistsError
        If the folder holds anything but a run of an audit.
    ValueError
        If its config cannot be used.
    """
    for at, state in ((folder / CONFIG, "finished"), (folder / WORK / CONFIG, "unfinished")):
        marked = state == "unfinished" or (folder / SUMMARY).is_file()
        if at.is_file() and marked:
            return state, read_config(at)
    if not folder.exists() and not folder.is_symlink():
        return "new", None
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: choose another --out")
    strange = sorted(p.name for p in folder.iterdir() if p.name not in (WORK, ".DS_Store"))
    if strange:
        raise FileExistsError(
            f"{folder} exists and is no run of an audit (it has {strange[0]!r}): choose another "
            "--out"
        )
    return "new", None


def check_folder(folder: Path) -> None:
    """Refuse, before long work, a folder that is no run or that cannot be written."""
    state_of(folder)
    near = next(
        parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists()
    )
    if not (near.is_dir() and os.access(near, os.W_OK | os.X_OK)):
        raise NotADirectoryError(f"{near} is no folder to write to: choose another --out")


def begin(folder: Path, config: Config, *, overwrite: bool = False) -> str:
    """Make the folder ready for the steps of a run.

    Returns
    -------
    str
        ``"new"``; ``"unfinished"``, if steps of the same run are there; ``"finished"``, if all of
        it is there, and was not to be overwritten.

    Raises
    ------
    FileExistsError
        If it holds another run, and is not to be overwritten; the message says what differs.
    """
    state, there = state_of(folder)
    for left in folder.glob(".*.partial"):  # of a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    if there is not None:
        told = differences(there, config)
        if told and not overwrite:
            kind = "an unfinished run" if state == "unfinished" else "a run"
            raise FileExistsError(
                f"{folder} exists with other settings, as {kind} ({told}): choose another --out, "
                "or --overwrite"
            )
        if not overwrite or (state == "unfinished" and not told):
            return state
    work = folder / WORK
    with no_space_told(work):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_config(config, work / CONFIG, work)
    return "new"


def missing(folder: Path) -> list[Path]:
    """The folder and those around it that `begin` would make, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def give_up(folder: Path, made: Sequence[Path] = ()) -> None:
    """Remove what `begin` has made, if no step was finished: nothing is left of a run.

    Parameters
    ----------
    folder
        Of the run.
    made
        Folders that were `missing` before: they are removed if they are empty.
    """
    work = folder / WORK
    if any(work.glob("*.npz")):
        return
    shutil.rmtree(work, ignore_errors=True)
    for path in made:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


# ---- writing ------------------------------------------------------------------------------------


def save(
    audit: Audit,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extra: Extra | None = None,
) -> Path:
    """Write a run folder: all of it appears, or nothing.

    Files of others in the folder stay. What `begin` has made and the steps have kept is removed.

    Parameters
    ----------
    audit
        What was found.
    folder
        Made if it is not there.
    overwrite
        Whether a finished run may be replaced.
    extra
        Is called with a folder to write further files into (the report, plots), which appear
        together with the others.

    Raises
    ------
    FileExistsError
        If a finished or another run is there and must not be replaced, or no run at all.
    OSError
        If it cannot be written; the message says so where the disk is full.
    """
    final = Path(folder)
    config = Config.of(audit.table.source, audit.settings)
    state, there = state_of(final)
    if not overwrite and (
        state == "finished" or (there is not None and differences(there, config))
    ):
        raise FileExistsError(f"{final} has a run already: choose another folder, or overwrite it")
    with staged(final, last=SUMMARY, stale=_stale) as stage:
        write_config(config, stage / CONFIG, final)
        storable(audit.rows).to_parquet(stage / "rows.parquet", index=False)
        storable(audit.findings).to_parquet(stage / "findings.parquet", index=False)
        safe_csv(audit.findings).to_csv(
            stage / "findings.csv", index=False, encoding="utf-8", errors="replace",
            lineterminator="\n",
        )  # fmt: skip
        write_json(stage / "columns.json", [to_plain(column) for column in audit.columns])
        write_json(stage / "details.json", [to_plain(one) for one in audit.details.values()])
        write_json(stage / SUMMARY, {"format": FORMAT, **to_plain(audit.summary)})
        if audit.verification is not None:
            _write_verification(audit.verification, stage)
        if extra is not None:
            extra(stage)
    shutil.rmtree(final / WORK, ignore_errors=True)
    return final


def save_verification(
    found: Verification, folder: str | os.PathLike[str], *, extra: Extra | None = None
) -> None:
    """Add to a finished run what `verify` found; `extra` as in `save`."""
    final = Path(folder)
    if state_of(final)[0] != "finished":
        raise FileNotFoundError(f"no finished run in {final}")
    with staged(final, last=VERIFICATION, stale=_stale_plots) as stage:
        _write_verification(found, stage)
        if extra is not None:
            extra(stage)


def _stale(final: Path, stage: Path) -> list[Path]:
    """Files of an earlier run that would be wrong beside a new one."""
    patterns = ("plots/*.svg", "verification.*", "report.html")
    return [path for pattern in patterns for path in final.glob(pattern)]


def _stale_plots(final: Path, stage: Path) -> list[Path]:
    return list(final.glob("plots/*.svg")) if (stage / "plots").is_dir() else []


def _write_verification(found: Verification, stage: Path) -> None:
    found.table.to_parquet(stage / "verification.parquet", index=False)
    names = [one.name for one in fields(found) if one.name != "table"]
    write_json(stage / VERIFICATION, {name: to_plain(getattr(found, name)) for name in names})


# ---- reading ------------------------------------------------------------------------------------


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a finished run, without its table.

    Raises
    ------
    FileNotFoundError
        If there is no run, or it is not finished.
    ValueError
        If a file of it is damaged, or was written by a newer version.
    """
    path = Path(folder)
    state, config = _state_to_read(path)
    if state != "finished" or config is None:
        unfinished = "the run in {} is not finished: the command that began it resumes it"
        missing = "no run of an audit in {}: expected a folder that `upweight audit` has written"
        raise FileNotFoundError((unfinished if config else missing).format(path))
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        if summary.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}, the one that this version reads")
        columns = json.loads((path / "columns.json").read_text(encoding="utf-8"))
        details = json.loads((path / "details.json").read_text(encoding="utf-8"))
        return Run(
            folder=path,
            config=config,
            columns=[from_plain(Column, one) for one in columns],
            rows=pd.read_parquet(path / "rows.parquet"),
            findings=pd.read_parquet(path / "findings.parquet"),
            summary=from_plain(Summary, summary),
            details={d.row: d for d in (from_plain(RowDetail, one) for one in details)},
            verification=_read_verification(path),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"the run in {path} cannot be read: {error}") from error


def load(folder: str | os.PathLike[str], *, source: Any = None) -> Audit:
    """Read a finished run together with the table that it is of.

    Parameters
    ----------
    folder
        That `save` has written.
    source
        Where the table is now, or the frame; default: where the run found it. It must be unchanged.

    Raises
    ------
    FileNotFoundError
        If there is no run, or it is not finished.
    ValueError
        If it is damaged; a `TableError`, if the table is not there or has changed.
    """
    run = read_run(folder)
    return run.with_table(read_source(run, source))


def read_source(run: Run, source: Any = None) -> Table:
    """The table of a run, unchanged; see `load`."""
    table = read_table(
        source_of(run, source), delimiter=run.source.delimiter, encoding=run.source.encoding
    )
    check_digest(run, table.source.digest, table.source.name)
    return table


def source_of(run: Run, source: Any = None) -> Any:
    """Where the table of a run is: as given, or else where the run found it."""
    if source is not None:
        return source
    path = run.source.path
    if path is None:
        raise TableError(
            f"the run in {run.folder} is of a frame in memory: give that frame as the source"
        )
    if not Path(path).exists():
        raise TableError(
            f"the table of the run is no longer at {path}: give its new place with --source"
        )
    return path


def check_digest(run: Run, digest: str, name: str) -> None:
    """Refuse a table whose content is not what was audited."""
    if digest != run.source.digest:
        raise TableError(
            f"{name} has changed since the audit in {run.folder}, so its rows may be others: audit "
            "it again"
        )


def _state_to_read(path: Path) -> tuple[str, Config | None]:
    try:
        return state_of(path)
    except FileExistsError:
        return "new", None


def _read_verification(path: Path) -> Verification | None:
    if not (path / VERIFICATION).is_file():
        return None
    content = json.loads((path / VERIFICATION).read_text(encoding="utf-8"))
    table = pd.read_parquet(path / "verification.parquet")
    return from_plain(Verification, {**content, "table": table})
