"""``config.yaml`` of a run folder: what was audited, and how."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from upweight.auditing.plain import from_plain, to_plain
from upweight.auditing.settings import AuditSettings
from upweight.auditing.steps import digest_of
from upweight.tables import Source
from upweight.version import __version__

__all__ = ["COMMAND", "Config", "differences", "read_config", "write_config"]

COMMAND = "audit"
PACKAGES = ("numpy", "pandas", "scikit-learn", "torch")
SHOWN = 3  # differences that a message lists


@dataclass(frozen=True)
class Config:
    """What replays a run: the table, the settings, and the versions that they were run with."""

    source: Source
    settings: AuditSettings
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of(cls, source: Source, settings: AuditSettings) -> Config:
        """With the versions at hand."""
        versions = {"upweight": __version__, **{name: _version(name) for name in PACKAGES}}
        return cls(source, settings, versions)

    @property
    def digest(self) -> str:
        """Equal for runs that give the same: content of the table, settings, version."""
        return digest_of(self.source.digest, to_plain(self.settings), self.versions.get("upweight"))


def differences(there: Config, now: Config) -> str:
    """What is not the same in two runs, in words; empty if they give the same.

    Examples
    --------
    >>> source = Source("a.csv", "a.csv", "csv", ",", "utf-8", "00")
    >>> there = Config.of(source, AuditSettings("y"))
    >>> differences(there, Config.of(source, AuditSettings("y", seed=1)))
    'seed 0, now 1'
    """
    told: list[str] = []
    if there.source.digest != now.source.digest:
        same = there.source.name == now.source.name
        told.append(
            f"the content of {now.source.name} has changed"
            if same
            else f"table {there.source.name}, now {now.source.name}"
        )
    for name in (one.name for one in fields(AuditSettings)):
        old, new = getattr(there.settings, name), getattr(now.settings, name)
        if to_plain(old) != to_plain(new):
            told.append(f"{name} {_short(old)}, now {_short(new)}")
    old, new = (config.versions.get("upweight", "unknown") for config in (there, now))
    if old != new:
        told.append(f"upweight {old}, now {new}")
    more = [f"and {len(told) - SHOWN} more"] if len(told) > SHOWN else []
    return "; ".join([*told[:SHOWN], *more])


def write_config(config: Config, path: Path, folder: Path) -> None:
    """Write the YAML; the table is named by its whole path and by that from the run folder."""
    source = to_plain(config.source)
    if config.source.path is not None:
        whole = Path(config.source.path).absolute()
        source["path"] = str(whole)
        source["relative"] = _relative(whole, folder)
    content = {
        "command": COMMAND,
        "source": source,
        "settings": to_plain(config.settings),
        "versions": dict(config.versions),
    }
    path.write_text(_yaml(content), encoding="utf-8")


def _yaml(content: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes escapes for what is not seen: other styles fold U+0085 to a blank (PyYAML 6.0)."""

    def text(dumper: yaml.SafeDumper, value: str) -> Any:
        style = None if value.isprintable() else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def read_config(path: Path) -> Config:
    """Read a ``config.yaml``. Its source has the path of an existing file, if there is one.

    Raises
    ------
    ValueError
        If it is no such file, or belongs to another command.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    command = content.get("command") if isinstance(content, Mapping) else None
    if command != COMMAND or not isinstance(content, Mapping):
        told = f"of the command {command!r}" if command else "of another program"
        raise ValueError(f"{path} is {told}; expected the config.yaml of an audit")
    for part in ("source", "settings", "versions"):
        if not isinstance(content.get(part), Mapping):
            raise ValueError(f"{path} has no {part}; expected the config.yaml of an audit")
    try:
        source = dict(content["source"])
        relative = source.pop("relative", None)
        config = Config(
            from_plain(Source, source),
            from_plain(AuditSettings, content["settings"]),
            {str(k): str(v) for k, v in content["versions"].items()},
        )
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return _located(config, relative, path.parent)


def _located(config: Config, relative: Any, folder: Path) -> Config:
    """With the path beside the folder where the whole one has no file: both may have moved."""
    path = config.source.path
    if path is None or Path(path).exists() or not isinstance(relative, str):
        return config
    near = Path(os.path.normpath(folder / relative))
    return replace(config, source=replace(config.source, path=str(near if near.exists() else path)))


def _relative(path: Path, folder: Path) -> str | None:
    try:
        return Path(os.path.relpath(path, folder.absolute())).as_posix()
    except ValueError:  # on another drive
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _short(value: object) -> str:
    text = str(to_plain(value)) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:38]}…"
