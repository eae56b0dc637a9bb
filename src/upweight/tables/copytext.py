"""Rows of text files: records as they are, with single cells replaced."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from upweight.tables.delimited import header, records
from upweight.tables.edit import Edit, plain_value
from upweight.tables.errors import TableError
from upweight.tables.jsonlines import value_span
from upweight.tables.textfile import TextFile, open_bytes, open_text

__all__ = ["copy_text"]

_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+\s*")
_WHOLE = re.compile(r"\s*[+-]?\d+\s*")
_ZEROS = re.compile(r"\s*[+-]?\d+([.,]0+)\s*")


def copy_text(file: TextFile, delimiter: str | None, edit: Edit, out: Path, *, packed: bool) -> int:
    """Write the kept rows of a file, and count all of them.

    Parameters
    ----------
    file
        The source.
    delimiter
        Of delimited text; None for JSON Lines.
    edit
        Which rows stay, and what changes.
    out
        Where to write.
    packed
        Whether to compress.
    """
    last = -1
    with _sink(out, file, packed) as sink, open_text(file.path, file.encoding) as lines:
        if delimiter is None:
            rows = enumerate(line for line in lines if line.strip())
            changed = ((row, _json_changed(line, row, edit)) for row, line in rows)
        else:
            changed = _csv_changed(file, lines, delimiter, edit)
            sink.write(next(changed)[1])
        try:
            for last, text in changed:
                if edit.keeps(last):
                    sink.write(text)
        except UnicodeEncodeError as error:
            raise TableError(
                f"the new value of row {last} cannot be written in {file.encoding}, the encoding "
                f"of {file.path}: {error.reason}"
            ) from error
    return last + 1


def _json_changed(line: str, row: int, edit: Edit) -> str:
    if row not in edit.values:
        return line
    column = str(edit.column)
    span = value_span(line, column)
    old = json.loads(line[slice(*span)]) if span else ""
    text = json.dumps(_json_value(edit.values[row], old), ensure_ascii=False)
    if span is None:  # an absent key is a missing value
        end = line.rindex("}")
        comma = ", " if json.loads(line) else ""
        return f"{line[:end]}{comma}{json.dumps(column)}: {text}{line[end:]}"
    return line[: span[0]] + text + line[span[1] :]


def _json_value(value: object, old: Any) -> Any:
    """A value for JSON; a class, which comes as text, as the number or truth value that it was."""
    plain = plain_value(value)
    if isinstance(plain, str) and not isinstance(old, str):
        with suppress(ValueError):
            found = json.loads(plain.lower())
            return found if isinstance(found, int | float) else plain
    return plain


def _csv_changed(
    file: TextFile, lines: Iterable[str], delimiter: str, edit: Edit
) -> Iterator[tuple[int, str]]:
    """The header as row −1, then every record, with its new cell."""
    at = edit.place(header(file, delimiter)[0])
    comma = delimiter == ";" and any(isinstance(v, float) for v in edit.values.values())
    comma = comma and at is not None and _has_decimal_comma(file, delimiter, at)
    for row, record in enumerate(records(lines, delimiter), start=-1):
        text = record.raw
        if at is not None and row in edit.values:
            start, end = _cell_spans(text, delimiter)[at]
            new = _cell(edit.values[row], record.cells[at], comma)
            text = text[:start] + _quoted_cell(new, delimiter, text[start:end]) + text[end:]
        yield row, text


def _cell_spans(raw: str, delimiter: str) -> list[tuple[int, int]]:
    """Where the cells of a record begin and end in its text, quotes included."""
    end = len(raw.rstrip("\r\n"))
    spans: list[tuple[int, int]] = []
    start = at = 0
    inside = False
    while at < end:
        if raw[at] == '"' and (inside or at == start):
            if inside and raw[at + 1 : at + 2] == '"':
                at += 1
            else:
                inside = not inside
        elif raw[at] == delimiter and not inside:
            spans.append((start, at))
            start = at + 1
        at += 1
    return [*spans, (start, end)]


def _quoted_cell(text: str, delimiter: str, old: str) -> str:
    """A cell as CSV, in quotes where it must be or where the old one was."""
    if old.startswith('"') or any(c in text for c in (delimiter, *'"\r\n')):
        return '"' + text.replace('"', '""') + '"'
    return text


def _cell(value: object, old: str, comma: bool) -> str:
    """A value as the text of a cell, with blanks and decimals of zero as the old one had them."""
    plain = plain_value(value)
    if plain is None:
        return ""
    if isinstance(plain, float) and plain.is_integer() and _WHOLE.fullmatch(old):
        plain = int(plain)
    text = str(plain)
    zeros = _ZEROS.fullmatch(old)
    if zeros and _WHOLE.fullmatch(text):
        text += zeros[1]
    if comma and isinstance(plain, float):
        text = text.replace(".", ",")
    return text if not old.strip() else old.replace(old.strip(), text)


def _has_decimal_comma(file: TextFile, delimiter: str, at: int) -> bool:
    with open_text(file.path, file.encoding) as lines:
        cells = (record.cells[at] for record in records(lines, delimiter))
        return any(_DECIMAL_COMMA.fullmatch(cell) for cell in itertools.islice(cells, 1, None))


@contextmanager
def _sink(out: Path, file: TextFile, packed: bool) -> Generator[io.TextIOWrapper]:
    """A text file of the same encoding, byte order mark included."""
    encoding, mark = file.encoding, b""
    if encoding in ("utf-16", "utf-32"):  # Python writes these in the byte order of the machine
        with open_bytes(file.path) as source:
            big = source.read(4).startswith((codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
        encoding += "-be" if big else "-le"
        mark = "\ufeff".encode(encoding)
    with out.open("wb") as raw:
        # Neither a name nor the time goes into the file: the same rows are the same bytes.
        inner: Any = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if packed else raw
        inner.write(mark)
        with io.TextIOWrapper(inner, encoding=encoding, newline="") as sink:
            yield sink
