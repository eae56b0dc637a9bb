"""Published and measured facts that a correct library must reproduce.

The wine walk-through on fixed weights (``data/wine_reference.npz``): a 13-16-16-3 tanh network
trained on 106 bottles of which the first ten carry a flipped label; 54 test bottles; damping 0.1.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

import upweight as uw
from cases import Case
from reference import Reference
from upweight.comparison import agreement
from upweight.report.demo import WineResult, WineSettings, run_wine

CORRUPTED = 10


def wine(dtype: torch.dtype) -> Case:
    data = np.load(Path(__file__).parent / "data" / "wine_reference.npz")
    model = uw.MLP([13, 16, 16, 3], nn.Tanh)
    state = {k.removeprefix("state/"): torch.from_numpy(data[k]) for k in data if "state/" in k}
    model.load_state_dict(state)
    rows = {
        part: (torch.from_numpy(data[f"x_{part}"]), torch.from_numpy(data[f"y_{part}"]))
        for part in ("train", "test")
    }
    return Case(
        model.to(dtype), F.cross_entropy, rows["train"], rows["test"], features=lambda b: b[0]
    )


def fitted(case: Case, curvature: str = "hessian", **options: object) -> uw.Influence:
    influence = uw.Influence(case.model, case.loss, curvature=curvature, damping=0.1, **options)
    return influence.fit(case.train)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(wine(torch.float64))


@pytest.fixture(scope="module")
def wanted(reference: Reference) -> torch.Tensor:
    return reference.influence("hessian", 0.1)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def test_mean_influence_of_corrupted_and_other_rows() -> None:
    mean = fitted(wine(torch.float32)).mean_scores(wine(torch.float32).test).values
    assert float(mean[:CORRUPTED].mean()) == pytest.approx(-1.0479, abs=5e-5)
    assert float(mean[CORRUPTED:].mean()) == pytest.approx(0.1048, abs=5e-5)


def test_the_hessian_is_indefinite_with_this_spectrum() -> None:
    case = wine(torch.float64)
    values = torch.linalg.eigvalsh(uw.Hessian(uw.EmpiricalRisk(*_parts(case))).dense())
    assert float(values[0]) == pytest.approx(-0.033, abs=5e-4)
    assert float(values[-1]) == pytest.approx(5.61, abs=5e-3)


def _parts(case: Case) -> tuple[nn.Module, object, object]:
    return case.model, case.loss, case.train


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=["32", "64"]
)
@pytest.mark.parametrize("batch_size", [1, 7, 32, 53, 105, 106, None])
@pytest.mark.slow
def test_scores_equal_the_dense_reference_for_every_batch_size(
    dtype: torch.dtype, tolerance: float, batch_size: int | None, wanted: torch.Tensor
) -> None:
    case = wine(dtype)
    scores = fitted(case, batch_size=batch_size).scores(case.test)
    assert relative(scores.values, wanted) < tolerance


@pytest.mark.slow
def test_scores_equal_the_dense_reference_for_all_batch_sizes(wanted: torch.Tensor) -> None:
    case = wine(torch.float32)
    for batch_size in range(1, case.n + 1):
        scores = fitted(case, batch_size=batch_size).scores(case.test)
        assert relative(scores.values, wanted) < 1e-6


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.slow
def test_perturbation_equals_the_dense_reference(reference: Reference, curvature: str) -> None:
    dense = reference.perturbation(curvature, 0.1)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-10)):
        case = wine(dtype)
        for batch_size in (32, None):
            scores = fitted(case, curvature, batch_size=batch_size).scores(
                case.test, mode="perturbation"
            )
            assert relative(scores.values, dense) < tolerance


def test_ggn_in_place_of_the_hessian() -> None:
    """10.1 % off in the mean influence, with r = 0.9994."""
    case = wine(torch.float64)
    hessian = fitted(case).mean_scores(case.test).values
    ggn = fitted(case, "ggn").mean_scores(case.test).values
    error = float(((ggn - hessian).abs() / hessian.abs()).mean())
    assert error == pytest.approx(0.101, abs=1e-3)
    correlation = float(torch.corrcoef(torch.stack([hessian, ggn]))[0, 1])
    assert correlation == pytest.approx(0.9994, abs=1e-4)


def test_averaging_batch_means_would_be_wrong() -> None:
    """Batches of 32, 32, 32, 10 rows weigh as many rows as they have."""
    case = wine(torch.float64)
    risk = uw.EmpiricalRisk(*_parts(case), batch_size=32)
    whole = uw.Hessian(risk).dense()
    parts = [
        uw.Hessian(
            uw.EmpiricalRisk(case.model, case.loss, tuple(t[a : a + 32] for t in case.train))
        )
        for a in range(0, 106, 32)
    ]
    unweighted = torch.stack([part.dense() for part in parts]).mean(0)
    assert relative(unweighted, whole) > 0.05
    assert relative(whole, uw.Hessian(uw.EmpiricalRisk(*_parts(case))).dense()) < 1e-12


# --- six methods on these weights, against the exact Hessian in float64 ---------------------------

METHODS = {
    "cg+nystroem": uw.CG(preconditioner=uw.Nystroem(rank=5)),
    "lissa": uw.LiSSA(),
    "arnoldi": uw.Arnoldi(rank=30),
    "arnoldi-test": uw.Arnoldi(rank=30, start="test"),
    "nystroem": uw.Nystroem(rank=30),
    "ekfac": uw.EKFAC(),
    "cg+ekfac": uw.CG(preconditioner=uw.EKFAC()),
}
# percent: mean over training rows of |Δ mean influence| / |mean influence|
ERRORS = {
    "cg+nystroem": 0.01,
    "lissa": 1.0,
    "arnoldi": 9.0,
    "arnoldi-test": 0.1,
    "nystroem": 12.5,
    "ekfac": 340.0,
    "cg+ekfac": 0.01,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["32", "64"])
@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.slow
def test_methods_reach_their_bounds(name: str, dtype: torch.dtype, wanted: torch.Tensor) -> None:
    case = wine(dtype)
    influence = fitted(case, method=METHODS[name])
    found = agreement(wanted.mean(0), influence.scores(case.test).mean().values)
    assert found["error_percent"] <= ERRORS[name]
    if name == "ekfac":
        assert found["pearson"] >= 0.978
        assert found["spearman"] >= 0.915
        # what a prototype measured on these weights
        assert found["error_percent"] == pytest.approx(332, abs=5)


@pytest.mark.slow
def test_block_diagonality_alone_costs_194_percent(wanted: torch.Tensor) -> None:
    case = wine(torch.float64)
    influence = fitted(case, "hessian", blocks="layer")
    found = agreement(wanted.mean(0), influence.scores(case.test).mean().values)
    assert found["error_percent"] == pytest.approx(194, abs=3)


@pytest.mark.parametrize("name", ["nystroem", "arnoldi"])
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.slow
def test_random_methods_reach_their_bounds_with_other_seeds(
    name: str, seed: int, wanted: torch.Tensor
) -> None:
    case = wine(torch.float32)
    influence = fitted(case, method=replace(METHODS[name], seed=seed))
    mean = influence.scores(case.test).mean().values
    assert agreement(wanted.mean(0), mean)["error_percent"] <= ERRORS[name]


@pytest.mark.parametrize(("steps", "percent"), [(5, 6.0), (8, 0.2), (12, 0.004)])
@pytest.mark.slow
def test_steps_of_conjugate_gradients(steps: int, percent: float, wanted: torch.Tensor) -> None:
    """Measured by a prototype, without a preconditioner."""
    case = wine(torch.float64)
    influence = fitted(case, method=uw.CG(rtol=1e-12, max_steps=steps))
    with pytest.warns(uw.ResidualWarning):
        mean = influence.scores(case.test).mean().values
    error = agreement(wanted.mean(0), mean)["error_percent"]
    assert error == pytest.approx(percent, rel=0.5)


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.slow
def test_methods_do_not_depend_on_batch_size_or_order(name: str) -> None:
    case = wine(torch.float64)
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(0))
    train, results = case.train, []
    for batch_size, rows in ((None, torch.arange(case.n)), (32, torch.arange(case.n)), (17, order)):
        case.train = tuple(t[rows] for t in train)
        scores = fitted(case, method=METHODS[name], batch_size=batch_size).scores(case.test).values
        results.append(scores[:, rows.argsort()])
    assert relative(results[1], results[0]) < 1e-6
    assert relative(results[2], results[0]) < 1e-6


@pytest.fixture(scope="module")
def walks() -> list[WineResult]:
    return [run_wine(WineSettings(seed=seed, check=False), progress=False) for seed in range(5)]


# Pearson of the mean influence, and ‖Δ‖₂ / ‖reference‖₂.
SEEDS = {
    "cg+nystroem": (0.99999, 1e-4),
    "lissa": (0.9999, None),
    "arnoldi": (0.998, None),
    "arnoldi(start='test')": (0.99999, None),
    "nystroem": (0.999, None),
    "ekfac": (0.97, None),
    "cg+ekfac": (0.99999, 1e-4),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.slow
def test_methods_over_training_seeds(seed: int) -> None:
    """The same rows, another network."""
    case = wine(torch.float32)
    case.model = uw.MLP([13, 16, 16, 3], nn.Tanh, seed=seed)
    uw.train(
        case.model,
        case.loss,
        case.train,
        epochs=300,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.005, weight_decay=0.01),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 300),
        seed=seed,
        progress=False,
    )
    found = uw.compare(
        case.model,
        case.loss,
        case.train,
        case.test,
        damping=0.1,
        curvature="hessian",
        progress=False,
    )
    table = found.table.set_index("method")
    for name, (pearson, norm) in SEEDS.items():
        assert table.loc[name, "pearson"] >= pearson, name
        assert norm is None or table.loc[name, "relative_norm"] <= norm, name


@pytest.mark.parametrize("name", list(SEEDS))
@pytest.mark.slow
def test_methods_over_splits(name: str, walks: list[WineResult]) -> None:
    """Other rows and other flipped labels with every seed."""
    pearson, norm = SEEDS[name]
    for walk in walks:
        assert walk.comparison is not None
        line = walk.comparison.table.set_index("method").loc[name]
        if name == "ekfac":  # what no matrix of blocks can pass, less what factors cost
            pearson = _of_exact_blocks(walk) - 0.02
        assert line["pearson"] >= pearson
        if norm is not None:
            assert line["relative_norm"] <= norm


def _of_exact_blocks(walk: WineResult) -> float:
    """Pearson r of the exact Gauss-Newton matrix without what is between layers."""
    x, _ = walk.data.train
    y = torch.tensor([walk.data.class_names.index(name) for name in walk.rows["given"]])
    blocks = uw.Influence(walk.model, F.cross_entropy, damping=0.1, blocks="layer").fit((x, y))
    assert walk.comparison is not None
    exact = torch.tensor(walk.comparison.mean["direct"].to_numpy())
    return agreement(exact, blocks.scores(walk.data.test).mean().values)["pearson"]


@pytest.mark.slow
def test_flipped_labels_stand_out_over_five_seeds(walks: list[WineResult]) -> None:
    for walk in walks:
        assert walk.corrupted_mean < -0.3
        assert walk.other_mean > 0.03
        assert walk.f1 > 0.85
    # The flipped rows are known from elsewhere, and low scores must mean harm: a flipped sign gives
    # an AUC near 0.03.
    areas = [roc_auc_score(w.rows["flipped"], -w.rows["mean_influence"]) for w in walks]
    assert np.mean(areas) >= 0.95
