"""The mean of scores over several trained models, and how far they agree.

Letters: m test rows, n training rows, M members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from upweight.evaluate.ranks import spearman
from upweight.methods import Influence
from upweight.scores import Scores

__all__ = ["ensemble"]

# Test rows on which the agreement of members is measured, for which they are kept.
SAMPLED = 100


def ensemble(
    members: Iterable[Influence | Callable[[Any], Scores] | Scores], test: Any = None
) -> Scores:
    """The mean of scores over several models, I = 1/M Σ_μ I_μ.

    Scores of one network are noisy, because another seed of the training gives another network; the
    mean over a few is truer, for every method. It says how the rows matter to such models, not to
    one of them.

    Parameters
    ----------
    members
        Fitted `Influence`s, functions ``test → Scores``, or `Scores`. They are taken one by one, so
        a generator needs the memory of one at a time.
    test
        The test rows, for members that are not scores yet.

    Returns
    -------
    Scores
        ``values`` (m, n). ``provenance["members"]`` tells how each came about, and
        ``provenance["agreement"]`` has for each the Spearman correlation with the mean, over the
        training rows, averaged over (at most 100) test rows.

    Raises
    ------
    ValueError
        If shapes or names of rows differ, or there are no members.

    Examples
    --------
    >>> x, y = torch.randn(20, 3), torch.randint(2, (20,))
    >>> models = [torch.nn.Linear(3, 2) for _ in range(3)]
    >>> loss, test = torch.nn.functional.cross_entropy, (x[:5], y[:5])
    >>> scores = ensemble((Influence(m, loss, damping=0.1).fit((x, y)) for m in models), test)
    >>> scores.shape, len(scores.provenance["agreement"])
    ((5, 20), 3)
    """
    if isinstance(members, Scores | Influence):
        raise TypeError(f"expected several members; got one {type(members).__name__}")
    mean = _Mean()
    for at, member in enumerate(members):
        mean.add(_scores(member, test, at), at)
    return mean.finish()


def _scores(member: Any, test: Any, at: int) -> Scores:
    if isinstance(member, Scores):
        return member
    if not isinstance(member, Influence) and not callable(member):
        raise TypeError(
            f"member {at}: expected a fitted Influence, a function of the test rows or Scores; got "
            f"{type(member).__name__}"
        )
    if test is None:
        raise ValueError(f"member {at} is not scores yet: give the test rows, ensemble(…, test)")
    found = member.scores(test) if isinstance(member, Influence) else member(test)
    if not isinstance(found, Scores):
        raise TypeError(f"member {at}: expected Scores; got {type(found).__name__}")
    return found


@dataclass
class _Mean:
    """A sum of scores, with a few test rows of every member."""

    total: Tensor = field(default_factory=lambda: torch.empty(0))
    first: Scores | None = None
    dtype: torch.dtype = torch.float32
    sampled: list[Tensor] = field(default_factory=lambda: [])
    provenances: list[dict[str, Any]] = field(default_factory=lambda: [])

    def add(self, scores: Scores, at: int) -> None:
        if self.first is None:
            # without the values, which would be kept as long as this
            names = scores.test_names, scores.train_names
            self.first = Scores(np.broadcast_to(0.0, scores.shape), *names)
            self.total = torch.zeros(scores.shape, dtype=torch.float64)
            self.dtype = next(scores.blocks(1))[1].dtype
        _check_alike(self.first, scores, at)
        picked = _picked(len(scores))
        sampled: list[Tensor] = []
        for start, block in scores.blocks():
            self.total[start : start + len(block)] += block.to("cpu", torch.float64)
            own = picked[(picked >= start) & (picked < start + len(block))] - start
            sampled.append(block[own].clone())
            self.dtype = torch.promote_types(self.dtype, block.dtype)
        self.sampled.append(torch.cat(sampled))
        self.provenances.append(scores.provenance)

    def finish(self) -> Scores:
        if self.first is None:
            raise ValueError("expected at least one member; got none")
        mean = self.total / len(self.sampled)
        provenance: dict[str, Any] = {
            "method": f"mean of {len(self.sampled)} members",
            "members": self.provenances,
        }
        for key in ("mode", "test_loss", "damping"):
            said = [p.get(key) for p in self.provenances]
            if said[0] is not None and all(value == said[0] for value in said):
                provenance[key] = said[0]
        if mean.ndim == 2:
            reference = mean[_picked(len(mean))]
            provenance["agreement"] = [_agreement(s, reference) for s in self.sampled]
        names = self.first.test_names, self.first.train_names
        return Scores(mean.to(self.dtype), *names, provenance)


def _picked(m: int) -> Tensor:
    """Test rows for the agreement: all, or so many that are spread evenly."""
    return torch.arange(m) if m <= SAMPLED else torch.arange(SAMPLED) * m // SAMPLED


def _check_alike(first: Scores, scores: Scores, at: int) -> None:
    if scores.shape != first.shape:
        raise ValueError(
            f"expected scores of one shape; got {first.shape} from member 0 and {scores.shape} "
            f"from member {at}"
        )
    pairs = {
        "test": (first.test_names, scores.test_names),
        "training": (first.train_names, scores.train_names),
    }
    for what, (wanted, got) in pairs.items():
        if not wanted.equals(got):
            row = _first_difference(wanted, got)
            raise ValueError(
                f"expected the same {what} rows in the same order; row {row} is {wanted[row]!r} "
                f"for member 0 and {got[row]!r} for member {at}"
            )


def _first_difference(wanted: pd.Index, got: pd.Index) -> int:
    return next((i for i, (x, y) in enumerate(zip(wanted, got, strict=True)) if x != y), 0)


def _agreement(values: Tensor, reference: Tensor) -> float:
    """The Spearman correlation of each row with that of a reference, (rows, n), on average."""
    found = spearman(values.double().T.numpy(), reference.T.numpy())
    told = found[~np.isnan(found)]  # where all rows score alike there are no ranks
    return float(told.mean()) if len(told) else float("nan")
