"""K-FAC and EK-FAC against torch.kron, one row at a time, over the table of cases."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import upweight as uw
from cases import Case, Tied, classes, draw, labels, make
from reference import KroneckerReference, Reference
from test_published import wine
from upweight.curvature.kronecker import KroneckerCurvature


def risk_of(case: Case, **options: object) -> uw.EmpiricalRisk:
    return uw.EmpiricalRisk(case.model, case.loss, case.train, **case.options, **options)


def kronecker(case: Case, batch_size: int | None = None, **options: Any) -> KroneckerCurvature:
    return KroneckerCurvature(risk_of(case, batch_size=batch_size), **options)


def close(got: Tensor, wanted: Tensor, rtol: float = 1e-10) -> None:
    assert float((got.double() - wanted).norm()) <= rtol * float(wanted.norm())


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def places(curvature: KroneckerCurvature) -> list[Tensor]:
    every = torch.arange(curvature.size)
    return [every[block.entries] for block in curvature.blocks]


def double(build: Callable[[], Case]) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        case = build()
    case.model.double()
    return case


# --- what it is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv2d", "conv2d_uneven", "sequence", "tied_weights"])
@pytest.mark.parametrize("memory", ["kept", "again", "row by row"])
def test_chunks_do_not_matter(name: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(name)
    wanted = [kronecker(case, corrected=c).dense() for c in (True, False)]
    if memory != "kept":
        monkeypatch.setattr("upweight.curvature.moments.KEPT_BYTES", 0)
    if memory == "row by row":
        monkeypatch.setattr("upweight.curvature.moments.FORMED_BYTES", 1)
        monkeypatch.setattr("upweight.curvature.capture.CHUNK_BYTES", 1)  # one root at a time
    for batch_size in (1, 2, 3, 5, None):
        for corrected, dense in zip((True, False), wanted, strict=True):
            curvature = kronecker(case, batch_size, corrected=corrected)
            close(curvature.dense(), dense, 1e-12)
            others = any(block.kind != "kronecker" for block in curvature.blocks)
            assert curvature.passes == 1 + (corrected and memory != "kept") + others


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_dense_equals_reference(case: Case, corrected: bool, fisher: str) -> None:
    wanted = KroneckerReference(case).dense(corrected, fisher)
    curvature = kronecker(case, 3, corrected=corrected, fisher=fisher)
    assert curvature.name == ("ekfac" if corrected else "kfac")
    close(curvature.dense(), wanted)
    close(curvature.diagonal(), wanted.diagonal())
    columns = torch.randn(curvature.size, 3, dtype=torch.float64)
    close(curvature @ columns, wanted @ columns)
    for damping in (0.01, 0.1):
        inverse = torch.linalg.inv(wanted + damping * eye(len(wanted)))
        close(curvature.inverse(damping) @ columns, inverse @ columns, 1e-8)


def test_single_precision(case32: Case) -> None:
    curvature = kronecker(case32)
    assert curvature.dtype == torch.float32
    close(curvature.dense(), KroneckerReference(case32).dense(True), 1e-5)


def test_every_parameter_is_in_one_block(case: Case) -> None:
    curvature = kronecker(case)
    found = torch.cat(places(curvature))
    assert torch.equal(found.sort().values, torch.arange(curvature.size))
    assert sum(block.parameters for block in curvature.blocks) == curvature.size
    assert sum(curvature.shares.values()) == pytest.approx(1.0)
    assert curvature.coverage == curvature.shares["kronecker"]
    assert bool(curvature.notes) == (curvature.coverage < 1.0)


@pytest.mark.parametrize("name", ["layer_norm", "lstm", "attention", "embedding", "tied_weights"])
def test_other_blocks_are_those_of_the_ggn(name: str) -> None:
    case = make(name)
    ggn = Reference(case).ggn()
    for kind in ("dense", "diagonal"):
        curvature = kronecker(case, 2, other=kind)
        exact = 0
        for block, at in zip(curvature.blocks, places(curvature), strict=True):
            if block.kind == "kronecker":
                continue
            exact += 1
            assert block.kind == kind
            wanted = ggn[at[:, None], at]
            close(block.operator.dense(), wanted if kind == "dense" else wanted.diag().diag())
        assert exact
        assert len(curvature.notes) == exact


def test_large_modules_get_a_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upweight.curvature.rests.DENSE_SIZE", 20)
    monkeypatch.setattr("upweight.curvature.kronecker.CHUNK_BYTES", 1)  # one module at a time
    case = make("attention")
    curvature = kronecker(case)
    kinds = {block.name: block.kind for block in curvature.blocks}
    assert kinds["layer.self_attn"] == "diagonal"
    assert kinds["layer.norm1"] == kinds["layer.self_attn.out_proj"] == "dense"
    assert kinds["layer.linear1"] == "kronecker"
    assert curvature.shares["diagonal"] == pytest.approx(60 / 164)
    assert any("diagonal alone" in note for note in curvature.notes)
    ggn = Reference(case).ggn().diagonal()
    at = places(curvature)[[b.name for b in curvature.blocks].index("layer.self_attn")]
    close(curvature.diagonal()[at], ggn[at])


@pytest.mark.parametrize(
    ("name", "layer", "why"),
    [
        ("embedding", "embedding \\(Embedding\\): weight", "no linear"),
        ("lstm", "lstm \\(LSTM\\): weight_ih_l0", "no linear"),
        ("layer_norm", "1 \\(LayerNorm\\): weight, bias", "no linear"),
        ("attention", "layer.self_attn.out_proj", "not called"),
        ("tied_weights", "Tied \\(Tied\\): scale", "no linear"),
    ],
)
def test_what_has_no_factors_is_told_or_refused(name: str, layer: str, why: str) -> None:
    notes = kronecker(make(name)).notes
    assert any(re.search(f"{layer}.*{why}.*dense block", note) for note in notes)
    first = layer if name != "attention" else "layer.self_attn \\(Multihead"  # of several
    with pytest.raises(ValueError, match=f"{first}.*no Kronecker factors.*other='auto'"):
        kronecker(make(name), other="refuse")


# --- how layers are used -------------------------------------------------------------------------


class Odd(nn.Module):
    """A layer f that is used in some way, and a head."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.f = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:  # x (b, t, 3)
        return self.head(torch.tanh(getattr(self, self.use)(x)).mean(1))

    def usual(self, x: Tensor) -> Tensor:
        return self.f(x)

    def by_keyword(self, x: Tensor) -> Tensor:
        return self.f(input=x)

    def functional(self, x: Tensor) -> Tensor:
        return F.linear(x, self.f.weight, self.f.bias)

    def functional_too(self, x: Tensor) -> Tensor:
        return self.f(x) + 0.01 * F.linear(x.roll(1, 2), self.f.weight)

    def positions_first(self, x: Tensor) -> Tensor:
        return self.f(x.transpose(0, 1)).transpose(0, 1)

    def rows_are_positions(self, x: Tensor) -> Tensor:
        return self.f(x.transpose(0, 1).flatten(0, 1)).view(x.shape[1], -1, 3).transpose(0, 1)

    def without_rows(self, x: Tensor) -> Tensor:
        return x + self.f(torch.arange(3.0).to(x))

    def without_some_rows(self, x: Tensor) -> Tensor:
        return x + self.f(torch.eye(3).to(x)).mean(0)

    def broken_for_many(self, x: Tensor) -> Tensor:
        """Something other than the rows goes in beside them, in a large batch."""
        return self.f(x) if len(x) <= 8 else self.f(torch.cat([x, x[:1]]))[:-1]


def odd(use: str, n: int = 9, t: int = 4) -> Case:
    return double(lambda: classes(Odd(use), (t, 3), 2, n=n))


@pytest.mark.parametrize("use", ["usual", "by_keyword"])
def test_usual_uses_have_factors(use: str) -> None:
    assert kronecker(odd(use)).coverage == 1.0


@pytest.mark.parametrize(
    "use",
    [
        "functional",
        "functional_too",
        "positions_first",
        "rows_are_positions",
        "without_rows",
        "without_some_rows",
        "broken_for_many",
    ],
)
@pytest.mark.parametrize("t", [3, 8, 9, 18])
def test_odd_uses_have_an_exact_block_and_a_reason(use: str, t: int) -> None:
    """Also where there are as many positions as rows are probed, or in a chunk."""
    case = odd(use, t=t)
    curvature = kronecker(case)
    kinds = {block.name: block.kind for block in curvature.blocks}
    assert kinds == {"f": "dense", "head": "kronecker"}
    assert len(curvature.notes) == 1
    assert curvature.notes[0].startswith("f (Linear): weight, bias, 12 of 20 parameters")
    at = places(curvature)[[b.name for b in curvature.blocks].index("f")]
    close(curvature.dense()[at[:, None], at], Reference(case).ggn()[at[:, None], at])


def test_a_layer_that_is_never_called_has_no_curvature() -> None:
    case = odd("usual")
    case.model.register_module("unused", nn.Linear(2, 2).double())
    curvature = kronecker(case)
    assert curvature.blocks[-1].name == "unused"
    assert not curvature.blocks[-1].operator.dense().any()
    assert "not called" in curvature.notes[0]


def test_a_tied_embedding_has_no_factors() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 3)
            self.inner = nn.Linear(3, 3)
            self.head = nn.Linear(3, 5)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(self.words(x)))).mean(1)

    data = (torch.randint(5, (7, 4)), labels(7, 5))
    case = double(lambda: Case(Language(), F.cross_entropy, data, data))
    curvature = kronecker(case)
    kinds = {block.name: block.kind for block in curvature.blocks}
    assert kinds == {"inner": "kronecker", "head.bias": "kronecker", "words": "dense"}
    assert "shared with a layer of type Embedding" in curvature.notes[0]
    close(curvature.dense()[:15, :15], Reference(case).ggn()[:15, :15])


def test_tied_weights_are_one_block_and_their_biases_others() -> None:
    curvature = kronecker(make("tied_weights"))
    sizes = {block.name: block.parameters for block in curvature.blocks}
    assert sizes == {"encode.weight": 16, "encode.bias": 4, "again.bias": 4, "head": 15, "Tied": 1}
    # one layer called twice is one block, with its bias
    model = Tied()
    model.again = model.encode
    case = double(lambda: classes(model, (4,), 3))
    assert [b.name for b in kronecker(case).blocks] == ["encode", "head", "Tied"]
    close(kronecker(case).dense(), KroneckerReference(case).dense(True))


def test_groups_are_not_averaged() -> None:
    case = make("conv2d")
    (block, _) = kronecker(case).blocks
    assert block.operator.values.shape == (2, 2, 5)
    dense = block.operator.dense()
    assert not dense[:10, 10:].any()
    assert float((dense[:10, :10] - dense[10:, 10:]).norm()) > 0.1 * float(dense.norm())


def test_frozen_parts_are_left_out() -> None:
    """One layer without its weight, one without its bias."""
    case = make("mlp")
    case.model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    case.model[2].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    sizes = {block.name: block.parameters for block in kronecker(case).blocks}
    assert sizes == {"0": 5, "2": 15}
    for corrected in (True, False):
        wanted = KroneckerReference(case).dense(corrected)
        close(kronecker(case, corrected=corrected).dense(), wanted)
    chosen = KroneckerCurvature(risk_of(make("mlp"), parameters=["0.bias", "2.weight"]))
    close(chosen.dense(), kronecker(case).dense())


def test_parametrised_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    curvature = kronecker(double(lambda: classes(model, (4,), 2)))
    assert {b.name: b.kind for b in curvature.blocks} == {
        "0": "kronecker",  # the bias
        "2": "kronecker",
        "0.parametrizations.weight": "dense",
    }


def test_hooks_of_the_user_are_obeyed_and_kept() -> None:
    case = make("mlp")
    case.model[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))  # type: ignore[index]
    case.model[0].register_forward_hook(lambda _, args, output: 3 * output)  # type: ignore[index]
    close(kronecker(case).dense(), KroneckerReference(case).dense(True))
    assert len(case.model[0]._forward_hooks) == 1  # type: ignore[index]


# --- which roots ---------------------------------------------------------------------------------


def test_sampled_labels_depend_on_row_and_seed_only() -> None:
    case = make("layer_norm")
    options: dict[str, Any] = {"fisher": "sampled", "samples": 3, "seed": 5}
    one, other = (kronecker(case, size, **options).dense() for size in (2, 7))
    close(one, other, 1e-12)
    options["seed"] = 6
    assert float((kronecker(case, **options).dense() - one).norm()) > 1e-3 * float(one.norm())


@pytest.mark.parametrize("name", ["mlp", "one_logit", "regression"])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.slow
def test_sampled_fisher_tends_to_the_exact_one(name: str, corrected: bool) -> None:
    risk = risk_of(make(name))
    exact = KroneckerCurvature(risk, corrected=corrected).dense()
    errors = [
        float((s.dense() - exact).norm() / exact.norm())
        for k in (50, 3200)
        for s in [KroneckerCurvature(risk, corrected=corrected, fisher="sampled", samples=k)]
    ]
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 2.5


def test_losses_that_are_no_likelihood() -> None:
    case = make("mlp")
    case.loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    close(kronecker(case).dense(), KroneckerReference(case).dense(True))
    case.loss = lambda output, target: F.l1_loss(output.sin(), output.cos()) + 0 * target.sum()
    with pytest.raises(ValueError, match="convex"):
        kronecker(case)


def test_log_probabilities_have_a_fisher_matrix() -> None:
    case = make("mlp")
    joined = kronecker(case).dense()
    case.model.append(nn.LogSoftmax(1))  # type: ignore[operator]
    case.loss = F.nll_loss
    close(kronecker(case).dense(), joined)


def test_wide_outputs_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upweight.curvature.form.ROOT_OUTPUTS", 2)
    with pytest.raises(ValueError, match=r"at most 2 numbers .* got 3.*fisher='sampled'"):
        kronecker(make("mlp"))
    kronecker(make("layer_norm"), fisher="sampled", samples=2)


# --- inverses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrected", [True, False])
def test_relative_damping(corrected: bool) -> None:
    case = make("layer_norm")
    curvature = kronecker(case, corrected=corrected)
    dense, passes = curvature.dense(), curvature.passes
    right = torch.randn(curvature.size, 2, dtype=torch.float64)
    scale = 0.1 * float(dense.trace()) / curvature.size
    wanted = torch.linalg.solve(dense + scale * eye(len(dense)), right)
    close(curvature.inverse(0.1, relative="global") @ right, wanted, 1e-8)
    inverse = curvature.inverse(0.1, relative="layer") @ right
    for at in places(curvature):
        own = dense[at[:, None], at]
        own = own + 0.1 * own.diagonal().mean() * eye(len(at))
        close(inverse[at], torch.linalg.solve(own, right[at]), 1e-8)
    assert curvature.passes == passes


def test_singular_inverses_are_refused() -> None:
    curvature = kronecker(make("mlp"))
    with pytest.raises(ValueError, match=r"curvature of 2 .* singular .* larger damping"):
        curvature.inverse(0.0)
    with pytest.raises(ValueError, match="damping"):
        curvature.inverse(-0.1)
    with pytest.raises(ValueError, match="expected relative"):
        curvature.inverse(0.1, relative="block")  # type: ignore[arg-type]
    case = odd("usual")
    case.model.register_module("unused", nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="curvature of unused"):
        kronecker(case).inverse(0.1, relative="layer")
    case32 = make("mlp", torch.float32)
    with pytest.raises(ValueError, match="singular"):
        kronecker(case32).inverse(0.0)


def test_an_inverse_without_damping_where_there_is_one() -> None:
    curvature = kronecker(double(lambda: regression(30)))
    right = torch.randn(curvature.size, 2, dtype=torch.float64)
    close(curvature @ (curvature.inverse(0.0) @ right), right, 1e-6)


def regression(n: int) -> Case:
    return Case(nn.Linear(3, 2), nn.MSELoss(), (draw(n, 3), draw(n, 2)), None)


# --- errors --------------------------------------------------------------------------------------


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="expected other="):
        kronecker(make("mlp"), other="none")
    with pytest.raises(ValueError, match="expected fisher="):
        kronecker(make("mlp"), fisher="true")
    with pytest.raises(ValueError, match="at least one sample"):
        kronecker(make("mlp"), fisher="sampled", samples=0)


def test_a_factor_that_is_not_finite_names_its_layer() -> None:
    case = double(lambda: classes(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), (2,), 2))
    case.model.float()
    with torch.no_grad():
        case.model[0].weight.mul_(1e20)  # type: ignore[index, union-attr]
        case.model[1].weight.mul_(1e-20)  # type: ignore[index, union-attr]
    case.train = (case.train[0].float(), case.train[1])
    with pytest.raises(ValueError, match="curvature of 1 is not finite"):
        kronecker(case)


@pytest.mark.parametrize("fails", ["in the probe", "on the rows"])
def test_the_model_is_untouched_after_an_error(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("batch_norm_and_dropout")
    risk = risk_of(case)
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}

    def broken(*_: object) -> None:
        raise ArithmeticError("on purpose")

    place = {"in the probe": "capture.Capture._failed", "on the rows": "moments.Factors.add"}
    with monkeypatch.context() as patch:
        patch.setattr(f"upweight.curvature.{place[fails]}", broken)
        with pytest.raises(ArithmeticError):
            KroneckerCurvature(risk)
    assert case.model.training
    assert all(module.training for module in case.model.modules())
    assert not any(module._forward_hooks for module in case.model.modules())
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(p.grad is None and p.requires_grad for p in case.model.parameters())
    close(KroneckerCurvature(risk).dense(), KroneckerReference(case).dense(True))


def test_positions_that_depend_on_the_batch_are_told() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            longest = int((x != 0).any(2).sum(1).max())
            return (self.f(x[:, :longest]) * (x[:, :longest] != 0)).sum(1)

    x = draw(6, 4, 2)
    x[:3, 2:] = 0
    case = double(lambda: Case(Padded(), F.cross_entropy, (x, labels(6, 2)), None))
    assert not kronecker(case).notes
    (note,) = kronecker(case, 3).notes
    assert "f: rows have 2 to 4 positions" in note


# --- facts and others ----------------------------------------------------------------------------


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
@pytest.mark.parametrize("build", ["mlp", "conv", "sequence"])
def test_curvlinops_agrees(build: str, loss: str, kind: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")

    def model() -> nn.Module:
        return {
            "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
            "conv": lambda: nn.Sequential(
                nn.Conv2d(1, 2, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
            ),
            "sequence": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), Mean()),
        }[build]()

    shape = {"mlp": (4,), "conv": (1, 2, 2), "sequence": (5, 3)}[build]
    case = double(lambda: classes(model(), shape, 2, n=6))
    x, y = case.train[0].double(), case.train[1]
    function: nn.Module = nn.CrossEntropyLoss()
    if loss == "mse":
        y, function = torch.randn(6, 3, dtype=torch.float64), nn.MSELoss()
    case.train, case.loss = (x, y), function
    cls = {"ekfac": curvlinops.EKFACLinearOperator, "kfac": curvlinops.KFACLinearOperator}[kind]
    parameters = list(case.model.parameters())
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    theirs = cls(
        case.model,
        function,
        parameters,
        batches,
        fisher_type="type-2",
        kfac_approx="expand",
        separate_weight_and_bias=False,
    )
    ours = kronecker(case, corrected=kind == "ekfac")
    columns = torch.randn(ours.size, 2, dtype=torch.float64)
    close(ours @ columns, torch.as_tensor(np.asarray(theirs @ columns)), 1e-9)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(["mlp", "sequence", "conv1d_strided"]),
    corrected=st.booleans(),
)
def test_order_and_copies_of_rows_do_not_matter(seed: int, name: str, corrected: bool) -> None:
    case = make(name)
    wanted = kronecker(case, corrected=corrected).dense()
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(seed))
    twice = torch.cat([order, order.flip(0)])
    case.train = tuple(part[twice] for part in case.train)
    close(kronecker(case, 1 + seed % 9, corrected=corrected).dense(), wanted, 1e-11)


@pytest.fixture(scope="module")
def wine_scores() -> tuple[Tensor, Tensor, Tensor]:
    """Per-row gradients (n, p) and (m, p), and the influence by the exact Hessian (m, n)."""
    case = wine(torch.float64)
    risk = risk_of(case)
    other = uw.EmpiricalRisk(case.model, case.loss, case.test)
    train, test = (torch.cat([g for _, g in r.row_gradients()]) for r in (risk, other))
    return train, test, test @ torch.linalg.solve(uw.Hessian(risk).damped(0.1).dense(), train.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["32", "64"])
def test_mean_influence_on_wine(
    dtype: torch.dtype, wine_scores: tuple[Tensor, Tensor, Tensor]
) -> None:
    """EK-FAC orders rows much as the Hessian does, on another scale."""
    train, test, wanted = wine_scores
    case = wine(dtype)
    inverse = kronecker(case).inverse(0.1)
    scores = (test @ (inverse @ train.T).double()).mean(0)
    mean = wanted.mean(0)
    assert float(((scores - mean) / mean).abs().mean()) == pytest.approx(3.324, abs=5e-3)
    assert float(torch.corrcoef(torch.stack([scores, mean]))[0, 1]) == pytest.approx(
        0.979, abs=1e-3
    )
    ranks = torch.stack([scores.argsort().argsort(), mean.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) == pytest.approx(0.919, abs=1e-3)


def test_one_row_without_positions_is_exact_for_one_layer() -> None:
    """With one row and one position, G ⊗ A is the GGN."""
    case = make("one_row_each")
    for corrected in (True, False):
        close(kronecker(case, corrected=corrected).dense(), Reference(case).ggn())
    assert math.isclose(kronecker(case).coverage, 1.0)
