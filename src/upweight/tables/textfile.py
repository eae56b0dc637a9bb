"""Text files: their digest, their encoding, their lines."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from charset_normalizer import from_bytes

from upweight.tables.errors import TableError, quoted
from upweight.tables.limits import check_size

__all__ = ["TextFile", "is_gzip", "open_bytes", "open_text", "scan", "sha256"]

CHUNK = 2**22
SAMPLE = 2**20
GUESS_BYTES = 2**16
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like UTF-16, so it is looked for first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
OTHER_FORMATS = (
    (b"PAR1", "a Parquet file: name it .parquet"),
    (b"ARROW1", "a Feather file: name it .feather"),
    (b"PK\x03\x04", "an Excel workbook or a zip archive: save the table as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook: save the table as CSV"),
    (b"\x1f\x8b", "compressed by gzip: add .gz to its name"),
    (b"%PDF", "a PDF: save the table as CSV"),
)
# What tables are written in. The full list of the detector finds rare ones in a few accents.
ENCODINGS = [
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "iso8859_2"),
    *("iso8859_7", "koi8_r", "mac_roman", "cp437", "cp850"),
    *("cp932", "euc_jp", "gb18030", "big5", "euc_kr", "cp949"),
]
MULTIBYTE = {"cp932", "euc_jp", "gb18030", "big5", "euc_kr", "cp949"}


@dataclass(frozen=True)
class TextFile:
    """What is known of a text file after it was read once.

    Attributes
    ----------
    path
        Where it is.
    encoding
        Python's name of its encoding; it decodes the whole file.
    digest
        SHA-256 of the bytes on disk.
    size
        Bytes once decompressed.
    quotes
        How many double quotes it has; 1 where bytes cannot tell.
    sample
        Its beginning, decoded, without a byte order mark.
    """

    path: Path
    encoding: str
    digest: str
    size: int
    quotes: int
    sample: str

    @property
    def cut(self) -> bool:
        """Whether the sample is not all of it."""
        return self.size > SAMPLE


def scan(path: Path, encoding: str | None, limit: int) -> TextFile:
    """Read a file once: find its encoding, and see that all of it can be decoded.

    The encoding is the one given, that of a byte order mark, UTF-8 if the whole file is valid
    UTF-8, and else what `charset_normalizer` takes it for.

    Raises
    ------
    TableError
        If it is empty, no text, larger than `limit` bytes or not in this encoding.
    """
    head = _head(path)
    if not head.strip():
        raise TableError(f"{path} is empty: expected a line of column names, then the rows")
    for magic, told in OTHER_FORMATS:
        if head.startswith(magic):
            raise TableError(f"{path} is {told}")
    mark = next((name for bom, name in BOMS if head.startswith(bom)), None)
    if encoding is not None:
        encoding = _known_encoding(encoding)
        encoding = mark if mark and mark.startswith(encoding[:6]) else encoding
    found = encoding or mark or "utf-8"
    if found.startswith(("utf-8", "cp", "iso")) and b"\0" in head:
        raise TableError(
            f"{path} is no text file: byte {head.index(0)} is zero; if it is UTF-16 without a byte "
            "order mark, pass --encoding utf-16-le"
        )
    size, quotes, wrong = _decode(path, found, limit)
    if wrong is not None and encoding is None and mark is None:
        guessed = next(
            ((n, d) for n in _guesses(path) if (d := _decode(path, n, limit))[2] is None), None
        )
        if guessed is not None:
            found, (size, quotes, wrong) = guessed
    if wrong is not None:
        byte, line, value = wrong
        hint = "cp1252" if not found.startswith("cp1252") else "utf-8"
        raise TableError(
            f"{path} is not {found}: byte {byte} (0x{value:02x}, in line {line}) cannot be "
            f"decoded; pass the encoding it was saved in, such as --encoding {hint}"
        )
    sample = codecs.getincrementaldecoder(found)().decode(_head(path, SAMPLE))
    return TextFile(path, found, sha256(path), size, quotes, sample)


def sha256(path: Path) -> str:
    """Digest of the bytes on disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_gzip(path: Path) -> bool:
    """Whether a name says that the file is compressed."""
    return path.suffix.lower() == ".gz"


@contextmanager
def open_bytes(path: Path) -> Generator[IO[bytes]]:
    """The bytes of a file, decompressed if its name ends with .gz."""
    try:
        with gzip.open(path, "rb") if is_gzip(path) else path.open("rb") as file:
            yield file  # pyright: ignore[reportReturnType]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TableError(f"{path} is no complete gzip file: {error}") from error


@contextmanager
def open_text(path: Path, encoding: str) -> Generator[io.TextIOWrapper]:
    """Its text, with the ends of lines as they are."""
    with open_bytes(path) as file:
        yield io.TextIOWrapper(file, encoding=encoding, newline="")


def _head(path: Path, size: int = 2**12) -> bytes:
    with open_bytes(path) as file:
        return file.read(size)


def _known_encoding(name: str) -> str:
    try:
        found = codecs.lookup(name).name
        "a".encode(found)
        codecs.getincrementaldecoder(found)
    except (LookupError, ValueError) as error:
        raise TableError(
            f"unknown encoding {quoted(name)}: expected one such as utf-8, cp1252, utf-16"
        ) from error
    return found


def _decode(path: Path, encoding: str, limit: int) -> tuple[int, int, tuple[int, int, int] | None]:
    """Bytes, quotes and the first byte that cannot be decoded, with its line."""
    decoder: Any = codecs.getincrementaldecoder(encoding)()
    bytewise = encoding.startswith(("utf-8", "cp", "iso8859", "koi8", "mac"))
    size = quotes = 0
    lines, pending = 1, b""
    packed = path.stat().st_size
    with open_bytes(path) as file:
        while True:
            chunk = file.read(CHUNK)
            check_size(size + len(chunk), limit, str(path), packed)
            pending = decoder.getstate()[0]
            if not (bytewise and not pending and chunk and chunk.isascii() and size):
                try:
                    decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    at = size - len(pending) + error.start
                    line = lines + (pending + chunk)[: error.start].count(b"\n")
                    return size, quotes, (at, line, error.object[error.start])
            if not chunk:
                return size, quotes if bytewise else 1, None
            size += len(chunk)
            lines += chunk.count(b"\n")
            quotes += chunk.count(b'"')


def _guesses(path: Path) -> list[str]:
    """Encodings that the lines with other than ASCII characters may be in, the likeliest first."""
    sample = b""
    with open_bytes(path) as file:
        while len(sample) < GUESS_BYTES and (chunk := file.read(CHUNK)):
            if not chunk.isascii():
                lines = [line for line in chunk.split(b"\n") if not line.isascii()]
                sample += b"\n".join(lines)[: GUESS_BYTES - len(sample)] + b"\n"
    matches = list(from_bytes(sample, cp_isolation=ENCODINGS, threshold=0.4))
    names = [match.encoding for match in matches]
    # Too little text for a language to show, or the same text in both: what most such files are in.
    unclear = not matches or (matches[0].coherence == 0 and names[0] not in MULTIBYTE)
    if unclear or sample.decode("cp1252", errors="replace") == str(matches[0]):
        names.insert(0, "cp1252")
    return list(dict.fromkeys(names))
