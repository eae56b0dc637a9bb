"""What goes into a layer, as far as its weight and bias are concerned, by the type of the layer.

    z = W ã                ã = [a, 1]

a is the input of a linear layer, the patch under the kernel of a convolution, the unit vector of a
token in an embedding. A normalisation has a group of one output for each channel, whose a is the
normalised input.

Letters: b rows in a chunk, k cotangents, s positions, q groups, each with o outputs and i columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from upweight.curvature.onehot import OneHot

__all__ = ["Call", "Form", "counts", "fits", "form_of", "inputs", "slopes"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
# "transposed" is a linear layer with a weight (i, o); "last" and "second" are normalisations by
# where their channels are
Form = Literal["linear", "transposed", "conv", "embedding", "last", "second"]


@dataclass(frozen=True)
class Call:
    """One call of a layer: its input, with rows first, and where derivatives by its output are.

    Attributes
    ----------
    shape
        Of the output.
    edge
        Of the output in the graph of derivatives; None for one that is not in it.
    """

    module: nn.Module
    a: Tensor
    shape: tuple[int, ...]
    edge: GradientEdge | None


def form_of(module: nn.Module) -> Form | None:
    """How a layer uses its weight and bias; None for types that are not known here."""
    kind = type(module).__name__
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return "last"
    if isinstance(module, nn.GroupNorm | BatchNorm):
        return "second"
    if not isinstance(weight, Tensor):
        return None
    if kind == "Conv1D" and hasattr(module, "nf") and weight.ndim == 2:  # of transformers
        return "transposed"
    if kind.endswith("RMSNorm") and weight.ndim == 1 and _epsilon(module) is not None:
        return "last"
    return None


def counts(module: Any, form: Form) -> tuple[int, int, int]:
    """q, o and i of a layer, without the column of its bias."""
    shape = module.weight.shape
    if form in ("last", "second"):
        return shape.numel(), 1, 1
    if form in ("transposed", "embedding"):
        return 1, shape[1], shape[0]
    q = int(getattr(module, "groups", 1))
    return q, shape[0] // q, shape[1:].numel()


def fits(module: Any, form: Form, a: Tensor) -> bool:
    """Whether an input has a first dimension that may be that of the rows."""
    if form == "embedding":
        return a.ndim > 0 and not a.is_floating_point()
    least = module.weight.ndim if form in ("conv", "last") else 1
    return a.ndim == least if form == "conv" else a.ndim > least


def inputs(call: Call, form: Form, b: int, dtype: torch.dtype) -> Tensor | OneHot:
    """The a of every output, (b, s, q, i)."""
    module: Any = call.module
    q, o, i = counts(module, form)
    if form == "embedding":
        return OneHot(call.a.reshape(b, -1), module.num_embeddings)
    with torch.no_grad():
        a = call.a
        if form == "conv":
            a = _patches(a, module)
        elif form == "last":
            a = _normalised(a, module)
        elif form == "second":
            a = _by_channel(a, module).transpose(1, 2)  # (rows, positions, q)
    positions = torch.Size(call.shape).numel() // (b * q * o)
    return a.reshape(b, positions, q, i).to(dtype)


def slopes(call: Call, form: Form, g: Tensor, b: int) -> Tensor:
    """g (k, b, s, q, o), from derivatives (k, *z) by the output of a call."""
    q, o, _ = counts(call.module, form)
    if form in ("conv", "second") and g.ndim > 3:
        g = g.flatten(3).transpose(2, 3)  # channels last
    return g.reshape(len(g), b, -1, q, o)


def _patches(a: Tensor, conv: Conv) -> Tensor:
    """What every output of a convolution is made of, (rows, …positions, q, i)."""
    d = len(conv.kernel_size)
    for axis, kernel, stride, dilation in zip(
        range(2, 2 + d), conv.kernel_size, conv.stride, conv.dilation, strict=True
    ):
        if axis == 2:
            a = _padded(a, conv)
        a = a.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    # (rows, q, c/q, *positions, *kernel) -> (rows, *positions, q, c/q, *kernel)
    a = a.unflatten(1, (conv.groups, -1)).movedim((1, 2), (1 + d, 2 + d))
    return a.flatten(2 + d)


def _padded(a: Tensor, conv: Conv) -> Tensor:
    sides: list[int] = []  # F.pad begins with the last dimension
    for at in reversed(range(len(conv.kernel_size))):
        if isinstance(conv.padding, str):
            whole = conv.dilation[at] * (conv.kernel_size[at] - 1) if conv.padding == "same" else 0
            sides += [whole // 2, whole - whole // 2]
        else:
            sides += [conv.padding[at]] * 2
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(a, sides, mode=mode) if any(sides) else a


def _epsilon(module: nn.Module) -> float | None:
    for name in ("eps", "variance_epsilon"):
        found = getattr(module, name, None)
        if isinstance(found, float):
            return found
    return None


def _normalised(a: Tensor, module: Any) -> Tensor:
    """The input of a scale in the last dimensions."""
    shape = module.weight.shape
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(a, shape, None, None, module.eps)
    return F.rms_norm(a, shape, None, _epsilon(module))


def _by_channel(a: Tensor, module: Any) -> Tensor:
    """The input of a scale in the second dimension, (rows, q, positions)."""
    if isinstance(module, nn.GroupNorm):
        a = F.group_norm(a, module.num_groups, None, None, module.eps)
    else:
        own = (module.running_mean, module.running_var)
        a = F.batch_norm(a, *own, None, None, own[0] is None, 0.0, module.eps)
    return a.reshape(*a.shape[:2], -1)
