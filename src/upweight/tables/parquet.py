"""Parquet and Feather: what they unpack to is checked before it is unpacked."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
import pyarrow.parquet as pq

from upweight.tables.arrow import least_bytes, to_series
from upweight.tables.delimited import unique_names
from upweight.tables.errors import TableError
from upweight.tables.limits import check_size, told_size
from upweight.tables.thrift import page_sizes

pc: Any = pyarrow.compute  # its functions are made when it is imported

__all__ = ["open_feather", "open_parquet", "read_feather", "read_parquet", "text_encoded"]

BATCH = 2**16
SLACK = 2**10  # some writers forget the headers of their pages
WIDTHS = {"BOOLEAN": 1 / 8, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 8}
_INVALID = (pa.ArrowException, OSError, EOFError)


def read_parquet(path: Path, limit: int) -> pd.DataFrame:
    """A Parquet file, row group by row group.

    Before anything is unpacked, the sizes in the headers of all pages are added up and compared
    with what the footer declares, and so are rows times their least width with `limit`. Texts are
    unpacked as codes and dictionaries; what they expand to is counted before they are.

    Raises
    ------
    TableError
        If it is damaged, declares less than it unpacks to, or unpacks to more than `limit` bytes.
    """
    with open_parquet(path) as file:
        types = file.schema_arrow.types
        names = parquet_names(file, path)
        check_parquet(path, file.metadata, limit)
        coded = text_encoded(file)
    with open_parquet(path, read_dictionary=coded) as file:
        counted = _Counted(path, limit)
        groups = range(file.num_row_groups)
        batches = (b for group in groups for b in file.iter_batches(BATCH, row_groups=[group]))
        return _frame(names, types, counted(batches))


def read_feather(path: Path, limit: int) -> pd.DataFrame:
    """A Feather (Arrow IPC) file, batch by batch; rows times their least width first."""
    with open_feather(path) as file:
        names = unique_names([str(name) for name in file.schema.names], str(path))
        types = file.schema.types
        try:
            rows = pyarrow.dataset.dataset(path, format="ipc").count_rows()
        except pa.ArrowInvalid:  # a stream has no footer to count from
            rows = 0
        width = sum(least_bytes(kind) for kind in types)
        check_size(int(rows * width), limit, str(path), path.stat().st_size)
        return _frame(names, types, _Counted(path, limit)(batches_of(file)))


@contextmanager
def open_parquet(path: Path, **options: Any) -> Generator[Any]:
    """A `pyarrow.parquet.ParquetFile`; what goes wrong with it is a `TableError`."""
    with _told(path, "Parquet"), pq.ParquetFile(path, **options) as file:
        yield file


@contextmanager
def open_feather(path: Path) -> Generator[Any]:
    """A reader of an Arrow file, or of an Arrow stream."""
    with path.open("rb") as stream:
        magic = stream.read(8)
    if magic.startswith(b"FEA1"):
        raise TableError(f"{path} is Feather of version 1: save it again with a newer Arrow")
    opened: Callable[[Any], Any] = (
        pa.ipc.open_file if magic.startswith(b"ARROW1") else pa.ipc.open_stream
    )
    with _told(path, "Feather"), pa.OSFile(str(path), "rb") as source, opened(source) as file:
        yield file


def batches_of(file: Any) -> Iterator[Any]:
    """The batches of an Arrow file or stream."""
    if hasattr(file, "num_record_batches"):
        for at in range(file.num_record_batches):
            yield file.get_batch(at)
    else:
        yield from file


def check_parquet(path: Path, metadata: Any, limit: int) -> None:
    """Refuse a file by its footer and the headers of its pages, without unpacking anything."""
    values = pages = 0.0
    with path.open("rb") as stream:
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for at in range(row_group.num_columns):
                chunk = row_group.column(at)
                declared, actual = chunk.total_uncompressed_size, _unpacked(path, stream, chunk)
                if actual > 2 * declared + SLACK:
                    raise TableError(
                        f"{path} declares {told_size(declared)} for column "
                        f"{chunk.path_in_schema!r} in row group {group}, but its pages unpack to "
                        f"{told_size(actual)}: it is damaged or made to do harm; write it again "
                        "from its source"
                    )
                pages += actual
                values += chunk.num_values * WIDTHS.get(chunk.physical_type, 4)
    check_size(int(max(values, pages)), limit, str(path), path.stat().st_size)


def parquet_names(file: Any, path: Path) -> list[str]:
    """Names of the columns; those for the index of a pandas frame are called ``index``."""
    names = [re.sub(r"^__index_level_\d+__$", "index", name) for name in file.schema_arrow.names]
    return unique_names(names, str(path))


def text_encoded(file: Any) -> list[str]:
    """Text columns that have dictionaries, and so may repeat a long text at no cost."""
    coded: set[str] = set()
    for group in range(file.num_row_groups):
        row_group = file.metadata.row_group(group)
        for at in range(row_group.num_columns):
            chunk = row_group.column(at)
            if chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page:
                coded.add(chunk.path_in_schema)
    kinds = {field.name: field.type for field in file.schema_arrow}
    return sorted(name for name in coded if name in kinds and _is_text(kinds[name]))


class _Counted:
    """Lets batches pass for as long as they fit into memory once their texts are written out."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.limit = limit
        self.packed = path.stat().st_size
        self.bytes = 0

    def __call__(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.bytes += sum(_expanded(column) for column in batch.columns)
            check_size(self.bytes, self.limit, str(self.path), self.packed)
            yield batch


def _expanded(column: Any) -> int:
    """Bytes of a column; of one by codes and dictionary, those it has when written out."""
    if not pa.types.is_dictionary(column.type):
        return column.nbytes
    values = column.dictionary
    if not _is_text(values.type):
        return column.indices.nbytes
    lengths = pc.binary_length(values).cast(pa.int64())
    return 8 * len(column) + (pc.sum(lengths.take(column.indices)).as_py() or 0)


def _frame(names: list[str], types: list[Any], batches: Iterator[Any]) -> pd.DataFrame:
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for batch in batches:
        for name, column in zip(names, batch.columns, strict=True):
            columns[name].append(column)
    made: dict[str, pd.Series] = {}
    for name, kind in zip(names, types, strict=True):
        chunks = columns.pop(name)
        column = pa.chunked_array(chunks, type=chunks[0].type if chunks else kind)
        if pa.types.is_dictionary(column.type) and not pa.types.is_dictionary(kind):
            column = column.cast(kind)
        made[name] = to_series(column)
    return pd.DataFrame(made, copy=False)


def _unpacked(path: Path, stream: IO[bytes], chunk: Any) -> int:
    """Bytes of the pages of a column chunk once decompressed."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < start:
        start = chunk.dictionary_page_offset
    try:
        return sum(page_sizes(stream, start, chunk.total_compressed_size))
    except ValueError as error:
        raise TableError(
            f"{path} is damaged in column {chunk.path_in_schema!r} ({error}): write it again, or "
            "check the transfer"
        ) from error


def _is_text(kind: Any) -> bool:
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return text or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


@contextmanager
def _told(path: Path, kind: str) -> Generator[None]:
    try:
        yield
    except TableError:
        raise
    except _INVALID as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system: Arrow's own have no number
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise TableError(
            f"{path} is no complete {kind} file ({reason}): write it again, or check the transfer"
        ) from error
