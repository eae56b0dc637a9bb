"""Values of rows, with how sure they are, where they come from, and what they were made of."""

from __future__ import annotations

import html
import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from upweight.files import write_atomically
from upweight.valuation.checks import count
from upweight.valuation.naming import index_from, index_to, plain
from upweight.valuation.samples import OrderSamples, PairSamples, Samples, SetSamples
from upweight.valuation.stopping import Stopping
from upweight.valuation.utility import Utility, row_names

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MEANING", "Values"]

FORMAT = 2
READS = (1, 2)
MEANING = "positive = the row helps (it raises the score on other rows), negative = it harms"
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Values:
    """One number for each training row: how much it is worth to what is learnt.

    Attributes
    ----------
    values
        (n,) in units of the utility: positive where the row helps. NaN where nothing is known.
    errors
        (n,) standard errors: how far off `values` are for want of samples. 0 where they are exact,
        NaN where that is unknown. What the choice of the test rows does is not in it.
    counts
        (n,) draws that tell of the row.
    names
        Of the rows.
    provenance
        How they came about, as plain numbers, text and lists: method, sampler, read-out, seed,
        evaluations asked for and computed, seconds, the fingerprint of the utility.
    converged
        Whether a rule about quality ended the run; None where there was none, or nothing to
        converge.
    stopped
        Why it ended.
    failures
        A line for each of the first 1,000 utilities that could not be computed: ``size``,
        ``rows``, ``error``. How many there were is ``provenance["failed"]``.
    samples
        The sets that were asked for, with their utilities; None for closed forms.
    meaning
        What a positive and a negative value say.

    Examples
    --------
    >>> values = Values(np.array([0.5, -2.0, 0.1]), names=["a", "b", "c"])
    >>> values.top(1, harmful=True)
      row  value  rank
    0   b   -2.0     1
    >>> float(np.asarray(values).sum())
    -1.4
    """

    values: Floats
    errors: Floats = field(default_factory=lambda: np.empty(0))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    names: Any = None
    provenance: dict[str, Any] = field(default_factory=dict[str, Any])
    converged: bool | None = None
    stopped: str = ""
    failures: Any = None
    samples: Samples | None = None
    meaning: str = MEANING

    def __post_init__(self) -> None:
        import pandas as pd

        fill = object.__setattr__
        given = np.asarray(self.values)
        if given.ndim != 1 or given.dtype.kind not in "fiu":
            raise ValueError(
                f"expected a number for each row, of shape (n,); got {given.dtype} of shape "
                f"{given.shape}"
            )
        n = len(given)
        fill(self, "values", given.astype(np.float64, copy=False))
        fill(self, "names", row_names(self.names, n))
        fill(self, "provenance", plain(dict(self.provenance), "provenance"))
        fill(self, "converged", plain(self.converged, "converged"))
        errors, counts = np.asarray(self.errors), np.asarray(self.counts)
        if errors.shape == (0,):
            errors = np.zeros(n)
        if counts.shape == (0,):
            counts = np.ones(n, np.int64)
        fits = errors.shape == counts.shape == (n,)
        if not fits or errors.dtype.kind not in "fiu" or counts.dtype.kind not in "iu":
            raise ValueError(
                f"expected errors and counts of shape ({n},), numbers and whole numbers; got "
                f"{errors.dtype} of shape {errors.shape}, and {counts.dtype} of {counts.shape}"
            )
        fill(self, "errors", errors.astype(np.float64, copy=False))
        fill(self, "counts", counts.astype(np.int64, copy=False))
        if self.failures is None:
            fill(self, "failures", pd.DataFrame(columns=pd.Index(["size", "rows", "error"])))

    @property
    def n(self) -> int:
        """Rows."""
        return len(self.values)

    @property
    def variances(self) -> Floats:
        """(n,) of the values, for want of samples: ``errors ** 2``."""
        return self.errors**2

    @cached_property
    def history(self) -> pd.DataFrame:
        """How values settled: a line for each of some twelve shorter runs, from the same samples.

        ``evaluations``; ``error``, the median standard error in units of the spread of values;
        ``stability``, Spearman's r to be expected with another run of that size, and its 95 %
        interval ``low``, ``high``. Without samples, no lines.
        """
        from upweight.valuation.run import history_of

        return history_of(self)

    def interval(self, level: float = 0.95) -> NDArray[np.float64]:
        """(n, 2) values ± z standard errors: a normal interval for the sampling error."""
        from scipy.stats import norm

        if not 0 < level < 1:
            raise ValueError(f"expected a level between 0 and 1; got {level}")
        reach = float(norm.ppf((1 + level) / 2)) * self.errors
        return np.stack([self.values - reach, self.values + reach], axis=1)

    def top(self, k: int = 10, *, harmful: bool = False) -> pd.DataFrame:
        """The k highest values, or with ``harmful=True`` the k lowest, as row, value, rank.

        With standard errors, where values are not all exact.

        Raises
        ------
        ValueError
            If k is no whole number of at least 1.
        """
        import pandas as pd

        if isinstance(k, bool):
            raise ValueError(f"expected k as a whole number; got {k}")
        k = count(k, "k", 1)
        known = np.flatnonzero(~np.isnan(self.values))
        key = self.values[known] if harmful else -self.values[known]
        chosen = known[np.argsort(key, kind="stable")[:k]]
        columns: dict[str, Any] = {"row": self.names[chosen], "value": self.values[chosen]}
        if self.errors.any():
            columns["error"] = self.errors[chosen]
        columns["rank"] = np.arange(1, len(chosen) + 1)
        return pd.DataFrame(columns)

    def to_frame(self) -> pd.DataFrame:
        """A line for each row: ``value``, ``error``, ``low``, ``high`` (95 %), ``count``."""
        import pandas as pd

        interval = self.interval()
        return pd.DataFrame(
            {
                "value": self.values,
                "error": self.errors,
                "low": interval[:, 0],
                "high": interval[:, 1],
                "count": self.counts,
            },
            index=self.names,
        )

    def more(
        self,
        utility: Utility,
        until: Stopping | int | None = None,
        *,
        n_jobs: int = 1,
        progress: bool = True,
    ) -> Values:
        """Go on with more samples: what a longer run would have given, to the last bit.

        Parameters
        ----------
        utility
            The same as before.
        until
            When to stop, counted from the beginning of the first run.
        n_jobs, progress
            As in `shapley`.

        Raises
        ------
        ValueError
            If these values are not of samples, or of another utility.
        """
        from upweight.valuation.run import continue_run

        return continue_run(self, utility, until, n_jobs=n_jobs, progress=progress)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one ``.npz`` file with everything, samples too; no pickle.

        Names come back as they are: numbers, text, times, dates, bytes, tuples of these; of
        categories, the labels.

        Raises
        ------
        TypeError
            If names are of another kind; nothing is written then.
        """
        meta = {
            "format": FORMAT,
            "provenance": self.provenance,
            "converged": self.converged,
            "stopped": self.stopped,
            "meaning": self.meaning,
            "failures": plain(self.failures.to_dict("list"), "failures"),
            "names": index_to(self.names),
            "samples": None if self.samples is None else type(self.samples).__name__,
        }
        arrays: dict[str, Any] = {
            name: getattr(self, name) for name in ("values", "errors", "counts")
        }
        if self.samples is not None:
            arrays |= {f"samples_{k}": v for k, v in _to_arrays(self.samples).items()}
        text = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(final, lambda file: np.savez_compressed(file, meta=text, **arrays))
        return final

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Values:
        """Read what `save` wrote; a ValueError for any other file."""
        try:
            # numpy leaves a file open that ends too early
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            meta = json.loads(arrays.pop("meta").tobytes())
            form = meta["format"]
            if form in READS:
                return cls._read(meta, arrays)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"expected values as `Values.save` writes them at {path}; "
                f"{type(error).__name__}: {error}"
            ) from error
        raise ValueError(f"{path} has values of format {form}; this version reads {READS}")

    @classmethod
    def _read(cls, meta: dict[str, Any], arrays: dict[str, Any]) -> Values:
        import pandas as pd

        samples = {
            name.removeprefix("samples_"): array
            for name, array in arrays.items()
            if name.startswith("samples_")
        }
        return cls(
            arrays["values"],
            arrays["errors"],
            arrays["counts"],
            index_from(meta["names"]),
            meta["provenance"],
            meta["converged"],
            meta["stopped"],
            pd.DataFrame(meta["failures"]),
            None if meta["samples"] is None else _from_arrays(meta["samples"], samples),
            meta["meaning"],
        )

    def named(self, names: Any) -> Values:
        """The same with other names of the rows."""
        return replace(self, names=names)

    def __len__(self) -> int:
        return self.n

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values, dtype=dtype)

    def __repr__(self) -> str:
        lines = [f"<Values of {self.n} rows{self._told()}>", self.meaning]
        for name, harmful in (("lowest", True), ("highest", False)):
            shown = self.top(3, harmful=harmful)
            lines.append(f"{name + ':':<9}" + ", ".join(_few(shown)))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        told = f"{html.escape(self._told().strip(' ,'))}<br>{html.escape(self.meaning)}"
        return f"<p>{told}</p>" + self.top(10, harmful=True).to_html(index=False, escape=True)

    def _told(self) -> str:
        told = self.provenance
        parts = [str(told[name]) for name in ("method", "sampler_name") if name in told]
        if "evaluations" in self.provenance:
            parts.append(f"{self.provenance['evaluations']:,} evaluations")
        if self.converged is not None:
            parts.append("converged" if self.converged else f"not converged ({self.stopped})")
        return "".join(f", {part}" for part in parts)


def _few(frame: pd.DataFrame) -> list[str]:
    both = zip(frame["row"], frame["value"], strict=True)
    return [f"{row} ({value:+.3g})" for row, value in both]


def _to_arrays(samples: Samples) -> dict[str, Any]:
    return {name: np.asarray(value) for name, value in vars(samples).items()}


def _from_arrays(kind: Literal["OrderSamples", "SetSamples", "PairSamples"], given: Any) -> Samples:
    if kind == "OrderSamples":
        whole: Any = {**given, "per_unit": int(given["per_unit"])}
        return OrderSamples(**whole)
    if kind == "PairSamples":
        return PairSamples(**given)
    none, every = given["ends"]
    numbers: Any = {
        "n": int(given["n"]),
        "per_unit": int(given["per_unit"]),
        "exact": bool(given["exact"]),
        "ends": (float(none), float(every)),
    }
    return SetSamples(**{**given, **numbers})
