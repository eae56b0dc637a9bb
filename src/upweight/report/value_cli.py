"""``upweight value``: what the rows of a table are worth.

Nothing heavy is imported here: the command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from upweight.report.terminal import kinds_of, plain_warnings
from upweight.report.value_settings import Method, Model, ValueSettings

if TYPE_CHECKING:
    from upweight.report.value_plan import ValuePlan
    from upweight.report.value_run import Outcome

__all__ = ["register"]

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]
Names = Annotated[list[str] | None, Parameter(negative=())]


def register(app: App) -> None:
    """Add the command."""
    app.command(value)


def value(
    file: Path,
    /,
    *,
    target: str,
    method: Method = "knn-shapley",
    out: Path | None = None,
    task: Literal["classification", "regression"] | None = None,
    id: str | None = None,
    kind: Names = None,
    ignore: Names = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    test: Path | None = None,
    k: int | None = None,
    p: float | None = None,
    model: Model | None = None,
    scoring: str | None = None,
    evaluations: int | None = None,
    minutes: float | None = None,
    until_stable: float | None = None,
    jobs: int = 1,
    seed: int = 0,
    top: int = 20,
    plan: Flag = False,
    json: Flag = False,
    overwrite: Flag = False,
    quiet: Flag = False,
) -> None:
    """Find what each row of a table is worth to a model, and which rows harm it.

    Writes a run folder with report.html, values.parquet, values.csv and more. Stopped with Ctrl-C,
    the same command resumes.

    Parameters
    ----------
    file
        CSV, Parquet, JSON Lines or Feather.
    target
        Column that the others should explain.
    method
        knn-shapley: exact values by the nearest rows, in seconds. oob: by trees that have not seen
        the row. tmc, shapley, banzhaf, beta (16, 1): by models trained on random sets of rows. loo:
        by leaving out each row once.
    out
        Run folder; default: runs/, the name of the file and the method.
    task
        Default: by the target's values.
    id
        Column that names the rows.
    kind
        What a column is, where the guess is wrong, as NAME=KIND: numeric, category, boolean, date,
        text, id or ignored. Repeat for more columns.
    ignore
        Column to leave out. Repeat for more.
    delimiter
        Of a CSV file; default: found.
    encoding
        Of a text file; default: found.
    test
        File with rows that judge those of the table; default: these judge each other.
    k
        Nearest rows that vote, in knn-shapley; default: 5.
    p
        Share of the rows in a set, in banzhaf; default: 0.05, but eight rows, or two of each class.
    model
        What is trained on sets of rows; default: ridge, which is the fastest by far.
    scoring
        log_likelihood, brier or accuracy; neg_mean_squared_error or r2 of numbers. Default: the
        first.
    evaluations
        Models to train at most; default: 100 a row, at least 2,000, or what the minutes allow.
    minutes
        To spend at most.
    until_stable
        Stop when another run would rank the rows with at least this correlation; default: 0.95.
    jobs
        Workers, -1 for all cores. It does not change the result.
    seed
        Of everything random.
    top
        Rows to list from either end.
    plan
        Print what was made of each column and what the values will take, and stop.
    json
        Print JSON, and nothing else, on stdout.
    overwrite
        Replace a run with other settings in the folder; what it has computed is used again.
    quiet
        Print only the path of the report.
    """
    settings = ValueSettings(
        target=target,
        method=method,
        task=task,
        id=id,
        kinds=_checked_kinds(kind),
        ignore=tuple(ignore or ()),
        delimiter=delimiter,
        encoding=encoding,
        test=None if test is None else str(test),
        k=k,
        p=p,
        model=model,
        scoring=scoring,
        evaluations=evaluations,
        minutes=minutes,
        until_stable=until_stable,
        seed=seed,
        top=top,
    ).completed()
    if jobs == 0:
        raise ValueError("expected --jobs of at least 1, or -1 for all cores; got 0")
    folder = out or _default_folder(file, method)
    from upweight.report import value_run

    with plain_warnings():
        if plan:
            from upweight.report import value_plan

            print(_plan(value_plan.plan(file, settings), as_json=json))
            return
        with _resumable(folder):
            outcome = value_run.execute(
                file, settings, folder, jobs=jobs, progress=not quiet, overwrite=overwrite
            )
    if json:
        print(_as_json(outcome))
    elif quiet:
        print(f"report: {folder / 'report.html'}")
    else:
        print(_told(outcome))


def _checked_kinds(kind: list[str] | None) -> Any:
    return {} if kind is None else kinds_of(kind)


def _default_folder(file: Path, method: str) -> Path:
    name = Path(file.name.removesuffix(".gz")).stem or "table"
    return Path("runs") / f"{name}-{method}"


@contextmanager
def _resumable(folder: Path) -> Generator[None]:
    try:
        yield
    except KeyboardInterrupt:
        from upweight.report.value_folder import CACHE

        kept = "utilities are kept: " if (folder / CACHE).exists() else ""
        print(f"upweight: stopped; {kept}the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None


# ---- what is printed -----------------------------------------------------------------------------


def _plan(found: ValuePlan, *, as_json: bool) -> str:
    from upweight.report.terminal import escaped

    if not as_json:
        return "\n".join(escaped(line) for line in str(found).splitlines())
    from upweight.auditing.plain import to_plain

    ready = found.ready
    return _dumped(
        {
            "task": ready.task,
            "method": ready.settings.method,
            "what": ready.described,
            "rows": len(ready.rows),
            "columns": [to_plain(column) for column in ready.columns],
            "evaluations": found.evaluations,
            "seconds": float(found.seconds),
        }
    )


def _told(outcome: Outcome) -> str:
    from upweight.report.terminal import cut, printable, table, wrapped
    from upweight.report.value_run import frame_of
    from upweight.report.value_text import (
        has_intervals,
        head,
        longer,
        named_alike,
        number,
        range_text,
        sureness,
    )
    from upweight.valuation.values import MEANING

    found, values = outcome.ready, outcome.values
    signed = values.meaning == MEANING
    frame: Any = frame_of(found, values)
    low = frame[frame["value"].notna()].sort_values(["value", "row"])
    low = low.head(found.settings.top)
    lines = low.to_dict("records")
    columns: dict[str, list[object]] = {
        "row": [
            str(line["row"])
            if line["name"] == str(line["row"])
            else f"{line['row']} ({cut(line['name'], 24)})"
            for line in lines
        ],
        "value": [number(line["value"], signed) for line in lines],
    }
    if has_intervals(values):
        columns["95 % interval"] = [range_text(line["low"], line["high"], signed) for line in lines]
    columns[f"given {printable(found.settings.target)}"] = [line["given"] for line in lines]
    parts = [
        f"{printable(head(found))}\n{printable(found.described)}",
        f"the {len(low):,} lowest rows:\n{table(columns, right=['value'])}",
        "\n".join(wrapped(told) for told in (*sureness(found, values), *named_alike(found))),
        wrapped(values.meaning),
        f"report: {outcome.folder / 'report.html'}",
    ]
    again = longer(outcome)
    if again:
        parts[-1] += f"\nnext:   {printable(again)}"
    if outcome.found:
        parts[-1] = f"(found in the folder: the run was finished before)\n{parts[-1]}"
    return "\n\n".join(parts)


def _as_json(outcome: Outcome) -> str:
    from upweight.auditing.plain import to_plain
    from upweight.report.value_run import frame_of

    found, values = outcome.ready, outcome.values
    frame: Any = frame_of(found, values)
    known = frame[frame["value"].notna()].sort_values(["value", "row"])
    top = found.settings.top
    history: Any = values.history
    last = history.iloc[-1].to_dict() if len(history) else None
    told = values.provenance
    return _dumped(
        {
            "run": str(outcome.folder),
            "report": str(outcome.folder / "report.html"),
            "method": found.settings.method,
            "what": found.described,
            "meaning": values.meaning,
            "task": found.task,
            "rows": len(found.rows),
            "converged": values.converged,
            "stopped": values.stopped,
            "evaluations": told.get("evaluations"),
            "computed": told.get("computed"),
            "failed": told.get("failed", 0),
            "stability": to_plain(last),
            "lowest": _records(known.head(top)),
            "highest": _records(known.iloc[::-1].head(top)),
        }
    )


def _records(frame: Any) -> list[dict[str, Any]]:
    from upweight.auditing.plain import to_plain

    return [{str(k): to_plain(v) for k, v in line.items()} for line in frame.to_dict("records")]


def _dumped(content: object) -> str:
    import json

    return json.dumps(content, indent=2, allow_nan=False)
