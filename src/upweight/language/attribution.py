"""`Influence` for language models, and which tokens of a training row its score comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.language.model import (
    Loaded,
    default_parameters,
    forward_of,
    looks_both_ways,
    target,
)
from upweight.language.tokens import TokenRows
from upweight.losses import TokenLoss
from upweight.methods import Influence
from upweight.recipes import EKFAC, Recipe

__all__ = ["check_rows", "influence_for", "token_scores"]

# λ as a share of a layer's mean eigenvalue, as is usual for language models.
DAMPING = 0.1


def influence_for(
    model: Any,
    rows: TokenRows,
    *,
    damping: float | Literal["auto"] = DAMPING,
    method: str | Recipe | None = None,
    parameters: str | Sequence[str] | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    batch_size: int | None = None,
    certify: int | None = 0,
    **options: Any,
) -> Influence:
    """An `Influence` for a language model: ``influence_for(m, train).fit(train).scores(queries)``.

    The loss of a row is the cross-entropy of the tokens that count, `TokenLoss`; of a classifier,
    that of its label.

    Parameters
    ----------
    model
        What `load_model` gives, or a model of transformers or peft by itself.
    rows
        The training rows.
    damping
        λ; with the default `method` a share of each layer's mean eigenvalue.
    method
        Default: ``EKFAC(fisher="sampled", relative="layer")``, with exact labels for a classifier.
    parameters
        Name patterns; default: see `default_parameters`.
    reduction
        Over the tokens of a row; see `TokenLoss`.
    batch_size
        At most so many rows at once.
    certify
        As for `Influence`; 0 here, as each residual is a pass over the rows in forward mode.
    **options
        More for `Influence`.

    Returns
    -------
    Influence
        Not fitted yet.

    Raises
    ------
    ValueError
        If the rows do not fit the model, or its configuration allows no classification of single
        labels.

    References
    ----------
    R. Grosse et al., *Studying large language model generalization with influence functions*
    (2023), §3.1.
    """
    net = model.model if isinstance(model, Loaded) else model
    check_rows(model, rows)
    classifier = rows.task == "classification"
    if parameters is None:
        chosen = model.parameters if isinstance(model, Loaded) else None
        parameters = chosen or default_parameters(net, rows.task)
    if method is None:
        method = EKFAC(fisher="exact" if classifier else "sampled", relative="layer")
    loss = F.cross_entropy if classifier else TokenLoss(reduction, shift=True)
    return Influence(
        net,
        loss,
        method,
        damping=damping,
        parameters=parameters,
        forward=forward_of(net, rows.task),
        target=target,
        batch_size=batch_size,
        certify=certify,
        **options,
    )


def check_rows(model: Any, rows: TokenRows, what: str = "training data") -> None:
    """Refuse rows that a model cannot take: another task, unknown tokens or classes.

    Raises
    ------
    TypeError, ValueError
        The row is named.
    """
    net = model.model if isinstance(model, Loaded) else model
    if not isinstance(rows, TokenRows):
        raise TypeError(
            f"{what}: expected TokenRows, as read_rows gives; got {type(rows).__name__}"
        )
    if isinstance(model, Loaded) and model.task != rows.task:
        raise ValueError(f"{what}: expected rows for {model.task}; they are for {rows.task}")
    size = int(net.get_input_embeddings().weight.shape[0])
    for at, ids in enumerate(rows.ids):
        if ids.min() < 0 or ids.max() >= size:
            bad = int(ids.max() if ids.max() >= size else ids.min())
            raise ValueError(
                f"{what}: row {at}: token {bad} is not among the {size} of the model: is the "
                "tokenizer that of the model?"
            )
    if rows.task == "causal":
        _check_labels(rows, size, what)
    else:
        _check_classes(net, rows, what)


def _check_labels(rows: TokenRows, size: int, what: str) -> None:
    for at, labels in enumerate(rows.labels):
        bad = (labels != -100) & ((labels < 0) | (labels >= size))
        if bad.any():
            raise ValueError(
                f"{what}: row {at}: label {int(labels[bad][0])} is no token of the model, and not "
                "-100, which stands for none"
            )


def _check_classes(net: Any, rows: TokenRows, what: str) -> None:
    classes = int(net.config.num_labels)
    kind = getattr(net.config, "problem_type", None)
    if classes < 2 or kind not in (None, "single_label_classification"):
        raise ValueError(
            f"expected a classifier with one label for a row; the model has {classes} output(s)"
            + (f" for {kind}" if kind else "")
        )
    for at, label in enumerate(rows.labels):
        if not 0 <= int(label) < classes:
            raise ValueError(f"{what}: row {at}: class {int(label)} is none of the {classes}")
    if not looks_both_ways(net) and getattr(net.config, "pad_token_id", None) is None:
        raise ValueError(
            "the model classifies by the last token that is no padding, and its configuration has "
            "no pad_token_id: set it as in training, model.config.pad_token_id = …"
        )


def token_scores(influence: Influence, queries: Any, train: Any) -> list[np.ndarray]:
    """What each token of training rows contributes to their scores.

        T[j, i, s] = g_test[j]ᵀ (C + λI)⁻¹ ∇ℓ_is          I[j, i] = Σ_s T[j, i, s]

    with ℓ_is the part of row i's loss that is of its token s. One derivative in the direction of
    each solved query, in forward mode, gives all of them: no gradient of a token is formed.

    Parameters
    ----------
    influence
        Fitted, for a language model.
    queries, train
        Rows; m queries.

    Returns
    -------
    list of ndarray
        For each training row (m, tokens), zero at tokens that do not count in its loss.

    Raises
    ------
    TypeError
        If the loss is not of tokens.

    References
    ----------
    R. Grosse et al., *Studying large language model generalization with influence functions*
    (2023), §3.3.
    """
    loss = influence.loss
    if not isinstance(loss, TokenLoss):
        raise TypeError(
            f"expected an influence with a TokenLoss, whose loss is one of tokens; got "
            f"{getattr(loss, '__name__', type(loss).__name__)}"
        )
    asked = influence.risk(queries, what="queries")
    risk = influence.risk(train, what="training data")
    gradients = torch.cat([g for _, g in asked.row_gradients()])
    solved = influence.inverse @ gradients.T  # (p, m)
    model = risk.model

    def losses(theta: Any, batch: Any) -> Tensor:
        labels = risk.target(batch)
        found = loss.tokens(model(theta, batch), labels)  # (b, t)
        if loss.reduction == "mean":
            found = found / loss.labelled(labels).sum(1, keepdim=True).clamp(min=1)
        return found

    parts: list[np.ndarray] = []
    theta = model.parameters()
    for chunk in risk.chunks(3 * risk.activation_bytes):
        columns: list[Tensor] = []
        for column in solved.T:  # one at a time: each takes the memory of a forward pass
            with model.evaluating():
                pushed = risk.autodiff.pushforward(
                    lambda t, c=chunk: losses(t, c.batch), theta, model.unflatten(column[None])
                )
            columns.append(pushed[0])
        found = torch.stack(columns, 1).cpu().numpy()  # (b, m, t)
        lengths = chunk.batch["attention_mask"].sum(1).tolist()
        parts += [one[:, : int(n)] for one, n in zip(found, lengths, strict=True)]
    return parts
