"""Training on subsets: masks, seeds, failures, the store; how it is run must not be seen."""

from __future__ import annotations

import json

import joblib
import numpy as np
import pytest

from upweight.evaluate import (
    Retrained,
    RetrainingWarning,
    check_masks,
    leave_out,
    random_subsets,
    retrain,
)

N, M = 12, 5
X = np.random.default_rng(0).normal(size=(N, M))
MASKS = random_subsets(N, 7, seed=3)


def means(rows, seed):
    """A model whose outputs depend on the rows and on the seed."""
    return X[rows].mean(axis=0) + np.random.default_rng(seed).normal(size=M)


class Many:
    """The same model, many at once; counts its calls."""

    def __init__(self, fails=lambda mask: False):
        self.calls, self.fails = [], fails

    def __call__(self, rows, seed):
        raise AssertionError("many is there")

    def many(self, masks, seeds):
        self.calls.append(len(masks))
        assert masks.dtype == np.bool_
        if any(self.fails(mask) for mask in masks):
            raise MemoryError("too many")
        return np.array(
            [means(np.flatnonzero(m), int(s)) for m, s in zip(masks, seeds, strict=True)]
        )


class Counted:
    """Counts its runs, and ends the process, so to speak, after some."""

    def __init__(self, ends_after=None, fingerprint="means"):
        self.runs, self.ends_after, self.fingerprint = 0, ends_after, fingerprint

    def __call__(self, rows, seed):
        if self.runs == self.ends_after:
            raise KeyboardInterrupt
        self.runs += 1
        return means(rows, seed)


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "share"), [(10, 0.5), (11, 0.5), (7, 0.3), (100, 0.01), (5, 0.9)])
def test_random_subsets_have_the_size_that_was_asked_for(n, share):
    masks = random_subsets(n, 20, share=share)
    assert masks.dtype == np.bool_
    assert masks.shape == (20, n)
    assert (masks.sum(axis=1) == round(share * n)).all()


def test_more_subsets_begin_with_the_same_ones_and_seeds_differ():
    masks = random_subsets(30, 5, seed=1)
    assert (random_subsets(30, 9, seed=1)[:5] == masks).all()
    assert (random_subsets(30, 5, seed=2) != masks).any()


def test_every_row_is_in_about_half_of_the_subsets():
    share = random_subsets(20, 4000).mean(axis=0)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(4000)


def test_leave_out():
    assert (leave_out(6) == ~np.eye(6, dtype=bool)).all()
    some = leave_out(6, count=4)
    assert ((~some).sum(axis=1) == 1).all()
    assert len(np.unique(some, axis=0)) == 4
    assert ((~leave_out(6, k=3, count=8)).sum(axis=1) == 3).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: random_subsets(10, 3, share=0.0), "leaves some of the 10 rows"),
        (lambda: random_subsets(10, 3, share=1.0), "leaves some of the 10 rows"),
        (lambda: random_subsets(10, 0), "count of at least 1"),
        (lambda: leave_out(5, k=5, count=2), "fewer than all 5"),
        (lambda: leave_out(5, k=2), "count of the sets"),
        (lambda: leave_out(5, count=6), "at most 5"),
        (lambda: check_masks(np.ones(4, dtype=bool)), r"shape \(S, n\)"),
        (lambda: check_masks(np.ones((2, 4), dtype=bool), 5), r"shape \(S, 5\)"),
        (lambda: check_masks(np.ones((0, 4), dtype=bool)), r"shape \(S, n\)"),
        (lambda: check_masks([["a", "b"]]), "booleans; got <U1"),
        (lambda: check_masks([[0, 3], [1, 2]]), "got the value 3"),
        (lambda: check_masks([[0.5, 1]]), "got the value 0.5"),
        (lambda: check_masks([[1, 1], [0, 0]]), "subset 1 has none"),
    ],
)
def test_bad_masks_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# --- running --------------------------------------------------------------------------------------


def test_outputs_are_those_of_every_subset_and_seed():
    done = retrain(means, MASKS, seeds=[4, 2], protocol="fixed-seed")
    assert done.outputs.shape == (7, 2, M)
    for s, mask in enumerate(MASKS):
        for r, seed in enumerate((4, 2)):
            assert (done.outputs[s, r] == means(np.flatnonzero(mask), seed)).all()
    np.testing.assert_allclose(done.mean, done.outputs.mean(axis=1))
    assert done.failures.empty


def test_protocols():
    fixed = retrain(means, MASKS, seeds=3, protocol="fixed-seed").seeds
    assert (fixed == [0, 1, 2]).all()
    own = retrain(means, MASKS, seeds=3).seeds
    assert len(np.unique(own)) == own.size
    assert (retrain(means, MASKS[:2], seeds=3).seeds == own[:2]).all()
    assert (retrain(means, MASKS, seeds=[1]).seeds == own[:, 1:2]).all()


def test_neither_workers_nor_groups_are_seen_in_the_results():
    wanted = retrain(means, MASKS, seeds=2).outputs
    assert (retrain(means, MASKS, seeds=2, n_jobs=2).outputs == wanted).all()
    for at_once in (1, 3, 14, 100):
        many = Many()
        assert (retrain(many, MASKS, seeds=2, at_once=at_once).outputs == wanted).all()
        assert max(many.calls) == min(at_once, 14)
    assert (retrain(Many(), MASKS, seeds=2, at_once=4, n_jobs=2).outputs == wanted).all()


def test_takes_the_backend_of_the_caller():
    wanted = retrain(means, MASKS).outputs
    with joblib.parallel_config("threading", n_jobs=2):
        counted = Counted()
        assert (retrain(counted, MASKS, n_jobs=None).outputs == wanted).all()
    assert counted.runs == len(MASKS)  # in this process


def threads(rows, seed):
    from threadpoolctl import threadpool_info

    return [max(info["num_threads"] for info in threadpool_info())]


def test_workers_have_one_thread_each():
    assert (retrain(threads, MASKS[:2], n_jobs=2).outputs == 1).all()


def test_tidy_frame_and_file(tmp_path):
    def fails_once(rows, seed):
        if 0 not in rows:
            raise ArithmeticError("no row 0")
        return means(rows, seed)

    with pytest.warns(RetrainingWarning):
        done = retrain(fails_once, MASKS, seeds=2)
    frame = done.to_frame()
    assert list(frame.columns) == ["subset", "seed", "test", "output"]
    assert len(frame) == np.isfinite(done.outputs).sum()
    line = frame.iloc[-1]
    subset = int(line["subset"])
    r = list(done.seeds[subset]).index(line["seed"])
    assert line["output"] == done.outputs[subset, r, int(line["test"])]

    done.save(tmp_path / "done.npz")
    again = Retrained.load(tmp_path / "done.npz")
    for name in ("masks", "seeds", "outputs"):
        np.testing.assert_array_equal(getattr(again, name), getattr(done, name))
    assert again.failures.equals(done.failures)
    assert [path.name for path in tmp_path.iterdir()] == ["done.npz"]


# --- failures -------------------------------------------------------------------------------------

FAULTS = {
    "raises": (lambda good: 1 / 0, "ZeroDivisionError"),
    "is not finite": (lambda good: good * [1, np.nan, 1, np.inf, 1], "nan for test row 1 \\(2"),
    "has another length": (lambda good: good[:-1], "gave 4 numbers where most runs gave 5"),
    "has another shape": (lambda good: good[:, None], "gave shape \\(5, 1\\)"),
    "is a number": (lambda good: good[0], "gave shape \\(\\)"),
    "is no number": (lambda good: ["a"] * 5, "ValueError"),
}


@pytest.mark.parametrize("n_jobs", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_failed_is_named_and_the_rest_is_used(fault, n_jobs):
    change, says = FAULTS[fault]
    bad = np.flatnonzero(MASKS[2])

    def refit(rows, seed):
        good = means(rows, seed)
        return change(good) if np.array_equal(rows, bad) and seed == 1 else good

    with pytest.warns(RetrainingWarning, match="1 of 14 runs failed.*subset 2") as caught:
        done = retrain(refit, MASKS, seeds=2, protocol="fixed-seed", n_jobs=n_jobs)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert done.failures[["subset", "seed"]].to_numpy().tolist() == [[2, 1]]
    assert done.failures["error"].str.contains(says).all()
    assert np.isnan(done.outputs).sum() == M
    np.testing.assert_array_equal(done.mean[2], means(bad, 0))
    assert np.isfinite(done.mean).all()


def test_a_subset_that_always_fails_has_no_mean():
    refit = Many(fails=lambda mask: np.array_equal(mask, MASKS[4]))
    with pytest.warns(RetrainingWarning, match="2 of 14"):
        done = retrain(refit, MASKS, seeds=2)
    assert np.flatnonzero(np.isnan(done.mean).all(axis=1)).tolist() == [4]
    assert done.failures["subset"].tolist() == [4, 4]
    assert refit.calls[0] == 14
    assert len(refit.calls) < 14  # found by halves


def test_groups_that_are_too_large_for_memory_are_halved():
    class Small(Many):
        def many(self, masks, seeds):
            if len(masks) > 4:
                raise MemoryError
            return super().many(masks, seeds)

    small = Small()
    assert (retrain(small, MASKS).outputs == retrain(means, MASKS).outputs).all()
    assert max(small.calls) == 4


def test_gives_up_on_a_function_that_never_works():
    runs = []

    def broken(rows, seed):
        runs.append(seed)
        raise TypeError("nonsense")

    with pytest.raises(RuntimeError, match=r"8 of 40 were tried.*TypeError: nonsense"):
        retrain(broken, random_subsets(N, 40))
    assert len(runs) == 8
    with pytest.raises(RuntimeError, match="7 of 7"):
        retrain(broken, MASKS)


def test_gives_up_with_workers_too():
    with pytest.raises(RuntimeError, match="of 60 were tried"):
        retrain(lambda rows, seed: 1 / 0, random_subsets(N, 60), n_jobs=2)
    assert np.isfinite(retrain(means, MASKS, n_jobs=2).outputs).all()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"seeds": 0}, ValueError, "how many seeds"),
        ({"seeds": True}, ValueError, "how many seeds"),
        ({"seeds": [1, 1]}, ValueError, "how many seeds"),
        ({"seeds": [-1]}, ValueError, "how many seeds"),
        ({"seeds": [0.5]}, ValueError, "how many seeds"),
        ({"protocol": "random"}, ValueError, "protocol among"),
        ({"at_once": 0}, ValueError, "at_once of at least 1"),
    ],
)
def test_bad_options_are_refused_before_any_training(options, error, says):
    counted = Counted()
    with pytest.raises(error, match=says):
        retrain(counted, MASKS, **options)
    assert counted.runs == 0


# --- the store ------------------------------------------------------------------------------------


def test_goes_on_where_it_was_stopped(tmp_path):
    wanted = retrain(means, MASKS, seeds=2).outputs
    first = Counted(ends_after=5)
    with pytest.raises(KeyboardInterrupt):
        retrain(first, MASKS, seeds=2, store=tmp_path / "runs")
    second = Counted()
    done = retrain(second, MASKS, seeds=2, store=tmp_path / "runs")
    assert (first.runs, second.runs) == (5, 9)
    assert (done.outputs == wanted).all()
    third = Counted(ends_after=0)
    assert (retrain(third, MASKS, seeds=2, store=tmp_path / "runs").outputs == wanted).all()
    assert not [path for path in (tmp_path / "runs").iterdir() if path.name.startswith(".")]


def test_groups_and_workers_share_a_store(tmp_path):
    class Same(Many):
        fingerprint = "means"

    with pytest.raises(KeyboardInterrupt):
        retrain(Counted(ends_after=4), MASKS, store=tmp_path)
    many = Same()
    wanted = retrain(means, MASKS).outputs
    assert (retrain(many, MASKS, store=tmp_path, at_once=2).outputs == wanted).all()
    assert many.calls == [2, 1]
    assert (retrain(Counted(), MASKS, store=tmp_path, n_jobs=2).outputs == wanted).all()


def test_failed_runs_are_tried_again(tmp_path):
    fail = True

    def sometimes(rows, seed):
        if fail and np.array_equal(rows, np.flatnonzero(MASKS[0])):
            raise OSError("disk full")
        return means(rows, seed)

    with pytest.warns(RetrainingWarning, match="1 of 7 .*disk full"):
        retrain(sometimes, MASKS, store=tmp_path)
    fail = False
    assert np.isfinite(retrain(sometimes, MASKS, store=tmp_path).outputs).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"masks": ~MASKS}, "masks: "),
        ({"masks": MASKS[:5]}, "subsets: 7 there, 5 now"),
        ({"seeds": 2}, r"seeds: \[0\] there, \[0, 1\] now"),
        ({"protocol": "fixed-seed"}, "protocol: random-seed there, fixed-seed now"),
        ({"refit": Counted(fingerprint="medians")}, "refit: means there, medians now"),
    ],
)
def test_a_store_of_other_settings_is_refused(tmp_path, change, says):
    settings = {"refit": Counted(), "masks": MASKS, "store": tmp_path}
    retrain(**settings)
    with pytest.raises(ValueError, match=says):
        retrain(**(settings | change))


def test_other_folders_are_not_written_to(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="other files"):
        retrain(means, MASKS, store=tmp_path)
    with pytest.raises(TypeError, match="fingerprint to be a string"):
        retrain(Counted(fingerprint=3), MASKS, store=tmp_path / "new")


def test_a_damaged_file_counts_as_not_finished(tmp_path):
    wanted = retrain(Counted(), MASKS, store=tmp_path).outputs
    (tmp_path / "run-000003.npy").write_bytes(b"\x93NUMPY")
    counted = Counted()
    assert (retrain(counted, MASKS, store=tmp_path).outputs == wanted).all()
    assert counted.runs == 1
    assert json.loads((tmp_path / "manifest.json").read_text())["refit"] == "means"
