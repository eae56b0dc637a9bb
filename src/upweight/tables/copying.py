"""`copy_rows`: a file without some of its rows, every other cell as it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from upweight.tables.copytext import copy_text
from upweight.tables.delimited import unique_names
from upweight.tables.edit import Edit, plain_value, whole
from upweight.tables.errors import TableError, quoted, told_error
from upweight.tables.limits import size_limit
from upweight.tables.parquet import (
    batches_of,
    check_parquet,
    open_feather,
    open_parquet,
    parquet_names,
)
from upweight.tables.reading import Table, check_file, file_format, text_file
from upweight.tables.textfile import is_gzip, sha256

__all__ = ["copy_rows"]

pc: Any = pyarrow.compute


def copy_rows(
    source: Table | str | os.PathLike[str],
    keep: Any,
    out: str | os.PathLike[str],
    *,
    relabel: Mapping[int, object] | None = None,
    column: str | None = None,
) -> Path:
    r"""Write a table again without some of its rows, and with other values in one column.

    Format, delimiter, encoding, ends of lines and types stay those of the source. Of text files
    nothing is parsed and printed again: the kept records are the same bytes, and in a relabelled
    one only the cell changes.

    Parameters
    ----------
    source
        A table, or the path of a file. A table of a frame in memory is written in the format that
        the name of `out` tells.
    keep
        (n,) bool: which rows stay.
    out
        The file to write, of the format of the source (with ``.gz`` behind it, compressed). It
        appears whole or not at all.
    relabel
        New values by row, from 0, in the rows of the source; None stands for a missing value.
    column
        The column that they go to.

    Raises
    ------
    TableError
        If `keep` does not have as many values as there are rows, the source has changed since it
        was read, `out` is the source itself or of another format, or a value does not fit the type
        of the column.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.csv").write_text("n;label\n1,50;yes\n2,5;no\n03;no\n")
    >>> out = copy_rows(
    ...     folder / "a.csv",
    ...     [True, False, True],
    ...     folder / "b.csv",
    ...     relabel={2: "yes"},
    ...     column="label",
    ... )
    >>> print(out.read_text(), end="")
    n;label
    1,50;yes
    03;yes
    """
    kept = np.asarray(keep)
    if kept.dtype != bool or kept.ndim != 1:
        raise TableError(f"expected one bool per row to keep; got {kept.dtype} of {kept.shape}")
    changes = {int(row): value for row, value in (relabel or {}).items()}
    outside = [row for row in changes if not 0 <= row < len(kept)]
    if outside:
        raise TableError(f"no row {outside[0]} to relabel: there are {len(kept)} rows")
    if changes and column is None:
        raise TableError("expected the name of the column that is relabelled; got none")
    path, edit = Path(out), Edit(kept, changes, column)
    try:
        if isinstance(source, Table) and source.source.path is None:
            _write_frame(source, edit, path)
        else:
            _copy(source, edit, path)
    except OSError as error:
        raise TableError(f"{path} cannot be written: {told_error(error)}") from error
    return path


def _copy(source: Table | str | os.PathLike[str], edit: Edit, out: Path) -> None:
    origin = source.source if isinstance(source, Table) else None
    path = Path(str(origin.path if origin else source))
    check_file(path)
    if origin and sha256(path) != origin.digest:
        raise TableError(f"{path} has changed since it was read; audit it again")
    form = file_format(path)
    if file_format(out) != form:
        raise TableError(f"{out} should be of the format of {path.name}: {path.suffix}")
    if out.exists() and out.samefile(path):
        raise TableError(f"{out} is the source itself; write to another file")
    if form == "parquet":
        _copy_parquet(path, edit, out)
    elif form == "feather":
        _copy_feather(path, edit, out)
    else:
        given = (origin.delimiter, origin.encoding) if origin else (None, None)
        file, delimiter = text_file(path, form, *given, size_limit())
        with whole(out) as part:
            edit.check_rows(path, copy_text(file, delimiter, edit, part, packed=is_gzip(out)))


def _copy_parquet(path: Path, edit: Edit, out: Path) -> None:
    with open_parquet(path) as file:
        check_parquet(path, file.metadata, size_limit())
        edit.check_rows(path, file.metadata.num_rows)
        place = edit.place(parquet_names(file, path))
        options = _parquet_options(file)
        with whole(out) as part, pq.ParquetWriter(part, file.schema_arrow, **options) as sink:
            at = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                rows = np.arange(at, at + len(table))
                at += len(table)
                table = _changed(table, place, rows, edit.values)
                table = table.filter(pa.array(edit.keep[rows]))
                if len(table):
                    sink.write_table(table, row_group_size=len(table))


def _parquet_options(file: Any) -> dict[str, Any]:
    """Compression as in the source, and the metadata of the schema."""
    if file.num_row_groups == 0:
        return {}
    group = file.metadata.row_group(0)
    kinds = {group.column(at).compression for at in range(group.num_columns)}
    return {"compression": kinds.pop().lower().replace("uncompressed", "none")} if kinds else {}


def _copy_feather(path: Path, edit: Edit, out: Path) -> None:
    with open_feather(path) as file:
        table = pa.Table.from_batches(list(batches_of(file)), schema=file.schema)
        framed = hasattr(file, "num_record_batches")
    edit.check_rows(path, len(table))
    place = edit.place(unique_names(table.schema.names, str(path)))
    table = _changed(table, place, np.arange(len(table)), edit.values)
    table = table.filter(pa.array(edit.keep)).unify_dictionaries()
    lz4 = pa.Codec.is_available("lz4_frame")
    options = pa.ipc.IpcWriteOptions(compression="lz4" if lz4 else None)
    make: Any = pa.ipc.new_file if framed else pa.ipc.new_stream
    with (
        whole(out) as part,
        pa.OSFile(str(part), "wb") as raw,
        make(raw, table.schema, options=options) as sink,
    ):
        sink.write_table(table)


def _changed(table: Any, place: int | None, rows: np.ndarray, changes: Mapping[int, object]) -> Any:
    """A table with new values in one column; `rows` are its rows in the whole."""
    mask = np.isin(rows, np.fromiter(changes, dtype=np.int64))
    mine = rows[mask]
    if place is None or len(mine) == 0:
        return table
    field, column = table.schema.field(place), table.column(place)
    kind = field.type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    column = column.cast(plain) if pa.types.is_dictionary(kind) else column
    row = int(mine[0])
    values: list[Any] = []
    try:
        for row in mine.tolist():
            values.append(_typed(changes[row], plain))
        new = pc.replace_with_mask(column, pa.array(mask), pa.array(values, type=plain))
        new = new.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else new
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise TableError(
            f"column {quoted(field.name)} holds {plain}, which the new value "
            f"{quoted(changes[row])} of row {row} is not"
        ) from error
    return table.set_column(place, field, new)


def _typed(value: object, kind: Any) -> Any:
    """A value for an Arrow type; classes come as text, whatever the type of the target."""
    plain = plain_value(value)
    if isinstance(plain, str) and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return pa.scalar(plain, type=pa.string()).cast(kind).as_py()
    if isinstance(plain, float) and pa.types.is_integer(kind) and plain.is_integer():
        return int(plain)
    if plain is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return str(plain)
    return plain


def _write_frame(table: Table, edit: Edit, out: Path) -> None:
    """A frame in memory, in the format that the name of the file tells."""
    form = file_format(out)
    edit.check_rows("the frame", len(table))
    arrow = pa.Table.from_pandas(table.frame, preserve_index=False)
    place = edit.place(arrow.column_names)
    arrow = _changed(arrow, place, np.arange(len(arrow)), edit.values)
    arrow = arrow.filter(pa.array(edit.keep))
    with whole(out) as part:
        if form == "parquet":
            pq.write_table(arrow, part)
        elif form == "feather":
            with pa.OSFile(str(part), "wb") as raw, pa.ipc.new_file(raw, arrow.schema) as sink:
                sink.write_table(arrow)
        else:
            packing: Any = "gzip" if is_gzip(out) else None
            frame = arrow.to_pandas()
            if form == "csv":
                frame.to_csv(part, index=False, compression=packing)
            else:
                frame.to_json(
                    part,
                    orient="records",
                    lines=True,
                    force_ascii=False,
                    date_format="iso",
                    compression=packing,
                )
