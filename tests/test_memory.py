"""Scores that go to disk need memory that does not grow with the number of training rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import sys, torch, upweight as uw
from pathlib import Path
torch.manual_seed(0)
n, out = int(sys.argv[1]), sys.argv[2]
model = torch.nn.Linear(6, 3)
rows = lambda k: (torch.randn(k, 6), torch.randint(3, (k,)))
influence = uw.Influence(model, torch.nn.functional.cross_entropy, damping=0.1).fit(rows(500))
test, train = rows(1000), rows(n)
influence.scores(test, train, to=out + "/warm" + str(n))
Path("/proc/self/clear_refs").write_text("5")      # forget the peak so far
status = lambda: Path("/proc/self/status").read_text()
read = lambda key: int(next(l for l in status().splitlines() if l.startswith(key)).split()[1])
before = read("VmRSS")
influence.scores(test, train, to=out + "/again" + str(n))
print(read("VmHWM") - before)
"""


def growth(n: int, folder: Path) -> float:
    """Peak memory beyond what the process had, in MiB, while scoring n training rows."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(n), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_constant_in_training_rows(tmp_path: Path) -> None:
    few, many = growth(20_000, tmp_path), growth(200_000, tmp_path)
    # 1000 × 180,000 more scores are 687 MiB in float32
    assert many - few < 150


LIMITED = """
import sys, torch, upweight as uw
from pathlib import Path
torch.set_num_threads(1)
torch.manual_seed(0)
kind, memory, out = sys.argv[1], sys.argv[2], sys.argv[3]
def case(kind, n, m, small=False):
    if kind == "mlp":
        model, shape = uw.MLP([8, 8, 10] if small else [64, 256, 256, 10], seed=0), (64,)
        shape = (8,) if small else shape
    else:
        w, side = (2, 8) if small else (16, 32)
        conv = lambda i, o: [torch.nn.Conv2d(i, o, 3, padding=1), torch.nn.ReLU()]
        head = [torch.nn.MaxPool2d(4), torch.nn.Flatten(), torch.nn.Linear(w * side**2 // 16, 10)]
        model, shape = torch.nn.Sequential(*conv(3, w), *conv(w, w), *head), (3, side, side)
    rows = lambda k: (torch.randn(k, *shape), torch.randint(10, (k,)))
    own = uw.Influence(model, torch.nn.functional.cross_entropy, uw.EKFAC(), damping=0.01,
                       certify=0, memory=memory)
    return own, rows(n), rows(m)
influence, train, test = case(kind, 20, 5, small=True)
influence.fit(train).scores(test)                  # what torch loads when it is first needed
influence, train, test = case(kind, *((1500, 297) if kind == "mlp" else (200, 20)))
planned = influence.plan(train, test).table["memory_mib"][0] if out == "plan" else 0.0
Path("/proc/self/clear_refs").write_text("5")
status = lambda: Path("/proc/self/status").read_text()
read = lambda key: int(next(l for l in status().splitlines() if l.startswith(key)).split()[1])
before = read("VmRSS")
found = influence.fit(train).scores(test).values
print(planned, (read("VmHWM") - before) / 1024)
if out != "plan":
    torch.save(found, out)
"""


def planned_and_taken(kind: str, memory: str, out: Path | str = "plan") -> tuple[float, float]:
    """MiB that a plan says for fit and scores, and that they take."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, kind, memory, str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    planned, taken = map(float, done.stdout.split())
    return planned, taken


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_plan_knows_the_memory_that_layers_take(kind: str) -> None:
    planned, taken = planned_and_taken(kind, "2GiB")
    assert planned == pytest.approx(taken, rel=0.25)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_less_memory_takes_less_and_changes_nothing(tmp_path: Path) -> None:
    taken: list[float] = []
    scores: list[torch.Tensor] = []
    for memory in ("2GiB", "110MiB"):
        _, own = planned_and_taken("cnn", memory, tmp_path / memory)
        taken.append(own)
        scores.append(torch.load(tmp_path / memory, weights_only=True))
    assert taken[1] < 110 < taken[0]
    assert float((scores[1] - scores[0]).abs().max()) < 1e-4 * float(scores[0].abs().max())
