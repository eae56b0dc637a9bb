"""Files without some of their rows, every other cell as it was."""

import json
import resource

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from some_tables import HOSTILE, TEXTS, cells, frames, write
from upweight.tables import TableError, copy_rows, read_table

# ---- relabelling --------------------------------------------------------------------------------

RELABELLED = [
    # source, delimiter, new value of row 1, expected record
    ('a,y\n1.50,no\n"2",no\n', "yes", '"2",yes\n'),
    ('a,y\n1,"no"\n2,"no"\n', "yes", '2,"yes"\n'),
    ("a,y\n1,no\n2,no\n", 'a "b", c', '2,"a ""b"", c"\n'),
    ("a;y\n1;1,5\n2;2,5\n", 3.25, "2;3,25\n"),
    ("a;y\n1;1.5\n2;2.5\n", 3.25, "2;3.25\n"),
    ("a,y\n1,1\n2,2\n", 3.0, "2,3\n"),
    ("a,y\n1,1\n2,2\n", np.int64(3), "2,3\n"),
    ("a,y\n1,1.0\n2,0.0\n", "1", "2,1.0\n"),
    ("a,y\n1,no\n2, no\n", "yes", "2, yes\n"),
    ("a,y\n1,no\n2,no\n", None, "2,\n"),
    ('y,a\nno,1\nno,"x\ny, z"\n', "yes", 'yes,"x\ny, z"\n'),
    ("a,y\r\n1,no\r\n2,no", "yes", "2,yes"),
]


@pytest.mark.parametrize(("text", "new", "expected"), RELABELLED)
def test_relabel_changes_a_single_cell(text, new, expected, tmp_path):
    path = write(tmp_path / "a.csv", text)
    for source in (path, read_table(path)):
        out = copy_rows(source, [False, True], tmp_path / "b.csv", relabel={1: new}, column="y")
        header = text[: text.index("\n") + 1]
        assert out.read_bytes().decode() == header + expected
        out.unlink()


@pytest.mark.parametrize("suffix", ["parquet", "feather"])
@pytest.mark.parametrize("categorical", [False, True])
def test_arrow_files_keep_schema_and_cells(suffix, categorical, tmp_path):
    frame = frames()
    if categorical:
        frame["y"] = frame["y"].astype("category")
    arrow = pa.Table.from_pandas(frame).replace_schema_metadata({"made": "by us"})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(arrow, path, row_group_size=2, compression="zstd")
        read = pq.read_table
    else:
        pyarrow.feather.write_feather(arrow, path, chunksize=2)
        read = pyarrow.feather.read_table
    table = read_table(path)
    assert cells(table) == {
        name: [None if pd.isna(v) else v for v in frame[name]] for name in frame.columns
    }
    out = copy_rows(
        table, [True, False, True], tmp_path / f"b.{suffix}", relabel={0: "yes"}, column="y"
    )
    copied = read(out)
    assert copied.schema.equals(read(path).schema, check_metadata=True)
    expected = [{**row, "y": "yes"} for row in (read(path).to_pylist()[i] for i in (0, 2))]
    assert copied.to_pylist() == expected
    if suffix == "parquet":
        assert pq.ParquetFile(out).metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize(
    ("values", "new", "expected"),
    [
        (pa.array([1, 2]), "3", 3),
        (pa.array([1, 2]), 3.0, 3),
        (pa.array([1.5, 2]), "3.5", 3.5),
        (pa.array([True, False]), "True", True),
        (pa.array(["1", "2"]), 3, "3"),
        (pa.array([1, 2]), None, None),
    ],
)
def test_relabel_keeps_the_type_of_the_column(values, new, expected, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"y": values}), path)
    out = copy_rows(path, [True, True], tmp_path / "b.parquet", relabel={1: new}, column="y")
    assert pq.read_table(out)["y"].to_pylist() == [values[0].as_py(), expected]
    with pytest.raises(TableError, match="no column 'z'"):
        copy_rows(path, [True, True], tmp_path / "c.parquet", relabel={1: new}, column="z")


def test_jsonlines_keep_every_other_character(tmp_path):
    lines = [
        '{"a": 1.50, "y": "no", "o": {"y": [1, 2]}}',
        '{ "o":{"y" : "no"} ,"y" : "no" }',
        '{"a": 2}',
        "",
        '{"a": 1e3, "y": true}',
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    table = read_table(path)
    assert cells(table) == {
        "a": [1.5, None, 2.0, 1000.0],
        "y": ["no", "no", None, "true"],
        "o": ['{"y": [1, 2]}', '{"y": "no"}', None, None],
    }
    out = copy_rows(
        table,
        [True, True, True, True],
        tmp_path / "b.jsonl",
        relabel={0: 'a "b"', 1: "yes", 2: "yes", 3: "False"},
        column="y",
    )
    assert out.read_text().split("\n") == [
        '{"a": 1.50, "y": "a \\"b\\"", "o": {"y": [1, 2]}}',
        '{ "o":{"y" : "no"} ,"y" : "yes" }',
        '{"a": 2, "y": "yes"}',
        '{"a": 1e3, "y": false}',
    ]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "feather", "jsonl", "csv.gz"])
def test_a_frame_is_written_in_the_format_of_the_name(suffix, tmp_path):
    table = read_table(frames())
    out = copy_rows(
        table, [True, False, True], tmp_path / f"b.{suffix}", relabel={2: "no"}, column="y"
    )
    again = cells(read_table(out))
    assert again["y"] == ["no", "no"]
    assert again["f"] == [0.1, 1e300]
    assert again["t"] == ["a", "é"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "feather"])
def test_hostile_cells_stay_as_they_are(suffix, tmp_path):
    frame = pd.DataFrame({"t": HOSTILE, "y": ["</td>", "b"] * (len(HOSTILE) // 2)})
    frame.columns = ["<b>t</b>", "=y"]
    path = copy_rows(read_table(frame), np.ones(len(frame), bool), tmp_path / f"a.{suffix}")
    table = read_table(path)
    assert list(table.frame.columns) == ["<b>t</b>", "=y"]
    assert table.frame["<b>t</b>"].tolist() == HOSTILE
    keep = np.ones(len(HOSTILE), bool)
    keep[0] = False
    out = copy_rows(table, keep, tmp_path / f"b.{suffix}", relabel={1: HOSTILE[4]}, column="=y")
    again = read_table(out).frame
    assert again["<b>t</b>"].tolist() == HOSTILE[1:]
    assert again["=y"].tolist()[0] == HOSTILE[4]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(allow_nan=False)),
            st.one_of(st.none(), st.integers(-(2**53), 2**53)),
            st.one_of(st.none(), TEXTS),
            st.one_of(st.none(), st.booleans()),
        ),
        min_size=1,
        max_size=6,
    ),
    suffix=st.sampled_from(["parquet", "feather", "jsonl"]),
)
def test_typed_files_give_back_their_cells(rows, suffix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("typed")
    path = folder / f"a.{suffix}"
    kinds = [("f", pa.float64()), ("i", pa.int64()), ("t", pa.string()), ("b", pa.bool_())]
    columns = {
        name: pa.array(values, type=kind)
        for (name, kind), values in zip(kinds, zip(*rows, strict=True), strict=True)
    }
    arrow = pa.table(columns)
    if suffix == "jsonl":
        lines = (json.dumps(row) for row in arrow.to_pylist())
        write(path, "".join(line + "\n" for line in lines))
    else:
        (pq.write_table if suffix == "parquet" else pyarrow.feather.write_feather)(arrow, path)
    table = read_table(path)
    assert cells(table) == arrow.to_pydict()
    keep = np.arange(len(rows)) % 2 == 1
    if keep.any():
        kept = read_table(copy_rows(table, keep, folder / f"b.{suffix}"))
        for name, values in cells(kept).items():
            assert values == [v for v, k in zip(arrow.to_pydict()[name], keep, strict=True) if k]


# ---- copies that fail ---------------------------------------------------------------------------


def test_bad_copies(tmp_path):
    path = write(tmp_path / "a.csv", "a,y\n1,no\n2,no\n")
    table = read_table(path)
    out = tmp_path / "b.csv"
    bad = [
        ({"keep": [True]}, "has 2 rows, but which rows to keep is told for 1"),
        ({"keep": [1, 0]}, "expected one bool per row"),
        ({"relabel": {2: "x"}, "column": "y"}, "no row 2 to relabel"),
        ({"relabel": {1: "x"}}, "expected the name of the column"),
        ({"relabel": {1: "x"}, "column": "Y"}, "no column 'Y'; did you mean 'y'"),
        ({"out": tmp_path / "b.parquet"}, "should be of the format of a.csv"),
        ({"out": path}, "is the source itself"),
        ({"out": tmp_path / "nowhere" / "b.csv"}, "cannot be written: No such file"),
    ]
    for options, message in bad:
        arguments = {"keep": [True, False], "out": out, **options}
        with pytest.raises(TableError, match=message):
            copy_rows(table, arguments.pop("keep"), arguments.pop("out"), **arguments)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv"]
    write(path, "a,y\n1,no\n3,no\n")
    with pytest.raises(TableError, match="has changed since it was read"):
        copy_rows(table, [True, False], out)


def test_a_value_that_does_not_fit(tmp_path):
    path = write(tmp_path / "a.csv", "a,y\n1,é\n2,é\n", "cp1252")
    with pytest.raises(TableError, match="row 1 cannot be written in cp1252"):
        copy_rows(path, [True, True], tmp_path / "b.csv", relabel={1: "ł"}, column="y")
    typed = tmp_path / "a.parquet"
    pq.write_table(pa.table({"y": [1, 2]}), typed)
    with pytest.raises(
        TableError, match="column 'y' holds int64, which the new value 'x' of row 1"
    ):
        copy_rows(typed, [True, True], tmp_path / "b.parquet", relabel={1: "x"}, column="y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.parquet"]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "feather", "jsonl"])
def test_a_full_disk_leaves_nothing(suffix, tmp_path):
    frame = pd.DataFrame({"a": np.random.default_rng(0).normal(size=20_000), "y": "no"})
    path = copy_rows(read_table(frame), np.ones(len(frame), bool), tmp_path / f"a.{suffix}")
    out = write(tmp_path / f"b.{suffix}", "of before")
    table = read_table(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(TableError, match=rf"b\.{suffix} cannot be written: File too large"):
            copy_rows(table, np.ones(len(frame), bool), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_text() == "of before"
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, out.name]
