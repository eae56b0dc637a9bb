"""From a language model, training rows and queries to a run folder: ``upweight trace``."""

from __future__ import annotations

import math
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from upweight.curvature.coverage import coverage
from upweight.language import (
    Loaded,
    TokenRows,
    check_rows,
    influence_for,
    load_model,
    read_rows,
    token_scores,
)
from upweight.methods import Influence
from upweight.recipes import EKFAC
from upweight.report.audit_text import counted
from upweight.scores import Scores
from upweight.stream import atomic_write
from upweight.version import __version__

__all__ = [
    "REPORT",
    "Highlight",
    "Prepared",
    "TraceResult",
    "TraceSettings",
    "finish_folder",
    "is_trace",
    "prepare",
    "read_told",
    "run",
    "start_folder",
]

SETTINGS = "settings.yaml"
COMMAND = "trace"
FACTORS = "factors.safetensors"
REPORT = "report.html"
PREVIEW = 200  # characters of a text in the tables
# Whose tokens are scored: so many queries, each with so many rows of either sign.
SHOWN_QUERIES = 20
SHOWN_ROWS = 5
COLUMNS = (
    *("query", "query_name", "direction", "rank"),
    *("row", "name", "score", "text", "query_text"),
)


@dataclass(frozen=True)
class TraceSettings:
    """What ``upweight trace`` was told."""

    model: str
    train: str
    query: str
    adapter: str | None = None
    damping: float = 0.1
    k: int = 10
    dtype: str = "float32"
    device: str = "cpu"
    max_length: int | None = None
    truncate: bool = False
    parameters: tuple[str, ...] | None = None
    seed: int = 0
    batch: int | None = None
    text: str = "text"
    label: str = "label"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse what no run can have."""
        counts = {"top": self.k, "batch": self.batch, "max-length": self.max_length}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"expected --{name} of at least 1; got {value}")
        if not (self.damping > 0.0 and math.isfinite(self.damping)):
            raise ValueError(f"expected --damping above 0; got {self.damping}")


@dataclass(frozen=True)
class Prepared:
    """A model with its rows, all checked, before the work."""

    settings: TraceSettings
    loaded: Loaded
    train: TokenRows
    queries: TokenRows
    influence: Influence
    covered: float
    chosen: int
    total: int

    def plan(self) -> list[tuple[str, str]]:
        """What will be done, by a word each."""
        model, train, queries = self.loaded.model, self.train, self.queries
        kind = type(model.get_base_model() if hasattr(model, "peft_config") else model).__name__
        adapter = " with an adapter" if self.settings.adapter else ""
        each = self.settings.damping
        return [
            ("model", f"{kind}{adapter}, {self.total:,} parameters, {self.settings.dtype}"),
            ("training", _told_rows(train)),
            ("queries", _told_rows(queries)),
            (
                "parameters",
                f"{self.chosen:,} ({100 * self.chosen / self.total:.1f} % of the model)",
            ),
            ("covered", f"{100 * self.covered:.1f} % of them have Kronecker factors"),
            ("method", f"EK-FAC, damping {each:g} × the mean eigenvalue of each layer"),
            ("scores", f"{len(queries):,} × {len(train):,}"),
        ]


def _told_rows(rows: TokenRows) -> str:
    counts = rows.loss_tokens
    told = f"{counted(len(rows), 'row')}, {counted(rows.tokens, 'token')}"
    if rows.task == "causal":
        told += f" ({int(counts.sum()):,} in the loss)"
    told += f", the longest {rows.length:,}"
    empty = int((counts == 0).sum())
    if rows.cut:
        told += f"; {rows.cut:,} truncated"
    if empty:
        told += f"; {empty:,} without a token in the loss score 0"
    return told


@dataclass(frozen=True)
class Highlight:
    """The tokens of a training row, and what each contributes to a score."""

    pieces: list[str]
    scores: np.ndarray


@dataclass(frozen=True)
class TraceResult:
    """What a run found.

    Attributes
    ----------
    rows
        A line for every training row, with its mean score over the queries.
    top
        The rows that help and harm each query most.
    highlights
        By query and training row (positions), for the first of `top`.
    """

    prepared: Prepared
    scores: Scores
    rows: pd.DataFrame
    top: pd.DataFrame
    notes: list[str]
    highlights: dict[tuple[int, int], Highlight] = field(
        default_factory=dict[tuple[int, int], Highlight]
    )


def prepare(settings: TraceSettings) -> Prepared:
    """Load the model, read the rows, and check that all of it fits together.

    Raises
    ------
    ValueError, TypeError, OSError, ImportError
        With a message of one line.
    """
    for path in (settings.train, settings.query):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}: expected JSON Lines, Parquet or CSV")
    loaded = load_model(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        adapter=settings.adapter,
        trust_remote_code=settings.trust_remote_code,
    )
    train = _read(settings, loaded, settings.train, queries=False)
    queries = _read(settings, loaded, settings.query, queries=True)
    check_rows(loaded, queries, settings.query)
    classifier = loaded.task == "classification"
    recipe = EKFAC(
        fisher="exact" if classifier else "sampled", seed=settings.seed, relative="layer"
    )
    influence = influence_for(
        loaded,
        train,
        damping=settings.damping,
        method=recipe,
        parameters=settings.parameters,
        batch_size=settings.batch,
    )
    usable = np.flatnonzero(train.loss_tokens)
    if not len(usable):
        raise ValueError(f"{settings.train}: no row has a token that counts in the loss")
    few = influence.risk(train.chosen(usable[:4].tolist()), what=settings.train)
    lines = coverage(few)
    covered = float(lines.loc[lines["how"] == "kronecker", "parameters"].sum()) / few.p
    total = sum(p.numel() for p in loaded.model.parameters())
    return Prepared(settings, loaded, train, queries, influence, covered, few.p, total)


def _read(settings: TraceSettings, loaded: Loaded, path: str, *, queries: bool) -> TokenRows:
    return read_told(
        loaded,
        path,
        max_length=settings.max_length,
        truncate=settings.truncate,
        text=settings.text,
        label=settings.label,
        queries=queries,
    )


def read_told(loaded: Loaded, path: str, **options: Any) -> TokenRows:
    """Rows of a file as a model takes them: `read_rows` with what the model tells.

    Errors begin with the path.
    """
    config = loaded.model.config
    try:
        return read_rows(
            path,
            loaded.tokenizer,
            task=loaded.task,
            context=loaded.context,
            labels=getattr(config, "label2id", None),
            pad=getattr(config, "pad_token_id", None),
            **options,
        )
    except (ValueError, TypeError) as error:
        told = str(error)
        raise ValueError(told if told.startswith(path) else f"{path}: {told}") from error


# ---- the folder ----------------------------------------------------------------------------------


def is_trace(folder: Path) -> bool:
    """Whether a folder was written by ``upweight trace``, complete or not."""
    try:
        found = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(found, dict) and found.get("command") == COMMAND


def start_folder(settings: TraceSettings, folder: Path, *, restart: bool = False) -> None:
    """Make the run folder, or make that of an earlier run ready, and write the settings.

    What a run that was stopped has computed stays there, unless it is to `restart`.

    Raises
    ------
    FileExistsError, OSError
        If something else is there, or it cannot be written.
    """
    if folder.exists() and not is_trace(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is no folder of upweight trace: choose another --out"
        )
    try:
        _start(settings, folder, restart)
    except OSError as error:
        told = f"cannot write to {folder} ({error.strerror or error}): choose another --out"
        raise OSError(told) from error


def _start(settings: TraceSettings, folder: Path, restart: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if restart or (folder / REPORT).exists():
        (folder / FACTORS).unlink(missing_ok=True)
        for left in folder.glob(".scores.*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    for name in (REPORT, "rows.parquet", "top.parquet"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "scores", ignore_errors=True)
    config = {
        "command": COMMAND,
        "settings": _plain(asdict(settings)),
        "versions": _versions(),
    }
    with atomic_write(folder / SETTINGS) as path:
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def finish_folder(folder: Path) -> None:
    """Remove what is only there for a run that is stopped to go on."""
    (folder / FACTORS).unlink(missing_ok=True)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"upweight": __version__}
    for name in ("torch", "transformers", "peft", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run(prepared: Prepared, folder: Path) -> TraceResult:
    """Fit, score, and write the tables; the page is made of the result.

    A run of the same work that was stopped is gone on with.

    Raises
    ------
    ValueError
        If what is left of a run that was stopped is of other work.
    """
    influence, train, queries = prepared.influence, prepared.train, prepared.queries
    with _or_anew(folder):
        influence.fit(train, factors=folder / FACTORS)
        scores = influence.scores(queries, to=folder / "scores")
    rows = _rows(train, scores)
    top = _top(train, queries, scores, prepared.settings.k)
    highlights = _highlights(influence, train, queries, top)
    with atomic_write(folder / "rows.parquet") as path:
        rows.to_parquet(path)
    with atomic_write(folder / "top.parquet") as path:
        top.to_parquet(path)
    return TraceResult(prepared, scores, rows, top, influence.certificate.notes, highlights)


@contextmanager
def _or_anew(folder: Path) -> Generator[None]:
    """Say how to begin anew where what an earlier run has left in the folder is refused."""
    try:
        yield
    except ValueError as error:
        if str(folder) not in str(error):
            raise
        raise ValueError(
            f"an earlier run was stopped here, with other work: {error}. To begin anew in this "
            "folder: --restart"
        ) from error


def _rows(train: TokenRows, scores: Scores) -> pd.DataFrame:
    mean = scores.mean().values.double().numpy()
    return pd.DataFrame(
        {
            "row": np.arange(len(train)),
            "name": [str(name) for name in train.names],
            "score": mean,
            "rank": pd.Series(-mean).rank(method="first").astype(int).to_numpy(),
            "tokens": [len(ids) for ids in train.ids],
            "loss_tokens": train.loss_tokens,
            "text": [_preview(text) for text in train.texts],
        }
    )


def _preview(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= PREVIEW else line[: PREVIEW - 1].rstrip() + "…"


def _top(train: TokenRows, queries: TokenRows, scores: Scores, k: int) -> pd.DataFrame:
    """The k rows of either sign for every query, the strongest first; the sign is that of a score.

    Equal scores stand in the order of the rows.
    """
    found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for start, block in scores.blocks():
        for at, values in enumerate(block.double().numpy(), start=start):
            for direction, sign in (("helpful", 1.0), ("harmful", -1.0)):
                order = np.argsort(-sign * values, kind="stable")[:k]
                for rank, row in enumerate(order[sign * values[order] > 0.0], start=1):
                    line = (
                        at,
                        str(queries.names[at]),
                        direction,
                        rank,
                        int(row),
                        str(train.names[row]),
                        float(values[row]),
                        train.texts[row],
                        queries.texts[at],
                    )
                    for name, value in zip(COLUMNS, line, strict=True):
                        found[name].append(value)
    return pd.DataFrame(found)


def _highlights(
    influence: Influence, train: TokenRows, queries: TokenRows, top: pd.DataFrame
) -> dict[tuple[int, int], Highlight]:
    """Scores of the tokens of the first rows of the first queries; none for a classifier."""
    found: dict[tuple[int, int], Highlight] = {}
    if train.task == "classification":
        return found
    some = top[(top["query"] < SHOWN_QUERIES) & (top["rank"] <= SHOWN_ROWS)]
    for query, lines in some.groupby("query"):
        rows: Sequence[int] = [int(row) for row in lines["row"]]
        at = int(query)  # pyright: ignore[reportArgumentType]
        by_row = token_scores(influence, queries.chosen([at]), train.chosen(rows))
        for row, tokens in zip(rows, by_row, strict=True):
            found[at, row] = Highlight(train.pieces(row), tokens[0])
    return found
