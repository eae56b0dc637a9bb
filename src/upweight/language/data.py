"""Rows of tokens from tokenised data, texts, chats and labelled sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from upweight.language import extra
from upweight.language.chat import ChatError, Encoded, encode_chat, encode_pair, messages_of
from upweight.language.files import read_records
from upweight.language.model import Task
from upweight.language.tokens import IGNORED, TokenRows, told_row

__all__ = ["read_rows"]


# ---- from records to rows ------------------------------------------------------------------------


def read_rows(
    data: Any,
    tokenizer: Any,
    *,
    task: Task = "causal",
    context: int | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    text: str = "text",
    label: str = "label",
    labels: Mapping[str, int] | None = None,
    pad: int | None = None,
    queries: bool = False,
) -> TokenRows:
    """Rows of tokens from a file, a list of dicts, or a `datasets.Dataset`.

    What a row is shows in its keys: ``input_ids`` with optional ``attention_mask`` and ``labels``
    (tokenised); ``messages``, or ``instruction`` and ``output`` (chats); ``prompt`` and
    ``completion``; or a text. The loss is over the assistant's turns, the output, the completion,
    or all of a text; `chat` has how the turns are found.

    Parameters
    ----------
    data
        JSON Lines, Parquet or CSV by path, or rows.
    tokenizer
        That of the model.
    task
        ``"classification"``: a text and a label.
    context
        The longest sequence that the model takes.
    max_length
        Of a row; default: `context`.
    truncate
        Cut longer rows at their end; otherwise they are refused.
    text, label
        Keys of a text and of its class.
    labels
        The classes by name, ``config.label2id``.
    pad
        The token to pad with; default: that of the tokenizer.
    queries
        Also refuse rows without a token that counts in the loss.

    Raises
    ------
    ValueError, TypeError
        For rows of no such form, empty or too long ones, unknown roles and classes; the row is
        named.
    """
    records, keys = read_records(data)
    if context is not None and max_length is not None and max_length > context:
        raise ValueError(
            f"expected max_length of at most {context}, the context of the model; got {max_length}"
        )
    most = max_length or context
    if most is not None and most < 1:
        raise ValueError(f"expected max_length of at least 1; got {most}")
    classes = _Classes(text, label, labels) if task == "classification" else None
    encode = _encoder(tokenizer, keys, text, classes)
    names = _names(records)
    # a tokenizer warns of rows that are longer than the context, which are refused or cut here
    with nullcontext() if tokenizer is None else extra.quiet():
        pairs = [_encoded(encode, record, told_row(names, at)) for at, record in enumerate(records)]
    ids: list[list[int]] = []
    own: list[Any] = []
    texts: list[str] = []
    cut = 0
    for at, (found, wanted) in enumerate(pairs):
        if most is not None and len(found.ids) > most:
            if not truncate:
                raise ValueError(
                    f"row {told_row(names, at)} has {len(found.ids):,} tokens, more than the "
                    f"{most:,} that fit: shorten it, or pass truncate=True (--truncate)"
                )
            cut += 1
        ids.append(found.ids[:most])
        own.append(wanted[:most] if isinstance(wanted, list) else wanted)
        texts.append(found.text)
    known = pad if pad is not None else getattr(tokenizer, "pad_token_id", None)
    rows = TokenRows(
        ids, own, texts, names, task=task, pad=known or 0, tokenizer=tokenizer, cut=cut
    )
    return rows.check_queries() if queries else rows


Encoder = Callable[[Mapping[str, Any]], tuple[Encoded, Any]]


def _encoded(encode: Encoder, record: Mapping[str, Any], row: str) -> tuple[Encoded, Any]:
    try:
        return encode(record)
    except (ChatError, KeyError, ValueError) as error:
        told = str(error)
        if isinstance(error, KeyError):
            told = f"expected keys as in the first row; it has {_listed(map(str, record))}"
        raise ValueError(f"row {row}: {told}") from error


@dataclass(frozen=True)
class _Classes:
    """Where the text and the class of a row are, and the classes by name."""

    text: str
    label: str
    by_name: Mapping[str, int] | None

    def number(self, row: Mapping[str, Any]) -> int:
        """The class of a row."""
        given = row[self.label] if self.label in row else row["labels"]
        if self.by_name is not None and str(given) in self.by_name:
            return self.by_name[str(given)]
        if isinstance(given, str | float) and str(given).removesuffix(".0").isdecimal():
            given = int(float(given))  # as CSV files have them
        there = _listed(self.by_name or ())
        if isinstance(given, bool) or not isinstance(given, int | np.integer):
            raise ValueError(f"unknown class {str(given)[:40]!r}; the model has {there}")
        known = None if self.by_name is None else set(self.by_name.values())
        if given < 0 or (known is not None and int(given) not in known):
            raise ValueError(f"class {given} is out of range; the model has {there}")
        return int(given)


def _encoder(tokenizer: Any, keys: set[str], text: str, classes: _Classes | None) -> Encoder:
    """What turns one row into tokens and labels, by the keys of the rows."""
    if classes is not None:
        wanted = {classes.text, classes.label} if "input_ids" not in keys else {"input_ids"}
        if not wanted <= keys:
            raise ValueError(
                f"expected rows with {classes.text!r} and {classes.label!r} for a classifier; they "
                f"have {_listed(keys)}"
            )
        return lambda row: _classified(tokenizer, row, classes)
    if "input_ids" in keys:
        return lambda row: _tokenised(tokenizer, row)
    if "messages" in keys or {"instruction", "output"} <= keys or {"prompt", "completion"} <= keys:
        return lambda row: _conversation(tokenizer, row)
    if text in keys:
        return lambda row: _written(tokenizer, row[text])
    raise ValueError(
        "expected rows with input_ids, messages, prompt and completion, instruction and output, or "
        f"{text!r}; they have {_listed(keys)}"
    )


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(repr(key) for key in sorted(keys)[:12]) or "no keys"


def _with_labels(found: Encoded) -> tuple[Encoded, list[int]]:
    pairs = zip(found.ids, found.mask, strict=True)
    return found, [token if counts else IGNORED for token, counts in pairs]


def _conversation(tokenizer: Any, row: Mapping[str, Any]) -> tuple[Encoded, list[int]]:
    messages = messages_of(row)
    if messages is not None and (tokenizer.chat_template or "instruction" not in row):
        return _with_labels(encode_chat(tokenizer, messages))
    if messages is not None:
        prompt, completion = f"{messages[0]['content']}\n", messages[1]["content"]
    else:
        prompt, completion = row["prompt"], row["completion"]
    for name, part in (("prompt", prompt), ("completion", completion)):
        if not isinstance(part, str):
            raise ChatError(f"expected its {name} to be text; got a {type(part).__name__}")
    return _with_labels(encode_pair(tokenizer, prompt, completion))


def _written(tokenizer: Any, text: Any) -> tuple[Encoded, list[int]]:
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its text is empty or missing")
    ids = list(tokenizer(text)["input_ids"])
    return _with_labels(Encoded(ids, [True] * len(ids), text))


def _tokenised(tokenizer: Any, row: Mapping[str, Any]) -> tuple[Encoded, list[int]]:
    ids = [int(token) for token in row["input_ids"]]
    given = row.get("labels")
    wanted = ids if given is None else [int(one) for one in given]
    if len(wanted) != len(ids):
        raise ValueError(f"it has {len(ids)} input_ids, but {len(wanted)} labels")
    mask = row.get("attention_mask")
    if mask is not None:
        there = [at for at, one in enumerate(mask) if one]
        if there and there[-1] - there[0] + 1 != len(there):
            raise ValueError("its attention_mask leaves tokens out between others")
        ids, wanted = [ids[at] for at in there], [wanted[at] for at in there]
    return Encoded(ids, [one != IGNORED for one in wanted], _text_of(tokenizer, ids)), wanted


def _classified(tokenizer: Any, row: Mapping[str, Any], classes: _Classes) -> tuple[Encoded, int]:
    if "input_ids" in row:
        found = _tokenised(tokenizer, {**row, "labels": None})[0]
    else:
        found = _written(tokenizer, row[classes.text])[0]
    return found, classes.number(row)


def _text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return "" if tokenizer is None else tokenizer.decode(list(ids))


def _names(records: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    """The ``id`` or ``name`` of the rows, where every row has one of its own."""
    for key in ("id", "name"):
        found = [record.get(key) for record in records]
        plain = all(isinstance(one, str | int) and not isinstance(one, bool) for one in found)
        if plain and len(set(map(str, found))) == len(found):
            return found
    return None
