"""What values are told with, and that they are the same after a while in a file."""

from __future__ import annotations

import datetime
import io
import json
import zipfile

import numpy as np
import pandas as pd
import pytest

from upweight.valuation import (
    FunctionUtility,
    OwenSubsets,
    Stratified,
    Values,
    ValueWarning,
    banzhaf,
    data_oob,
    knn_shapley,
    least_core,
    leave_one_out,
    shapley,
)
from value_games import TableUtility, enumerated, rough

TABLE = rough(8)


def brittle() -> FunctionUtility:
    def utility(rows):
        if len(rows) == 1:
            raise ValueError("alone ☹")
        return float(np.tanh(rows.sum() / 9))

    return FunctionUtility(utility, 8, names=list("abcdefgh"))


def failed() -> Values:
    with pytest.warns(ValueWarning, match="alone"):
        return banzhaf(brittle(), p=0.3, until=200)


KINDS = {
    "orders": lambda: shapley(TableUtility(TABLE), until=100),
    "truncated pairs of orders": lambda: shapley(
        TableUtility(TABLE), sampler="antithetic", truncation=0.3, until=200
    ),
    "sets": lambda: banzhaf(TableUtility(TABLE, fingerprint="table"), until=100),
    "pairs of sets": lambda: shapley(TableUtility(TABLE), sampler="kernel", until=100),
    "strata": lambda: shapley(TableUtility(TABLE), sampler="stratified", until=200),
    "all sets": lambda: shapley(TableUtility(TABLE), sampler="exact"),
    "failures": failed,
    "leave-one-out": lambda: leave_one_out(TableUtility(TABLE)),
    "neighbours": lambda: knn_shapley(np.arange(8.0)[:, None], [0, 1] * 4, k=2),
    "plain": lambda: Values(np.array([1.5, np.nan, -2.0]), names=["ä", 2, None]),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_saved_and_loaded(kind: str, tmp_path):
    values = KINDS[kind]()
    path = values.save(tmp_path / "new folder" / "values.npz")
    again = Values.load(path)
    for name in ("values", "errors", "counts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(values, name))
        assert getattr(again, name).dtype == getattr(values, name).dtype
    for name in ("provenance", "converged", "stopped", "meaning"):
        assert getattr(again, name) == getattr(values, name)
    assert again.names.tolist() == values.names.tolist()
    pd.testing.assert_frame_equal(again.history, values.history)
    pd.testing.assert_frame_equal(again.failures, values.failures, check_dtype=False)
    assert type(again.samples) is type(values.samples)
    if values.samples is not None:
        for name, value in vars(values.samples).items():
            np.testing.assert_array_equal(getattr(again.samples, name), value)
            assert type(getattr(again.samples, name)) is type(value)
    assert repr(again) == repr(values)
    # no pickle, and no file beside it
    assert [p.name for p in path.parent.iterdir()] == ["values.npz"]
    with zipfile.ZipFile(path) as file:
        for name in file.namelist():
            np.lib.format.read_array(io.BytesIO(file.read(name)), allow_pickle=False)


def test_read_out_after_a_while_in_a_file(tmp_path):
    values = shapley(TableUtility(TABLE), until=500)
    again = Values.load(values.save(tmp_path / "values.npz"))
    np.testing.assert_array_equal(banzhaf(again).values, banzhaf(values).values)


def save_text(path):
    path.write_text("row,value\n1,2\n")


def save_arrays(path):
    np.savez(path, values=np.ones(3))


def save_pickled(path):
    np.savez(path, meta=np.array([{"format": 1}], object))


def save_other_meta(path):
    np.savez(path, meta=np.frombuffer(json.dumps({"a": 1}).encode(), np.uint8))


def save_list_meta(path):
    np.savez(path, meta=np.frombuffer(b"[1, 2]", np.uint8))


def save_newer(path):
    np.savez(path, meta=np.frombuffer(json.dumps({"format": 99}).encode(), np.uint8))


def save_without_names(path):
    np.savez(path, meta=np.frombuffer(json.dumps({"format": 2}).encode(), np.uint8))


def save_other_samples(path):
    KINDS["leave-one-out"]().save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(arrays["meta"].tobytes()) | {"samples": "OrderSamples"}
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(path, **arrays)


def save_cut(path):
    KINDS["orders"]().save(path)
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize(
    "write",
    [
        *(save_text, save_arrays, save_pickled, save_other_meta, save_list_meta, save_newer),
        *(save_without_names, save_other_samples, save_cut),
    ],
)
def test_other_files_are_refused(write, tmp_path):
    path = tmp_path / "values.npz"
    write(path)
    with pytest.raises(ValueError, match=r"values\.npz"):
        Values.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        Values.load(tmp_path / "none.npz")


def test_top_rows():
    values = Values(np.array([0.5, np.nan, -2.0, 0.5, 3.0]), names=list("abcde"))
    assert values.top(3)["row"].tolist() == ["e", "a", "d"]
    assert values.top(2, harmful=True)["row"].tolist() == ["c", "a"]
    assert values.top(2, harmful=True)["value"].tolist() == [-2.0, 0.5]
    assert values.top(99)["rank"].tolist() == [1, 2, 3, 4]
    assert "error" not in values.top(1)
    with pytest.raises(ValueError, match="k at least 1"):
        values.top(0)
    assert "error" in shapley(TableUtility(TABLE), until=100).top(1)


def test_frame():
    values = failed()
    frame = values.to_frame()
    assert frame.columns.tolist() == ["value", "error", "low", "high", "count"]
    assert frame.index.tolist() == list("abcdefgh")
    assert frame.loc["c", "value"] == values.values[2]
    np.testing.assert_allclose(
        frame["high"] - frame["low"], 2 * 1.959964 * values.errors, rtol=1e-6
    )


def test_intervals_hold_the_truth_as_often_as_they_say():
    truth = enumerated(TABLE, np.full(8, 1 / 8))
    held = {0.5: 0, 0.95: 0}
    for seed in range(150):
        values = shapley(TableUtility(TABLE), sampler="permutations", until=7 * 60, seed=seed)
        for level in held:
            low, high = values.interval(level).T
            held[level] += int(((low <= truth) & (truth <= high)).sum())
    for level, times in held.items():
        assert times / (150 * 8) == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 300))
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level between 0 and 1"):
            values.interval(level)


def test_names():
    with pytest.raises(ValueError, match=r"'a' occurs more than once \(1 names are repeated\)"):
        Values(np.ones(3), names=["a", "b", "a"])
    with pytest.raises(ValueError, match="expected 3 names"):
        Values(np.ones(3), names=["a", "b"])
    with pytest.raises(ValueError, match="more than once"):
        FunctionUtility(len, 2, names=[1, 1])
    values = KINDS["orders"]()
    other = values.named([f"row {i}" for i in range(8)])
    assert other.names[3] == "row 3"
    assert other.values is values.values
    assert values.names[3] == 3
    assert values.names.name == other.names.name == "row"


def test_lists_of_errors_and_counts_are_arrays():
    values = Values([1, 2], errors=[1, 2], counts=[3, 4])
    assert (values.errors.dtype, values.counts.dtype) == (np.float64, np.int64)
    assert values.interval()[1] == pytest.approx([2 - 2 * 1.959964, 2 + 2 * 1.959964], rel=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"errors": ["a", "b"]}, {"errors": 0.1}, {"counts": [1.5, 2.0]}, {"counts": np.ones((2, 0))}],
)
def test_errors_are_numbers_and_counts_whole_ones(wrong):
    with pytest.raises(ValueError, match=r"errors and counts of shape \(2,\)"):
        Values(np.ones(2), **wrong)


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"errors and counts of shape \(3,\)"):
        Values(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match=r"errors and counts of shape \(3,\)"):
        Values(np.ones(3), np.ones(3), np.ones((3, 1), np.int64))


def test_as_an_array():
    values = Values(np.array([1.0, 2.0]))
    assert np.asarray(values).tolist() == [1.0, 2.0]
    assert np.asarray(values, np.float32).dtype == np.float32
    assert float(np.mean(values)) == 1.5
    assert len(values) == values.n == 2
    np.asarray(values)[0] = 7.0
    assert values.values[0] == 1.0


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_prints(kind: str):
    values = KINDS[kind]()
    text = repr(values)
    assert f"<Values of {values.n} rows" in text
    assert values.meaning in text
    lowest = values.names[int(np.nanargmin(values.values))]
    assert f"lowest:  {lowest} (" in text
    assert str(values.provenance.get("method", "")) in text
    assert str(lowest) in values._repr_html_()


def test_names_cannot_break_out_of_a_page():
    values = Values(np.array([1.0, 2.0]), names=["<script>x</script>", "b"])
    assert "<script>" not in values._repr_html_()


def test_values_without_anything():
    nothing = Values(np.array([np.nan, np.nan]))
    assert nothing.top().empty
    assert "2 rows" in repr(nothing)
    assert nothing._repr_html_()
    assert "0 rows" in repr(Values(np.empty(0)))


def test_variances_are_those_of_the_values():
    values = shapley(TableUtility(TABLE), sampler="antithetic", until=700)
    np.testing.assert_allclose(values.variances, values.errors**2)


def flat(names) -> pd.Index:
    found = np.empty(len(names), object)
    found[:] = names
    return pd.Index(found)


NAMES = {
    "numbers": pd.Index([3, 1, 2]),
    "small numbers": pd.Index(np.array([3, 1, 2], np.uint8)),
    "range": pd.RangeIndex(10, 4, -2),
    "fractions": pd.Index([0.5, 1.0, float("inf")]),
    "text": pd.Index(["a", "b", "ä"]),
    "text as objects": pd.Index(["a", "b", "c"], dtype=object),
    "days": pd.date_range("2024-02-28", periods=3),
    "hours somewhere": pd.date_range("2024-10-26", periods=3, freq="12h", tz="Europe/Berlin"),
    "seconds": pd.DatetimeIndex(np.array([5, 6, 7], "M8[s]")),
    "spans": pd.to_timedelta([1, 5, 9], unit="h"),
    "bytes": pd.Index([b"a", b"\xff", b""]),
    "pairs": flat([("a", 1), ("a", 2), ("b", 1)]),
    "mixed": pd.Index(["a", 1, None], dtype=object),
    "numbers as objects": pd.Index([np.int64(4), "x", 2.5], dtype=object),
    "dates": pd.Index([datetime.date(2024, 1, d) for d in (1, 2, 3)], dtype=object),
    "stamps": flat([pd.Timestamp("2024-01-01", tz="UTC"), "x", (1, b"z")]),
}


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_names_come_back_as_they_are(kind: str, tmp_path):
    values = Values(np.arange(3.0), names=NAMES[kind])
    again = Values.load(values.save(tmp_path / "values.npz"))
    pd.testing.assert_index_equal(again.names, NAMES[kind].rename("row"), exact=True)
    assert again.names.tolist() == values.names.tolist()
    assert [type(name) for name in again.names] == [
        type(name.item() if isinstance(name, np.generic) else name) for name in values.names
    ]
    assert list(again.top(1)["row"]) == [NAMES[kind][2]]
    assert len(again.to_frame()) == 3


def test_names_of_many_levels_are_tuples():
    frame = pd.DataFrame({"x": [0.0, 1.0, 5.0]}, index=pd.MultiIndex.from_tuples(NAMES["pairs"]))
    assert knn_shapley(frame, [0, 1, 1], k=1).names.tolist() == NAMES["pairs"].tolist()
    assert Values(np.zeros(2), names=[("a", 1), ("a", 2)]).names.tolist() == [("a", 1), ("a", 2)]
    with pytest.raises(ValueError, match=r"\('a', 1\) occurs more than once"):
        Values(np.zeros(2), names=[("a", 1), ("a", 1)])


def test_categories_come_back_as_labels(tmp_path):
    values = Values(np.zeros(2), names=pd.CategoricalIndex(["b", "a"], categories=["a", "b", "c"]))
    assert Values.load(values.save(tmp_path / "values.npz")).names.tolist() == ["b", "a"]


def test_names_that_no_file_holds_are_refused(tmp_path):
    for name, kind in ((object(), "object"), (pd.NaT, "NaTType"), (pd.Period("2024"), "Period")):
        values = Values(np.zeros(2), names=flat([name, "b"]))
        with pytest.raises(TypeError, match=rf"got a {kind}: give others first, values\.named"):
            values.save(tmp_path / "values.npz")
    assert not list(tmp_path.iterdir())


def test_files_of_the_first_format_are_read(tmp_path):
    values = Values(np.arange(2.0), names=["a", "b"], provenance={"method": "any"})
    path = values.save(tmp_path / "values.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(arrays.pop("meta").tobytes())
    for form, names in ((1, ["a", "b"]), (3, meta["names"])):
        text = json.dumps(meta | {"format": form, "names": names}).encode()
        np.savez(path, meta=np.frombuffer(text, np.uint8), **arrays)
        if form == 1:
            assert Values.load(path).names.tolist() == ["a", "b"]
        else:
            with pytest.raises(ValueError, match="format 3"):
                Values.load(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: shapley(
            TableUtility(TABLE), truncation=np.float32(0.01), seed=np.int64(3), until=np.int64(300)
        ),
        lambda: shapley(TableUtility(TABLE), sampler=OwenSubsets(levels=np.int64(4)), until=300),
        lambda: shapley(TableUtility(TABLE), sampler=Stratified(decay=np.float64(0.5)), until=300),
        lambda: banzhaf(TableUtility(TABLE), p=np.float32(0.25), sampler="subsets", until=300),
        lambda: banzhaf(TableUtility(TABLE), p=np.float64(0.25)),
        lambda: knn_shapley(np.eye(4), [0, 1, 0, 1], k=np.int64(1), seed=np.int64(2)),
        lambda: data_oob(None, np.eye(6), [0, 1] * 3, trees=np.int64(90), soft=np.True_),
        lambda: least_core(TableUtility(TABLE), subsets=np.int64(200), seed=np.uint8(1)),
    ],
)
def test_provenance_is_plain(make, tmp_path):
    values = make()
    again = Values.load(values.save(tmp_path / "values.npz"))
    assert again.provenance == values.provenance
    assert json.loads(json.dumps(values.provenance)) == values.provenance


def test_what_numpy_has_of_plain_things_is_saved(tmp_path):
    failures = pd.DataFrame(
        {"size": [np.int64(2)], "rows": [np.array([0, 1])], "error": ["no fit"]}
    )
    values = Values(
        np.zeros(2),
        provenance={"levels": np.arange(2), 3: (np.float32(0.5), {4: np.True_})},
        converged=np.True_,
        failures=failures,
    )
    assert values.provenance == {"levels": [0, 1], "3": [0.5, {"4": True}]}
    assert values.converged is True
    again = Values.load(values.save(tmp_path / "values.npz"))
    assert again.provenance == values.provenance
    assert again.converged is True
    assert again.failures.to_dict("list") == {"size": [2], "rows": [[0, 1]], "error": ["no fit"]}


def test_provenance_that_cannot_be_plain():
    with pytest.raises(TypeError, match=r"provenance\['model'\]\[1\] as numbers.*got a object"):
        Values(np.zeros(1), provenance={"model": ["a", object()]})


@pytest.mark.parametrize("wrong", [np.ones((2, 2)), np.float64(3), ["a", "b"], np.array([1j])])
def test_what_are_no_values(wrong):
    with pytest.raises(ValueError, match="expected a number for each row"):
        Values(wrong)


def test_whole_numbers_are_values():
    assert Values(np.array([1, 2])).values.dtype == np.float64


@pytest.mark.parametrize("k", [0, 1.5, "3", None, True, np.True_])
def test_how_many_is_a_whole_number(k):
    with pytest.raises(ValueError, match="expected k"):
        Values(np.arange(3.0)).top(k)
