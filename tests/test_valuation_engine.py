"""Evaluating sets side by side: the same bits, failures told, nothing lost, nothing done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import pytest

from upweight import jobs
from upweight.valuation import (
    FunctionUtility,
    GroupedUtility,
    UtilityCache,
    UtilityError,
    Values,
    ValueWarning,
    banzhaf,
    engine,
    shapley,
)
from upweight.valuation.engine import Evaluator
from value_games import ChainedTable, Looked, TableUtility, enumerated, positions, rough

TABLE = rough(9)
WORTH = np.random.default_rng(0).standard_normal(12)


def smooth(rows) -> float:
    return float(np.tanh(WORTH[rows].sum()) + 0.1 * len(rows))


def same(a: Values, b: Values) -> None:
    np.testing.assert_array_equal(a.values, b.values)
    np.testing.assert_array_equal(a.errors, b.errors)
    assert a.provenance["evaluations"] == b.provenance["evaluations"]


# ------------------------------------------------------------------------------- failures


def test_utility_that_always_fails():
    def never(rows):
        raise OSError("the disk is away")

    with pytest.raises(UtilityError, match=r"of no rows could not be computed: OSError: the disk"):
        shapley(FunctionUtility(never, 5))
    u = FunctionUtility(lambda rows: 0.0 if len(rows) == 0 else never(rows), 5)
    with pytest.raises(UtilityError, match=r"of all 5 rows could not be computed: OSError"):
        shapley(u)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None, "much"])
def test_what_is_no_finite_number_fails(value):
    u = FunctionUtility(lambda rows: value if len(rows) == 5 else 1.0, 5)
    with pytest.raises(UtilityError, match="all 5 rows"):
        banzhaf(u)
    assert len(u.cache) == 1  # that of no rows


def test_hopeless_utilities_end_at_once():
    calls = []

    def ends_only(rows):
        calls.append(1)
        if 0 < len(rows) < 12:
            raise RuntimeError("no")
        return smooth(rows)

    for sampler in ("permutations", "subsets", "stratified"):
        calls.clear()
        with pytest.raises(UtilityError, match=r"none of \d+ sets could be evaluated.*no$"):
            shapley(FunctionUtility(ends_only, 12), sampler=sampler, until=50_000)
        assert len(calls) <= 2 + engine.CHUNK


def brittle(rows) -> float:
    if 0 < len(rows) < 3:
        raise ValueError(f"too few rows: {len(rows)}")
    return smooth(rows)


@pytest.mark.parametrize("truncation", [None, 0.2])
def test_small_sets_may_fail(truncation):
    """As models of one class do; the first steps of all orders do then."""
    u = FunctionUtility(brittle, 12, names=[f"row {i}" for i in range(12)])
    with pytest.warns(
        ValueWarning, match=r"could not be computed, and count nowhere: .* the first, of"
    ):
        values = shapley(u, until=1_500, truncation=truncation)
    failed = values.provenance["failed"]
    assert failed > 50
    assert len(values.failures) == min(failed, engine.NAMED)
    assert set(values.failures["size"]) == {1, 2}
    assert values.failures["error"].str.fullmatch(r"ValueError: too few rows: [12]").all()
    assert values.failures["rows"].str.contains("row ").all()
    # the means of what there is: contributions to sets of three rows or more
    if truncation is None:
        marginals, orders = np.diff(values.samples.utilities, axis=1), values.samples.orders
        for i in range(12):
            there = marginals[orders == i]
            assert values.values[i] == pytest.approx(np.nanmean(there), abs=1e-12)
        assert (values.counts > 0).all()
        assert (values.values != 0).all()
    # and the same call, with all that is known in the cache, but for what fails
    with pytest.warns(ValueWarning, match="could not be computed"):
        same(shapley(u, until=1_500, truncation=truncation), values)


def test_failed_sets_do_not_move_other_values():
    """A few sets, at random: values are off by no more than their errors."""
    rng = np.random.default_rng(0)
    table = np.where(rng.random(len(TABLE)) < 0.1, np.nan, TABLE)
    table[[0, -1]] = TABLE[[0, -1]]
    u = TableUtility(table)
    with pytest.warns(ValueWarning, match="could not be computed"):
        found = banzhaf(u, readout="msr", until=20_000)
    truth = enumerated(TABLE, [1 / 2**8 * c for c in (1, 8, 28, 56, 70, 56, 28, 8, 1)])
    # which sets are missing moves the truth itself by as much as 10 % of the sets do
    spread = 2 * np.nanstd(table) / np.sqrt(0.9 * 2**9) * np.sqrt(0.1 / 0.9) * np.sqrt(2)
    assert (np.abs(found.values - truth) < 5 * (found.errors + spread)).all()
    with pytest.raises(ValueError, match="failed: give small sets a utility"):
        shapley(u, sampler="exact")


def test_chains_that_fail_are_told():
    table = TABLE.copy()
    table[3] = np.nan
    with pytest.warns(ValueWarning, match="could not be computed"):
        chained = shapley(ChainedTable(table), until=4_000)
    with pytest.warns(ValueWarning, match="could not be computed"):
        plain = shapley(TableUtility(table), until=4_000)
    np.testing.assert_array_equal(chained.values, plain.values)
    assert (
        chained.failures["rows"]
        .map(lambda rows: set(rows.split(", ")))
        .map({"0", "1"}.__eq__)
        .all()
    )
    assert np.isfinite(chained.values).all()


# ----------------------------------------------------------------------------- truncation


def truncated_by_hand(table, orders, tolerance: float, patience: int):
    """One order at a time."""
    n = orders.shape[1]
    close = tolerance * abs(table[-1] - table[0])
    lengths = []
    for order in orders:
        at, near, length = 0, 0, n
        for k, row in enumerate(order, 1):
            at |= 1 << int(row)
            near = near + 1 if abs(table[at] - table[-1]) <= close else 0
            if near >= patience:
                length = k
                break
        lengths.append(length)
    return np.array(lengths)


@pytest.mark.parametrize("n_jobs", [1, 2])
@pytest.mark.parametrize("kind", [TableUtility, ChainedTable])
def test_truncation(kind, n_jobs: int):
    table = np.tanh(4 * rough(12, noise=0.0))
    values = shapley(kind(table), truncation=0.05, until=2_000, n_jobs=n_jobs)
    samples = values.samples
    wanted = truncated_by_hand(table, samples.orders, 0.05, 5)
    np.testing.assert_array_equal(samples.lengths, wanted)
    assert 5 <= wanted.min() < wanted.max() <= 12
    beyond = np.arange(13) > wanted[:, None]
    assert np.isnan(samples.utilities[beyond]).all()
    np.testing.assert_array_equal(
        samples.utilities[~beyond],
        table[np.cumsum(np.pad(1 << samples.orders.astype(int), ((0, 0), (1, 0))), axis=1)][
            ~beyond
        ],
    )
    assert values.provenance["evaluations"] == np.minimum(wanted, 11).sum() <= 2_000
    # what an order leaves out is less than the tolerance, for all rows together
    whole = shapley(kind(table), until=11 * len(wanted))
    np.testing.assert_array_equal(whole.samples.orders, samples.orders)
    lost = whole.values - values.values
    assert abs(lost.sum()) <= 0.05 * abs(table[-1] - table[0])
    assert 0 < np.abs(lost).max() < 0.05


def test_chains_give_the_same_bits():
    for truncation in (None, 0.05):
        options = {"sampler": "permutations", "truncation": truncation, "until": 1_000}
        plain = shapley(TableUtility(TABLE), **options)
        u = ChainedTable(TABLE)
        same(shapley(u, **options), plain)
        assert u.chained > 0
        done = u.chained
        same(shapley(u, **options), plain)
        assert u.chained == done


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"truncation": 0.0}, "truncation between 0 and 1"),
        ({"truncation": 1.0}, "truncation between 0 and 1"),
        ({"truncation": float("nan")}, "truncation between 0 and 1"),
        ({"truncation": 0.1, "sampler": "subsets"}, "expected permutations with a truncation"),
        ({"truncation": 0.1, "sampler": "exact"}, "expected permutations with a truncation"),
    ],
)
def test_truncations_that_make_no_sense(options, match: str):
    u = TableUtility(TABLE)
    with pytest.raises(ValueError, match=match):
        shapley(u, **options)
    assert u.asked == 0


# ------------------------------------------------------------------------------ side by side

RUNS = {
    "permutations": lambda u, **o: shapley(u, until=500, **o),
    "truncated": lambda u, **o: shapley(u, truncation=0.1, until=500, **o),
    "subsets": lambda u, **o: banzhaf(u, until=500, **o),
    "stratified": lambda u, **o: shapley(u, sampler="stratified", until=500, **o),
    "exact": lambda u, **o: shapley(u, sampler="exact", **o),
}


@pytest.mark.parametrize("run", sorted(RUNS))
def test_workers_and_chunks_do_not_matter(run: str, monkeypatch):
    alone = RUNS[run](FunctionUtility(smooth, 12, prefer="threads"))
    same(RUNS[run](FunctionUtility(smooth, 12, prefer="threads"), n_jobs=2), alone)
    chained = RUNS[run](ChainedTable(TABLE))
    for size in (1, 7):
        monkeypatch.setattr(engine, "CHUNK", size)
        monkeypatch.setattr(engine, "CHAINS", size)
        same(RUNS[run](FunctionUtility(smooth, 12)), alone)
        same(RUNS[run](ChainedTable(TABLE)), chained)
    monkeypatch.setattr(engine, "MASKS", 500)
    same(RUNS[run](FunctionUtility(smooth, 12)), alone)


@pytest.mark.slow
@pytest.mark.parametrize("run", sorted(RUNS))
def test_processes_do_not_matter(run: str):
    same(RUNS[run](FunctionUtility(smooth, 12), n_jobs=2), RUNS[run](FunctionUtility(smooth, 12)))
    groups = GroupedUtility(FunctionUtility(smooth, 12), np.arange(12) // 2)
    same(RUNS[run](groups, n_jobs=2), RUNS[run](groups))


@pytest.mark.slow
def test_on_a_dask_cluster():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        found = [RUNS[run](FunctionUtility(smooth, 12), n_jobs=2) for run in sorted(RUNS)]
    for run, values in zip(sorted(RUNS), found, strict=True):
        same(values, RUNS[run](FunctionUtility(smooth, 12)))


class Dies:
    """The worker that is asked first kills itself; so do all, without a marker."""

    def __init__(self, marker: Path | None):
        self.marker, self.parent = marker, os.getpid()

    def __call__(self, rows):
        here = os.getpid() != self.parent  # the ends are evaluated by workers too
        if here and self.marker is None and len(rows) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if here and self.marker is not None and 0 < len(rows) < 12 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return smooth(rows)


@pytest.mark.slow
def test_a_worker_that_dies_is_survived(tmp_path):
    u = FunctionUtility(Dies(tmp_path / "once"), 12)
    values = banzhaf(u, until=200, n_jobs=2)
    assert (tmp_path / "once").exists()
    same(values, banzhaf(FunctionUtility(smooth, 12), until=200))


@pytest.mark.slow
def test_workers_that_die_again_and_again(tmp_path):
    u = FunctionUtility(Dies(None), 12)
    with pytest.raises(jobs.WorkerDied) as caught:
        banzhaf(u, until=100, n_jobs=2)
    assert "want of memory" in "".join(caught.value.__notes__)


# --------------------------------------------------------------------- caches, interrupted runs


@pytest.mark.parametrize("run", sorted(RUNS))
def test_nothing_is_evaluated_twice(run: str):
    calls = []

    def counted(rows):
        calls.append(rows.tobytes())
        return smooth(rows)

    u = FunctionUtility(counted, 12)
    values = RUNS[run](u)
    assert len(calls) == len(set(calls)) == values.provenance["computed"] + 2  # both ends
    done = len(calls)
    again = RUNS[run](u)
    assert len(calls) == done
    assert again.provenance["computed"] == 0
    same(again, values)
    # sets that other values have asked for, as far as they are the same
    RUNS["exact"](u)
    assert len(set(calls)) == len(calls) == 2**12


@pytest.mark.parametrize("at", [3, 100, 300])
@pytest.mark.parametrize("run", ["permutations", "truncated", "subsets", "stratified"])
def test_interrupted_by_hand(run: str, at: int, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK", 4)
    calls = []
    waiting = [True]

    def interrupted(rows):
        if waiting[0] and len(calls) == at:
            waiting[0] = False
            raise KeyboardInterrupt
        calls.append(rows.tobytes())
        return smooth(rows)

    u = FunctionUtility(interrupted, 12)
    with pytest.raises(KeyboardInterrupt) as caught:
        RUNS[run](u)
    (note,) = caught.value.__notes__
    assert "the same call goes on from there" in note
    assert "in memory" in note
    kept = len(u.cache)
    assert at - 4 < kept <= at  # all but those of the chunk that was being computed
    values = RUNS[run](u)
    same(values, RUNS[run](FunctionUtility(smooth, 12)))
    assert len(calls) - len(set(calls)) == at - kept


def test_a_cache_in_a_file_is_told_of(tmp_path):
    path = tmp_path / "utilities.db"
    waiting = [200]

    def interrupted(rows):
        waiting[0] -= 1
        if waiting[0] == 0:
            raise KeyboardInterrupt
        return smooth(rows)

    u = FunctionUtility(interrupted, 12, fingerprint="smooth", cache=UtilityCache(path))
    with pytest.raises(KeyboardInterrupt) as caught:
        banzhaf(u, until=400)
    assert str(path) in caught.value.__notes__[0]
    there = UtilityCache(path)
    other = FunctionUtility(smooth, 12, fingerprint="smooth", cache=there)
    values = banzhaf(other, until=400)
    assert 0 < values.provenance["computed"] < values.provenance["evaluations"] - 100


def test_utilities_that_share_a_cache_are_kept_apart():
    """Also where one is gone, and another takes its place in memory."""
    cache = UtilityCache()
    for scale in range(1, 6):
        u = FunctionUtility(lambda rows, s=scale: float(s * len(rows)), 4, cache=cache)
        assert u([0, 1, 2]) == 3 * scale
        assert shapley(u, sampler="exact").values == pytest.approx(np.full(4, scale))
        del u
    named = [FunctionUtility(len, 4, fingerprint="size", cache=cache) for _ in range(2)]
    named[0]([0])
    before = len(cache)
    named[1]([0])
    assert len(cache) == before


def test_evaluator_by_itself():
    u = TableUtility(TABLE)
    masks = np.random.default_rng(0).random((300, 9)) < 0.5
    with Evaluator(u, progress=False) as evaluator:
        assert evaluator.ends == (TABLE[0], TABLE[-1])
        np.testing.assert_array_equal(evaluator.masks(masks), TABLE[positions(masks)])
        assert evaluator.asked == 300
        assert evaluator.computed == len(u.cache) - 2 <= 300  # both ends
        orders = np.array([[3, 1, 0, 2, 4, 8, 7, 6, 5]], np.int32)
        utilities, lengths = evaluator.orders(orders, 4, None)
        wanted, _ = Looked(TABLE).orders(orders, 4, None)
        np.testing.assert_array_equal(utilities, wanted)
        assert lengths.tolist() == [4]
        assert evaluator.masks(masks[:0]).shape == (0,)


# ----------------------------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.parametrize("run", ["permutations", "truncated", "subsets"])
def test_killed_again_and_again(run: str, tmp_path):
    """What it computed before it was killed is in the file, and the end is the same to a bit."""
    script = Path(__file__).with_name("value_kill.py")

    def start(folder: Path) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, str(script), str(folder), run])

    whole = tmp_path / "whole"
    assert start(whole).wait(120) == 0
    undisturbed = len((whole / "calls").read_bytes())
    folder, kills = tmp_path / "killed", 0
    progress = folder / "calls"
    for attempt in range(30):
        before = len(progress.read_bytes()) if progress.exists() else 0
        process = start(folder)
        # the first few times: killed after some more calls
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            now = len(progress.read_bytes()) if progress.exists() else 0
            if attempt < 4 and now - before >= undisturbed // 6:
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        if process.wait(60) == 0:
            break
    assert kills >= 3
    a, b = Values.load(whole / "values.npz"), Values.load(folder / "values.npz")
    same(a, b)
    calls = len(progress.read_bytes())
    # a kill loses what was not yet written: a second's work at most, and not what was there before
    assert calls < undisturbed * (1 + kills / 6)
    assert b.provenance["computed"] < 0.8 * a.provenance["computed"]
