"""From the words of a call to a run: which sampler, all subsets of few rows, or re-reading."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from upweight.valuation.drawing import Sampler
from upweight.valuation.laws import Semivalue
from upweight.valuation.readouts import FailedSubsets
from upweight.valuation.run import Settings, read_again, run
from upweight.valuation.sampling import Permutations, Stratified
from upweight.valuation.stopping import Evaluations, Stopping
from upweight.valuation.subsets import EverySubset, KernelSubsets, OwenSubsets, WeightedSubsets
from upweight.valuation.utility import Utility
from upweight.valuation.values import Values

__all__ = ["answer"]

FEW_SUBSETS = 2**10  # fewer than any run by default asks for

_SAMPLERS: dict[str, Sampler] = {
    "permutations": Permutations(),
    "antithetic": Permutations(antithetic=True),
    "stratified": Stratified(),
    "subsets": WeightedSubsets(),
    "owen": OwenSubsets(),
    "kernel": KernelSubsets(),
    "exact": EverySubset(),
}


def answer(
    utility: Utility | Values,
    kind: Semivalue,
    sampler: str | Sampler,
    until: Stopping | int | None,
    *,
    usual: str,
    own: Mapping[str, Sampler] | None = None,
    readout: str = "auto",
    truncation: float | None = None,
    seed: int = 0,
    n_jobs: int = 1,
    progress: bool = True,
) -> Values:
    """The values that a function of this package was asked for.

    Parameters
    ----------
    usual
        The sampler that ``"auto"`` stands for, but where there are so few subsets that all of them
        cost no more.
    own
        What names of samplers mean for this value, where that differs.
    """
    if not isinstance(utility, Utility | Values):
        raise TypeError(
            "expected a Utility, such as ModelUtility or FunctionUtility, or earlier Values; got "
            f"{type(utility).__name__}"
        )
    if isinstance(utility, Values):
        if until is not None or truncation is not None or seed or sampler != "auto":
            raise ValueError(
                "expected only what values are read out by, beside earlier values, whose samples "
                "are there; got sampler, until, truncation or seed: give the utility to draw "
                "others, or values.more(utility, until) for more of them"
            )
        return read_again(utility, kind, readout)
    named = {**_SAMPLERS, **(own or {})}

    def sampled(by: Sampler) -> Values:
        settings = Settings(kind, by, readout, truncation, seed)
        return run(utility, settings, until, n_jobs=n_jobs, progress=progress)

    if not isinstance(sampler, str):
        return sampled(sampler)
    if sampler != "auto" and sampler not in named:
        raise ValueError(
            f"expected a sampler among auto, {', '.join(named)}, or an object; got {sampler!r}"
        )
    if sampler != "auto":
        return sampled(named[sampler])
    if truncation is None and readout == "auto" and _all_are_few(utility.n, until):
        try:
            return sampled(EverySubset())
        except FailedSubsets:  # sampling can do without them
            pass
    return sampled(named[usual])


def _all_are_few(n: int, until: Stopping | int | None) -> bool:
    """Whether all 2^n subsets are no more than is asked for anyway; never against a clock."""
    if 2**n > FEW_SUBSETS:
        return False
    rule = Evaluations(int(until)) if isinstance(until, int | np.integer) else until
    if isinstance(rule, Stopping):
        return not rule.clocked and rule.room(None) >= 2**n
    return rule is None
