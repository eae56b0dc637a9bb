"""Scores to disk in processes that are killed at random: python kill_run.py FOLDER KILLS [METHOD].

One process imports torch and forks a worker for every attempt. A worker fits and scores from the
start, as the same script would that is called again. What is there when one comes to its end is
compared with what an uninterrupted one has written, byte by byte, and the next round begins.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pyarrow.parquet  # noqa: F401, so that no worker has to
import torch
import zarr  # noqa: F401
from torch import nn
from torch.nn import functional as F

import upweight as uw
from upweight import influence as product
from upweight.layerwise import holding
from upweight.shards import store

METHODS = ("direct", "cg", "ekfac")
ROWS, QUERIES = 1500, 24


def score(method: str, path: Path | None) -> None:
    """What a script does."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    train = torch.randn(ROWS, 6), torch.randint(3, (ROWS,))
    test = torch.randn(QUERIES, 6), torch.randint(3, (QUERIES,))
    recipe = uw.CG(preconditioner="nystroem", rtol=1e-3) if method == "cg" else method
    influence = uw.Influence(model, F.cross_entropy, recipe, damping=0.1).fit(train)
    influence.scores(test, to=path)


def small_pieces() -> None:
    """Shards of 64 rows and some groups of test rows: about 70 parts."""
    store.WIDTH, store.ROWS, store.LEAST_WIDTH = 64, 5, 64
    product.SOLVED_BYTES = 3 * 8 * 83 * 10
    holding.HELD_BYTES = 1000


def forked(work: Callable[[], None]) -> int:
    """The process id of a worker."""
    worker = os.fork()
    if worker:
        return worker
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(worker: int, limit: float) -> bool:
    """Whether a worker came to its end within so many seconds; else it is killed."""
    stop = time.monotonic() + limit
    while time.monotonic() < stop:
        found, status = os.waitpid(worker, os.WNOHANG)
        if found:
            break
        time.sleep(0.0005)
    else:
        os.kill(worker, signal.SIGKILL)
        _, status = os.waitpid(worker, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise SystemExit(f"a worker ended with status {status}")
    return True


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def main(folder: Path, kills: int, methods: tuple[str, ...] = METHODS) -> dict[str, object]:
    """Kill so many times; what happened."""
    small_pieces()
    for method in methods:
        score(method, None)  # what torch loads when it is used; zarr's threads are of no use forked
    draw = random.Random(0)
    wanted: dict[str, dict[str, bytes]] = {}
    seconds: dict[str, float] = {}
    for method in methods:
        begin = time.monotonic()
        assert ended(forked(lambda m=method: score(m, folder / m)), 600)
        seconds[method] = time.monotonic() - begin
        wanted[method] = content(folder / method)
    done = rounds = 0
    parts: list[int] = []  # of each kill: how many parts were on disk
    while done < kills:
        method = methods[rounds % len(methods)]
        path = folder / "again" / "scores"
        while not path.exists():
            worker = forked(lambda m=method, p=path: score(m, p))
            if not ended(worker, draw.uniform(0, seconds[method]) if done < kills else 600):
                done += 1
                log = path.with_name(".scores.partial") / "done.log"
                parts.append(log.read_bytes().count(b"blake2b") if log.exists() else 0)
        if content(path) != wanted[method]:
            raise SystemExit(f"{method}: after {done} kills the bytes are others")
        rounds += 1
        shutil.rmtree(path.parent)
    return {"kills": done, "rounds": rounds, "parts": parts, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), tuple(sys.argv[3:]) or METHODS)))
