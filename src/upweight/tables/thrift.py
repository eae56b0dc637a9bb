"""The headers of Parquet pages: their sizes, without unpacking a page.

A page begins with a Thrift struct in the compact protocol, whose fields 2 and 3 are its size when
decompressed and compressed. pyarrow tells neither, and the footer repeats what the writer claims.
Format: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md and
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

__all__ = ["page_sizes"]

WINDOW = 2**13
LARGEST_HEADER = 2**24
DEPTH = 16

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


def page_sizes(stream: IO[bytes], start: int, length: int) -> Iterator[int]:
    """Bytes of each page of a column chunk once decompressed, without its header.

    Raises
    ------
    ValueError
        If something else stands where a header should.
    """
    at, end = start, start + length
    while at < end:
        header, unpacked, packed = _page(stream, at)
        yield unpacked
        at += header + packed


def _page(stream: IO[bytes], at: int) -> tuple[int, int, int]:
    """Length of the header at a place, and the sizes in it."""
    window = WINDOW
    while True:
        stream.seek(at)
        data = stream.read(window)
        try:
            end, fields = _struct(data, 0, 0)
        except IndexError as error:
            if len(data) < window or window > LARGEST_HEADER:
                raise ValueError(f"no page header at byte {at}") from error
            window *= 8
            continue
        unpacked, packed = fields.get(2, -1), fields.get(3, -1)
        if unpacked < 0 or packed < 0:
            raise ValueError(f"no page header at byte {at}")
        return end, unpacked, packed


def _struct(data: bytes, at: int, depth: int) -> tuple[int, dict[int, int]]:
    """End of a struct, and its fields that are integers."""
    fields: dict[int, int] = {}
    number = 0
    while data[at] != 0:
        kind, delta = data[at] & 0x0F, data[at] >> 4
        at += 1
        if delta:
            number += delta
        else:
            at, number = _integer(data, at)
        if kind in (_I16, _I32, _I64):
            at, fields[number] = _integer(data, at)
        elif kind not in (_TRUE, _FALSE):
            at = _skip(data, at, kind, depth + 1)
    return at + 1, fields


def _skip(data: bytes, at: int, kind: int, depth: int) -> int:
    """End of a value that is not a truth value of a field."""
    if depth > DEPTH:
        raise ValueError("a page header is nested too deep")
    if kind in (_TRUE, _FALSE, _BYTE):
        return at + 1
    if kind in (_I16, _I32, _I64):
        return _integer(data, at)[0]
    if kind == _DOUBLE:
        return at + 8  # beyond the window, the next byte is an IndexError
    if kind == _BINARY:
        at, size = _varint(data, at)
        at += size
        if at > len(data):
            raise IndexError
        return at
    if kind == _STRUCT:
        return _struct(data, at, depth)[0]
    if kind in (_LIST, _SET):
        size, inner = data[at] >> 4, data[at] & 0x0F
        at += 1
        if size == 15:
            at, size = _varint(data, at)
        for _ in range(size):
            at = _skip(data, at, inner, depth + 1)
        return at
    raise ValueError(f"a page header has a field of type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return at, value
        shift += 7
        if shift > 63:
            raise ValueError("a page header has a number of more than 64 bits")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    at, value = _varint(data, at)
    return at, (value >> 1) ^ -(value & 1)
