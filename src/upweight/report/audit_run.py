"""`audit`: from a table to a run folder with a page; and `verify` on such a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from upweight.auditing.audit import Audit
from upweight.auditing.config import Config, differences
from upweight.auditing.folder import (
    begin,
    check_folder,
    give_up,
    load,
    missing,
    read_run,
    save,
    save_verification,
    state_of,
)
from upweight.auditing.settings import AuditSettings
from upweight.auditing.steps import Steps
from upweight.tables import Kind, Table, Task, read_table

__all__ = ["Outcome", "audit", "execute", "plan", "verify_run"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """An audit, and whether it was in the folder already."""

    audit: Audit
    found: bool = False


def audit(
    source: Any,
    target: str,
    *,
    out: str | os.PathLike[str] | None = None,
    task: Task | None = None,
    id: str | None = None,
    kinds: Mapping[str, Kind] | None = None,
    ignore: Sequence[str] = (),
    delimiter: str | None = None,
    encoding: str | None = None,
    top: int = 100,
    seed: int = 0,
    folds: int = 5,
    networks: int = 2,
    trees: int = 300,
    neighbours: int = 5,
    influence: bool = True,
    planted: int = 3,
    progress: bool = True,
    overwrite: bool = False,
) -> Audit:
    """Find the rows of a table that are wrong, and say why.

    Parameters
    ----------
    source
        The path of a CSV, Parquet, JSON Lines or Feather file, or a frame of pandas, polars or
        Arrow.
    target
        Name of the column that the others should explain: classes or numbers. It need not be
        complete: rows without it are listed, and not judged.
    out
        Folder of the run, with ``report.html``, ``rows.parquet``, ``findings.csv`` and more. Kept
        steps of an interrupted run with the same settings are used; a finished one is read. None
        writes nothing.
    task, id, kinds, ignore, delimiter, encoding, top, seed, folds, networks, trees, neighbours, \
influence, planted
        See `AuditSettings`.
    progress
        Show a bar, where stderr is a terminal.
    overwrite
        Replace a run with other settings in the folder, or one that is finished.

    Returns
    -------
    Audit

    Raises
    ------
    ValueError
        If a setting does not make sense; a `TableError`, if the table cannot be used as it is.
    FileExistsError
        If the folder holds another run, or no run at all.

    Examples
    --------
    >>> import pandas as pd
    >>> rows = range(60)
    >>> frame = pd.DataFrame({"length": [float(i % 10 + 20 * (i % 2)) for i in rows],
    ...                       "kind": ["long" if i % 2 else "short" for i in rows]})
    >>> frame.loc[7, "kind"] = "short"
    >>> found = audit(frame, "kind", planted=1, networks=1, influence=False, progress=False)
    >>> found.suspects(1)[["row", "given", "proposed"]].to_dict("records")
    [{'row': 7, 'given': 'short', 'proposed': 'long'}]
    """
    settings = AuditSettings(
        target=target,
        task=task,
        id=id,
        kinds=dict(kinds or {}),
        ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
        delimiter=delimiter,
        encoding=encoding,
        top=top,
        seed=seed,
        folds=folds,
        networks=networks,
        trees=trees,
        neighbours=neighbours,
        influence=influence,
        planted=planted,
    )
    folder = None if out is None else Path(out)
    return execute(source, settings, folder, progress=progress, overwrite=overwrite).audit


def execute(
    source: Any,
    settings: AuditSettings,
    folder: Path | None,
    *,
    progress: bool = True,
    overwrite: bool = False,
    digest: str | None = None,
) -> Outcome:
    """Read, audit and write; see `audit`.

    Parameters
    ----------
    source, settings, progress, overwrite
        As there.
    folder
        Of the run; None writes nothing.
    digest
        What the table must still be.
    """
    from upweight.auditing.run import plan_audit, run_audit

    if folder is not None:
        check_folder(folder)
    table = read(source, settings, digest=digest)
    if folder is None:
        plan = plan_audit(table, settings)
        with Steps(estimates=dict(plan.steps), progress=progress) as steps:
            return Outcome(run_audit(table, settings, steps=steps))
    config = Config.of(table.source, settings)
    state, there = state_of(folder)
    if state == "finished" and there and not overwrite and not differences(there, config):
        return Outcome(read_run(folder).with_table(table), found=True)
    plan = plan_audit(table, settings)  # refuses what cannot be audited before a folder is made
    made = missing(folder)
    begin(folder, config, overwrite=overwrite)
    try:
        estimates = dict(plan.steps)
        with Steps(folder, config.digest, estimates=estimates, progress=progress) as steps:
            found = run_audit(table, settings, steps=steps)
        save(found, folder, overwrite=True, extra=lambda stage: write_pages(found, stage))
    except BaseException:
        give_up(folder, made)
        raise
    return Outcome(found)


def read(source: Any, settings: AuditSettings, *, digest: str | None = None) -> Table:
    """The table of an audit; refused where it must have a digest and has another."""
    table = read_table(source, delimiter=settings.delimiter, encoding=settings.encoding)
    if digest is not None and table.source.digest != digest:
        raise ValueError(
            f"{table.source.name} has changed since the run that is replayed: give the file itself "
            "to audit its new content with the same settings"
        )
    return table


def plan(source: Any, settings: AuditSettings, *, digest: str | None = None) -> Any:
    """What was made of each column of a table, and what its audit will take."""
    from upweight.auditing.run import plan_audit

    return plan_audit(read(source, settings, digest=digest), settings)


def verify_run(
    folder: Path,
    *,
    source: Any = None,
    repeats: int = 10,
    seed: int = 0,
    n_jobs: int = 1,
    model: Literal["boosting", "linear"] = "boosting",
    progress: bool = True,
) -> Audit:
    """Verify the audit of a run folder, add what was found, and write the page again."""
    from upweight.auditing.verifying import verify

    there = load(folder, source=source)
    found = verify(there, repeats=repeats, seed=seed, n_jobs=n_jobs, model=model, progress=progress)
    done = replace(there, verification=found)
    save_verification(found, folder, extra=lambda stage: write_pages(done, stage))
    return done


def write_pages(found: Audit, stage: Path) -> None:
    """The report and its plots."""
    import matplotlib

    from upweight.report import audit_page

    audit_page.write(found, stage / "report.html")
    plots = stage / "plots"
    plots.mkdir()
    for name, figure in audit_page.plots(found).items():
        # without a date and random ids, so that the same audit gives the same bytes
        with matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig(plots / f"{name}.svg", metadata={"Date": None})
