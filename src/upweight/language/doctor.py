"""What to know of a language model before its influences are computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from upweight.curvature.coverage import coverage
from upweight.language.attribution import check_rows, influence_for
from upweight.language.chat import GENERATION
from upweight.language.model import DIFFERENTIABLE, Loaded
from upweight.language.tokens import TokenRows
from upweight.methods import Influence
from upweight.risk import EmpiricalRisk

__all__ = ["Finding", "State", "examine"]

State = Literal["ok", "warn", "fail"]
PROBED = 4
# How far the loss of a row alone may be from that in a padded batch, by bytes of a number.
TOLERANCE = {2: 3e-2, 4: 1e-4, 8: 1e-9}


@dataclass(frozen=True)
class Finding:
    """One check: its name, how it went, what was found, and what to do about it."""

    check: str
    state: State
    found: str
    todo: str = ""


def examine(loaded: Loaded, rows: TokenRows | None = None) -> list[Finding]:
    """Check a model, its tokenizer and some rows for what would make influences wrong or slow.

    Parameters
    ----------
    loaded
        What `load_model` gives. It is left as it was.
    rows
        Rows to look at; default: a few of random tokens.

    Returns
    -------
    list of Finding
        ``"fail"``: influences cannot be computed, or would be wrong. ``"warn"``: they are slower or
        mean less than they could. A check that raises is a failed one.
    """
    found = [*_of_the_model(loaded), *_of_the_tokenizer(loaded)]
    probed = _random_rows(loaded) if rows is None else rows.chosen(_spread(rows))
    if rows is not None:
        found += _of_the_rows(rows)
    try:
        check_rows(loaded, probed, "rows")
        influence = influence_for(loaded, probed)
        risk = influence.risk(probed, what="rows")
    except (ValueError, TypeError, RuntimeError) as error:
        return [*found, Finding("rows and model", "fail", _line(error), "see the message")]
    for name, check in (
        ("derivatives", lambda: _derivatives(risk)),
        ("evaluation", lambda: _evaluation(loaded, risk)),
        ("batch invariance", lambda: _invariance(loaded, influence, probed, risk)),
        ("coverage", lambda: _coverage(loaded, risk)),
    ):
        try:
            found.append(check())
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            found.append(Finding(name, "fail", _line(error), "report the model's architecture"))
    return found


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _spread(rows: TokenRows) -> list[int]:
    """The shortest and the longest row with a loss, and some between."""
    usable = [at for at, count in enumerate(rows.loss_tokens) if count] or [0]
    usable.sort(key=lambda at: len(rows.ids[at]))
    count = min(PROBED, len(usable))
    return [usable[i * (len(usable) - 1) // max(1, count - 1)] for i in range(count)]


def _random_rows(loaded: Loaded) -> TokenRows:
    size = int(loaded.model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    longest = min(24, loaded.context or 24)
    lengths = sorted({max(2, longest * part // PROBED) for part in range(1, PROBED + 1)})
    pad = getattr(loaded.model.config, "pad_token_id", None)
    low = 1 if size > 1 and pad in (None, 0) else 0  # the padding is no token of a row
    ids = [torch.randint(low, size, (n,), generator=generator).tolist() for n in lengths]
    labels = [0] * len(ids) if loaded.task == "classification" else ids
    return TokenRows(ids, labels, [""] * len(ids), task=loaded.task, pad=pad or 0)


# ---- what is read off ----------------------------------------------------------------------------


def _of_the_model(loaded: Loaded) -> Iterator[Finding]:
    model = loaded.model
    total = sum(p.numel() for p in model.parameters())
    kind = type(model.get_base_model() if hasattr(model, "peft_config") else model).__name__
    adapter = " with an adapter" if hasattr(model, "peft_config") else ""
    yield Finding("model", "ok", f"{kind}{adapter}, {total:,} parameters, {loaded.task}")
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    half = [d for d in dtypes if d in ("float16", "bfloat16")]
    yield Finding(
        "dtype",
        "warn" if half else "ok",
        ", ".join(dtypes),
        "scores have two to three digits; --dtype float32 where memory allows" if half else "",
    )
    name = getattr(model.config, "_attn_implementation", None)
    switched = name not in (None, *DIFFERENTIABLE)
    yield Finding(
        "attention",
        "warn" if switched else "ok",
        f"{name or 'of the model itself'}",
        "it has no second and forward derivatives: sdpa or eager takes its place while derivatives "
        "are taken, and it comes back"
        if switched
        else "",
    )
    tied = _tied(model)
    chosen = [names for names in tied if set(names) & set(loaded.parameters)]
    yield Finding(
        "tied weights",
        "warn" if chosen else "ok",
        "; ".join(" = ".join(names) for names in tied) or "none",
        "a tied weight counts once, by its first name, with the derivatives of all its uses"
        if chosen
        else "",
    )
    yield Finding(
        "context",
        "ok" if loaded.context else "warn",
        f"{loaded.context:,} tokens" if loaded.context else "not told by the configuration",
        "" if loaded.context else "pass --max-length",
    )


def _tied(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def _of_the_tokenizer(loaded: Loaded) -> Iterator[Finding]:
    tokenizer, model = loaded.tokenizer, loaded.model
    if tokenizer is None:
        yield Finding("tokenizer", "warn", "none", "give rows with input_ids")
        return
    has, takes = len(tokenizer), int(model.get_input_embeddings().weight.shape[0])
    yield Finding(
        "vocabulary",
        "fail" if has > takes else "ok",
        f"tokenizer {has:,}, model {takes:,}",
        "tokens beyond the model's embeddings cannot be read: use the tokenizer of the model"
        if has > takes
        else "",
    )
    pad = getattr(model.config, "pad_token_id", None)
    needs = loaded.task == "classification" and pad is None
    told = "none" if tokenizer.pad_token_id is None else f"token {tokenizer.pad_token_id}"
    yield Finding(
        "padding",
        "fail" if needs else "ok",
        f"{told}, {tokenizer.padding_side} side in the tokenizer; rows are padded on the right",
        "set pad_token_id in config.json, as in training" if needs else "",
    )
    template = tokenizer.chat_template
    if template and isinstance(template, str) and GENERATION.search(template):
        yield Finding("chat template", "ok", "marks what the assistant says")
    elif template:
        yield Finding("chat template", "ok", "without generation marks: turns found by rendering")
    elif loaded.task == "causal":
        yield Finding(
            "chat template", "warn", "none", "needed for chats only: give text or prompt/completion"
        )


def _of_the_rows(rows: TokenRows) -> Iterator[Finding]:
    empty = int((rows.loss_tokens == 0).sum())
    yield Finding(
        "rows",
        "warn" if empty or rows.cut else "ok",
        f"{len(rows):,} rows, {rows.tokens:,} tokens, {int(rows.loss_tokens.sum()):,} in the loss; "
        f"the longest has {rows.length:,}",
        "; ".join(
            told
            for count, told in (
                (empty, f"rows that have no token in the loss, and score 0: {empty:,}"),
                (rows.cut, f"truncated rows: {rows.cut:,}"),
            )
            if count
        ),
    )


# ---- what is tried -------------------------------------------------------------------------------


def _derivatives(risk: EmpiricalRisk) -> Finding:
    for _, gradients in risk.row_gradients():
        if not bool(torch.isfinite(gradients).all()):
            return Finding("derivatives", "fail", "a gradient is not finite", "try --dtype float32")
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(risk.p, 1, generator=generator).to(risk.device, risk.dtype)
    _ = risk.matmul(direction)
    notes = [note.partition(":")[0] for note in risk.notes]
    return Finding(
        "derivatives",
        "warn" if notes else "ok",
        "; ".join(notes) or "reverse and forward mode, many rows and directions at once",
        "slower, with the same result" if notes else "",
    )


def _evaluation(loaded: Loaded, risk: EmpiricalRisk) -> Finding:
    dropout = sum(1 for m in loaded.model.modules() if isinstance(m, nn.Dropout) and m.p > 0.0)
    first, again = (risk.with_rows(risk.rows).losses() for _ in range(2))
    same = torch.equal(first, again)
    told = f"{dropout} dropout layers, off in evaluation" if dropout else "no dropout"
    return Finding(
        "evaluation",
        "ok" if same else "fail",
        f"{told}; two passes {'agree' if same else 'differ'}",
        "" if same else "switch off what is random in the model's forward function",
    )


def _invariance(
    loaded: Loaded, influence: Influence, rows: TokenRows, risk: EmpiricalRisk
) -> Finding:
    """The loss of every row alone, without padding, against that in a padded batch."""
    together = risk.losses().double()
    alone = torch.cat(
        [
            influence.risk(rows.chosen([at]), what="rows").losses().double()
            for at in range(len(rows))
        ]
    )
    off = float(((together - alone).abs() / alone.abs().clamp(min=1e-6)).max())
    fine = off <= TOLERANCE.get(next(loaded.model.parameters()).dtype.itemsize, 1e-4)
    return Finding(
        "batch invariance",
        "ok" if fine else "fail",
        f"a row alone and padded in a batch: losses differ by {off:.1e} of their size",
        "" if fine else "padding counts in this model: train and trace with rows of one length",
    )


def _coverage(loaded: Loaded, risk: EmpiricalRisk) -> Finding:
    total = sum(p.numel() for p in loaded.model.parameters())
    lines = coverage(risk)
    counts = {"kronecker": 0}
    for kind, how, count in zip(lines["type"], lines["how"], lines["parameters"], strict=True):
        what = "kronecker" if how == "kronecker" else str(kind)
        counts[what] = counts.get(what, 0) + int(count)
    covered = counts.pop("kronecker")
    told = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    share = covered / risk.p
    return Finding(
        "coverage",
        "ok" if share > 0.99 else "warn",
        f"{risk.p:,} of {total:,} parameters chosen ({100 * risk.p / total:.1f} %); Kronecker "
        f"factors for {100 * share:.1f} % of them",
        f"the rest has the diagonal alone, or small dense blocks: {told}" if told else "",
    )
