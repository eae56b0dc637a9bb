"""What the ranks of a cluster do in the tests: python cluster_run.py FOLDER NAME:SIZE:TASK,TASK …

Every task writes what it found to FOLDER/NAME/TASK-RANK.pt: a dictionary, or the text of an error.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import cases
import upweight as uw
from upweight.shards import store

Found = dict[str, Any]

# case, recipe, number of training rows (None: as they are)
FITS: dict[str, tuple[str, uw.EKFAC | uw.KFAC, int | None]] = {
    "mlp": ("mlp", uw.EKFAC(), None),
    "kfac": ("mlp", uw.KFAC(), None),
    "sampled": ("mlp", uw.EKFAC(fisher="sampled", samples=2, seed=3), None),
    "empirical": ("mlp", uw.EKFAC(fisher="empirical"), None),
    "few": ("mlp", uw.EKFAC(fisher="sampled", correction_rows=5), None),
    "one": ("mlp", uw.EKFAC(), 1),
    "conv": ("conv2d", uw.EKFAC(), None),
    "norm": ("layer_norm", uw.EKFAC(), None),
    "tokens": ("embedding", uw.EKFAC(other="diagonal"), None),
    "unseen": ("tied_weights", uw.EKFAC(), None),
}


def fitted(name: str, cluster: bool, **options: Any) -> tuple[cases.Case, uw.Influence]:
    build, recipe, n = FITS[name]
    case = cases.make(build)
    train = case.train if n is None else tuple(part[:n] for part in case.train)
    influence = uw.Influence(
        case.model, case.loss, recipe, damping=0.1, cluster=cluster, **case.options
    )
    return case, influence.fit(train, **options)


def fit(name: str, cluster: bool) -> Found:
    """Everything that a fitted influence gives."""
    case, influence = fitted(name, cluster)
    kronecker: Any = influence.inverse.inner.curvature
    found: Found = {"curvature": kronecker.dense(), "fingerprint": kronecker.fingerprint()}
    found["scores"] = influence.scores(case.test).values
    found["residual"] = torch.tensor(influence.certificate.to_dict()["residual_mean"])
    found["self"] = influence.self_influence().values
    found["mean"] = influence.mean_scores(case.test).values
    top = influence.top(case.test, k=3, harmful=True)
    found["best"] = torch.tensor(top["score"].to_numpy())
    found["places"] = torch.tensor(top["train_row"].to_numpy())
    by = influence.scores(case.test, by="layer")
    found["parts"] = torch.stack([part.values for part in by.values()])
    return found


class Forked(nn.Module):
    """Goes another way with the row 12, which lies in none of the places that are probed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        marked = len(x) > 1 and bool((x > 50).any())
        inner = self.one(torch.cat([x, x[:1]]))[: len(x)] if marked else self.one(x)
        return self.two(inner.tanh())


def forked(cluster: bool) -> Found:
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randint(2, (20,))
    x[12, 0] = 60.0
    model = Forked().double()
    influence = uw.Influence(model, F.cross_entropy, "ekfac", damping=0.1, cluster=cluster)
    kronecker: Any = influence.fit((x, y)).inverse.inner.curvature
    return {"curvature": kronecker.dense(), "notes": kronecker.notes}


# --- to disk -------------------------------------------------------------------------------------


def large() -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    train = torch.randn(200, 6, dtype=torch.float64), torch.randint(3, (200,))
    test = torch.randn(5, 6, dtype=torch.float64), torch.randint(3, (5,))
    return model, train, test


def to_disk(folder: Path, name: str, cluster: bool) -> Found:
    """Scores in 13 shards, by factors that are in a file from the first time on."""
    store.WIDTH, store.LEAST_WIDTH = 16, 16
    model, train, test = large()
    influence = uw.Influence(model, F.cross_entropy, "ekfac", damping=0.1, cluster=cluster)
    influence.fit(train, factors=folder / "factors")
    writes: list[int] = []
    write = store.ShardStore._write

    def counted(self: Any, part: Any, piece: Any) -> None:
        writes.append(part[2])
        write(self, part, piece)

    store.ShardStore._write = counted
    try:
        scores = influence.scores(test, to=folder / name)
    finally:
        store.ShardStore._write = write
    return {"scores": torch.as_tensor(scores.values[:]), "writes": writes}


def killed(folder: Path) -> Found:
    """Rank 1 ends in the middle, without a word."""
    writes = 0
    write = store.ShardStore._write

    def counted(self: Any, *args: Any) -> None:
        nonlocal writes
        writes += 1
        if dist.get_rank() == 1 and writes == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *args)

    store.ShardStore._write = counted
    return to_disk(folder, "killed", True)


# --- what must stop all ranks --------------------------------------------------------------------


def simple(change: Callable[[Tensor, Tensor], Any] | None = None, **options: Any) -> Found:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    train = torch.randn(9, 3), torch.randint(2, (9,))
    if dist.get_rank() == 1 and change is not None:
        train = change(*train) or train
    options = {"method": "ekfac", "damping": 0.1, "cluster": True} | options
    influence = uw.Influence(model, F.cross_entropy, **options)
    influence.fit(train)
    return {"scores": influence.scores((train[0][:2], train[1][:2])).values}


def other_rows() -> Found:
    return simple(lambda x, y: (x.flip(0), y.flip(0)))


def other_row() -> Found:
    return simple(lambda x, y: (x.index_fill(0, torch.tensor([7]), 0.5), y))


def hidden_row() -> Found:
    """One that is in order, and in none of the places where all ranks look."""
    torch.manual_seed(0)
    x, y = torch.randn(900, 3), torch.randint(2, (900,))
    x[801] += float(dist.get_rank())
    uw.Influence(nn.Linear(3, 2), F.cross_entropy, "ekfac", damping=0.1, cluster=True).fit((x, y))
    return {}


def fewer_rows() -> Found:
    return simple(lambda x, y: (x[:8], y[:8]))


def other_damping() -> Found:
    return simple(damping=0.1 + dist.get_rank())


def other_parameters() -> Found:
    """Each rank freezes another of two layers of the same shape."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    for parameter in model[dist.get_rank()].parameters():
        parameter.requires_grad_(False)
    train = torch.randn(9, 3), torch.randint(2, (9,))
    uw.Influence(model, F.cross_entropy, "ekfac", damping=0.1, cluster=True).fit(train)
    return {}


def smoothed(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, label_smoothing=0.1 * dist.get_rank())


def other_loss() -> Found:
    torch.manual_seed(0)
    train = torch.randn(9, 3), torch.randint(2, (9,))
    uw.Influence(nn.Linear(3, 2), smoothed, "ekfac", damping=0.1, cluster=True).fit(train)
    return {}


def other_question() -> Found:
    torch.manual_seed(0)
    train = torch.randn(9, 3), torch.randint(2, (9,))
    influence = uw.Influence(nn.Linear(3, 2), F.cross_entropy, "ekfac", damping=0.1, cluster=True)
    influence.fit(train)
    influence.top(train, k=3 + dist.get_rank())
    return {}


def other_damping_later() -> Found:
    torch.manual_seed(0)
    train = torch.randn(9, 3), torch.randint(2, (9,))
    influence = uw.Influence(nn.Linear(3, 2), F.cross_entropy, "ekfac", damping=0.1, cluster=True)
    influence.fit(train)
    influence.damping = 0.1 + dist.get_rank()
    influence.scores(train)
    return {}


def other_weights() -> Found:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, float(dist.get_rank()))
    train = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
    uw.Influence(model, F.cross_entropy, "ekfac", damping=0.1, cluster=True).fit(train)
    return {}


class Rooted(nn.Module):
    """Has an infinite slope in rows of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).abs().sqrt())


def nan_row(row: int) -> Found:
    torch.manual_seed(0)
    x, y = torch.randn(900, 3), torch.randint(2, (900,))
    x[row] = float("nan")
    uw.Influence(nn.Linear(3, 2), F.cross_entropy, "ekfac", damping=0.1, cluster=True).fit((x, y))
    return {}


def infinite_slope() -> Found:
    torch.manual_seed(0)
    x, y = torch.randn(900, 3), torch.randint(2, (900,))
    x[801] = 0.0
    uw.Influence(Rooted(), F.cross_entropy, "ekfac", damping=0.1, cluster=True).fit((x, y))
    return {}


class Slow(nn.Linear):
    """A layer that takes its time, and counts."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        time.sleep(0.005)
        return super().forward(x)


def early() -> Found:
    """Rank 1 fails at its first row; rank 0 has 300 to go."""
    torch.manual_seed(0)
    x, y = torch.randn(600, 3), torch.randint(2, (600,))
    x[301] = float("nan")
    options: dict[str, Any] = {"damping": 0.1, "cluster": True, "batch_size": 1}
    try:
        uw.Influence(Slow(3, 2), F.cross_entropy, "ekfac", **options).fit((x, y))
    except Exception as error:
        raise type(error)(f"{error} after {Slow.calls} calls") from None
    return {}


def wrapped() -> Found:
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    uw.Influence(model, F.cross_entropy, "ekfac", damping=0.1, cluster=True)
    return {}


def in_parts() -> Found:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    uw.Influence(model, F.cross_entropy, "ekfac", damping=0.1, cluster=True)
    return {}


def other_calls() -> Found:
    torch.manual_seed(0)
    rows = torch.randn(9, 3), torch.randint(2, (9,))
    influence = uw.Influence(nn.Linear(3, 2), F.cross_entropy, "ekfac", damping=0.1, cluster=True)
    influence.fit(rows)
    if dist.get_rank() == 0:
        influence.scores(rows)
    else:
        influence.self_influence()
    return {}


def full_disk(folder: Path) -> Found:
    """Rank 1 cannot write."""
    write = store.ShardStore._write

    def refused(self: Any, *args: Any) -> None:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        write(self, *args)

    store.ShardStore._write = refused
    try:
        return to_disk(folder, "full", True)
    finally:
        store.ShardStore._write = write


def spread() -> Found:
    """What a cluster does for itself."""
    from upweight.cluster import Cluster

    cluster = Cluster()
    ran: list[int] = []

    def work(at: int) -> list[Tensor]:
        ran.append(at)
        return [torch.full((at + 1,), float(at)), torch.zeros(0), torch.tensor(at)]

    results = cluster.spread([1.0, 30.0, 2.0, 3.0, 4.0], work, torch.device("cpu"), "tasks")
    sums = [torch.full((3,), float(cluster.rank)), torch.ones(2, 2, dtype=torch.float64).T]
    sums.append(torch.arange(6.0).reshape(2, 3).T)  # not contiguous
    cluster.add(sums, "sums")
    own = torch.arange(cluster.rank * 2).reshape(-1, 1).to(torch.bfloat16)
    return {
        "ran": ran,
        "results": results,
        "sums": sums,
        "rows": cluster.gather_rows(own, "rows"),
        "told": cluster.tell("number", cluster.rank + 7),
    }


def task(name: str, folder: Path) -> Found:
    if name in FITS:
        return fit(name, True)
    if name.startswith("nan"):
        return nan_row(int(name.removeprefix("nan")))
    if name.startswith("disk"):
        return to_disk(folder, name, True)
    if name == "resumed":
        return to_disk(folder, "killed", True)
    if name == "forked":
        return forked(True)
    if name in ("killed", "full_disk"):
        return globals()[name](folder)
    return globals()[name]()


def rank_of(folder: Path, rank: int, size: int, tasks: list[str]) -> None:
    """What one process does: it meets the others at a file, so that no port can be taken."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    for name in tasks:
        try:
            found: Any = task(name, folder)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        torch.save(found, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def run_ranks(folder: Path, size: int, tasks: list[str]) -> list[int]:
    """How each of the processes has ended."""
    folder.mkdir(exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    ranks: list[int] = []
    for rank in range(size):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                rank_of(folder, rank, size, tasks)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        ranks.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]


def main() -> None:
    """Groups of ranks one after the other, forked here: torch is loaded once."""
    for group in sys.argv[2:]:
        name, size, tasks = group.split(":")
        print(name, *run_ranks(Path(sys.argv[1]) / name, int(size), tasks.split(",")), flush=True)


if __name__ == "__main__":
    main()
