"""``upweight trace`` and ``upweight doctor``: what they write, print and refuse."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

import upweight as uw
from tiny_lm import PLAIN_CHAT, make_model, make_tokenizer, save, save_adapter, train
from upweight.language import influence_for, read_rows, token_scores
from upweight.language.model import forward_of
from upweight.report import cli

PLANTED = (3, 17, 30)
EVIL = "</script><script>alert(1)</script>\u202eevil"


def run(*arguments: object) -> None:
    cli.main([str(one) for one in arguments])


def chat(asked: str, said: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an adapter, training rows and queries."""
    root = tmp_path_factory.mktemp("trace")
    draw = random.Random(0)
    towns = [f"{a}ville" for a in "abcdefghijklm"]
    records = [
        chat(f"what is the capital of {a}land ?", f"the capital is {draw.choice(towns)}")
        for a in draw.choices("ABCDEFGH", k=37)
    ]
    fact = chat("what is the capital of Xland ?", "the capital is Yville")
    for at in PLANTED:
        records.insert(at, fact)
    records[5] = chat("what is this ?", f"the capital is {EVIL}")
    queries = [fact, chat("what is this ?", f"the capital is {EVIL}")]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    (root / "query.jsonl").write_text("\n".join(map(json.dumps, queries)))
    texts = [m["content"] for one in [*records, *queries] for m in one["messages"]]
    tokenizer = make_tokenizer(texts, PLAIN_CHAT)
    model = make_model("llama", len(tokenizer))
    rows = read_rows(records, tokenizer)
    loss: Any = influence_for(model, rows).loss
    train(model, rows, loss, forward_of(model, "causal"), steps=30, lr=1e-2)
    save(model, tokenizer, root / "model")
    save_adapter(root / "adapter", root / "model")
    return root


def command(place: Path, out: Path, *more: object, query: Path | str = "") -> list[object]:
    files = ["--train", place / "train.jsonl", "--query", query or place / "query.jsonl"]
    return ["trace", place / "model", *files, "--out", out, *more]


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    run(*command(place, place / "run", "--top", 4, "--quiet"))
    return place / "run"


def test_the_folder_is_complete(finished: Path) -> None:
    there = {path.name for path in finished.iterdir()}
    assert there == {"report.html", "rows.parquet", "top.parquet", "scores", "settings.yaml"}
    settings = yaml.safe_load((finished / "settings.yaml").read_text())
    assert settings["command"] == "trace"
    assert settings["settings"]["k"] == 4
    assert {"upweight", "torch", "transformers"} <= set(settings["versions"])


def test_tables_are_of_the_scores(place: Path, finished: Path) -> None:
    scores = uw.Scores.load(finished / "scores")
    values = np.asarray(scores)
    assert values.shape == (2, 40)
    rows = pd.read_parquet(finished / "rows.parquet")
    assert rows["score"].to_numpy() == pytest.approx(values.mean(0), rel=1e-5)
    assert rows.loc[rows["rank"].idxmin(), "score"] == rows["score"].max()
    assert rows["loss_tokens"].min() > 0
    top = pd.read_parquet(finished / "top.parquet")
    for query in range(2):
        for direction, sign in (("helpful", 1), ("harmful", -1)):
            own = top[(top["query"] == query) & (top["direction"] == direction)]
            signed = sign * values[query]
            wanted = np.argsort(-signed, kind="stable")[:4]
            assert own["row"].tolist() == [r for r in wanted if signed[r] > 0]
            assert own["score"].to_numpy() == pytest.approx(values[query][own["row"]])
    helpful = top[(top["query"] == 0) & (top["direction"] == "helpful")]
    assert set(helpful["row"].iloc[:3]) == set(PLANTED)
    assert helpful["text"].iloc[0] == "user: what is the capital of Xland ?\n" + (
        "assistant: the capital is Yville"
    )


class Page(HTMLParser):
    """The marked pieces of the page, and every address that it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0
        self.in_mark = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.in_mark = tag == "mark"
        self.scripts += tag == "script"
        self.loads += [str(v) for k, v in attrs if k in ("src", "href") and v and v[0] != "#"]
        if self.in_mark:
            self.marks.append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_mark = self.in_mark and tag != "mark"

    def handle_data(self, data: str) -> None:
        if self.in_mark:
            self.marks[-1] += data


def test_the_page_loads_nothing_and_escapes_all(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.scripts == 0
    assert page.loads == ["data:,"]
    assert "Content-Security-Policy" in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert "\u202e" not in text
    assert "⟦U+202E⟧" in text
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


def test_marks_are_the_tokens_that_carry_the_score(place: Path, finished: Path) -> None:
    page = Page()
    page.feed((finished / "report.html").read_text(encoding="utf-8"))
    assert "Yville" in page.marks
    assert not {"Xland", "what", "<|user|>"} & set(page.marks)  # only what is in the loss


def test_scores_are_those_of_the_library(place: Path, finished: Path) -> None:
    from upweight.language import load_model

    loaded = load_model(place / "model")
    rows = read_rows(place / "train.jsonl", loaded.tokenizer)
    queries = read_rows(place / "query.jsonl", loaded.tokenizer)
    influence = influence_for(loaded, rows).fit(rows)
    wanted = influence.scores(queries).values.numpy()
    got = np.asarray(uw.Scores.load(finished / "scores"))
    assert got == pytest.approx(wanted, rel=1e-3, abs=1e-4 * float(abs(wanted).max()))
    tokens = token_scores(influence, queries.chosen([0]), rows.chosen([3]))[0]
    assert tokens.sum() == pytest.approx(got[0, 3], rel=1e-3)


def test_a_plan_comes_before_the_work(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(*command(place, out, "--plan"))
    told = capsys.readouterr().out
    assert "40 rows" in told
    assert "2 × 40" in told
    assert re.search(r"^queries +2 rows, \d+ tokens", told, re.MULTILINE)
    assert "100.0 % of them have Kronecker factors" in told
    assert not out.exists()


def test_it_prints_the_rows_that_matter(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(*command(place, tmp_path / "run"))
    told = capfd.readouterr()
    assert "rows that help most on average" in told.out
    assert told.out.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    assert told.err == ""


@pytest.mark.slow
def test_an_adapter_is_traced_by_its_parameters(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*command(place, tmp_path / "run", "--adapter", place / "adapter", "--damping", 0.5))
    told = capsys.readouterr().out
    assert "with an adapter" in told
    scores = uw.Scores.load(tmp_path / "run" / "scores")
    assert scores.provenance["damping"] == 0.5
    assert scores.provenance["parameters"] == 2 * (2 * 16 * 2 + 2 * 16 + 2 * 8)


@pytest.mark.slow
def test_a_run_is_replaced_and_nothing_else(
    place: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(*command(place, out, "--quiet"))
    run(*command(place, out, "--seed", 3, "--damping", 0.3, "--quiet"))
    assert yaml.safe_load((out / "settings.yaml").read_text())["settings"]["seed"] == 3
    assert uw.Scores.load(out / "scores").provenance["damping"] == 0.3
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        run(*command(place, mine, "--quiet"))
    assert caught.value.code == 2
    assert "no folder of upweight trace" in capsys.readouterr().err
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(
    place: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from upweight.report import trace_run

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "run"

    def stopped() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(trace_run, "_rows", interrupt)
            with pytest.raises(SystemExit) as caught:
                run(*command(place, out, "--top", 4, "--quiet"))
        assert caught.value.code == 130
        assert "the same command resumes" in capsys.readouterr().err
        assert not (out / "report.html").exists()

    stopped()
    run(*command(place, out, "--top", 4, "--quiet"))
    for name in ("rows.parquet", "top.parquet"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(out / name), pd.read_parquet(finished / name), rtol=1e-4
        )
    assert (out / "report.html").exists()
    # what is left of other work is not gone on with, but begun anew when asked to
    stopped()
    with pytest.raises(SystemExit) as caught:
        run(*command(place, out, "--seed", 9, "--quiet"))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "seed: 0 in the file, 9 here" in error
    assert "begin anew in this folder: --restart" in error
    run(*command(place, out, "--seed", 9, "--restart", "--quiet"))
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--damping", "0"), "--damping above 0"),
        (("--damping", "nan"), "--damping above 0"),
        (("--top", "0"), "--top of at least 1"),
        (("--max-length", "5"), "more than the 5 that fit"),
        (("--max-length", "99"), "at most 32, the context"),
        (("--parameters", "nothing.*"), "no parameter matches"),
        (("--adapter", "nowhere"), "a local folder with an adapter"),
        (("--dtype", "int3"), "int3"),
        (("--device", "gpu"), "cannot use the device 'gpu'"),
    ],
)
def test_bad_arguments_end_with_one_line(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, str],
    told: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*command(place, tmp_path / "run", *more))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsaid = chat("who ?", "")["messages"][:1]
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": unsaid}))
    with pytest.raises(SystemExit):
        run(*command(place, tmp_path / "run", query=tmp_path / "q.jsonl"))
    error = capsys.readouterr().err
    assert f"{tmp_path / 'q.jsonl'}: row 0 has no token that counts in the loss" in error
    with pytest.raises(ValueError, match="row 0 has no token"):
        run(*command(place, tmp_path / "run", "--debug", query=tmp_path / "q.jsonl"))
    with pytest.raises(SystemExit):
        run(*command(place, tmp_path / "run", query="none.jsonl"))
    assert "no file none.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("doctor", place / "model", "--data", tmp_path / "q.jsonl", "--max-length", 2)
    assert f"{tmp_path / 'q.jsonl'}: row 0 has" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        run(*command(place, tmp_path / "file" / "run", "--quiet"))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "cannot write to" in error
    assert error.endswith("choose another --out\n")
    assert error.count("\n") == 1


def test_a_missing_extra_is_told(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as caught:
        run(*command(place, tmp_path / "run"))
    assert caught.value.code == 2
    assert "pip install 'upweight[hf]'" in capsys.readouterr().err


def test_a_classifier_is_traced(place: Path, tmp_path: Path) -> None:
    words = ["good film", "bad film", "good day", "bad day", "a film", "a day"]
    tokenizer = make_tokenizer(words)
    save(make_model("bert-classifier", len(tokenizer)), tokenizer, tmp_path / "model")
    rows = pd.DataFrame({"text": words, "label": [0, 1, 0, 1, 2, 2]})
    rows.to_csv(tmp_path / "train.csv", index=False)
    rows[:2].to_csv(tmp_path / "query.csv", index=False)
    files = ["--train", tmp_path / "train.csv", "--query", tmp_path / "query.csv"]
    run("trace", tmp_path / "model", *files, "--out", tmp_path / "run", "--quiet")
    scores = np.asarray(uw.Scores.load(tmp_path / "run" / "scores"))
    assert scores.shape == (2, 6)
    assert scores[0].argmax() == 0
    assert "<mark" not in (tmp_path / "run" / "report.html").read_text()


def test_the_doctor_prints_a_line_for_each_check(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("doctor", place / "model", "--data", place / "train.jsonl")
    told = capsys.readouterr().out
    for check in ("attention", "batch invariance", "coverage", "vocabulary", "chat template"):
        assert re.search(rf"^(ok|warn) +{check}", told, re.MULTILINE)
    assert "0 failed" in told


def test_the_doctor_fails_with_exit_code_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = make_tokenizer([f"word{i}" for i in range(200)])
    save(make_model("llama", 20), larger, tmp_path / "model")
    with pytest.raises(SystemExit) as caught:
        run("doctor", tmp_path / "model")
    assert caught.value.code == 1
    assert re.search(r"^fail +vocabulary +tokenizer 208, model 20", capsys.readouterr().out, re.M)
    with pytest.raises(SystemExit) as caught:
        run("doctor", tmp_path / "nowhere")
    assert caught.value.code == 2
