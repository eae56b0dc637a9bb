"""``upweight audit``, ``show``, ``clean`` and ``verify``.

Nothing heavy is imported here: a command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from upweight.report.terminal import kinds_of, plain_warnings

if TYPE_CHECKING:
    from upweight.auditing.config import Config
    from upweight.auditing.settings import AuditSettings

__all__ = ["register"]

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]
Names = Annotated[list[str] | None, Parameter(negative=())]


def register(app: App) -> None:
    """Add the commands."""
    for command in (audit, show, clean, verify):
        app.command(command)


def audit(
    file: Path | None = None,
    /,
    *,
    target: str | None = None,
    task: Literal["classification", "regression"] | None = None,
    id: str | None = None,
    kind: Names = None,
    ignore: Names = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    top: int | None = None,
    seed: int | None = None,
    out: Path | None = None,
    influence: bool | None = None,
    config: Path | None = None,
    plan: Flag = False,
    json: Flag = False,
    fail_on: Names = None,
    overwrite: Flag = False,
    quiet: Flag = False,
) -> None:
    """Find the rows of a table that are wrong, and say why.

    Writes a run folder with report.html, rows.parquet, findings.csv and more. Stopped with Ctrl-C,
    the same command resumes. Exit code 1 if a condition of --fail-on holds, 2 after an error.

    Parameters
    ----------
    file
        CSV, Parquet, JSON Lines or Feather.
    target
        Column that the others should explain.
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
    top
        Rows with details in the report; default: 100.
    seed
        Of everything random; default: 0.
    out
        Run folder; default: runs/ and the name of the file.
    influence
        Whether to compute which rows harm, and which are behind a finding; default: yes.
    config
        config.yaml of a run to replay; options given beside it change single settings.
    plan
        Print what was made of each column and what the audit will take, and stop.
    json
        Print JSON, and nothing else, on stdout.
    fail_on
        Condition such as "rate>0.03" that ends with exit code 1: rate, labels, features,
        duplicates, conflicts, leakage or noise with > or >=. Repeat for more.
    overwrite
        Replace a run with other settings in the folder.
    quiet
        Print only the path of the report.
    """
    from upweight.auditing.conditions import parse_condition

    conditions = [parse_condition(text) for text in fail_on or ()]
    given: dict[str, Any] = {
        "target": target,
        "task": task,
        "id": id,
        "kinds": None if kind is None else kinds_of(kind),
        "ignore": None if ignore is None else tuple(ignore),
        "delimiter": delimiter,
        "encoding": encoding,
        "top": top,
        "seed": seed,
        "influence": influence,
    }
    from upweight.report import audit_run, audit_terminal

    base = None if config is None else _read_base(config)
    settings = _settings(given, base)
    source, digest = _source(file, base)
    folder = out or _default_folder(source, config)
    with plain_warnings():
        if plan:
            print(
                audit_terminal.plan(audit_run.plan(source, settings, digest=digest), as_json=json)
            )
            return
        with _resumable():
            outcome = audit_run.execute(
                source,
                settings,
                folder,
                digest=digest,
                progress=not quiet,
                overwrite=overwrite,
            )
    if json:
        print(audit_terminal.as_json(outcome.audit, folder, settings.top))
    elif not quiet:
        print(audit_terminal.audited(outcome.audit, folder, found=outcome.found))
    else:
        print(f"report: {folder / 'report.html'}")
    _judge(conditions, outcome.audit.summary)


def show(
    run: Path,
    /,
    *,
    row: str | None = None,
    kind: str | None = None,
    top: int = 20,
    json: Flag = False,
) -> None:
    """Show the findings of a run in the terminal.

    Parameters
    ----------
    run
        Folder that `upweight audit` has written.
    row
        Everything about one row, by its name or position.
    kind
        Only findings of this kind: label, features, duplicate, near-duplicate, conflict, harmful,
        helpful, leakage or no-target.
    top
        How many findings.
    json
        Print JSON.
    """
    from upweight.auditing.folder import read_run
    from upweight.report import audit_terminal

    if top < 1:
        raise ValueError(f"expected --top of at least 1; got {top}")
    there = read_run(run)
    if row is not None:
        print(audit_terminal.row(there, row, as_json=json))
    else:
        print(audit_terminal.findings(there, kind, top, as_json=json))


def clean(
    run: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    drop: str = "label-errors",
    relabel: Flag = False,
    overwrite: Flag = False,
    source: Path | None = None,
) -> None:
    """Write the table again without the rows that are wrong; all other cells stay as they are.

    Parameters
    ----------
    run
        Folder that `upweight audit` has written.
    out
        File to write, of the format of the table.
    drop
        label-errors, top:K (most suspicious rows), duplicates, features, or several of them joined
        by commas.
    relabel
        Give label errors and top rows the proposed label, or number, and keep them.
    overwrite
        Replace the file if it exists.
    source
        Where the table is now, if it was moved.
    """
    from upweight.auditing.cleaning import clean as write_clean

    done = write_clean(run, out, drop=drop, relabel=relabel, overwrite=overwrite, source=source)
    told = [f"{done.kept:,} rows kept", f"{done.dropped:,} dropped"]
    if relabel:
        told.append(f"{done.relabelled:,} relabelled")
    if done.unchanged:
        told.append(f"{done.unchanged:,} without a proposal kept as they are")
    print(f"{', '.join(told)}: {done.path}")


def verify(
    run: Path,
    /,
    *,
    repeats: int = 10,
    seed: int = 0,
    jobs: int = 1,
    model: Literal["boosting", "linear"] = "boosting",
    source: Path | None = None,
    json: Flag = False,
    quiet: Flag = False,
) -> None:
    """Train with the flagged rows, without them and without random ones, to see what helps.

    The answer goes to the run folder and into its report.

    Parameters
    ----------
    run
        Folder that `upweight audit` has written.
    repeats
        Random splits of the rows.
    seed
        Of the splits.
    jobs
        Processes.
    model
        Gradient boosted trees, or logistic or ridge regression, which takes a tenth of the time.
    source
        Where the table is now, if it was moved.
    json
        Print JSON, and nothing else, on stdout.
    quiet
        Print only the path of the report.
    """
    from upweight.report import audit_run, audit_terminal

    with plain_warnings():
        done = audit_run.verify_run(
            run,
            source=source,
            repeats=repeats,
            seed=seed,
            n_jobs=jobs,
            model=model,
            progress=not quiet,
        )
    if not quiet or json:
        print(audit_terminal.verified(done, as_json=json))
    if not json:
        print(f"report: {run / 'report.html'}")


# ---- from arguments to settings -----------------------------------------------------------------


def _read_base(path: Path) -> Config:
    from upweight.auditing.config import read_config

    return read_config(path / "config.yaml" if path.is_dir() else path)


def _settings(given: dict[str, Any], base: Config | None) -> AuditSettings:
    """Those of a config, with what was given beside it."""
    from dataclasses import replace

    from upweight.auditing.settings import AuditSettings

    told = {name: value for name, value in given.items() if value is not None}
    if base is not None:
        return replace(base.settings, **told)
    if "target" not in told:
        raise ValueError("expected --target NAME, the column that the others should explain")
    return AuditSettings(**told)


def _source(file: Path | None, base: Config | None) -> tuple[Path, str | None]:
    """The table, and the digest that it must have when a run is replayed."""
    if file is not None:
        return file, None
    if base is None:
        raise ValueError("expected the FILE to audit, such as table.csv")
    if base.source.path is None:
        raise ValueError("the run to replay is of a frame in memory; it can be replayed in Python")
    return Path(base.source.path), base.source.digest


def _default_folder(source: Path, config: Path | None) -> Path:
    """That of the config; else by the name of the file."""
    if config is not None:
        near = config if config.is_dir() else config.parent
        if (near / "summary.json").is_file():
            return near
    name = source.name.removesuffix(".gz")
    return Path("runs") / (Path(name).stem or name or "audit")


# ---- how it ends --------------------------------------------------------------------------------


def _judge(conditions: Sequence[Any], summary: Any) -> None:
    """Exit code 1, and why, if a condition holds."""
    holding = [one for one in conditions if one.holds(summary)]
    for one in holding:
        print(f"upweight: --fail-on {one}: it is {one.value(summary):.4g}", file=sys.stderr)
    if holding:
        raise SystemExit(1)


@contextmanager
def _resumable() -> Generator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("upweight: stopped; the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
