"""Shared fixtures: the table of cases in two precisions."""

from __future__ import annotations

import pytest
import torch

from cases import CASES, Case, make

torch.set_num_threads(1)  # two spinning threads on shared cores are slower than one


# Their curvature, by double backward passes row by row, takes seconds for each test.
LONG = ("attention", "lstm")
TABLE = [
    pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in sorted(CASES)
]


@pytest.fixture(params=TABLE)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


@pytest.fixture(params=TABLE)
def case32(request: pytest.FixtureRequest) -> Case:
    return make(request.param, torch.float32)
