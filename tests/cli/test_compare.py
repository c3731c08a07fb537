from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowbit.cli import app

SHORT = ("--methods", "round_to_nearest,bi_real_net", "--bits", "8/8", "--seeds", "1", "--workers", "0")


def run(*arguments: object):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_tables_are_printed_and_written(tmp_path: Path) -> None:
    result = run(*SHORT, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "digits, 8/8, post-training, aligned" in result.output and "round_to_nearest" in result.output
    assert "bi_real_net skipped (seed 0): bi_real_net has weight bits 1, not 8" in result.output
    assert (tmp_path / "comparison.html").exists() and (tmp_path / "results.csv").exists()
    again = run("--tables", "--out", tmp_path)
    assert again.exit_code == 0 and "round_to_nearest" in again.output


def test_a_dry_run_names_cells_and_times_and_stores_nothing(tmp_path: Path) -> None:
    result = run(*SHORT, "--out", tmp_path / "new", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "1 of 2 cells to run" in result.output and "bi_real_net has weight bits 1, not 8" in result.output
    assert not list((tmp_path / "new").rglob("*.json"))


def test_the_printed_configuration_is_a_suite_file(tmp_path: Path) -> None:
    printed = run("--methods", "lsq,pact", "--bits", "4/8", "--epochs", "3", "--print-config")
    assert printed.exit_code == 0
    (tmp_path / "suite.yaml").write_text(printed.output)
    again = run(tmp_path / "suite.yaml", "--print-config")
    assert again.output == printed.output and "epochs: 3" in printed.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--methods", "lsqq"), "unknown method 'lsqq'"),
        (("--bits", "9/9"), "bits: bit_width must be a whole number from 1 to 8, got 9"),
        (("--seeds", "0"), "seeds must be 1 or more, got 0"),
        (("--tables", "--out", "none-there"), "holds no results"),
        (("--track", "fair"), "track must be one of 'aligned', 'published', got 'fair'"),
        (("none.yaml",), "there is no such file"),
    ],
)
def test_bad_input_is_an_error_in_a_line(tmp_path: Path, arguments: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2 and told in " ".join(result.output.split()), result.output
    assert not list(tmp_path.iterdir())


def test_ctrl_c_names_a_command_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    arguments = [
        "compare",
        "--methods",
        "round_to_nearest",
        "--bits",
        "8/8",
        "--seeds",
        "1",
        "--workers",
        "0",
        "--out",
        str(tmp_path / "c"),
    ]
    monkeypatch.setattr("sys.argv", ["lowbit", *arguments])
    with monkeypatch.context() as patched:
        patched.setattr("lowbit.workflows.compare.compare", stop)
        stopped = CliRunner().invoke(app, arguments)
    assert stopped.exit_code == 130, stopped.output
    command = stopped.output.split("Resume it with:")[1].split()
    assert command == ["lowbit", *arguments]
    assert CliRunner().invoke(app, command[1:]).exit_code == 0
