"""Models from folders: what they compute, which parameters are taken, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_lm import make_model, make_tokenizer, quietly, save, save_adapter
from upweight.language import default_parameters, influence_for, load_model, read_rows
from upweight.language.model import forward_of, looks_both_ways, plainly

TEXTS = ["the cat sat on the mat", "a dog ran away", "who sat there", "the dog sat"]
KINDS = ("gpt2", "llama", "gpt2-classifier", "bert-classifier")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer(TEXTS)
    found = {k: save(make_model(k, len(tokenizer)), tokenizer, root / k) for k in KINDS}
    for kind in ("gpt2", "llama"):
        found[f"{kind}-lora"] = save_adapter(root / f"{kind}-lora", found[kind])
    return found


def rows_for(loaded: Any) -> Any:
    records = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    return read_rows(records, loaded.tokenizer, task=loaded.task, pad=0)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model_with_its_own_mask(
    folders: dict[str, Path], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(folders[kind], dtype="float64")
    batch = rows_for(loaded).batch(0, 4)
    forward = forward_of(loaded.model, loaded.task)
    with torch.no_grad():
        got = forward(loaded.model, batch)
        wanted = loaded.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
    if loaded.task == "causal":
        there = batch["attention_mask"].bool()
        got, wanted = got[there], wanted[there]
    torch.testing.assert_close(got, wanted)
    assert looks_both_ways(loaded.model) is (kind == "bert-classifier")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_row_alone_has_the_same_logits(folders: dict[str, Path], kind: str) -> None:
    loaded = load_model(folders[kind], dtype="float64")
    rows = rows_for(loaded)
    forward = forward_of(loaded.model, "causal")
    with torch.no_grad():
        together = forward(loaded.model, rows.batch(0, 4))
        for i in range(4):
            alone = loaded.model(input_ids=torch.from_numpy(rows.ids[i])[None]).logits[0]
            torch.testing.assert_close(together[i, : len(alone)], alone)


def test_linear_layers_in_blocks_are_taken(folders: dict[str, Path]) -> None:
    gpt2 = load_model(folders["gpt2"])
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    wanted = {
        f"transformer.h.{i}.{layer}.{part}"
        for i in range(2)
        for layer in layers
        for part in ("weight", "bias")
    }
    assert set(gpt2.parameters) == wanted
    llama = load_model(folders["llama"])
    assert len(llama.parameters) == 14
    assert all(name.endswith("_proj.weight") for name in llama.parameters)
    bert = load_model(folders["bert-classifier"])
    assert {"classifier.weight", "bert.pooler.dense.bias"} <= set(bert.parameters)
    assert not any("embeddings" in name or "LayerNorm" in name for name in bert.parameters)
    assert (gpt2.context, gpt2.task, bert.task) == (32, "causal", "classification")


def test_a_model_without_blocks_is_told() -> None:
    model = make_model("llama", 8)
    model.model.layers = torch.nn.ModuleList()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="no linear layers in blocks"):
        default_parameters(model, "causal")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_adapter_brings_its_parameters_alone(folders: dict[str, Path], kind: str) -> None:
    loaded = load_model(folders[kind], adapter=folders[f"{kind}-lora"])
    assert len(loaded.parameters) == (4 if kind == "gpt2" else 8)
    assert all("lora_" in name for name in loaded.parameters)
    plain = load_model(folders[kind])
    batch = rows_for(loaded).batch(0, 4)
    with torch.no_grad():
        adapted = forward_of(loaded.model, "causal")(loaded.model, batch)
        base = forward_of(plain.model, "causal")(plain.model, batch)
    assert float((adapted - base).abs().max()) > 1e-3


def test_an_adapter_may_make_a_classifier(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "judge", folders["llama"], classes=3)
    loaded = load_model(folders["llama"], adapter=adapter)
    assert loaded.task == "classification"
    assert loaded.model.config.num_labels == 3
    heads = [name for name in loaded.parameters if "lora_" not in name]
    assert len(heads) == 1
    assert "score" in heads[0]
    rows = rows_for(loaded)
    scores = influence_for(loaded, rows).fit(rows).scores(rows)
    assert scores.shape == (4, 4)
    assert bool((scores.values.diagonal() > 0).all())
    with pytest.raises(ValueError, match=r"no weights for score\.weight: they would be random"):
        load_model(folders["llama"], task="classification")


def test_adapters_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit the model in .*gpt2: .*q_proj"):
        load_model(folders["gpt2"], adapter=folders["llama-lora"])
    import transformers as hf

    wide = hf.LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    save(hf.LlamaForCausalLM(wide), make_tokenizer(TEXTS), tmp_path / "wide")
    with pytest.raises(ValueError, match=r"does not fit the model in .*wide: size mismatch"):
        load_model(tmp_path / "wide", adapter=folders["llama-lora"])
    deep = make_model("llama", 20)
    deep.config.num_hidden_layers = 3
    save(hf.LlamaForCausalLM(deep.config), make_tokenizer(TEXTS), tmp_path / "deep")
    with pytest.raises(ValueError, match=r"it has no weights for .*layers\.2"):
        load_model(tmp_path / "deep", adapter=folders["llama-lora"])
    with pytest.raises(ValueError, match="is for causal; expected one for classification"):
        load_model(folders["llama"], adapter=folders["llama-lora"], task="classification")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_model(folders["llama"], adapter=folders["gpt2"])
    with pytest.raises(FileNotFoundError, match="It is an adapter: pass the folder of its base"):
        load_model(folders["llama-lora"])


def test_folders_that_hold_no_such_model(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Nothing is downloaded"):
        load_model("gpt2")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="expected dtype 'auto' or one of"):
        load_model(folders["gpt2"], dtype="int8")
    with pytest.raises(ValueError, match=r"no weights for score.weight: they would be random"):
        load_model(folders["gpt2"], task="classification")

    def changed(name: str, **config: Any) -> Path:
        shutil.copytree(folders["llama"], tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return tmp_path / name

    with pytest.raises(ValueError, match="Python files in its folder, which are not executed"):
        load_model(changed("own", model_type="own", auto_map={"AutoModelForCausalLM": "m.M"}))
    with pytest.raises(ValueError, match="it names LlamaModel"):
        load_model(changed("headless", architectures=["LlamaModel"]))
    with pytest.raises(ValueError, match="cannot load the") as caught:
        load_model(changed("unknown", model_type="nonesuch"))
    assert "\n" not in str(caught.value)
    broken = changed("broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_model(broken)


def test_attention_is_switched_and_comes_back(folders: dict[str, Path]) -> None:
    loaded = load_model(folders["llama"], dtype="float64")
    model, config = loaded.model, loaded.model.config
    batch = rows_for(loaded).batch(0, 4)
    forward = forward_of(model, "causal")
    with torch.no_grad():
        wanted = forward(model, batch)
    config._attn_implementation = "flex_attention"
    seen: list[str] = []
    handle = model.model.register_forward_pre_hook(
        lambda *_: seen.append(config._attn_implementation)
    )
    try:
        with torch.no_grad():
            torch.testing.assert_close(forward(model, batch), wanted)
        with pytest.raises(RuntimeError, match="inside"), plainly(model):
            raise RuntimeError("inside")
    finally:
        handle.remove()
    assert seen == ["sdpa"]
    assert config._attn_implementation == "flex_attention"
    assert not any("warn_if_padding_and_no_attention_mask" in m.__dict__ for m in model.modules())


def test_transformers_speaks_again_afterwards(folders: dict[str, Path]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(folders["gpt2"])
    with pytest.raises(ValueError, match="random"):
        load_model(folders["gpt2"], task="classification")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from upweight.language import extra

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'upweight\[hf\]'"):
        extra.peft()


def test_half_precision_is_loaded_as_asked(folders: dict[str, Path]) -> None:
    assert load_model(folders["gpt2"], dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model(folders["gpt2"], dtype="auto").model.dtype == torch.float32
    with quietly():
        pass  # leaves the bars as other tests expect them
