"""Rows of tokens: every form that rows come in, and every way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tiny_lm import MARKED_CHAT, PLAIN_CHAT, make_tokenizer
from upweight.language import TokenRows, read_rows
from upweight.language.chat import encode_chat

TEXTS = ["the cat sat on the mat", "a dog ran away", "who sat there ?", "be brief and kind"]
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "who sat on the mat ?"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "who ran ?"},
    {"role": "assistant", "content": "a dog"},
]
# Drops what the assistant said before, as templates of models that think aloud do.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}"
    "<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture(scope="module")
def plain() -> Any:
    return make_tokenizer(TEXTS, PLAIN_CHAT)


@pytest.fixture(scope="module")
def marked() -> Any:
    return make_tokenizer(TEXTS, MARKED_CHAT)


def counted(rows: TokenRows, row: int = 0) -> str:
    """The tokens of a row that count in its loss, as text."""
    ids, labels = rows.ids[row], rows.labels[row]
    assert bool(((labels == -100) | (labels == ids)).all())
    return rows.tokenizer.decode(ids[labels != -100].tolist())


def test_a_text_counts_as_a_whole(plain: Any) -> None:
    rows = read_rows([{"text": t} for t in TEXTS], plain)
    assert [counted(rows, i) for i in range(4)] == TEXTS
    assert rows.loss_tokens.tolist() == [5, 3, 3, 3]  # the first is not predicted
    assert rows.tokens == 6 + 4 + 4 + 4


def test_rows_have_one_length_whatever_the_batch(plain: Any) -> None:
    rows = read_rows([{"text": t} for t in TEXTS], plain)
    whole = rows.batch(0, 4)
    assert whole["input_ids"].shape == (4, 6)
    for i in range(4):
        one = rows.batch(i, i + 1)
        for name, leaf in whole.items():
            assert torch.equal(one[name][0], leaf[i])
            assert torch.equal(rows[i][name], leaf[i])
    assert whole["attention_mask"].sum(1).tolist() == [6, 4, 4, 4]
    assert bool((whole["labels"][whole["attention_mask"] == 0] == -100).all())
    assert bool((whole["input_ids"][whole["attention_mask"] == 0] == plain.pad_token_id).all())


def test_the_assistant_counts_with_and_without_marks(plain: Any, marked: Any) -> None:
    for tokenizer in (plain, marked):
        rows = read_rows([{"messages": CHAT}], tokenizer)
        assert counted(rows) == "the cat <|end|> a dog <|end|>"
        whole = rows.tokenizer.decode(rows.ids[0].tolist())
        assert whole.startswith("<|system|> be brief <|end|> <|user|> who sat on the mat ?")
    assert rows.texts[0].splitlines()[1] == "user: who sat on the mat ?"


def test_a_template_that_rewrites_what_was_said_is_refused(plain: Any) -> None:
    forgetful = make_tokenizer(TEXTS, FORGETFUL)
    with pytest.raises(ValueError, match=r"row 0: message 2: .*generation"):
        read_rows([{"messages": CHAT}], forgetful)
    # with one turn there is nothing to rewrite
    assert counted(read_rows([{"messages": CHAT[:3]}], forgetful)) == "the cat <|end|>"


def test_other_forms_of_chats(plain: Any) -> None:
    bare = make_tokenizer(TEXTS)
    pairs = [{"prompt": "who sat on the", "completion": "mat"}]
    rows = read_rows(pairs, bare)
    assert counted(rows) == "mat </s>"
    lists = [{"prompt": CHAT[:2], "completion": CHAT[2:3]}]
    assert counted(read_rows(lists, plain)) == "the cat <|end|>"
    tasks = [{"instruction": "who sat", "input": "on the mat ?", "output": "the cat"}]
    rows = read_rows(tasks, plain)
    assert counted(rows) == "the cat <|end|>"
    assert "who sat on the mat ?" in plain.decode(rows.ids[0].tolist())
    assert counted(read_rows(tasks, bare)) == "the cat </s>"
    parts = [{"role": "user", "content": [{"type": "text", "text": "who ran ?"}]}, CHAT[4]]
    assert counted(read_rows([{"messages": parts}], plain)) == "a dog <|end|>"


def test_tokenised_rows_lose_their_padding(plain: Any) -> None:
    left = {
        "input_ids": [0, 0, 9, 10, 11],
        "attention_mask": [0, 0, 1, 1, 1],
        "labels": [-100, -100, -100, 10, 11],
    }
    rows = read_rows(
        [left, {"input_ids": [9, 8], "attention_mask": [1, 1], "labels": [9, 8]}], plain
    )
    assert rows.ids[0].tolist() == [9, 10, 11]
    assert rows.labels[0].tolist() == [-100, 10, 11]
    assert rows.loss_tokens.tolist() == [2, 1]
    alone = read_rows([{"input_ids": [9, 8]}], None)
    assert alone.labels[0].tolist() == [9, 8]
    torn = {"input_ids": [9, 0, 8], "attention_mask": [1, 0, 1]}
    with pytest.raises(ValueError, match="row 0: its attention_mask leaves tokens out"):
        read_rows([torn], plain)
    with pytest.raises(ValueError, match="3 input_ids, but 1 labels"):
        read_rows([{"input_ids": [9, 8, 7], "labels": [9]}], plain)


def test_datasets_and_files_give_the_same_rows(plain: Any, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    records = [{"text": t, "id": f"r{i}"} for i, t in enumerate(TEXTS)]
    wanted = read_rows(records, plain)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(records))
    pd.DataFrame(records).to_parquet(tmp_path / "c.parquet")
    pd.DataFrame(records).to_csv(tmp_path / "d.csv", index=False)
    made = Dataset.from_list(records)
    for data in (made, *(tmp_path / name for name in ("a.jsonl", "b.json", "c.parquet", "d.csv"))):
        rows = read_rows(data, plain)
        assert [r.tolist() for r in rows.ids] == [r.tolist() for r in wanted.ids]
        assert list(rows.names) == ["r0", "r1", "r2", "r3"]
    with pytest.raises(TypeError, match="choose one of them"):
        read_rows(DatasetDict({"train": made}), plain)
    chats = [{"messages": CHAT}]
    pd.DataFrame(chats).to_parquet(tmp_path / "e.parquet")
    assert counted(read_rows(tmp_path / "e.parquet", plain)).startswith("the cat")


def test_too_long_rows_are_refused_or_cut(plain: Any, capfd: pytest.CaptureFixture[str]) -> None:
    records = [{"text": TEXTS[1]}, {"text": TEXTS[0], "id": "long one"}]
    with pytest.raises(ValueError, match=r"row 1 has 6 tokens, more than the 5 that fit"):
        read_rows(records, plain, context=5)
    with pytest.raises(ValueError, match=r"the 4 that fit.*truncate"):
        read_rows(records, plain, context=8, max_length=4)
    with pytest.raises(ValueError, match="at most 5, the context"):
        read_rows(records, plain, context=5, max_length=6)
    rows = read_rows(records, plain, context=5, truncate=True)
    assert (rows.cut, rows.length) == (1, 5)
    assert counted(rows, 1) == "the cat sat on the"
    short = make_tokenizer(TEXTS)
    short.model_max_length = 3  # of which transformers would warn
    assert read_rows(records, short, truncate=True, context=3).cut == 2
    assert capfd.readouterr() == ("", "")


def test_a_query_must_have_tokens_in_its_loss(plain: Any) -> None:
    unsaid = [{"id": "a", "messages": CHAT[:3]}, {"id": "b", "messages": CHAT[:2]}]
    assert read_rows(unsaid, plain).loss_tokens.tolist() == [3, 0]
    with pytest.raises(ValueError, match=r"row 1 \(b\) has no token that counts.*1 such row"):
        read_rows(unsaid, plain, queries=True)
    cut_off = [{"prompt": "who sat on the", "completion": "mat"}]
    with pytest.raises(ValueError, match="row 0 has no token that counts"):
        read_rows(cut_off, plain, max_length=4, truncate=True, queries=True)
    with pytest.raises(ValueError, match="row 0 has no token that counts"):
        read_rows([{"text": "cat"}], plain, queries=True)  # one token is never predicted


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([], "at least one row"),
        ([{"text": "  "}], "row 0: its text is empty"),
        ([{"text": "a dog"}, {"text": None}], "row 1: its text is empty"),
        (
            [{"text": "a dog"}, {"words": "a"}],
            "row 1: expected keys as in the first row; it has 'words'",
        ),
        (
            [{"prompt": "a", "completion": "b"}, {"text": "a dog"}],
            "row 1: expected keys as in the first row; it has 'text'",
        ),
        ([{"words": "a dog"}], "they have 'words'"),
        ([{"messages": []}], "row 0: expected a list of messages"),
        ([{"messages": [{"role": "narrator", "content": "a"}]}], "unknown role 'narrator'"),
        ([{"messages": [{"role": "user"}]}], "message 0: expected an object with role"),
        ([{"messages": [{"role": "user", "content": 3}]}], "content to be text; got a int"),
        ([{"prompt": "a", "completion": 3}], "completion to be text; got a int"),
        ([{"input_ids": []}], "row 0 has no tokens"),
        (["a dog"], "row 0: expected a dict"),
    ],
)
def test_rows_that_are_none_are_named(plain: Any, records: Any, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        read_rows(records, plain)


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        read_rows([{"messages": CHAT}], make_tokenizer(TEXTS))


def test_a_template_that_refuses_a_chat_is_told() -> None:
    strict = make_tokenizer(TEXTS, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="row 0: the chat template refuses it: roles must"):
        read_rows([{"messages": CHAT}], strict)


def test_files_that_cannot_be_read(plain: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"JSON Lines \(\.jsonl"):
        read_rows(tmp_path / "none.jsonl", plain)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a dog"}\n{"text": ')
    with pytest.raises(ValueError, match=r"broken.jsonl, line 2: no JSON"):
        read_rows(broken, plain)
    broken.write_text('{"text": "a dog"}\n[1]\n')
    with pytest.raises(ValueError, match=r"line 2: expected an object"):
        read_rows(broken, plain)
    broken.write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_rows(broken, plain)
    other = tmp_path / "rows.xlsx"
    other.write_text("x")
    with pytest.raises(ValueError, match="expected JSON Lines"):
        read_rows(other, plain)
    other = tmp_path / "rows.parquet"
    other.write_text("x")
    with pytest.raises(ValueError, match="cannot read"):
        read_rows(other, plain)


def test_classes_by_name_and_by_number(plain: Any) -> None:
    names = {"good": 0, "bad": 1}
    records = [
        {"text": "a dog", "label": "bad"},
        {"text": "the cat", "label": 0},
        {"text": "a mat", "label": "1"},
    ]
    rows = read_rows(records, plain, task="classification", labels=names)
    assert rows.batch(0, 3)["labels"].tolist() == [1, 0, 1]
    assert rows.loss_tokens.tolist() == [1, 1, 1]
    for wrong in ("ugly", 2, -1, True, None):
        records[1] = {"text": "the cat", "label": wrong}
        with pytest.raises(ValueError, match=r"row 1: .*class"):
            read_rows(records, plain, task="classification", labels=names)
    with pytest.raises(ValueError, match="'text' and 'label' for a classifier"):
        read_rows([{"text": "a dog"}], plain, task="classification", labels=names)


def test_pieces_are_the_text(plain: Any) -> None:
    rows = read_rows([{"text": TEXTS[0]}], plain)
    assert rows.pieces(0) == ["the", " cat", " sat", " on", " the", " mat"]


def test_pieces_of_letters_in_several_tokens() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["aa"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    )
    text = "né 日本 🙂 x"
    rows = read_rows([{"text": text}], PreTrainedTokenizerFast(tokenizer_object=raw))
    pieces = rows.pieces(0)
    assert len(pieces) == len(text.encode())
    assert "".join(pieces) == text


def test_names_are_those_of_the_rows(plain: Any) -> None:
    twice = [{"text": "a dog", "id": 1}, {"text": "a cat", "id": 1}]
    assert list(read_rows(twice, plain).names) == [0, 1]
    rows = read_rows([{"text": "a dog", "name": "x"}, {"text": "a cat", "name": "y"}], plain)
    assert list(rows.names) == ["x", "y"]
    assert list(rows.chosen([1]).names) == ["y"]


def test_masks_of_single_turns_add_up(plain: Any) -> None:
    """The mask of a chat is that of its beginning, continued."""
    whole = encode_chat(plain, CHAT)
    part = encode_chat(plain, CHAT[:3])
    assert whole.ids[: len(part.ids)] == part.ids
    assert whole.mask[: len(part.mask)] == part.mask
