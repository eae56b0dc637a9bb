"""Files that are no tables, and files that are more than they seem."""

import gzip

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from some_tables import frames, write
from upweight.tables import TableError, copy_rows, read_table

# ---- what is refused ----------------------------------------------------------------------------

BAD = {
    "empty": ("", r"a\.csv is empty"),
    "blank": ("\n \n", r"a\.csv is empty"),
    "header only": ("a,b\n", "no rows"),
    "header only, no line break": ("a,b", "no rows"),
    "too many": ("a,b\n1,2\n\n3,4,5\n", r"has 3 cells in line 4, but its header has 2: '3,4,5'"),
    "too few": ('a,b\n1,"2\n2"\n3\n', r"has 1 cells in line 4, but its header has 2: '3'"),
    "long line is cut": ("a,b\n" + "x" * 5000 + "\n", r"has 1 cells in line 2.{0,60}'x+…'"),
    "open quote": ('a,b\n1,"2\n3,4\n', r"a quote in line 2 that is never closed: '1,\"2"),
    "twice": ("a,b,a\n1,2,3\n", "more than one column named 'a'; rename"),
    "twice by blanks": ("a,b, a\n1,2,3\n", "more than one column named 'a'; rename"),
    "no header": ("1,2,1\n3,4,5\n", "named '1'; does it lack a line with the names"),
    "binary": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is no text file: byte 8 is zero"),
    "parquet": (b"PAR1....PAR1", r"is a Parquet file: name it \.parquet"),
    "excel": (b"PK\x03\x04....", "Excel workbook or a zip archive: save the table as CSV"),
    "gzip": (gzip.compress(b"a,b\n1,2\n"), r"add \.gz"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_csv(name, tmp_path):
    text, message = BAD[name]
    with pytest.raises(TableError, match=message) as error:
        read_table(write(tmp_path / "a.csv", text))
    assert "\n" not in str(error.value)


def test_wrong_encoding(tmp_path):
    path = write(tmp_path / "a.csv", "a,b\n1,x\n2,café\n", "latin-1")
    with pytest.raises(TableError, match=r"is not utf-8: byte 13 \(0xe9, in line 3\).*--encoding"):
        read_table(path, encoding="utf-8")
    with pytest.raises(TableError, match=r"is not ascii: byte 13 \(0xe9, in line 3\).*--encoding"):
        read_table(path, encoding="ascii")
    for name in ("klingon", "base64", "rot13"):
        with pytest.raises(TableError, match="unknown encoding"):
            read_table(path, encoding=name)


def test_the_byte_is_named_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("upweight.tables.textfile.CHUNK", 5)
    text = "a,b\n1,2\n3,éé\n" + "4,5\n" * 4
    path = write(tmp_path / "a.csv", text.encode() + b"6,\xff\n")
    at = len(text.encode()) + 2
    with pytest.raises(TableError, match=rf"byte {at} \(0xff, in line 8\)"):
        read_table(path, encoding="utf-8")


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n", "é"])
def test_bad_delimiters(delimiter, tmp_path):
    with pytest.raises(TableError, match="expected a delimiter of one character"):
        read_table(write(tmp_path / "a.csv", "a,b\n1,2\n"), delimiter=delimiter)


def test_bad_paths(tmp_path):
    with pytest.raises(TableError, match=r"no file b\.csv in "):
        read_table(tmp_path / "b.csv")
    with pytest.raises(TableError, match=r"no file b\.csv: no folder .*nowhere either"):
        read_table(tmp_path / "nowhere" / "b.csv")
    with pytest.raises(TableError, match="is a folder"):
        read_table(tmp_path)
    with pytest.raises(TableError, match=r"unknown suffix '\.xlsx': expected \.csv"):
        read_table(write(tmp_path / "a.xlsx", "x"))
    with pytest.raises(TableError, match="should not be compressed again"):
        read_table(write(tmp_path / "a.parquet.gz", "x"))
    with pytest.raises(TableError, match="no complete gzip file"):
        read_table(write(tmp_path / "a.csv.gz", gzip.compress(b"a,b\n1,2\n" * 999)[:-20]))
    with pytest.raises(TableError, match="no complete gzip file"):
        read_table(write(tmp_path / "b.csv.gz", "a,b\n1,2\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n[1]\n', "has a list in line 2: expected one JSON object per line"),
        ('{"a": 1}\n3\n', "has '3' in line 2"),
        ('{"a": 1}\n\n{"a": \n', "is no JSON in line 3"),
        ('{"a": 1, "a": 2}\n', "has the key 'a' twice in line 1"),
        ("{}\n{}\n", "no columns"),
    ],
)
def test_bad_jsonlines(text, message, tmp_path):
    with pytest.raises(TableError, match=message) as error:
        read_table(write(tmp_path / "a.jsonl", text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["parquet", "feather"])
def test_damaged_arrow_files(suffix, tmp_path):
    path = copy_rows(read_table(frames()), [True] * 3, tmp_path / f"a.{suffix}")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"x" * 100):
        with pytest.raises(TableError) as error:
            read_table(write(path, damaged))
        assert "\n" not in str(error.value)
        assert path.name in str(error.value)


def test_bad_frames():
    with pytest.raises(TableError, match="no rows"):
        read_table(pd.DataFrame({"a": []}))
    with pytest.raises(TableError, match="no columns"):
        read_table(pd.DataFrame(index=[0, 1]))
    with pytest.raises(TableError, match="more than one column named 'a'"):
        read_table(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(TableError, match="more than one column named '1'"):
        read_table(pd.DataFrame([[1, 2]], columns=[1, "1"]))
    with pytest.raises(TableError, match="more than one column named 'a'"):
        read_table(pa.table([[1], [2]], names=["a", "a"]))
    with pytest.raises(TableError, match="complex"):
        read_table(pd.DataFrame({"a": [1j]}))
    for other in (3, None, [[1, 2]], np.zeros((2, 2))):
        with pytest.raises(TableError, match="expected the path of a file, or a frame"):
            read_table(other)


# ---- size ---------------------------------------------------------------------------------------


def rle_bomb(path, rows=50_000_000):
    """Few bytes that are many equal numbers."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10_000, np.int8)), pa.array([1.5]))
    table = pa.table({"a": pa.chunked_array([column] * (rows // 10_000))})
    pq.write_table(table, path, row_group_size=rows)
    return path


def test_a_parquet_bomb_by_its_rows(tmp_path):
    path = rle_bomb(tmp_path / "a.parquet")
    assert path.stat().st_size < 1_000_000
    with pytest.raises(
        TableError, match=r"unpacks to 381.5 MB or more, over the limit of 100.0 MB"
    ):
        read_table(path, limit=100 * 2**20)


def test_a_parquet_bomb_by_its_texts(tmp_path):
    path = tmp_path / "a.parquet"
    text = pa.array(["x" * 20_000])
    codes = pa.array(np.zeros(1000, np.int32))
    pq.write_table(
        pa.table({"a": pa.DictionaryArray.from_arrays(codes, text).cast("string")}), path
    )
    assert path.stat().st_size < 50_000
    assert len(read_table(path, limit=30 * 2**20)) == 1000
    with pytest.raises(TableError, match=r"unpacks to 19.1 MB or more"):
        read_table(path, limit=10 * 2**20)


def varint(value, length=0):
    """A number as the footer has it, or the same number in more bytes."""
    out, value = [], value << 1
    while value > 0x7F or len(out) + 1 < length:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def test_a_parquet_file_that_declares_less_than_it_unpacks_to(tmp_path):
    path = tmp_path / "a.parquet"
    values = pa.array(np.zeros(1_000_000))
    pq.write_table(pa.table({"a": values}), path, compression="zstd", use_dictionary=False)
    assert len(read_table(path)) == 1_000_000
    data = path.read_bytes()
    declared = pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size
    true = varint(declared)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert data.count(true, footer) >= 1
    lie = data[:footer] + data[footer:].replace(true, varint(100, len(true)))
    write(path, lie)
    meta = pq.ParquetFile(path).metadata.row_group(0)
    assert meta.column(0).total_uncompressed_size == 100
    with pytest.raises(TableError, match=r"declares 100 bytes for column 'a' .* unpack to 7\.6 MB"):
        read_table(path)
    with pytest.raises(TableError, match="declares 100 bytes"):
        copy_rows(path, np.ones(1_000_000, bool), tmp_path / "b.parquet")


@pytest.mark.parametrize("options", [{"data_page_version": "2.0"}, {"compression": "none"}, {}])
def test_honest_parquet_files_pass(options, tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "f": rng.normal(size=5000),
            "t": rng.choice(["a" * 3000, "b" * 3000, "c"], 5000),
            "u": [f"{i} text" for i in range(5000)],
            "n": rng.choice([1.0, np.nan], 5000),
        }
    )
    frame.to_parquet(tmp_path / "a.parquet", row_group_size=1000, **options)
    pd.testing.assert_frame_equal(read_table(tmp_path / "a.parquet").frame, frame)
    pl.DataFrame(frame).write_parquet(tmp_path / "b.parquet")
    assert read_table(tmp_path / "b.parquet").frame["t"].tolist() == frame["t"].tolist()


def test_other_bombs(tmp_path, monkeypatch):
    monkeypatch.setenv("UPWEIGHT_TABLE_LIMIT", "1 MB")
    packed = write(tmp_path / "a.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 2**19))
    with pytest.raises(TableError, match=r"over the limit of 1.0 MB.*UPWEIGHT_TABLE_LIMIT=1GB"):
        read_table(packed)
    feather = tmp_path / "a.feather"
    pyarrow.feather.write_feather(pa.table({"a": np.zeros(2**20)}), feather, compression="zstd")
    with pytest.raises(TableError, match=r"unpacks to 8.0 MB"):
        read_table(feather)
    monkeypatch.setenv("UPWEIGHT_TABLE_LIMIT", "1GB")
    assert len(read_table(packed)) == 2**19
    assert len(read_table(feather)) == 2**20
    monkeypatch.setenv("UPWEIGHT_TABLE_LIMIT", "much")
    with pytest.raises(TableError, match="should be a size such as 16GB; got 'much'"):
        read_table(packed)
