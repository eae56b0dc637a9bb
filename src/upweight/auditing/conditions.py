"""Conditions on the numbers of an audit, such as ``rate>0.03``, for pipelines."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from upweight.auditing.audit import Summary

__all__ = ["Condition", "parse_condition"]

#: What a condition may name, and the number that it is.
NAMES: dict[str, Callable[[Summary], float | None]] = {
    "rate": lambda summary: summary.flagged / summary.judged if summary.judged else 0.0,
    "labels": lambda summary: summary.flagged,
    "features": lambda summary: summary.counts.get("features", 0),
    "duplicates": lambda summary: summary.counts.get("duplicate", 0),
    "conflicts": lambda summary: summary.counts.get("conflict", 0),
    "leakage": lambda summary: summary.counts.get("leakage", 0),
    "noise": lambda summary: summary.noise,
}
OPERATORS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, ">": operator.gt}
PATTERN = re.compile(r"\s*([a-z]+)\s*(>=|>)\s*(\d+\.?\d*|\.\d+)(%?)\s*")


@dataclass(frozen=True)
class Condition:
    """``name`` is beyond ``limit``, or reaches it with the operator ``>=``."""

    name: str
    operator: str
    limit: float

    def value(self, summary: Summary) -> float:
        """The number that is compared.

        Raises
        ------
        ValueError
            If it was not estimated.
        """
        value = NAMES[self.name](summary)
        if value is None:
            raise ValueError(f"{self} cannot be judged: {self.name} was not estimated here")
        return float(value)

    def holds(self, summary: Summary) -> bool:
        """Whether it does."""
        return OPERATORS[self.operator](self.value(summary), self.limit)

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.limit:g}"


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Parameters
    ----------
    text
        A name, ``>`` or ``>=``, and a number or a percentage. Names are ``rate`` (share of the
        judged rows with a label flag), ``labels`` (number of these), ``features``, ``duplicates``
        (exact ones), ``conflicts``, ``leakage`` (numbers of findings) and ``noise`` (estimated
        share of wrong labels).

    Raises
    ------
    ValueError
        If it is none.

    Examples
    --------
    >>> condition = parse_condition("rate > 3%")
    >>> str(condition), condition.holds(Summary(100, 100, "classification", 4, flagged=4))
    ('rate>0.03', True)
    """
    match = PATTERN.fullmatch(text)
    if match is None or match[1] not in NAMES:
        raise ValueError(
            f"expected a condition such as rate>0.03, of {', '.join(NAMES)} with > or >=; got "
            f"{text!r}"
        )
    limit = float(match[3]) / (100 if match[4] else 1)
    return Condition(match[1], match[2], limit)
