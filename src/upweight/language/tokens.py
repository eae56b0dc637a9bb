"""Rows of tokens of one length, with names and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight.language.model import Task
from upweight.rows import Rows

__all__ = ["IGNORED", "TokenRows", "told_row"]

# The label of tokens that do not count in the loss, as everywhere in Hugging Face.
IGNORED = -100


class TokenRows(Rows):
    """Rows of tokens of one length, padded on the right, with names and texts.

    A batch is a dict of ``input_ids`` and ``attention_mask`` (b, t) and ``labels``: (b, t) for
    language models, the tokens themselves or `IGNORED`; (b,) for classifiers. All rows are padded
    to the longest, whatever batch they are in, so that results do not depend on the batch.

    Parameters
    ----------
    ids
        The tokens of each row.
    labels
        For each row its labels, one for every token, or its class.
    texts
        What a reader should see of each row.
    names
        One name per row; default: positions.
    task
        ``"causal"`` or ``"classification"``.
    pad
        The token to pad with.
    tokenizer
        To show tokens by.

    Attributes
    ----------
    length
        t, the number of tokens of the longest row.
    cut
        How many rows were truncated.

    Raises
    ------
    ValueError
        If there are no rows, a row has no tokens, or not a label for each.

    Examples
    --------
    >>> rows = TokenRows([[5, 6], [7]], [[-100, 6], [7]], ["a b", "c"])
    >>> rows.batch(0, 2)["labels"]
    tensor([[-100,    6],
            [   7, -100]])
    >>> rows.loss_tokens  # the first token of a row is not predicted
    array([1, 0])
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int] | np.ndarray],
        labels: Sequence[Any],
        texts: Sequence[str],
        names: Sequence[Any] | None = None,
        *,
        task: Task = "causal",
        pad: int = 0,
        tokenizer: Any = None,
        cut: int = 0,
    ) -> None:
        self.ids = [np.asarray(row, dtype=np.int64) for row in ids]
        self.texts = list(texts)
        self.task: Task = task
        self.tokenizer = tokenizer
        self.cut = cut
        if not len(self.ids) == len(labels) == len(self.texts):
            raise ValueError(
                f"expected tokens, labels and a text for every row; got {len(self.ids)}, "
                f"{len(labels)} and {len(self.texts)}"
            )
        self.labels = [np.asarray(row, dtype=np.int64) for row in labels]
        for at, (row, own) in enumerate(zip(self.ids, self.labels, strict=True)):
            if not len(row):
                raise ValueError(f"row {told_row(names, at)} has no tokens")
            if task == "causal" and own.shape != row.shape:
                raise ValueError(
                    f"row {told_row(names, at)}: expected a label for each of its {len(row)} "
                    f"tokens; got {own.size}"
                )
        self.length = max((len(row) for row in self.ids), default=0)
        self._pad = pad
        super().__init__(_Items(self.ids, self.labels, task, self.length, pad), names)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """One row by its position, without the dimension of rows."""
        return {name: leaf[0] for name, leaf in self.take([row]).items()}

    @property
    def loss_tokens(self) -> np.ndarray:
        """How many tokens of every row count in its loss, (n,); 1 for classifiers."""
        if self.task == "classification":
            return np.ones(len(self.ids), dtype=np.int64)
        return np.array([int((own[1:] != IGNORED).sum()) for own in self.labels])

    @property
    def tokens(self) -> int:
        """The tokens of all rows, without padding."""
        return sum(len(row) for row in self.ids)

    def chosen(self, rows: Sequence[int]) -> TokenRows:
        """Some of the rows, under their names."""
        return TokenRows(
            [self.ids[row] for row in rows],
            [self.labels[row] for row in rows],
            [self.texts[row] for row in rows],
            [self.names[row] for row in rows],
            task=self.task,
            pad=self._pad,
            tokenizer=self.tokenizer,
        )

    def pieces(self, row: int) -> list[str]:
        """The text of every token of a row; together they are its text as the model reads it."""
        ids = self.ids[row].tolist()
        if self.tokenizer is None:
            return [f"{token} " for token in ids]
        found: list[str] = []
        shown = ""
        for end in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
            # a part of a letter is shown with the token that completes it
            whole = text.rstrip("\N{REPLACEMENT CHARACTER}") if end < len(ids) else text
            found.append(whole[len(shown) :] if whole.startswith(shown) else "")
            shown = whole if len(whole) > len(shown) else shown
        return found

    def check_queries(self) -> TokenRows:
        """Refuse rows whose loss has no token, as a query must have.

        Raises
        ------
        ValueError
            Naming the first of them.
        """
        empty = np.flatnonzero(self.loss_tokens == 0)
        if len(empty):
            raise ValueError(
                f"row {told_row(list(self.names), int(empty[0]))} has no token that counts in the "
                f"loss ({len(empty)} such row(s)), so nothing can be attributed to it. Give it an "
                "assistant turn or a completion, and see that truncation does not cut it off"
            )
        return self


@dataclass(frozen=True)
class _Items:
    """The padded rows as a data set that is looked up by position."""

    ids: list[np.ndarray]
    labels: list[np.ndarray]
    task: Task
    length: int
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = self.ids[row]
        tokens = torch.full((self.length,), self.pad, dtype=torch.int64)
        mask = torch.zeros(self.length, dtype=torch.int64)
        tokens[: len(ids)] = torch.from_numpy(ids)
        mask[: len(ids)] = 1
        if self.task == "classification":
            return {
                "input_ids": tokens,
                "attention_mask": mask,
                "labels": torch.from_numpy(self.labels[row]),
            }
        labels = torch.full((self.length,), IGNORED, dtype=torch.int64)
        labels[: len(ids)] = torch.from_numpy(self.labels[row])
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def told_row(names: Sequence[Any] | None, at: int) -> str:
    """The position of a row, and its name where that is another."""
    if names is None or str(names[at]) == str(at):
        return str(at)
    return f"{at} ({str(names[at])[:60]})"
