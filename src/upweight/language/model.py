"""Language models from local folders, and how `Influence` uses them."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upweight.language import extra
from upweight.language.adapters import Adapter
from upweight.language.folders import Task, find_folder, read_json, some, task_of, told

__all__ = [
    "Loaded",
    "Task",
    "context_length",
    "default_parameters",
    "forward_of",
    "load_model",
    "plainly",
    "target",
]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Attention in these two can be differentiated twice and in forward mode, as `FunctionalModel` runs
# it; fused kernels of other names cannot.
DIFFERENTIABLE = ("eager", "sdpa")


@dataclass(frozen=True)
class Loaded:
    """A model with what belongs to it.

    Attributes
    ----------
    model
        In evaluation mode. With an adapter, only parameters of the adapter have ``requires_grad``.
    tokenizer
        That of its folder.
    task
        ``"causal"`` for a language model, ``"classification"`` for one with a label for a sequence.
    parameters
        Names of the parameters that influence is computed by; see `default_parameters`.
    context
        The longest sequence that the model takes; None where it says nothing.
    """

    model: Any
    tokenizer: Any
    task: Task
    parameters: tuple[str, ...]
    context: int | None


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    adapter: str | os.PathLike[str] | None = None,
    task: Task | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """A model and its tokenizer from a local folder; nothing is downloaded.

    Parameters
    ----------
    path
        A folder that ``save_pretrained`` has written.
    dtype
        ``"float32"``, ``"float64"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for that of the
        file.
    device
        Where to put the model.
    adapter
        Folder of a PEFT adapter for this model.
    task
        Default: that of the adapter, or by the architecture that the folder names.
    trust_remote_code
        Whether Python files in the folder may be executed.

    Raises
    ------
    ImportError
        If the packages of the extra ``hf`` are not there.
    FileNotFoundError, ValueError
        If there is no such folder or device, it is no model of these kinds, weights are missing,
        or the adapter does not fit; the message is one line.
    """
    hf = extra.transformers()
    folder = find_folder(path, "config.json", "a model")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"expected dtype 'auto' or one of {', '.join(DTYPES)}; got {dtype!r}")
    _check_device(device)
    config = read_json(folder / "config.json")
    if config.get("auto_map") and not trust_remote_code:
        custom = config.get("model_type") not in hf.CONFIG_MAPPING
        if custom:
            raise ValueError(
                f"{folder}: the model is defined by Python files in its folder, which are not "
                "executed. Read them, then pass trust_remote_code=True (--trust-remote-code)"
            )
    own = None if adapter is None else Adapter.read(adapter, task)
    found: Task = task or (own and own.task) or task_of(config, folder)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with extra.quiet():
        tokenizer = told(folder, "tokenizer", hf.AutoTokenizer.from_pretrained, folder, **options)
        kinds = {
            "causal": hf.AutoModelForCausalLM,
            "classification": hf.AutoModelForSequenceClassification,
        }
        if own is not None and found == "classification" and own.classes:
            options["num_labels"] = own.classes
        model, info = told(
            folder,
            "model",
            kinds[found].from_pretrained,
            folder,
            dtype="auto" if dtype == "auto" else DTYPES[dtype],
            output_loading_info=True,
            **options,
        )
        brought: set[str] = set() if own is None else own.replaced
        missing = sorted(set(info.get("missing_keys", ())) - brought)
        if missing:
            raise ValueError(
                f"{folder} has no weights for {some(missing)}: they would be random. Is it a "
                f"model for {found}?"
            )
        if own is not None:
            model = own.onto(model, folder)
    model = model.to(device).eval()
    return Loaded(
        model, tokenizer, found, default_parameters(model, found), context_length(model, tokenizer)
    )


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"cannot use the device {str(device)!r}: {reason}") from error


def context_length(model: Any, tokenizer: Any = None) -> int | None:
    """The longest sequence that a model takes, by its configuration and its tokenizer."""
    config = model.config
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    stated = [getattr(config, name, None) for name in names]
    # a tokenizer that does not know has a very large number
    stated.append(getattr(tokenizer, "model_max_length", None))
    known = [int(n) for n in stated if isinstance(n, int) and 0 < n < 10**9]
    return min(known) if known else None


def default_parameters(model: Any, task: Task) -> tuple[str, ...]:
    """Names of the parameters that influence is computed by unless others are asked for.

    Of a model with an adapter: all that the adapter trains. Of a language model: weights and biases
    of the linear layers in its blocks, without embeddings, norms and head, as in the published work
    on EK-FAC. Of a classifier: of all linear layers, the head included.

    Parameters
    ----------
    model
        As transformers or peft load it.
    task
        What it does.

    Raises
    ------
    ValueError
        If there are none.

    References
    ----------
    R. Grosse et al., *Studying large language model generalization with influence functions*
    (2023), §3.1: linear layers of the MLPs; here those of attention as well.
    """
    if hasattr(model, "peft_config"):
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        if not names:
            raise ValueError("expected an adapter with trainable parameters; it has none")
        return tuple(names)
    embeddings = {
        id(p)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
        for p in module.parameters()
    }
    stacked = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    found: list[str] = []
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        if task == "causal" and not any(name.startswith(f"{stack}.") for stack in stacked):
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in embeddings and parameter.is_floating_point():
                found.append(f"{name}.{attribute}")
    if not found:
        raise ValueError(
            f"no linear layers in blocks in a {type(model).__name__}: say which parameters to take"
        )
    return tuple(found)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, that of GPT-2 with its transposed weight included."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


# ---- how a batch is used -------------------------------------------------------------------------


def forward_of(model: Any, task: Task) -> Callable[[nn.Module, Any], Tensor]:
    """``forward(model, batch)`` for `Influence`: batches of `TokenRows` to logits.

    Logits are (b, t, vocabulary) of a language model and (b, classes) of a classifier. Rows are
    padded on the right. A causal model sees only what is to the left, so that padding changes
    nothing and needs no mask; a classifier that looks both ways gets one.
    """
    masked = task == "classification" and looks_both_ways(model)

    def forward(model: Any, batch: Any) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
        if masked:
            inputs["attention_mask"] = _additive(batch["attention_mask"], model.dtype)
        options: dict[str, Any] = {"return_dict": True}
        if getattr(model.config, "use_cache", None) is not None:
            options["use_cache"] = False
        with plainly(model):
            return model(**inputs, **options).logits

    return forward


def target(batch: Any) -> Tensor:
    """What the loss takes beside the logits."""
    return batch["labels"]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (b, t) of ones for tokens and zeros for padding, as a term of attention (b, 1, t, t).

    One of two dimensions would be looked into by transformers, which `torch.func.vmap` forbids.
    """
    t = mask.shape[-1]
    term = torch.zeros_like(mask, dtype=dtype).masked_fill(mask == 0, torch.finfo(dtype).min)
    return term[:, None, None, :].expand(-1, 1, t, -1)


def looks_both_ways(model: Any) -> bool:
    """Whether a token has an influence on what is to its left."""
    base = model.base_model if not hasattr(model, "peft_config") else model.get_base_model()
    base = getattr(base, "base_model", base)
    device = next(base.parameters()).device
    size = int(base.get_input_embeddings().weight.shape[0])
    ids = torch.arange(4, device=device)[None] % size
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % size
    was = base.training
    try:
        base.eval()
        with torch.no_grad(), plainly(base):
            first, second = (base(input_ids=x).last_hidden_state[0, 0] for x in (ids, other))
    finally:
        base.train(was)
    return not torch.equal(first, second)


@contextmanager
def plainly(model: nn.Module) -> Generator[None]:
    """Attention that can be differentiated, and no looks at the numbers in a batch, until the end.

    Attention by a kernel without derivatives of all kinds is switched to one that has them. And
    transformers warn of padding without a mask, for which they read the tokens: `torch.func.vmap`
    forbids that.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    switched = [
        (config, now)
        for config in configs.values()
        if (now := getattr(config, "_attn_implementation", None)) not in (None, *DIFFERENTIABLE)
    ]
    name = "warn_if_padding_and_no_attention_mask"
    warning = [m for m in model.modules() if hasattr(m, name) and name not in m.__dict__]
    plain = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    try:
        for config, _ in switched:
            config._attn_implementation = plain
        for module in warning:
            module.__dict__[name] = _nothing
        yield
    finally:
        for config, before in switched:
            config._attn_implementation = before
        for module in warning:
            module.__dict__.pop(name, None)


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for a warning."""
