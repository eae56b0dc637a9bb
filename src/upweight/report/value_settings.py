"""What ``upweight value`` does: the settings that replay it, and which options belong to a method.

Nothing heavy is imported here: the command line looks at it.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from upweight.tables import Kind, Task

__all__ = ["METHODS", "MODELS", "SAMPLED", "Method", "Model", "ValueSettings", "command"]

Method = Literal["knn-shapley", "oob", "tmc", "banzhaf", "shapley", "beta", "loo"]
Model = Literal["ridge", "logistic", "forest", "boosting", "knn"]

METHODS: dict[str, str] = {
    "knn-shapley": "KNN-Shapley",
    "oob": "Data-OOB",
    "tmc": "Data Shapley by truncated Monte Carlo",
    "banzhaf": "Data Banzhaf",
    "shapley": "Data Shapley",
    "beta": "Beta Shapley",
    "loo": "leave-one-out",
}
MODELS: dict[str, str] = {
    "ridge": "a ridge regression in closed form",
    "logistic": "a logistic regression",
    "forest": "extremely randomised trees",
    "boosting": "gradient boosted trees",
    "knn": "five nearest neighbours",
}
SAMPLED = ("tmc", "banzhaf", "shapley", "beta")
TRAINED = (*SAMPLED, "loo")
#: Options that not all methods have, and what they are where they are not given.
OPTIONS: dict[str, tuple[tuple[str, ...], Any]] = {
    "test": (("knn-shapley", *TRAINED), None),
    "k": (("knn-shapley",), 5),
    "p": (("banzhaf",), None),
    "model": (TRAINED, "ridge"),
    "scoring": (TRAINED, None),
    "evaluations": (SAMPLED, None),
    "minutes": (SAMPLED, None),
    "until_stable": (SAMPLED, 0.95),
}


@dataclass(frozen=True)
class ValueSettings:
    """Settings of a run; written to ``config.yaml`` of its folder.

    Attributes
    ----------
    target, task, id, kinds, ignore, delimiter, encoding
        As of an audit.
    method
        How rows are valued.
    test
        File with rows that judge those of the table; None: these judge each other.
    k
        Nearest neighbours that vote, in KNN-Shapley.
    p
        Share of the rows in a set, in Data Banzhaf; None: small sets, see `default_p`.
    model, scoring
        What is trained on sets of rows, and how it is judged.
    evaluations, minutes
        When to stop at the latest.
    until_stable
        Rank stability at which to stop.
    seed
        Of everything random.
    top
        Rows that the report lists from either end.
    """

    target: str
    method: Method = "knn-shapley"
    task: Task | None = None
    id: str | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict[str, "Kind"])
    ignore: tuple[str, ...] = ()
    delimiter: str | None = None
    encoding: str | None = None
    test: str | None = None
    k: int | None = None
    p: float | None = None
    model: Model | None = None
    scoring: str | None = None
    evaluations: int | None = None
    minutes: float | None = None
    until_stable: float | None = None
    seed: int = 0
    top: int = 20

    def completed(self) -> ValueSettings:
        """With defaults in place of what was not given.

        Raises
        ------
        ValueError
            If an option does not belong to the method, or makes no sense.
        """
        defaults: dict[str, Any] = {}
        for name, (methods, default) in OPTIONS.items():
            value = getattr(self, name)
            if self.method in methods:
                defaults[name] = default if value is None else value
            elif value is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} is no option of --method {self.method}, but of "
                    f"{', '.join(methods)}: leave it out, or choose another method"
                )
        done = replace(self, **defaults)
        done.check()
        return done

    def check(self) -> None:
        """A ValueError for numbers that make no sense."""
        for name, least in {"k": 1, "evaluations": 1, "seed": 0, "top": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"expected --{name} of at least {least}; got {value}")
        for name in ("p", "until_stable"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(
                    f"expected --{name.replace('_', '-')} between 0 and 1; got {value:g}"
                )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"expected --minutes above 0; got {self.minutes:g}")


def default_p(rows: int, classes: int) -> float:
    """Share of the rows in a set of Data Banzhaf: 5 %, but eight rows, or two of every class.

    What a row adds stands out where few others are there; and a set of one or two rows teaches a
    model nothing.

    Examples
    --------
    >>> default_p(1000, 2), default_p(80, 2), default_p(12, 2)
    (0.05, 0.1, 0.5)
    """
    return min(max(0.05, max(8, 2 * classes) / rows), 0.5)


def command(settings: ValueSettings, source: Path | str, out: Path) -> str:
    """The command that does the same again."""
    words = ["upweight", "value", str(source), "--target", settings.target]
    words += ["--method", settings.method]
    plain = ValueSettings(settings.target, settings.method).completed()
    for name in ("task", "id", "delimiter", "encoding", *OPTIONS, "seed", "top"):
        value = getattr(settings, name)
        if value is not None and value != getattr(plain, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name, kind in settings.kinds.items():
        words += ["--kind", f"{name}={kind}"]
    for name in settings.ignore:
        words += ["--ignore", name]
    return " ".join(shlex.quote(word) for word in [*words, "--out", str(out)])
