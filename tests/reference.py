"""Slow, obvious twins in float64: one row at a time, matrices written out, inverses by inv.

Everything here is for a model of a few hundred parameters and a dozen rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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
