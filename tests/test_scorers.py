"""Scorers without curvature, projected, relative and averaged, against loops in float64."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import upweight as uw
from cases import Case, make
from reference import Reference
from retrained import Truth, needed, truth
from upweight.margins import margin, negative_margin
from upweight.scorers import ensemble, grad_cos, grad_dot, relatif, tracin, trak
from upweight.scorers import projection as projections
from upweight.scorers.projection import RandomProjection

CLASSIFIERS = ["mlp", "one_logit", "conv2d", "frozen_layer", "tied_weights", "dict_batches"]


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def gradients(case: Case, loss: object = None) -> tuple[Tensor, Tensor]:
    """Of the training rows (n, p) and of the test rows (m, p)."""
    own = copy.copy(case)
    train = Reference(own).gradients(Reference(own).train, case.n)
    own.loss = loss or case.loss
    return train, Reference(own).gradients(Reference(own).test, case.m)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def states(case: Case, count: int = 3) -> list[dict[str, Tensor]]:
    """Weights that differ, for the model of a case."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        model = copy.deepcopy(case.model)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        found.append(model.state_dict())
    return found


def with_weights(case: Case, state: dict[str, Tensor]) -> Case:
    other = copy.copy(case)
    other.model = copy.deepcopy(case.model)
    other.model.load_state_dict(state)
    return other


# --- gradients ------------------------------------------------------------------------------------


def test_dot_and_cosine_equal_loops(case: Case) -> None:
    train, test = gradients(case)
    given = case.model, case.loss, case.train, case.test
    assert error(grad_dot(*given, **case.options).values, test @ train.T) < 1e-10
    assert error(grad_cos(*given, **case.options).values, unit(test) @ unit(train).T) < 1e-10


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_margin_is_measured_of_test_rows(name: str) -> None:
    case = make(name)
    train, test = gradients(case, negative_margin)
    for test_loss in ("margin", negative_margin):
        scores = grad_dot(
            case.model, case.loss, case.train, case.test, test_loss=test_loss, **case.options
        )
        assert error(scores.values, test @ train.T) < 1e-10
    assert scores.provenance["test_loss"] == "negative_margin"


@pytest.mark.parametrize("name", ["mlp", "conv2d", "dict_batches"])
def test_batch_size_and_row_order_never_change_a_score(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(name)
    given = case.model, case.loss

    def scored(train: object, size: int | None) -> list[Tensor]:
        options = {"batch_size": size, **case.options}
        sketch = {"projection_dim": 5, "damping": 0.1}
        return [
            grad_dot(*given, train, case.test, **options).values,
            grad_cos(*given, train, case.test, **options).values,
            trak(*given, train, case.test, **sketch, **options).values,
        ]

    whole = scored(case.train, None)
    for size in range(1, case.n + 2):
        for got, wanted in zip(scored(case.train, size), whole, strict=True):
            assert error(got, wanted) < 1e-12
    monkeypatch.setattr("upweight.scorers.pairs.HELD_ROWS", 2)
    for got, wanted in zip(scored(case.train, 3), whole, strict=True):
        assert error(got, wanted) < 1e-12
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(0))
    shuffled = torch.utils._pytree.tree_map(lambda t: t[order], case.train)
    for got, wanted in zip(scored(shuffled, None), whole, strict=True):
        assert error(got, wanted[:, order]) < 1e-12


def test_layers_that_take_another_way_for_some_rows() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 3)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.body(x))
            if len(x) == 5:  # the second chunk uses a layer twice
                h = torch.tanh(self.body(h))
            return self.head(h)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Gate().double(), torch.randn(13, 3).double()
    y = torch.arange(13) % 2
    scores = grad_dot(model, F.cross_entropy, (x, y), (x[:3], y[:3]), batch_size=8)
    risk = uw.EmpiricalRisk(model, F.cross_entropy, (x, y), batch_size=8)
    test = uw.EmpiricalRisk(model, F.cross_entropy, (x[:3], y[:3]), batch_size=8)
    train = torch.cat([g for _, g in risk.row_gradients()])
    wanted = torch.cat([g for _, g in test.row_gradients()]) @ train.T
    assert error(scores.values, wanted) < 1e-12


def test_chosen_parameters_only() -> None:
    case = make("mlp")
    train, test = gradients(case)
    head = slice(4 * 5 + 5, None)
    scores = grad_dot(case.model, case.loss, case.train, case.test, parameters="2.*")
    assert error(scores.values, test[:, head] @ train[:, head].T) < 1e-12
    assert scores.provenance["parameters"] == 18


def test_a_zero_gradient_has_cosine_zero_and_is_told_of() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    x = torch.tensor([[1.0], [0.0], [2.0]]).double()
    y = torch.tensor([[0.0], [3.0], [5.0]]).double()
    scores = grad_cos(model, F.mse_loss, (x, y), (x, y))
    assert scores.values.tolist() == [[1, 0, -1], [0, 0, 0], [-1, 0, 1]]
    train, test = scores.provenance["notes"]
    assert train.startswith("1 training row(s) have a zero gradient")
    assert "row 1" in train
    assert test.startswith("1 test row(s)")
    tiny = torch.tensor([[1e-30]]).double()  # whose square is nothing in float32
    single = grad_cos(model.float(), F.mse_loss, (x, y), (tiny, torch.zeros(1, 1).double()))
    assert single.values[0].tolist() == [1, 0, -1] or single.provenance["notes"]


def test_small_gradients_keep_their_direction() -> None:
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1e-15, 0.0], [1e-15, 1e-15]])
    scores = grad_cos(
        model, lambda o, t: (o - t).sum(1), (x, torch.zeros(2, 1)), (x[:1], x[:1, :1])
    )
    torch.testing.assert_close(scores.values, torch.tensor([[1.0, 0.5**0.5]]))


def test_scores_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    case = make("mlp", torch.float32)
    given = case.model, case.loss, case.train, case.test
    kept = grad_dot(*given)
    for batch_size in (None, 3):
        written = grad_dot(*given, to=tmp_path / f"scores{batch_size}", batch_size=batch_size)
        np.testing.assert_allclose(np.asarray(written), kept.values, rtol=1e-5, atol=1e-7)
        assert written.provenance["method"] == "grad_dot"
        assert "grad_dot, " not in repr(written).replace("grad_dot, on disk", "")


def test_names_and_provenance_are_those_of_influence() -> None:
    case = make("mlp")
    names = [f"r{i}" for i in range(case.n)]
    given = case.model, case.loss, case.train, case.test
    scores = grad_dot(*given, train_names=names, test_names=list("abcde"))
    influence = uw.Influence(case.model, case.loss, damping=0.1).fit(case.train, names=names)
    other = influence.scores(case.test, names=list("abcde"))
    assert scores.train_names.equals(other.train_names)
    assert scores.test_names.equals(other.test_names)
    for key in ("model", "mode", "test_loss", "train_rows", "test_rows", "parameters", "versions"):
        assert scores.provenance[key] == other.provenance[key]
    assert "grad_dot" in repr(scores)
    assert "None" not in repr(scores)


def test_the_sign_says_that_a_row_helps() -> None:
    """A row scores itself highest: a step on it lowers its own loss."""
    case = make("mlp")
    own = case.model, case.loss, case.train, case.train
    for scores in (grad_dot(*own), trak(*own, projection_dim=8, damping=0.1)):
        assert bool((scores.values.diagonal() > 0).all())


def test_the_model_is_left_as_it_is() -> None:
    case = make("batch_norm_and_dropout")
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    given = case.model, case.loss, case.train, case.test
    weights = states(case, 2)
    tracin(*given, checkpoints=weights, learning_rates=[0.1, 0.1])
    trak(*given, projection_dim=5, damping=0.1, checkpoints=weights)
    grad_cos(*given)
    assert case.model.training
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_dot_is_faster_than_single_gradients_by_vmap() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    x, y = torch.randn(256, 256), torch.randint(10, (256,))
    theta = dict(model.named_parameters())

    def one(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, theta, (x[None],)), y[None])

    def naive() -> Tensor:
        by_name = vmap(grad(one), (None, 0, 0))(theta, x, y)
        rows = torch.cat([g.flatten(1) for g in by_name.values()], 1)
        return (rows @ rows.T).detach()

    def ours() -> Tensor:
        return grad_dot(model, F.cross_entropy, (x, y), (x, y)).values

    def seconds(function: object) -> float:
        start = time.perf_counter()
        function()  # type: ignore[operator]
        return time.perf_counter() - start

    torch.testing.assert_close(ours(), naive(), rtol=1e-3, atol=1e-4)
    assert min(seconds(ours) for _ in range(3)) < min(seconds(naive) for _ in range(3))


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv2d", "frozen_layer", "tied_weights", "dict_batches"])
@pytest.mark.parametrize("normalised", [False, True])
def test_tracin_equals_loops(name: str, normalised: bool) -> None:
    case = make(name)
    weights, rates = states(case), [0.5, 0.25, 0.0625]
    wanted = torch.zeros(case.m, case.n).double()
    for state, rate in zip(weights, rates, strict=True):
        train, test = gradients(with_weights(case, state))
        part = unit(test) @ unit(train).T if normalised else test @ train.T
        wanted += rate * part
    scores = tracin(
        case.model,
        case.loss,
        case.train,
        case.test,
        checkpoints=weights,
        learning_rates=np.array(rates),
        normalised=normalised,
        **case.options,
    )
    assert error(scores.values, wanted) < 1e-10
    assert scores.provenance["learning_rates"] == rates
    assert len(set(scores.provenance["model"])) == 3


def test_checkpoints_from_files_and_models(tmp_path: Path) -> None:
    case = make("tied_weights")
    state = states(case, 1)[0]
    torch.save(state, tmp_path / "one.pt")
    once = {k: v for k, v in state.items() if k != "again.weight"}  # as safetensors wants it
    save_file(once, tmp_path / "one.safetensors")
    given = case.model, case.loss, case.train, case.test
    wanted = tracin(*given, checkpoints=[state], learning_rates=[1.0]).values
    for source in (
        tmp_path / "one.pt",
        str(tmp_path / "one.safetensors"),
        with_weights(case, state).model,
    ):
        got = tracin(*given, checkpoints=[source], learning_rates=[1.0]).values
        assert torch.equal(got, wanted)


def test_checkpoints_that_do_not_match_are_named(tmp_path: Path) -> None:
    case = make("mlp")
    given = case.model, case.loss, "no rows", None  # never looked at
    good = case.model.state_dict()
    missing = {k: v for k, v in good.items() if k != "2.bias"}
    extra = {**good, "3.weight": torch.zeros(2)}
    shape = {**good, "0.weight": torch.zeros(5, 5)}
    save_file(shape, tmp_path / "shape.safetensors")
    for bad, told in (
        (missing, r"checkpoint 1 .*missing: 2\.bias"),
        (extra, r"not in the model: 3\.weight"),
        (shape, r"0\.weight \(5, 5\) instead of \(5, 4\)"),
        (tmp_path / "shape.safetensors", r"0\.weight \(5, 5\) instead of \(5, 4\)"),
    ):
        with pytest.raises(ValueError, match=told):
            tracin(*given, checkpoints=[good, bad], learning_rates=[0.1, 0.1])
        with pytest.raises(ValueError, match=told):
            trak(*given, projection_dim=2, checkpoints=[good, bad])


def test_files_that_are_no_state_dicts(tmp_path: Path) -> None:
    case = make("mlp")
    given = case.model, case.loss, case.train, case.test
    torch.save({"epoch": 3, "model": case.model.state_dict()}, tmp_path / "all.pt")
    torch.save(case.model, tmp_path / "pickled.pt")
    (tmp_path / "text.pt").write_text("weights")
    for name, told in (
        ("all.pt", "'epoch' is int"),
        ("pickled.pt", "cannot be read as tensors alone"),
        ("text.pt", "cannot be read as tensors alone"),
    ):
        with pytest.raises(ValueError, match=told):
            tracin(*given, checkpoints=[tmp_path / name], learning_rates=[0.1])
    with pytest.raises(FileNotFoundError):
        tracin(*given, checkpoints=[tmp_path / "none.pt"], learning_rates=[0.1])
    with pytest.raises(TypeError, match="a list of checkpoints"):
        tracin(*given, checkpoints=case.model.state_dict(), learning_rates=[0.1])
    with pytest.raises(TypeError, match=r"a state dict, a file or a module.*got int"):
        tracin(*given, checkpoints=[3], learning_rates=[0.1])
    with pytest.raises(ValueError, match="at least one checkpoint"):
        tracin(*given, checkpoints=[], learning_rates=[])


def test_tied_weights_that_differ_in_a_checkpoint() -> None:
    case = make("tied_weights")
    state = dict(case.model.state_dict())
    state["again.weight"] = state["again.weight"] + 1
    with pytest.raises(ValueError, match=r"encode\.weight and again\.weight are one tensor"):
        tracin(
            case.model, case.loss, case.train, case.test, checkpoints=[state], learning_rates=[1.0]
        )


@pytest.mark.parametrize("rates", [[0.1], [0.1, 0.1, 0.1], [0.1, float("nan")], [0.1, -0.1]])
def test_wrong_learning_rates(rates: list[float]) -> None:
    case = make("mlp")
    with pytest.raises(ValueError, match="learning rate"):
        tracin(case.model, case.loss, None, None, checkpoints=states(case, 2), learning_rates=rates)


# --- projections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_projection_does_not_depend_on_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, k = 2500, 7
    rows = torch.randn(5, p).double()
    projection = RandomProjection(p, k, kind, [3], dtype=torch.float64)
    whole = projection(rows)
    r = projection(torch.eye(p).double())  # the matrix itself
    assert error(whole, rows @ r) < 1e-12
    assert error(torch.cat([projection(rows[:2]), projection(rows[2:])]), whole) < 1e-12
    monkeypatch.setattr(projections, "KEPT_BYTES", 0)
    anew = RandomProjection(p, k, kind, [3], dtype=torch.float64)
    assert not anew.kept
    assert torch.equal(anew(rows), whole)
    assert not torch.equal(RandomProjection(p, k, kind, [4], dtype=torch.float64)(rows), whole)
    assert float(r.mean()) == pytest.approx(0, abs=0.02)
    assert float(r.square().mean()) * k == pytest.approx(1, abs=0.05)
    if kind == "rademacher":
        assert torch.equal(r.abs(), torch.full_like(r, k**-0.5))


def dense_trak(
    cases: list[Case], k: int, damping: float, *, weighted: bool = False, seed: int = 0
) -> Tensor:
    total, doubt = torch.zeros(()), torch.zeros(())
    for at, case in enumerate(cases):
        own = copy.copy(case)
        own.loss = negative_margin
        reference = Reference(own)
        p = sum(t.numel() for t in reference.theta)
        r = RandomProjection(p, k, "rademacher", [seed, at], dtype=torch.float64)
        r = r(torch.eye(p).double())
        train = reference.gradients(reference.train, case.n) @ r
        test = reference.gradients(reference.test, case.m) @ r
        f = margin(reference.output(reference.train).detach(), case.target(reference.train))
        q = 1 - f.sigmoid()
        weights = q * (1 - q) if weighted else torch.ones_like(q)
        curvature = (train.T * weights) @ train / case.n + damping * torch.eye(k).double()
        total = total + test @ torch.linalg.inv(curvature) @ train.T
        doubt = doubt + q
    return total / len(cases) * doubt / len(cases)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [3, 12])
def test_trak_equals_loops(name: str, weighted: bool, k: int) -> None:
    case = make(name)
    weights = states(case, 2)
    cases = [with_weights(case, state) for state in weights]
    options = {"projection_dim": k, "damping": 0.05, "weighted": weighted, **case.options}
    wanted = dense_trak(cases, k, 0.05, weighted=weighted)
    models = [c.model for c in cases]
    scores = trak(models, case.loss, case.train, case.test, **options)
    assert error(scores.values, wanted) < 1e-9
    loaded = trak(case.model, case.loss, case.train, case.test, checkpoints=weights, **options)
    assert torch.equal(loaded.values, scores.values)
    assert scores.provenance["projection_dim"] == k


def test_trak_redraws_a_large_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("mlp")
    given = case.model, case.loss, case.train, case.test
    wanted = trak(*given, projection_dim=4, damping=0.1).values
    monkeypatch.setattr(projections, "KEPT_BYTES", 0)
    for held in (0, 1000, 2**30):
        monkeypatch.setattr("upweight.scorers.sketches.HELD_BYTES", held)
        got = trak(*given, projection_dim=4, damping=0.1, batch_size=2).values
        assert error(got, wanted) < 1e-12


def test_trak_with_all_of_theta_is_the_influence_on_the_margin() -> None:
    """One logit, k = p and no damping: R drops out, and C is the Gauss-Newton matrix."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = nn.Linear(3, 1).double(), torch.randn(30, 3).double()
    y = (torch.arange(30) % 2).double()[:, None]
    loss, test = F.binary_cross_entropy_with_logits, (x[:4], y[:4])
    exact = uw.Influence(model, loss, damping=0.0).fit((x, y)).scores(test, test_loss="margin")
    for projection, seed in (("gaussian", 0), ("gaussian", 7)):
        scores = trak(
            model, loss, (x, y), test,
            projection_dim=4, weighted=True, projection=projection, seed=seed,
        )  # fmt: skip
        assert error(scores.values, exact.values) < 1e-9


def test_trak_keeps_the_scale_and_tells_models_apart() -> None:
    case = make("mlp")
    given = case.loss, case.train, case.test
    one = trak(case.model, *given, projection_dim=6, damping=0.1)
    assert torch.equal(one.values, trak(case.model, *given, projection_dim=6, damping=0.1).values)
    other = trak(case.model, *given, projection_dim=6, damping=0.1, seed=1)
    assert not torch.allclose(one.values, other.values)
    twice = trak([case.model] * 2, *given, projection_dim=6, damping=0.1)
    assert not torch.allclose(one.values, twice.values)  # each has a projection of its own


def test_trak_in_float32() -> None:
    case = make("mlp", torch.float32)
    scores = trak(case.model, case.loss, case.train, case.test, projection_dim=5, damping=0.1)
    assert scores.values.dtype == torch.float32
    assert error(scores.values, dense_trak([make("mlp")], 5, 0.1)) < 1e-4


def test_trak_refuses_what_has_no_answer() -> None:
    case = make("mlp")
    given = case.loss, case.train, case.test
    p = sum(t.numel() for t in case.model.parameters())
    with pytest.raises(ValueError, match=rf"at most the number of parameters, {p}; got {p + 1}"):
        trak(case.model, *given, projection_dim=p + 1)
    with pytest.raises(ValueError, match="rank at most 11, the number of training rows"):
        trak(case.model, *given, projection_dim=12)
    with pytest.raises(ValueError, match=r"singular.*or a smaller projection"):
        trak(nn.Linear(4, 3).double(), *given, projection_dim=11)  # rank 8 = 4 · 2
    for dimension in (0, 2.0, True):
        with pytest.raises(ValueError, match="projection_dim, a whole number"):
            trak(case.model, *given, projection_dim=dimension)
    with pytest.raises(ValueError, match="rademacher"):
        trak(case.model, *given, projection_dim=2, projection="sparse")
    with pytest.raises(ValueError, match="whole number of at least 0"):
        trak(case.model, *given, projection_dim=2, seed=-1)
    with pytest.raises(ValueError, match="at least one model"):
        trak([], *given, projection_dim=2)
    with pytest.raises(TypeError, match="one model to load"):
        trak([case.model], *given, projection_dim=2, checkpoints=states(case))


def test_margins_are_of_classifiers() -> None:
    case = make("regression")
    given = case.model, case.loss, case.train, case.test
    with pytest.raises(ValueError, match="a margin needs logits"):
        trak(*given, projection_dim=2)
    with pytest.raises(ValueError, match="of the label of a classifier"):
        grad_dot(*given, test_loss="margin")
    one = nn.Linear(3, 1).double()
    x, y = case.train[0], case.train[1][:, :1]
    with pytest.raises(ValueError, match="expected the log-loss of the label"):
        trak(one, F.mse_loss, (x, y), (x, y), projection_dim=2)
    case = make("mlp")
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label smoothing.*Training row \d+ has a loss of"):
        trak(case.model, smooth, case.train, case.test, projection_dim=2)


def test_unknown_options_are_named() -> None:
    case = make("mlp")
    given = case.model, case.loss, case.train, case.test
    with pytest.raises(TypeError, match=r"expected options among parameters.*got dampling"):
        grad_dot(*given, dampling=0.1)
    with pytest.raises(ValueError, match="test_loss 'loss', 'margin' or a function"):
        grad_dot(*given, test_loss="accuracy")
    with pytest.raises(ValueError, match=r"training data: expected one name per row"):
        grad_dot(*given, train_names=["a"])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        grad_dot(lambda x: x, *given[1:])


def test_rows_without_finite_gradients_are_named() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    x = torch.tensor([[1.0], [2.0]]).double()
    y = torch.tensor([[0.0], [2.0]]).double()

    def root(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sqrt().flatten()

    with pytest.raises(ValueError, match="training data: row 1: the gradient of its loss"):
        grad_dot(model, root, (x, y), (x[:1], y[:1]))
    with pytest.raises(ValueError, match="test data: row 1: the gradient of its loss"):
        grad_cos(model, root, (x[:1], y[:1]), (x, y))


# --- relative influence ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied_weights", "dict_batches"])
@pytest.mark.parametrize("kind", ["loss", "parameters"])
def test_relatif_equals_loops(name: str, kind: str) -> None:
    case, damping = make(name), 0.05
    train, test = gradients(case)
    curvature = Reference(case).ggn()
    inverse = torch.linalg.inv(curvature + damping * torch.eye(len(curvature)).double())
    steps = inverse @ train.T  # (p, n)
    size = (train.T * steps).sum(0).sqrt() if kind == "loss" else steps.norm(dim=0)
    influence = uw.Influence(case.model, case.loss, damping=damping, **case.options)
    scores = relatif(influence.fit(case.train), case.test, kind)
    assert error(scores.values, test @ steps / size) < 1e-9
    assert scores.provenance["relative_to"] == kind
    assert "relatif(direct)" in repr(scores)


def test_relatif_takes_test_losses_and_methods() -> None:
    case = make("mlp")
    influence = uw.Influence(case.model, case.loss, "cg", damping=0.1).fit(case.train)
    scores = relatif(influence, case.test, test_loss="margin")
    wanted = influence.scores(case.test, test_loss="margin").values
    wanted = wanted / influence.self_influence().values.sqrt()
    assert error(scores.values, wanted) < 1e-12


def test_relatif_of_zero_gradients_and_bad_input() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    x = torch.tensor([[1.0], [0.0]]).double()
    y = torch.tensor([[0.0], [3.0]]).double()
    influence = uw.Influence(model, F.mse_loss, damping=0.1)
    with pytest.raises(RuntimeError, match="call fit"):
        relatif(influence, (x, y))
    influence.fit((x, y))
    for kind in ("loss", "parameters"):
        scores = relatif(influence, (x, y), kind)
        assert scores.values[:, 1].tolist() == [0, 0]
        assert "the first is row 1" in scores.provenance["notes"][0]
    with pytest.raises(ValueError, match="'loss' or 'parameters'"):
        relatif(influence, (x, y), "theta")


def test_relatif_refuses_negative_self_influence() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)
    x, y = torch.tensor([[1.0], [2.0]]).double(), torch.zeros(2, 1).double()

    def hill(output: Tensor, target: Tensor) -> Tensor:
        return -(output - target).square().flatten()

    influence = uw.Influence(model, hill, damping=0.0, curvature="hessian")
    with pytest.warns(uw.IndefiniteCurvatureWarning):
        influence.fit((x, y))
    with pytest.raises(ValueError, match=r"row 1 has -.*not positive definite"):
        relatif(influence, (x, y))


# --- means over models ----------------------------------------------------------------------------


def test_ensemble_is_the_mean_of_members(tmp_path: Path) -> None:
    case = make("mlp")
    given = case.loss, case.train
    models = [with_weights(case, state).model for state in states(case)]
    fitted = [uw.Influence(m, case.loss, damping=0.1).fit(case.train) for m in models]
    wanted = torch.stack([f.scores(case.test).values for f in fitted]).mean(0)
    in_turn = (uw.Influence(m, case.loss, damping=0.1).fit(case.train) for m in models)
    stored = [f.scores(case.test, to=tmp_path / str(i)) for i, f in enumerate(fitted)]
    functions = [lambda test, f=f: f.scores(test) for f in fitted]
    for members in (fitted, in_turn, functions, [fitted[0], functions[1], stored[2]]):
        assert error(ensemble(members, case.test).values, wanted) < 1e-12
    mean = ensemble(stored)
    assert error(mean.values, wanted) < 1e-12
    assert mean.test_names.equals(stored[0].test_names)
    assert [p["model"] for p in mean.provenance["members"]] == [
        s.provenance["model"] for s in stored
    ]
    for told, scores in zip(mean.provenance["agreement"], stored, strict=True):
        rows = zip(np.asarray(scores), wanted.numpy(), strict=True)
        assert told == pytest.approx(np.mean([spearmanr(a, b).statistic for a, b in rows]))
    assert "mean of 3 members, damping 0.1" in repr(mean)
    mean.save(tmp_path / "mean")
    dots = [lambda test, m=m: grad_dot(m, *given, test) for m in models]
    assert "mean of 3 members" in repr(ensemble(dots, case.test))


def test_agreement_of_many_test_rows_is_sampled() -> None:
    values = torch.randn(250, 12, generator=torch.Generator().manual_seed(0))
    names = pd.RangeIndex(250), pd.RangeIndex(12)
    same = ensemble([uw.Scores(values, *names), uw.Scores(2 * values, *names)])
    assert same.provenance["agreement"] == pytest.approx([1.0, 1.0])
    assert torch.allclose(same.values, 1.5 * values)
    flat = ensemble([uw.Scores(torch.ones(2, 3), pd.RangeIndex(2), pd.RangeIndex(3))])
    assert np.isnan(flat.provenance["agreement"][0])


def test_members_must_be_of_the_same_rows() -> None:
    values = torch.ones(2, 3)
    first = uw.Scores(values, pd.Index(["t", "u"]), pd.Index(["a", "b", "c"]))
    order = uw.Scores(values, pd.Index(["t", "u"]), pd.Index(["a", "c", "b"]))
    with pytest.raises(ValueError, match=r"training rows.*row 1 is 'b' for member 0 and 'c'"):
        ensemble([first, order])
    fewer = uw.Scores(values[:1], pd.Index(["t"]), first.train_names)
    with pytest.raises(ValueError, match=r"got \(2, 3\) from member 0 and \(1, 3\) from member 1"):
        ensemble([first, fewer])
    with pytest.raises(ValueError, match="at least one member"):
        ensemble([])
    with pytest.raises(TypeError, match="expected several members; got one Scores"):
        ensemble(first)
    with pytest.raises(ValueError, match="member 1 is not scores yet"):
        ensemble([first, lambda test: first])
    with pytest.raises(TypeError, match="member 0: expected Scores; got Tensor"):
        ensemble([lambda test: values], test=1)
    with pytest.raises(TypeError, match="member 1: expected a fitted Influence"):
        ensemble([first, 3])


# --- truth: retraining on random halves of the digits ---------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Truth:
    """The network of 4,810 parameters, and how true scores are."""
    return truth("mlp")


@needed
def test_gradient_scores_are_as_true_as_those_of_peers(digits: Truth) -> None:
    given = digits.model(), F.cross_entropy, digits.train, digits.test
    assert digits.lds(grad_dot(*given)) > 0.291 - 0.01
    assert digits.lds(grad_cos(*given)) > 0.228 - 0.01
    rates = digits.data["ckpt_lr"]
    scores = tracin(*given, checkpoints=digits.models("ckpt"), learning_rates=rates)
    assert digits.lds(scores) > 0.297 - 0.01


@needed
@pytest.mark.parametrize(
    ("options", "one", "ten"),
    [
        ({"projection_dim": 128}, 0.371, 0.650),  # as in the paper
        ({"projection_dim": 512, "damping": 0.1}, 0.56, 0.71),
        ({"projection_dim": 512, "damping": 2e-3, "weighted": True}, 0.62, 0.76),
    ],
)
@pytest.mark.slow
def test_trak_is_at_least_as_true_as_the_authors(
    digits: Truth, options: dict[str, object], one: float, ten: float
) -> None:
    """Theirs: 0.371 for one model, 0.660 for ten, with the best of their dimensions."""
    given = F.cross_entropy, digits.train, digits.test
    base = digits.model()
    assert digits.lds(trak(base, *given, **options)) > one
    many = trak(base, *given, checkpoints=digits.models("full"), **options)
    assert digits.lds(many) > ten


@needed
@pytest.mark.slow
def test_trak_draws_little_from_its_seed(digits: Truth) -> None:
    given = digits.model(), F.cross_entropy, digits.train, digits.test
    weights = digits.models("full")
    for seed in range(1, 6):
        paper = trak(*given, checkpoints=weights, projection_dim=128, seed=seed)
        assert digits.lds(paper) > 0.64
        scores = trak(*given, checkpoints=weights, projection_dim=512, damping=0.1, seed=seed)
        assert digits.lds(scores) > 0.71


@needed
@pytest.mark.slow
def test_the_mean_of_ten_models_is_truer_than_one(digits: Truth) -> None:
    fitted = [
        uw.Influence(model, F.cross_entropy, "ekfac", damping=1e-3).fit(digits.train)
        for model in digits.models("full")
    ]
    mean, alone = ensemble(fitted, digits.test), fitted[0]
    assert digits.lds(mean) > digits.lds(alone.scores(digits.test)) + 0.015
