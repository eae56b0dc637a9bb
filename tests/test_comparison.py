"""Methods side by side: what is compared, and how a method without an answer is told."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

import upweight as uw
from cases import Case, make
from matrices import draw, off
from reference import Reference
from upweight.comparison import agreement
from upweight.meter import Meter

DAMPING = 0.1


@pytest.fixture(scope="module")
def case() -> Case:
    return make("mlp")


@pytest.fixture(scope="module")
def found(case: Case) -> uw.Comparison:
    return uw.compare(
        case.model,
        case.loss,
        case.train,
        case.test,
        ["cg", uw.Arnoldi(rank=3), uw.Arnoldi(rank=3, start="test"), "ekfac"],
        damping=DAMPING,
        top=5,
    )


def test_one_line_per_method_with_the_reference_first(found: uw.Comparison) -> None:
    names = ["direct", "cg", "arnoldi(rank=3)", "arnoldi(rank=3, start='test')", "ekfac"]
    assert found.table["method"].tolist() == names
    assert list(found.mean.columns) == names
    assert found.methods == names[1:]
    assert found.table["error_percent"][0] == 0.0
    assert found.table["pearson"][0] == pytest.approx(1.0)
    assert "ekfac" in str(found)
    assert "<table" in found._repr_html_()


def test_the_figures_are_those_of_the_scores(found: uw.Comparison, case: Case) -> None:
    exact = Reference(case).influence("ggn", DAMPING).mean(0)
    rough = uw.Influence(case.model, case.loss, "ekfac", damping=DAMPING, certify=None)
    mean = rough.fit(case.train).scores(case.test).mean().values.double()
    line = found.table.set_index("method").loc["ekfac"]
    assert line["error_percent"] == pytest.approx(
        100 * float(((mean - exact).abs() / exact.abs()).mean()), rel=1e-6
    )
    assert line["relative_norm"] == pytest.approx(off(mean, exact), rel=1e-6)
    assert line["pearson"] == pytest.approx(pearsonr(mean, exact)[0], rel=1e-6)
    assert line["spearman"] == pytest.approx(spearmanr(mean, exact)[0], rel=1e-6)
    strongest = exact.abs().argsort(descending=True)[:5]
    assert line["pearson_top"] == pytest.approx(
        pearsonr(mean[strongest], exact[strongest])[0], rel=1e-6
    )
    assert line["spearman_top"] == pytest.approx(
        spearmanr(mean[strongest], exact[strongest])[0], rel=1e-6
    )
    assert line["residual"] == pytest.approx(rough.certificate.residual_max, rel=1e-6)
    assert line["seconds"] > 0
    assert off(torch.tensor(found.mean["direct"].to_numpy()), exact) < 1e-9


def test_measuring_costs_no_products_of_the_method(found: uw.Comparison) -> None:
    lines = found.table.set_index("method")
    assert lines.loc["ekfac", "products"] == 0
    assert lines.loc["arnoldi(rank=3, start='test')", "products"] == 3
    assert found.certificates["ekfac"].measured == 5


def test_a_method_without_an_answer_has_a_line_that_says_so(case: Case) -> None:
    lowest = float(torch.linalg.eigvalsh(Reference(case).curvature("hessian"))[0])
    found = uw.compare(
        case.model,
        case.loss,
        case.train,
        case.test,
        {"my cg": "cg", "lissa": "lissa", "too much": uw.Nystroem(rank=400), "ok": "ekfac"},
        damping=-lowest / 2,
        curvature="hessian",
        progress=False,
    )
    lines = found.table.set_index("method")
    assert "negative curvature" in lines.loc["my cg", "note"]
    assert "negative eigenvalue" in lines.loc["lissa", "note"]
    assert "rank from 1 to p" in lines.loc["too much", "note"]
    assert math.isnan(lines.loc["my cg", "error_percent"])
    assert found.methods == ["ok"]
    assert "indefinite" in lines.loc["direct", "note"]
    assert "no answer" in str(found)


def test_a_reference_without_an_answer_is_an_error(case: Case) -> None:
    with pytest.raises(ValueError, match="rank from 1"):
        uw.compare(
            case.model,
            case.loss,
            case.train,
            case.test,
            ["direct"],
            reference=uw.Nystroem(rank=400),
            damping=DAMPING,
        )


def test_solvers_that_did_not_converge_are_told_in_the_note(case: Case) -> None:
    found = uw.compare(
        case.model,
        case.loss,
        case.train,
        case.test,
        [uw.CG(max_steps=2)],
        damping=DAMPING,
        progress=False,
    )
    assert "2 steps were not enough" in found.table["note"][1]


def test_names_of_rows_are_kept(case: Case) -> None:
    x, y = case.train
    frame = pd.DataFrame(x.numpy(), index=pd.Index([f"r{i}" for i in range(len(x))]))
    found = uw.compare(case.model, case.loss, (frame, y), case.test, ["ekfac"], damping=DAMPING)
    assert found.mean.index[3] == "r3"


@pytest.mark.parametrize(
    ("methods", "error"),
    [("cg", TypeError), (["cgg"], ValueError), ([uw.CG], TypeError), (3, TypeError)],
)
def test_methods_that_are_none(case: Case, methods: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        uw.compare(case.model, case.loss, case.train, case.test, methods, damping=0.1)  # type: ignore[arg-type]


def test_recipes_of_one_name_have_a_line_each(case: Case) -> None:
    reference, other = uw.CG(uw.Nystroem(rank=5)), uw.CG(uw.Nystroem(rank=9))
    found = uw.compare(
        case.model,
        case.loss,
        case.train,
        case.test,
        [other, reference, "ekfac"],
        reference=reference,
        damping=DAMPING,
    )
    assert found.table["method"].tolist() == ["cg+nystroem", repr(other), "ekfac"]
    assert found.reference == "cg+nystroem"
    assert "rank=5" in found.certificates["cg+nystroem"].facts["preconditioner"]
    assert "rank=9" in found.certificates[repr(other)].facts["preconditioner"]


def test_a_label_is_not_that_of_the_reference(case: Case) -> None:
    rows = case.model, case.loss, case.train, case.test
    with pytest.raises(ValueError, match=r"other labels.*'direct'"):
        uw.compare(*rows, {"direct": "ekfac"}, damping=DAMPING)
    found = uw.compare(*rows, {"again": "direct"}, damping=DAMPING)
    assert found.table["method"].tolist() == ["direct", "again"]


def test_a_damping_of_zero_is_for_the_methods_to_judge() -> None:
    x, y = draw(30, 3), draw(30, 1, seed=1)
    model = torch.nn.Linear(3, 1).double()
    found = uw.compare(
        model,
        torch.nn.functional.mse_loss,
        (x, y),
        (x[:4], y[:4]),
        ["cg", uw.Nystroem(rank=2)],
        damping=0.0,
    )
    lines = found.table.set_index("method")
    assert lines.loc["cg", "relative_norm"] < 1e-6
    assert "damping above 0" in lines.loc["nystroem(rank=2)", "note"]
    with pytest.raises(ValueError, match="damping λ ≥ 0"):
        uw.compare(model, torch.nn.functional.mse_loss, (x, y), (x, y), damping=-0.1)


def test_agreement_where_it_is_not_defined() -> None:
    constant = agreement(torch.zeros(4), torch.ones(4))
    assert math.isnan(constant["relative_norm"])
    assert math.isnan(constant["pearson"])
    one_zero = agreement(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0]), top=2)
    assert one_zero["error_percent"] == pytest.approx(50.0)  # of the row that has a reference
    same = draw(30)
    assert agreement(same, 3 * same)["pearson"] == pytest.approx(1.0)
    assert agreement(same, 3 * same)["relative_norm"] == pytest.approx(2.0)


def test_too_few_rows_to_correlate(case: Case) -> None:
    with pytest.raises(ValueError, match="top of at least 2"):
        uw.compare(case.model, case.loss, case.train, case.test, damping=0.1, top=1)


def test_the_meter_sees_time_and_memory() -> None:
    with Meter() as small:
        pass
    with Meter() as large:
        block = torch.ones(8_000_000)
        del block
    assert large.seconds > small.seconds
    if not math.isnan(large.peak_mib):
        assert 25 < large.peak_mib < 200
        assert small.peak_mib < 10
