"""Files that appear together in a folder, and what tables need to be written there."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from upweight.auditing.steps import no_space_told

__all__ = ["safe_csv", "safe_csv_cell", "staged", "storable", "write_json"]

TEXTS = ("name", "given", "proposed", "column", "evidence")
FORMULA = tuple("=+-@\t\r\n＝＋－＠")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
Stale: TypeAlias = Callable[[Path, Path], Iterable[Path]]


@contextmanager
def staged(final: Path, *, last: str, stale: Stale) -> Generator[Path]:
    """A folder whose files move into the final one when the block ends well, one of them last.

    That one is gone while the others move, so that nobody takes a mixture for a whole.

    Parameters
    ----------
    final
        Made if it is not there. After an error it is as it was.
    last
        Name of the file that moves last.
    stale
        Of the final folder and that to write into: files of the former to remove when all is
        written.
    """
    made = not final.exists()
    stage = final / f".{uuid.uuid4().hex[:8]}.partial"
    moved: list[Path] = []
    try:
        with no_space_told(final):
            stage.mkdir(parents=True)
            yield stage
            files = sorted(path for path in stage.rglob("*") if path.is_file())
            files.sort(key=lambda path: path.name == last)
            (final / last).unlink(missing_ok=True)
            for old in stale(final, stage):
                old.unlink()
            for path in files:
                target = final / path.relative_to(stage)
                target.parent.mkdir(exist_ok=True)
                moved.append(target)
                os.replace(path, target)
    except BaseException:
        for path in moved:  # a part of them must not look like a run
            path.unlink(missing_ok=True)
        if made:
            shutil.rmtree(final, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_json(path: Path, content: object) -> None:
    """Write plain values; numbers that are not finite are refused."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def storable(frame: pd.DataFrame) -> pd.DataFrame:
    """With columns of one type each: where they are mixed, as text."""
    changed = {
        name: column.map(str, na_action="ignore").astype("str")
        for name, column in frame.items()
        if column.dtype == object and pd.api.types.infer_dtype(column).startswith("mixed")
    }
    return frame.assign(**{str(name): column for name, column in changed.items()})


def safe_csv(findings: pd.DataFrame) -> pd.DataFrame:
    """Findings whose texts are safe in a spreadsheet, see `safe_csv_cell`."""
    columns = {name: findings[name].map(safe_csv_cell) for name in TEXTS if name in findings}
    return findings.assign(**columns)


def safe_csv_cell(value: Any) -> Any:
    """With an apostrophe before a text that a spreadsheet would take for a formula.

    These begin with ``=``, ``+``, ``-``, ``@``, a tab or a line break, and are no numbers.

    Examples
    --------
    >>> safe_csv_cell("=HYPERLINK(A1)"), safe_csv_cell("-1.5e3"), safe_csv_cell(-1)
    ("'=HYPERLINK(A1)", '-1.5e3', -1)
    """
    if not isinstance(value, str) or not value.startswith(FORMULA) or NUMBER.fullmatch(value):
        return value
    return "'" + value
