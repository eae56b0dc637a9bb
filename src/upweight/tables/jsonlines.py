"""JSON Lines: one object per line."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from upweight.tables.delimited import EXACT
from upweight.tables.errors import TableError, quoted
from upweight.tables.textfile import TextFile, open_text

__all__ = ["as_text", "read_jsonlines", "value_span"]

ROWS = 20_000


def read_jsonlines(file: TextFile) -> pd.DataFrame:
    """All keys as columns, in the order they first appear; a key that is absent is missing.

    Numbers and truth values stay what they are; a column that mixes them with text is text, and so
    are lists and objects, as JSON.
    """
    parts: dict[str, list[Any]] = {}
    rows = 0
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    chunk: list[dict[str, Any]] = []
    with open_text(file.path, file.encoding) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                chunk.append(_parse(decoder, line, number, file))
            if len(chunk) == ROWS:
                rows = _collect(parts, chunk, rows)
    rows = _collect(parts, chunk, rows)
    columns = {name or f"column {at}": _joined(p) for at, (name, p) in enumerate(parts.items(), 1)}
    return pd.DataFrame(columns, copy=False)


def as_text(value: Any) -> str | None:
    """A value of a column of mixed types as text: lists and objects as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # circular
        return str(value)


def value_span(line: str, key: str) -> tuple[int, int] | None:
    """Where the value of a key stands in the text of an object, and where it ends."""
    decoder = json.JSONDecoder()
    at = _skip(line, line.index("{") + 1)
    while line[at] == '"':
        name, at = decoder.raw_decode(line, at)
        start = _skip(line, _skip(line, at) + 1)  # the colon
        _, end = decoder.raw_decode(line, start)
        if name == key:
            return start, end
        at = _skip(line, end)
        if line[at] != ",":
            break
        at = _skip(line, at + 1)
    return None


def _skip(line: str, at: int) -> int:
    while line[at] in " \t\r\n":
        at += 1
    return at


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise TableError(f"the key {quoted(twice)} twice")
    return found


def _parse(decoder: json.JSONDecoder, line: str, number: int, file: TextFile) -> dict[str, Any]:
    hint = 'expected one JSON object per line, such as {"age": 31, "label": "yes"}'
    try:
        found = decoder.decode(line)
    except TableError as error:
        raise TableError(f"{file.path} has {error} in line {number}; keep one of them") from None
    except (ValueError, RecursionError) as error:
        raise TableError(f"{file.path} is no JSON in line {number} ({error}): {hint}") from error
    if not isinstance(found, dict):
        kind = "a list" if isinstance(found, list) else quoted(found)
        raise TableError(f"{file.path} has {kind} in line {number}: {hint}")
    return found


def _collect(parts: dict[str, list[Any]], chunk: list[dict[str, Any]], rows: int) -> int:
    """Move a chunk of objects into the columns, as arrays where possible."""
    for row in chunk:
        for key in row:
            if key not in parts:
                parts[key] = [np.full(rows, np.nan)] if rows else []
    for key, part in parts.items():
        part.append(_packed([row.get(key) for row in chunk]))
    rows += len(chunk)
    chunk.clear()
    return rows


def _packed(values: list[Any]) -> Any:
    kinds = {type(value) for value in values}
    if kinds <= {float, int} and kinds:
        whole = kinds == {int}
        if all(abs(v) < 2**63 for v in values if type(v) is int):
            return np.array(values, dtype=np.int64 if whole else np.float64)
    if kinds <= {float, int, type(None)} and not any(
        type(v) is int and abs(v) > EXACT for v in values
    ):
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return values


def _joined(parts: list[Any]) -> pd.Series:
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts):
        return pd.Series(np.concatenate(arrays), copy=False)
    values: list[Any] = []
    for part in parts:
        values += part if isinstance(part, list) else _plain(part)
    if all(value is None or isinstance(value, bool) for value in values):
        whole = None not in values
        return pd.Series(values, dtype=bool if whole else object)
    texts = pa.array([as_text(value) for value in values], type=pa.large_string())
    return texts.to_pandas()


def _plain(part: np.ndarray) -> list[Any]:
    """Python values of an array; NaN stands for a key that was absent."""
    return [None if isinstance(v, float) and math.isnan(v) else v for v in part.tolist()]
