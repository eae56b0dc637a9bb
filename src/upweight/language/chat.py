"""Chats as tokens, with a mask of those that the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

__all__ = ["ChatError", "Encoded", "encode_chat", "encode_pair", "messages_of"]

ROLES = ("system", "developer", "user", "assistant", "tool")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatError(ValueError):
    """A row that is no chat, or a chat that cannot be made into tokens with a mask."""


@dataclass(frozen=True)
class Encoded:
    """Tokens, which of them count in the loss, and the text as it is shown."""

    ids: list[int]
    mask: list[bool]
    text: str


def messages_of(row: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """The messages of a row, checked; None where it has another form.

    Forms are ``messages``; ``prompt`` and ``completion`` as lists of messages; and ``instruction``
    and ``output`` with an optional ``input``, of which the latter is said by the assistant.

    Raises
    ------
    ChatError
        If the messages are not made of roles and texts, or a role is unknown.
    """
    if "messages" in row:
        return _checked(row["messages"])
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        both = [
            [{"role": role, "content": part}] if isinstance(part, str) else part
            for role, part in (("user", prompt), ("assistant", completion))
        ]
        return [*_checked(both[0]), *_checked(both[1])]
    if "instruction" in row and "output" in row:
        asked = [str(row["instruction"]), str(row.get("input") or "")]
        user = "\n\n".join(part for part in asked if part.strip())
        return _checked(
            [
                {"role": "user", "content": user},
                {"role": "assistant", "content": str(row["output"])},
            ]
        )
    return None


def _checked(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ChatError("expected a list of messages with role and content; it has none")
    found: list[dict[str, str]] = []
    for at, message in enumerate(cast("Sequence[Any]", messages)):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ChatError(f"message {at}: expected an object with role and content")
        role = message["role"]
        if role not in ROLES:
            raise ChatError(
                f"message {at}: unknown role {str(role)[:40]!r}; expected one of {', '.join(ROLES)}"
            )
        found.append({"role": role, "content": _content(message["content"], at)})
    return found


def _content(content: Any, at: int) -> str:
    """A text, or the texts of the parts that some formats divide it into."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = cast("list[Any]", content)
        texts = [p["text"] for p in parts if isinstance(p, Mapping) and "text" in p]
        if len(texts) == len(parts) and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise ChatError(
        f"message {at}: expected its content to be text; got a {type(content).__name__}"
    )


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Encoded:
    """Tokens by the tokenizer's chat template; those of the assistant's turns count.

    Where the template has ``{% generation %}`` marks, they say which tokens these are. Else the
    chat is rendered up to each of the turns, with what invites the assistant to speak, and after
    it: the tokens between are the turn, with what the template ends it by.

    Raises
    ------
    ChatError
        If there is no template, or it does not render a chat as the continuation of its beginning,
        so that a turn cannot be told from the rest.
    """
    template = tokenizer.chat_template
    if not template:
        raise ChatError(
            "the tokenizer has no chat template, so a chat has no text: save one with it, or give "
            "rows with text, or prompt and completion"
        )
    text = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    if isinstance(template, str) and GENERATION.search(template):
        found = _rendered(tokenizer, messages, return_assistant_tokens_mask=True)
        mask = found.get("assistant_masks")
        if mask is not None and len(mask) == len(found["input_ids"]):
            return Encoded(list(found["input_ids"]), [bool(m) for m in mask], text)
    ids = list(_rendered(tokenizer, messages)["input_ids"])
    mask = [False] * len(ids)
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(tokenizer, messages[:at], add_generation_prompt=True) if at else None
        start = list(before["input_ids"]) if before is not None else []
        end = list(_rendered(tokenizer, messages[: at + 1])["input_ids"])
        if end[: len(start)] != start or ids[: len(end)] != end:
            raise ChatError(
                f"message {at}: the chat template does not continue the tokens that come before "
                "this turn, so which tokens it has cannot be told. Put {% generation %} marks "
                "around the assistant's turns in the template"
            )
        mask[len(start) : len(end)] = [True] * (len(end) - len(start))
    return Encoded(ids, mask, text)


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=True, return_dict=True, **options
        )
    except Exception as error:  # a template is a program, and may raise what it likes
        raise ChatError(f"the chat template refuses it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> Encoded:
    """A prompt and its completion, one after the other; the completion and its end count."""
    start = list(tokenizer(prompt)["input_ids"])
    end_token = tokenizer.eos_token_id
    if start and start[-1] == end_token:
        start.pop()
    rest = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if end_token is not None and (not rest or rest[-1] != end_token):
        rest.append(end_token)
    return Encoded([*start, *rest], [False] * len(start) + [True] * len(rest), prompt + completion)
