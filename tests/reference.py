"""Slow, obvious twins in float64: one row at a time, matrices written out, inverses by inv.

Everything here is for a model of a few hundred parameters and a dozen rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from cases import Case


def to_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@dataclass
class Reference:
    """A case in float64, differentiated row by row with plain autograd."""

    case: Case

    def __post_init__(self) -> None:
        self.known: dict[str, Tensor] = {}
        self.model = copy.deepcopy(self.case.model).double().eval()
        self.theta = [p for p in self.model.parameters() if p.requires_grad]
        self.train = tree_map(to_double, self.case.train)
        self.test = tree_map(to_double, self.case.test)

    def row(self, data: Any, i: int) -> Any:
        return tree_map(lambda leaf: leaf[i : i + 1], data)

    def output(self, batch: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
            return self.case.forward(self.model, batch)

    def row_loss(self, batch: Any) -> Tensor:
        return self.case.loss(self.output(batch), self.case.target(batch)).sum()

    def losses(self, data: Any, n: int) -> Tensor:
        return torch.stack([self.row_loss(self.row(data, i)).detach() for i in range(n)])

    def flat_grad(self, value: Tensor, create_graph: bool = False) -> Tensor:
        grads = torch.autograd.grad(
            value, self.theta, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        filled = [
            torch.zeros_like(p) if g is None else g for g, p in zip(grads, self.theta, strict=True)
        ]
        return torch.cat([g.reshape(-1) for g in filled])

    def gradients(self, data: Any, n: int) -> Tensor:
        """G, (n, p)."""
        rows = [self.flat_grad(self.row_loss(self.row(data, i))) for i in range(n)]
        return torch.stack(rows)

    def hessian(self) -> Tensor:
        """Row after row of the matrix of second derivatives of the mean loss."""
        n = self.case.n
        loss = sum(self.row_loss(self.row(self.train, i)) for i in range(n)) / n
        grad = self.flat_grad(loss, create_graph=True)
        rows = [self.flat_grad(g) if g.requires_grad else torch.zeros_like(grad) for g in grad]
        return torch.stack(rows).detach()

    def jacobian(self, i: int) -> tuple[Tensor, Tensor]:
        """The output of row i (1, …), and its Jacobian (o, p)."""
        output = self.output(self.row(self.train, i))
        rows = [self.flat_grad(z) for z in output.reshape(-1)]
        return output.detach(), torch.stack(rows)

    def output_hessian(self, i: int, output: Tensor) -> Tensor:
        """∂²ℓ/∂f², (o, o)."""
        target = self.case.target(self.row(self.train, i))

        def loss(flat: Tensor) -> Tensor:
            return self.case.loss(flat.reshape(output.shape), target).sum()

        return torch.autograd.functional.hessian(loss, output.reshape(-1))

    def ggn(self) -> Tensor:
        """1/n Σ Jᵀ H J."""
        total = torch.zeros(())
        for i in range(self.case.n):
            output, jacobian = self.jacobian(i)
            total = total + jacobian.T @ self.output_hessian(i, output) @ jacobian
        return total / self.case.n

    def empirical_fisher(self) -> Tensor:
        """1/n Σ g gᵀ."""
        gradients = self.gradients(self.train, self.case.n)
        return gradients.T @ gradients / self.case.n

    def curvature(self, kind: str) -> Tensor:
        if kind not in self.known:
            self.known[kind] = self._curvature(kind)
        return self.known[kind]

    def _curvature(self, kind: str) -> Tensor:
        return {
            "hessian": self.hessian,
            "ggn": self.ggn,
            "fisher": self.ggn,
            "fisher-empirical": self.empirical_fisher,
        }[kind]()

    def influence(self, kind: str, damping: float) -> Tensor:
        """I[j, i] = g_test[j]ᵀ (C + λI)⁻¹ g_train[i]."""
        curvature = self.curvature(kind)
        inverse = torch.linalg.inv(curvature + damping * torch.eye(len(curvature)).double())
        test = self.gradients(self.test, self.case.m)
        return test @ inverse @ self.gradients(self.train, self.case.n).T

    def perturbation(self, kind: str, damping: float) -> Tensor:
        """∂I[j, i]/∂x_i by differentiating g_test[j]ᵀ (C + λI)⁻¹ g(x) at every x_i."""
        curvature = self.curvature(kind)
        inverse = torch.linalg.inv(curvature + damping * torch.eye(len(curvature)).double())
        solved = self.gradients(self.test, self.case.m) @ inverse  # (m, p)
        lines = []
        for i in range(self.case.n):
            x = self.case.features(self.row(self.train, i)).clone().requires_grad_()
            loss = self.row_loss(self.case.with_features(self.row(self.train, i), x))
            gradient = self.flat_grad(loss, create_graph=True)
            lines.append(
                torch.stack(
                    [torch.autograd.grad(s @ gradient, x, retain_graph=True)[0][0] for s in solved]
                )
            )
        return torch.stack(lines, dim=1)  # (m, n, *x)


@dataclass
class Captured:
    """One call of a layer for one row: ã (s, i) and g (k, s, o) for each group of outputs."""

    a: list[Tensor]
    g: list[Tensor]


@dataclass
class KroneckerReference:
    """K-FAC and EK-FAC by `torch.kron`, one row at a time, and the exact GGN for what has none."""

    case: Case

    def __post_init__(self) -> None:
        self.reference = Reference(self.case)
        self.model = self.reference.model
        self.starts: dict[int, int] = {}
        start = 0
        for p in self.reference.theta:
            self.starts[id(p)] = start
            start += p.numel()
        self.size = start

    def sites(self) -> list[tuple[list[nn.Module], list[str]]]:
        """Layers that hold the same parameters, and which of these are in θ."""
        owners: dict[tuple[int, str], list[nn.Module]] = {}
        for module in self.model.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                for name, p in module.named_parameters():
                    if id(p) in self.starts:
                        owners.setdefault((id(p), name), []).append(module)
        joined: dict[tuple[int, ...], tuple[list[nn.Module], list[str]]] = {}
        for (_, name), modules in owners.items():
            joined.setdefault(tuple(map(id, modules)), (modules, []))[1].append(name)
        return list(joined.values())

    def patches(self, module: nn.Module, a: Tensor) -> Tensor:
        """What every output is made of, (o, s, i): its derivative by the weight."""
        weight = module.weight.detach().requires_grad_()
        if isinstance(module, nn.Linear):
            z = (a @ weight.T).flatten(0, -2).T
        else:
            z = module._conv_forward(a, weight, None)[0].flatten(1)
        lines = [
            torch.autograd.grad(z[o, s], weight, retain_graph=True)[0][o].flatten()
            for o in range(z.shape[0])
            for s in range(z.shape[1])
        ]
        return torch.stack(lines).unflatten(0, z.shape)

    def captured(
        self, modules: list[nn.Module], names: list[str], i: int, roots: Tensor
    ) -> list[Captured]:
        """The calls of these layers for row i."""
        seen: list[tuple[nn.Module, Tensor, Tensor]] = []
        handles = [
            m.register_forward_hook(
                lambda m, args, z: seen.append((m, args[0].detach(), z)), prepend=True
            )
            for m in modules
        ]
        output = self.reference.output(self.reference.row(self.reference.train, i)).flatten()
        for handle in handles:
            handle.remove()
        found: list[Captured] = []
        for module, a, z in seen:
            g = torch.stack(
                [torch.autograd.grad(output, z, root, retain_graph=True)[0] for root in roots]
            )
            g = g.flatten(1, -2) if isinstance(module, nn.Linear) else g[:, 0].flatten(2).mT
            patches = self.patches(module, a)  # (o, s, i)
            q = getattr(module, "groups", 1)
            o = patches.shape[0] // q
            parts = []
            for group in range(q):
                own = [patches[group * o]] if "weight" in names else []
                own += [torch.ones(patches.shape[1], 1).double()] if "bias" in names else []
                parts.append(torch.cat(own, 1))
            found.append(Captured(parts, list(g.split(o, dim=2))))
        return found

    def entries(self, module: nn.Module, names: list[str]) -> Tensor:
        """Where in θ weight and bias are, (q, o, i)."""
        q = getattr(module, "groups", 1)
        parts = [
            (self.starts[id(p)] + torch.arange(p.numel())).view(q, len(p) // q, -1)
            for p in (getattr(module, name) for name in sorted(names, reverse=True))
        ]
        return torch.cat(parts, dim=2)

    def roots(self, i: int) -> Tensor:
        output, _ = self.reference.jacobian(i)
        values, vectors = torch.linalg.eigh(self.reference.output_hessian(i, output))
        return (vectors * values.clamp(min=0).sqrt()).T

    def dense(self, corrected: bool, fisher: str = "exact") -> Tensor:
        """C (p, p)."""
        n = self.case.n
        out = torch.zeros(self.size, self.size).double()
        rest = torch.ones(self.size, dtype=torch.bool)
        if fisher == "exact":
            roots, exact = [self.roots(i) for i in range(n)], self.reference.ggn()
        else:
            exact = self.reference.empirical_fisher()
            roots = [self.slope(i)[None] for i in range(n)]
        for modules, names in self.sites():
            rows = [self.captured(modules, names, i, roots[i]) for i in range(n)]
            if not rows[0]:
                continue
            for group, index in enumerate(self.entries(modules[0], names)):
                a = [torch.cat([call.a[group] for call in calls]) for calls in rows]
                g = [torch.cat([call.g[group] for call in calls], 1) for calls in rows]
                at = index.flatten()
                out[at[:, None], at] = one_layer(a, g, corrected)
                rest[at] = False
        owner: dict[int, nn.Module] = {}
        for module in self.model.modules():
            for p in module.parameters(recurse=False):
                owner.setdefault(id(p), module)
        for module in dict.fromkeys(owner.values()):
            own = [p for p in module.parameters(recurse=False) if id(p) in self.starts]
            own = [p for p in own if owner[id(p)] is module and rest[self.starts[id(p)]]]
            if own:
                at = torch.cat([self.starts[id(p)] + torch.arange(p.numel()) for p in own])
                out[at[:, None], at] = exact[at[:, None], at]
        return out

    def slope(self, i: int) -> Tensor:
        """∂ℓ/∂f for row i, (o,)."""
        batch = self.reference.row(self.reference.train, i)
        output = self.reference.output(batch).detach().requires_grad_()
        loss = self.case.loss(output, self.case.target(batch)).sum()
        return torch.autograd.grad(loss, output)[0].flatten()


def one_layer(a: list[Tensor], g: list[Tensor], corrected: bool) -> Tensor:
    """K-FAC or EK-FAC of rows with ã (s, i) and g (k, s, o)."""
    n = len(a)
    A = sum(x.T @ x for x in a) / (n * len(a[0]))
    G = sum(y.flatten(0, 1).T @ y.flatten(0, 1) for y in g) / n
    if not corrected:
        return torch.kron(G, A)
    basis = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
    gradients = [one.T @ x for x, y in zip(a, g, strict=True) for one in y]  # (o, i) per root
    values = sum((basis.T @ gradient.flatten()).square() for gradient in gradients) / n
    return basis @ torch.diag(values) @ basis.T
