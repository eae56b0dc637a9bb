"""The folder of ``upweight value``: what was found, whole or not at all, beside what is computed.

::

    runs/churn/
        config.yaml      the table, the settings and versions; written last: it marks a finished run
        values.parquet   a line per row that has a target: its value, error, interval and rank
        values.csv       the same for spreadsheets
        values.npz       all of it with the samples: upweight.valuation.Values.load
        report.html
        utilities.db     utilities of sets of rows, which a run that goes on reads
        .work/           config.yaml of a run that is not finished

In ``values.csv`` a text that a spreadsheet would take for a formula has an apostrophe before it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from upweight.auditing.plain import to_plain
from upweight.auditing.staging import safe_csv_cell, staged, storable
from upweight.auditing.steps import WORK, no_space_told
from upweight.report.value_settings import ValueSettings
from upweight.tables import Source
from upweight.valuation import Values
from upweight.version import __version__

__all__ = [
    "CACHE",
    "CONFIG",
    "REPORT",
    "begin",
    "check_folder",
    "config_of",
    "finished",
    "give_up",
    "save",
    "state_of",
]

COMMAND = "value"
CONFIG, CACHE, REPORT, VALUES = "config.yaml", "utilities.db", "report.html", "values.npz"
PACKAGES = ("numpy", "scipy", "pandas", "scikit-learn")
SHOWN = 3  # differences that a message lists


def config_of(settings: ValueSettings, source: Source, test: Source | None) -> dict[str, Any]:
    """What replays a run: the tables, the settings, and the versions that they were run with."""
    versions = {"upweight": __version__, **{name: _version(name) for name in PACKAGES}}
    return {
        "command": COMMAND,
        "source": _plain_source(source),
        "test": None if test is None else _plain_source(test),
        "settings": to_plain(settings),
        "versions": versions,
    }


def _plain_source(source: Source) -> dict[str, Any]:
    plain = to_plain(source)
    if source.path is not None:
        plain["path"] = str(Path(source.path).absolute())
    return plain


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is not the same in two runs, in words; empty if they give the same."""
    told: list[str] = []
    before, source = there["source"], now["source"]
    if before.get("digest") != source["digest"]:
        told.append(
            f"the content of {source['name']} has changed"
            if before.get("name") == source["name"]
            else f"table {before.get('name')}, now {source['name']}"
        )
    if (there.get("test") or {}).get("digest") != (now["test"] or {}).get("digest"):
        told.append("other test rows")
    for name, new in now["settings"].items():
        old = there["settings"].get(name)
        if old != new and name != "test":
            told.append(f"{name} {_short(old)}, now {_short(new)}")
    old, new = there["versions"].get("upweight"), now["versions"]["upweight"]
    if old != new:
        told.append(f"upweight {old}, now {new}")
    more = [f"and {len(told) - SHOWN} more"] if len(told) > SHOWN else []
    return "; ".join([*told[:SHOWN], *more])


def state_of(folder: Path) -> tuple[str, dict[str, Any] | None]:
    """``"new"``, ``"unfinished"`` or ``"finished"``, and the config of what is there.

    Raises
    ------
    FileExistsError
        If the folder holds anything but such a run.
    """
    for at, state in ((folder / CONFIG, "finished"), (folder / WORK / CONFIG, "unfinished")):
        found = _read(at)
        if found is not None:
            return state, found
    if not folder.exists() and not folder.is_symlink():
        return "new", None
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: choose another --out")
    strange = sorted(p.name for p in folder.iterdir() if p.name != ".DS_Store")
    if strange:
        raise FileExistsError(
            f"{folder} exists and is no run of upweight value (it has {strange[0]!r}): choose "
            "another --out"
        )
    return "new", None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    parts = ("source", "settings", "versions")
    if not isinstance(found, dict) or found.get("command") != COMMAND:
        return None
    return found if all(isinstance(found.get(part), dict) for part in parts) else None


def check_folder(folder: Path) -> None:
    """Refuse, before long work, a folder that is no run or that cannot be written."""
    state_of(folder)
    near = next(
        parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists()
    )
    if not (near.is_dir() and os.access(near, os.W_OK | os.X_OK)):
        raise NotADirectoryError(f"{near} is no folder to write to: choose another --out")


def finished(folder: Path, config: Mapping[str, Any]) -> Values | None:
    """The values of a finished run with the same settings, if they are there and can be read."""
    state, there = state_of(folder)
    if state != "finished" or there is None or differences(there, config):
        return None
    try:
        return Values.load(folder / VALUES) if (folder / REPORT).is_file() else None
    except (ValueError, OSError):
        return None


def begin(folder: Path, config: Mapping[str, Any], *, overwrite: bool = False) -> list[Path]:
    """Make the folder ready; the folders that were made, innermost first.

    Utilities of the same table stay, whatever the settings: they are named by all they depend on.

    Raises
    ------
    FileExistsError
        If it holds another run, and is not to be overwritten; the message says what differs.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    state, there = state_of(folder)
    for left in folder.glob(".*.partial"):  # of a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    if there is not None:
        told = differences(there, config)
        if told and not overwrite:
            kind = "an unfinished run" if state == "unfinished" else "a run"
            raise FileExistsError(
                f"{folder} exists with other settings, as {kind} ({told}): choose another --out, "
                "or --overwrite, which keeps utilities that are known"
            )
        if there["source"].get("digest") != config["source"]["digest"]:
            (folder / CACHE).unlink(missing_ok=True)
    work = folder / WORK
    with no_space_told(work):
        work.mkdir(parents=True, exist_ok=True)
        _write(config, work / CONFIG)
    return made


def give_up(folder: Path, made: Sequence[Path] = ()) -> None:
    """Remove what `begin` has made, if no utility is kept: nothing is left of a run."""
    if (folder / CACHE).exists():
        return
    shutil.rmtree(folder / WORK, ignore_errors=True)
    for path in made:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def save(
    folder: Path,
    config: Mapping[str, Any],
    values: Values,
    frame: pd.DataFrame,
    extra: Callable[[Path], object],
) -> None:
    """Write the files of a finished run: all of them appear, or none; `extra` writes the page."""
    with staged(folder, last=CONFIG, stale=lambda final, stage: ()) as stage:
        storable(frame).to_parquet(stage / "values.parquet", index=False)
        texts = {name: frame[name].map(safe_csv_cell) for name in ("name", "given")}
        frame.assign(**texts).to_csv(
            stage / "values.csv", index=False, encoding="utf-8", errors="replace",
            lineterminator="\n",
        )  # fmt: skip
        values.save(stage / VALUES)
        extra(stage)
        _write(config, stage / CONFIG)
    shutil.rmtree(folder / WORK, ignore_errors=True)


def _write(config: Mapping[str, Any], path: Path) -> None:
    # escapes for all that is not ASCII: plain text would fold U+0085 to a blank (PyYAML 6.0)
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=False)
    path.write_text(text, encoding="utf-8")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _short(value: object) -> str:
    text = str(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:38]}…"
