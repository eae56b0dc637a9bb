"""Steps of an audit: kept when finished, read again, computed again where they cannot be used."""

from __future__ import annotations

import errno
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upweight.auditing.steps import WORK, Steps, StepWarning, digest_of

ARRAYS = {
    "x": np.linspace(0, 1, 2000).reshape(500, 4),
    "flags": np.array([True, False]),
    "names": np.array(["a", "β", ""]),
    "file": np.array(3),  # also the name of a parameter of np.savez
}


def count(calls: list[str], name: str = "x") -> Any:
    def function() -> dict[str, np.ndarray]:
        calls.append(name)
        return ARRAYS

    return function


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert list(a) == list(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype
        np.testing.assert_array_equal(value, b[key])


def test_a_kept_step_is_read_and_not_run(tmp_path: Path) -> None:
    calls: list[str] = []
    first = Steps(tmp_path, "d")
    same(first.run("fit", count(calls)), ARRAYS)
    again = Steps(tmp_path, "d")
    same(again.run("fit", count(calls)), ARRAYS)
    assert calls == ["x"]
    assert first.resumed == []
    assert again.resumed == ["fit"]
    assert again.seconds == first.seconds
    assert [path.name for path in (tmp_path / WORK).iterdir()] == ["fit.npz"]


def test_another_digest_is_computed_again(tmp_path: Path) -> None:
    calls: list[str] = []
    Steps(tmp_path, "d").run("fit", count(calls))
    Steps(tmp_path, "e").run("fit", count(calls))
    assert Steps(tmp_path, "e").run("fit", count(calls))["file"] == 3
    assert len(calls) == 2


def test_without_a_folder_everything_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = Steps()
    same(steps.run("fit", lambda: ARRAYS), ARRAYS)
    assert list(steps.seconds) == ["fit"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1])
def test_a_truncated_file_is_told_and_computed_again(tmp_path: Path, kept: float) -> None:
    calls: list[str] = []
    Steps(tmp_path, "d").run("fit", count(calls))
    path = tmp_path / WORK / "fit.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.warns(StepWarning, match="the step 'fit' is run again"):
        same(Steps(tmp_path, "d").run("fit", count(calls)), ARRAYS)
    assert calls == ["x", "x"]
    assert path.read_bytes()[:2] == b"PK"
    same(Steps(tmp_path, "d").run("fit", count(calls)), ARRAYS)
    assert len(calls) == 2


@given(at=st.floats(0, 0.999), bit=st.integers(0, 7))
@settings(deadline=None)
def test_a_flipped_bit_never_gives_other_numbers(
    tmp_path_factory: pytest.TempPathFactory, at: float, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("steps")
    Steps(folder, "d").run("fit", lambda: ARRAYS)
    path = folder / WORK / "fit.npz"
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StepWarning)
        same(Steps(folder, "d").run("fit", lambda: ARRAYS), ARRAYS)


def test_an_interruption_leaves_the_finished_steps(tmp_path: Path) -> None:
    def stop() -> dict[str, np.ndarray]:
        raise KeyboardInterrupt

    calls: list[str] = []
    steps = Steps(tmp_path, "d")
    steps.run("first", count(calls, "first"))
    with pytest.raises(KeyboardInterrupt):
        steps.run("second", stop)
    again = Steps(tmp_path, "d")
    again.run("first", count(calls, "first"))
    again.run("second", count(calls, "second"))
    assert calls == ["first", "second"]
    assert again.resumed == ["first"]


def test_nothing_is_left_of_a_write_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: io.BufferedIOBase, **arrays: np.ndarray) -> None:
        file.write(b"PK")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"the disk is full: .*fit\.npz was not") as caught:
        Steps(tmp_path, "d").run("fit", lambda: ARRAYS)
    assert caught.value.errno == errno.ENOSPC
    assert list((tmp_path / WORK).iterdir()) == []


def test_objects_are_refused_as_nothing_is_pickled(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Python objects in \['names'\]"):
        Steps(tmp_path, "d").run("fit", lambda: {"names": np.array(["a", None], dtype=object)})


@pytest.mark.parametrize("name", ["", "../fit", "Fit", "fit me", "fit-", "a/b"])
def test_names_are_file_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="lower-case letters"):
        Steps(tmp_path).run(name, lambda: ARRAYS)


def test_a_name_is_run_once() -> None:
    steps = Steps()
    steps.run("fit", lambda: ARRAYS)
    with pytest.raises(ValueError, match="a new name"):
        steps.run("fit", lambda: ARRAYS)


def test_the_bar_is_silent_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with Steps(estimates={"fit": 2.0}, progress=True) as steps:
        steps.run("fit", lambda: ARRAYS)
    assert capfd.readouterr() == ("", "")


def test_the_bar_counts_expected_seconds_and_forgets_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    Steps(tmp_path, "d").run("fit", lambda: ARRAYS)
    with Steps(tmp_path, "d", estimates={"fit": 2.0, "plant": 6.0}, progress=True) as steps:
        bar: Any = steps._bar
        assert bar.total == 8
        steps.run("fit", lambda: ARRAYS)
        assert (bar.n, bar.total) == (0, 6)

        def plant() -> dict[str, np.ndarray]:
            steps.tell(0.5)
            assert bar.n == 3
            steps.tell(0.25)  # never back
            assert bar.n == 3
            return ARRAYS

        steps.run("plant", plant)
        assert bar.n == 6
        steps.run("unplanned", lambda: ARRAYS)
        assert bar.n == 6


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=5))
def test_the_digest_depends_on_values_only(values: dict[str, Any]) -> None:
    turned = dict(reversed(values.items()))
    assert digest_of(values, 1) == digest_of(turned, 1)
    assert digest_of(values, 1) != digest_of(values, 2)
    assert digest_of(values, 1) != digest_of({**values, "new\0": 1}, 1)
