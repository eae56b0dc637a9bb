"""What a copy of a table does to it, and a file that appears whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upweight.tables.errors import TableError, unknown_column

__all__ = ["Edit", "plain_value", "whole"]


@dataclass(frozen=True, eq=False)
class Edit:
    """Rows that stay, and new values in one column.

    Attributes
    ----------
    keep
        (n,) bool.
    values
        New values by row.
    column
        The column they go to; None if there are none.
    """

    keep: np.ndarray
    values: Mapping[int, object]
    column: str | None

    def keeps(self, row: int) -> bool:
        """Whether a row stays; rows beyond the end do not."""
        return row < len(self.keep) and bool(self.keep[row])

    def place(self, names: Sequence[str]) -> int | None:
        """Where the column stands among some names; None if no value changes."""
        if not self.values:
            return None
        if self.column not in names:
            raise unknown_column(str(self.column), names)
        return names.index(self.column)

    def check_rows(self, where: object, rows: int) -> None:
        """Refuse a table that has not as many rows as `keep`."""
        if rows != len(self.keep):
            raise TableError(
                f"{where} has {rows} rows, but which rows to keep is told for {len(self.keep)}"
            )


def plain_value(value: object) -> Any:
    """A value without the types of numpy and pandas; None for a missing one."""
    plain: Any = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and math.isnan(plain) else plain


@contextmanager
def whole(out: Path) -> Generator[Path]:
    """A file beside `out` that takes its place in the end, and is gone if that is not reached."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(out)
    finally:
        with suppress(OSError):
            part.unlink()
