"""What hooks capture, against gradients of single rows by plain autograd, layer type by type."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import upweight as uw
from cases import CASES, Case, classes, labels, make
from reference import Reference
from upweight.curvature.capture import Capture, find_capture
from upweight.curvature.coverage import coverage
from upweight.curvature.exact import GGN, Fisher
from upweight.curvature.form import OutputForm
from upweight.curvature.kronecker import KroneckerCurvature
from upweight.curvature.onehot import OneHot, row_gradients
from upweight.language import extra


def risk_of(case: Case, **options: object) -> uw.EmpiricalRisk:
    return uw.EmpiricalRisk(case.model, case.loss, case.train, **case.options, **options)


def gradients(capture: Capture, form: OutputForm) -> Iterator[tuple[int, Tensor]]:
    """Of a chunk and some of its roots, the first row and (k, b, p); zero where nothing is seen."""
    risk = capture.risk
    for chunk, piece in capture.pieces(form):
        slopes = [g for g in piece.slopes if g is not None]
        out = torch.zeros(*slopes[0].shape[:2], risk.p, dtype=risk.dtype)
        for site, a, g in zip(capture.sites, piece.inputs, piece.slopes, strict=True):
            if a is not None and g is not None:
                out[:, :, site.entries] = row_gradients(a, g).flatten(2)
                ordered = site.gradients(a, g)
                assert torch.equal(out[:, :, site.entries.sort().values], ordered)
        yield chunk.start, out


def captured(risk: uw.EmpiricalRisk) -> Tensor:
    """∇ℓ of every row, (n, p)."""
    capture = find_capture(risk)[0].whole()
    form = Fisher(risk, "empirical").form
    return torch.cat([g[0] for _, g in gradients(capture, form)])


def seen(capture: Capture) -> list[str]:
    return [name for site in capture.whole().sites for name in site.names if name is not None]


def entries(risk: uw.EmpiricalRisk, names: list[str]) -> Tensor:
    ones = {n: torch.full(s, float(n in names)) for n, s in zip(
        risk.model.names, risk.model.shapes, strict=True)}  # fmt: skip
    return risk.model.flatten(ones).bool()


def close(got: Tensor, wanted: Tensor, rtol: float = 1e-10) -> None:
    assert float((got.double() - wanted).norm()) <= rtol * float(wanted.norm())


def agree(case: Case, hidden: set[str] = frozenset(), batch_size: int | None = 3) -> None:
    """Gradients of rows, and Σ_k of their squares for exact roots, of all but the hidden."""
    risk = risk_of(case, batch_size=batch_size)
    capture, reasons = find_capture(risk)
    assert set(risk.model.names) - set(seen(capture)) == set(hidden)
    factored = {name for site in capture.sites for name in site.names}
    assert set(reasons) == set(risk.model.names) - factored
    visible = entries(risk, seen(capture))
    reference = Reference(case)
    close(captured(risk)[:, visible], reference.gradients(reference.train, case.n)[:, visible])
    form = GGN(risk).form
    total = sum(torch.einsum("kbp,kbq->pq", g, g) for _, g in gradients(capture.whole(), form))
    close(total[visible][:, visible] / case.n, reference.ggn()[visible][:, visible])


def double(build: Callable[[], Case]) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        case = build()
    case.model.double()
    return case


# --- layer by layer ------------------------------------------------------------------------------

LSTM = {f"lstm.{kind}_{to}_l0" for kind in ("weight", "bias") for to in ("ih", "hh")}
ATTENTION = {f"layer.self_attn.{n}" for n in (
    "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")}  # fmt: skip
HIDDEN = {"lstm": LSTM, "attention": ATTENTION, "tied_weights": {"scale"}}


@pytest.mark.parametrize("name", sorted(CASES))
def test_table_of_cases(name: str) -> None:
    agree(make(name), HIDDEN.get(name, set()))


class Conv1D(nn.Module):
    """A linear layer with its weight transposed, as in GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class TinyRMSNorm(nn.Module):
    """As language models have it; `offset` 1 in some."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))
        self.variance_epsilon = 1e-3
        self.offset = offset

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        x = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.offset + self.weight) * x


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Of(nn.Module):
    """Layers by name, and how they are called."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def randomised(module: nn.Module) -> nn.Module:
    """Weights of normalisations that are not all one, statistics that are not those of rows."""
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    return module


def words(model: nn.Module, size: int = 6, t: int = 4, n: int = 7) -> Case:
    return Case(model, F.cross_entropy, (torch.randint(size, (n, t)), labels(n, 2)), None)


def normed(norm: nn.Module, shape: tuple[int, ...], width: int) -> Case:
    """A convolution or linear layer, a norm, a nonlinearity, a head."""
    first = nn.Conv2d(shape[0], shape[0], 1) if len(shape) == 3 else nn.Linear(shape[-1], shape[-1])
    layers = [first, randomised(norm), nn.Tanh(), nn.Flatten(), nn.Linear(width, 2)]
    return classes(nn.Sequential(*layers), shape, 2)


def tied(bias: bool) -> Case:
    """A head tied to the embedding, called twice, with a label at every position."""

    def call(m: Any, ids: Tensor) -> Tensor:
        h = torch.tanh(m.inner(m.words(ids)) + m.words(ids.flip(1)))
        return m.head(h).transpose(1, 2)

    model = Of(
        call, words=nn.Embedding(5, 3), inner=nn.Linear(3, 3), head=nn.Linear(3, 5, bias=bias)
    )
    model.head.weight = model.words.weight
    rows = torch.randint(5, (6, 4)), torch.randint(5, (6, 4))
    return Case(model, F.cross_entropy, rows, None)


def positioned(ids: Callable[[Tensor], Tensor]) -> Case:
    """Positions that are embedded once for all rows."""
    model = Of(
        lambda m, x: m.head(m.norm(torch.tanh(m.words(x) + m.places(ids(x)))).mean(1)),
        words=nn.Embedding(6, 3),
        places=nn.Embedding(4, 3),
        norm=nn.LayerNorm(3),
        head=nn.Linear(3, 2),
    )
    return words(model)


def checkpointed() -> Case:
    block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh())
    return classes(
        Of(
            lambda m, x: m.head(checkpoint(m.block, x, use_reentrant=False)),
            block=block,
            head=nn.Linear(4, 2),
        ),
        (4,),
        2,
    )


def frozen(case: Case, *names: str) -> Case:
    for name in names:
        case.model.get_parameter(name).requires_grad_(False)
    return case


def conv1d_layers() -> nn.Module:
    return nn.Sequential(Conv1D(4, 3), nn.Tanh(), Mean(), nn.Linear(4, 2))


TYPES: dict[str, Callable[[], Case]] = {
    "transposed": lambda: classes(conv1d_layers(), (5, 3), 2),
    "transposed without bias": lambda: frozen(classes(conv1d_layers(), (5, 3), 2), "0.bias"),
    "transposed without weight": lambda: frozen(classes(conv1d_layers(), (5, 3), 2), "0.weight"),
    "layer norm": lambda: normed(nn.LayerNorm(4), (3, 4), 12),
    "layer norm, two dimensions": lambda: normed(nn.LayerNorm((3, 4)), (3, 4), 12),
    "layer norm, no bias": lambda: normed(nn.LayerNorm(4, bias=False), (3, 4), 12),
    "bias of a norm alone": lambda: frozen(normed(nn.LayerNorm(4), (3, 4), 12), "1.weight"),
    "scale of a norm alone": lambda: frozen(normed(nn.LayerNorm(4), (3, 4), 12), "1.bias"),
    "rms norm": lambda: normed(nn.RMSNorm(4), (3, 4), 12),
    "rms norm of others": lambda: normed(TinyRMSNorm(4), (3, 4), 12),
    "rms norm with offset": lambda: normed(TinyRMSNorm(4, 1.0), (3, 4), 12),
    "group norm": lambda: normed(nn.GroupNorm(2, 4), (4, 2, 3), 24),
    "batch norm 1d": lambda: normed(nn.BatchNorm1d(4), (4,), 4),
    "batch norm 1d, positions": lambda: normed(nn.BatchNorm1d(3), (3, 4), 12),
    "batch norm 2d": lambda: normed(nn.BatchNorm2d(2), (2, 2, 3), 12),
    "batch norm 3d": lambda: classes(
        nn.Sequential(nn.Conv3d(2, 2, 1), randomised(nn.BatchNorm3d(2)), nn.Flatten(),
                      nn.Linear(16, 2)), (2, 2, 2, 2), 2),
    "norm called twice": lambda: classes(
        Of(lambda m, x: m.f(m.norm(torch.tanh(m.f(m.norm(x))))).mean(1),
           f=nn.Linear(4, 4), norm=randomised(nn.LayerNorm(4))), (3, 4), 2),
    "relu in place": lambda: classes(
        nn.Sequential(nn.Conv2d(2, 4, 2, groups=2, dilation=2), nn.BatchNorm2d(4),
                      nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 2)), (2, 4, 4), 2),
    "padding": lambda: words(
        nn.Sequential(nn.Embedding(6, 3, padding_idx=2), nn.Tanh(), Mean(), nn.Linear(3, 2))),
    "embedding called twice": lambda: words(
        Of(lambda m, x: m.f(m.e(x) * m.e(x.flip(1))).mean(1), e=nn.Embedding(6, 3),
           f=nn.Linear(3, 2))),
    "one token": lambda: Case(
        nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, 2)), F.cross_entropy,
        (torch.randint(6, (7,)), labels(7, 2)), None),
    "positions (1, t)": lambda: positioned(lambda x: torch.arange(x.shape[1])[None]),
    "positions (t,)": lambda: positioned(lambda x: torch.arange(x.shape[1])),
    "positions (b, t)": lambda: positioned(lambda x: torch.arange(x.shape[1]).expand(x.shape)),
    "tied head": lambda: tied(False),
    "tied head with bias": lambda: tied(True),
    "checkpointed": checkpointed,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TYPES))
@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_types_of_layers(name: str, batch_size: int | None) -> None:
    agree(double(TYPES[name]), batch_size=batch_size)


@pytest.mark.parametrize("name", ["tied head", "embedding called twice", "transposed"])
def test_one_root_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upweight.curvature.capture.CHUNK_BYTES", 1)
    agree(double(TYPES[name]))


def test_what_is_called_once_for_all_rows_and_not_by_position() -> None:
    """A table of biases by (t, t) cannot be repeated for every row."""

    def call(m: Any, x: Tensor) -> Tensor:
        near = (torch.arange(4)[:, None] - torch.arange(4)).abs()
        return m.head((m.near(near).permute(2, 0, 1)[0] @ torch.tanh(m.words(x))).mean(1))

    layers = {"words": nn.Embedding(6, 3), "near": nn.Embedding(4, 1), "head": nn.Linear(3, 2)}
    case = double(lambda: words(Of(call, **layers)))
    agree(case, {"near.weight"})
    table = coverage(risk_of(case)).set_index("module")
    assert table.loc["near", "how"] == "autodiff"
    assert "no dimension for the rows" in table.loc["near", "why"]


def test_as_many_rows_as_positions() -> None:
    """(t,) positions are told from (b,) tokens, whatever the size of a chunk."""
    case = double(lambda: positioned(lambda x: torch.arange(x.shape[1])))
    agree(case, batch_size=4)  # t = 4
    case = double(lambda: words(TYPES["positions (t,)"]().model, n=4))
    agree(case, batch_size=None)


def test_a_single_row_is_not_enough_for_positions() -> None:
    case = double(lambda: words(TYPES["positions (t,)"]().model, n=1))
    agree(case, {"places.weight"})


def test_only_one_gradient_is_computed_and_none_by_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one root there is no vmap, and the graph is freed at once."""
    risk = risk_of(make("attention"))
    capture = find_capture(risk)[0].whole()
    calls: list[dict[str, Any]] = []
    original = torch.autograd.grad

    def grad(output: Tensor, inputs: Any, *args: Any, **options: Any) -> Any:
        calls.append(options)
        assert not any(isinstance(one, Tensor) and one.numel() > 1 for one in inputs)
        return original(output, inputs, *args, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(risk.autodiff, "rows", None)
    form = Fisher(risk, "sampled").form
    assert len(list(capture.pieces(form))) == len(calls) == 1
    assert not calls[0]["retain_graph"]


def test_fused_attention_is_used_for_one_root() -> None:
    flags: list[bool] = []

    def call(m: Any, x: Tensor) -> Tensor:
        flags.append(torch.backends.cuda.flash_sdp_enabled())
        h = m.f(x)
        return m.head(F.scaled_dot_product_attention(h, h, h).mean(1))

    case = double(lambda: classes(Of(call, f=nn.Linear(4, 4), head=nn.Linear(4, 2)), (3, 4), 2))
    agree(case)
    risk = risk_of(case)
    capture, _ = find_capture(risk)
    flags.clear()
    list(capture.pieces(Fisher(risk, "empirical").form))
    assert flags == [True]
    list(capture.pieces(GGN(risk).form))
    assert flags == [True, False]


# --- precision and errors ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "name",
    ["transposed", "layer norm", "batch norm 2d", "padding", "tied head", "positions (1, t)"],
)
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    case = double(TYPES[name])
    case.model.to(dtype)  # the reference has the same rounded weights, in float64
    reference = Reference(case)
    wanted = reference.gradients(reference.train, case.n)
    got = captured(risk_of(case))
    assert got.dtype == torch.float32
    close(got, wanted, 0.05 if dtype == torch.bfloat16 else 1e-5)


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()  # at 0 the derivative is ∞ · 0


def test_what_is_not_finite_names_layer_and_row() -> None:
    case = double(lambda: classes(nn.Sequential(nn.Linear(2, 2), Root(), nn.Linear(2, 2)), (2,), 2))
    with torch.no_grad():
        case.model[0].weight.copy_(torch.eye(2))  # type: ignore[index, union-attr]
        case.model[0].bias.zero_()  # type: ignore[index, union-attr]
        case.train[0].abs_().add_(0.1)
    case.train = (case.train[0].double(), case.train[1])
    risk = risk_of(case, batch_size=3)
    capture, _ = find_capture(risk)
    case.train[0][4, 1] = 0.0
    other = uw.EmpiricalRisk(case.model, case.loss, case.train, batch_size=3)
    with pytest.raises(ValueError, match=r"derivatives of layer 0 .* 1 of the rows 3 to 5.*row 4"):
        list(capture.over(other).pieces(Fisher(other, "empirical").form))


def test_inputs_that_are_not_finite_although_the_loss_is() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.where(x > 0, torch.tanh(m.f(x.log())), torch.zeros_like(x)))

    case = double(lambda: classes(Of(call, f=nn.Linear(2, 2), head=nn.Linear(2, 2)), (2,), 2))
    case.train[0].abs_().add_(0.1)
    capture, _ = find_capture(risk_of(case))
    case.train[0][5] = -1.0
    other = risk_of(case, batch_size=4)
    with pytest.raises(ValueError, match=r"inputs of layer f .* 1 of the rows 4 to 6, first .* 5"):
        list(capture.over(other).pieces(Fisher(other, "empirical").form))


def test_large_and_finite_is_taken() -> None:
    case = double(lambda: classes(nn.Linear(2, 2, bias=False), (2,), 2, n=8))
    case.model.float()
    with torch.no_grad():
        case.model.weight.zero_()
    case.train = (torch.full((8, 2), 1e38), case.train[1])  # their sum overflows
    risk = risk_of(case)
    (piece,) = [p for _, p in find_capture(risk)[0].pieces(Fisher(risk, "empirical").form)]
    assert piece.inputs[0] is not None


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["relu in place", "padding", "tied head", "checkpointed"])
def test_the_model_is_untouched(name: str, fails: bool) -> None:
    case = double(TYPES[name])
    case.model.train()
    before = copy.deepcopy(case.model.state_dict())
    risk = risk_of(case, batch_size=2)
    capture = find_capture(risk)[0].whole()
    pieces = capture.pieces(Fisher(risk, "empirical").form)
    next(pieces)
    if fails:
        handle = case.model.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(pieces)
        handle.remove()
    for module in case.model.modules():
        assert module.training
        assert not module._forward_hooks
    assert all(p.grad is None and p.requires_grad for p in case.model.parameters())
    for key, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, before[key])
        assert tensor.dtype == before[key].dtype


# --- tokens, and sides that are too wide ---------------------------------------------------------


def test_gradients_by_tokens_equal_those_by_unit_vectors() -> None:
    torch.manual_seed(0)
    tokens = OneHot(torch.randint(5, (4, 7)), 5)
    g = torch.randn(3, 4, 7, 1, 2, dtype=torch.float64)
    units = tokens.dense(torch.float64)
    assert units.shape == tokens.shape
    close(row_gradients(tokens, g), row_gradients(units, g))


def test_embeddings_are_seen_by_hooks() -> None:
    capture, reasons = find_capture(risk_of(double(TYPES["padding"])))
    assert [site.name for site in capture.rests] == ["0"]
    assert set(reasons) == {"0.weight"}


def test_wide_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upweight.curvature.sites.WIDE", 4)
    capture, _ = find_capture(risk_of(make("mlp")))
    assert [site.wide for site in capture.sites] == [(True, True), (False, True)]  # 5 × 5, 3 × 6
    # Λ is the exact diagonal of the block in the basis U_G ⊗ I
    case = make("mlp")
    curvature = KroneckerCurvature(risk_of(case))
    block = curvature.blocks[1]
    assert block.operator.right is None
    assert block.operator.left is not None
    basis = torch.kron(block.operator.left[0], torch.eye(6, dtype=torch.float64))
    exact = Reference(case).ggn()[block.entries[:, None], block.entries]
    close(block.operator.values.flatten(), (basis.T @ exact @ basis).diagonal())
    first = curvature.blocks[0]
    exact = Reference(case).ggn().diagonal()[first.entries]
    close(first.operator.values.flatten(), exact)


def test_a_transposed_layer_has_the_curvature_of_a_linear_one() -> None:
    case = double(TYPES["transposed"])
    curvature = KroneckerCurvature(risk_of(case))
    assert curvature.coverage == 1.0
    same = copy.deepcopy(case)
    linear = nn.Linear(3, 4).double()
    with torch.no_grad():
        linear.weight.copy_(case.model[0].weight.T)  # type: ignore[index, union-attr]
        linear.bias.copy_(case.model[0].bias)  # type: ignore[index, union-attr]
    same.model[0] = linear  # type: ignore[index, operator]
    order = torch.arange(curvature.size)
    order[:12] = torch.arange(12).view(3, 4).T.flatten()
    wanted = KroneckerCurvature(risk_of(same)).dense()
    close(curvature.dense()[order][:, order], wanted)


# --- coverage ------------------------------------------------------------------------------------


def test_coverage() -> None:
    table = coverage(risk_of(make("attention")))
    assert list(table.columns) == ["module", "type", "parameters", "how", "why"]
    assert table["parameters"].sum() == risk_of(make("attention")).p
    how = dict(zip(table["module"], table["how"], strict=True))
    assert how == {
        "layer.self_attn": "autodiff",
        "layer.self_attn.out_proj": "autodiff",
        "layer.linear1": "kronecker",
        "layer.linear2": "kronecker",
        "layer.norm1": "hooks",
        "layer.norm2": "hooks",
        "head": "kronecker",
    }
    assert table["why"].str.len().min() > 0


@pytest.mark.slow
def test_a_language_model_of_others() -> None:
    transformers = extra.transformers()
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2, use_cache=False
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(11, (5, 6))
    forward: Any = lambda m, batch: m(input_ids=batch[0]).logits.transpose(1, 2)  # noqa: E731
    case = Case(model.double(), F.cross_entropy, (ids, ids.roll(-1, 1)), None, forward=forward,
                default_adapters=False)  # fmt: skip
    risk = risk_of(case)
    capture, _ = find_capture(risk)
    assert set(seen(capture)) == set(risk.model.names)
    assert [s.mixed for s in capture.rests if "wte" in s.name] == [True]
    reference = Reference(case)
    close(captured(risk), reference.gradients(reference.train, case.n))
