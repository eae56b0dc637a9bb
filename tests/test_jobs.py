"""Calls side by side: backends, threads, early ends, workers that die; and atomic files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import joblib
import pytest
from threadpoolctl import threadpool_info

from upweight import jobs
from upweight.files import write_atomically
from upweight.jobs import unordered

TASKS = [(i, 2) for i in range(12)]


def where(i, _):
    time.sleep(0.02)
    return i, os.getpid()


def fail(i, _):
    if i == 3:
        raise ArithmeticError("three")
    return i


def die(i, _):
    if i == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return i


def blas_threads(*_):
    import numpy as np  # so that its BLAS is loaded

    np.ones((2, 2)) @ np.ones((2, 2))
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.mark.parametrize("n_jobs", [1, 2, None, -1])
@pytest.mark.parametrize("prefer", ["threads", "processes"])
def test_gives_every_result_once(n_jobs, prefer):
    assert sorted(unordered(pow, TASKS, n_jobs, prefer=prefer)) == [i * i for i in range(12)]


def test_no_tasks_and_bad_options():
    assert list(unordered(pow, [], 2)) == []
    with pytest.raises(ValueError, match="expected prefer"):
        next(unordered(pow, TASKS, 2, prefer="fibres"))


def test_one_job_is_lazy_and_needs_no_joblib():
    code = (
        "import sys; from upweight.jobs import unordered; began = []\n"
        "calls = unordered(lambda i: began.append(i) or i, ((i,) for i in range(9)), 1)\n"
        "next(calls), next(calls); print(began, 'joblib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 1] False"


def test_threads_or_processes():
    assert {pid for _, pid in unordered(where, TASKS, 2, prefer="threads")} == {os.getpid()}
    assert os.getpid() not in {pid for _, pid in unordered(where, TASKS, 2)}


@pytest.mark.parametrize("prefer", ["threads", "processes"])
def test_takes_the_backend_of_the_caller(prefer):
    with joblib.parallel_config("threading"):
        assert {pid for _, pid in unordered(where, TASKS, 2, prefer=prefer)} == {os.getpid()}
    with joblib.parallel_config("loky"):
        assert os.getpid() not in {pid for _, pid in unordered(where, TASKS, 2, prefer=prefer)}
    with joblib.parallel_config("multiprocessing"):
        assert os.getpid() not in {pid for _, pid in unordered(where, TASKS, 2, prefer=prefer)}
    with joblib.parallel_config(prefer="threads"):
        assert {pid for _, pid in unordered(where, TASKS, 2)} == {os.getpid()}


@pytest.mark.parametrize("prefer", ["threads", "processes"])
def test_blas_has_one_thread(prefer):
    from threadpoolctl import threadpool_limits

    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        for inside in unordered(blas_threads, TASKS[:3], 2, prefer=prefer):
            assert set(inside) == {1}
        assert blas_threads() == before


def test_the_configuration_of_the_caller_is_left_alone():
    calls = unordered(where, TASKS, 2)
    next(calls)
    assert joblib.parallel.get_active_backend()[0].inner_max_num_threads is None
    calls.close()


def test_workers_survive_an_early_end():
    before = {pid for _, pid in unordered(where, TASKS, 2)}
    asked = []
    calls = unordered(where, ((asked.append(i) or i, 2) for i in range(1000)), 2)
    assert next(calls)[1] in before
    calls.close()
    assert len(asked) < 500  # no more were begun
    assert {pid for _, pid in unordered(where, TASKS, 2)} <= before


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_an_error_is_passed_on_and_the_next_call_works(n_jobs):
    with pytest.raises(ArithmeticError, match="three"):
        list(unordered(fail, TASKS, n_jobs))
    assert len(list(unordered(pow, TASKS, n_jobs))) == len(TASKS)


def fail_later(i, _):
    if i == 3:
        time.sleep(0.5)  # an error that comes before the first result is raised in its place
    return fail(i, _)


def test_an_error_in_what_is_left_does_not_disturb_an_early_end():
    calls = unordered(fail_later, TASKS, 2)
    next(calls)
    calls.close()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_worker_is_told_and_the_next_call_works():
    with pytest.raises(jobs.WorkerDied):
        list(unordered(die, TASKS, 2))
    assert len(list(unordered(pow, TASKS, 2))) == len(TASKS)
    from upweight.jobs import WorkerDied

    assert all(issubclass(kind, Exception) for kind in WorkerDied)
    with pytest.raises(AttributeError, match="no attribute"):
        _ = jobs.nothing


def test_a_file_is_there_completely_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def stopped(file):
        file.write(b"new, and")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, stopped)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_bytes_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("sync") or sync(fd))
    monkeypatch.setattr(os, "replace", lambda *of: calls.append("name") or replace(*of))
    write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert calls == ["sync", "name"]


def test_a_file_is_as_open_to_others_as_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
