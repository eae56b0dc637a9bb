"""Folders of models: what is in them, and in one line what is wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = [
    "Task",
    "find_folder",
    "read_json",
    "some",
    "task_of",
    "told",
]

Task = Literal["causal", "classification"]


def find_folder(path: str | os.PathLike[str], file: str, what: str) -> Path:
    """A local folder that holds this file."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected a local folder with {what}; there is none at {folder}. Nothing is "
            "downloaded: save it there first, with save_pretrained"
        )
    if not (folder / file).is_file():
        hint = ""
        if file == "config.json" and (folder / "adapter_config.json").is_file():
            hint = ". It is an adapter: pass the folder of its base model, and this as adapter"
        raise FileNotFoundError(f"{folder} holds no {file}: expected a folder with {what}{hint}")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected an object in {path}; got a {type(found).__name__}")
    return found


def task_of(config: dict[str, Any], folder: Path) -> Task:
    """What a model does, by the architecture that its configuration names."""
    names: list[str] = [str(name) for name in config.get("architectures") or ()]
    for name in names:
        if name.endswith("ForSequenceClassification"):
            return "classification"
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal"
    raise ValueError(
        f"expected a causal language model or a sequence classifier in {folder}; it names "
        f"{', '.join(names) or 'no architecture'}. Pass task='causal' or 'classification'"
    )


def told(folder: Path, what: str, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a loader gives; its errors in one line."""
    try:
        return load(*args, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next(iter(lines), type(error).__name__)
        raise ValueError(f"cannot load the {what} in {folder}: {reason}") from error


def some(names: Sequence[str], count: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
