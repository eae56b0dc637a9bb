"""The command line: ``upweight --help``.

Nothing heavy is imported here: a command imports what it needs when it runs. Expected failures end
with one line on stderr and exit code 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from upweight.report import audit_cli, doctor_cli, trace_cli, value_cli
from upweight.report.terminal import printable
from upweight.version import __version__

__all__ = ["app", "main"]

app = App(
    name="upweight",
    help="Which training points made a model behave as it does, and which of them are wrong.",
    version=__version__,
)
demo = App(name="demo", help="Worked examples on data that comes with the package.")
app.command(demo)
audit_cli.register(app)
trace_cli.register(app)
value_cli.register(app)
doctor_cli.register(app)


@demo.command
def wine(
    *,
    out: Path = Path("runs/wine"),
    seed: int = 2,
    flipped: int = 10,
    epochs: int = 300,
    damping: float = 0.1,
    curvature: Literal["hessian", "ggn", "fisher"] = "hessian",
    top: Annotated[int, Parameter(help="Rows in the table of suspects.")] = 10,
    check: bool = True,
    compare: bool = True,
    quiet: bool = False,
) -> None:
    """Flip labels of wine bottles, train a network, find the flipped ones by influence.

    Writes a run folder with report.html, rows.parquet, findings.parquet, the scores, the
    settings, check.parquet with what speaks for and against the scores, and methods.parquet with
    other methods on the same rows.

    Parameters
    ----------
    out
        Run folder; one from an earlier run is replaced.
    seed
        Of everything random.
    flipped
        How many training labels are made wrong.
    epochs
        Of training.
    damping
        λ in (C + λI)⁻¹.
    curvature
        C: the Hessian, the generalised Gauss-Newton or the Fisher matrix of the training loss.
    check
        Also train again on random halves of the rows, and say whether the scores can be believed.
    compare
        Also score the rows by methods for large models, and show how far they are from exact ones.
    quiet
        Print only the path of the report.
    """
    from upweight.report import demo as walk

    if top < 1:
        raise ValueError(f"expected --top of at least 1; got {top}")
    _check_folder(out, replace=walk.is_run(out))
    settings = walk.WineSettings(
        seed=seed,
        flipped=flipped,
        epochs=epochs,
        damping=damping,
        curvature=curvature,
        check=check,
        compare=compare,
    )
    result = walk.run_wine(settings, progress=not quiet)
    path = walk.write_run(result, out, top=max(top, 20))
    if not quiet:
        _print_wine(result, top)
    print(f"report: {path}")


def _check_folder(out: Path, *, replace: bool) -> None:
    """Refuse, before long work, a folder that cannot be written."""
    if out.exists() and not replace:
        raise FileExistsError(f"{out} exists and is no run folder: choose another --out")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise NotADirectoryError(f"{folder} is no folder to write to: choose another --out")


def _print_wine(result: Any, top: int) -> None:
    print(f"F1 on {len(result.test_predicted)} test bottles: {result.f1:.3f}")
    print(f"mean influence of corrupted bottles: {result.corrupted_mean:+.4f}")
    print(f"mean influence of other bottles:     {result.other_mean:+.4f}")
    print(f"ROC AUC of flipped against not:      {result.auc:.4f}")
    suspects = result.suspects(top)
    hits = int(suspects["flipped"].sum())
    print(f"\nthe {len(suspects)} lowest rows ({hits} of them flipped):")
    shown = suspects[["row", "mean_influence", "given", "predicted", "flipped"]].copy()
    shown["flipped"] = shown["flipped"].map({True: "yes", False: "no"})
    print(shown.to_string(index=False, formatters={"mean_influence": "{:+.4f}".format}))
    if result.check is not None:
        from upweight.report.demo_check import in_a_line

        print(f"\ncan these scores be believed? {in_a_line(result.check)}")
    if result.comparison is not None:
        from upweight.report.comparison_report import terminal_table

        print("\nmean influence by other methods, against the direct one:")
        print(terminal_table(result.comparison))
    print(
        "\npositive = the row helps (up-weighting it lowers the test loss), negative = it harms\n"
    )


EXPECTED = (ValueError, TypeError, OSError, MemoryError, FloatingPointError, ArithmeticError)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and end the process with its exit code.

    0; 1 where a command was asked to fail on what it found; 2 after an error; 130 after Ctrl-C.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    for stream in (sys.stdout, sys.stderr):  # names from data may have letters it cannot write
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_none")
    except CycloptsError as error:
        _fail(f"{error} See upweight --help")
    except KeyboardInterrupt:
        _fail("stopped; nothing was written", code=130)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except EXPECTED as error:
        if debug:
            raise
        _fail(str(error) or type(error).__name__)


def _fail(message: str, code: int = 2) -> None:
    print(f"upweight: {printable(message)}", file=sys.stderr)
    raise SystemExit(code)
