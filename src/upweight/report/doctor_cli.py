"""``upweight doctor``: what to know of a language model before it is traced.

Nothing heavy is imported here: the command imports what it needs when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from upweight.report.trace_cli import Flag, Kind, hanging, needs_extra

if TYPE_CHECKING:
    from upweight.language import Finding

__all__ = ["register"]


def register(app: App) -> None:
    """Add the command."""
    app.command(doctor)


def doctor(
    model: Path,
    /,
    *,
    data: Path | None = None,
    adapter: Path | None = None,
    dtype: Kind = "float32",
    device: str = "cpu",
    max_length: int | None = None,
    truncate: Flag = False,
    text: str = "text",
    label: str = "label",
    trust_remote_code: Flag = False,
) -> None:
    """Check a language model for what would make influences wrong or slow.

    Prints a line for each check. Exit code 1 if one fails.

    Parameters
    ----------
    model
        Local folder of a Hugging Face model.
    data
        Rows to check it with, as for `upweight trace`; default: random tokens.
    adapter
        Folder of a PEFT adapter.
    dtype
        Of the model.
    device
        Such as cuda.
    max_length
        Tokens of a row; default: the model's context.
    truncate
        Cut longer rows at their end.
    text
        Name of the text of a row.
    label
        Name of its class.
    trust_remote_code
        Execute Python files in the folder of the model.
    """
    with needs_extra():
        from upweight.language import examine, load_model
        from upweight.report.trace_run import read_told

        loaded = load_model(
            model,
            dtype=dtype,
            device=device,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
        )
        limits = {"max_length": max_length, "truncate": truncate}
        keys = {"text": text, "label": label}
        rows = None if data is None else read_told(loaded, str(data), **limits, **keys)
        findings = examine(loaded, rows)
    _print(findings)
    if any(finding.state == "fail" for finding in findings):
        raise SystemExit(1)


def _print(findings: Sequence[Finding]) -> None:
    """A line for each check; what to do about it is under the line."""
    longest = max(len(finding.check) for finding in findings)
    indent = longest + 8
    for finding in findings:
        head = f"{finding.state:<4}  {finding.check:<{longest}}  "
        print(hanging(head, finding.found, indent))
        if finding.todo:
            print(hanging(" " * indent, finding.todo, indent))
    states = [finding.state for finding in findings]
    failed, warned = states.count("fail"), states.count("warn")
    print(f"\n{len(findings)} checks: {failed} failed, {warned} with a warning")
