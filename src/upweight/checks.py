"""What is checked before long work starts: that model, loss and rows fit together.

Everything here ends in silence or in an error that says what was expected, what came and what to
do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_map,
    tree_unflatten,
)

from upweight.functional import FunctionalModel
from upweight.losses import RowLoss
from upweight.rows import Rows

if TYPE_CHECKING:
    from upweight.risk import Chunk, EmpiricalRisk

PROBED_ROWS = 8


@dataclass(frozen=True)
class Probe:
    """What a few rows tell of model and loss."""

    row_loss: RowLoss
    output_shape: tuple[int, ...]
    activation_bytes: float


def describe(model: nn.Module) -> str:
    """A module's class and number of parameters."""
    return f"{type(model).__name__} ({sum(p.numel() for p in model.parameters())} parameters)"


def probe(
    model: FunctionalModel,
    loss: Callable[[Any, Any], Tensor],
    rows: Rows,
    prepare: Callable[[Any], Any],
    target: Callable[[Any], Any],
) -> Probe:
    """Run a few rows, spread over the data, and find how the loss is reduced."""
    positions = _probed_positions(rows)
    b = len(positions)
    batch = prepare(rows.take(positions))
    _check_batch(batch, b)
    check_repeatable(rows, prepare)
    for name, leaf in _named_leaves(batch):
        _check_finite(leaf, name, positions)
    with model.evaluating():
        theta = model.parameters()
        output = _forward(model, theta, batch)
        alone = [(i, prepare(rows.take([positions[i]]))) for i in sorted({0, b - 1})]
        _check_output(model, theta, output, batch, alone)
        wanted = target(batch)
        check_labels(loss, wanted, tuple(output.shape[1:]), positions)
        try:
            row_loss = RowLoss(loss, output, wanted)
        except (RuntimeError, IndexError) as error:
            raise ValueError(_explain_loss(error, output, wanted)) from error
        _check_loss_is_of_the_output(model, loss, output, wanted)
        size = _activation_bytes(model, theta, batch) / b
    return Probe(row_loss, tuple(output.shape[1:]), size)


def _probed_positions(rows: Rows) -> list[int]:
    b = min(PROBED_ROWS, len(rows))
    return [i * (len(rows) - 1) // max(1, b - 1) for i in range(b)]


def same_form(rows: Rows, others: Rows) -> bool:
    """Whether single rows of both are alike in structure, shapes and dtypes."""
    return form_of_rows(rows) == form_of_rows(others)


def form_of_rows(rows: Rows) -> tuple[Any, list[Any]]:
    """Structure, shapes and dtypes of a single row."""
    leaves, spec = tree_flatten(rows.batch(0, 1))
    return spec, [
        (leaf.shape[1:], leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves
    ]


def _named_leaves(batch: Any) -> list[tuple[str, Any]]:
    return [(f"batch{keystr(path)}", leaf) for path, leaf in tree_flatten_with_path(batch)[0]]


def _check_batch(batch: Any, b: int) -> None:
    if not any(isinstance(leaf, Tensor) for _, leaf in _named_leaves(batch)):
        raise TypeError(
            "expected a batch of tensors in tuples, lists and dicts; got a "
            f"{type(batch).__name__}. Let the collate_fn of the DataLoader return such a batch"
        )
    for name, leaf in _named_leaves(batch):
        if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] != b):
            raise ValueError(
                f"expected tensors whose first dimension counts rows ({b} here); {name} has shape "
                f"{tuple(leaf.shape)}"
            )


def check_repeatable(rows: Rows, prepare: Callable[[Any], Any]) -> None:
    """Refuse rows that change from one access to the next."""
    positions = _probed_positions(rows)
    once, again = (_named_leaves(prepare(rows.take(positions))) for _ in range(2))
    for (name, a), (_, b) in zip(once, again, strict=True):
        if isinstance(a, Tensor) and not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
            raise ValueError(
                f"expected the same row at every access; {name} differs between two. Switch random "
                "augmentation off: influence is defined for fixed rows"
            )


def _check_finite(leaf: Any, name: str, positions: list[int] | range) -> None:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        bad = (~torch.isfinite(leaf)).flatten(1).any(1) if leaf.ndim > 1 else ~torch.isfinite(leaf)
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            where = (~torch.isfinite(leaf[i])).nonzero().tolist()[:3] if leaf.ndim > 1 else []
            at = f" at position(s) {where}" if where else ""
            raise ValueError(
                f"row {positions[i]} is not finite (NaN or inf): {name}{at}; "
                f"{int(bad.sum())} such row(s) in this batch. Drop or impute them"
            )


def _forward(model: FunctionalModel, theta: Any, batch: Any) -> Any:
    try:
        return model(theta, batch)
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = ", ".join(
            f"{name} {tuple(leaf.shape)} {str(leaf.dtype)[6:]}"
            for name, leaf in _named_leaves(batch)
            if isinstance(leaf, Tensor)
        )
        raise ValueError(f"the model does not take these rows ({shapes}): {error}") from error


def _check_output(
    model: FunctionalModel, theta: Any, output: Any, batch: Any, singles: list[tuple[int, Any]]
) -> None:
    b = singles[-1][0] + 1
    if not isinstance(output, Tensor):
        raise TypeError(
            f"expected the model to return one Tensor; got {type(output).__name__}. Pick the part "
            "that the loss takes: forward=lambda model, batch: model(batch[0])[0]"
        )
    if output.ndim == 0 or output.shape[0] != b:
        raise ValueError(
            f"expected an output whose first dimension counts rows ({b} here); got shape "
            f"{tuple(output.shape)}. A forward= function can move the rows to the front"
        )
    if not bool(torch.isfinite(output).all()):
        raise ValueError("the model's output is not finite (NaN or inf) on finite rows")
    if not torch.equal(output, _forward(model, theta, batch)):
        raise ValueError(
            "expected a deterministic model; two passes over the same rows differ in evaluation "
            "mode. Switch off what is random in its forward function"
        )
    scale = float(output.abs().max()) or 1.0
    tolerance = scale * {2: 5e-2, 4: 1e-3, 8: 1e-9}.get(output.dtype.itemsize, 1e-3)
    for i, one in singles:
        mixed = (
            "expected outputs that do not depend on the other rows of the batch; they do, even in "
            "evaluation mode (BatchNorm without running statistics? Padding that counts?)"
        )
        try:
            alone = model(theta, one)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{mixed}: one row alone is refused: {error}") from error
        if alone.ndim != output.ndim or len(alone) != 1:
            raise ValueError(
                f"expected one row alone to give an output (1, …) like the {b} rows together, "
                f"{tuple(output.shape)}; got {tuple(alone.shape)}. Does the model squeeze() away "
                "the dimension of rows? Use squeeze(-1)"
            )
        # Rows that a collate_fn pads to the longest may be shorter alone.
        both = tuple(
            slice(min(s, t)) for s, t in zip(alone.shape[1:], output.shape[1:], strict=True)
        )
        if alone.numel() and not bool((alone[0][both] - output[i][both]).abs().max() <= tolerance):
            raise ValueError(mixed)


def _check_loss_is_of_the_output(
    model: FunctionalModel, loss: Callable[[Any, Any], Tensor], output: Tensor, target: Any
) -> None:
    """Refuse a loss with a term of its own in θ, which would count in no derivative."""
    found = dict(model.model.named_parameters())
    theta = {name: found[name] for name in model.names if found[name].requires_grad}
    with torch.inference_mode(False), torch.enable_grad():
        value = loss(output.detach().clone(), target)
        if not (theta and value.requires_grad):
            return
        slopes = torch.autograd.grad(value.sum(), list(theta.values()), allow_unused=True)
    used = [name for name, slope in zip(theta, slopes, strict=True) if slope is not None]
    if used:
        raise ValueError(
            "expected a loss of output and target alone; this one uses parameters of the model by "
            f"itself ({', '.join(used[:3])}), as a penalty does. Leave the penalty out: weight "
            "decay goes into the damping"
        )


def _explain_loss(error: Exception, output: Tensor, target: Any) -> str:
    told = (
        f"target {tuple(target.shape)} {str(target.dtype)[6:]}"
        if isinstance(target, Tensor)
        else f"target {type(target).__name__}"
    )
    hint = ""
    if isinstance(target, Tensor) and not target.is_floating_point():
        if target.shape == output.shape:
            hint = ". This loss may want a floating target: y.float()"
        elif target.dtype != torch.int64:
            hint = ". Class labels are int64: y.long()"
        elif target.ndim > 1 and target.shape[-1] == 1:
            hint = ". Class labels are one number per row: squeeze the target, y.squeeze(1)"
        elif output.ndim > 1 and target.numel() and int(target.max()) >= output.shape[1]:
            hint = (
                f". There are {output.shape[1]} classes, labels go from 0 to {output.shape[1] - 1}"
            )
    elif isinstance(target, Tensor) and target.ndim < output.ndim:
        hint = ". For class labels the target must be integer, y.long(); else unsqueeze it"
    return (
        f"the loss does not take output {tuple(output.shape)} {str(output.dtype)[6:]} with {told}: "
        f"{error}{hint}"
    )


def _activation_bytes(model: FunctionalModel, theta: Any, batch: Any) -> float:
    """Bytes that autograd keeps for a backward pass through these rows."""
    # copies: parameters made under torch.inference_mode() cannot require a gradient
    leaves = {name: p.detach().clone().requires_grad_() for name, p in theta.items()}
    owned = {p.data_ptr() for p in leaves.values()}
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        if tensor.data_ptr() not in owned:
            kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(leaves, batch)
        slopes = (
            torch.autograd.grad(output.sum(), list(leaves.values()), allow_unused=True)
            if output.requires_grad
            else ()
        )
    if all(slope is None for slope in slopes):
        raise ValueError(
            "the model's output does not depend on the chosen parameters, so every score would be "
            "zero. Is its forward function under torch.no_grad(), or does forward= use another "
            "model than the one it is given?"
        )
    size = sum(leaf.nbytes for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor))
    return float(kept + size + 4 * output.nbytes)


def check_rows(risk: EmpiricalRisk) -> Tensor:
    """ℓ_i for every row, (n,); the first row that is at fault is named."""
    losses: list[Tensor] = []
    with risk.model.evaluating(twice=False):
        theta = risk.model.parameters()
        for chunk in risk.chunks():
            positions = range(chunk.start, chunk.stop)
            for name, leaf in _named_leaves(chunk.batch):
                _check_finite(leaf, name, positions)
            check_labels(risk.loss, risk.target(chunk.batch), risk.output_shape, positions)
            try:
                output = risk.model(theta, chunk.batch)
                losses.append(risk.row_loss(output, risk.target(chunk.batch)))
            except (RuntimeError, IndexError, ValueError) as error:
                raise ValueError(_name_row(risk, theta, chunk, error)) from error
            bad = (~torch.isfinite(losses[-1])).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"row {positions[bad[0]]}: the loss is {float(losses[-1][bad[0]])}; "
                    f"{len(bad)} such row(s). Influence needs finite losses"
                )
            # The probed rows may all be of one class: a weighted mean shows only with two.
            risk.row_loss.check(output, risk.target(chunk.batch), losses[-1])
    return torch.cat(losses) if losses else torch.empty(0, dtype=risk.dtype, device=risk.device)


def check_labels(
    loss: Any, target: Any, output_shape: tuple[int, ...], positions: Sequence[int]
) -> None:
    """Class labels out of range end a CUDA process for good, so they are looked for beforehand."""
    crossentropy = loss in (nn.functional.cross_entropy, nn.functional.nll_loss) or isinstance(
        loss, nn.CrossEntropyLoss | nn.NLLLoss
    )
    if not crossentropy or not isinstance(target, Tensor) or target.is_floating_point():
        return
    # The number of positions may differ between batches, where a collate_fn pads to the longest.
    if target.ndim != len(output_shape):
        raise ValueError(
            "expected one class label per row for outputs "
            f"(b, {', '.join(map(str, output_shape))}); got a target of shape "
            f"(b, {', '.join(map(str, target.shape[1:]))})"
            + (". Squeeze it: y.squeeze(1)" if target.shape[1:] == (1,) else "")
        )
    classes = output_shape[0]
    ignored = getattr(loss, "ignore_index", -100)
    bad = ((target < 0) | (target >= classes)) & (target != ignored)
    bad = bad.flatten(1).any(1) if bad.ndim > 1 else bad
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"row {positions[i]}: label {target[i].tolist()} is out of range; the model has "
            f"{classes} outputs, so labels go from 0 to {classes - 1}"
        )


def _name_row(risk: EmpiricalRisk, theta: Any, chunk: Chunk, error: Exception) -> str:
    for i in range(len(chunk)):
        one = tree_map(
            lambda leaf: leaf[i : i + 1] if isinstance(leaf, Tensor) else leaf,  # noqa: B023
            chunk.batch,
        )
        try:
            risk.batch_losses(theta, one)
        except (RuntimeError, IndexError, ValueError) as alone:
            return f"row {chunk.start + i}: {alone}"
    return f"rows {chunk.start} to {chunk.stop - 1} together: {error}"


def find_features(
    batch: Any, target: Any, features: Callable[[Any], Tensor] | None
) -> tuple[Callable[[Any], Tensor], Callable[[Any, Tensor], Any]]:
    """How to get the features out of a batch, and how to put changed ones back."""
    leaves, _ = tree_flatten(batch)
    paths = [name for name, _ in _named_leaves(batch)]
    if features is not None:
        wanted = features(batch)
        found = [i for i, leaf in enumerate(leaves) if leaf is wanted]
        if not found:
            raise ValueError(
                f"expected features(batch) to return one of the batch's tensors: {', '.join(paths)}"
            )
    else:
        targets = {id(leaf) for leaf in tree_flatten(target)[0]}
        found = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and id(leaf) not in targets
        ]
    if len(found) > 1:
        names = ", ".join(paths[i] for i in found)
        raise TypeError(
            f"expected one tensor of features; the batch has {names}. Choose with "
            "features=lambda batch: …"
        )
    if not found or not leaves[found[0]].is_floating_point():
        told = ", ".join(
            f"{p} is {str(leaf.dtype)[6:]}"
            for p, leaf in zip(paths, leaves, strict=True)
            if isinstance(leaf, Tensor)
        )
        raise TypeError(
            f"mode='perturbation' needs real-valued features to differentiate by; {told}. Integer "
            "inputs such as token ids have no small change: use mode='up'"
        )
    at = found[0]

    def get(batch: Any) -> Tensor:
        return tree_flatten(batch)[0][at]

    def put(batch: Any, x: Tensor) -> Any:
        leaves, spec = tree_flatten(batch)
        leaves[at] = x
        return tree_unflatten(leaves, spec)

    return get, put
