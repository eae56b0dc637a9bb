"""``upweight trace``: which training rows made a language model answer so.

Nothing heavy is imported here: the command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from upweight.report.trace_run import TraceResult

__all__ = ["Flag", "Kind", "hanging", "needs_extra", "register"]

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]
Names = Annotated[list[str] | None, Parameter(negative=())]
Kind = Literal["float32", "float64", "bfloat16", "float16", "auto"]


def register(app: App) -> None:
    """Add the command."""
    app.command(trace)


def trace(
    model: Path,
    /,
    *,
    train: Path,
    query: Path,
    out: Path,
    adapter: Path | None = None,
    damping: float = 0.1,
    k: Annotated[int, Parameter(name=["--top", "-k"])] = 10,
    dtype: Kind = "float32",
    device: str = "cpu",
    max_length: int | None = None,
    truncate: Flag = False,
    parameters: Names = None,
    text: str = "text",
    label: str = "label",
    seed: int = 0,
    batch: int | None = None,
    restart: Flag = False,
    plan: Flag = False,
    trust_remote_code: Flag = False,
    quiet: Flag = False,
) -> None:
    """Find the training rows behind what a language model says.

    Writes a run folder with report.html, rows.parquet (every training row with its mean score),
    top.parquet (the rows that help and harm each query most), scores and settings.yaml.

    Parameters
    ----------
    model
        Local folder of a Hugging Face model: a causal language model or a sequence classifier.
    train
        Rows that it was trained on, as JSON Lines, Parquet or CSV: messages, prompt and completion,
        instruction and output, text, or text and label.
    query
        Rows to explain, of such a form.
    out
        Run folder; one from an earlier trace is replaced.
    adapter
        Folder of a PEFT adapter; its parameters alone are then differentiated by.
    damping
        λ as a share of each layer's mean eigenvalue.
    k
        Rows of either sign for each query.
    dtype
        Of the model.
    device
        Such as cuda.
    max_length
        Tokens of a row; default: the model's context.
    truncate
        Cut longer rows at their end, instead of refusing them.
    parameters
        Name pattern of parameters to differentiate by. Repeat for more. Default: linear layers in
        the blocks, or those of the adapter.
    text
        Name of the text of a row.
    label
        Name of its class.
    seed
        Of the labels that are drawn from the model.
    batch
        At most so many rows at once; never changes a result.
    restart
        Begin anew where an earlier run was stopped; otherwise the same command goes on with it.
    plan
        Print what will be done, and stop.
    trust_remote_code
        Execute Python files in the folder of the model.
    quiet
        Print only the path of the report.
    """
    from upweight.report import trace_page, trace_run

    settings = trace_run.TraceSettings(
        model=str(model),
        train=str(train),
        query=str(query),
        adapter=None if adapter is None else str(adapter),
        damping=damping,
        k=k,
        dtype=dtype,
        device=device,
        max_length=max_length,
        truncate=truncate,
        parameters=None if parameters is None else tuple(parameters),
        seed=seed,
        batch=batch,
        text=text,
        label=label,
        trust_remote_code=trust_remote_code,
    )
    with needs_extra():
        prepared = trace_run.prepare(settings)
        if plan or not quiet:
            for name, told in prepared.plan():
                print(hanging(f"{name:<11}", told, 11), flush=True)
        if plan:
            return
        trace_run.start_folder(settings, out, restart=restart)
        with _resumable():
            result = trace_run.run(prepared, out)
            path = trace_page.write(result, out / trace_run.REPORT)
            trace_run.finish_folder(out)
    if not quiet:
        _print(result)
    print(f"report: {path}")


def _print(result: TraceResult) -> None:
    """The rows that matter most on average, as a table."""
    from upweight.report.terminal import table

    ordered = result.rows.sort_values(["score", "row"], ascending=[False, True])
    for some, told in (
        (ordered[ordered["score"] > 0].head(5), "help most on average"),
        (ordered[ordered["score"] < 0].tail(5)[::-1], "harm most on average"),
    ):
        if len(some):
            print(f"\nrows that {told}:")
            scores = [f"{score:+.3g}" for score in some["score"]]
            columns = {"row": list(some["name"]), "score": scores, "text": list(some["text"])}
            print(table(columns, right=("score",)))
    print()


@contextmanager
def _resumable() -> Generator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("upweight: stopped; the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None


def hanging(head: str, text: str, indent: int) -> str:
    """A text after its heading, over several lines that are indented below."""
    import shutil
    import textwrap

    from upweight.report.terminal import printable

    cells = max(shutil.get_terminal_size((100, 24)).columns, 60)
    below = " " * indent
    return textwrap.fill(printable(text), cells, initial_indent=head, subsequent_indent=below)


@contextmanager
def needs_extra() -> Generator[None]:
    """A missing package of the extra ``hf`` is an expected failure, told in one line."""
    try:
        yield
    except ImportError as error:
        raise OSError(str(error)) from error
