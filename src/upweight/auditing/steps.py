"""Long work in named steps, each of which is kept once it is finished."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.stream import atomic_write

__all__ = ["WORK", "StepWarning", "Steps", "digest_of", "no_space_told"]

WORK = ".work"
META = "meta"
VALUE = "value."


class StepWarning(UserWarning):
    """What was kept of a step cannot be used: it is computed again."""


class Steps:
    """Runs steps, keeps what they give in ``folder/.work``, and does not run a kept one again.

    A file appears when its step is finished, whole or not at all: after an interruption the same
    steps go on where they stopped.

    Parameters
    ----------
    folder
        Of the run; None keeps nothing beyond this object's life.
    digest
        Of everything that decides what the steps give (`digest_of`). What was kept under another
        one is computed again.
    estimates
        Expected seconds by step, for the time left. Names without one are run all the same.
    progress
        Show a bar while the steps run; nothing is shown where stderr is no terminal.

    Attributes
    ----------
    seconds
        By step, in the order in which they ended; of a kept one, what it took when it ran.
    resumed
        Names of the steps that were read and not run.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = Steps(Path(folder), "a1").run("squares", lambda: {"x": np.arange(3) ** 2})
    ...     again = Steps(Path(folder), "a1")
    ...     again.run("squares", lambda: {"x": np.zeros(3)})["x"], again.resumed
    (array([0, 1, 4]), ['squares'])
    """

    def __init__(
        self,
        folder: Path | None = None,
        digest: str = "",
        *,
        estimates: Mapping[str, float] | None = None,
        progress: bool = False,
    ) -> None:
        self.folder = folder
        self.digest = digest
        self.seconds: dict[str, float] = {}
        self.resumed: list[str] = []
        self._estimates = dict(estimates or {})
        self._progress = progress
        self._bar: Any = None
        self._running = 0.0  # expected seconds of the running step, and how many the bar shows
        self._told = 0.0

    def run(
        self, name: str, function: Callable[[], Mapping[str, NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]:
        """What the function gives: read if the step was kept, else computed and kept.

        Raises
        ------
        ValueError
            If the name is no plain word of lower-case letters, digits and hyphens, or was run
            already.
        TypeError
            If an array holds Python objects, which would have to be pickled.
        OSError
            If it cannot be written; the message says so where the disk is full.
        """
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) or name in self.seconds:
            raise ValueError(
                "expected a new name of lower-case letters, digits and hyphens for a step; "
                f"got {name!r}"
            )
        self._begin(name)
        kept = self._read(name)
        if kept is not None:
            values, self.seconds[name] = kept
            self.resumed.append(name)
        else:
            start = time.perf_counter()
            values = {key: np.asarray(value) for key, value in function().items()}
            self.seconds[name] = time.perf_counter() - start
            self._write(name, values)
        self._end(name)
        return values

    def tell(self, share: float) -> None:
        """Say which share of the running step is done, in [0, 1], for the bar."""
        if self._bar is not None and self._running:
            self._bar.update(max(0.0, share * self._running - self._told))
            self._told = max(self._told, share * self._running)

    def __enter__(self) -> Steps:
        """Open the bar, if there is to be one."""
        from tqdm import tqdm

        # The unit is an expected second, so that tqdm's own estimate is the expected time left,
        # stretched by how much slower than expected it has been so far.
        self._bar = tqdm(
            total=sum(self._estimates.values()) or None,
            disable=None if self._progress else True,
            leave=False,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the bar."""
        self._bar.close()
        self._bar = None

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / WORK / f"{name}.npz"

    def _read(self, name: str) -> tuple[dict[str, NDArray[Any]], float] | None:
        path = self._path(name)
        if path is None or not path.exists():
            return None
        try:
            # np.load does not close a file that it opened and cannot read (numpy 2.4).
            with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
                meta = json.loads(str(file[META]))
                if meta["digest"] != self.digest:
                    return None
                values = {key.removeprefix(VALUE): file[key] for key in file.files if key != META}
                return values, float(meta["seconds"])
        except Exception as error:  # of a damaged file: nearly any
            warnings.warn(
                f"{path} cannot be read ({type(error).__name__}): the step {name!r} is run again",
                StepWarning,
                stacklevel=3,
            )
            return None

    def _write(self, name: str, values: Mapping[str, NDArray[Any]]) -> None:
        objects = [key for key, value in values.items() if value.dtype.hasobject]
        if objects:
            raise TypeError(
                f"expected arrays of numbers, booleans or fixed-length text from the step "
                f"{name!r}; got Python objects in {objects}"
            )
        path = self._path(name)
        if path is None:
            return
        meta = json.dumps({"digest": self.digest, "seconds": self.seconds[name]})
        arrays = {VALUE + key: value for key, value in values.items()}
        with no_space_told(path), atomic_write(path) as partial, partial.open("wb") as file:
            np.savez(file, **{META: np.asarray(meta)}, **arrays)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())

    def _begin(self, name: str) -> None:
        self._running, self._told = self._estimates.get(name, 0.0), 0.0
        if self._bar is not None:
            self._bar.set_description(name)

    def _end(self, name: str) -> None:
        if self._bar is not None and name in self.resumed:
            # It took no time, so it must not make the others look fast.
            self._bar.total = (self._bar.total or 0.0) - self._running
            self._bar.refresh()
        else:
            self.tell(1.0)


def digest_of(*parts: object) -> str:
    """A digest of plain values: equal for equal settings, whatever the order of their keys.

    Examples
    --------
    >>> digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    True
    >>> len(digest_of("text"))
    64
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def no_space_told(path: Path) -> Generator[None]:
    """Say of a full disk what was being written and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = OSError(
            f"the disk is full: {path} was not written; free some space, or choose a folder on "
            "another disk, and run the same command again"
        )
        full.errno = error.errno
        raise full from error
