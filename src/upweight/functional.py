"""A torch module as a pure function of the parameters that are up for influence."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

__all__ = ["FunctionalModel"]

Parameters = dict[str, Tensor]


class FunctionalModel:
    """f(θ, batch) for the chosen parameters θ of a module; everything else stays fixed.

    Parameters
    ----------
    model
        The trained module. It is never changed.
    forward
        ``forward(model, batch) → output``. The default takes batches ``(x, y)`` and calls
        ``model(x)``, or ``model(*x)`` and ``model(**x)`` for a tuple and a dict.
    parameters
        Which parameters are θ: name patterns as in `fnmatch` (``"head.*"``), one or several. The
        default is every parameter with ``requires_grad``. A tied weight counts once.

    Attributes
    ----------
    names, shapes, sizes
        Of the chosen parameters, in the order of ``model.named_parameters()``.
    size
        p, their total number.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        parameters: str | Sequence[str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module; got {type(model).__name__}")
        self.model = model
        self._adapter = _Adapter(model, forward or default_forward)
        chosen = _select(model, parameters)
        self.names = tuple(chosen)
        self.shapes = tuple(p.shape for p in chosen.values())
        self.sizes = tuple(p.numel() for p in chosen.values())
        self.size = sum(self.sizes)
        self.dtypes = tuple(p.dtype for p in chosen.values())
        devices = {p.device for p in model.parameters()}
        if len(devices) > 1:
            raise ValueError(
                f"expected a model on one device; its parameters are on {sorted(map(str, devices))}"
            )
        self.device = devices.pop()
        self.dtype = max(self.dtypes, key=lambda d: torch.finfo(d).bits)
        self.total = sum(p.numel() for p in model.parameters())

    @property
    def vector_dtype(self) -> torch.dtype:
        """The dtype of flat vectors: that of the parameters, but at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def parameters(self) -> Parameters:
        """θ as it is now, by name; no copy."""
        found = dict(self.model.named_parameters())
        return {name: found[name].detach() for name in self.names}

    def __call__(self, parameters: Parameters, batch: Any) -> Any:
        """The output for a batch, with these values for the chosen parameters.

        A model in half precision gets its batch in half precision; what follows has float32.
        """
        state = {f"model.{name}": p for name, p in self.model.named_parameters()}
        state |= {f"model.{name}": b for name, b in self.model.named_buffers()}
        state = {name: tensor.detach() for name, tensor in state.items()}
        state |= {f"model.{name}": p for name, p in parameters.items()}
        if self.dtype != self.vector_dtype:
            batch = cast_floats(batch, self.dtype)
        output = functional_call(self._adapter, state, (batch,))
        if isinstance(output, Tensor) and output.is_floating_point():
            return output.to(self.vector_dtype)
        return output

    def flatten(self, tree: Parameters) -> Tensor:
        """Tensors (…, *shape) by name → one tensor (…, p)."""
        parts = [
            tree[name].flatten(tree[name].ndim - len(shape)).to(self.vector_dtype)
            if shape
            else tree[name][..., None].to(self.vector_dtype)
            for name, shape in zip(self.names, self.shapes, strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def unflatten(self, vectors: Tensor) -> Parameters:
        """One tensor (…, p) → tensors (…, *shape) by name, in the dtypes of the parameters."""
        pieces = vectors.split(self.sizes, dim=-1)
        return {
            name: piece.reshape(*vectors.shape[:-1], *shape).to(dtype)
            for name, piece, shape, dtype in zip(
                self.names, pieces, self.shapes, self.dtypes, strict=True
            )
        }

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """Evaluation mode and operations that can be differentiated twice; the state comes back."""
        modes = [(module, module.training) for module in self.model.modules()]
        fastpath = torch.backends.mha.get_fastpath_enabled()
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            # The fused attention kernels have no second derivative, the fused recurrent ones not
            # even a forward-mode rule: ask for the plain ones (torch 2.13).
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(isinstance(module, nn.RNNBase) for module in self.model.modules()):
                stack.enter_context(_disabled(torch.backends.mkldnn))
                stack.enter_context(_disabled(torch.backends.cudnn))
            try:
                torch.backends.mha.set_fastpath_enabled(False)
                self.model.eval()
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fastpath)
                for module, mode in modes:
                    module.training = mode

    def fingerprint(self) -> str:
        """A digest of every parameter and buffer: tells whether the model has changed."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in self.model.state_dict().items():
            if isinstance(tensor, Tensor):
                flat = tensor.detach().contiguous().flatten()
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(flat.view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()


def cast_floats(batch: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of a batch in this dtype; everything else as it is."""
    return tree_map(
        lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, batch
    )


@contextmanager
def _disabled(backend: Any) -> Generator[None]:
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before


class _Adapter(nn.Module):
    """Lets `functional_call` run a user's forward function, not only ``model.forward``."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, batch: Any) -> Any:
        return self._forward(self.model, batch)


def default_forward(model: nn.Module, batch: Any) -> Any:
    """model(x) for a batch (x, y); x may be a tensor, a tuple or a dict."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
        raise TypeError(
            f"expected batches (x, y); got a {what}. Say how to use them: "
            "forward=lambda model, batch: model(…), target=lambda batch: …"
        )
    x = batch[0]
    if isinstance(x, dict):
        return model(**x)
    if isinstance(x, tuple | list):
        return model(*x)
    return model(x)


def default_target(batch: Any) -> Any:
    """y for a batch (x, y)."""
    return batch[1]


def _select(model: nn.Module, patterns: str | Sequence[str] | None) -> Parameters:
    named = dict(model.named_parameters())
    if patterns is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        if not chosen:
            raise ValueError(
                "expected a model with trainable parameters; "
                + (
                    f"none of its {len(named)} parameters has requires_grad. Name the ones to use: "
                    'parameters="head.*"'
                    if named
                    else "it has no parameters at all"
                )
            )
        return _floating(chosen)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in named):
            raise ValueError(
                f"no parameter matches {pattern!r}; the model has: {', '.join(named) or 'none'}"
            )
    return _floating(
        {n: p for n, p in named.items() if any(fnmatch.fnmatchcase(n, q) for q in patterns)}
    )


def _floating(chosen: Mapping[str, Tensor]) -> Parameters:
    for name, parameter in chosen.items():
        if not parameter.is_floating_point():
            raise TypeError(f"expected real floating parameters; {name} is {parameter.dtype}")
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"parameter {name} is not finite (NaN or inf): the training diverged")
    return dict(chosen)
