"""Two and three processes do what one does, or stop with a reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cluster_run
import upweight as uw
from upweight.cluster import assign
from upweight.shards import store

HERE = Path(__file__).parent
# within 1e-10 of one process, relative to the largest number
EQUAL = ("mlp", "kfac", "sampled", "empirical", "few", "one", "conv", "norm", "tokens", "unseen")
STOPS = (
    *("other_damping_later", "other_question", "other_parameters", "other_loss"),
    *("other_row", "other_rows", "hidden_row", "fewer_rows", "other_damping", "other_weights"),
    *("nan801", "infinite_slope", "other_calls", "full_disk", "wrapped", "in_parts"),
)
LIMIT = 120


def found(folder: Path, task: str, size: int) -> list[Any]:
    return [torch.load(folder / f"{task}-{r}.pt", weights_only=False) for r in range(size)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that do everything, one after the other, also after they have stopped.

    Then two ranks, one of which is killed as it writes scores, and three that go on.
    """
    folder = tmp_path_factory.mktemp("cluster")
    groups = [
        f"two:2:{','.join([*EQUAL, *STOPS, 'spread', 'disk', 'forked', 'early'])}",
        "three:2:killed",
        "three:3:mlp,one,few,norm,resumed,spread",
    ]
    script = [sys.executable, "cluster_run.py", str(folder), *groups]
    done = subprocess.run(
        script, cwd=HERE, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.stdout == "two 0 0\nthree 0 -9\nthree 0 0 0\n", done.stderr
    return folder


@pytest.fixture
def two(ran: Path) -> Path:
    return ran / "two"


@pytest.fixture
def three(ran: Path) -> Path:
    return ran / "three"


def check_equal(name: str, folder: Path, size: int) -> None:
    wanted = cluster_run.fit(name, False)
    every = found(folder, name, size)
    for one in every:
        assert not isinstance(one, str), one
        for key, value in wanted.items():
            if isinstance(value, Tensor) and key != "places":
                scale = float(value.abs().max())
                torch.testing.assert_close(one[key], value, rtol=0, atol=1e-10 * scale)
        assert all(torch.equal(one[key], every[0][key]) for key in ("scores", "self", "mean"))
        check_places(one["places"], one["best"], wanted["scores"])
    assert len({one["fingerprint"] for one in every}) == 1  # of the factors, to the last bit


def check_places(places: Tensor, best: Tensor, scores: Tensor) -> None:
    """Rows with the best scores; round-off decides which of equal rows comes first."""
    queries = places.reshape(len(scores), -1)
    assert all(len(set(rows)) == len(rows) for rows in queries.tolist())
    there = scores.gather(1, queries).flatten()
    torch.testing.assert_close(there, best, rtol=0, atol=1e-10 * float(scores.abs().max()))


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.slow
def test_two_ranks_equal_one(name: str, two: Path) -> None:
    check_equal(name, two, 2)


@pytest.mark.parametrize("name", ["mlp", "one", "few", "norm"])
@pytest.mark.slow
def test_three_ranks_equal_one(name: str, three: Path) -> None:
    check_equal(name, three, 3)


@pytest.mark.parametrize(
    ("task", "told", "other"),
    [
        ("other_row", "they differ in the content of rows", None),
        ("other_rows", "they differ in the content of rows", None),
        ("hidden_row", "other content in rows 450 to 899", None),
        ("fewer_rows", r"the number of rows \(rank 0: 9; rank 1: 8\)", None),
        ("other_damping", r"differ in damping \(rank 0: .*0.1.*; rank 1: .*1.1", None),
        ("other_damping_later", r"differ in damping \(rank 0: .*0.1.*; rank 1: .*1.1", None),
        ("other_question", r"differ in k \(rank 0: .3.; rank 1: .4.\)", None),
        ("other_parameters", "differ in chosen parameters", None),
        ("other_loss", "differ in the loss of some rows", None),
        ("other_weights", "expected the same model on all ranks", None),
        ("nan801", "row 801 is not finite", "rank 1 has stopped: ValueError: training data: row"),
        ("infinite_slope", "first in row 801", "rank 1 has stopped: ValueError: derivatives of"),
        ("other_calls", "expected all ranks at the same place; got rank 0 at", None),
        ("wrapped", "Pass model.module", None),
        ("in_parts", r"cut into parts by fully_shard\(\).*0.weight.*full_state_dict=True", None),
        ("full_disk", "cannot be written", r"rank 1 has stopped: OSError: .*No space left"),
    ],
)
@pytest.mark.slow
def test_all_ranks_stop_with_the_reason(task: str, told: str, other: str | None, two: Path) -> None:
    first, second = found(two, task, 2)
    assert isinstance(second, str)
    assert re.search(told, second)
    assert isinstance(first, str)
    assert re.search(other or told, first)
    if other is not None:
        assert first.startswith("ClusterError: ")


@pytest.mark.slow
def test_a_layer_that_one_rank_declines_is_declined_by_all(two: Path) -> None:
    wanted = cluster_run.forked(False)
    for one in found(two, "forked", 2):
        assert not isinstance(one, str), one
        assert "one (Linear): weight, bias, 12 of 20 parameters, have no Kron" in one["notes"][0]
        torch.testing.assert_close(one["curvature"], wanted["curvature"], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_rank_does_not_go_on_while_another_has_failed(two: Path) -> None:
    first, second = found(two, "early", 2)
    assert "row 301 is not finite" in second
    assert "rank 1 has stopped" in first
    calls = int(re.findall(r"after (\d+) calls", first)[0])
    assert calls < 300


@pytest.mark.slow
def test_tasks_are_spread_and_tensors_exchanged(two: Path, three: Path) -> None:
    for folder, size in ((two, 2), (three, 3)):
        every = found(folder, "spread", size)
        assert sorted(at for one in every for at in one["ran"]) == list(range(5))
        assert every[0]["ran"] == [1]  # the most expensive, alone
        total = float(sum(range(size)))
        for one in every:
            assert one["told"] == 7
            for at, (full, empty, number) in enumerate(one["results"]):
                assert full.tolist() == [float(at)] * (at + 1)
                assert (empty.numel(), int(number)) == (0, at)
            a, b, c = one["sums"]
            assert a.tolist() == [total] * 3
            assert b.tolist() == [[float(size)] * 2] * 2
            assert torch.equal(c, size * torch.arange(6.0).reshape(2, 3).T)
            wanted = [i for rank in range(size) for i in range(2 * rank)]
            assert one["rows"].dtype == torch.bfloat16
            assert one["rows"].flatten().tolist() == wanted


def files(folder: Path) -> dict[str, bytes]:
    every = (path for path in folder.rglob("*") if path.is_file() and path.name != "meta.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in every}


def told(folder: Path) -> tuple[dict[str, Any], float]:
    """What is said of scores, and apart from it a number that has round-off."""
    meta = json.loads((folder / "meta.json").read_text())
    certificate = meta["provenance"]["certificate"]
    certificate.pop("residual_max")
    return meta, certificate.pop("residual_mean")


@pytest.mark.slow
def test_shards_on_disk_are_those_of_one(
    two: Path, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte by byte, as all have the factors of the same file; also after a kill, by more ranks."""
    monkeypatch.setattr(store, "WIDTH", 16)
    monkeypatch.setattr(store, "LEAST_WIDTH", 16)
    for folder, name in ((two, "disk"), (three, "killed")):
        alone = cluster_run.to_disk(folder, "alone", False)
        assert sorted(alone["writes"]) == list(range(13))
        assert files(folder / name) == files(folder / "alone")
        (meta, residual), (wanted, exact) = told(folder / name), told(folder / "alone")
        assert meta == wanted
        assert residual == pytest.approx(exact, rel=1e-6)
        assert not (folder / f".{name}.partial").exists()
    writes = [one["writes"] for one in found(two, "disk", 2)]
    assert sorted(at for some in writes for at in some) == list(range(13))
    assert {len(some) for some in writes} == {6, 7}


@pytest.mark.slow
def test_what_a_killed_rank_had_written_is_kept(three: Path) -> None:
    [lost] = [torch.load(three / "killed-0.pt", weights_only=False)]
    assert lost.startswith("ClusterError: another rank has ended")
    every = found(three, "resumed", 3)
    again = [at for one in every for at in one["writes"]]
    # rank 1 had written three of six, rank 0 all of its seven
    assert len(again) == len(set(again)) == 3
    assert all(torch.equal(one["scores"], every[0]["scores"]) for one in every)


@pytest.mark.slow
def test_the_guide(tmp_path: Path) -> None:
    guide = (HERE.parent / "docs/howto/many-gpus.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node=2", "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(5, 300) by 2 processes\n"
    assert f"```\n{done.stdout}```" in guide


# --- one process ---------------------------------------------------------------------------------


def test_the_most_expensive_goes_to_the_least_loaded() -> None:
    costs = [5.0, 1.0, 9.0, 3.0, 3.0, 2.0]
    owners = assign(costs, 2)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in (0, 1)]
    assert sorted(loads) == [11.0, 12.0]
    assert assign([], 3) == []


def test_alone_it_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node=N"):
        uw.Influence(nn.Linear(2, 1), nn.MSELoss(), "ekfac", damping=0.1, cluster=True)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "direct", "damping": 0.1},
        {"method": uw.CG(preconditioner="ekfac"), "damping": 0.1},
        {"method": "ekfac", "damping": "auto"},
        {"method": "ekfac", "damping": 0.1, "blocks": "layer"},
    ],
)
def test_other_methods_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cluster= is for the methods EKFAC and KFAC"):
        uw.Influence(nn.Linear(2, 1), nn.MSELoss(), cluster=True, **options)


def test_without_a_cluster_nothing_is_loaded() -> None:
    code = "import sys, upweight; sys.exit('upweight.cluster' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=LIMIT).returncode == 0


def test_passes_take_the_rows_within_under_their_positions() -> None:
    x = torch.arange(7.0)[:, None]
    risk = uw.EmpiricalRisk(nn.Linear(1, 1), nn.MSELoss(), (x, x), batch_size=2)
    some = risk.within(slice(3, 6))
    chunks = [
        (chunk.start, chunk.stop, chunk.batch[0].flatten().tolist()) for chunk in some.chunks()
    ]
    assert chunks == [(3, 5, [3.0, 4.0]), (5, 6, [5.0])]
    assert some.n == 7
    assert len(some.losses()) == 7
    assert [len(chunk) for chunk in some.with_rows(some.rows).chunks()] == [2, 2, 2, 1]
    assert [len(chunk) for chunk in risk.within(slice(4, 4)).chunks()] == []
