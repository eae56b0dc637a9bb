"""Scores from gradients alone, without curvature: dot product, cosine, and TracIn.

Letters: m test rows, n training rows, K checkpoints.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from upweight.margins import TestLoss
from upweight.operator import wide
from upweight.scorers.checkpoints import Checkpoint, Checkpoints
from upweight.scorers.pairs import GradientPairs
from upweight.scorers.sides import ScorerOptions, make_sides
from upweight.scores import Scores, write_meta
from upweight.stream import ArraySink, ZarrSink, atomic_directory

__all__ = ["grad_cos", "grad_dot", "tracin"]


def grad_dot(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    train: Any,
    test: Any,
    *,
    test_loss: TestLoss = "loss",
    normalised: bool = False,
    to: str | os.PathLike[str] | None = None,
    **options: Unpack[ScorerOptions],
) -> Scores:
    """The product of gradients, I[j, i] = g_test[j]ᵀ g_train[i].

    The influence with C + λI replaced by I: one step of gradient descent on training row i lowers
    the loss of test row j by I[j, i] times its learning rate. Positive = training row i helps.

    Parameters
    ----------
    model, loss, train
        As for `Influence` and its `fit`.
    test
        m test rows, in any form that `train` may have.
    test_loss
        What g_test is the gradient of: ``"loss"``; ``"margin"``, minus the log odds of the label;
        or a function ``(output, target) → loss``.
    normalised
        Take the cosine, as `grad_cos`.
    to
        A directory to write to, block by block, so that memory does not grow with n.
    **options
        ``parameters``, ``forward``, ``target``, ``batch_size`` as for `Influence`; ``train_names``
        and ``test_names``, one name per row.

    Returns
    -------
    Scores
        ``values`` (m, n).

    Notes
    -----
    For networks of linear layers that act once for a row, no gradient is formed: o + i operations
    for a pair and a layer of o outputs and i inputs, instead of o · i.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.5], [0.0]])
    >>> test = torch.tensor([[1.0]]), torch.tensor([[1.5]])
    >>> grad_dot(model, torch.nn.functional.mse_loss, (x, y), test).values  # gradients −1 and 2
    tensor([[ 1., -2.]])
    """
    sides = make_sides(loss, train, test, test_loss, **options)
    train_risk = sides.train_risk(model)
    pairs = GradientPairs(train_risk, sides.test_risk(train_risk), normalised)
    shape, names = (len(sides.test), len(sides.train)), (sides.test.names, sides.train.names)
    provenance = sides.provenance(
        "grad_cos" if normalised else "grad_dot", train_risk.p, train_risk.model.fingerprint()
    )
    if to is None:
        sink = ArraySink(shape, train_risk.dtype)
        _fill(sink, pairs)
        return Scores(sink.finish(), *names, {**provenance, "notes": pairs.notes()})
    with atomic_directory(to) as folder:
        zarr = ZarrSink(folder / "values", shape, train_risk.dtype)
        _fill(zarr, pairs)
        zarr.finish()
        write_meta(folder, *names, {**provenance, "notes": pairs.notes()})
    return Scores.load(to)


def grad_cos(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    train: Any,
    test: Any,
    *,
    test_loss: TestLoss = "loss",
    to: str | os.PathLike[str] | None = None,
    **options: Unpack[ScorerOptions],
) -> Scores:
    """The cosine between gradients, I[j, i] = g_test[j]ᵀ g_train[i] / (‖g_test[j]‖ ‖g_train[i]‖).

    Rows with a large gradient, such as outliers, do not outweigh the others. A row with a zero
    gradient has cosine 0 with all others, and is told of in ``provenance["notes"]``.

    Parameters
    ----------
    model, loss, train, test, test_loss, to, **options
        As for `grad_dot`.

    Returns
    -------
    Scores
        ``values`` (m, n), between −1 and 1.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.5], [0.0]])
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> test = torch.tensor([[1.0]]), torch.tensor([[1.5]])
    >>> grad_cos(model, torch.nn.functional.mse_loss, (x, y), test).values
    tensor([[ 1., -1.]])
    """
    return grad_dot(
        model, loss, train, test, test_loss=test_loss, normalised=True, to=to, **options
    )


def tracin(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    train: Any,
    test: Any,
    *,
    checkpoints: Sequence[Checkpoint],
    learning_rates: Sequence[float] | np.ndarray | Tensor,
    test_loss: TestLoss = "loss",
    normalised: bool = False,
    **options: Unpack[ScorerOptions],
) -> Scores:
    """TracInCP: products of gradients along the training.

        I[j, i] = Σ_k η_k g_test[j](θ_k)ᵀ g_train[i](θ_k)

    with θ_k the weights and η_k the learning rate at checkpoint k. Positive = training row i helps:
    steps on it have lowered the loss of test row j.

    Parameters
    ----------
    model
        A module of the architecture; it is left as it is, its own weights do not matter.
    loss, train, test, test_loss, **options
        As for `grad_dot`.
    checkpoints
        State dicts, files that hold one (``.safetensors``, or written by ``torch.save``), or
        modules.
    learning_rates
        η_k, one for each; times the steps between two checkpoints if these are uneven.
    normalised
        Take the cosine at every checkpoint.

    Returns
    -------
    Scores
        ``values`` (m, n), in memory: ``scores.save(path)`` writes them.

    Raises
    ------
    ValueError
        If names or shapes of a checkpoint do not match the model's, or there is not one learning
        rate for each. Nothing has been computed then.

    References
    ----------
    G. Pruthi et al., *Estimating training data influence by tracing gradient descent*, NeurIPS
    2020, §3.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.5], [0.0]])
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> states = [{"weight": torch.tensor([[w]])} for w in (1.0, 2.0)]
    >>> test = torch.tensor([[1.0]]), torch.tensor([[1.5]])
    >>> loss = torch.nn.functional.mse_loss  # gradients −1 and 2, then 1 and 4
    >>> rates = [0.1, 0.01]
    >>> tracin(model, loss, (x, y), test, checkpoints=states, learning_rates=rates).values
    tensor([[ 0.1100, -0.1600]])
    """
    loaded = Checkpoints(model, checkpoints)
    rates = [float(rate) for rate in learning_rates]
    if len(rates) != len(loaded):
        raise ValueError(
            f"expected one learning rate for each of {len(loaded)} checkpoints; got {len(rates)}"
        )
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ValueError(f"expected finite learning rates of at least 0; got {rates}")
    sides = make_sides(loss, train, test, test_loss, **options)
    total: Tensor | None = None
    fingerprints: list[str] = []
    notes: list[str] = []
    p, dtype = 0, None
    steps = zip(loaded, rates, strict=True)
    for copied, rate in tqdm(steps, desc="checkpoints", total=len(rates), delay=2, disable=None):
        train_risk = sides.train_risk(copied)
        pairs = GradientPairs(train_risk, sides.test_risk(train_risk), normalised)
        sink = ArraySink((len(sides.test), len(sides.train)), train_risk.dtype)
        _fill(sink, pairs)
        part = sink.finish().to(wide(train_risk.dtype, train_risk.device)).mul_(rate)
        total = part if total is None else total.add_(part)
        fingerprints.append(train_risk.model.fingerprint())
        notes += [f"checkpoint {len(fingerprints) - 1}: {note}" for note in pairs.notes()]
        p, dtype = train_risk.p, train_risk.dtype
    assert total is not None
    provenance = {
        **sides.provenance("tracin", p, fingerprints),
        "learning_rates": rates,
        "normalised": normalised,
        "notes": notes,
    }
    return Scores(total.to(dtype), sides.test.names, sides.train.names, provenance)


def _fill(sink: ArraySink | ZarrSink, pairs: GradientPairs) -> None:
    total = pairs.train.n * pairs.test.n
    with tqdm(total=total, desc="scores", unit="pair", delay=2, disable=None, leave=False) as bar:
        for rows, columns, block in pairs.blocks():
            sink.write(rows, columns, block)
            bar.update(block.numel())
