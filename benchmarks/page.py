"""Write docs/benchmarks.md and its figures from the results: all that it says is in them.

.venv/bin/python benchmarks/page.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from figures import quality_by_damping, quality_by_seconds, seconds_of
from page_audit import audit_part
from page_values import values_part
from scale_page import scale_part
from sides import LIBRARIES, OWN
from tables import HERE, RESULTS

DOCS = HERE.parent / "docs"
FIGURES = Path("_static") / "benchmarks"

# in the order of the tables
NAMES = {
    "predict": "one Newton step",
    "predict-ensemble": "one Newton step, ten models",
    "direct": "exact GGN",
    "direct-hessian": "exact Hessian",
    "direct-ensemble": "exact GGN, ten models",
    "cg": "conjugate gradients",
    "lissa": "LiSSA",
    "arnoldi": "Arnoldi",
    "nystroem": "Nyström",
    "ekfac": "EK-FAC",
    "ekfac-ensemble": "EK-FAC, ten models",
    "kfac": "K-FAC",
    "diagonal": "diagonal",
    "datainf": "DataInf",
    "logra": "LoGra",
    "trak": "TRAK, one model",
    "trak-10": "TRAK, ten models",
    "tracin": "TracInCP",
    "grad-dot": "gradient dot product",
    "grad-cos": "gradient cosine",
}

Methods = list[dict[str, Any]]

HEAD = """# Benchmarks

Every method of upweight and of five other libraries on the same weights, the same rows and the same
grid of dampings, in one run, each in a process of its own with one thread. This page is written by
`benchmarks/page.py` from the files in `benchmarks/results`; `make bench` measures them anew.
`benchmarks/peers/README.md` says how each library is set up.

{stamps}

**How to read the tables.** *best* is the best setting of a method over the dampings and, where it
has one, over the rank or the dimension of its projection. It was chosen by looking at the truth,
which a user cannot do: it is the most that a method could give here. *default* is what the library
takes where nothing is said, and "–" where it has no default or gives no answer with it. *first* are
the seconds of the first fit and scores in a process that has imported the library, *again* those of
a later call, where the method is quick enough to be called again. *MiB* is the growth of the
resident memory. *×* is seconds, or memory, over those of upweight's method of the same name: above
1 upweight needs less. A method that is too slow has tried fewer settings, the promising ones first:
*tried* are those that gave an answer, of all.

The default of upweight is `damping="auto"`, from the record of the training where the problem has
it, else from held-out rows, and never from a retrained model; with it the GGN takes the place of a
Hessian that is indefinite. *One Newton step* is `Influence.predict`, which is no sum of scores.
"""

TRUTH = """## How true are the scores?

The linear datamodeling score: a model is trained anew on each of many random halves of the rows; a
method predicts how good each is at a test row by the sum of the scores of the rows it was trained
on. The rank correlation of prediction and truth over the halves, mean over the test rows: 1 is
perfect, 0 is no better than chance. The interval is 95 % by a bootstrap over test rows and halves.
What is predicted is the margin of the label, log p/(1 − p). Methods that explain the loss rank the
rows alike, because the gradients of a row's loss and of its margin are parallel.
"""

DAMPING = """## Which rule finds the damping?

Small networks on three tables, with trainings of several kinds; half subsets of the rows trained
anew with `upweight.Retraining`. The linear datamodeling score of sums of influences · of one
Newton step, at the λ of every rule. *record*: weight decay + (1 − momentum) / (mean learning rate
× steps); *plain*: the same without the momentum; *held-out*: where the loss predicted for left-
out training rows is that of held-out rows; *scale*: the mean eigenvalue of the curvature;
*decay*: the weight decay alone. *auto* is what `damping="auto"` takes with the record or with
held-out rows: the larger of theirs and the mean eigenvalue, unless the model is linear in its
parameters. *best* is the best of a grid, chosen by looking at the truth; the last line is how far
each rule is below it. That the larger of the two is taken was decided on these settings; the
tables above are another matter.
"""

RETRAINING = """## How fast is retraining?

Processor time of one training of a 64-64-10 network on 500 rows for 20 epochs: many copies trained
at once by `upweight.Retraining`, beside a plain loop over a module and its optimiser, and beside
`upweight.train`.
"""

MISLABEL = """## Which methods find wrong labels?

Of the training labels {share:.0%} are flipped and a network is trained on them, {seeds} times with
other splits, flips and weights. The area under the ROC curve (AUC) of finding the flipped rows by a
low mean influence on held-out rows with right labels, and (*self*) by a high influence of a row on
itself. 0.5 is chance. The row's own loss is the baseline, and hard to beat although it costs
nothing, so that an AUC says less about a method than the tables above. Ranges are over the
trainings; seconds and memory are for held-out and training rows together as test rows.
"""


def load(path: Path) -> dict[str, Any]:
    """A file of results."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first two columns are text."""
    lines = [head, ["---", "---", *["--:"] * (len(head) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Seconds, ratios or MiB in two or three digits."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


def stamps(results: Mapping[str, dict[str, Any]]) -> str:
    """When, where and with which versions."""
    rows = []
    for name, found in results.items():
        of = found["versions"]
        if isinstance(of[OWN], str):  # of a result that is ours alone
            of = {OWN: of}
        shown = ", ".join(
            f"{library} {of[library][library]}"
            for library in (*LIBRARIES, "cleanlab")
            if library in of
        )
        torch = of[OWN]["torch"]
        rows.append([name, found["date"], found["machine"], f"{shown}; torch {torch}"])
    return table(["results", "date", "machine", "versions"], rows).replace("--:", "---")


def order(method: str) -> tuple[int, str]:
    """Known methods in the order of `NAMES`, then the others."""
    names = list(NAMES)
    return (names.index(method) if method in NAMES else len(names), method)


def name_of(method: str) -> str:
    """In words."""
    return NAMES.get(method, method)


def matrix(methods: Methods, quality: str) -> str:
    """Methods × libraries: the best of each, the highest of all in bold."""
    cells = {(m["method"], m["library"]): m for m in methods}
    highest = max(f"{m['best'][quality]:.3f}" for m in methods if "best" in m)

    def cell(method: str, library: str) -> str:
        line = cells.get((method, library))
        if line is None:
            return ""
        if "best" not in line:
            return "no answer"
        text = f"{line['best'][quality]:.3f}"
        return f"**{text}**" if text == highest else text

    rows = [
        [name_of(method), *(cell(method, library) for library in LIBRARIES)]
        for method in sorted({m["method"] for m in methods}, key=order)
    ]
    lines = [["method", *LIBRARIES], ["---", *["--:"] * len(LIBRARIES)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(line: dict[str, Any], own: dict[str, Any] | None, of: Callable[[Any], float]) -> str:
    if line["library"] == OWN or own is None or "best" not in own:
        return ""
    return f"{number(of(line['best']) / of(own['best']))} ×"


def _setting(best: Mapping[str, Any]) -> str:
    damping = "" if best["damping"] == "none" else f"λ = {best['damping']}"
    return ", ".join(filter(None, (damping.replace("λ = default", "default"), best["variant"])))


def _seconds_ratio(line: dict[str, Any], own: dict[str, Any] | None) -> str:
    """By later calls if both have any, otherwise by first ones."""
    if own is None or "best" not in own:
        return ""
    both = all("warm_s" in of["best"] for of in (line, own))
    return _ratio(line, own, seconds_of if both else lambda best: best["first_s"])


def details(
    methods: Methods, quality: str, interval: str, extra: Mapping[str, str] | None = None
) -> str:
    """A line for each method of each library, the best first."""
    extra = extra or {}
    head = ["library", "method", "best", "interval" if interval == "interval" else "range"]
    head += ["at", "default", *extra, "first s", "again s", "×", "MiB", "×", "tried"]
    own = {m["method"]: m for m in methods if m["library"] == OWN}
    rows = []
    for m in sorted(methods, key=lambda m: -m.get("best", {quality: -1})[quality]):
        label = [m["library"], name_of(m["method"])]
        tried = f"{sum(quality in run for run in m['runs'])}/{len(m['runs'])}"
        if "best" not in m:
            rows.append([*label, "no answer", *[""] * (len(head) - 4), tried])
            continue
        best, mine = m["best"], own.get(m["method"])
        low, high = best[interval]
        rows.append(
            [
                *label,
                f"{best[quality]:.3f}",
                f"{low:.3f} – {high:.3f}",
                _setting(best),
                f"{m['default'][quality]:.3f}" if "default" in m else "–",
                *(f"{best[key]:.3f}" for key in extra.values()),
                number(best["first_s"]),
                number(best["warm_s"]) if "warm_s" in best else "",
                _seconds_ratio(m, mine),
                number(best["peak_mb"]),
                _ratio(m, mine, lambda best: best["peak_mb"]),
                tried,
            ]
        )
    return table(head, rows)


def errors(methods: Methods) -> str:
    """What the libraries said where a method gave no answer at any setting."""
    lines = [
        f"- {m['library']}, {name_of(m['method'])}: `{m['error'].splitlines()[0][:200]}`"
        for m in methods
        if "best" not in m
    ]
    return "\n".join(["\n", "No answer:", "", *lines]) if lines else ""


def truth_part(found: dict[str, Any], docs: Path) -> str:
    """The tables and figures of truth.json."""
    parts = [TRUTH.rstrip()]
    for name, problem in found["problems"].items():
        methods = problem["methods"]
        by_seconds, by_damping = (
            FIGURES / f"truth-{name}-{kind}.svg" for kind in ("seconds", "damping")
        )
        label = "linear datamodeling score"
        quality_by_seconds(methods, "lds", label, NAMES, docs / by_seconds)
        quality_by_damping(methods, "lds", label, NAMES, docs / by_damping)
        parts += [
            f"### {problem['title']}",
            f"{problem['parameters']:,} parameters, {problem['train_rows']:,} training and "
            f"{problem['test_rows']:,} test rows of scikit-learn's handwritten digits, "
            f"{problem['subsets']:,} halves. Dampings: {', '.join(found['dampings'])}, and the "
            "library's default.",
            matrix(methods, "lds"),
            f"![Linear datamodeling score by seconds: {problem['title']}]({by_seconds})",
            f"![Linear datamodeling score by damping: {problem['title']}]({by_damping})",
            details(methods, "lds", "interval") + errors(methods),
        ]
    return "\n\n".join(parts)


def mislabel_part(found: dict[str, Any], docs: Path) -> str:
    """The tables and figures of mislabel.json."""
    parts = [MISLABEL.format(share=found["flipped"], seeds=found["settings"]["seeds"]).rstrip()]
    for name, data in found["data"].items():
        methods = data["methods"]
        figure = FIGURES / f"mislabel-{name}-seconds.svg"
        quality_by_seconds(methods, "auc", "AUC of the mean influence", NAMES, docs / figure)
        low, high = data["loss"]["auc_range"]
        parts += [
            f"### {name.replace('_', ' ').capitalize()}",
            f"A {'-'.join(map(str, data['sizes']))} network, {data['parameters']:,} parameters, "
            f"{data['train_rows']:,} training rows of which {data['flipped']:,} have a wrong "
            f"label, {data['held_out_rows']:,} held-out rows. By the row's own loss alone: "
            f"**{data['loss']['auc']:.3f}** ({low:.3f} – {high:.3f}).",
            matrix(methods, "auc"),
            f"![AUC by seconds: {name.replace('_', ' ')}]({figure})",
            details(methods, "auc", "auc_range", {"self": "auc_self"}) + errors(methods),
        ]
    return "\n\n".join(parts)


def damping_part(found: dict[str, Any]) -> str:
    """The rules by setting, and how far each is from the best."""
    rules = [
        "auto, both",
        "auto, record",
        "auto, held-out",
        "record",
        "held-out",
        "scale",
        "plain",
        "decay",
    ]

    def cell(setting: dict[str, Any], rule: str) -> str:
        line = setting["rules"].get(rule)
        return "–" if line is None else f"{line['sum']:.3f} · {line['newton']:.3f}"

    rows = [
        [name, *(cell(setting, rule) for rule in rules), _best(setting)]
        for name, setting in found["table"].items()
    ]
    lost = ["*mean loss*"]
    for rule in rules:
        pairs = [
            [_top(setting, key) - setting["rules"][rule][key] for key in ("sum", "newton")]
            for setting in found["table"].values()
            if rule in setting["rules"]
        ]
        means = [sum(side) / len(side) for side in zip(*pairs, strict=True)]
        lost.append(f"{means[0]:.3f} · {means[1]:.3f}")
    rows.append([*lost, ""])
    settings = found["settings"]
    told = f"{settings['subsets']} halves, {settings['seeds']} trainings of each."
    return "\n\n".join([DAMPING.rstrip(), told, table(["setting", *rules, "best"], rows)])


def _top(setting: dict[str, Any], key: str) -> float:
    return max(line[key] for line in setting["grid"])


def _best(setting: dict[str, Any]) -> str:
    return f"{_top(setting, 'sum'):.3f} · {_top(setting, 'newton'):.3f}"


def retraining_part(found: dict[str, Any]) -> str:
    """Seconds of one training, stacked and one by one."""
    rows = [
        [
            name,
            f"{1e3 * line['stacked_cpu_s']:.1f}",
            f"{1e3 * line['plain_cpu_s']:.1f}",
            f"{line['plain_over_stacked_cpu']:.1f}",
            f"{line['train_over_stacked_cpu']:.1f}",
        ]
        for name, line in found["table"].items()
    ]
    head = ["copies", "stacked, ms", "plain loop, ms", "plain / stacked", "train / stacked"]
    return "\n\n".join([RETRAINING.rstrip(), table(head, rows)])


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    truth, mislabel = (load(options.results / f"{name}.json") for name in ("truth", "mislabel"))
    damping, retraining = (load(options.results / f"{n}.json") for n in ("damping", "retraining"))
    audit, scale = (load(options.results / f"{name}.json") for name in ("audit", "scale"))
    results = {
        "truth": truth,
        "wrong labels": mislabel,
        "damping": damping,
        "retraining": retraining,
        "audit": audit,
        "scale": scale,
    }
    if (options.results / "values.json").exists():
        results["values"] = load(options.results / "values.json")
    head = HEAD.format(stamps=stamps(results))
    page = "\n\n".join(
        [
            head.rstrip(),
            truth_part(truth, options.docs),
            mislabel_part(mislabel, options.docs),
            damping_part(damping),
            retraining_part(retraining),
            audit_part(audit, table),
            scale_part(scale, options.docs, FIGURES, table, number),
            *(values_part(results[name], table) for name in ("values",) if name in results),
        ]
    )
    path = options.docs / "benchmarks.md"
    path.write_text(page.rstrip() + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
