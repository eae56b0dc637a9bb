"""Methods for the damped inverse side by side, on one model and one curvature.

What is compared is the mean influence of every training row over the test rows, the number that
ranks rows, with a reference: by default exact factorisation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn
from tqdm import tqdm

from upweight.choices import CurvatureChoice
from upweight.inverse import Certificate, IndefiniteCurvatureWarning, ResidualWarning
from upweight.meter import Meter
from upweight.methods import Influence
from upweight.recipes import CG, EKFAC, Arnoldi, LiSSA, Nystroem, Recipe, choose_recipe
from upweight.scores import RowScores

__all__ = ["Comparison", "agreement", "compare"]

DEFAULT: tuple[Recipe, ...] = (
    CG(preconditioner=Nystroem(rank=5)),
    LiSSA(),
    Arnoldi(),
    Arnoldi(start="test"),
    Nystroem(),
    EKFAC(),
    CG(preconditioner=EKFAC()),
)
# How a method may end without an answer.
FAILURES = (ArithmeticError, ValueError, TypeError, MemoryError)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes
    ----------
    table
        A line per method, the reference first. Of mean influences: ``error_percent`` = 100 · mean
        over training rows of ``|Δ| / |reference|``; ``relative_norm`` = ‖Δ‖₂ / ‖reference‖₂;
        ``pearson`` and ``spearman``, and the same for the rows that the reference scores strongest
        (``pearson_top``, ``spearman_top``). Beside them ``residual``, the largest of the
        certificate; ``steps``; ``products``; ``seconds`` of fit and scores; ``peak_mib`` of memory;
        ``note``.
    mean
        Mean influence: training rows down, methods across.
    certificates
        By method.
    reference
        The name of the reference.
    top
        How many rows the ``…_top`` columns are of.
    """

    table: pd.DataFrame
    mean: pd.DataFrame
    certificates: dict[str, Certificate]
    reference: str
    top: int

    @property
    def methods(self) -> list[str]:
        """The methods that gave an answer, without the reference."""
        return [str(name) for name in self.mean.columns if name != self.reference]

    def __str__(self) -> str:
        shown = self.table.copy()
        formats: dict[str, str] = {
            "error_percent": "{:.4g}",
            "relative_norm": "{:.1e}",
            "residual": "{:.1e}",
            "steps": "{:.0f}",
            "products": "{:,.0f}",
            "seconds": "{:.3f}",
            "peak_mib": "{:,.0f}",
        }
        for column in shown.columns[1:-1]:
            pattern = formats.get(str(column), "{:.4f}")
            shown[column] = [
                "" if pd.isna(value) else pattern.format(value) for value in shown[column]
            ]
        return shown.to_string(index=False)

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False, escape=True, na_rep="", float_format="{:.4g}".format)


def compare(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    train: Any,
    test: Any,
    methods: Sequence[str | Recipe] | Mapping[str, str | Recipe] | None = None,
    *,
    damping: float,
    curvature: CurvatureChoice = "ggn",
    reference: str | Recipe = "direct",
    top: int = 20,
    certify: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Score the same rows by several methods, and see how far each is from a reference.

    Parameters
    ----------
    model, loss, train, test
        As for `Influence`.
    methods
        Recipes or their names, or a mapping from labels to them (none that of the reference,
        which has a line of its own). Default: all six of the field
        (conjugate gradients with a Nyström preconditioner, LiSSA, Arnoldi, Nyström, EK-FAC, and
        conjugate gradients with EK-FAC as their preconditioner), Arnoldi with both starts.
    damping, curvature
        λ and C of all of them.
    reference
        What they are measured against.
    top
        How many of the strongest rows get correlations of their own.
    certify
        For how many right-hand sides approximate methods measure their residual; None for all.
        That time is not counted.
    progress
        Whether a bar tells how far it is.
    **options
        More for `Influence`: ``parameters``, ``forward``, ``target``, ``batch_size``, …

    Returns
    -------
    Comparison
        Its ``table`` prints. A method that ends without an answer (negative curvature, divergence)
        has a line that says so.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.randn(20, 3), torch.randint(2, (20,))
    >>> model, loss = torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy
    >>> found = compare(model, loss, (x, y), (x[:5], y[:5]), ["cg", "ekfac"], damping=0.1)
    >>> found.table["method"].tolist()
    ['direct', 'cg', 'ekfac']
    >>> bool(found.table["relative_norm"][1] < 1e-4)
    True
    """
    if top < 2:
        raise ValueError(f"expected top of at least 2 rows to correlate; got {top}")
    first = choose_recipe(reference, "reference")
    name = _label(first)
    chosen = _labelled(DEFAULT if methods is None else methods, {name: first})
    make = _Run(model, loss, train, test, damping, curvature, options)
    make.warm_up()
    lines: list[dict[str, Any]] = []
    means: dict[str, Tensor] = {}
    certificates: dict[str, Certificate] = {}
    names: pd.Index | None = None
    for label, recipe in tqdm(chosen.items(), desc="methods", disable=None if progress else True):
        try:
            with _noting() as told:
                influence, mean, meter = make(recipe)
                certificate = make.certify(influence, certify)
        except FAILURES as error:
            if label == name:
                raise
            lines.append({"method": label, "note": f"no answer: {error}"})
            continue
        names, means[label], certificates[label] = mean.names, mean.values, certificate
        lines.append(
            {
                "method": label,
                **agreement(means[name], mean.values, top),
                "residual": certificate.residual_max if certificate.measured else np.nan,
                "steps": certificate.steps,
                "products": certificate.products,
                "seconds": meter.seconds,
                "peak_mib": meter.peak_mib,
                "note": "; ".join(dict.fromkeys([*certificate.notes, *told])),
            }
        )
    order = dict.fromkeys(key for line in lines for key in line if key != "note")
    table = pd.DataFrame(lines, columns=pd.Index([*order, "note"]))
    frame = pd.DataFrame({k: v.numpy() for k, v in means.items()}, index=names)
    return Comparison(table, frame, certificates, name, top)


def agreement(reference: Tensor, other: Tensor, top: int = 20) -> dict[str, float]:
    """How far scores (n,) are from those of a reference: see `Comparison.table`."""
    wanted, got = reference.double().numpy(), other.double().numpy()
    difference = np.abs(got - wanted)
    size = np.abs(wanted)
    error = difference[size > 0] / size[size > 0]
    strongest = np.argsort(-size, kind="stable")[:top]
    norm = float(np.linalg.norm(wanted))
    from scipy.stats import rankdata

    return {
        "error_percent": 100 * float(error.mean()) if error.size else float("nan"),
        "relative_norm": float(np.linalg.norm(difference)) / norm if norm else float("nan"),
        "pearson": _pearson(wanted, got),
        "spearman": _pearson(rankdata(wanted), rankdata(got)),
        "pearson_top": _pearson(wanted[strongest], got[strongest]),
        "spearman_top": _pearson(rankdata(wanted[strongest]), rankdata(got[strongest])),
    }


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


@contextmanager
def _noting() -> Generator[list[str]]:
    """Solvers' warnings as texts; what else is warned of is warned of as ever."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield told
        finally:
            ours = [w for w in caught if issubclass(w.category, ResidualWarning)]
            told += [str(w.message) for w in ours]
            known = (ResidualWarning, IndefiniteCurvatureWarning)
            others = [w for w in caught if not issubclass(w.category, known)]
    for w in others:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


@dataclass(frozen=True)
class _Run:
    """One method on the model and rows of the comparison."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    train: Any
    test: Any
    damping: float
    curvature: CurvatureChoice
    options: dict[str, Any]

    def _influence(self, recipe: Recipe) -> Influence:
        return Influence(
            self.model,
            self.loss,
            recipe,
            damping=self.damping,
            curvature=self.curvature,
            certify=0,
            **self.options,
        )

    def warm_up(self) -> None:
        """The first derivatives in a process import parts of torch, which no method should pay."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # with a damping of its own: what is wrong with theirs, the methods are to say
            warm = replace(self, damping=1.0)._influence(Arnoldi(rank=1, start="test"))
            warm.fit(self.train)
            with suppress(ArithmeticError, ValueError):
                warm.mean_scores(self.test)

    def __call__(self, recipe: Recipe) -> tuple[Influence, RowScores, Meter]:
        influence = self._influence(recipe)
        device = next(self.model.parameters()).device
        with Meter(device) as meter:
            scores = influence.fit(self.train).scores(self.test)
        return influence, scores.mean(), meter

    def certify(self, influence: Influence, count: int | None) -> Certificate:
        """The certificate with residuals, measured after the clock was stopped."""
        certificate = influence.certificate
        if not certificate.measured and count != 0:
            spent, certificate = certificate.products, influence.measure(self.test, count)
            certificate.products = spent
        return certificate


def _labelled(
    methods: Sequence[str | Recipe] | Mapping[str, str | Recipe], found: dict[str, Recipe]
) -> dict[str, Recipe]:
    """The recipes by label, after those that have been found; each recipe of a list once."""
    if isinstance(methods, Mapping):
        taken = [label for label in methods if label in found]
        if taken:
            raise ValueError(
                f"expected other labels than that of the reference; got {taken[0]!r} for both"
            )
        return found | {label: choose_recipe(recipe) for label, recipe in methods.items()}
    if isinstance(methods, str) or not isinstance(methods, Sequence):
        raise TypeError(f"expected a list of methods, or a mapping from labels; got {methods!r}")
    for choice in methods:
        recipe = choose_recipe(choice)
        if recipe in found.values():
            continue
        label = _label(recipe)
        if found.get(label, recipe) != recipe:
            label = repr(recipe)
        found[label] = recipe
    return found


def _label(recipe: Any) -> str:
    """The name with what is not default: ``arnoldi(start='test')``."""
    try:
        defaults = type(recipe)()
        changed = [
            f"{f.name}={getattr(recipe, f.name)!r}"
            for f in fields(recipe)
            if f.name != "preconditioner" and getattr(recipe, f.name) != getattr(defaults, f.name)
        ]
    except TypeError:
        return str(recipe.name)
    return recipe.name + (f"({', '.join(changed)})" if changed else "")
