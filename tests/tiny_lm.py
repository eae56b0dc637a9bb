"""Tiny language models on disk, made from configurations and trained for a moment; no network."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upweight.language import extra

PLAIN_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <|end|> "
    "{% endgeneration %}{% else %}{{ m['content'] }} <|end|> {% endif %}{% endfor %}"
)
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
MARKS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@contextlib.contextmanager
def quietly() -> Generator[None]:
    """No progress bars while models are made."""
    logging: Any = extra.transformers().utils.logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def make_tokenizer(texts: Iterable[str], chat: str | None = None) -> Any:
    """A tokenizer with a number for every word of these texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    hf = extra.transformers()

    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL + MARKS, show_progress=False)
    raw.train_from_iterator(texts, trainer)
    special = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    made = hf.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    made.chat_template = chat
    return made


def make_model(kind: str, vocabulary: int, *, context: int = 32, labels: int = 3) -> nn.Module:
    """``"gpt2"``, ``"llama"``, or classifiers ``"gpt2-classifier"`` and ``"bert-classifier"``."""
    hf = extra.transformers()

    torch.manual_seed(0)
    if kind.startswith("gpt2"):
        config: Any = hf.GPT2Config(
            vocab_size=vocabulary,
            n_positions=context,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
            num_labels=labels,
        )
        made = hf.GPT2ForSequenceClassification if "classifier" in kind else hf.GPT2LMHeadModel
        return made(config)
    if kind == "llama":
        config = hf.LlamaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=context,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        )
        return hf.LlamaForCausalLM(config)
    config = hf.BertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=context,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=labels,
        pad_token_id=0,
    )
    return hf.BertForSequenceClassification(config)


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write a model with its tokenizer."""
    with quietly():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, *, classes: int = 0, rank: int = 2) -> Path:
    """A LoRA adapter for the model in `base`, with random numbers in both factors.

    With `classes`, it makes a classifier of the model, and brings the head.
    """
    peft = extra.peft()
    hf = extra.transformers()

    with quietly():
        torch.manual_seed(1)
        kind = hf.AutoModelForSequenceClassification if classes else hf.AutoModelForCausalLM
        more = {"num_labels": classes} if classes else {}
        model = kind.from_pretrained(base, local_files_only=True, **more)
        wanted = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
        config = peft.LoraConfig(
            task_type="SEQ_CLS" if classes else "CAUSAL_LM",
            modules_to_save=["score"] if classes else None,
            r=rank,
            target_modules=wanted,
            lora_alpha=4,
            fan_in_fan_out=wanted == ["c_attn"],
        )
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
        adapted.save_pretrained(folder)
    return folder


def train(model: nn.Module, rows: Any, loss: Any, forward: Any, *, steps: int, lr: float) -> float:
    """Full-batch Adam on the sum over rows; the last loss per row."""
    batch = rows.batch(0, len(rows))
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(chosen, lr=lr)
    value = torch.zeros(())
    model.eval()  # without dropout, so that it learns in a few steps
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(forward(model, batch), batch["labels"]).mean()
        value.backward()
        optimizer.step()
    return float(value.detach())
