"""Predicted removals: against dense Newton steps and retraining; every form of a group of rows."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import upweight as uw
import upweight.prediction
from cases import Case, make
from matrices import draw, off
from reference import Reference
from upweight.drops import masks_of

DAMPING = 0.05
GROUPS = {"one": [1], "three": [0, 2, 5], "most": [0, 1, 2, 3, 4]}


def fit(case: Case, method: Any = "direct", curvature: str = "ggn", **options: Any) -> uw.Influence:
    influence = uw.Influence(
        case.model,
        case.loss,
        method,
        curvature=curvature,
        damping=options.pop("damping", DAMPING),
        **case.options,
        **options,
    )
    return influence.fit(case.train)


def dense_after(
    case: Case, dropped: list[int], kind: str = "ggn", damping: float = DAMPING
) -> Tensor:
    """The test losses at θ − (C_S + λI)⁻¹ (∇L_S − ∇L), written out."""
    reference = Reference(case)
    kept = [i for i in range(case.n) if i not in dropped]
    gradients = reference.gradients(reference.train, case.n)
    change = gradients[kept].mean(0) - gradients.mean(0)
    own = copy.copy(case)
    own.train = torch.utils._pytree.tree_map(lambda leaf: leaf[kept], case.train)
    curvature = Reference(own).curvature(kind)
    step = -torch.linalg.solve(curvature + damping * torch.eye(len(change)).double(), change)
    start = 0
    for parameter in reference.theta:
        size = parameter.numel()
        parameter.data += step[start : start + size].view_as(parameter)
        start += size
    return reference.losses(reference.test, case.m)


def test_one_newton_step_of_every_case(case: Case) -> None:
    if case.n == 1:
        with pytest.raises(ValueError, match="drops all 1 rows"):
            fit(case).predict(case.test, [0])
        return
    groups = {"one": [0], "two": [1, 2]} if case.n < 7 else GROUPS
    influence = fit(case)
    found = influence.predict(case.test, groups, rtol=1e-10)
    reference = Reference(case)
    assert off(found.before, reference.losses(reference.test, case.m)) < 1e-12
    for after, rows in zip(found.after, groups.values(), strict=True):
        assert off(after, dense_after(case, rows)) < 1e-8
    assert found.dropped.tolist() == [len(rows) for rows in groups.values()]
    assert found.certificate.columns == len(groups)
    assert found.certificate.residual_max < 2e-10
    assert found.certificate.converged


def test_the_sum_of_influences() -> None:
    """1/|S| Σ_{i∉S} (I[j, i] − Ī[j])."""
    case = make("mlp")
    influence = fit(case)
    scores = influence.scores(case.test).values
    found = influence.predict(case.test, GROUPS)
    first = influence.predict(case.test, GROUPS, order="first")
    for g, rows in enumerate(GROUPS.values()):
        total = (scores[:, rows] - scores.mean(1, keepdim=True)).sum(1) / (case.n - len(rows))
        assert off(found.first_order[g] - found.before, total) < 1e-10
        assert off(first.change[g], total) < 1e-10
    assert torch.equal(first.after, first.first_order)
    assert bool(first.nonlinearity.isnan().all())


METHODS: dict[str, Any] = {
    "cg": uw.CG(),
    "cg+direct": uw.CG("direct"),
    "ekfac": uw.EKFAC(),
    "arnoldi": uw.Arnoldi(rank=5),
    "arnoldi-test": uw.Arnoldi(rank=5, start="test"),
    "nystroem": uw.Nystroem(rank=5),
    "lissa": uw.LiSSA(),
    "auto": "auto",
    "jacobi": uw.Jacobi(),
}


@pytest.mark.parametrize("name", [*METHODS, "blocks", "blocks of cg"])
def test_the_step_is_that_of_the_exact_curvature_whatever_the_method(name: str) -> None:
    case = make("mlp")
    options = {"blocks": "layer"} if name.startswith("blocks") else {}
    method = METHODS.get(name) or {"blocks": "direct", "blocks of cg": "cg"}[name]
    wanted = fit(case).predict(case.test, GROUPS, rtol=1e-9)
    influence = fit(case, method, **options)
    before = str(influence.certificate)
    assert off(influence.predict(case.test, GROUPS, rtol=1e-9).change, wanted.change) < 1e-7
    assert off(influence.predict(case.test, GROUPS).change, wanted.change) < 2e-3
    assert str(influence.certificate) == before


@pytest.mark.parametrize("name", ["direct", "cg", "nystroem"])
def test_the_hessian(name: str) -> None:
    case = make("mlp")
    method = {"nystroem": uw.Nystroem(rank=5)}.get(name, name)
    found = fit(case, method, "hessian", damping=1.0).predict(case.test, GROUPS, rtol=1e-10)
    for after, rows in zip(found.after, GROUPS.values(), strict=True):
        assert off(after, dense_after(case, rows, "hessian", 1.0)) < 1e-8


@pytest.mark.filterwarnings("ignore::upweight.IndefiniteCurvatureWarning")
@pytest.mark.parametrize("name", ["direct", "cg", "nystroem"])
def test_an_indefinite_hessian_has_no_newton_step(name: str) -> None:
    case = make("mlp")
    method = {"nystroem": uw.Nystroem(rank=40)}.get(name, name)
    influence = fit(case, method, "hessian", damping=1e-3)
    with pytest.raises(uw.NegativeCurvatureError, match=r"indefinite.*curvature='ggn'"):
        influence.predict(case.test, GROUPS, rtol=1e-10)


def test_ridge_regression_is_retrained_exactly() -> None:
    """A quadratic loss with weight decay λ has its minimum one Newton step away."""
    x, y, x_test, y_test = draw(20, 3), draw(20, 2, seed=1), draw(6, 3, seed=2), draw(6, 2, seed=3)

    def trained(rows: list[int]) -> nn.Linear:
        # mse means over the 2 outputs: the curvature of a row is x xᵀ
        a = torch.cat([x[rows], torch.ones(len(rows), 1).double()], dim=1)
        inverse = torch.linalg.inv(a.T @ a / len(rows) + DAMPING * torch.eye(4).double())
        weights = inverse @ (a.T @ y[rows] / len(rows))
        model = nn.Linear(3, 2).double()
        model.load_state_dict({"weight": weights[:3].T, "bias": weights[3]})
        return model

    influence = uw.Influence(trained(list(range(20))), F.mse_loss, damping=DAMPING).fit((x, y))
    groups = [[0], [1, 2, 3], list(range(10, 20))]
    found = influence.predict((x_test, y_test), groups, rtol=1e-12)
    for after, rows in zip(found.after, groups, strict=True):
        model = trained([i for i in range(20) if i not in rows])
        with torch.no_grad():
            losses = F.mse_loss(model(x_test), y_test, reduction="none").mean(1)
        assert off(after, losses) < 1e-11
    # to the tolerance of itself otherwise
    assert off(influence.predict((x_test, y_test), groups).change, found.change) < 2e-4


def solved_logistic(x: Tensor, y: Tensor, decay: float) -> nn.Linear:
    """Softmax regression with weight decay at its minimum, by Newton steps."""
    model = nn.Linear(x.shape[1], int(y.max()) + 1).double()
    theta = torch.zeros(sum(p.numel() for p in model.parameters())).double()

    def objective(flat: Tensor) -> Tensor:
        weight = flat[: model.weight.numel()].view_as(model.weight)
        loss = F.cross_entropy(x @ weight.T + flat[model.weight.numel() :], y)
        return loss + decay / 2 * flat.square().sum()

    for _ in range(30):
        slope = torch.autograd.functional.jacobian(objective, theta)
        hessian = torch.autograd.functional.hessian(objective, theta)
        theta = theta - torch.linalg.solve(hessian, slope)
    nn.utils.vector_to_parameters(theta, model.parameters())
    return model


def test_logistic_regression_comes_near_retraining() -> None:
    x = draw(220, 4)
    y = (x @ draw(4, 3, seed=1) + draw(220, 3, seed=2)).argmax(1)
    train, test = (x[:200], y[:200]), (x[200:], y[200:])
    model = solved_logistic(*train, decay=DAMPING)
    influence = uw.Influence(model, F.cross_entropy, damping=DAMPING).fit(train)
    groups = [[0], list(range(10)), list(range(60))]
    found = influence.predict(test, groups)
    for g, rows in enumerate(groups):
        kept = [i for i in range(200) if i not in rows]
        again = solved_logistic(x[kept], y[kept], decay=DAMPING)
        with torch.no_grad():
            actual = F.cross_entropy(again(test[0]), test[1], reduction="none")
        step = off(found.change[g], actual - found.before)
        sums = off(found.first_order[g] - found.before, actual - found.before)
        assert step < (0.02, 0.1, 0.3)[g]
        assert step < sums


# --- what does not matter
# -------------------------------------------------------------------------------


@pytest.mark.slow
def test_batches_and_blocks_of_groups_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("mlp")
    wanted = fit(case).predict(case.test, GROUPS, rtol=1e-10)
    monkeypatch.setattr(upweight.prediction, "STEP_BYTES", 1)
    for batch_size in (1, 4):
        found = fit(case, batch_size=batch_size).predict(case.test, GROUPS, rtol=1e-10)
        assert off(found.change, wanted.change) < 1e-8
        assert off(found.first_order, wanted.first_order) < 1e-10
        assert off(found.nonlinearity, wanted.nonlinearity) < 1e-7
        assert found.certificate.columns == wanted.certificate.columns == 3


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_the_order_of_groups_and_rows_does_not_matter(data: st.DataObject) -> None:
    case = make("regression")
    masks = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.booleans(), min_size=7, max_size=7).filter(lambda m: 0 < sum(m) < 7),
                min_size=2,
                max_size=4,
            )
        )
    )
    groups = torch.tensor(data.draw(st.permutations(range(len(masks)))))
    rows = torch.tensor(data.draw(st.permutations(range(7))))
    wanted = fit(case).predict(case.test, masks, rtol=1e-10)
    case.train = tuple(t[rows] for t in case.train)
    found = fit(case).predict(case.test, masks[groups][:, rows], rtol=1e-10)
    assert off(found.after, wanted.after[groups]) < 1e-8


@pytest.mark.parametrize("name", ["mlp", "batch_norm_and_dropout", "conv2d", "positions"])
def test_float32(name: str) -> None:
    case = make(name, torch.float32)
    with_drop = {k: v for k, v in GROUPS.items() if k != "most"}
    found = fit(case).predict(case.test, with_drop)
    assert found.after.dtype == torch.float64
    for after, rows in zip(found.change, with_drop.values(), strict=True):
        wanted = dense_after(case, rows) - Reference(case).losses(Reference(case).test, case.m)
        assert off(after, wanted) < 1e-3


def test_the_model_is_not_touched() -> None:
    case = make("batch_norm_and_dropout")
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    influence = fit(case)
    influence.scores(case.test)
    told = influence.certificate.to_dict()
    influence.predict(case.test, GROUPS)
    assert case.model.training
    assert all(p.grad is None for p in case.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())
    assert influence.certificate.to_dict() == told
    with torch.no_grad():
        next(case.model.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="changed since fit"):
        influence.predict(case.test, GROUPS)


# --- what is measured, and what it says of itself
# -------------------------------------------------------------------------------


def test_what_is_measured_of_a_test_row() -> None:
    case = make("mlp")
    influence = fit(case)
    margin = influence.predict(case.test, GROUPS, test_loss="margin")
    own = influence.predict(case.test, GROUPS, test_loss=lambda z, y: -uw.margin(z, y))
    assert torch.equal(margin.after, own.after)
    with torch.no_grad():
        assert (
            off(-margin.before, uw.margin(case.model(case.test[0].double()), case.test[1])) < 1e-12
        )


def test_tables_and_text() -> None:
    case = make("mlp")
    names = [f"<b>{i}" for i in range(case.m)]
    found = fit(case).predict(case.test, {"<i>a": [1], "b": [2, 3]}, names=names)
    frame = found.to_frame()
    assert len(frame) == 2 * case.m
    line = frame[(frame["group"] == "b") & (frame["test_row"] == "<b>3")].iloc[0]
    assert line["after"] == float(found.after[1, 3])
    assert line["change"] == pytest.approx(line["after"] - float(found.before[3]))
    assert line["first_order"] == pytest.approx(float(found.first_order[1, 3] - found.before[3]))
    summary = found.summary()
    assert summary.loc["b", "rows"] == 2
    assert summary.loc["b", "change"] == pytest.approx(float(found.change[1].mean()))
    assert "2 group(s) removed" in repr(found)
    assert "<i>" not in found._repr_html_()
    assert found.certificate.products > 0


def test_steps_that_run_out_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("mlp")
    monkeypatch.setattr(upweight.prediction, "MAX_STEPS", 2)
    with pytest.warns(uw.ResidualWarning, match="2 steps were not enough"):
        found = fit(case, "cg", damping=1e-4).predict(case.test, GROUPS)
    assert found.certificate.converged is False


def test_first_order_measures_what_an_approximation_leaves() -> None:
    case = make("mlp")
    found = fit(case, uw.EKFAC()).predict(case.test, GROUPS, order="first")
    assert found.certificate.measured == 3
    assert found.certificate.residual_max > 1e-3


# --- forms of a group
# -------------------------------------------------------------------------------

NAMES = pd.Index(list("abcdefg"))
MASK = np.array([False, True, True, False, False, True, False])
SAME = {
    "list": [1, 2, 5],
    "other order": [5, 1, 2],
    "tuple": (1, 2, 5),
    "range and set": {1, 2, 5},
    "generator": (i for i in (1, 2, 5)),
    "numpy": np.array([1, 2, 5], dtype=np.uint8),
    "torch": torch.tensor([1, 2, 5]),
    "zero-dimensional tensors": [torch.tensor(1), torch.tensor(2), torch.tensor(5)],
    "series": pd.Series([1, 2, 5], index=[7, 8, 9]),
    "nullable integers": pd.Series([1, 2, 5], dtype="Int64"),
    "integers as objects": np.array([1, 2, 5], dtype=object),
    "index": pd.Index([1, 2, 5]),
    "names": ["b", "c", "f"],
    "names in numpy": np.array(["b", "c", "f"]),
    "names in a series": pd.Series(["b", "c", "f"]),
    "index of names": pd.Index(["b", "c", "f"]),
    "mask": MASK,
    "mask as a list": MASK.tolist(),
    "mask in torch": torch.from_numpy(MASK),
    "mask in a series": pd.Series(MASK),
    "mask with names": pd.Series(MASK, index=NAMES),
    "nullable booleans": pd.Series(MASK, dtype="boolean"),
    "one group": [[1, 2, 5]],
    "one group by name": {"g": ["b", "c", "f"]},
    "one mask": MASK[None],
    "one mask in torch": torch.from_numpy(MASK)[None],
    "list of masks": [MASK],
    "list of series": [pd.Series(MASK)],
    "list of sets": [{1, 2, 5}],
    "matrix of positions": torch.tensor([[1, 2, 5]]),
}


@pytest.mark.parametrize("form", SAME)
def test_every_form_of_a_group(form: str) -> None:
    masks, groups = masks_of(SAME[form], NAMES)
    assert masks.dtype == torch.bool
    assert masks.tolist() == [MASK.tolist()]
    assert list(groups) == (["g"] if form == "one group by name" else [0])


def test_several_groups() -> None:
    wanted = [[i in rows for i in range(7)] for rows in ([0], [1, 2], [6])]
    for drop in (
        [[0], [1, 2], [6]],
        [["a"], ["b", "c"], ["g"]],
        [np.array([0]), (1, 2), torch.tensor([6])],
        np.array(wanted),
        torch.tensor(wanted),
        {"x": [0], ("y", 1): ["b", "c"], 3: [6]},
    ):
        masks, groups = masks_of(drop, NAMES)
        assert masks.tolist() == wanted
        assert list(groups) == (list(drop) if isinstance(drop, dict) else [0, 1, 2])


def test_a_name_stands_for_all_rows_that_have_it() -> None:
    masks, _ = masks_of(["a"], pd.Index(["a", "b", "a"]))
    assert masks.tolist() == [[True, False, True]]


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "beyond": ([7], IndexError, "from 0 to 6; got 7 to 7"),
    "negative": ([-1], IndexError, "from 0 to 6"),
    "twice": ([1, 1], ValueError, "position 1 comes 2 times"),
    "zeros and ones": ([0, 1, 1, 0, 0, 1, 0], ValueError, "A mask has booleans, not 0 and 1"),
    "none": ([], ValueError, "group 0 drops no row"),
    "no groups": ({}, ValueError, "at least one group"),
    "no masks": (torch.zeros(0, 7, dtype=torch.bool), ValueError, "at least one group"),
    "an empty group": ({"a": [1], "b": []}, ValueError, "group 'b' drops no row"),
    "all": (list(range(7)), ValueError, "drops all 7 rows"),
    "all by mask": ([True] * 7, ValueError, "drops all 7 rows"),
    "short mask": (MASK[:-1], ValueError, r"mask of shape \(7,\)"),
    "long masks": (np.zeros((2, 8), dtype=bool), ValueError, r"mask of shape \(7,\)"),
    "floats": ([0.5], TypeError, "positions of rows, names or a mask; got float64"),
    "float mask": (torch.ones(7), TypeError, "positions of rows, names or a mask; got float"),
    "a name that is none": (["b", "z"], KeyError, "no training row is called 'z'"),
    "one number": (3, TypeError, r"One row alone is \[3\]"),
    "one name": ("b", TypeError, r"One row alone is \['b'\]"),
    "nothing": (None, TypeError, "expected rows to drop"),
    "ragged": ({"a": [[1], [2, 3]]}, ValueError, "rows of one group"),
    "deep": ({"a": [[1, 2]]}, ValueError, r"got \(1, 2\)"),
    "cube": (np.zeros((1, 1, 7), dtype=bool), ValueError, "got"),
    "dicts": ([{}], TypeError, "positions of rows, names or a mask"),
    "a shuffled mask": (
        pd.Series(MASK, index=NAMES[::-1]),
        ValueError,
        "in the order of the training rows",
    ),
    "a table": (pd.DataFrame([MASK]), ValueError, "mask"),
}


@pytest.mark.parametrize("form", BAD)
def test_what_is_no_group(form: str) -> None:
    drop, error, told = BAD[form]
    with pytest.raises(error, match=told):
        masks_of(drop, NAMES)


def test_bad_arguments_of_predict() -> None:
    case = make("mlp")
    influence = fit(case)
    with pytest.raises(ValueError, match="order 'newton' or 'first'"):
        influence.predict(case.test, [0], order="second")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rtol between 0 and 1"):
        influence.predict(case.test, [0], rtol=0.0)
    with pytest.raises(RuntimeError, match="call fit"):
        uw.Influence(case.model, case.loss, damping=0.1).predict(case.test, [0])
    by_block = fit(case, blocks="layer", damping={"0": 0.1, "2": 0.2})
    with pytest.raises(TypeError, match="one λ; this influence has one for every block"):
        by_block.predict(case.test, [0])
    with pytest.raises(TypeError, match="relative=None"):
        fit(case, uw.EKFAC(relative="layer")).predict(case.test, [0])
    matrix = fit(case, curvature=lambda risk: uw.GGN(risk).damped(0.0))
    with pytest.raises(TypeError, match="curvature of some rows"):
        matrix.predict(case.test, [0])
    assert matrix.predict(case.test, [0], order="first").after.shape == (1, case.m)
