"""A torch module as a pure function of the parameters that are up for influence."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
        self._places = _places(model)
        chosen = _select(model, parameters)
        self._choose(chosen)
        devices = {p.device for p in model.parameters()}
        if len(devices) > 1:
            raise ValueError(
                f"expected a model on one device; its parameters are on {sorted(map(str, devices))}"
            )
        self.device = devices.pop()
        self.dtype = max(self.dtypes, key=lambda d: torch.finfo(d).bits)

    def _choose(self, chosen: Parameters) -> None:
        self.names = tuple(chosen)
        self.shapes = tuple(p.shape for p in chosen.values())
        self.sizes = tuple(p.numel() for p in chosen.values())
        self.size = sum(self.sizes)
        self.dtypes = tuple(p.dtype for p in chosen.values())

    def restricted(self, names: Collection[str]) -> FunctionalModel:
        """The same function of some of the parameters alone; the others are fixed."""
        unknown = sorted(set(names) - set(self.names))
        if unknown:
            raise ValueError(f"expected parameters among {list(self.names)}; got {unknown}")
        other = copy.copy(self)
        found = dict(self.model.named_parameters())
        other._choose({name: found[name] for name in self.names if name in names})
        return other

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
        state: Parameters = {}
        for place in self._places:
            tensor = parameters.get(place.parameter)
            if tensor is None:
                tensor = getattr(place.module, place.attribute).detach()
                # buffers as copies: a forward function may count its calls in one
                tensor = tensor if place.fixed else tensor.clone()
            state[place.path] = tensor
        if self.dtype != self.vector_dtype:
            batch = cast_floats(batch, self.dtype)
        # With tie_weights=True, a module that goes by two names comes back with plain tensors in
        # place of its parameters (torch 2.13).
        output = functional_call(self._adapter, state, (batch,), tie_weights=False)
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

    def moved(self, step: Tensor) -> Parameters:
        """θ + step by name, for a flat step (p,)."""
        steps = self.unflatten(step[None])  # a scalar parameter has no shape to split off
        return {name: value + steps[name][0] for name, value in self.parameters().items()}

    @contextmanager
    def evaluating(self, *, twice: bool = True) -> Generator[None]:
        """Evaluation mode and operations that can be differentiated twice; the state comes back.

        Without `twice`, the fused kernels of attention may be used: they can be differentiated
        once, in reverse mode, for one cotangent.
        """
        fastpath = torch.backends.mha.get_fastpath_enabled()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            # The fused attention kernels have no second derivative, the fused recurrent ones not
            # even a forward-mode rule: ask for the plain ones (torch 2.13).
            if twice:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(isinstance(module, nn.RNNBase) for module in self.model.modules()):
                stack.enter_context(_disabled(torch.backends.mkldnn))
                stack.enter_context(_disabled(torch.backends.cudnn))
            stack.enter_context(_restored(self.model))
            try:
                torch.backends.mha.set_fastpath_enabled(False)
                self.model.eval()
                for module in self.model.modules():
                    if isinstance(module, nn.Embedding):
                        stack.enter_context(_plain_embedding(module))
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fastpath)

    def fingerprint(self) -> str:
        """A digest of every parameter and buffer: tells whether the model has changed."""
        digest = hashlib.blake2b(digest_size=16)
        # not state_dict(), which leaves out the buffers that are not persistent
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        for name, tensor in named:
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


@contextmanager
def _restored(model: nn.Module) -> Generator[None]:
    """What a forward function leaves behind in its modules is undone: modes, attributes, buffers.

    A forward function may count its calls in a buffer, keep an activation as an attribute (which
    would be a dead wrapper of `torch.func` here), recompute a weight in a hook, or, as an embedding
    with ``max_norm``, rewrite a parameter.
    """
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    renormed = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]
    tensors = [
        (tensor, tensor._version, tensor.detach().clone())
        for tensor in (*model.buffers(), *renormed)
        if not tensor.is_inference()
    ]
    try:
        yield
    finally:
        for module, before in attributes:
            now = module.__dict__
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)
        with torch.no_grad():
            for tensor, version, before in tensors:
                if tensor._version != version:
                    tensor.copy_(before)


@contextmanager
def _plain_embedding(module: nn.Embedding) -> Generator[None]:
    """Make the derivatives of an embedding those of its output, in forward mode too.

    Reverse mode scales by the frequency in the batch (``scale_grad_by_freq``), which is no
    derivative and depends on the batch, and leaves out the row of ``padding_idx``, which forward
    mode does not (torch 2.13). `_restored` brings the attributes back.
    """
    module.scale_grad_by_freq = False
    module.sparse = False
    pad, weight = module.padding_idx, module.weight
    if pad is None:
        yield
        return

    def constant(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.where((arguments[0] == pad)[..., None], weight[pad].to(output), output)

    weight = weight.detach()
    hook = module.register_forward_hook(constant, prepend=True)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class _Place:
    """Where a module keeps a tensor, and the first name that the tensor goes by in the model."""

    path: str
    module: nn.Module
    attribute: str
    parameter: str
    fixed: bool


def _places(model: nn.Module) -> list[_Place]:
    """Every place once, so that tied weights have several and aliased modules count once."""
    first: dict[int, str] = {}
    found: list[_Place] = []
    for prefix, module in model.named_modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for fixed, owned in ((True, parameters), (False, buffers)):
            for attribute, tensor in owned:
                name = f"{prefix}.{attribute}" if prefix else attribute
                known = first.setdefault(id(tensor), name)
                found.append(_Place(f"model.{name}", module, attribute, known, fixed))
    return found


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
    first = {id(p): name for name, p in named.items()}
    # a tied weight goes by each of its names, and counts under the first
    aliases = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
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
        if not isinstance(pattern, str):
            raise TypeError(
                f"expected name patterns such as 'head.*'; got a {type(pattern).__name__}"
            )
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in aliases):
            raise ValueError(
                f"no parameter matches {pattern!r}; the model has: {', '.join(named) or 'none'}"
            )
    wanted = {
        name
        for alias, name in aliases.items()
        if any(fnmatch.fnmatchcase(alias, pattern) for pattern in patterns)
    }
    return _floating({name: p for name, p in named.items() if name in wanted})


def _floating(chosen: Mapping[str, Tensor]) -> Parameters:
    for name, parameter in chosen.items():
        if not parameter.is_floating_point():
            raise TypeError(f"expected real floating parameters; {name} is {parameter.dtype}")
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"parameter {name} is not finite (NaN or inf): the training diverged")
    return dict(chosen)
