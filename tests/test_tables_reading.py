"""Tables from delimited text and from frames."""

import csv
import gzip
import io
import math
import tempfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from some_tables import TEXTS, cells, frames, write
from upweight.tables import TableError, copy_rows, read_table

# ---- delimited text -----------------------------------------------------------------------------

FILES = {
    "comma": ("a,b\n1,x\n2,y\n", {"a": [1, 2], "b": ["x", "y"]}, ","),
    "semicolon, decimal comma": (
        "a;b;c\n1,5;x,y;1\n2;z;2\n",
        {"a": [1.5, 2.0], "b": ["x,y", "z"], "c": [1, 2]},
        ";",
    ),
    "tab": ("a\tb\n1\tx, y, z\n2\ty\n", {"a": [1, 2], "b": ["x, y, z", "y"]}, "\t"),
    "bar": ("a|b\n1|x\n2|y\n", {"a": [1, 2], "b": ["x", "y"]}, "|"),
    "CRLF": ("a,b\r\n1,x\r\n2,y\r\n", {"a": [1, 2], "b": ["x", "y"]}, ","),
    "CR": ("a,b\r1,x\r2,y", {"a": [1, 2], "b": ["x", "y"]}, ","),
    "quoted": (
        'a,"b"\n1,"x, ""y""\nz"\n2,a "b" c\n',
        {"a": [1, 2], "b": ['x, "y"\nz', 'a "b" c']},
        ",",
    ),
    "more commas in quotes than fields": (
        'id;text\n1;"a,b,c,d"\n2;"a,b,c,e"\n',
        {"id": [1, 2], "text": ["a,b,c,d", "a,b,c,e"]},
        ";",
    ),
    "empty lines": ("\n\na,b\n\n1,x\n\n2,y\n\n", {"a": [1, 2], "b": ["x", "y"]}, ","),
    "no last line break": ("a,b\n1,x\n2,y", {"a": [1, 2], "b": ["x", "y"]}, ","),
    "blanks in the header": (" a , b\n1,x\n2,y\n", {"a": [1, 2], "b": ["x", "y"]}, ","),
    "no name": (
        ",b,\n0,x,5\n1,y,6\n",
        {"column 1": [0, 1], "b": ["x", "y"], "column 3": [5, 6]},
        ",",
    ),
    "line break in the header": ('"a\nb",c\n1,2\n', {"a\nb": [1], "c": [2]}, ","),
    "missing": (
        "a,b\nNA,x\n ? ,n/a\n3,null\nNaN,\nnan,NULL\n<NA>,#N/A\n7,y\n",
        {
            "a": [None, None, 3.0, None, None, None, 7.0],
            "b": ["x", None, None, None, None, None, "y"],
        },
        ",",
    ),
    "None among numbers and texts": (
        "a,b\nNone,None\n2,Some\n",
        {"a": [None, 2.0], "b": ["None", "Some"]},
        ",",
    ),
    "text stays": (
        'code,price,hex,long,date,flag\n007,"1,234",0x10,12345678901234567890,2024-01-31,TRUE\n'
        '012,"2,000",0x11,12345678901234567891,2024-02-01,FALSE\n',
        {
            "code": ["007", "012"],
            "price": ["1,234", "2,000"],
            "hex": ["0x10", "0x11"],
            "long": ["12345678901234567890", "12345678901234567891"],
            "date": ["2024-01-31", "2024-02-01"],
            "flag": ["TRUE", "FALSE"],
        },
        ",",
    ),
    "numbers": (
        "a,b,c\n 1 ,1e3,inf\n-2,.5,-Infinity\n",
        {"a": [1, -2], "b": [1000.0, 0.5], "c": [math.inf, -math.inf]},
        ",",
    ),
    "mixed": ("a,b\n1,1\nx,2.5\n", {"a": ["1", "x"], "b": [1.0, 2.5]}, ","),
    "comma and point": ("a;b\n1,5;1\n1.5;2\n", {"a": ["1,5", "1.5"], "b": [1, 2]}, ";"),
    "integers that floats lose": (
        "a,b\n9007199254740993,1\n,2\n",
        {"a": ["9007199254740993", None], "b": [1, 2]},
        ",",
    ),
    "all missing": ("a,b\n,1\n,2\n", {"a": [None, None], "b": [1, 2]}, ","),
    "a single column": ("a\n1\n2\n", {"a": [1, 2]}, ","),
}


@pytest.mark.parametrize("name", FILES)
def test_csv(name, tmp_path):
    text, expected, delimiter = FILES[name]
    table = read_table(write(tmp_path / "a.csv", text))
    assert cells(table) == expected
    assert [type(v) for v in cells(table).values()] == [list] * len(expected)
    for column, values in expected.items():
        kinds = {type(v) for v in cells(table)[column]}
        assert kinds == {type(v) for v in values}, column
    assert table.source.delimiter == delimiter
    assert (table.source.format, table.source.name) == ("csv", "a.csv")
    assert isinstance(table.frame.index, pd.RangeIndex)


@pytest.mark.parametrize("name", FILES)
def test_a_copy_of_all_rows_is_the_file(name, tmp_path):
    text, expected, _ = FILES[name]
    path = write(tmp_path / "a.csv", text)
    table = read_table(path)
    out = copy_rows(table, np.ones(len(table), bool), tmp_path / "b.csv")
    kept = [line for line in io.StringIO(text, newline="") if line.strip()]
    assert out.read_bytes().decode() == "".join(kept)
    assert cells(read_table(out)) == expected


@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8-sig"),
        ("utf-16", "utf-16"),
        ("utf-16-be", "utf-16"),
        ("utf-32", "utf-32"),
        ("latin-1", "cp1252"),
        ("cp1252", "cp1252"),
    ],
)
def test_encodings(encoding, found, tmp_path):
    text = "name;city\r\nMüller;Köln\r\nJosé;Málaga\r\nJürgen;Düsseldorf\r\nFrançois;Orléans\r\n"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path = write(tmp_path / "a.csv", mark + text, encoding)
    table = read_table(path)
    assert table.source.encoding == found
    assert list(table.frame.columns) == ["name", "city"]
    assert table.frame["city"].tolist() == ["Köln", "Málaga", "Düsseldorf", "Orléans"]
    out = copy_rows(
        table, [True, False, True, True], tmp_path / "b.csv", relabel={3: "Île"}, column="city"
    )
    expected = text.replace("José;Málaga\r\n", "").replace("Orléans", "Île")
    assert out.read_bytes() == (mark + expected).encode(encoding)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1251", "имя;город\n" + "Иван;Москва\nМария;Казань\nОльга;Новосибирск\n" * 5),
        ("cp932", "名前;都市\n" + "山田太郎;東京都\n鈴木花子;大阪府\n" * 5),
        ("cp1252", "a;b\n" + "1;2\n" * 500_000 + "café;3\n"),  # one accent, far behind
        ("cp1252", "a;b\n12 €;1\n13 €;2\n"),
    ],
)
def test_other_encodings_are_found(encoding, text, tmp_path):
    table = read_table(write(tmp_path / "a.csv", text, encoding))
    assert table.source.encoding == encoding
    assert table.frame.iloc[-1, 0] == text.splitlines()[-1].split(";")[0]


def test_an_encoding_that_is_given(tmp_path):
    path = write(tmp_path / "a.csv", "a,b\nŁódź,1\n", "cp1250")
    assert read_table(path, encoding="cp1250").frame["a"].tolist() == ["Łódź"]
    assert read_table(path, encoding="CP1250").source.encoding == "cp1250"
    little = write(tmp_path / "b.csv", "a,b\nŁódź,1\n", "utf-16-le")
    assert read_table(little, encoding="utf-16-le").frame["a"].tolist() == ["Łódź"]


@pytest.mark.parametrize("given", [";", "semicolon"])
def test_a_delimiter_that_is_given(given, tmp_path):
    path = write(tmp_path / "a.csv", "a,b;c\n1,2;3\n")
    assert list(read_table(path, delimiter=given).frame.columns) == ["a,b", "c"]
    tabbed = write(tmp_path / "b.csv", "a b\tc\n1 2\t3\n")
    assert list(read_table(tabbed, delimiter="\\t").frame.columns) == ["a b", "c"]


def test_gzip(tmp_path):
    path = write(tmp_path / "a.csv.gz", gzip.compress(b"a,b\n1,x\n2,y\n"))
    table = read_table(path)
    assert cells(table) == {"a": [1, 2], "b": ["x", "y"]}
    out = copy_rows(table, [False, True], tmp_path / "b.csv.gz")
    assert gzip.decompress(out.read_bytes()) == b"a,b\n2,y\n"
    again = copy_rows(table, [False, True], tmp_path / "c.csv.gz")
    assert again.read_bytes() == out.read_bytes()
    assert copy_rows(table, [False, True], tmp_path / "d.csv").read_bytes() == b"a,b\n2,y\n"


def late_surprises(rows):
    """Columns whose last cells are not of the type of all before, and cells over several lines."""
    lines = [f'{i},{i},{i}.5,,"te\nxt, {i}"\n' for i in range(rows)]
    lines[-1] = "0012,x,None,y,z\n"
    return "a,b,c,d,e\n" + "".join(lines)


@pytest.mark.parametrize("block", [200, 1000, 2**24])
def test_blocks_do_not_change_the_result(block, tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", late_surprises(500))
    monkeypatch.setattr("upweight.tables.delimited.BLOCK", block)
    frame = read_table(path).frame
    assert frame["a"].tolist() == [*(str(i) for i in range(499)), "0012"]
    assert frame["b"].tolist() == [*(str(i) for i in range(499)), "x"]
    assert frame["c"].dtype == np.float64
    assert frame["c"].isna().tolist() == [False] * 499 + [True]
    assert frame["d"].isna().tolist() == [True] * 499 + [False]
    assert frame["e"].tolist() == [*(f"te\nxt, {i}" for i in range(499)), "z"]


CELLS = st.one_of(
    st.text(st.sampled_from('ab" ;'), max_size=4),
    st.text(st.sampled_from("ab,\n\r ;"), max_size=5).map(lambda text: f'"{text}"'),
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS, st.integers(-(2**60), 2**60)), min_size=1, max_size=8),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_is_written_is_read(rows, delimiter, end, tmp_path_factory):
    folder = tmp_path_factory.mktemp("csv")
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    # A word before each text, so that none of them stands for a number or a missing value.
    writer.writerows([("one", "two", "n"), *((f"t{a}", f"t{b}", n) for a, b, n in rows)])
    path = write(folder / "a.csv", file.getvalue())
    frame = read_table(path, delimiter=delimiter).frame
    assert frame["one"].tolist() == [f"t{a}" for a, _, _ in rows]
    assert frame["two"].tolist() == [f"t{b}" for _, b, _ in rows]
    assert frame["n"].tolist() == [n for _, _, n in rows]

    keep = np.arange(len(rows)) % 2 == 0
    out = copy_rows(read_table(path, delimiter=delimiter), keep, folder / "b.csv")
    kept = read_table(out, delimiter=delimiter).frame
    assert kept.equals(frame[keep].reset_index(drop=True))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS, st.sampled_from(["\n", "\r\n", "\r"])), min_size=1))
@pytest.mark.slow
def test_arrow_and_python_cut_records_alike(rows):
    """`read_table` reads with Arrow, `copy_rows` with Python: rows must be the same rows."""
    text = "".join(f"{a},{b}{end}" for a, b, end in rows)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.csv", "p,q\n" + text)
        try:
            table = read_table(path, delimiter=",")
        except TableError:
            reject()
        everything = list(csv.reader(io.StringIO("p,q\n" + text, newline="")))
        rows = [row for row in everything[1:] if row]
        assert len(table) == len(rows)
        missing = {None, "", "?"}
        for at, name in enumerate(table.frame.columns):
            read = ["" if pd.isna(v) else v for v in table.frame[name].tolist()]
            assert read == ["" if row[at].strip() in missing else row[at] for row in rows]
        out = copy_rows(table, np.ones(len(table), bool), Path(folder) / "b.csv")
        copied = io.StringIO(out.read_bytes().decode(), newline="")
        assert list(csv.reader(copied)) == [row for row in everything if row]


# ---- frames -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow", "batch", "lazy"])
def test_frames(kind):
    columns = {"n": [1, None, 3], "i": [1, 2, 3], "t": ["a", None, "c"], "b": [True, None, False]}
    frame = {
        "pandas": lambda: pd.DataFrame(columns),
        "polars": lambda: pl.DataFrame(columns),
        "arrow": lambda: pa.table(columns),
        "batch": lambda: pa.RecordBatch.from_pydict(columns),
        "lazy": lambda: pl.LazyFrame(columns),
    }[kind]()
    table = read_table(frame)
    assert cells(table) == columns
    assert table.frame["i"].dtype == np.int64
    assert table.source.path is None
    assert table.source.format == "frame"


def test_types_of_frames():
    frame = pd.DataFrame(
        {
            "nullable": pd.array([1, None], dtype="Int64"),
            "flag": pd.array([True, None], dtype="boolean"),
            "arrow": pd.Series([1.5, None], dtype=pd.ArrowDtype(pa.float32())),
            "zone": pd.to_datetime(["2024-01-31", "2024-02-01"]).tz_localize("Asia/Tokyo"),
            "mixed": [1, "x"],
            "list": [[1, 2], None],
            "bytes": [b"x", b"y"],
            "lapse": pd.to_timedelta(["1min", "2min"]),
            "decimal": [Decimal("1.00"), Decimal("2.50")],
            "big": pd.array([2**60 + 1, None], dtype="Int64"),
            "interval": pd.arrays.IntervalArray.from_breaks([0, 1, 2]),
        }
    )
    found = cells(read_table(frame))
    assert found["nullable"] == [1.0, None]
    assert found["flag"] == [True, None]
    assert found["arrow"] == [1.5, None]
    assert found["mixed"] == ["1", "x"]
    assert found["list"] == ["[1, 2]", None]
    assert found["bytes"] == ["x", "y"]
    assert found["lapse"] == [60.0, 120.0]
    assert found["decimal"] == [1.0, 2.5]
    assert found["big"] == [str(2**60 + 1), None]
    assert len(set(found["interval"])) == 2
    assert found["zone"][0] == pd.Timestamp("2024-01-31", tz="Asia/Tokyo")


def test_an_index_that_says_something_is_a_column():
    frame = pd.DataFrame({"a": [1, 2]}, index=["x", "y"])
    assert cells(read_table(frame)) == {"index": ["x", "y"], "a": [1, 2]}
    named = pd.DataFrame({"a": [1, 2]}, index=pd.Index([0, 1], name="key"))
    assert cells(read_table(named)) == {"key": [0, 1], "a": [1, 2]}
    part = pd.DataFrame({"a": [1, 2, 3]})[1:]
    assert cells(read_table(part)) == {"index": [1, 2], "a": [2, 3]}
    plain = pd.DataFrame({"a": [1, 2]}, index=[0, 1])
    assert cells(read_table(plain)) == {"a": [1, 2]}


def test_an_index_in_parquet(tmp_path):
    pd.DataFrame({"a": [1, 2]}, index=["x", "y"]).to_parquet(tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet")
    assert cells(table) == {"a": [1, 2], "index": ["x", "y"]}
    out = copy_rows(table, [False, True], tmp_path / "b.parquet")
    assert pd.read_parquet(out).index.tolist() == ["y"]


def test_names_become_text():
    frame = pd.DataFrame([[1, 2, 3]], columns=pd.Index([1, None, np.nan], dtype=object))
    assert list(read_table(frame).frame.columns) == ["1", "column 2", "column 3"]
    levels = pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", "b"), ("a", "")]))
    assert list(read_table(levels).frame.columns) == ["a / b", "a"]


def test_the_frame_given_is_not_changed():
    frame = frames()
    before = frame.copy(deep=True)
    table = read_table(frame)
    table.frame.loc[0, "n"] = 99
    pd.testing.assert_frame_equal(frame, before)


def test_digests(tmp_path):
    import hashlib

    path = write(tmp_path / "a.csv", "a,b\n1,x\n")
    assert read_table(path).source.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    digest = read_table(frames()).source.digest
    assert digest == read_table(frames()).source.digest
    assert digest != read_table(frames().rename(columns={"n": "m"})).source.digest
    changed = frames()
    changed.loc[2, "t"] = "e"
    assert digest != read_table(changed).source.digest
