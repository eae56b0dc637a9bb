"""A table without the rows that an audit found wrong, or with their labels corrected."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from upweight.auditing.audit import Audit
from upweight.auditing.folder import Run, check_digest, read_run, read_source, source_of
from upweight.tables import Table
from upweight.tables.copying import copy_rows
from upweight.tables.textfile import sha256

__all__ = ["CleanReport", "clean", "parse_drop"]

WORDS = ("label-errors", "duplicates", "features")


@dataclass(frozen=True)
class CleanReport:
    """What `clean` has written.

    Attributes
    ----------
    path
        Of the new table.
    kept, dropped, relabelled
        Rows; the relabelled ones are among the kept.
    unchanged
        Rows that were to be relabelled and have no proposal: kept as they are. (A proposal that is
        the given label changes nothing either, and is not counted.)
    """

    path: Path
    kept: int
    dropped: int
    relabelled: int
    unchanged: int = 0


def clean(
    audited: Audit | Run | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    drop: str = "label-errors",
    relabel: bool = False,
    overwrite: bool = False,
    source: Any = None,
) -> CleanReport:
    """Write the table of an audit again, without the rows that are wrong.

    All other cells stay as they are in the source: format, delimiter, encoding, number formats.

    Parameters
    ----------
    audited
        An audit, or the folder of its run.
    out
        The new file, of the format of the source.
    drop
        One or more of these, joined by commas: ``"label-errors"`` (rows with a label flag),
        ``"top:100"`` (the 100 most suspicious rows), ``"features"`` (rows with a feature flag),
        ``"duplicates"`` (rows that are the same as an earlier one, which stays).
    relabel
        Give label errors and top rows the proposed label, or number, and keep them. Rows without a
        proposal stay as they are.
    overwrite
        Replace `out` if it exists.
    source
        Where the table is now, or the frame; default: where it was audited.

    Returns
    -------
    CleanReport

    Raises
    ------
    ValueError
        If `drop` is something else, nothing would be left of the table, or `relabel` is asked for
        where `drop` has no label errors or top rows; a `TableError` if the source has changed
        since the audit, or `out` is the source.
    FileExistsError
        If `out` exists and is not to be replaced.

    Examples
    --------
    >>> parse_drop("top:20,duplicates")
    {'top': 20, 'duplicates': None}
    """
    wanted = parse_drop(drop)
    if relabel and not wanted.keys() & {"label-errors", "top"}:
        raise ValueError(
            f"expected label-errors or top:K among the rows to relabel; got {drop!r}: leave "
            "relabel out, or add one of them"
        )
    path = Path(out)
    run = audited if isinstance(audited, Audit | Run) else read_run(audited)
    table = _table(run, source)
    _check_target(path, table, overwrite=overwrite)
    doubted, gone = _chosen(run.rows, wanted)
    changes: dict[int, object] = {}
    unchanged = 0
    if relabel:
        changes, unchanged = _proposals(run.rows, np.flatnonzero(doubted & ~gone))
    else:
        gone |= doubted
    if gone.all():
        raise ValueError(f"nothing would be left: {drop} is every one of the {len(gone)} rows")
    copy_rows(table, ~gone, path, relabel=changes, column=run.settings.target)
    dropped = int(gone.sum())
    return CleanReport(path, len(gone) - dropped, dropped, len(changes), unchanged)


def parse_drop(text: str) -> dict[str, int | None]:
    """The parts of `drop`, with the number that belongs to ``top``."""
    found: dict[str, int | None] = {}
    for part in (part.strip() for part in text.split(",")):
        top = re.fullmatch(r"top:0*([1-9]\d*)", part)
        if top:
            found["top"] = int(top[1])
        elif part in WORDS:
            found[part] = None
        else:
            raise ValueError(
                f"expected {', '.join(WORDS)}, top:K, or several of them joined by commas, for the "
                f"rows to drop; got {part!r}"
            )
    return found


def _table(run: Audit | Run, source: Any) -> Table:
    """The source, unchanged. A file is copied line by line, so that its cells are not read here."""
    if isinstance(run, Audit) and source is None:
        return run.table
    if isinstance(run, Audit):
        raise TypeError("an audit knows its table: leave source out")
    place = source_of(run, source)
    if not isinstance(place, str | os.PathLike):
        return read_source(run, place)
    path = Path(place)
    check_digest(run, sha256(path), path.name)
    return Table(pd.DataFrame(), replace(run.source, path=str(path)))


def _check_target(path: Path, table: Table, *, overwrite: bool) -> None:
    origin = table.source.path
    if path.exists() and origin is not None and Path(origin).exists() and path.samefile(origin):
        raise ValueError(f"{path} is the table that was audited: write to another file")
    if path.exists() and (not overwrite or not path.is_file()):
        raise FileExistsError(f"{path} exists: choose another file, or overwrite it")


def _chosen(
    rows: pd.DataFrame, wanted: dict[str, int | None]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows whose label is doubted, and those to drop in any case."""
    doubted, gone = np.zeros(len(rows), dtype=np.bool_), np.zeros(len(rows), dtype=np.bool_)
    for word, count in wanted.items():
        if word == "label-errors":
            doubted |= _flag(rows["label_flag"])
        elif word == "top":
            doubted |= _top(rows["suspicion"], count or 0)
        elif word == "features":
            gone |= _flag(rows["feature_flag"])
        else:
            gone |= rows["duplicate_of"].notna().to_numpy(dtype=np.bool_)
    return doubted, gone


def _flag(column: Any) -> NDArray[np.bool_]:
    return column.fillna(False).to_numpy(dtype=np.bool_)


def _top(suspicion: Any, count: int) -> NDArray[np.bool_]:
    """The most suspicious rows; equal ones by position, those without suspicion never."""
    values = suspicion.to_numpy(dtype=np.float64, na_value=np.nan)
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    mask = np.zeros(len(values), dtype=np.bool_)
    mask[order[:count]] = True
    return mask & ~np.isnan(values)


def _proposals(rows: pd.DataFrame, chosen: NDArray[np.intp]) -> tuple[dict[int, object], int]:
    """New labels by row, where there are any, and how many have no proposal."""
    pairs = zip(chosen, rows["given"].iloc[chosen], rows["proposed"].iloc[chosen], strict=True)
    there = [(int(row), old, new) for row, old, new in pairs if not pd.isna(new)]
    return {row: new for row, old, new in there if new != old}, len(chosen) - len(there)
