"""Scores by layers against products of whole gradients, in every form, over the table of cases."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import upweight as uw
from cases import Case, make
from upweight.curvature import KroneckerCurvature, KroneckerInverse
from upweight.layerwise import (
    Frames,
    GradientStore,
    LayerGradients,
    Sides,
    against_rows,
    held_queries,
    holding,
    own_influence,
    queries,
    scoring,
    write_gradients,
)
from upweight.layerwise.queries import Formed, Separable, Weighted
from upweight.layerwise.separable import split_weight

DAMPING = 0.05


def inverse_of(case: Case, **options: Any) -> tuple[KroneckerInverse, uw.EmpiricalRisk, Any]:
    train = uw.EmpiricalRisk(case.model, case.loss, case.train, **case.options)
    test = uw.EmpiricalRisk(case.model, case.loss, case.test, **case.options)
    curvature = KroneckerCurvature(train)
    return curvature.inverse(DAMPING, **options), train, test


def gradients(risk: uw.EmpiricalRisk) -> Tensor:
    return torch.cat([rows for _, rows in risk.row_gradients()])


def wanted(inverse: KroneckerInverse, train: uw.EmpiricalRisk, test: uw.EmpiricalRisk) -> Tensor:
    return gradients(test) @ inverse.dense() @ gradients(train).T


def scores(inverse: KroneckerInverse, train: uw.EmpiricalRisk, test: uw.EmpiricalRisk) -> Tensor:
    found = torch.full((test.n, train.n), float("nan"), dtype=train.dtype)
    for held in held_queries(inverse, test, train.n):
        for columns, _, block in against_rows(held, LayerGradients(inverse.curvature, train)):
            assert bool(found[held.rows, columns].isnan().all())
            found[held.rows, columns] = block
    return found


def own(inverse: KroneckerInverse, rows: uw.EmpiricalRisk) -> Tensor:
    return own_influence(LayerGradients(inverse.curvature, rows), Frames.of(inverse))


def close(got: Tensor, exact: Tensor, rtol: float = 1e-9) -> None:
    assert got.shape == exact.shape
    assert float((got - exact).norm()) <= rtol * float(exact.norm())


def force(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Hold every block that has two sides in this form."""
    plan = holding._plan

    def forced(inverse: Any, frames: Any, at: int, sides: Sides | None, *sizes: int) -> Any:
        found = plan(inverse, frames, at, sides, *sizes)
        if sides is None or sides.right is None:
            return found
        split = None
        if form == "separable":
            values = inverse.curvature.blocks[at].operator.values
            split = split_weight(values, inverse.weights[at], 1e9, inverse.factored)
            assert split is not None
        return holding._Plan(form, found.row_bytes, split)

    monkeypatch.setattr(holding, "_plan", forced)


@pytest.mark.parametrize("form", ["chosen", "formed", "weighted"])
def test_scores_equal_products_of_gradients(
    case: Case, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverse, train, test = inverse_of(case)
    if form != "chosen":
        force(monkeypatch, form)
    close(scores(inverse, train, test), wanted(inverse, train, test))


def test_single_precision_equals_double_with_the_same_factors(case32: Case) -> None:
    inverse, train, test = inverse_of(case32)
    assert train.dtype == torch.float32
    exact = gradients(test).double() @ inverse.dense().double() @ gradients(train).double().T
    close(scores(inverse, train, test).double(), exact, 1e-5)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "sequence", "layer_norm", "tied_weights"])
@pytest.mark.parametrize("small", [1, 1000])
def test_blocks_of_any_size(name: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inverse, train, test = inverse_of(make(name))
    exact = wanted(inverse, train, test)
    squares = (gradients(train) @ inverse.dense() * gradients(train)).sum(1)
    monkeypatch.setattr(queries, "block_bytes", lambda _: small)
    monkeypatch.setattr(scoring, "block_bytes", lambda _: small)
    monkeypatch.setattr(holding, "HELD_BYTES", small * 20)
    for form in ("formed", "weighted"):
        with monkeypatch.context() as patch:
            force(patch, form)
            for batch_size in (1, 3, None):
                train.batch_size = test.batch_size = batch_size
                close(scores(inverse, train, test), exact)
                close(own(inverse, train), squares)


def test_self_influence(case: Case) -> None:
    inverse, train, _ = inverse_of(case)
    g = gradients(train)
    close(own(inverse, train), (g @ inverse.dense() * g).sum(1))


@pytest.mark.parametrize("name", ["mlp", "conv2d", "conv2d_uneven", "sequence"])
def test_all_terms_of_a_separable_weight_are_exact(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverse, train, test = inverse_of(make(name), factored=1e-7)
    force(monkeypatch, "separable")
    close(scores(inverse, train, test), wanted(inverse, train, test), 1e-6)


@settings(max_examples=30, deadline=None)
@given(
    q=st.integers(1, 3),
    o=st.integers(1, 4),
    i=st.integers(1, 4),
    s=st.integers(1, 3),
    t=st.integers(1, 3),
    m=st.integers(1, 6),
    b=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_every_form_is_the_same_product(  # noqa: PLR0917
    q: int, o: int, i: int, s: int, t: int, m: int, b: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = Sides(draw(b, q, s, o), draw(b, q, s, i))
    left, right, weight = draw(m, q, t, o), draw(m, q, t, i), draw(q, o, i)
    exact = torch.einsum("mqto,mqti,qoi,bqso,bqsi->mb", left, right, weight, rows.left, rows.right)
    solved = torch.einsum("mqto,mqti,qoi->mqoi", left, right, weight)
    u = torch.eye(o, dtype=torch.float64)[:, None].expand(o, q, o)
    v = weight.transpose(0, 1)
    for query in (
        Formed(solved),
        Weighted(left, right, weight, None),
        Separable(left, right, u, v, None),
    ):
        got = query.scores(rows)
        assert torch.allclose(got, exact, rtol=1e-9, atol=1e-9)


def trained(widths: list[int], rows: int = 400) -> tuple[nn.Module, Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        centres = torch.randn(5, widths[0])
        y = torch.randint(5, (rows,))
        x = centres[y] + 0.8 * torch.randn(rows, widths[0])
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.Tanh()]
        model = nn.Sequential(*layers[:-1])
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(30):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
    return model, (x[: rows // 2], y[: rows // 2]), (x[rows // 2 :], y[rows // 2 :])


def test_factored_scores_are_as_near_as_promised() -> None:
    model, train, test = trained([20, 64, 64, 5])
    exact = uw.Influence(model, F.cross_entropy, "ekfac", damping=1e-3).fit(train)
    wanted = exact.scores(test).values
    errors: list[float] = []
    for tolerance in (0.2, 0.05, 0.01):
        recipe = uw.EKFAC(factored=tolerance)
        influence = uw.Influence(model, F.cross_entropy, recipe, damping=1e-3).fit(train)
        got = influence.scores(test).values
        errors.append(float((got - wanted).norm() / wanted.norm()))
        assert errors[-1] <= 3 * tolerance
        assert "factored scores" in influence.certificate.facts
    assert errors[0] > errors[2] > 0.0


def test_scores_of_part_of_the_rows_have_their_places() -> None:
    case = make("mlp")
    inverse, train, test = inverse_of(case)
    exact = wanted(inverse, train, test)
    shards = [slice(0, 3), slice(3, 4), slice(4, train.n)]
    from upweight.influence import influence_blocks

    for solver in (inverse, uw.operator.Dense(inverse.dense())):
        found = torch.full_like(exact, float("nan"))
        asked: list[tuple[slice, slice]] = []

        def done(rows: slice, shard: slice, asked: Any = asked) -> bool:
            asked.append((rows, shard))
            return shard.start == 3

        for rows, columns, _, block in influence_blocks(
            solver, train, test, "up", shards=shards, done=done
        ):
            found[rows, columns] = block
        assert bool(found[:, 3].isnan().all())
        keep = [i for i in range(train.n) if i != 3]
        close(found[:, keep], exact[:, keep])
        assert [shard for _, shard in asked] == shards


def test_eigenvalues_of_some_rows() -> None:
    model, train, test = trained([20, 64, 64, 5])
    damping = 1e-2
    whole = uw.Influence(model, F.cross_entropy, uw.EKFAC(), damping=damping).fit(train)
    part = uw.EKFAC(correction_rows=0.5)
    some = uw.Influence(model, F.cross_entropy, part, damping=damping).fit(train)
    a, b = (influence.scores(test).values.flatten() for influence in (whole, some))
    assert 0.98 < float(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 1.0 - 1e-9
    same = uw.Influence(model, F.cross_entropy, uw.EKFAC(correction_rows=200), damping=damping)
    assert torch.allclose(same.fit(train).scores(test).values, whole.scores(test).values)
    for wrong in (0, 0.0, 1.5, -1, "all"):
        with pytest.raises(ValueError, match="correction_rows"):
            uw.Influence(model, F.cross_entropy, uw.EKFAC(correction_rows=wrong), damping=1.0).fit(
                train
            )


def test_rows_without_a_finite_gradient_are_named() -> None:
    model = nn.Linear(2, 1)
    x, y = torch.randn(8, 2), torch.randn(8, 1)

    def root(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(1).sqrt()

    influence = uw.Influence(model, F.mse_loss, "ekfac", damping=0.1).fit((x, y))
    exact = y.clone()
    exact[5] = model(x[5:6]).detach()[0]
    with pytest.raises(ValueError, match="test data: row 5"):
        influence.scores((x, exact), test_loss=root)


# --- stores -----------------------------------------------------------------------------------


def stored_scores(inverse: KroneckerInverse, store: GradientStore, test: Any) -> Tensor:
    parts = [
        torch.cat([b for _, _, b in against_rows(held, store)], dim=1)
        for held in held_queries(inverse, test, len(store), store.frames(inverse))
    ]
    return torch.cat(parts)


def test_a_store_gives_the_same_scores(case: Case, tmp_path: Path) -> None:
    inverse, train, test = inverse_of(case)
    train.batch_size = 3
    store = write_gradients(tmp_path / "s", inverse, train, precision="float64")
    assert len(store) == train.n
    close(stored_scores(inverse, store, test), wanted(inverse, train, test))
    close(own_influence(store, store.frames(inverse)), own(inverse, train))
    if train.n >= 5:
        part = store.part(slice(2, 5)).part(slice(1, 3))
        close(stored_scores(inverse, part, test), wanted(inverse, train, test)[:, 3:5])
    other = inverse.curvature.inverse(1.0)
    close(stored_scores(other, store, test), wanted(other, train, test))


@pytest.mark.parametrize("name", ["mlp", "conv2d", "sequence"])
def test_precision_and_rank_of_a_store(name: str, tmp_path: Path) -> None:
    inverse, train, test = inverse_of(make(name))
    exact = wanted(inverse, train, test)
    sizes: list[int] = []
    for precision, rtol in (("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 3e-2)):
        store = write_gradients(tmp_path / precision, inverse, train, precision=precision)
        close(stored_scores(inverse, store, test), exact, rtol)
        sizes.append(store.nbytes)
    assert sizes[0] == 2 * sizes[1] == 2 * sizes[2]
    errors, kept = [], []
    for rank in (1, 2, 3, 100):
        store = write_gradients(
            tmp_path / str(rank), inverse, train, precision="float64", rank=rank
        )
        got = stored_scores(inverse, store, test)
        errors.append(float((got - exact).norm() / exact.norm()))
        kept.append(store.kept)
    assert errors[-1] < 1e-9 < errors[0]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1] == pytest.approx(1.0)


def test_what_a_store_refuses(tmp_path: Path) -> None:
    inverse, train, _ = inverse_of(make("mlp"))
    store = write_gradients(tmp_path / "s", inverse, train)
    assert "GradientStore of 11 rows" in repr(store)
    assert "float32" in repr(store)
    with pytest.raises(FileExistsError):
        write_gradients(tmp_path / "s", inverse, train)
    with pytest.raises(ValueError, match="precision"):
        write_gradients(tmp_path / "t", inverse, train, precision="int8")
    with pytest.raises(ValueError, match="rank"):
        write_gradients(tmp_path / "t", inverse, train, rank=0)
    other, _, _ = inverse_of(make("conv2d"))
    with pytest.raises(ValueError, match="another curvature"):
        store.frames(other)
    with pytest.raises(FileNotFoundError, match=r"meta\.json"):
        GradientStore(tmp_path)
    first = sorted((tmp_path / "s").glob("*.bin"))[0]
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        GradientStore(tmp_path / "s")
    assert not (tmp_path / "t").exists()


def test_questions_to_a_store(tmp_path: Path) -> None:
    model, train, test = trained([20, 32, 5])
    influence = uw.Influence(model, F.cross_entropy, uw.EKFAC(), damping=0.01).fit(
        train, names=[f"r{i}" for i in range(200)], factors=tmp_path / "factors"
    )
    store = influence.store_gradients(tmp_path / "gradients")
    again = uw.Influence(model, F.cross_entropy, uw.EKFAC(), damping=0.01)
    again.fit(train, factors=tmp_path / "factors")
    opened = uw.GradientStore(tmp_path / "gradients")
    for damping in (0.01, 0.3):
        influence.damping = again.damping = damping
        wanted = influence.scores(test)
        got = again.scores(test, opened)
        assert list(got.train_names) == list(wanted.train_names)
        close(got.values, wanted.values, 1e-5)
        assert again.top(test, opened, k=3).equals(again.scores(test, opened).top(3))
        close(again.self_influence(opened).values, influence.self_influence().values, 1e-5)
    again.scores(test, opened, to=tmp_path / "scores")
    close(torch.tensor(uw.Scores.load(tmp_path / "scores").values[:]), wanted.values, 1e-5)
    with pytest.raises(TypeError, match="mode='up'"):
        again.scores(test, store, mode="perturbation")
    other = uw.Influence(model, F.cross_entropy, "direct", damping=0.1).fit(train)
    with pytest.raises(TypeError, match="EKFAC"):
        other.scores(test, store)
    with pytest.raises(TypeError, match="EKFAC"):
        other.store_gradients(tmp_path / "more")


# --- factors in a file -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv2d", "layer_norm", "embedding", "lstm"])
def test_factors_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    case = make(name)
    train = uw.EmpiricalRisk(case.model, case.loss, case.train, **case.options)
    path = tmp_path / "factors.safetensors"
    wanted = KroneckerCurvature(train, factors=path)
    got = KroneckerCurvature(train, factors=path)
    assert wanted.passes > got.passes == 0
    assert torch.equal(got.dense(), wanted.dense())
    assert got.notes == wanted.notes
    assert got.fingerprint() == wanted.fingerprint()
    test = uw.EmpiricalRisk(case.model, case.loss, case.test, **case.options)
    inverse = wanted.inverse(DAMPING)
    close(scores(got.inverse(DAMPING), train, test), scores(inverse, train, test))


def test_factors_of_other_work_are_refused(tmp_path: Path) -> None:
    model, train, _ = trained([20, 8, 5])
    path = tmp_path / "factors"

    def fit(rows: Any = train, method: Any = "ekfac") -> None:
        uw.Influence(model, F.cross_entropy, method, damping=0.1).fit(rows, factors=path)

    fit()
    with pytest.raises(ValueError, match="content of training rows"):
        fit((train[0] + 1.0, train[1]))
    with pytest.raises(ValueError, match="number of training rows: 200 in the file, 199 here"):
        fit((train[0][:199], train[1][:199]))
    with pytest.raises(ValueError, match="fisher: exact in the file, empirical here"):
        fit(method=uw.EKFAC(fisher="empirical"))
    with pytest.raises(ValueError, match="method: ekfac in the file, kfac here"):
        fit(method="kfac")
    with pytest.raises(TypeError, match="factors="):
        fit(method="direct")
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="model: "):
        fit()
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged"):
        fit()


# --- padding -----------------------------------------------------------------------------------


def test_padding_counts_nowhere() -> None:
    """Rows of tokens have the same curvature and scores however far they are padded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Embedding(6, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6)
        model = nn.Sequential(*layers).double()
        tokens = torch.randint(6, (7, 4))
        labels = torch.randint(6, (7, 4))
    lengths = torch.tensor([4, 1, 2, 4, 3, 2, 4])
    labels[torch.arange(4) >= lengths[:, None]] = -100
    labels[0, 0] = labels[4, 1] = -100  # a prompt

    def fit(pad: int, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        rows = F.pad(tokens, (0, pad)), F.pad(labels, (0, pad), value=-100)
        recipe = uw.EKFAC(fisher="empirical", other="diagonal")
        influence = uw.Influence(
            model, uw.TokenLoss(), recipe, damping=0.1, batch_size=batch_size
        ).fit(rows)
        inner: Any = influence.inverse
        assert not any("Padding" in note for note in influence.certificate.notes)
        return inner.inner.dense(), influence.scores(rows).values

    dense, values = fit(0)
    for pad, batch_size in ((0, 2), (1, None), (5, 3)):
        other, others = fit(pad, batch_size)
        close(other, dense)
        close(others, values)


# --- layers that are left out ------------------------------------------------------------------


class Gated(nn.Module):
    """A layer that rows without a positive gate leave out, alone in a batch."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.a = nn.Linear(40, 40) if first else nn.Identity()
        self.b = nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        gate = (x[:, :1] > 0).to(x)
        h = self.a(x)
        if bool(gate.any()):
            h = h + gate * torch.tanh(self.b(h))
        return h[:, :3]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("form", ["formed", "weighted"])
@pytest.mark.slow
def test_layers_that_some_rows_leave_out(
    first: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gated(first).double()
        x, y = torch.randn(12, 40, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    x[:, 0] = torch.tensor([1.0, -1.0, -1.0, 1.0] * 3)
    train = uw.EmpiricalRisk(model, F.mse_loss, (x, y))
    curvature = KroneckerCurvature(train)
    force(monkeypatch, form)
    for rows in ([0, 1], [1, 0], [1, 2, 3], [1, 2]):
        test = uw.EmpiricalRisk(model, F.mse_loss, (x, y), batch_size=1)
        test = test.with_rows(test.rows.subset(rows))
        inverse = curvature.inverse(DAMPING)
        exact = gradients(test) @ inverse.dense() @ gradients(train).T
        close(scores(inverse, train, test), exact)


class Odd(nn.Module):
    """A row with a mark makes the batch go another way, which no hook can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x[None])[0] if bool((x[:, 0] > 100).any()) else self.a(x)
        return self.c(torch.tanh(h))


@pytest.mark.parametrize("place", [3, 50])
def test_factors_come_back_where_a_layer_was_declined(place: int, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = Odd(), torch.randn(103, 5), torch.randn(103, 2)
    x[place, 0] = 101.0
    made = []
    for _ in range(2):
        influence = uw.Influence(model, F.mse_loss, "ekfac", damping=0.1, batch_size=8)
        influence.fit((x, y), factors=tmp_path / "factors")
        made.append(influence.scores((x[:2], y[:2])).values)
    assert torch.equal(*made)


def test_factors_and_stores_of_other_labels_or_losses_are_refused(tmp_path: Path) -> None:
    model, (x, y), test = trained([20, 8, 5])
    influence = uw.Influence(model, F.cross_entropy, "ekfac", damping=0.1).fit((x, y))
    store = influence.store_gradients(tmp_path / "s")
    other = influence.store_gradients(tmp_path / "o", (x.flip(0), y.flip(0)))
    influence.fit((x, (y + 1) % 5))
    for call in (influence.scores, influence.top):
        with pytest.raises(ValueError, match="earlier fit"):
            call(test, store)
        call(test, other)
    with pytest.raises(ValueError, match="earlier fit"):
        influence.self_influence(store)
    line = nn.Linear(20, 1)
    exact = x, line(x).detach()
    uw.Influence(line, F.mse_loss, "ekfac", damping=0.1).fit(exact, factors=tmp_path / "f")
    with pytest.raises(ValueError, match="square of the roots"):
        uw.Influence(line, F.huber_loss, "ekfac", damping=0.1).fit(exact, factors=tmp_path / "f")
