"""Shared fixtures: the table of cases in two precisions."""

from __future__ import annotations

import pytest
import torch

from cases import CASES, Case, make

torch.set_num_threads(1)  # two spinning threads on shared cores are slower than one


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


@pytest.fixture(params=sorted(CASES))
def case32(request: pytest.FixtureRequest) -> Case:
    return make(request.param, torch.float32)
