"""Plans: sizes, proposals, and estimates that follow the sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upweight as uw
from cases import make
from matrices import off
from reference import Reference
from upweight.costs import Workload
from upweight.planning import propose
from upweight.recipes import METHODS


def rows(n: int, d: int = 4, c: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    return x, torch.randint(c, (n,), generator=generator)


def test_every_method_has_a_line() -> None:
    found = uw.plan(uw.MLP([4, 8, 3], seed=0), F.cross_entropy, rows(60), rows(20), damping=0.1)
    assert set(found.table["method"]) == {
        "direct",
        "cg",
        "cg+nystroem",
        "lissa",
        "arnoldi",
        "nystroem",
        "kfac",
        "ekfac",
    }
    numbers = found.table[["memory_mib", "products", "seconds"]]
    assert bool((numbers >= 0).all(axis=None))
    assert bool((found.table[["memory_mib", "seconds"]] > 0).all(axis=None))
    assert (found.work.n, found.work.m, found.work.p) == (60, 20, 67)
    assert found.proposal == uw.Direct()
    assert "proposed: Direct()" in str(found)
    assert "67" in str(found)
    assert "Direct" in found._repr_html_() or "direct" in found._repr_html_()


def test_the_users_own_recipe_comes_first() -> None:
    found = uw.plan(
        uw.MLP([4, 8, 3], seed=0),
        F.cross_entropy,
        rows(60),
        test=7,
        damping=0.1,
        method=uw.CG(uw.Nystroem(rank=9)),
    )
    assert found.table["method"][0] == "cg+nystroem"
    assert found.work.m == 7


@pytest.mark.parametrize("name", sorted(METHODS))
def test_costs_grow_with_the_work(name: str) -> None:
    def work(**changed: Any) -> Workload:
        sizes: dict[str, Any] = {
            "n": 1000,
            "p": 5000,
            "m": 100,
            "roots": 10,
            "layers": ((64, 64), (10, 64)),
            "dense": True,
            "gram": False,
            "condition": 100.0,
            "pilot_steps": 20,
        }
        return Workload(**(sizes | changed))

    recipe = METHODS[name]()
    usual = recipe.cost(work())
    more = recipe.cost(work(p=10_000, layers=((128, 64), (10, 128))))
    assert more.memory > usual.memory
    assert more.flops > usual.flops
    assert recipe.cost(work(m=200)).flops > usual.flops
    assert recipe.cost(work(m=200)).memory > usual.memory


def test_products_are_those_that_are_spent() -> None:
    """Where a plan can know them."""
    case = make("mlp")
    for recipe in (
        uw.Nystroem(rank=4, power=1),
        uw.Arnoldi(rank=5),
        uw.Arnoldi(start="test", rank=3),
    ):
        influence = uw.Influence(case.model, case.loss, recipe, damping=0.1, certify=0)
        planned = influence.plan(case.train, case.test).table
        influence.fit(case.train).scores(case.test)
        assert planned["products"][0] == influence.certificate.products


def test_steps_of_conjugate_gradients_come_from_a_pilot() -> None:
    case = make("mlp")
    influence = uw.Influence(case.model.float(), case.loss, "cg", damping=0.01)
    found = influence.plan(case.train, case.test)
    influence.fit(case.train).scores(case.test)
    steps = influence.certificate.steps
    assert steps is not None
    assert found.work.pilot_steps == pytest.approx(steps, abs=0.4 * steps + 2)


def test_a_plan_costs_no_products_of_the_fitted_curvature() -> None:
    case = make("mlp")
    influence = uw.Influence(case.model, case.loss, uw.Nystroem(rank=4), damping=0.1)
    influence.fit(case.train)
    spent = influence.certificate.products
    influence.plan()
    assert influence.certificate.products == spent


def test_an_indefinite_curvature_is_told_of() -> None:
    case = make("mlp")
    influence = uw.Influence(case.model, case.loss, damping=1e-3, curvature="hessian")
    assert "indefinite" in str(influence.plan(case.train))


def test_proposals() -> None:
    free = 16 * 2**30
    assert propose(547, 547, free)[0] == uw.Direct()
    # many parameters, few rows: the smaller side is small
    assert propose(50_000, 300, free)[0] == uw.Direct()
    sketched = uw.CG(preconditioner=uw.Nystroem(rank=50))
    assert propose(50_000, 50_000, free)[0] == sketched
    assert propose(9_000, 9_000, 2**28)[0] == sketched
    assert propose(9_000, 9_000, 2**20)[0] == uw.CG()  # the sketch would not fit
    assert propose(10**9, 10**9, free)[0] == uw.EKFAC()


def test_auto_takes_the_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("mlp")
    direct = uw.Influence(case.model, case.loss, "auto", damping=0.1).fit(case.train)
    assert direct.certificate.method == "direct"
    monkeypatch.setattr("upweight.planning.DIRECT_PARAMETERS", 10)
    iterated = uw.Influence(case.model, case.loss, "auto", damping=0.1).fit(case.train)
    assert iterated.certificate.method == "cg"
    assert "Nystroem" in iterated.certificate.facts["preconditioner"]
    difference = iterated.scores(case.test).values - direct.scores(case.test).values
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_an_output_too_wide_for_roots_has_no_smaller_side(
    curvature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make("mlp")  # 11 rows times 3 outputs are fewer than 43 parameters
    options: dict[str, Any] = {"damping": 0.1, "curvature": curvature}
    monkeypatch.setattr("upweight.planning.DIRECT_PARAMETERS", 40)
    narrow = uw.plan(case.model, case.loss, case.train, case.test, **options)
    assert narrow.proposal == uw.Direct()
    monkeypatch.setattr("upweight.curvature.form.ROOT_OUTPUTS", 2)
    wide = uw.plan(case.model, case.loss, case.train, case.test, **options)
    assert wide.proposal == uw.CG(preconditioner=uw.Nystroem(rank=43))
    memory = [plan.table.set_index("method").loc["direct", "memory_mib"] for plan in (narrow, wide)]
    assert memory[1] > memory[0]
    for method, chosen in (("auto", "cg"), ("direct", "direct")):
        influence = uw.Influence(case.model, case.loss, method, **options).fit(case.train)
        assert influence._fitted().operator.rank_bound == 43  # type: ignore[attr-defined]
        assert influence.certificate.method == chosen
        wanted = Reference(case).influence("ggn", 0.1)
        assert off(influence.scores(case.test).values, wanted) < 1e-6


def test_a_curvature_without_rows_has_no_plan() -> None:
    class Other(uw.LinearOperator):
        def _apply(self, columns: torch.Tensor) -> torch.Tensor:
            return columns

    influence = uw.Influence(
        nn.Linear(4, 3),
        F.cross_entropy,
        damping=0.1,
        curvature=lambda risk: Other(risk.p, risk.dtype, risk.device),
    )
    with pytest.raises(TypeError, match="curvature of a model and rows"):
        influence.plan(rows(10))
    with pytest.raises(RuntimeError, match="fit"):
        influence.plan()


def by_layers(**options: Any) -> uw.Influence:
    case = make("mlp")
    return uw.Influence(case.model, case.loss, uw.EKFAC(), damping=0.1, **options)


def test_a_method_by_layers_is_planned_step_by_step() -> None:
    case = make("mlp")
    found = by_layers(certify=0).plan(case.train, case.test)
    assert found.phases is not None
    assert list(found.phases["phase"]) == [
        "factors",
        "eigenvectors",
        "eigenvalues",
        "test rows",
        "training rows",
    ]
    assert bool((found.phases[["mib", "seconds"]] > 0).all(axis=None))
    assert found.table["memory_mib"][0] == pytest.approx(max(found.phases["mib"]))
    assert "kronecker 100.0 %" in str(found)
    assert "certificate" in list(by_layers().plan(case.train, case.test).phases["phase"])  # type: ignore[index]


@pytest.mark.slow
def test_memory_makes_groups_and_says_how_many_passes() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator)
    train = x, torch.randint(10, (300,), generator=generator)
    plans: list[uw.Plan] = []
    for memory in (None, "110MiB"):
        model = uw.MLP([64, 512, 512, 10], seed=0)
        own = uw.Influence(
            model, F.cross_entropy, uw.EKFAC(), damping=0.1, certify=0, memory=memory
        )
        plans.append(own.plan(train, 20_000))
    passes = [plan.phases["passes"].iloc[-1] for plan in plans if plan.phases is not None]
    assert passes[0] == 1 < passes[1]
    assert f"in {passes[1]:g} groups" in str(plans[1])


def test_memory_that_does_not_do_is_refused_before_the_work() -> None:
    case = make("mlp")
    with pytest.raises(ValueError, match=r"Kronecker factors of .* take .*parameters="):
        by_layers(memory="1MiB").fit(case.train)
    with pytest.raises(ValueError, match="one row takes about"):
        by_layers(memory=100).fit(case.train)
    for wrong in ("four", "4 XB", 0, -1, "0"):
        with pytest.raises(ValueError, match="expected memory as bytes"):
            by_layers(memory=wrong)


@pytest.mark.parametrize("method", ["direct", "cg", "ekfac"])
def test_memory_changes_nothing_but_round_off(method: str) -> None:
    case = make("mlp")
    found = [
        uw.Influence(case.model, case.loss, method, damping=0.1, memory=memory)
        .fit(case.train)
        .scores(case.test)
        .values
        for memory in (None, "49MiB")
    ]
    assert off(found[1], found[0]) < 1e-9
