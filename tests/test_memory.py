"""Scores that go to disk need memory that does not grow with the number of training rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
