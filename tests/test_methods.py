"""Every method through `Influence`: over the table of cases, all batch sizes, blocks, refining."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upweight as uw
from cases import Case, make
from matrices import off
from reference import KroneckerReference, Reference

DAMPING = 0.05


def fit(case: Case, method: Any, curvature: str = "ggn", **options: Any) -> uw.Influence:
    damping = options.pop("damping", DAMPING)
    influence = uw.Influence(
        case.model,
        case.loss,
        method,
        curvature=curvature,
        damping=damping,
        **case.options,
        **options,
    )
    return influence.fit(case.train)


def size(case: Case) -> int:
    return sum(p.numel() for p in case.model.parameters() if p.requires_grad)


EXACT = {
    "direct": lambda p: uw.Direct(),
    "cg": lambda p: uw.CG(rtol=1e-9),
    "cg+nystroem": lambda p: uw.CG(uw.Nystroem(rank=min(5, p)), rtol=1e-9),
    "cg+ekfac": lambda p: uw.CG(uw.EKFAC(), rtol=1e-9),
    "cg+jacobi": lambda p: uw.CG(uw.Jacobi(probes=None), rtol=1e-9),
    "cg+direct": lambda p: uw.CG("direct", rtol=1e-9),
    "lissa": lambda p: uw.LiSSA(rtol=1e-9, max_steps=20_000),
    "arnoldi": lambda p: uw.Arnoldi(rank=p, steps=p),
    "nystroem": lambda p: uw.Nystroem(rank=p),
    "auto": lambda p: "auto",
}


# The others take paths that these share, and run with the slow tests.
FAST = {"cg", "cg+ekfac", "arnoldi", "nystroem"}


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in sorted(EXACT)],
)
def test_exact_methods_equal_the_dense_reference(case: Case, name: str) -> None:
    influence = fit(case, EXACT[name](size(case)))
    scores = influence.scores(case.test).values
    assert off(scores, Reference(case).influence("ggn", DAMPING)) < 1e-6
    mean = influence.mean_scores(case.test).values
    assert off(mean, scores.mean(0)) < 1e-6


@pytest.mark.parametrize("name", ["cg", "lissa", "arnoldi", "nystroem"])
def test_exact_methods_in_float32(case32: Case, name: str) -> None:
    recipe = {
        "cg": uw.CG(),
        "lissa": uw.LiSSA(rtol=1e-5, max_steps=20_000),
    }.get(name) or EXACT[name](size(case32))
    with warnings.catch_warnings():
        # some cases leave float32 a little above the tolerance, and say so
        warnings.simplefilter("ignore", uw.ResidualWarning)
        scores = fit(case32, recipe).scores(case32.test).values
    assert scores.dtype == torch.float32
    assert off(scores, Reference(case32).influence("ggn", DAMPING)) < 2e-3


APPROXIMATE = {
    "arnoldi": uw.Arnoldi(rank=4),
    "arnoldi-test": uw.Arnoldi(rank=4, start="test"),
    "nystroem": uw.Nystroem(rank=4),
    "ekfac": uw.EKFAC(),
    "ekfac-sampled": uw.EKFAC(fisher="sampled", samples=3, seed=1),
    "ekfac-relative": uw.EKFAC(relative="layer"),
    "kfac": uw.KFAC(),
    "jacobi": uw.Jacobi(),
    "lissa-batches": uw.LiSSA(batch_size=4, rtol=1e-6, max_steps=50_000),
}


def few(names):
    """One that takes many steps, in its turn with the slow tests."""
    many = "lissa-batches"
    return [pytest.param(n, marks=pytest.mark.slow) if n == many else n for n in sorted(names)]


@pytest.mark.parametrize("name", few(APPROXIMATE))
@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_the_batch_size_does_not_matter(name: str, curvature: str) -> None:
    case = make("mlp")
    wanted = fit(case, APPROXIMATE[name], curvature).scores(case.test).values
    for batch_size in (1, 3, 10):
        again = fit(case, APPROXIMATE[name], curvature, batch_size=batch_size)
        assert off(again.scores(case.test).values, wanted) < 1e-8


@pytest.mark.parametrize("name", few(set(APPROXIMATE) - {"ekfac-sampled"}))
def test_the_order_of_rows_does_not_matter(name: str) -> None:
    case = make("mlp")
    wanted = fit(case, APPROXIMATE[name]).scores(case.test).values
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(0))
    case.train = tuple(t[order] for t in case.train)
    assert off(fit(case, APPROXIMATE[name]).scores(case.test).values, wanted[:, order]) < 1e-5


@pytest.mark.parametrize("name", sorted(set(APPROXIMATE) - {"lissa-batches", "ekfac-relative"}))
def test_the_certificate_is_the_dense_residual(name: str) -> None:
    """Of the exact curvature that was asked for, whatever the method takes in its place."""
    case = make("mlp")
    reference = Reference(case)
    dense = reference.curvature("hessian")
    dense = dense + 0.6 * torch.eye(len(dense)).double()
    right = reference.gradients(reference.test, case.m).T
    influence = fit(case, APPROXIMATE[name], "hessian", damping=0.6, certify=None)
    influence.scores(case.test)
    certificate = influence.certificate
    solved = influence.inverse @ right
    residuals = (dense @ solved - right).norm(dim=0) / right.norm(dim=0)
    assert certificate.columns >= certificate.measured >= case.m
    assert certificate.residual_max == pytest.approx(float(residuals.max()), rel=1e-6)
    own = influence.measure(case.test)
    assert own.residual_mean == pytest.approx(float(residuals.mean()), rel=1e-6)
    assert own.columns == own.measured == case.m


def test_a_relative_damping_is_measured_against_itself() -> None:
    """λ times the mean eigenvalue of each layer, in the residual too."""
    case = make("mlp")
    risk = uw.EmpiricalRisk(case.model, case.loss, case.train)
    means = [float(b.operator.values.mean()) for b in uw.KroneckerCurvature(risk).blocks]
    shift = torch.tensor([0.3 * means[0]] * 25 + [0.3 * means[1]] * 18, dtype=torch.float64)
    reference = Reference(case)
    right = reference.gradients(reference.test, case.m).T
    influence = fit(case, uw.EKFAC(relative="layer"), damping=0.3, certify=None)
    influence.scores(case.test)
    solved = influence.inverse @ right
    rest = (reference.curvature("ggn") + torch.diag(shift)) @ solved - right
    residuals = rest.norm(dim=0) / right.norm(dim=0)
    assert influence.certificate.residual_max == pytest.approx(float(residuals.max()), rel=1e-6)
    assert "damping of layers" in str(influence.certificate)


def test_residuals_are_measured_as_often_as_asked() -> None:
    case = make("mlp")
    for certify, measured in ((0, 0), (2, 2), (8, case.m), (None, case.m)):
        influence = fit(case, "ekfac", certify=certify)
        influence.scores(case.test)
        assert influence.certificate.measured == measured
        assert influence.certificate.columns == case.m
        assert ("not measured" in str(influence.certificate)) == (measured == 0)


@pytest.mark.parametrize("name", sorted(set(APPROXIMATE) - {"ekfac-relative", "lissa-batches"}))
def test_refining_makes_it_exact(name: str) -> None:
    case = make("mlp")
    rough = fit(case, APPROXIMATE[name])
    before = rough.scores(case.test).values
    exact = rough.refine(rtol=1e-10)
    wanted = Reference(case).influence("ggn", DAMPING)
    assert off(exact.scores(case.test).values, wanted) < 1e-7
    assert exact.certificate.residual_max < 1e-9
    assert off(rough.scores(case.test).values, before) < 1e-12  # untouched
    assert off(before, wanted) > 1e-3


def test_refining_computes_nothing_again() -> None:
    case = make("mlp")
    rough = fit(case, uw.Nystroem(rank=6, power=0))
    spent = rough.certificate.products
    exact = rough.refine()
    assert exact.certificate.products in (0, spent)
    exact.scores(case.test)
    steps = exact.certificate.steps
    assert steps is not None
    assert exact.certificate.products <= spent + (steps + 3) * case.m


@pytest.mark.parametrize("recipe", [uw.EKFAC(relative="layer"), uw.KFAC(relative="global")])
@pytest.mark.parametrize("blocks", ["full", "layer"])
def test_refining_needs_one_damping(recipe: Any, blocks: Any) -> None:
    with pytest.raises(TypeError, match=r"one λ; .*relative=None"):
        fit(make("mlp"), recipe, blocks=blocks).refine()


@pytest.mark.parametrize("blocks", ["full", "layer"])
@pytest.mark.parametrize("asked", ["measure", "refine"])
def test_other_rows_leave_no_trace(blocks: Any, asked: str) -> None:
    """Of a method that begins with the test rows, on what it says of its own."""
    case = make("mlp")
    other = tuple(t[:2] for t in case.test)

    def ask(influence: uw.Influence) -> None:
        if asked == "measure":
            assert influence.measure(other).columns == 2
        else:
            influence.refine().scores(other)

    def answers(asking: bool) -> list[Tensor]:
        influence = fit(case, uw.Arnoldi(rank=4, start="test"), blocks=blocks)
        found: list[Tensor] = []
        if asking:
            ask(influence)
        found.append(influence.self_influence().values)
        found.append(influence.scores(case.test).values)
        if asking:
            ask(influence)
        found.append(influence.self_influence().values)
        influence.damping = 2 * DAMPING
        found.append(influence.self_influence().values)
        return [*found, influence.scores(case.test).values]

    for got, wanted in zip(answers(True), answers(False), strict=True):
        assert off(got, wanted) < 1e-12


# --- blocks --------------------------------------------------------------------------------------


def block_diagonal(matrix: Tensor, blocks: list[list[int]]) -> Tensor:
    out = torch.zeros_like(matrix)
    for block in blocks:
        at = torch.tensor(block)
        out[at[:, None], at] = matrix[at[:, None], at]
    return out


BLOCKS: dict[str, tuple[Any, list[list[int]]]] = {
    # mlp(): 0.weight 20, 0.bias 5, 2.weight 15, 2.bias 3
    "layer": ("layer", [list(range(25)), list(range(25, 43))]),
    "parameter": (
        "parameter",
        [list(range(20)), list(range(20, 25)), list(range(25, 40)), list(range(40, 43))],
    ),
    "groups": (
        {"weights": "*.weight", "biases": ["0.bias", "2.bias"]},
        [[*range(20), *range(25, 40)], [*range(20, 25), *range(40, 43)]],
    ),
}


@pytest.mark.parametrize("name", sorted(BLOCKS))
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("method", ["direct", "cg", "nystroem", "arnoldi"])
def test_blocks_are_those_of_the_dense_curvature(name: str, curvature: str, method: str) -> None:
    case = make("mlp")
    choice, entries = BLOCKS[name]
    reference = Reference(case)
    dense = block_diagonal(reference.curvature(curvature), entries)
    dense = dense + 0.6 * torch.eye(len(dense)).double()
    right = reference.gradients(reference.test, case.m).T
    wanted = right.T @ torch.linalg.inv(dense) @ reference.gradients(reference.train, case.n).T
    recipe = {
        "cg": uw.CG(rtol=1e-10),
        "nystroem": uw.Nystroem(rank=3),
        "arnoldi": uw.Arnoldi(rank=3, start="test"),
    }.get(method, method)
    influence = fit(case, recipe, curvature, damping=0.6, blocks=choice, certify=None)
    scores = influence.scores(case.test)
    if method in ("direct", "cg"):
        assert off(scores.values, wanted) < 1e-7
    # the residual is against all of C, so that it says what the blocks leave out
    full = reference.curvature(curvature) + 0.6 * torch.eye(len(dense)).double()
    solved = influence.inverse @ right
    residuals = (full @ solved - right).norm(dim=0) / right.norm(dim=0)
    assert influence.certificate.residual_max == pytest.approx(float(residuals.max()), rel=1e-6)
    assert "blocks" in str(influence.certificate)


def test_a_damping_for_every_block() -> None:
    case = make("mlp")
    choice, entries = BLOCKS["layer"]
    reference = Reference(case)
    shift = torch.tensor([0.3] * 25 + [0.7] * 18, dtype=torch.float64)
    dense = block_diagonal(reference.curvature("ggn"), entries) + torch.diag(shift)
    test = reference.gradients(reference.test, case.m)
    wanted = test @ torch.linalg.inv(dense) @ reference.gradients(reference.train, case.n).T
    influence = fit(case, "direct", blocks=choice, damping={"2": 0.7, "0": 0.3})
    assert off(influence.scores(case.test).values, wanted) < 1e-9
    influence.damping = {"0": 0.3, "2": 0.6}
    assert off(influence.scores(case.test).values, wanted) > 1e-3
    assert "0: 0.3, 2: 0.6" in str(influence.certificate)
    assert "damping by block" in str(influence.scores(case.test))


@pytest.mark.parametrize("damping", [0.3, {"0": 0.3, "2": 0.7}])
def test_blocks_with_a_damping_relative_to_each(damping: Any) -> None:
    case = make("mlp")
    choice, entries = BLOCKS["layer"]
    kronecker, reference = KroneckerReference(case).dense(True), Reference(case)
    shift = torch.zeros(43).double()
    own_of = damping.values() if isinstance(damping, dict) else (damping, damping)
    for at, own in zip(entries, own_of, strict=True):
        shift[at] = own * kronecker.diagonal()[at].mean()
    inverse = torch.linalg.inv(kronecker + torch.diag(shift))
    right = reference.gradients(reference.test, case.m).T
    wanted = right.T @ inverse @ reference.gradients(reference.train, case.n).T
    influence = fit(case, uw.EKFAC(relative="layer"), blocks=choice, damping=damping, certify=None)
    assert off(influence.scores(case.test).values, wanted) < 1e-8
    rest = (reference.curvature("ggn") + torch.diag(shift)) @ inverse @ right - right
    residuals = rest.norm(dim=0) / right.norm(dim=0)
    assert influence.certificate.residual_max == pytest.approx(float(residuals.max()), rel=1e-6)


RANKS = {
    "nystroem": "nystroem",
    "nystroem of rank 40": uw.Nystroem(rank=40),
    "arnoldi": "arnoldi",
    "arnoldi of rank 40": uw.Arnoldi(rank=40),
    "arnoldi at the test rows": uw.Arnoldi(rank=40, start="test"),
    "cg": uw.CG("nystroem", rtol=1e-10),
    "cg of rank 40": uw.CG(uw.Nystroem(rank=40), rtol=1e-10),
}


@pytest.mark.parametrize("name", sorted(RANKS))
@pytest.mark.parametrize("choice", ["layer", "parameter"])
def test_a_rank_is_at_most_the_size_of_its_block(name: str, choice: Any) -> None:
    """Blocks of 25 parameters and less: all of their directions, so the method is exact."""
    case = make("mlp")
    wanted = fit(case, "direct", blocks=choice).scores(case.test).values
    found = fit(case, RANKS[name], blocks=choice).scores(case.test).values
    assert off(found, wanted) < 1e-6


@pytest.mark.parametrize("method", ["nystroem", "arnoldi", uw.Arnoldi(start="test")])
def test_the_default_rank_is_at_most_the_number_of_parameters(method: Any) -> None:
    case = make("linear_no_bias")  # 6 parameters
    wanted = Reference(case).influence("ggn", DAMPING)
    assert off(fit(case, method).scores(case.test).values, wanted) < 1e-6


@pytest.mark.parametrize(
    "damping", [{"0": 0.3}, {"0": 0.3, "2": 0.7, "4": 1.0}, {"0": 1, "two": 1}]
)
def test_dampings_that_do_not_fit_the_blocks(damping: dict[str, float]) -> None:
    """Neither a missing nor an unknown block is silently taken as undamped."""
    case = make("mlp")
    with pytest.raises(ValueError, match=r"one damping for each of the blocks \['0', '2'\]"):
        fit(case, "direct", blocks="layer", damping=damping)
    influence = fit(case, "direct", blocks="layer")
    with pytest.raises(ValueError, match="one damping for each"):
        influence.damping = damping
    assert influence.damping == DAMPING


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        ({"head": "2.*"}, "in none: 0.weight, 0.bias"),
        ({"a": "*", "b": "2.*"}, "2.weight is in 'a' and 'b'"),
        ({"a": "0.*", "b": "2.*", "c": "4.*"}, "no parameter matches '4.*'"),
    ],
)
def test_groups_that_do_not_fit_the_model(blocks: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told.replace(".", r"\.").replace("*", r"\*")):
        fit(make("mlp"), "direct", blocks=blocks)


def test_damping_by_block_needs_blocks() -> None:
    case = make("mlp")
    with pytest.raises(TypeError, match="blocks='layer'"):
        fit(case, "direct", damping={"0": 0.1})
    with pytest.raises(TypeError, match="one λ"):
        fit(case, "direct", blocks="layer", damping={"0": 0.1, "2": 0.2}).refine()


@pytest.mark.parametrize("by", ["layer", "parameter"])
@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_scores_by_block_sum_to_the_whole(case: Case, by: Any, mode: Any) -> None:
    if mode == "perturbation" and (case.features is None or not case.default_adapters):
        pytest.skip("no features to differentiate by")
    influence = fit(case, "direct")
    whole = influence.scores(case.test, mode=mode).values
    parts = influence.scores(case.test, mode=mode, by=by)
    assert off(sum(part.values for part in parts.values()), whole) < 1e-9  # type: ignore[arg-type]
    names = [n for n, p in case.model.named_parameters() if p.requires_grad]
    if by == "parameter":
        assert list(parts) == names
    assert all(part.provenance["block"] == name for name, part in parts.items())


@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_scores_by_block_in_pieces(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some test rows at once, some training rows at once."""
    case = make("mlp")
    influence = fit(case, "direct", batch_size=4)
    whole = influence.scores(case.test, mode=mode).values
    wanted = {k: v.values for k, v in influence.scores(case.test, mode=mode, by="layer").items()}
    monkeypatch.setattr("upweight.influence.SOLVED_BYTES", 2 * 3 * 8 * size(case))
    parts = influence.scores(case.test, mode=mode, by="layer")
    assert off(parts["0"].values + parts["2"].values, whole) < 1e-12
    assert list(parts) == ["0", "2"]
    assert all(off(parts[name].values, wanted[name]) < 1e-12 for name in parts)


def test_scores_by_block_are_those_of_the_block_alone() -> None:
    case = make("mlp")
    parts = fit(case, "direct", blocks="layer").scores(case.test, by="layer")
    head = fit(case, "direct", parameters="2.*").scores(case.test)
    assert off(parts["2"].values, head.values) < 1e-9
    with pytest.raises(ValueError, match="leave out to="):
        fit(case, "direct").scores(case.test, by="layer", to="nowhere")  # type: ignore[call-overload]


# --- one method at a time ------------------------------------------------------------------------


def many_rows() -> Case:
    """More rows times outputs than parameters, so that the spectrum has no end of zeros."""
    case = make("mlp")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    case.train = (x, torch.randint(3, (60,), generator=generator))
    return case


def test_a_start_at_the_test_gradient_makes_the_mean_exact() -> None:
    case = many_rows()
    exact = Reference(case).influence("ggn", DAMPING)
    informed = fit(case, uw.Arnoldi(rank=12, start="test"))
    random = fit(case, uw.Arnoldi(rank=12, steps=12))
    close = off(informed.scores(case.test).mean().values, exact.mean(0))
    assert close < 1e-4
    assert off(random.scores(case.test).mean().values, exact.mean(0)) > 30 * close
    # other test rows, another start
    other = tuple(t[:2] for t in case.test)
    assert off(informed.scores(other).mean().values, exact[:2].mean(0)) < 1e-4
    assert bool((informed.self_influence().values > 0).all())


def test_an_informed_start_costs_its_steps_once() -> None:
    case = make("mlp")
    influence = fit(case, uw.Arnoldi(rank=6, start="test"), certify=0)
    influence.scores(case.test)
    influence.mean_scores(case.test)
    assert influence.certificate.products == 6


def test_a_new_damping_reuses_what_was_computed() -> None:
    case = make("mlp")
    for recipe in (uw.Nystroem(rank=4), uw.Arnoldi(rank=4), uw.EKFAC(), uw.CG(uw.EKFAC())):
        influence = fit(case, recipe, certify=0)
        spent = influence.certificate.products
        influence.damping = 0.2
        assert influence.certificate.products == spent
        fresh = fit(case, recipe, damping=0.2, certify=0)
        assert off(influence.scores(case.test).values, fresh.scores(case.test).values) < 1e-10


def test_products_are_counted_within_other_operators() -> None:
    case, made = make("mlp"), list[uw.GGN]()

    def half(risk: uw.EmpiricalRisk) -> uw.LinearOperator:
        made.append(uw.GGN(risk))
        return 0.5 * made[0]

    influence = fit(case, uw.CG(), half)  # type: ignore[arg-type]
    influence.scores(case.test)
    assert influence.certificate.products == made[0].products > case.m


def test_negative_curvature_ends_in_an_error() -> None:
    case = make("mlp")
    lowest = float(torch.linalg.eigvalsh(Reference(case).curvature("hessian"))[0])
    assert lowest < -0.01
    influence = fit(case, "cg", "hessian", damping=-lowest / 2)
    with pytest.raises(uw.NegativeCurvatureError, match="curvature='ggn'"):
        influence.scores(case.test)
    with pytest.raises(uw.DivergenceError, match="curvature='ggn'"):
        fit(case, "lissa", "hessian", damping=-lowest / 2)
    with pytest.warns(uw.IndefiniteCurvatureWarning):
        fit(case, uw.Arnoldi(rank=43), "hessian", damping=-lowest / 2)
    # the advice works
    assert fit(case, "cg", "ggn", damping=-lowest / 2).scores(case.test).shape == (5, 11)


def test_minibatches_of_sampled_labels_are_parts_of_the_whole() -> None:
    """Rows keep their labels when they are taken by themselves."""
    case = make("mlp")
    risk = uw.EmpiricalRisk(case.model, case.loss, case.train)
    whole = uw.Fisher(risk, "sampled", samples=2, seed=3)
    batches = [[4, 0, 9], [1, 2, 3, 10], [5, 6, 7, 8]]
    parts = sum(len(b) / 11 * whole.on_rows(b).dense() for b in batches)
    assert off(parts, whole.dense()) < 1e-12  # type: ignore[arg-type]
    again = whole.on_rows(list(range(10, -1, -1))).on_rows([2, 3])  # rows 8 and 7
    assert off(again.dense(), whole.on_rows([8, 7]).dense()) < 1e-12
    block = whole.on_parameters(["2.weight", "2.bias"]).dense()
    assert off(block, whole.dense()[25:, 25:]) < 1e-12


class Other(uw.LinearOperator):
    """A curvature that knows of no rows."""

    def __init__(self, risk: uw.EmpiricalRisk) -> None:
        super().__init__(risk.p, risk.dtype, risk.device)

    def _apply(self, columns: Tensor) -> Tensor:
        return 2.0 * columns


def test_a_curvature_of_the_users_own() -> None:
    case = make("mlp")
    wanted = fit(case, "direct", Other).scores(case.test).values  # type: ignore[arg-type]
    for recipe in (uw.CG(rtol=1e-10), uw.LiSSA(rtol=1e-10), uw.Nystroem(rank=43)):
        assert off(fit(case, recipe, Other).scores(case.test).values, wanted) < 1e-6  # type: ignore[arg-type]
    for recipe, told in (
        (uw.EKFAC(), "ekfac needs a curvature of a model"),
        (uw.LiSSA(batch_size=3), "batch_size=None"),
    ):
        with pytest.raises(TypeError, match=told):
            fit(case, recipe, Other)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cut into them"):
        fit(case, "direct", Other, blocks="layer")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (uw.Arnoldi(rank=44), "rank from 1 to p = 43; got 44"),
        (uw.Nystroem(rank=44), "rank from 1 to p = 43; got 44"),
        (uw.Arnoldi(start="middle"), "'random' or 'test'"),  # type: ignore[arg-type]
        (uw.LiSSA(batch_size=0), "batch_size of at least 1"),
        (uw.EKFAC(relative="rows"), "relative"),  # type: ignore[arg-type]
        (uw.EKFAC(fisher="true"), "fisher='exact'"),  # type: ignore[arg-type]
        (uw.CG("dirct"), "preconditioner to be one of"),
    ],
)
def test_recipes_with_bad_options(method: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        fit(make("mlp"), method)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"certify": -1}, "certify"),
        ({"certify": True}, "certify"),
        ({"blocks": "row"}, "'full', 'layer', 'parameter'"),
        ({"damping": -0.1}, "damping λ ≥ 0"),
    ],
)
def test_bad_options_of_influence(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        uw.Influence(nn.Linear(2, 2), F.cross_entropy, **{"damping": 0.1, **options})


def test_a_layer_without_factors_is_named_and_can_be_refused() -> None:
    case = make("layer_norm")
    influence = fit(case, "ekfac")
    influence.scores(case.test)
    told = str(influence.certificate)
    assert "LayerNorm" in told
    assert influence.certificate.coverage == pytest.approx(43 / 53)
    with pytest.raises(ValueError, match=r"1 \(LayerNorm\).*other='auto'"):
        fit(case, uw.EKFAC(other="refuse"))


def test_provenance_tells_the_recipe() -> None:
    case = make("mlp")
    scores = fit(case, uw.CG(uw.Nystroem(rank=3))).scores(case.test)
    assert scores.provenance["method"] == "cg+nystroem"
    assert "rank=3" in scores.provenance["recipe"]
    assert scores.provenance["blocks"] == "full"
    assert scores.provenance["certificate"]["converged"] is True


def test_warnings_point_to_the_users_line() -> None:
    case = make("mlp")
    with pytest.warns(uw.IndefiniteCurvatureWarning) as caught:
        influence = fit(case, "direct", "hessian")
    assert {w.filename for w in caught} == {__file__}
    with pytest.warns(uw.IndefiniteCurvatureWarning) as caught:
        influence.damping = 0.06
    assert {w.filename for w in caught} == {__file__}
    with pytest.warns(uw.ResidualWarning) as caught:
        fit(case, uw.CG(max_steps=2)).scores(case.test)
    assert {w.filename for w in caught} == {__file__}
