"""Records of a file or a data set: one mapping for each row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

__all__ = ["read_records"]

READABLE = "JSON Lines (.jsonl, .json), Parquet (.parquet) or CSV (.csv)"


def read_records(data: Any) -> tuple[Sequence[Mapping[str, Any]], set[str]]:
    """The rows of a file, a list of dicts or a `datasets.Dataset`, and the keys of the first.

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        If there is no such file, it cannot be read, or it has no rows; the line is named.
    """
    records = _of_file(Path(data)) if isinstance(data, str | Path) else _of_object(data)
    if not len(records):
        raise ValueError("expected at least one row; got none")
    for at, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise TypeError(f"row {at}: expected a dict; got a {type(record).__name__}")
    return records, {str(key) for key in records[0]}


def _of_object(data: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(data, Mapping):
        names = ", ".join(map(str, list(cast("Mapping[Any, Any]", data))[:6]))
        raise TypeError(f"expected rows; got parts of a data set ({names}): choose one of them")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(
            f"expected a path, a list of dicts or a datasets.Dataset; got a {type(data).__name__}, "
            "whose rows have no position. Collect it first: list(data)"
        )
    return [data[at] for at in range(len(data))]


def _of_file(path: Path) -> Sequence[Mapping[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected {READABLE}")
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json", ".ndjson"):
        return _of_lines(path)
    if kind not in (".parquet", ".csv"):
        raise ValueError(f"cannot read {path.name}: expected {READABLE}")
    import pandas as pd

    try:
        if kind == ".parquet":
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # that of pyarrow and those of pandas are ValueErrors
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    return [{str(key): _plain(v) for key, v in row.items()} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    """Lists in place of arrays, as Parquet gives for nested columns."""
    if hasattr(value, "tolist") and not isinstance(value, str):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(one) for one in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in cast("dict[Any, Any]", value).items()}
    return value


def _of_lines(path: Path) -> Sequence[Mapping[str, Any]]:
    """One object a line; a file that is one list of objects is taken, too."""
    found: list[Mapping[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} cannot be decoded") from error
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        return cast("list[Mapping[str, Any]]", whole)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
        if not isinstance(one, dict):
            raise ValueError(f"{path}, line {number}: expected an object with named values")
        found.append(cast("Mapping[str, Any]", one))
    return found
