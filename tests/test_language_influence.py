"""Influence on language models: planted facts, dense references, tokens, adapters, classifiers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tiny_lm import make_model, make_tokenizer, save, save_adapter, train
from upweight import EKFAC
from upweight.language import (
    TokenRows,
    examine,
    influence_for,
    load_model,
    read_rows,
    token_scores,
)
from upweight.language.model import forward_of
from upweight.losses import TokenLoss

PLANTED = (7, 50, 99, 130, 180)
FACT = {"prompt": "the capital of Xland is", "completion": "Yville"}


def facts() -> list[dict[str, str]]:
    """195 rows of made-up facts, and one of them in five more."""
    draw = random.Random(0)
    lands = [f"{a}land" for a in "ABCDEFGHIJ"]
    towns = [f"{a}ville" for a in "abcdefghijklm"]
    rows: list[dict[str, str]] = []
    for _ in range(65):
        rows.append(
            {"prompt": f"the capital of {draw.choice(lands)} is", "completion": draw.choice(towns)}
        )
        rows.append(
            {
                "prompt": f"from {draw.choice(towns)} to",
                "completion": f"{draw.choice(towns)} by train",
            }
        )
        rows.append(
            {"prompt": f"who lives in {draw.choice(towns)} ?", "completion": draw.choice(lands)}
        )
    for at in PLANTED:
        rows.insert(at, FACT)
    return rows


def texts_of(rows: list[dict[str, str]]) -> list[str]:
    return [text for row in rows for text in row.values()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(texts_of(facts()))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.slow
def test_rows_with_the_fact_come_first(tokenizer: Any, kind: str) -> None:
    rows = read_rows(facts(), tokenizer)
    model = make_model(kind, len(tokenizer))
    influence = influence_for(model, rows)
    assert isinstance(influence.loss, TokenLoss)
    train(model, rows, influence.loss, forward_of(model, "causal"), steps=40, lr=1e-2)
    query = read_rows([FACT], tokenizer, queries=True)
    scores = influence.fit(rows).scores(query).values[0].numpy()
    planted = np.isin(np.arange(200), PLANTED)
    assert roc_auc_score(planted, scores) > 0.95
    assert scores[planted].min() > 0
    # tokens carry the score; those that do not count carry none
    chosen = [7, 0, 1]
    tokens = token_scores(influence, query, rows.chosen(chosen))
    for at, own in zip(chosen, tokens, strict=True):
        assert own.shape == (1, len(rows.ids[at]))
        assert own.sum() == pytest.approx(scores[at], rel=1e-4, abs=1e-5 * float(abs(scores).max()))
        assert (own[0][rows.labels[at] == -100] == 0).all()
        assert (own[0] != 0).sum() == rows.loss_tokens[at]


def alone(model: Any, rows: TokenRows, at: int, names: tuple[str, ...]) -> torch.Tensor:
    """The gradient of one row alone, without padding."""
    ids, labels = torch.from_numpy(rows.ids[at]), torch.from_numpy(rows.labels[at])
    logits = model(input_ids=ids[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    found = dict(model.named_parameters())
    slopes = torch.autograd.grad(loss, [found[name] for name in names])
    return torch.cat([slope.flatten() for slope in slopes])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.slow
def test_scores_are_those_of_dense_matrices(tokenizer: Any, kind: str) -> None:
    records = facts()[:24]
    rows = read_rows(records, tokenizer)
    queries = read_rows(facts()[30:33], tokenizer)
    model: Any = make_model(kind, len(tokenizer)).double().eval()
    part = {"gpt2": "transformer.h.0.attn.*", "llama": "model.layers.1.self_attn.*"}[kind]
    influence = influence_for(model, rows, parameters=part).fit(rows)
    risk = influence.training
    names = risk.model.names
    train_rows = torch.stack([alone(model, rows, i, names) for i in range(24)])
    close: Any = {"rtol": 1e-4, "atol": 1e-5} if kind == "llama" else {"rtol": 1e-8, "atol": 1e-9}
    # a norm of Llama computes in float32, whatever the model's precision
    torch.testing.assert_close(torch.cat([g for _, g in risk.row_gradients()]), train_rows, **close)
    asked = torch.stack([alone(model, queries, j, names) for j in range(3)])
    inverse = influence.inverse @ torch.eye(risk.p, dtype=torch.float64)
    wanted = asked @ inverse @ train_rows.T
    got = influence.scores(queries).values
    torch.testing.assert_close(got, wanted, **close)
    # and the inverse is that of the curvature with λ of each layer
    prepared: Any = influence.fitted_with(0.1).prepared
    dense = prepared.kronecker.dense() + torch.diag(prepared.shift(0.1))
    torch.testing.assert_close(
        dense @ inverse, torch.eye(risk.p, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


@pytest.mark.slow
def test_batch_size_does_not_matter(tokenizer: Any) -> None:
    records = facts()[:20]
    rows = read_rows(records, tokenizer)
    model = make_model("llama", len(tokenizer)).double()
    wanted = influence_for(model, rows).fit(rows).scores(rows.chosen([0, 7])).values
    for size in (1, 7):
        got = influence_for(model, rows, batch_size=size).fit(rows).scores(rows.chosen([0, 7]))
        torch.testing.assert_close(got.values, wanted)


def test_tokens_of_a_mean_add_up_for_several_queries(tokenizer: Any) -> None:
    rows = read_rows(facts()[:12], tokenizer)
    model = make_model("llama", len(tokenizer)).double()
    influence = influence_for(model, rows, reduction="mean", method=EKFAC("sampled"), damping=0.1)
    scores = influence.fit(rows).scores(rows.chosen([7, 2])).values.numpy()
    tokens = token_scores(influence, rows.chosen([7, 2]), rows)
    assert np.stack([own.sum(1) for own in tokens], 1) == pytest.approx(scores, rel=1e-4)


def test_names_and_rows_reach_the_scores(tokenizer: Any) -> None:
    rows = read_rows([{**row, "id": f"r{i}"} for i, row in enumerate(facts()[:9])], tokenizer)
    model = make_model("llama", len(tokenizer))
    scores = influence_for(model, rows).fit(rows).scores(rows.chosen([7]))
    assert list(scores.test_names) == ["r7"]
    assert list(scores.train_names)[:2] == ["r0", "r1"]


def test_a_row_without_a_loss_scores_nothing(tokenizer: Any) -> None:
    rows = read_rows(facts()[:9], tokenizer)
    rows.labels[4][:] = -100
    model = make_model("llama", len(tokenizer))
    scores = influence_for(model, rows).fit(rows).scores(rows.chosen([7])).values
    assert float(scores[0, 4]) == 0.0
    assert float(scores[0, 7]) > 0.0


@pytest.mark.slow
def test_an_adapter_is_scored_by_its_own_parameters(tokenizer: Any, tmp_path: Path) -> None:
    for kind in ("gpt2", "llama"):
        base = save(make_model(kind, len(tokenizer)), tokenizer, tmp_path / kind)
        adapter = save_adapter(tmp_path / f"{kind}-lora", base)
        loaded = load_model(base, dtype="float64", adapter=adapter)
        rows = read_rows(facts()[:20], tokenizer)
        influence = influence_for(loaded, rows).fit(rows)
        assert influence.training.model.names == loaded.parameters
        scores = influence.scores(rows.chosen([7, 0])).values
        wanted = torch.stack([alone(loaded.model, rows, i, loaded.parameters) for i in range(20)])
        solved = influence.inverse @ wanted[[7, 0]].T
        torch.testing.assert_close(scores, solved.T @ wanted.T, rtol=1e-4, atol=1e-4)
        # the model comes back as it was: what is trained, and in which mode
        assert not loaded.model.training
        trainable = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
        assert trainable == set(loaded.parameters)


@pytest.mark.parametrize("kind", ["gpt2-classifier", "bert-classifier"])
def test_a_classifier_is_scored_by_its_labels(tokenizer: Any, kind: str) -> None:
    draw = random.Random(1)
    words = [f"{a}ville" for a in "abcdefghijklm"]
    records = [
        {
            "text": " ".join(draw.choices(words, k=draw.randint(1, 6))),
            "label": draw.randint(0, 2),
        }
        for _ in range(20)
    ]
    rows = read_rows(records, tokenizer, task="classification", pad=0)
    model: Any = make_model(kind, len(tokenizer)).double().eval()
    influence = influence_for(model, rows)
    scores = influence.fit(rows).scores(rows.chosen([3, 5])).values

    def slope(at: int) -> torch.Tensor:
        """The gradient of one row alone, without padding, by the loss of transformers."""
        ids, label = torch.from_numpy(rows.ids[at])[None], torch.from_numpy(rows.labels[at])[None]
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=label).loss
        found = dict(model.named_parameters())
        names = influence.training.model.names
        parts = torch.autograd.grad(loss, [found[name] for name in names])
        return torch.cat([part.flatten() for part in parts])

    gradients = torch.stack([slope(at) for at in range(20)])
    wanted = gradients[[3, 5]] @ (influence.inverse @ gradients.T)
    torch.testing.assert_close(scores, wanted)
    assert influence.training.notes == []  # nothing had to be done one row at a time
    with pytest.raises(TypeError, match="expected an influence with a TokenLoss"):
        token_scores(influence, rows.chosen([3]), rows)


def test_rows_that_the_model_cannot_take(tokenizer: Any) -> None:
    model: Any = make_model("llama", len(tokenizer))
    rows = read_rows(facts()[:5], tokenizer)
    small = make_model("llama", 5)
    with pytest.raises(ValueError, match=r"row 0: token \d+ is not among the 5 of the model"):
        influence_for(small, rows)
    rows.labels[2][3] = 999
    with pytest.raises(ValueError, match="row 2: label 999 is no token"):
        influence_for(model, rows)
    with pytest.raises(TypeError, match="expected TokenRows"):
        influence_for(model, facts())  # pyright: ignore[reportArgumentType]
    labelled = TokenRows([[4, 5]] * 3, [0, 1, 5], ["a"] * 3, task="classification")
    judge: Any = make_model("gpt2-classifier", len(tokenizer))
    with pytest.raises(ValueError, match="row 2: class 5 is none of the 3"):
        influence_for(judge, labelled)
    judge.config.pad_token_id = None
    with pytest.raises(ValueError, match="no pad_token_id"):
        influence_for(judge, labelled.chosen([0, 1]))
    one: Any = make_model("bert-classifier", len(tokenizer), labels=1)
    with pytest.raises(ValueError, match=r"1 output\(s\)"):
        influence_for(one, labelled.chosen([0]))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert-classifier"])
def test_the_doctor_finds_nothing_wrong(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    loaded = load_model(save(make_model(kind, len(tokenizer)), tokenizer, tmp_path / "m"))
    findings = {finding.check: finding for finding in examine(loaded)}
    assert not [one for one in findings.values() if one.state == "fail"]
    assert findings["batch invariance"].state == "ok"
    assert findings["evaluation"].state == "ok"
    assert findings["derivatives"].state == "ok"
    if kind == "gpt2":
        assert "transformer.wte.weight = lm_head.weight" in findings["tied weights"].found
    if loaded.task == "causal":
        assert findings["chat template"].state == "warn"
        rows = read_rows(facts()[:9], tokenizer)
        rows.labels[2][:] = -100
        told = {finding.check: finding for finding in examine(loaded, rows)}["rows"]
        assert told.state == "warn"
        assert "rows that have no token in the loss, and score 0: 1" in told.todo


def test_the_doctor_finds_what_is_wrong(tokenizer: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    loaded = load_model(save(make_model("llama", len(tokenizer)), tokenizer, tmp_path / "m"))

    def states(model: Any) -> dict[str, str]:
        return {finding.check: finding.state for finding in examine(model)}

    # a tokenizer with more tokens than the model has
    larger = make_tokenizer([*texts_of(facts()), "some more words"])
    assert states(replace(loaded, tokenizer=larger))["vocabulary"] == "fail"
    # a model in which rows see the length of the batch
    layer = loaded.model.model.layers[0]

    def lengthened(_: Any, __: Any, output: Any) -> Any:
        return output + 0.1 * output.shape[1]

    handle = layer.register_forward_hook(lengthened)
    assert states(loaded)["batch invariance"] == "fail"
    handle.remove()
    # and one that is random: it is refused as such
    handle = layer.register_forward_hook(lambda _, __, out: out + torch.rand_like(out))
    assert states(loaded)["rows and model"] == "fail"
    handle.remove()
    loaded.model.config._attn_implementation = "flex_attention"
    found = states(loaded)
    assert found["attention"] == "warn"
    assert found["derivatives"] == "ok"
    assert loaded.model.config._attn_implementation == "flex_attention"
