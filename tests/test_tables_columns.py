"""What is made of the columns of a table."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upweight.tables import TableError, plan_columns, row_names

N = 60
RNG = np.random.default_rng(0)


def days(form="%Y-%m-%d"):
    return [d.strftime(form) for d in pd.date_range("2023-12-20", periods=N)]


def repeated(*values):
    return [values[i % len(values)] for i in range(N)]


# name: cells, kind, missing, distinct, words of the note
CASES = {
    "floats": (RNG.normal(size=N), "numeric", 0, N, "numbers"),
    "few integers": (
        repeated(1, 2, 3),
        "numeric",
        0,
        3,
        "integers with 3 values; if they are codes",
    ),
    "many integers": ([i * i % 101 for i in range(N)], "numeric", 0, 51, "numbers"),
    "with gaps": (repeated(1.5, None, 2.5), "numeric", 20, 2, "numbers"),
    "infinite": ([np.inf, -np.inf, *range(N - 2)], "numeric", 0, N, "; 2 infinite"),
    "a number or nothing": (repeated(3.0, None), "numeric", 30, 1, "numbers"),
    "0 and 1": (repeated(0, 1, 1), "boolean", 0, 2, "0 and 1; otherwise"),
    "0 and 1 with gaps": (repeated(0.0, 1.0, None), "boolean", 20, 2, "0 and 1"),
    "truth": (repeated(True, False), "boolean", 0, 2, "only 'False' and 'True'"),
    "truth with gaps": (repeated(True, False, None), "boolean", 20, 2, "only"),
    "yes and no": (repeated("yes", "No", "NO", "Yes"), "boolean", 0, 2, "'NO', 'No'|'No' and"),
    "y, n, None": (repeated("y", "n", "None"), "boolean", 20, 2, "only 'n' and 'y'"),
    "yes only": (repeated("yes"), "constant", 0, 1, "always 'yes': left out"),
    "0 and 2": (repeated(0, 2), "numeric", 0, 2, "integers"),
    "one number": (repeated(7), "constant", 0, 1, "always 7: left out"),
    "nothing": (repeated(None), "empty", N, 0, "no values: left out"),
    "blanks": (repeated("", " ", "NA"), "empty", N, 0, "no values: left out"),
    "a text or nothing": (repeated("x", None), "category", 30, 1, "1 value;"),
    "sequence": (range(N), "id", 0, N, "names the rows (integers in order)"),
    "descending": (range(N, 0, -1), "id", 0, N, "integers in order"),
    "ascending, with gaps": ([i * i for i in range(N)], "id", 0, N, "integers in order"),
    "customer_id": (RNG.permutation(N) * 7, "id", 0, N, "names the rows (its name)"),
    "customerID": (RNG.permutation(N) * 7, "id", 0, N, "its name"),
    "paid": (RNG.permutation(N) * 7, "numeric", 0, N, "numbers"),
    "shop id": ([i * i % 101 for i in range(N)], "numeric", 0, 51, "with repeats in spite of its"),
    "user id": (repeated("a b", "c d"), "category", 0, 2, "2 values"),
    "uuid": ([f"user {i}" for i in range(N)], "id", 0, N, "its name"),
    "unique texts": ([f"u-{i:x}" for i in range(N)], "id", 0, N, "each text occurs once"),
    "ascending floats": (np.arange(N) + 0.5, "numeric", 0, N, "numbers"),
    "number texts": ([f"+{i}.5" for i in range(N)], "numeric", 0, N, "text that holds numbers"),
    "thousands": (
        [f"{i},{i:03}" for i in range(1, N + 1)],
        "numeric",
        0,
        N,
        "the comma separates thousands",
    ),
    "decimal comma": (
        [f"{i},{i % 7}" for i in range(N)],
        "numeric",
        0,
        N,
        "the comma is the decimal point",
    ),
    "currency": ([f"${i}.99" for i in range(N)], "numeric", 0, N, "text that holds numbers"),
    "euro": ([f"1.{i:03},50 €" for i in range(N)], "numeric", 0, N, "comma is the decimal"),
    "percent": ([f"{i} %" for i in range(N)], "numeric", 0, N, "text that holds numbers"),
    "few bad cells": (
        [*(str(i) for i in range(N - 2)), "n.k.", "None"],
        "numeric",
        2,
        N - 2,
        "1 unreadable cell count as missing, such as 'n.k.' in row 58",
    ),
    "many bad cells": ([*(str(i % 9) for i in range(N - 6)), *"abcdef"], "category", 0, 15, "15 v"),
    "leading zeros": (repeated("0123", "0456"), "category", 0, 2, "leading zeros are codes"),
    "zeros, once each": ([f"{i:05}" for i in range(N)], "id", 0, N, "each text occurs once"),
    "ISO dates": (days(), "date", 0, N, "dates as in ISO 8601"),
    "ISO times": (days("%Y-%m-%dT%H:%M:%SZ"), "date", 0, N, "ISO 8601"),
    "day first": (days("%d/%m/%Y"), "date", 0, N, "dates as in %d/%m/%Y;"),
    "month first": (days("%m/%d/%Y"), "date", 0, N, "dates as in %m/%d/%Y;"),
    "ambiguous": (
        repeated("01/02/2024", "03/04/2024"),
        "date",
        0,
        2,
        "%d/%m/%Y, though months might come first",
    ),
    "German dates": (days("%d.%m.%Y %H:%M"), "date", 0, N, "dates as in %d.%m.%Y %H:%M"),
    "named months": (days("%d-%b-%Y"), "date", 0, N, "dates as in %d-%b-%Y"),
    "American months": (days("%b %d, %Y"), "date", 0, N, "dates as in %b %d, %Y"),
    "a bad date": (
        [*days()[:-2], "2024-02-31", None],
        "date",
        2,
        N - 2,
        "1 unreadable cell count as missing, such as '2024-02-31' in row 58",
    ),
    "stamps": (pd.date_range("2024-01-01", periods=N), "date", 0, N, "dates"),
    "zoned": (pd.date_range("2024-01-01", periods=N, tz="Asia/Tokyo"), "date", 0, N, "dates"),
    "colours": (repeated("red", "blue ", " blue", None), "category", 15, 2, "2 values; otherwise"),
    "None is a name": (repeated("None", "Some"), "category", 0, 2, "2 values"),
    "categories": (pd.Categorical(repeated("1", "0", "2")), "category", 0, 3, "3 values"),
    "many": (
        [f"c{i * 4 // 5}" for i in range(N)],
        "category",
        0,
        48,
        "else the 30 commonest",
    ),
    "some rare": (
        [*(f"c{i}" for i in range(25)), *(f"d{i % 5}" for i in range(N - 35)), *"abcdefghij"],
        "category",
        0,
        40,
        "40 values, of which the 30 commonest",
    ),
    "sentences": ([f"this is text {i}" for i in range(N)], "text", 0, N, f"{N} texts with blanks"),
    "sentences that repeat": (
        [f"four words are long {i * 3 // 4 % 33}" for i in range(N)],
        "text",
        0,
        33,
        "33 texts with blanks",
    ),
    "two words": ([f"Ann {i}" for i in range(N)], "text", 0, N, f"{N} texts with blanks"),
    "two words that repeat": (
        [f"Ann {i * 2 // 5}" for i in [*range(N), *range(N)]][:N],
        "category",
        0,
        24,
        "24 values",
    ),
    "long, repeated": (
        [f"{'a long text that comes again ' * 3}{i // 3 % 31}" for i in range(N * 3)][:N],
        "category",
        0,
        20,
        "20 values",
    ),
    "<b onclick=x>": (repeated("</script>", "=1+1"), "category", 0, 2, "'<b onclick=x>=ignored'"),
}


@pytest.mark.parametrize("name", CASES)
def test_kinds(name):
    values, kind, missing, distinct, note = CASES[name]
    frame = pd.DataFrame({"y": repeated(0, 1), name: pd.Series(values)})
    target, column = plan_columns(frame, target="y")
    assert (target.kind, target.name) == ("target", "y")
    assert column.name == name
    assert (column.kind, column.missing, column.distinct) == (kind, missing, distinct)
    assert any(words in column.note for words in note.split("|"))
    assert "\n" not in column.note
    if kind not in ("empty", "constant"):
        assert "otherwise --kind " in column.note or column.note.startswith("numbers")


@pytest.mark.slow
def test_the_order_of_the_frame_is_kept():
    frame = pd.DataFrame({name: pd.Series(case[0]) for name, case in CASES.items()})
    columns = plan_columns(frame, target="colours")
    assert [column.name for column in columns] == list(CASES)
    ids = [column.name for column in columns if column.kind == "id"]
    assert ids == ["sequence"]
    others = {column.name: column for column in columns if CASES[column.name][1] == "id"}
    assert others.pop("sequence").kind == "id"
    for other in others.values():
        assert other.kind == "ignored"
        assert "could name the rows, as 'sequence' does; left out" in other.note


@pytest.mark.parametrize("kind", ["numeric", "category", "text", "id", "ignored"])
@pytest.mark.parametrize("cells", ["few integers", "sequence", "number texts", "floats"])
def test_overrides(kind, cells):
    frame = pd.DataFrame({"a": pd.Series(CASES[cells][0]), "y": repeated(0, 1)})
    column, _ = plan_columns(frame, target="y", kinds={"a": kind})
    assert column.kind == kind
    assert "as asked" in column.note
    if kind == "id":
        assert plan_columns(frame, target="y", id="a") == [column, _]
    if kind == "ignored":
        assert plan_columns(frame, target="y", ignore=["a"]) == [column, _]
        assert plan_columns(frame, target="y", ignore="a") == [column, _]


def test_more_overrides():
    frame = pd.DataFrame({"a": repeated("20240131", "20240201", None), "y": repeated(0, 1)})
    assert plan_columns(frame, target="y")[0].kind == "numeric"
    column = plan_columns(frame, target="y", kinds={"a": "date"})[0]
    assert (column.kind, column.missing, column.distinct) == ("date", 20, 2)
    frame = pd.DataFrame(
        {"a": repeated("1", "x", "2"), "b": repeated("y", "n"), "y": repeated(0, 1)}
    )
    column = plan_columns(frame, target="y", kinds={"a": "numeric", "b": "category"})[0]
    assert (column.kind, column.missing, column.distinct) == ("numeric", 20, 2)
    assert "20 unreadable cells count as missing, such as 'x' in row 1" in column.note


REFUSED = [
    ({"target": "Churned"}, "no target column 'Churned'; did you mean 'churned'? The columns are"),
    ({"target": "chrned"}, "did you mean 'churned'?"),
    ({"target": "salary"}, "no target column 'salary'; the columns are 'churned', 'a', 'b'"),
    ({"id": "aa"}, "no column 'aa'"),
    ({"ignore": ["B"]}, "no column 'B'; did you mean 'b'?"),
    ({"kinds": {"c": "text"}}, "no column 'c'"),
    ({"kinds": {"a": "number"}}, "cannot be 'number'; expected one of numeric, category, boolean"),
    ({"kinds": {"a": "constant"}}, "cannot be 'constant'; expected one of"),
    ({"kinds": {"a": "target"}}, "cannot be 'target'; expected one of"),
    ({"kinds": {"churned": "category"}}, "column 'churned' is the target"),
    ({"id": "churned"}, "column 'churned' is the target"),
    ({"ignore": ["churned"]}, "column 'churned' is the target"),
    ({"kinds": {"a": "text"}, "id": "a"}, "'a' is asked to be text and also id"),
    ({"kinds": {"a": "id"}, "id": "b"}, "'a' and 'b' are both asked to be an id"),
    ({"kinds": {"a": "numeric"}}, "'a' cannot be numeric: none of its 3 values can be read"),
    ({"kinds": {"a": "date"}}, "'a' cannot be date: none of its 3 values can be read"),
    ({"kinds": {"a": "boolean"}}, "'a' cannot be boolean: it has 3 values, such as 'u', 'v', 'w'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_is_refused(options, message):
    frame = pd.DataFrame({"churned": repeated(0, 1), "a": repeated(*"uvw"), "b": repeated(1, 2, 5)})
    with pytest.raises(TableError) as error:
        plan_columns(frame, **{"target": "churned", **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_many_columns_are_not_all_listed():
    frame = pd.DataFrame({f"c{i}": [1, 2] for i in range(40)})
    with pytest.raises(TableError, match=r"'c11' and 28 more$"):
        plan_columns(frame, target="zzz")


def test_row_names():
    frame = pd.DataFrame(
        {"k": [f"r{i % 50}" for i in range(N)], "n": range(N), "y": repeated(0, 1), "z": [None] * N}
    )
    plain = plan_columns(frame, target="y", ignore=["n"])
    assert row_names(frame, plain).tolist() == [str(i) for i in range(N)]
    assert row_names(frame, plan_columns(frame, target="y")).tolist() == [str(i) for i in range(N)]
    named = plan_columns(frame, target="y", id="k")
    assert row_names(frame, named).tolist() == frame["k"].tolist()
    assert "10 names repeat" in named[0].note
    assert named[1].kind == "ignored"
    frame.loc[3, "k"] = None
    holed = plan_columns(frame, target="y", id="k")
    assert row_names(frame, holed).tolist()[2:5] == ["r2", "3", "r4"]
    assert "1 rows without one have their position" in holed[0].note
    none = plan_columns(frame, target="y", id="z")
    assert row_names(frame, none).tolist() == [str(i) for i in range(N)]


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(N)), st.sampled_from(sorted(CASES)))
def test_the_order_of_rows_matters_only_for_sequences(order, name):
    values, kind, missing, distinct, _ = CASES[name]
    series = pd.Series(values).iloc[order].reset_index(drop=True)
    column = plan_columns(pd.DataFrame({name: series, "y": repeated(0, 1)}), target="y")[0]
    ordered = name in ("sequence", "descending", "ascending, with gaps")
    assert column.kind in ({"numeric", "id"} if ordered else {kind})
    assert (column.missing, column.distinct) == (missing, distinct)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.none(), st.text(max_size=8), st.floats(), st.booleans(), st.dates()),
        min_size=1,
        max_size=20,
    )
)
@pytest.mark.slow
def test_any_text_has_a_kind(values):
    texts = pd.Series([None if v is None else str(v) for v in values], dtype="object")
    frame = pd.DataFrame({"a": texts, "y": 1})
    column = plan_columns(frame, target="y")[0]
    assert 0 <= column.missing <= len(values)
    assert 0 <= column.distinct <= len(values) - column.missing
    assert "\n" not in column.note
