"""Scores that go to disk in shards, so that a call that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from tqdm import tqdm

from upweight.fitted import Fitted
from upweight.influence import Mode, influence_blocks
from upweight.inverse import BlockFactors, Certificate
from upweight.inverse.approximate import products_spent
from upweight.layerwise import GradientStore
from upweight.risk import EmpiricalRisk
from upweight.scores import write_meta
from upweight.shards import ShardStore, digest_batches, digest_names, digest_rows, sizes

__all__ = ["store_scores"]

COUNTS = ("columns", "measured", "products")


def store_scores(
    path: str | os.PathLike[str],
    fitted: Fitted,
    train: EmpiricalRisk | GradientStore,
    test: EmpiricalRisk,
    *,
    mode: Mode,
    provenance: Mapping[str, Any],
    certify: int | None,
    resume: bool,
) -> None:
    """Write the influence of training rows on test rows as `Scores.load` reads it.

    Parameters
    ----------
    path
        Where a folder appears when it is complete.
    fitted, train, test, mode
        What is computed.
    provenance
        How; what it says of the work must be the same for an earlier call to be gone on with.
    certify
        For how many right-hand sides residuals are measured.
    resume
        Whether to go on with what an earlier call has left.
    """
    names = train.names if isinstance(train, GradientStore) else train.rows.names
    shape = (test.n, len(names))
    if mode == "perturbation" and isinstance(train, EmpiricalRisk):
        shape = (*shape, *train.feature_shape())
    chunk = sizes(shape, test.p)
    cluster = test.cluster
    main = cluster is None or cluster.main
    # of all ranks the first has the store, so that it alone compares what is there
    work = _work(fitted, train, test, provenance, chunk) if main else {}
    whole = nullcontext() if cluster is None else cluster.together("scores on disk")
    opened = ShardStore(path, shape, train.dtype, chunk, work, resume=resume, writers=cluster)
    with opened as store, whole:
        inverse = fitted.ready(test, certify)
        solves = _Solves(fitted, inverse, store)
        with tqdm(
            total=len(names) * test.n,
            desc="scores",
            unit="pair",
            delay=2,
            disable=None if main else True,
            leave=False,
        ) as bar:

            def done(rows: slice, shard: slice) -> bool:
                found = solves.done(rows, shard)
                if found:
                    bar.update((rows.stop - rows.start) * (shard.stop - shard.start))
                return found

            blocks = influence_blocks(inverse, train, test, mode, shards=store.shards, done=done)
            for rows, columns, _, block in blocks:
                solves.close(rows, columns)
                store.write(rows, columns, block)
                bar.update((rows.stop - rows.start) * (columns.stop - columns.start))
        store.collect()
        if main:
            told = {**provenance, "certificate": solves.certificate()}
            with store.telling():
                write_meta(store.result, test.rows.names, names, told)
            store.finish()


class _Solves:
    """The certificate of all solves, also of those that an earlier process did.

    What the solve for a group of test rows has added to the certificate is noted in the store
    before the last part of the group is: a group that is done has its note, and is not solved for
    again.
    """

    def __init__(self, fitted: Fitted, inverse: Any, store: ShardStore) -> None:
        self._fitted, self._inverse, self._store = fitted, inverse, store
        self._start: dict[str, Any] | None = None
        self._before: dict[str, Any] = {}
        self._added: dict[tuple[int, int], dict[str, Any]] = {}
        self._seen: set[tuple[int, int]] = set()

    def done(self, rows: slice, shard: slice) -> bool:
        """Whether to leave a part out."""
        if self._start is None:  # after what is certified of all test rows at once
            self._start = self._before = self._now()
        key = rows.start, rows.stop
        self._seen.add(key)
        if self._store.missing(rows) == 0 and key in self._store.notes and key not in self._added:
            self._added[key] = self._store.notes[key]
            if hasattr(self._inverse, "budget"):  # as if the solve had taken place
                self._inverse.budget -= self._added[key]["measured"]
        return self._store.done(rows, shard)

    def close(self, rows: slice, columns: slice) -> None:
        """Note the solve for a group, if the block that begins or ends here is its last."""
        last = self._store.missing(rows) == 1
        if last and any(columns.stop == shard.stop for shard in self._store.shards):
            now = self._now()
            self._added[rows.start, rows.stop] = note = _difference(self._before, now)
            self._before = now
            self._store.note(rows, note)

    def certificate(self) -> dict[str, Any]:
        """As after a run of one process that was not stopped."""
        # groups whose parts other ranks have written
        for key in (self._seen - self._added.keys()) & self._store.notes.keys():
            self._added[key] = self._store.notes[key]
        whole = dict(self._now() if self._start is None else self._start)
        total = _residuals(whole)
        for key in sorted(self._added):
            note = self._added[key]
            total += note["residuals"]
            for count in COUNTS:
                whole[count] += note[count]
            whole["residual_max"] = max(whole["residual_max"], note["residual_max"])
            whole["steps"] = _largest(whole["steps"], note["steps"])
            if note["converged"] is not None:
                whole["converged"] = whole["converged"] is not False and note["converged"]
            whole["facts"] = _joined(whole["facts"], note["facts"])
            whole["notes"] = list(dict.fromkeys([*whole["notes"], *note["notes"]]))
        whole["products"] = round(whole["products"])
        # few digits: what was summed before differs by round-off
        whole["residual_mean"] = float(f"{total / max(1, whole['measured']):.4g}")
        return whole

    def _now(self) -> dict[str, Any]:
        certificate: Certificate = self._fitted.certificate()
        # some solvers count only when they solve, and then also what the fit took
        return certificate.to_dict() | {"products": round(_products(self._fitted), 6)}


def _products(fitted: Fitted) -> float:
    """What a certificate counts, as of now."""
    prepared = fitted.prepared
    parts = list(prepared.prepared.values()) if isinstance(prepared, BlockFactors) else []
    total = float(products_spent(fitted.operator))
    for part in parts:
        operator = getattr(part, "operator", None)
        own = 0 if operator is None else products_spent(operator)
        total += max(own, int(getattr(part, "products", 0)))
    for part in [prepared, *parts]:
        for piece in getattr(part, "parts", ()):  # of LiSSA, each with its share of the rows
            total += piece.share * products_spent(piece.operator)
    return total


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: now[key] for key in ("residual_max", "steps", "converged", "facts", "notes")}
    counts = {key: now[key] - before[key] for key in COUNTS}
    return {**kept, **counts, "residuals": _residuals(now) - _residuals(before)}


def _residuals(certificate: Mapping[str, Any]) -> float:
    return certificate["residual_mean"] * certificate["measured"]


def _largest(one: int | None, other: int | None) -> int | None:
    found = [value for value in (one, other) if value is not None]
    return max(found) if found else None


def _joined(facts: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of later solves in place of earlier ones, but the largest of residuals."""
    joined = {**facts, **more}
    for name in facts.keys() & more.keys():
        if name.startswith("largest residual"):
            joined[name] = max(facts[name], more[name], key=float)
    return joined


# --- what the numbers depend on ------------------------------------------------------------------


def _work(
    fitted: Fitted,
    train: EmpiricalRisk | GradientStore,
    test: EmpiricalRisk,
    provenance: Mapping[str, Any],
    chunk: tuple[int, int],
) -> dict[str, Any]:
    """Names and values for a comparison with those of an earlier call.

    The batch size is not among them: it changes nothing beyond round-off, and another one may be
    why a call is made again.
    """
    told = {key: value for key, value in provenance.items() if key != "certificate"}
    versions = told.pop("versions", {})
    work = {name.replace("_", " "): value for name, value in told.items()}
    work["rows of fit()"] = digest_rows(fitted.risk.rows)
    work |= _rows_work("test", test)
    if isinstance(train, GradientStore):
        work["stored gradients"] = digest_batches([json.dumps(train.meta), train.nbytes])
        work["names of training rows"] = digest_names(train.names)
    else:
        same = train.rows is fitted.risk.rows
        work |= _rows_work("training", train, work["rows of fit()"] if same else None)
    work["names of parameters"] = digest_names(test.model.names)
    work["dtype"], work["device"] = str(train.dtype), test.device.type
    work["rows of a shard"], work["lines of a chunk"] = chunk[1], chunk[0]
    return work | {f"version of {name}": value for name, value in versions.items()}


def _rows_work(what: str, risk: EmpiricalRisk, known: str | None = None) -> dict[str, Any]:
    return {
        f"content of {what} rows": known or digest_rows(risk.rows),
        f"names of {what} rows": digest_names(risk.rows.names),
        # a loss or a forward function has no digest; what it gives has
        f"mean {what} loss": f"{float(risk.losses().double().mean()):.6g}",
    }
