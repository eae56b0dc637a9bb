"""Adapters of peft, and whether they fit a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from upweight.language import extra
from upweight.language.folders import Task, find_folder, read_json, some

__all__ = ["Adapter"]

TASKS: dict[str, Task] = {"CAUSAL_LM": "causal", "SEQ_CLS": "classification"}
PREFIX = "base_model.model."
HEADS = ("score", "classifier")
ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError)


@dataclass(frozen=True)
class Adapter:
    """A folder with an adapter, read but not yet put onto a model.

    Attributes
    ----------
    task
        What it is for; None where it does not say.
    weights
        By the names that peft stores them under.
    """

    folder: Path
    task: Task | None
    weights: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: str | os.PathLike[str], task: Task | None) -> Adapter:
        """The adapter in a folder; one for another task than this is refused."""
        folder = find_folder(path, "adapter_config.json", "an adapter")
        peft = extra.peft()
        own = TASKS.get(str(read_json(folder / "adapter_config.json").get("task_type")))
        if task is not None and own not in (None, task):
            raise ValueError(f"the adapter in {folder} is for {own}; expected one for {task}")
        try:
            weights = peft.utils.load_peft_weights(os.fspath(folder), device="cpu")
        except ERRORS as error:
            raise ValueError(f"cannot load the adapter in {folder}: {_reason(error)}") from error
        return cls(folder, own, weights)

    @property
    def replaced(self) -> set[str]:
        """Parameters of the model that the adapter brings as a whole, such as a head."""
        return {name.removeprefix(PREFIX) for name in self.weights if "lora_" not in name}

    @property
    def classes(self) -> int | None:
        """The outputs of a classification head that the adapter brings; None where it has none."""
        for name, weight in self.weights.items():
            *_, owner, attribute = ["", *name.split(".")]
            if owner in HEADS and attribute == "weight":
                return int(weight.shape[0])
        return None

    def onto(self, model: Any, base: Path) -> Any:
        """The model with the adapter, whose weights must all fit, and nothing else to train."""
        peft = extra.peft()
        what = f"the adapter in {self.folder} does not fit the model in {base}"
        try:
            found = peft.PeftModel.from_pretrained(
                model, os.fspath(self.folder), is_trainable=True, local_files_only=True
            )
        except ERRORS as error:
            raise ValueError(f"{what}: {_reason(error)}") from error
        if any(getattr(c, "is_prompt_learning", False) for c in found.peft_config.values()):
            raise ValueError(
                f"the adapter in {self.folder} puts tokens of its own before every row, for which "
                "there is no influence here: expected one of weights, such as LoRA"
            )
        wanted, stored = set(peft.get_peft_model_state_dict(found)), set(self.weights)
        lost, strange = sorted(wanted - stored), sorted(stored - wanted)
        if lost or strange:
            reasons = [f"it has no weights for {some(lost)}"] if lost else []
            reasons += [f"the model has no place for {some(strange)}"] if strange else []
            raise ValueError(f"{what}: {'; '.join(reasons)}")
        return found


def _reason(error: Exception) -> str:
    """The line of a message of torch or peft that says what is wrong, without its heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    sizes = [line for line in lines if line.startswith("size mismatch")]
    return (sizes or lines or [type(error).__name__])[0]
