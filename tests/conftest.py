"""Shared fixtures: the table of cases in two precisions."""

from __future__ import annotations

import pytest
import torch

from cases import CASES, Case, make

torch.set_num_threads(1)  # two spinning threads on shared cores are slower than one


# The curvature of attention, by double backward passes row by row, takes seconds for each test.
TABLE = [
    pytest.param(name, marks=pytest.mark.slow) if name == "attention" else name
    for name in sorted(CASES)
]


@pytest.fixture(params=TABLE)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


@pytest.fixture(params=TABLE)
def case32(request: pytest.FixtureRequest) -> Case:
    return make(request.param, torch.float32)
