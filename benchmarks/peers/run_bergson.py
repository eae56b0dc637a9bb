"""Run bergson's EK-FAC on a language model of `scale.py`, all its steps in one part.

    .venv-bergson/bin/python benchmarks/peers/run_bergson.py PROBLEM.npz OUT.npz

It takes Hugging Face models alone, so the weights are put into a GPT-2 of that library, which
computes the same function; that and the files it reads are made before the measurement.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# what does not fit the CPU build of torch stops the import of the models; neither is needed
sys.modules["torchvision"] = sys.modules["torchaudio"] = None  # type: ignore[assignment]

from scale_phases import Phases, answer, one_thread, preload  # noqa: E402
from scale_problems import ScaleProblem, build, load  # noqa: E402

# our name of a module: its name in the other library
INSIDE = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
POSITIONS = 2048  # at least its batch in tokens; the positions behind the rows are never used


def convert(problem: ScaleProblem) -> Any:
    """The same model as a GPT2LMHeadModel."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, heads, inner, vocabulary, tokens = problem.shape
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=inner,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    state = {
        "transformer.wte.weight": problem.state["token.weight"],
        "transformer.wpe.weight": torch.zeros(POSITIONS, width),
        "lm_head.weight": problem.state["head.weight"],
    }
    state["transformer.wpe.weight"][:tokens] = problem.state["position"]
    for kind in ("weight", "bias"):
        state[f"transformer.ln_f.{kind}"] = problem.state[f"norm.{kind}"]
        for layer in range(layers):
            for ours, theirs in INSIDE.items():
                value = problem.state[f"blocks.{layer}.{ours}.{kind}"]
                linear = kind == "weight" and value.ndim == 2  # theirs are (inputs, outputs)
                state[f"transformer.h.{layer}.{theirs}.{kind}"] = value.T if linear else value
    model.load_state_dict(state)
    x = problem.x_query[:2]
    with torch.no_grad():
        wanted, found = build(problem)(x), model(x).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    return model


def write_files(problem: ScaleProblem, folder: Path) -> None:
    """Model, tokenizer and rows, as it reads them."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    convert(problem).save_pretrained(folder / "model")
    words = {str(token): token for token in range(problem.shape[-2])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="0", pad_token="0", unk_token="0"
    ).save_pretrained(folder / "model")
    for name, x in (("train", problem.x_train), ("query", problem.x_query)):
        rows = {"input_ids": x.tolist(), "length": [x.shape[1]] * len(x)}
        Dataset.from_dict(rows).save_to_disk(str(folder / name))


def run(problem: ScaleProblem, options: argparse.Namespace) -> tuple[Phases, Tensor]:
    """Its pipeline of four steps."""
    from bergson.config.config import (
        DataConfig,
        HessianConfig,
        HessianPipelineConfig,
        IndexConfig,
        InversionConfig,
        PreprocessConfig,
        QuerySetConfig,
        ScoreConfig,
    )
    from bergson.data import load_scores
    from bergson.hessians.pipeline import hessian_pipeline

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(problem, folder)
        index = IndexConfig(
            str(folder / "run"),
            model=str(folder / "model"),
            data=DataConfig(dataset=str(folder / "train")),
            include_bias=True,
            token_batch_size=options.token_batch_size,
        )
        pipeline = HessianPipelineConfig(
            query=QuerySetConfig(dataset=str(folder / "query"), aggregation="none"),
            inversion_cfg=InversionConfig(
                inversion="absolute_damped_inverse", damping_factor=problem.damping
            ),
        )
        hessian = HessianConfig("kfac", ev_correction=True, use_dataset_labels=options.empirical)
        phases = Phases()
        with phases("all"), redirect_stdout(io.StringIO()):
            hessian_pipeline(index, hessian, ScoreConfig(), PreprocessConfig(), pipeline)
            scores = torch.as_tensor(load_scores(folder / "run" / "scores")[:]).reshape(
                len(problem.x_train), -1
            )
    return phases, scores.T.float()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("problem", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--token-batch-size", type=int, default=2048)
    parser.add_argument("--empirical", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    one_thread()
    warnings.filterwarnings("ignore")
    torch.manual_seed(options.seed)
    preload()
    problem = load(options.problem)
    if problem.kind != "gpt":
        parser.error(f"it takes language models alone; got {problem.kind!r}")
    phases, scores = run(problem, options)
    answer(options.out, "bergson", phases, scores, eigenvalue_rows=len(problem.x_train))


if __name__ == "__main__":
    main()
