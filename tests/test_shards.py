"""What survives a kill: tensors in a file, and scores out of core that go on where they stopped."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import upweight as uw
from cases import Case, make
from upweight import influence as product
from upweight import methods, storing
from upweight.layerwise import holding
from upweight.shards import ShardStore, digest_batches, digest_names, disk, sizes, store
from upweight.stream import load_tensors, save_tensors
from upweight.topk import RunningTop

# --- a file of tensors -----------------------------------------------------------------------


def some_tensors() -> dict[str, torch.Tensor]:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    return {
        "x": x,
        "part of x": x[1],
        "columns of x": x.T,
        "number": torch.tensor(2),
        "none": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "half": x.bfloat16(),
    }


def test_tensors_come_back_with_their_description(tmp_path: Path) -> None:
    tensors, meta = some_tensors(), {"layers": ["a", "b"], "λ": 0.1}
    path = save_tensors(tmp_path / "t.safetensors", tensors, meta)
    found, described = load_tensors(path)
    assert described == meta
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    one = save_tensors(tmp_path / "1", some_tensors(), {"a": 1, "b": 2}).read_bytes()
    assert save_tensors(tmp_path / "1", some_tensors(), {"b": 2, "a": 1}).read_bytes() == one


@given(place=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_a_damaged_file_of_tensors_is_refused(
    place: float, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = save_tensors(tmp_path_factory.mktemp("t") / "t", some_tensors(), {"of": "a test"})
    whole = bytearray(path.read_bytes())
    at = int(place * len(whole))
    if cut:
        del whole[at:]
    else:
        whole[at] ^= 1
    path.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="again"):
        load_tensors(path)


def test_foreign_files_of_tensors_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="there is none"):
        load_tensors(tmp_path / "t")
    (tmp_path / "text").write_text("not tensors at all, but long enough to look at")
    with pytest.raises(ValueError, match="another kind of file"):
        load_tensors(tmp_path / "text")
    save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="format 1; got none"):
        load_tensors(tmp_path / "other")


def test_an_unwritable_description_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "t", {"x": torch.ones(2)}, {})
    with pytest.raises(TypeError):
        save_tensors(path, {"x": torch.zeros(2)}, {"bad": object()})
    assert torch.equal(load_tensors(path)[0]["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


# --- the store of parts ----------------------------------------------------------------------

WORK = {"model": "abc", "damping": 0.1, "rows": 10}


def draw(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def cuts(total: int, at: list[int]) -> list[slice]:
    edges = [0, *sorted({a for a in at if 0 < a < total}), total]
    return [slice(a, b) for a, b in pairwise(edges)]


def opened(
    path: Path, values: torch.Tensor, chunk: tuple[int, int] = (2, 3), **changed: Any
) -> Any:
    resume = changed.pop("resume", True)
    return ShardStore(path, values.shape, values.dtype, chunk, WORK | changed, resume=resume)


def during(path: Path, values: torch.Tensor, *actions: Callable[[ShardStore], Any]) -> None:
    with opened(path, values) as store:
        for action in actions:
            action(store)


def interrupt(store: ShardStore) -> None:
    raise KeyboardInterrupt


def put(store: ShardStore, values: torch.Tensor, rows: slice, shard: slice, step: int = 2) -> None:
    for start in range(shard.start, shard.stop, step):
        columns = slice(start, min(start + step, shard.stop))
        store.write(rows, columns, values[rows, columns])


def fill(store: ShardStore, values: torch.Tensor, groups: list[slice], stop: int = 10**6) -> int:
    """Write what is missing, at most so many parts; how many were written."""
    written = 0
    for rows in groups:
        for shard in store.shards:
            if not store.done(rows, shard):
                if written == stop:
                    raise KeyboardInterrupt
                put(store, values, rows, shard)
                written += 1
    return written


def whole(path: Path) -> torch.Tensor:
    return torch.from_numpy(zarr.open_array(store=f"{path}/values", mode="r")[:])


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


shapes = st.tuples(st.integers(1, 7), st.integers(1, 9)) | st.tuples(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)
)


@given(
    shape=shapes,
    chunk=st.tuples(st.integers(1, 8), st.integers(1, 10)),
    at=st.lists(st.integers(1, 6), max_size=3),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_parts_in_any_order_are_the_matrix(
    shape: tuple[int, ...],
    chunk: tuple[int, int],
    at: list[int],
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("store") / "s"
    values = draw(shape)
    with opened(path, values, chunk) as store:
        parts = [(rows, shard) for rows in cuts(shape[0], at) for shard in store.shards]
        for rows, shard in data.draw(st.permutations(parts)):
            assert not store.done(rows, shard)
            put(store, values, rows, shard, data.draw(st.integers(1, 4)))
        store.finish()
    assert torch.equal(whole(path), values)
    assert [p.name for p in path.parent.iterdir()] == ["s"]


@given(at=st.lists(st.integers(1, 6), max_size=3), stops=st.lists(st.integers(1, 4), max_size=4))
@settings(deadline=None, max_examples=12)
def test_a_store_that_was_stopped_gives_the_same_bytes(
    at: list[int], stops: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("store")
    values = draw((7, 10))
    groups = cuts(7, at)
    with opened(folder / "once", values) as store:
        total = fill(store, values, groups)
        store.finish()
    left = total
    for stop in stops:
        if stop >= left:
            break
        with pytest.raises(KeyboardInterrupt), opened(folder / "again", values) as store:
            fill(store, values, groups, stop)
        left -= stop
    with opened(folder / "again", values) as store:
        assert fill(store, values, groups) == left
        store.finish()
    assert content(folder / "again") == content(folder / "once")


def stopped(path: Path, values: torch.Tensor, parts: int) -> Path:
    """A store of which so many parts are done; where they are."""
    with pytest.raises(KeyboardInterrupt), opened(path, values) as store:
        fill(store, values, [slice(0, 4), slice(4, 5)], parts)
    return path.with_name(f".{path.name}.partial")


@pytest.fixture
def values() -> torch.Tensor:
    return draw((5, 7))


def test_a_damaged_part_is_computed_again(values: torch.Tensor, tmp_path: Path) -> None:
    partial = stopped(tmp_path / "s", values, 4)
    file = partial / "result" / "values" / "c" / "0" / "1"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    (partial / "result" / "values" / "c" / "1" / "2").unlink()  # of rows 2 and 3, columns from 6
    written: list[int] = []
    with pytest.warns(UserWarning, match="computed again") as told:
        during(
            tmp_path / "s",
            values,
            lambda store: written.append(fill(store, values, [slice(0, 4), slice(4, 5)])),
            ShardStore.finish,
        )
    assert written == [4]
    assert len(told) == 2
    assert "training rows 3 … 5" in str(told[0].message)
    assert torch.equal(whole(tmp_path / "s"), values)


@pytest.mark.parametrize("cut", [1, 20])
def test_a_record_that_was_cut_off_does_not_count(
    cut: int, values: torch.Tensor, tmp_path: Path
) -> None:
    log = stopped(tmp_path / "s", values, 4) / "done.log"
    log.write_bytes(log.read_bytes()[:-cut])
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "s", values) as store:
        fill(store, values, [slice(0, 4), slice(4, 5)], 2)
    with opened(tmp_path / "s", values) as store:  # what came behind it does
        assert fill(store, values, [slice(0, 4), slice(4, 5)]) == 6 - 3 - 2
        store.finish()
    assert torch.equal(whole(tmp_path / "s"), values)


def test_notes_of_groups_come_back(values: torch.Tensor, tmp_path: Path) -> None:
    actions = (
        lambda store: store.note(slice(0, 4), {"solved": 4}),
        lambda store: fill(store, values, [slice(0, 4)], 1),
    )
    with pytest.raises(KeyboardInterrupt):
        during(tmp_path / "s", values, *actions)
    with opened(tmp_path / "s", values) as store:
        assert store.notes == {(0, 4): {"solved": 4}}
        assert store.missing(slice(0, 4)) == 2
        assert store.missing(slice(4, 5)) == 3


def test_other_work_is_refused_by_name(values: torch.Tensor, tmp_path: Path) -> None:
    partial = stopped(tmp_path / "s", values, 2)
    before = content(partial)
    with (
        pytest.raises(
            ValueError, match=r"damping: 0.1 there, 0.2 now; rows: 10 there, 11 now"
        ) as e,
        opened(tmp_path / "s", values, damping=0.2, rows=11),
    ):
        pass
    assert "model" not in str(e.value)
    assert "resume=False" in str(e.value)
    with (
        pytest.raises(ValueError, match="curvature: None there, ggn now"),
        opened(tmp_path / "s", values, curvature="ggn"),
    ):
        pass
    assert content(partial) == before
    with opened(tmp_path / "s", values, damping=0.2, resume=False) as store:
        assert fill(store, values, [slice(0, 5)]) == 3
        store.finish()
    assert torch.equal(whole(tmp_path / "s"), values)


def test_a_damaged_description_is_refused(values: torch.Tensor, tmp_path: Path) -> None:
    (stopped(tmp_path / "s", values, 2) / "work.json").write_text('{"model"')
    with pytest.raises(ValueError, match="damaged"), opened(tmp_path / "s", values):
        pass
    with opened(tmp_path / "s", values, resume=False) as store:
        assert fill(store, values, [slice(0, 5)]) == 3


def test_a_foreign_folder_is_left_alone(values: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / ".s.partial").mkdir()
    (tmp_path / ".s.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"), opened(tmp_path / "s", values):
        pass
    assert content(tmp_path / ".s.partial") == {"thesis.tex": b"mine"}


def test_an_error_before_the_first_part_leaves_nothing(
    values: torch.Tensor, tmp_path: Path
) -> None:
    actions = (
        lambda store: store.note(slice(0, 5), {}),
        lambda store: store.write(slice(0, 5), slice(0, 2), values[:, :2]),
        interrupt,
    )
    with pytest.raises(KeyboardInterrupt):
        during(tmp_path / "s", values, *actions)
    assert list(tmp_path.iterdir()) == []


def test_what_is_at_the_path_is_left_alone(values: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(FileExistsError, match="exists already"), opened(tmp_path / "s", values):
        pass
    (tmp_path / "s").rmdir()
    actions = (
        lambda store: fill(store, values, [slice(0, 5)]),
        lambda store: (tmp_path / "s").mkdir(),
        ShardStore.finish,
    )
    with pytest.raises(FileExistsError, match="meanwhile"):
        during(tmp_path / "s", values, *actions)
    (tmp_path / "s").rmdir()
    with opened(tmp_path / "s", values) as store:
        assert fill(store, values, [slice(0, 5)]) == 0
        store.finish()
    assert torch.equal(whole(tmp_path / "s"), values)


def test_a_process_that_ended_right_after_the_rename(values: torch.Tensor, tmp_path: Path) -> None:
    partial = stopped(tmp_path / "s", values, 2)
    (partial / "result").rename(tmp_path / "s")
    with pytest.raises(FileExistsError, match="exists already"), opened(tmp_path / "s", values):
        pass
    (tmp_path / "s").rename(tmp_path / "elsewhere")
    with opened(tmp_path / "s", values) as store:
        assert fill(store, values, [slice(0, 5)]) == 3
        store.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "s"]


def test_a_place_that_cannot_be_written_to(values: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written.*another path"):
        opened(tmp_path / "file" / "s", values).__enter__()


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_keeps_what_is_done(
    kind: int, values: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    true = disk.put

    def full(path: Path, offset: int, data: memoryview, whole: int) -> None:
        calls.append(offset)
        if len(calls) > 2:  # in the middle of the second part, of which some bytes are written
            true(path, offset, data[: len(data) // 2], whole)
            raise OSError(kind, os.strerror(kind))
        true(path, offset, data, whole)

    monkeypatch.setattr(disk, "put", full)
    with (
        pytest.raises(OSError, match="1 finished parts are kept") as told,
        opened(tmp_path / "s", values) as store,
    ):
        fill(store, values, [slice(0, 4), slice(4, 5)])
    assert told.value.errno == kind
    assert ("make room" in str(told.value)) == (kind == errno.ENOSPC)
    monkeypatch.undo()
    with opened(tmp_path / "s", values) as store:
        assert fill(store, values, [slice(0, 4), slice(4, 5)]) == 5
        store.finish()
    assert torch.equal(whole(tmp_path / "s"), values)


def test_the_space_is_looked_at_before(
    values: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path / "s", values, 4)
    needed = 6 * 9 * 4  # whole chunks
    there = 4 * 9 * 4 + 1 * 3 * 4

    def space(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))

    space(needed - there - 1)
    with pytest.raises(OSError, match="free on its disk") as told, opened(tmp_path / "s", values):
        pass
    assert told.value.errno == errno.ENOSPC
    space(needed - there)
    with opened(tmp_path / "s", values) as store:
        assert fill(store, values, [slice(0, 4), slice(4, 5)]) == 2
        store.finish()
    with pytest.raises(OSError, match="free on its disk"), opened(tmp_path / "t", values):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_two_at_one_path(values: torch.Tensor, tmp_path: Path) -> None:
    with opened(tmp_path / "s", values) as store:
        with (
            pytest.raises(BlockingIOError, match=f"process {os.getpid()}"),
            opened(tmp_path / "s", values, damping=7),
        ):
            pass
        fill(store, values, [slice(0, 5)])
        store.finish()
    assert torch.equal(whole(tmp_path / "s"), values)


@pytest.mark.slow
def test_the_lock_of_a_dead_process_does_not_count(values: torch.Tensor, tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from upweight.shards.disk import locked\n"
        "with locked(Path(sys.argv[1]), 'held'): os.kill(os.getpid(), 9)"
    )
    lock = tmp_path / ".s.partial" / "lock"
    assert subprocess.run([sys.executable, "-c", script, str(lock)], check=False).returncode == -9
    assert lock.exists()
    with opened(tmp_path / "s", values) as store:
        assert fill(store, values, [slice(0, 5)]) == 3


def test_blocks_that_do_not_fit_are_refused(values: torch.Tensor, tmp_path: Path) -> None:
    rows = slice(0, 5)
    for columns in (slice(1, 3), slice(0, 4)):
        with (
            pytest.raises(ValueError, match="expected a block"),
            opened(tmp_path / "s", values) as s,
        ):
            s.write(rows, columns, values[:, columns])
    actions = (
        lambda store: store.write(rows, slice(0, 2), values[:, :2]),
        lambda store: store.write(slice(0, 4), slice(2, 3), values[:4, 2:3]),
    )
    with pytest.raises(ValueError, match="expected a block"):
        during(tmp_path / "s", values, *actions)
    actions = (lambda store: put(store, values, rows, slice(0, 3)), ShardStore.finish)
    with pytest.raises(RuntimeError, match="35 pairs of rows; 15"):
        during(tmp_path / "s", values, *actions)


@given(
    m=st.integers(1, 10**6),
    n=st.integers(1, 10**7),
    features=st.lists(st.integers(1, 224), max_size=3),
    p=st.integers(1, 10**10),
)
def test_chunks_and_held_parts_stay_small(m: int, n: int, features: list[int], p: int) -> None:
    lines, width = sizes((m, n, *features), p)
    pair = math.prod(features)
    assert 1 <= lines <= m
    assert 1 <= width <= n
    assert lines * width * pair <= max(2**20, pair)
    assert m * width * pair <= max(2**25, m * pair)


def test_digests_tell_rows_apart() -> None:
    x, y = torch.arange(6.0).view(3, 2), torch.arange(3)
    one = digest_batches([{"x": x, "y": y, "text": ["a", "b"]}])
    assert one == digest_batches([{"x": x.clone(), "y": y.clone(), "text": ["a", "b"]}])
    assert one == digest_batches([{"x": x.T.contiguous().T, "y": y, "text": ["a", "b"]}])
    for other in (
        {"x": x + 1e-6, "y": y, "text": ["a", "b"]},
        {"x": x.view(2, 3), "y": y, "text": ["a", "b"]},
        {"x": x.double(), "y": y, "text": ["a", "b"]},
        {"x": x, "z": y, "text": ["a", "b"]},
        {"x": x, "y": y, "text": ["a", "c"]},
        {"x": x, "y": y},
    ):
        assert digest_batches([other]) != one
    assert digest_batches([x.bfloat16(), object()]) == digest_batches([x.bfloat16(), object()])
    assert digest_names([1, 2]) != digest_names(["1", "2"])


# --- scores ----------------------------------------------------------------------------------


def fitted(name: str = "mlp", method: Any = "direct", **options: Any) -> tuple[uw.Influence, Case]:
    case = make(name)
    influence = uw.Influence(case.model, case.loss, method, damping=0.1, **options)
    return influence.fit(case.train), case


class StoppedError(Exception):
    pass


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two training rows; groups of two test rows, with EK-FAC of one."""
    monkeypatch.setattr(store, "WIDTH", 2)
    monkeypatch.setattr(store, "LEAST_WIDTH", 2)
    monkeypatch.setattr(store, "ROWS", 3)
    monkeypatch.setattr(holding, "HELD_BYTES", 1)
    monkeypatch.setattr(
        product, "SOLVED_BYTES", 2 * 3 * 8 * sum(p.numel() for p in make("mlp").model.parameters())
    )


def stop_after(
    monkeypatch: pytest.MonkeyPatch, parts: int, error: type[BaseException]
) -> list[Any]:
    """An error in place of the part after so many; those that were written."""
    written: list[Any] = []
    write = ShardStore._write

    def fails(self: ShardStore, part: Any, piece: Any) -> None:
        if len(written) == parts:
            raise error
        written.append(part)
        write(self, part, piece)

    monkeypatch.setattr(ShardStore, "_write", fails)
    return written


METHODS: dict[str, dict[str, Any]] = {
    "direct": {},
    "cg": {"method": uw.CG(preconditioner="nystroem", rtol=1e-4)},
    "blocks": {"method": "cg", "blocks": "layer"},
    "lissa": {"method": uw.LiSSA(max_steps=10_000)},
    "nystroem": {"method": uw.Nystroem(rank=5), "certify": 3},
    "arnoldi": {"method": uw.Arnoldi(rank=5, start="test"), "certify": 3},
    "ekfac": {"method": "ekfac"},
}


@pytest.mark.parametrize("mode", ["up", "perturbation"])
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
@pytest.mark.usefixtures("small")
@pytest.mark.slow
def test_scores_go_on_to_the_same_bytes(
    options: dict[str, Any], mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence, case = fitted(**options)
    with monkeypatch.context() as patch:
        written = stop_after(patch, -1, StoppedError)
        whole = influence.scores(case.test, mode=mode, to=tmp_path / "once")
    wanted = fitted(**options)[0].scores(case.test, mode=mode)
    # not the same bytes: rows that are computed together round otherwise
    np.testing.assert_allclose(np.asarray(whole), np.asarray(wanted), rtol=1e-9, atol=1e-12)
    live = influence.certificate.to_dict()
    kept = whole.provenance["certificate"]
    assert kept == live | {"residual_mean": kept["residual_mean"]}
    assert kept["residual_mean"] == pytest.approx(live["residual_mean"], rel=1e-3)
    for parts in (len(written) // 2, 1):
        with monkeypatch.context() as patch:
            stop_after(patch, parts, StoppedError)
            with pytest.raises(StoppedError):
                fitted(**options)[0].scores(case.test, mode=mode, to=tmp_path / "again")
    fitted(**options)[0].scores(case.test, mode=mode, to=tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "once")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "once"]


@pytest.mark.usefixtures("small")
def test_groups_that_are_done_are_not_solved_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence, case = fitted()
    parts = -(-influence.risk(case.train).n // 2)  # of a group
    with monkeypatch.context() as patch:
        stop_after(patch, parts + 1, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            influence.scores(case.test, to=tmp_path / "s")
    again, _ = fitted()
    found = again.scores(case.test, to=tmp_path / "s")
    m = found.shape[0]
    assert again.certificate.columns == m - 2
    assert found.provenance["certificate"]["columns"] == m


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    influence, case = fitted()

    def full(*of: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storing, "write_meta", full)
        with pytest.raises(OSError, match=r"s cannot be written.*make room; 1 finished parts"):
            influence.scores(case.test, to=tmp_path / "s")
    with pytest.raises(FileNotFoundError, match=r"\.s\.partial has unfinished ones"):
        uw.Scores.load(tmp_path / "s")
    stop_after(monkeypatch, 0, StoppedError)  # nothing is left to write
    influence.scores(case.test, to=tmp_path / "s")


@pytest.mark.usefixtures("small")
def test_scores_of_other_work_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    influence, case = fitted()
    path = tmp_path / "s"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, StoppedError)
        with pytest.raises(StoppedError):
            influence.scores(case.test, to=path)
    x, y = case.train

    def refused(told: str, influence: uw.Influence, *rows: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=told):
            influence.scores(*rows, to=path, **options)

    refused("damping: 0.1 there, 0.2 now", other_damping(), case.test)
    refused("method: direct there, cg now", fitted(method="cg")[0], case.test)
    refused("curvature: ggn there, fisher-exact now", fitted(curvature="fisher")[0], case.test)
    refused("test loss: loss there, margin now", influence, case.test, test_loss="margin")
    refused("mode: up there, perturbation now", influence, case.test, mode="perturbation")
    refused("train rows: 11 there, 6 now", influence, case.test, (x[:6], y[:6]))
    refused("content of test rows", influence, (case.test[0] + 1e-3, case.test[1]))
    refused("names of test rows", influence, case.test, names=list("abcde"))
    refused("content of training rows", influence, case.test, (x.flip(0), y.flip(0)))
    refused("rows of fit", influence_on(case, (x[1:], y[1:])), case.test, case.train)
    refused("parameters", fitted(parameters="2.*")[0], case.test)
    other, _ = fitted()
    with torch.no_grad():
        other.model[0].weight[0, 0] += 1  # type: ignore[index, operator]
    refused("model", other.fit(case.train), case.test)
    monkeypatch.setattr(methods, "__version__", "9.9")
    refused("version of upweight: .* there, 9.9 now", influence, case.test)
    monkeypatch.undo()
    assert not path.exists()
    found = influence.scores(case.test, to=path, test_loss="margin", resume=False)
    assert found.provenance["test_loss"] == "margin"


def other_damping() -> uw.Influence:
    influence, _ = fitted()
    influence.damping = 0.2
    return influence


def influence_on(case: Case, rows: Any) -> uw.Influence:
    return uw.Influence(case.model, case.loss, damping=0.1).fit(rows)


def test_an_existing_path_is_refused_before_the_work(tmp_path: Path) -> None:
    influence, _ = fitted()
    (tmp_path / "s").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        influence.scores("no rows at all", to=tmp_path / "s")


def test_an_error_in_the_rows_leaves_nothing(tmp_path: Path) -> None:
    influence, case = fitted()
    x = case.test[0].clone()
    x[2] = torch.nan
    with pytest.raises(ValueError, match="row 2"):
        influence.scores((x, case.test[1]), to=tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


# --- the top without the matrix --------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    k=st.integers(1, 10),
    harmful=st.booleans(),
    at=st.tuples(st.lists(st.integers(1, 8), max_size=3), st.lists(st.integers(1, 3), max_size=2)),
    data=st.data(),
)
@settings(deadline=None)
def test_a_running_top_is_that_of_the_matrix(
    shape: tuple[int, int], k: int, harmful: bool, at: Any, data: st.DataObject
) -> None:
    numbers = st.sampled_from([-math.inf, -1.0, 0.0, -0.0, 1.0, math.inf, math.nan])
    flat = data.draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
    values = torch.tensor(flat).view(shape)
    top = RunningTop(shape[0], k, torch.float32, harmful=harmful)
    blocks = [
        (rows, columns) for rows in cuts(shape[0], at[1]) for columns in cuts(shape[1], at[0])
    ]
    for rows, columns in data.draw(st.permutations(blocks)):
        top.write(rows, columns, values[rows, columns])
    found, columns = top.finish()
    order = torch.argsort(values, dim=1, descending=not harmful, stable=True)[:, :k]
    assert columns.tolist() == order.tolist()
    torch.testing.assert_close(found, values.gather(1, order), equal_nan=True)


@pytest.mark.parametrize("harmful", [False, True])
@pytest.mark.parametrize("k", [1, 3, 99])
def test_top_is_that_of_the_scores(k: int, harmful: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    influence, case = fitted(batch_size=2)
    x, y = case.train
    train = (torch.cat([x, x]), torch.cat([y, y]))  # every score twice
    names = list("vwxyz")[: len(case.test[1])]
    wanted = influence.scores(case.test, train, names=names).top(k, harmful=harmful)
    found = influence.top(case.test, train, k, harmful=harmful, names=names)
    pd.testing.assert_frame_equal(found, wanted)
    with pytest.raises(ValueError, match="whole number k"):
        influence.top(case.test, k=0)


# --- processes that are killed ---------------------------------------------------------------


def killed(folder: Path, kills: int, *methods: str) -> dict[str, Any]:
    script = Path(__file__).with_name("kill_run.py")
    command = [sys.executable, str(script), str(folder), str(kills), *methods]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
def test_fifty_kills_do_not_change_the_bytes(tmp_path: Path) -> None:
    found = killed(tmp_path, 50)
    assert found["kills"] == 50
    assert found["rounds"] >= 5
    # they came at many moments, and not only before the first part was there
    assert len({parts for parts in found["parts"] if parts}) >= 10
