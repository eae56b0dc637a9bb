"""Scores: meaning, names, ranks, storage; and what is written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import upweight as uw
from cases import make
from upweight.stream import ArraySink, ZarrSink, atomic_directory, atomic_write

VALUES = torch.tensor([[1.0, -3.0, 0.5], [2.0, 1.0, -0.5]])
NAMES = pd.Index(["a", "b", "c"], name="row")


def scores(values: torch.Tensor = VALUES) -> uw.Scores:
    return uw.Scores(
        values, pd.Index(["t", "u"], name="row"), NAMES, {"mode": "up", "damping": 0.1}
    )


def test_mean_keeps_names_and_sign() -> None:
    mean = scores().mean()
    assert mean.values.tolist() == [1.5, -1.0, 0.0]
    assert list(mean.names) == ["a", "b", "c"]
    assert mean.top(1, harmful=True)["row"].item() == "b"
    assert mean.top(1)["row"].item() == "a"
    assert mean.to_frame().loc["b", "score"] == -1.0
    np.testing.assert_array_equal(np.asarray(mean), [1.5, -1.0, 0.0])


def test_top_ranks_within_each_test_row() -> None:
    top = scores().top(2)
    assert top["test_row"].tolist() == ["t", "t", "u", "u"]
    assert top["train_row"].tolist() == ["a", "c", "a", "b"]
    assert top["rank"].tolist() == [1, 2, 1, 2]
    assert scores().top(1, harmful=True)["train_row"].tolist() == ["b", "c"]
    assert len(scores().top(99)) == 6


def test_to_frame_has_both_names() -> None:
    frame = scores().to_frame()
    assert frame.loc["u", "c"] == -0.5


def test_repr_says_what_the_sign_means() -> None:
    for shown in (repr(scores()), repr(scores().mean()), scores()._repr_html_()):
        assert "positive = the training row helps" in shown
        assert "damping 0.1" in shown


def test_html_escapes_names_and_provenance() -> None:
    hostile = "<script>alert(1)</script>"
    names = pd.Index([hostile, "b", "c"])
    shown = uw.Scores(VALUES, pd.Index(["t", "u"]), names, {"mode": hostile})
    for page in (shown._repr_html_(), shown.mean()._repr_html_()):
        assert "<script" not in page
        assert "&lt;script&gt;" in page


def test_perturbation_scores_have_no_rank() -> None:
    values = scores(torch.ones(2, 3, 4))
    assert "feature" in repr(values)
    assert values.mean().values.shape == (3, 4)
    assert values.mean().to_frame().shape == (3, 4)
    for action in (values.top, values.to_frame, values.mean().top):
        with pytest.raises(ValueError, match="one number per feature"):
            action()


def test_names_must_match_values() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*got \(3, 2\)"):
        scores(VALUES.T)


@pytest.mark.parametrize("values", [VALUES, VALUES.double(), torch.randn(2, 3, 4)])
def test_save_and_load_bring_everything_back(values: torch.Tensor, tmp_path: Path) -> None:
    path = scores(values).save(tmp_path / "s")
    back = uw.Scores.load(path)
    assert torch.equal(torch.from_numpy(back.values[:]), values)
    assert list(back.train_names) == ["a", "b", "c"]
    assert list(back.test_names) == ["t", "u"]
    assert back.provenance == {"mode": "up", "damping": 0.1}
    torch.testing.assert_close(back.mean().values, scores(values).mean().values)
    assert "on disk" in repr(back)


def test_names_of_any_kind_are_stored(tmp_path: Path) -> None:
    mixed = uw.Scores(VALUES, pd.RangeIndex(2), pd.Index([1, "b", 2.5]))
    back = uw.Scores.load(mixed.save(tmp_path / "s"))
    assert list(back.test_names) == [0, 1]
    assert list(back.train_names) == ["1", "b", "2.5"]


def test_provenance_of_a_run_is_complete(tmp_path: Path) -> None:
    case = make("mlp")
    influence = uw.Influence(case.model, case.loss, damping=0.1).fit(case.train)
    path = influence.scores(case.test, to=tmp_path / "s")
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    assert meta["provenance"] == path.provenance
    assert meta["provenance"]["method"] == "direct"
    assert meta["provenance"]["curvature"] == "ggn"
    assert meta["provenance"]["certificate"]["residual_max"] < 1e-12
    assert "positive = the training row helps" in meta["sign"]


def test_nothing_is_overwritten_or_left_behind(tmp_path: Path) -> None:
    scores().save(tmp_path / "s")
    with pytest.raises(FileExistsError, match="exists already"):
        scores().save(tmp_path / "s")
    with pytest.raises(FileNotFoundError, match=r"meta\.json"):
        uw.Scores.load(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_foreign_format_is_refused(tmp_path: Path) -> None:
    path = scores().save(tmp_path / "s")
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        uw.Scores.load(path)


class Broken(Exception):
    pass


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(text: str, *, fail: bool, replace: bool = False) -> None:
        with atomic_directory(tmp_path / "d", replace=replace) as folder:
            (folder / "f").write_text(text)
            if fail:
                raise Broken

    with pytest.raises(Broken):
        write("one", fail=True)
    assert list(tmp_path.iterdir()) == []
    write("one", fail=False)
    with pytest.raises(Broken):
        write("two", fail=True, replace=True)
    assert (tmp_path / "d" / "f").read_text() == "one"
    write("two", fail=False, replace=True)
    assert (tmp_path / "d" / "f").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(fail: bool) -> None:
        with atomic_write(tmp_path / "f") as path:
            path.write_text("new")
            if fail:
                raise Broken

    (tmp_path / "f").write_text("old")
    with pytest.raises(Broken):
        write(fail=True)
    assert (tmp_path / "f").read_text() == "old"
    write(fail=False)
    assert (tmp_path / "f").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("held", [1, 10**6])
@pytest.mark.parametrize("width", [1, 3, 4, 10])
def test_narrow_blocks_are_joined_on_their_way_to_disk(
    held: int, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ZarrSink, "CHUNK", (2, 4))
    monkeypatch.setattr(ZarrSink, "HELD_BYTES", held)
    wanted = torch.randn(5, 10)
    sink = ZarrSink(tmp_path / "z", (5, 10), torch.float32)
    for rows in (slice(0, 3), slice(3, 5)):
        for start in range(0, 10, width):
            columns = slice(start, min(start + width, 10))
            sink.write(rows, columns, wanted[rows, columns])
    assert torch.equal(torch.from_numpy(sink.finish()[:]), wanted)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_sinks_take_blocks_in_any_order(kind: str, tmp_path: Path) -> None:
    wanted = torch.randn(5, 7, 2)
    sink = (
        ArraySink((5, 7, 2), torch.float32)
        if kind == "memory"
        else ZarrSink(tmp_path / "z", (5, 7, 2), torch.float32)
    )
    for rows in (slice(3, 5), slice(0, 3)):
        for columns in (slice(4, 7), slice(0, 4)):
            sink.write(rows, columns, wanted[rows, columns])
    assert torch.equal(torch.as_tensor(np.asarray(sink.finish()[:])), wanted)


@pytest.mark.parametrize("names", [[1j, 2j, 3j], [2**70, 1, 2], [(1, "a"), (1, "b"), (2, "a")]])
def test_names_that_no_table_knows_are_stored_as_text(names: list[object], tmp_path: Path) -> None:
    index = pd.Index(names)
    back = uw.Scores.load(uw.Scores(VALUES, pd.RangeIndex(2), index).save(tmp_path / "s"))
    assert list(back.train_names) == [str(name) for name in names]


def test_chunks_on_disk_stay_small() -> None:
    for shape in [(1000, 50_000), (1000, 50_000, 13), (1000, 50_000, 3, 224, 224), (2, 3, 0)]:
        chunk = ZarrSink._chunks(shape)
        assert np.prod(chunk) <= max(2**20, np.prod(shape[2:]))
    assert ZarrSink._chunks((1000, 50_000)) == (256, 4096)


def test_the_sign_on_disk_is_that_of_the_mode(tmp_path: Path) -> None:
    values = torch.randn(2, 3, 4)
    path = uw.Scores(values, pd.RangeIndex(2), NAMES, {"mode": "perturbation"}).save(tmp_path / "s")
    assert "increasing this feature" in json.loads((path / "meta.json").read_text())["sign"]


def test_what_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_directory(tmp_path / "d") as folder:
            (folder / "f").write_text("ours")
            (tmp_path / "d").mkdir()
            (tmp_path / "d" / "f").write_text("theirs")

    with pytest.raises(FileExistsError, match="meanwhile"):
        write()
    assert (tmp_path / "d" / "f").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("k", [0, -1, 2.5])
def test_ranks_of_no_rows_are_refused(k: float) -> None:
    for action in (scores().top, scores().mean().top):
        with pytest.raises(ValueError, match="whole number k of at least 1"):
            action(k)  # type: ignore[operator]


def test_scores_are_arrays(tmp_path: Path) -> None:
    np.testing.assert_array_equal(np.asarray(scores()), VALUES.numpy())
    stored = uw.Scores.load(scores().save(tmp_path / "s"))
    np.testing.assert_array_equal(np.asarray(stored), VALUES.numpy())
    assert len(stored) == 2
