"""One loop for all semivalues: draw, evaluate, read out, ask the rule, go on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.checks import count
from upweight.valuation.drawing import Sampler
from upweight.valuation.engine import Evaluator
from upweight.valuation.laws import Semivalue
from upweight.valuation.readouts import Readout, choose_readout, read_out
from upweight.valuation.regressions import is_shrunk
from upweight.valuation.reuse import check_seen
from upweight.valuation.samples import Estimate, OrderSamples, Samples, SetSamples
from upweight.valuation.sampling import Permutations, needed, sampler_from
from upweight.valuation.states import State
from upweight.valuation.stopping import Stopping, Verdict, ending, rule_from
from upweight.valuation.subsets import EverySubset
from upweight.valuation.telling import tell, tell_failed
from upweight.valuation.utility import Utility
from upweight.valuation.values import Values

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Settings", "continue_run", "history_of", "next_round", "read_again", "run"]

FIRST = 256  # evaluations of the first round, about
FEWEST = 4  # units of it: fewer say nothing of how stable ranks are
GROWTH = 0.4  # a round adds so much to what is there
POINTS = 12  # of a history
# what of a provenance is about the samples, whatever is read out of them
OF_SAMPLES = {
    *("drawn_for", "sampler", "sampler_name", "truncation", "seed", "until"),
    *("evaluations", "computed", "failed", "seconds", "utility", "ends"),
}
MANY_SETS = 10**9  # more than any run: what is not seen then never is

_ALL = Verdict(True, None, "all subsets")


@dataclass(frozen=True)
class Settings:
    """What a run is, but for the utility and how long it goes on."""

    semivalue: Semivalue
    sampler: Sampler
    readout: str = "auto"
    tolerance: float | None = None
    seed: int = 0
    drawn_for: Semivalue | None = None  # whose sizes are drawn, if not the semivalue's own

    def check(self, n: int) -> None:
        """A ValueError before long work."""
        count(self.seed, "seed", 0)
        law = self.semivalue.law(n)
        self.sampler.check(law)
        blank = self.sampler.blank(law)
        readout = choose_readout(blank, self.semivalue, self.readout)
        if isinstance(blank, SetSamples) and readout == "msr":
            check_seen(blank.sizes, law, MANY_SETS)
        if self.tolerance is None:
            return
        if not isinstance(self.sampler, Permutations):
            raise ValueError(
                f"expected permutations with a truncation; got the sampler {self.sampler.name!r}"
            )
        if not 0 < self.tolerance < 1:
            raise ValueError(f"expected a truncation between 0 and 1; got {self.tolerance}")


@dataclass(eq=False)
class _Progress:
    samples: Samples | None = None
    evaluations: int = 0
    computed: int = 0
    failed: int = 0
    seconds: float = 0.0
    failures: Any = None


def run(
    utility: Utility,
    settings: Settings,
    until: Stopping | int | None,
    *,
    n_jobs: int = 1,
    progress: bool = True,
) -> Values:
    """Values by sampling, from the beginning."""
    settings.check(utility.n)
    return _go(utility, settings, until, _Progress(), n_jobs=n_jobs, progress=progress)


def continue_run(
    values: Values,
    utility: Utility,
    until: Stopping | int | None,
    *,
    n_jobs: int = 1,
    progress: bool = True,
) -> Values:
    """See `Values.more`."""
    told = values.provenance
    if values.samples is None or "sampler" not in told:
        raise ValueError(
            "expected values from samples, such as those of shapley or banzhaf, to go on with; "
            f"these are of {told.get('method', 'a closed form')}"
        )
    known = told["utility"], utility.fingerprint
    if utility.n != values.n or (None not in known and known[0] != known[1]):
        raise ValueError(
            "expected the utility that these values were computed with; got another one (its "
            "model, rows, or scoring differ)"
        )
    settings = Settings(
        _semivalue(told["semivalue"]),
        sampler_from(told["sampler"]),
        told["asked_readout"],
        told["truncation"],
        told["seed"],
        _semivalue(told["drawn_for"]),
    )
    before = _Progress(
        values.samples,
        told["evaluations"],
        told["computed"],
        told["failed"],
        told["seconds"],
        values.failures,
    )
    return _go(utility, settings, until, before, n_jobs=n_jobs, progress=progress)


def read_again(values: Values, semivalue: Semivalue, readout: str = "auto") -> Values:
    """Another semivalue from the samples of a run; nothing is evaluated."""
    if values.samples is None:
        raise ValueError(
            "expected values from samples, to read another value out of them; these are of a "
            "closed form"
        )
    chosen = choose_readout(values.samples, semivalue, readout)
    if isinstance(values.samples, OrderSamples):
        there = needed(_semivalue(values.provenance["drawn_for"]).law(values.n))
        if (wanted := needed(semivalue.law(values.n))) > there:
            raise ValueError(
                f"expected orders of at least {wanted} rows for {semivalue}; these end after "
                f"{there}, because they were drawn for another value: sample for this one"
            )
    estimate = read_out(values.samples, semivalue, chosen)
    provenance = {
        **{name: told for name, told in values.provenance.items() if name in OF_SAMPLES},
        **_told(semivalue),
        "readout": chosen,
        "shrunk": chosen == "regression" and _is_shrunk(values.samples, semivalue),
        "asked_readout": readout,
    }
    return Values(
        estimate.values,
        estimate.errors,
        estimate.counts,
        values.names,
        provenance,
        None,
        f"read out of samples for {values.provenance.get('method', 'another value')}",
        values.failures,
        values.samples,
    )


def _go(
    utility: Utility,
    settings: Settings,
    until: Stopping | int | None,
    done: _Progress,
    *,
    n_jobs: int,
    progress: bool,
) -> Values:
    every = isinstance(settings.sampler, EverySubset)
    rule = rule_from(until, utility.n)
    if not every:
        rule = ending(rule, utility.n)
    drawn_for = settings.drawn_for or settings.semivalue
    law = drawn_for.law(utility.n)
    cost, began = settings.sampler.cost(law), time.monotonic() - done.seconds
    if every and until is not None and rule.room(None) < cost:
        raise ValueError(
            f"expected room for all {cost:,} subsets; got {rule}: leave out until, or draw some of "
            "them with another sampler"
        )
    room = rule.room(None) - done.evaluations
    total = cost if every else max(0.0, room) if np.isfinite(room) else None
    readout: Readout | None = None
    samples = done.samples
    state: State | None = None
    verdict = Verdict(False, None, "")
    with Evaluator(utility, n_jobs=n_jobs, progress=progress, total=total) as evaluator:
        if samples is not None:
            readout = choose_readout(samples, settings.semivalue, settings.readout)
            state = _state(samples, settings.semivalue, readout, done.evaluations, done.seconds)
            verdict = _ALL if every else rule.judge(state)
        while not verdict.stop:
            units = 0 if samples is None else samples.units
            more = 1 if every else next_round(units, cost, rule, state)
            if not more:
                break  # what is left of the budget is too little for a draw
            new = settings.sampler.collect(
                evaluator,
                law,
                settings.seed,
                range(units, units + more),
                settings.tolerance,
            )
            samples = new if samples is None else samples.joined(new)  # pyright: ignore
            readout = readout or choose_readout(samples, settings.semivalue, settings.readout)
            state = _state(
                samples,
                settings.semivalue,
                readout,
                done.evaluations + evaluator.asked,
                time.monotonic() - began,
            )
            verdict = _ALL if every else rule.judge(state)
        failures = _joined(done.failures, evaluator.failures)
        computed = done.computed + evaluator.computed
        failed = done.failed + evaluator.failed
    assert samples is not None
    assert state is not None
    assert readout is not None
    provenance = {
        **_told(settings.semivalue),
        "drawn_for": _told(drawn_for)["semivalue"],
        "sampler": settings.sampler.to_dict(),
        "sampler_name": settings.sampler.name,
        "readout": readout,
        "shrunk": readout == "regression" and _is_shrunk(samples, settings.semivalue),
        "asked_readout": settings.readout,
        "truncation": settings.tolerance,
        "seed": settings.seed,
        "until": str(rule),
        "evaluations": state.evaluations,
        "computed": computed,
        "failed": failed,
        "seconds": state.seconds,
        "utility": utility.fingerprint,
        "ends": list(evaluator.ends),
    }
    values = Values(
        state.estimate.values,
        state.estimate.errors,
        state.estimate.counts,
        utility.names,
        provenance,
        verdict.converged,
        verdict.why,
        failures,
        samples,
    )
    _warn(values, rule)
    return values


def next_round(units: int, cost: int, rule: Stopping, state: State | None) -> int:
    """Units to draw next: more each time, as far as there is room; one at least at first."""
    room = rule.room(state)
    wanted = max(-(-FIRST // cost), FEWEST) if not units else max(1, round(GROWTH * units))
    if np.isfinite(room):
        wanted = min(wanted, int(room // cost)) if rule.looks else int(room // cost)
    return max(wanted, 0 if units else 1)


def _state(
    samples: Samples, semivalue: Semivalue, readout: Readout, evaluations: int, seconds: float
) -> State:
    def read(units: NDArray[np.intp] | None) -> Estimate:
        some = samples if units is None else samples.chosen(units)
        return read_out(some, semivalue, readout, errors=units is None)

    return State(read, samples.units, evaluations, seconds)


def history_of(values: Values) -> pd.DataFrame:
    """See `Values.history`."""
    import pandas as pd

    columns = pd.Index(["evaluations", "error", "stability", "low", "high"])
    samples, told = values.samples, values.provenance
    if samples is None or "semivalue" not in told or samples.units < FEWEST:
        return pd.DataFrame(columns=columns, dtype=np.float64)
    semivalue = _semivalue(told["semivalue"])
    lines: list[tuple[float, ...]] = []
    for units in np.unique(np.geomspace(FEWEST, samples.units, POINTS).round().astype(int)):
        first = samples.chosen(np.arange(units))
        state = _state(first, semivalue, told["readout"], first.evaluations, 0.0)
        try:
            stable, errors = state.stability(), state.relative_errors
        except ValueError:  # so few samples tell of too little
            continue
        known = errors[~np.isnan(state.estimate.values)]
        error = float(np.median(known)) if len(known) else float("nan")
        lines.append((first.evaluations, error, stable.value, stable.low, stable.high))
    return pd.DataFrame(lines, columns=columns, dtype=np.float64)


def _is_shrunk(samples: Samples, semivalue: Semivalue) -> bool:
    return isinstance(samples, SetSamples) and semivalue.p is not None and is_shrunk(samples)


def _told(semivalue: Semivalue) -> dict[str, Any]:
    options = [[name, list(v) if isinstance(v, tuple) else v] for name, v in semivalue.options]
    return {
        "method": str(semivalue),
        "semivalue": {"kind": semivalue.kind, "options": options},
    }


def _semivalue(told: dict[str, Any]) -> Semivalue:
    options = ((name, tuple(v) if isinstance(v, list) else v) for name, v in told["options"])
    return Semivalue(told["kind"], tuple(options))


def _joined(before: Any, now: pd.DataFrame) -> pd.DataFrame:
    if before is None or not len(before):
        return now
    import pandas as pd

    return pd.concat([before, now], ignore_index=True) if len(now) else before


def _warn(values: Values, rule: Stopping) -> None:
    told = values.provenance
    so = "count nowhere: values are of the others"
    tell_failed(told["failed"], told["evaluations"], values.failures, so)
    missing = int(np.isnan(values.values).sum())
    if missing:
        tell(f"{missing} of {values.n} rows have no value: no sample tells of them")
    if values.converged is False:
        tell(
            f"values did not converge: {rule} was asked for, and the run ended with "
            f"{values.stopped}; `values.more(utility, …)` goes on"
        )
