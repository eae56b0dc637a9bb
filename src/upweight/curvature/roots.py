"""Which roots of the loss's curvature in the output stand behind Kronecker factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from upweight.curvature import form as forms
from upweight.curvature.exact import GGN, Fisher
from upweight.losses import Categorical, OutputDistribution, output_distribution
from upweight.risk import EmpiricalRisk

__all__ = ["Roots"]


@dataclass(frozen=True)
class Roots:
    """Which roots of the loss's curvature in the output."""

    fisher: Literal["exact", "sampled", "empirical"]
    samples: int
    seed: int
    distribution: OutputDistribution | None

    def told(self, risk: EmpiricalRisk) -> str:
        """What the roots of a few rows are like: another loss or distribution has others."""
        few = risk.with_rows(risk.rows.subset(range(min(8, risk.n))))
        few.batch_size = None
        chunk = next(iter(few.chunks()))
        with few.model.evaluating():
            output = few.model(few.model.parameters(), chunk.batch)
            roots = self.form(few).roots(chunk, output)
        return f"{float(roots.double().square().mean()):.6g}"

    def form(self, risk: EmpiricalRisk) -> forms.OutputForm:
        """The form of a GGN or Fisher matrix."""
        if self.fisher not in ("exact", "sampled", "empirical"):
            raise ValueError(
                f"expected fisher='exact', 'sampled' or 'empirical'; got {self.fisher!r}"
            )
        labels = self.distribution
        if self.fisher != "exact":
            drawn = {"samples": self.samples, "seed": self.seed}
            return Fisher(risk, self.fisher, distribution=labels, **drawn).form
        outputs = int(torch.Size(risk.output_shape).numel())
        if outputs > forms.ROOT_OUTPUTS:
            raise ValueError(
                f"expected at most {forms.ROOT_OUTPUTS} numbers in the output of a row for "
                f"fisher='exact'; got {outputs}. Use fisher='sampled', with one label per row or "
                "several (samples=)"
            )
        known = output_distribution(risk.loss)
        linear = isinstance(known, Categorical) and known.log_probabilities
        # the GGN is the exact Fisher matrix where both are, and defined for more losses and labels
        if linear or labels is not None:
            return Fisher(risk, distribution=labels).form
        return GGN(risk).form
