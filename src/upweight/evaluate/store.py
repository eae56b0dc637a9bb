"""A folder that keeps the outputs of every finished run, and knows what they are of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.files import write_atomically

__all__ = ["RunStore"]

MANIFEST = "manifest.json"


class RunStore:
    """Outputs by the number of the run: one ``.npy`` each, and a manifest of the settings.

    Parameters
    ----------
    folder
        Made if it is not there.
    manifest
        What must be the same for the runs to be the same: plain strings, numbers and lists.

    Raises
    ------
    ValueError
        If the folder was made with another manifest; the message names what differs. Also if it
        holds other files.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     RunStore(folder, {"seeds": [0]}).write(3, np.array([0.5, 1.0]))
    ...     RunStore(folder, {"seeds": [0]}).read()
    {3: array([0.5, 1. ])}
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / MANIFEST
        if path.exists():
            self._compare(json.loads(path.read_text(encoding="utf-8")), manifest)
            return
        if any(not entry.name.startswith(".") for entry in self.folder.iterdir()):
            raise ValueError(
                f"expected an empty folder, or one with a {MANIFEST}, to keep runs in; "
                f"got {self.folder}, which has other files"
            )
        text = json.dumps(dict(manifest), indent=1)
        write_atomically(path, lambda file: file.write(text.encode()))

    def read(self) -> dict[int, NDArray[np.float64]]:
        """The outputs of all finished runs. A file that cannot be read counts as not finished."""
        runs: dict[int, NDArray[np.float64]] = {}
        for path in sorted(self.folder.glob("run-*.npy")):
            try:
                runs[int(path.stem.removeprefix("run-"))] = np.load(path, allow_pickle=False)
            except (ValueError, EOFError):
                continue
        return runs

    def write(self, run: int, outputs: NDArray[np.float64]) -> None:
        """Keep the outputs of a run."""
        path = self.folder / f"run-{run:06d}.npy"
        write_atomically(path, lambda file: np.save(file, outputs, allow_pickle=False))

    def _compare(self, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        different = [
            f"{name}: {_short(there.get(name))} there, {_short(now.get(name))} now"
            for name in dict.fromkeys([*now, *there])
            if there.get(name) != now.get(name)
        ]
        if different:
            raise ValueError(
                f"the runs in {self.folder} were made with other settings ({'; '.join(different)}):"
                " give another folder, or the same settings"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}…"
