"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import upweight as uw
from upweight.report import cli


def run(*arguments: str) -> None:
    cli.main(list(arguments))


# Methods are compared in test_demo_comparison.py (their seconds differ between runs), and scores
# checked in test_demo_check.py.
COMMAND = ("demo", "wine", "--seed", "2", "--epochs", "120", "--no-compare", "--no-check")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "wine"
    run(*COMMAND, "--out", str(out), "--quiet")
    return out


def test_run_folder_is_complete(finished: Path) -> None:
    assert sorted(p.name for p in finished.iterdir()) == [
        "certificate.json",
        "config.yaml",
        "feature_influence.parquet",
        "findings.parquet",
        "losses.parquet",
        "model.safetensors",
        "report.html",
        "rows.parquet",
        "scores",
    ]
    assert [p.name for p in finished.parent.iterdir()] == ["wine"]
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["settings"]["seed"] == 2
    assert config["settings"]["epochs"] == 120
    assert config["settings"]["compare"] is False
    assert config["settings"]["check"] is False


def test_tables_and_scores_agree(finished: Path) -> None:
    rows = pd.read_parquet(finished / "rows.parquet")
    findings = pd.read_parquet(finished / "findings.parquet")
    scores = uw.Scores.load(finished / "scores")
    assert len(rows) == 106
    assert rows["flipped"].sum() == 10
    assert scores.shape == (54, 106)
    assert rows["mean_influence"].to_numpy() == pytest.approx(scores.mean().values.numpy())
    assert findings["mean_influence"].is_monotonic_increasing
    assert findings["flipped"].head(10).sum() >= 8


def test_report_holds_the_numbers(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    rows = pd.read_parquet(finished / "rows.parquet")
    mean = rows.loc[rows["flipped"], "mean_influence"].mean()
    assert f"{mean:+.3f}" in page or f"{mean:+.3f}".replace("-", "−") in page
    assert page.count("<svg") == 4
    assert "methods for large models" not in page
    assert "be believed" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_same_seed_same_bytes(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    run(*COMMAND, "--out", str(again), "--quiet")
    for name in ("report.html", "config.yaml"):
        assert (again / name).read_bytes() == (finished / name).read_bytes()
    pd.testing.assert_frame_equal(
        pd.read_parquet(again / "rows.parquet"), pd.read_parquet(finished / "rows.parquet")
    )


@pytest.mark.slow
def test_a_run_is_replaced_and_nothing_else(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*COMMAND, "--out", str(finished), "--top", "3")
    printed = capsys.readouterr().out
    assert "mean influence of corrupted bottles: -" in printed
    assert "the 3 lowest rows" in printed
    assert "positive = the row helps" in printed
    assert "Pearson" not in printed
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        run("demo", "wine", "--out", str(tmp_path), "--epochs", "1")
    assert caught.value.code == 2
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["demo", "wine", "--damping", "-1"], "λ ≥ 0; got -1"),
        (["demo", "wine", "--flipped", "500"], "from 0 to 106; got 500"),
        (["demo", "wine", "--curvature", "gnn"], "hessian"),
        (["demo", "wine", "--epochs", "many"], "many"),
        (["demo", "wine", "--top", "0"], "at least 1"),
        (["demo", "whine"], "whine"),
        (["adit"], "adit"),
    ],
)
def test_bad_arguments_end_with_one_line(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert error.startswith("upweight: ")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="λ ≥ 0"):
        run("demo", "wine", "--out", str(tmp_path / "x"), "--damping", "-1", "--debug")


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from upweight.report.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_public_names_are_all_there() -> None:
    assert set(uw.__all__) <= set(dir(uw))
    for name in uw.__all__:
        assert getattr(uw, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        uw.nope  # noqa: B018


def test_a_folder_that_cannot_be_written_is_told_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("upweight.report.demo.run_wine", None)
    with pytest.raises(SystemExit) as caught:
        run("demo", "wine", "--out", str(tmp_path / "file" / "run"))
    assert caught.value.code == 2
    assert "no folder to write to" in capsys.readouterr().err
