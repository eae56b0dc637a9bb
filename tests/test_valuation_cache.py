"""The cache of utilities: keys, memory, the file in every state; digests of what they are of."""

from __future__ import annotations

import ast
import copy
import dataclasses
import enum
import functools
import inspect
import io
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from upweight.valuation import FunctionUtility, banzhaf
from upweight.valuation.cache import CacheWarning, UtilityCache
from upweight.valuation.fingerprints import digest

N, M = 37, 50
MASKS = np.random.default_rng(0).random((M, N)) < 0.5
VALUES = np.random.default_rng(1).normal(size=M)
KEYS = UtilityCache().keys(MASKS)


def filled(path, **options):
    with UtilityCache(path, **options) as cache:
        cache.put("p", KEYS, VALUES)
    return path


def read(path):
    with UtilityCache(path) as cache:
        return cache.get("p", KEYS)


def python(code, *args, seed="0", check=True):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        check=check,
        env={**os.environ, "PYTHONHASHSEED": seed},
        timeout=100,
    )


def aside(path):
    return sorted(path.parent.glob(f"{path.name}.unreadable-*"))


# ------------------------------------------------------------------------------------ memory


def test_a_key_is_of_the_set_and_of_n():
    assert len(set(KEYS)) == len({row.tobytes() for row in MASKS})
    assert all(len(key) == 16 for key in KEYS)
    assert UtilityCache().keys(np.asfortranarray(MASKS[::-1])) == KEYS[::-1]
    (short,) = UtilityCache().keys(np.zeros((1, 7), np.bool_))
    (longer,) = UtilityCache().keys(np.zeros((1, 8), np.bool_))
    assert short != longer  # although they are packed alike
    assert UtilityCache().keys(MASKS[:0]) == []


@pytest.mark.parametrize("masks", [np.zeros((2, 3), int), np.zeros(3, np.bool_)])
def test_rows_given_as_positions_are_no_masks(masks):
    with pytest.raises(ValueError, match="expected masks"):
        UtilityCache().keys(masks)


@pytest.mark.slow
def test_keys_are_those_of_other_processes():
    code = """
        import numpy as np
        from upweight.valuation.cache import UtilityCache
        print(UtilityCache().keys(np.eye(9, dtype=bool))[4].hex())
    """
    here = UtilityCache().keys(np.eye(9, dtype=bool))[4].hex()
    assert [python(code, seed=seed).stdout.strip() for seed in "12"] == [here, here]


def test_problems_are_apart_and_nan_is_not_kept():
    cache = UtilityCache()
    values = VALUES.copy()
    values[3] = np.nan
    cache.put("p", KEYS, values)
    np.testing.assert_array_equal(cache.get("p", KEYS), values)
    assert np.isnan(cache.get("q", KEYS)).all()
    assert len(cache) == M - 1
    cache.put("p", KEYS[3:4], [2.0])
    assert cache.get("p", KEYS[3:4]) == 2.0
    with pytest.raises(ValueError, match="expected a value for each of 50 keys"):
        cache.put("p", KEYS, VALUES[:-1])


@pytest.mark.parametrize("at_once", [1, 7, 50])
def test_the_oldest_are_dropped(at_once):
    cache = UtilityCache(max_entries=20)
    for at in range(0, M, at_once):
        cache.put("pq"[at % 2], KEYS[at : at + at_once], VALUES[at : at + at_once])
        assert len(cache) <= 20
    known = [~np.isnan(cache.get(name, KEYS)) for name in "pq"]
    there = known[0] | known[1]
    assert there.sum() == len(cache) >= 18
    np.testing.assert_array_equal(np.flatnonzero(there), np.arange(M - len(cache), M))


def test_an_entry_that_is_put_again_counts_once():
    cache = UtilityCache(max_entries=M)
    for _ in range(3):
        cache.put("p", KEYS, VALUES)
    assert len(cache) == M
    assert not np.isnan(cache.get("p", KEYS)).any()


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="max_entries at least 1"):
        UtilityCache(max_entries=0)
    with pytest.raises(ValueError, match="is a folder"):
        UtilityCache(tmp_path)


def test_import_is_cheap():
    code = "import sys, upweight.valuation.cache; print('sqlite3' in sys.modules)"
    assert python(code).stdout.strip() == "False"


# -------------------------------------------------------------------------------------- file


def test_the_file_outlives_the_memory(tmp_path):
    path = filled(tmp_path / "folder" / "cache.sqlite")
    np.testing.assert_array_equal(read(path), VALUES)
    with UtilityCache(path) as cache:
        assert np.isnan(cache.get("q", KEYS)).all()
        cache.get("p", KEYS[:5])
        assert len(cache) == 5
        assert repr(cache) == f"<UtilityCache: 5 in memory, {str(path)!r}>"
        cache.close()
        cache.put("q", KEYS[:2], VALUES[:2])  # opens it again
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_memory_dropped_is_in_the_file(tmp_path):
    path = filled(tmp_path / "cache", max_entries=10)
    with UtilityCache(path, max_entries=10) as cache:
        np.testing.assert_array_equal(cache.get("p", KEYS), VALUES)
        assert len(cache) <= 10


def test_more_keys_than_a_statement_takes(tmp_path):
    keys = [i.to_bytes(16, "little") for i in range(1201)]
    with UtilityCache(tmp_path / "cache") as cache:
        cache.put("p", keys, np.arange(1201.0))
    with UtilityCache(tmp_path / "cache") as cache:
        np.testing.assert_array_equal(cache.get("p", keys[::-1]), np.arange(1201.0)[::-1])


def test_problems_without_a_fingerprint_stay_in_memory(tmp_path):
    path = tmp_path / "cache"
    with UtilityCache(path) as cache:
        cache.put("object-1", KEYS, VALUES)
        np.testing.assert_array_equal(cache.get("object-1", KEYS), VALUES)
    assert not path.exists()


def test_every_bit_of_a_value_is_kept(tmp_path):
    numbers = [0.0, -0.0, 5e-324, -2.2e-308, np.inf, -np.inf, 1e308, 0.1, 3.0, -7.0, 2.0**53]
    noise = np.frombuffer(np.random.default_rng(0).bytes(8 * 400), np.float64)
    values = np.concatenate([numbers, noise[~np.isnan(noise)]])
    keys = [i.to_bytes(16, "little") for i in range(len(values))]
    with UtilityCache(tmp_path / "cache") as cache:
        cache.put("p", keys, values)
        assert cache.get("p", keys).tobytes() == values.tobytes()
    with UtilityCache(tmp_path / "cache") as cache:
        assert cache.get("p", keys).tobytes() == values.tobytes()


def test_copies_have_the_same_file_and_an_empty_memory(tmp_path):
    cache = UtilityCache(tmp_path / "cache", max_entries=77)
    cache.put("p", KEYS, VALUES)
    for twin in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache), copy.copy(cache)):
        assert (len(twin), twin.path, twin.max_entries) == (0, cache.path, 77)
        np.testing.assert_array_equal(twin.get("p", KEYS), VALUES)
        twin.close()
    cache.close()


def test_threads_share_a_cache(tmp_path):
    wrong = []
    with UtilityCache(tmp_path / "cache", max_entries=30) as cache:

        def work(start):
            for at in range(start, M, 4):
                cache.put("p", KEYS[at : at + 1], VALUES[at : at + 1])
                if cache.get("p", KEYS[at : at + 1]) != VALUES[at]:
                    wrong.append(at)

        threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(cache) <= 30
    assert not wrong
    np.testing.assert_array_equal(read(tmp_path / "cache"), VALUES)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_opens_the_file_anew(tmp_path):
    code = """
        import os, sys, numpy as np
        from upweight.valuation.cache import UtilityCache
        cache = UtilityCache(sys.argv[1])
        keys = cache.keys(np.eye(9, dtype=bool))
        cache.put("p", keys[:4], np.arange(4.0))
        cache._lock.acquire()  # as if a thread were in the middle of something
        child = os.fork()
        if child == 0:
            cache.put("p", keys[4:], np.arange(4.0, 9.0))
            os._exit(0)
        cache._lock.release()
        assert os.waitpid(child, 0)[1] == 0
        print(*cache.get("p", keys))
        cache.close()
    """
    done = python(code, tmp_path / "cache")
    assert done.stdout.split() == [str(float(i)) for i in range(9)]


WRITER = """
    import sys, numpy as np
    from upweight.valuation.cache import UtilityCache
    path, first, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print("ready", flush=True)
    sys.stdin.readline()
    with UtilityCache(path) as cache:
        for at in range(first, first + number, 40):
            some = range(at, at + 40)
            cache.put("p", [i.to_bytes(16, "little") for i in some], np.array(some, float))
            print("put", flush=True)
"""


def writer(path, first, number):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(first), str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_write_at_once(tmp_path):
    path = tmp_path / "cache"
    both = [writer(path, 0, 2000), writer(path, 1000, 2000)]  # half of the keys are the same
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=90)
        assert process.returncode == 0
    with UtilityCache(path) as cache:
        keys = [i.to_bytes(16, "little") for i in range(3000)]
        np.testing.assert_array_equal(cache.get("p", keys), np.arange(3000.0))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("puts", [0, 3, 20])
def test_a_killed_writer_leaves_whole_transactions(tmp_path, puts):
    path = tmp_path / "cache"
    process = writer(path, 0, 1_000_000)
    process.stdout.readline()
    process.stdin.write("go\n")
    process.stdin.flush()
    for _ in range(puts):
        process.stdout.readline()
    time.sleep(0.003)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    with UtilityCache(path) as cache:
        keys = [i.to_bytes(16, "little") for i in range(40 * (puts + 100))]
        found = cache.get("p", keys)
        there = int((~np.isnan(found)).sum())
        assert there >= 40 * puts
        assert there % 40 == 0
        np.testing.assert_array_equal(found[:there], np.arange(float(there)))
        cache.put("p", keys[:1], [7.0])
    assert aside(path) == []


# -------------------------------------------------------------------------- unreadable files


def whole():
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        from pathlib import Path

        return filled(Path(folder) / "cache").read_bytes()


WHOLE = whole()
ENDS = sorted(
    {1, 2, 15, 16, 17, 50, 99, 100, 101, 511, 512, 513, len(WHOLE) - 1, len(WHOLE) - 8}
    | {at + d for at in range(4096, len(WHOLE), 4096) for d in (-1, 0, 1)}
    | set(range(200, len(WHOLE), 997))
)


def is_replaced(path, content):
    """Reads nothing, says so, keeps the content, goes on with a new file."""
    with pytest.warns(CacheWarning, match="unreadable-1, and a new one") as caught:
        assert np.isnan(read(path)).all()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [entry.read_bytes() for entry in aside(path)] == [content]
    filled(path)
    np.testing.assert_array_equal(read(path), VALUES)


@pytest.mark.parametrize("end", ENDS)
def test_a_file_that_is_cut_off(tmp_path, end):
    path = tmp_path / "cache"
    path.write_bytes(WHOLE[:end])
    is_replaced(path, WHOLE[:end])


def test_an_empty_file_is_a_new_one(tmp_path):
    path = tmp_path / "cache"
    path.touch()
    filled(path)
    np.testing.assert_array_equal(read(path), VALUES)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_warning_is_at_the_line_that_asked_for_values(tmp_path, n_jobs):
    path = tmp_path / "cache"
    path.write_text("no database")
    cache = UtilityCache(path)
    utility = FunctionUtility(len, 4, fingerprint="sizes", cache=cache, prefer="threads")
    with pytest.warns(CacheWarning, match="a new one") as caught:
        banzhaf(utility, until=8, n_jobs=n_jobs, progress=False)
    line = inspect.currentframe().f_lineno - 1
    assert [(told.filename, told.lineno) for told in caught] == [(__file__, line)]


def database(path, *statements):
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


FOREIGN = {
    "text": lambda path: path.write_text("rows,value\n1,2\n" * 100),
    "bytes": lambda path: path.write_bytes(b"\0" * 9000),
    "database": lambda path: database(path, "CREATE TABLE utilities (a)"),
    "marked": lambda path: database(path, "CREATE TABLE a (a)", "PRAGMA application_id = 5"),
    "version": lambda path: database(filled(path), "PRAGMA user_version = 99"),
    "no table": lambda path: database(filled(path), "DROP TABLE utilities"),
    "value": lambda path: database(filled(path), "UPDATE utilities SET value = 'much'"),
    "null": lambda path: database(
        path, *[s.replace("value NOT NULL", "value") for s in schema()], *null_row()
    ),
    "whole": lambda path: database(filled(path), "UPDATE utilities SET value = 3"),
}


def schema():
    from upweight.valuation.cache import SCHEMA

    return SCHEMA


def null_row():
    return (
        "INSERT INTO problems VALUES (1, 'p')",
        f"INSERT INTO utilities VALUES (1, x'{KEYS[0].hex()}', NULL)",
    )


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_something_else(tmp_path, name):
    path = tmp_path / "cache"
    FOREIGN[name](path)
    is_replaced(path, path.read_bytes())


def test_names_that_are_taken_are_left_alone(tmp_path):
    path = tmp_path / "cache"
    (tmp_path / "cache.unreadable-1").write_text("before")
    path.write_text("now")
    with pytest.warns(CacheWarning, match="unreadable-2"):
        read(path)
    assert [entry.read_text() for entry in aside(path)] == ["before", "now"]


@pytest.mark.parametrize("writes", [False, True])
def test_damage_that_only_later_shows(tmp_path, writes):
    path = tmp_path / "cache"
    with UtilityCache(path) as cache:
        keys = [i.to_bytes(16, "little") for i in range(3000)]
        cache.put("p", keys, np.zeros(3000))
    data = bytearray(path.read_bytes())
    data[8192:] = b"\x7f" * (len(data) - 8192)  # the header is fine
    path.write_bytes(data)
    cache = UtilityCache(path)
    with pytest.warns(CacheWarning, match="unreadable-1"):
        found = cache.put("p", keys, np.ones(3000)) if writes else cache.get("p", keys)
    assert writes or np.isnan(found).all()
    cache.put("p", keys, np.ones(3000))
    cache.close()
    assert aside(path)[0].read_bytes() == bytes(data)
    with UtilityCache(path) as cache:
        np.testing.assert_array_equal(cache.get("p", keys), 1.0)


def test_another_process_sets_the_file_aside(tmp_path):
    path = filled(tmp_path / "cache")
    cache = UtilityCache(path)
    cache.get("p", KEYS[:1])
    os.rename(path, tmp_path / "elsewhere")
    cache.put("q", KEYS, VALUES)
    cache.close()
    with UtilityCache(path) as cache:
        np.testing.assert_array_equal(cache.get("q", KEYS), VALUES)


# -------------------------------------------------------------------- files not to be written


def test_a_place_without_a_file_is_told_once(tmp_path):
    (tmp_path / "file").touch()
    cache = UtilityCache(tmp_path / "file" / "cache")
    with pytest.warns(CacheWarning, match="in memory only"):
        cache.get("p", KEYS)
    with warnings.catch_warnings(action="error"):  # not again
        cache.put("p", KEYS, VALUES)
        np.testing.assert_array_equal(cache.get("p", KEYS), VALUES)
        cache.get("q", KEYS)
        cache.put("q", KEYS, VALUES)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits of a process")
def test_a_full_disk_is_told_once_and_what_is_there_is_read(tmp_path):
    path = filled(tmp_path / "cache")
    code = """
        import resource, sys, warnings, numpy as np
        from upweight.valuation.cache import UtilityCache
        cache = UtilityCache(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        keys = [i.to_bytes(16, "little") for i in range(9000)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache.put("q", keys, np.arange(9000.0))
            cache.put("q", keys[:5], np.arange(5.0))
        print(len(caught), caught[0].category.__name__, "written" in str(caught[0].message))
        print((cache.get("q", keys) == np.arange(9000.0)).all())
        print(len(cache), np.isnan(cache.get("p", [bytes.fromhex(sys.argv[2])])).any())
    """
    done = python(code, path, KEYS[0].hex())
    assert done.stdout.split() == ["1", "CacheWarning", "True", "True", "9000", "False"]
    np.testing.assert_array_equal(read(path), VALUES)


def test_a_file_that_is_locked_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr("upweight.valuation.cache.PATIENCE", 0.05)
    path = filled(tmp_path / "cache")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with UtilityCache(path) as cache:
        np.testing.assert_array_equal(cache.get("p", KEYS), VALUES)
        with pytest.warns(CacheWarning, match="cannot be written"):
            cache.put("q", KEYS, VALUES)
        np.testing.assert_array_equal(cache.get("q", KEYS), VALUES)
    other.close()
    assert aside(path) == []


# ----------------------------------------------------------------------------------- digests

MODULE = """
import dataclasses, enum, functools, sys
import numpy as np, pandas as pd
from scipy import sparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from upweight.valuation.fingerprints import digest

class Own(ClassifierMixin, BaseEstimator):
    def __init__(self, wanted=frozenset({"a", "b", "c"})):
        self.wanted = wanted
    def fit(self, x, y):
        return self
    def predict(self, x):
        return [label in {"a", "b", "c"} for label in x]

@dataclasses.dataclass
class Options:
    name: str
    sizes: list = dataclasses.field(default_factory=list)

Colour = enum.Enum("Colour", "RED BLUE")
TABLE = {"a": np.arange(3)}

def even(n):
    return True if n == 0 else odd(n - 1)

def odd(n):
    return False if n == 0 else even(n - 1)

def score(rows, *, weight=TABLE["a"]):
    inner = lambda row: row in {"x", "y", "z"} or even(row)
    return np.mean([inner(row) for row in rows]) + TABLE["a"].sum()

frame = pd.DataFrame({"a": [1.0, 2.0], "b": ["x", None], "c": pd.Categorical(["u", "v"]),
                      "d": pd.to_datetime(["2020", "2021"]), "e": pd.array([1, None], "Int64")})
parts = [{"a", "b", ("c", 1)}, {"k": [1, 2.0, None, b"x"]}, frame, frame["b"], sparse.eye_array(4),
         np.array(["a", 1, None], object), np.random.default_rng(3), np.random.RandomState(3),
         make_pipeline(StandardScaler(), LogisticRegression(C=3)), Own(), get_scorer("roc_auc"),
         Options("n", [1]), Colour.RED, score, odd, functools.partial(score, weight=2),
         Own().predict,
         np.mean, np.add, len, np, str.lower]
print([digest(part) for part in parts])
"""

NETWORKS = """
import torch
from skorch import NeuralNetClassifier
from upweight.valuation.fingerprints import digest

class Net(torch.nn.Module):
    def __init__(self, hidden=4):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, hidden), torch.nn.Dropout(0.1))
    def forward(self, x):
        return self.layers(x)

torch.manual_seed(0)
net = Net()
skorch = NeuralNetClassifier(Net, module__hidden=5, optimizer=torch.optim.SGD, lr=0.1)
parts = [net, Net, skorch, torch.ones(2, dtype=torch.bfloat16), torch.float32]
print([digest(part) for part in parts])
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [MODULE, NETWORKS])
def test_digests_are_the_same_in_every_process(code):
    first, second = (ast.literal_eval(python(code, seed=seed).stdout) for seed in "12")
    assert first == second
    assert [at for at, found in enumerate(first) if found is None] == []
    assert len(set(first)) == len(first)


def counts(weight):
    def function(rows, bonus=1):
        return len(rows) * weight + bonus

    return function


LIMIT = 3


def limited(rows):
    return min(len(rows), LIMIT)


def changed_global():
    yield limited
    globals()["LIMIT"] = 4
    try:
        yield limited
    finally:
        globals()["LIMIT"] = 3


def listed(*values):
    return np.array(values, object)


def later_state():
    rng = np.random.default_rng(0)
    rng.random()
    return rng


DIFFERENT = {
    "lengths": (("ab", "c"), ("a", "bc")),
    "nesting": ((("a",), "b"), ("a", ("b",))),
    "list and tuple": ([1], (1,)),
    "number types": (1, 1.0),
    "numbers and booleans": (1, True),
    "text and bytes": ("a", b"a"),
    "signs of zero": (0.0, -0.0),
    "order": ([1, 2], [2, 1]),
    "shapes": (np.zeros((2, 3)), np.zeros((3, 2))),
    "types": (np.zeros(2, np.float32), np.zeros(1, np.float64)),
    "byte order": (np.zeros(2, "<i4"), np.zeros(2, ">i4")),
    "objects": (listed("ab", "c"), listed("a", "bc")),
    "scalar and array": (np.float64(1), np.array(1.0)),
    "names of columns": (pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]})),
    "names of rows": (pd.Series([1], [0]), pd.Series([1], [1])),
    "missing": (pd.Series(["a", None], dtype=object), pd.Series(["a", np.nan], dtype=object)),
    "categories": (pd.Categorical(["a"]), pd.Categorical(["a"], ["a", "b"])),
    "formats": (sparse.csr_array(np.eye(2)), sparse.csc_array(np.eye(2))),
    "entries": (sparse.csr_array(np.eye(2)), sparse.csr_array(np.eye(2) * 2)),
    "parameters": (LogisticRegression(C=1), LogisticRegression(C=2)),
    "steps": (make_pipeline(StandardScaler()), make_pipeline(StandardScaler(with_std=False))),
    "states": (np.random.default_rng(0), later_state()),
    "code": (lambda rows: len(rows) * 2, lambda rows: len(rows) + 1),
    "constants": (lambda rows: 1, lambda rows: 2),
    "names": (lambda rows: rows.sum(), lambda rows: rows.max()),
    "closures": (counts(1), counts(2)),
    "defaults": (lambda rows, k=1: k, lambda rows, k=2: k),
    "partials": (functools.partial(counts, 1), functools.partial(counts, 2)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_has_another_digest(name):
    one, other = map(digest, DIFFERENT[name])
    assert one is not None
    assert other is not None
    assert one != other


def test_a_global_that_code_uses_is_part_of_it():
    one, other = map(digest, changed_global())
    assert one != other
    assert digest(limited) == one


def test_weights_of_a_network_are_part_of_it():
    import torch

    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    twin = copy.deepcopy(layer)
    first = digest(layer)
    assert first == digest(twin)
    with torch.no_grad():
        twin[0].weight[0, 0] += 1
    assert digest(twin) != first
    layer[1].p = 0.25
    assert digest(layer) != first


def test_what_is_the_same_has_the_same_digest():
    x = np.arange(12.0).reshape(3, 4)
    assert digest(x) == digest(np.asfortranarray(x)) == digest(np.tile(x, 2)[:, :4])
    assert digest({"a", "b", "c"}) == digest({"c", "b", "a"})
    assert digest(counts(1)) == digest(counts(1))
    fitted = LogisticRegression().fit(x, [0, 1, 1])
    assert digest(fitted) == digest(LogisticRegression())
    assert digest(np.random.default_rng(5)) == digest(np.random.default_rng(5))
    itself = [1]
    itself.append(itself)
    assert digest(itself) is not None


class Plain:
    pass


@dataclasses.dataclass
class Holds:
    what: object


class Kind(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    "value",
    [
        object(),
        Plain(),
        io.StringIO("a"),
        [1, {"a": Plain()}],
        Holds(Plain()),
        listed(1, Plain()),
        functools.partial(len, Plain()),
        counts(Plain()),
        (i for i in range(3)),
        threading.Lock(),
        LogisticRegression(C=Plain()),
        sys.modules[__name__],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_told_has_no_digest(value):
    assert digest(value) is None


def test_an_open_file_has_no_digest():
    with open(__file__) as file:
        assert digest(file) is None
        assert digest(lambda rows: file.read()) is None
    assert digest(Kind.ONE) is not None


def test_many_functions_that_call_one_another_take_no_time():
    names = [f"f{i}" for i in range(40)]
    calls = " + ".join(f"{name}()" for name in names)
    scope = {"__name__": "made"}
    exec("\n".join(f"def {name}(): return {calls}" for name in names), scope)
    assert digest(scope["f0"]) is not None
    scope["f39"].__defaults__ = (1,)
    assert digest(scope["f0"]) is not None
