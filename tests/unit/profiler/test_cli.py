"""The command line: what is imported when, and what a mistake costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("oracle_server.cli")

from profiler.cli import main

_REPOSITORY = Path(__file__).parents[3]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=_REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_imports_none_of_the_heavy_libraries() -> None:
    code = """
import sys
from profiler.cli import main
status = main(["--help"])
heavy = {"numpy", "numba", "pyarrow", "matplotlib", "grpc", "msgspec", "rich", "aiconfigurator_core"} & set(sys.modules)
print("heavy:", sorted(heavy), "status:", status)
"""
    result = _python(code)
    assert "heavy: [] status: 0" in result.stdout, result.stdout + result.stderr
    for command in (
        "serve",
        "synthesize",
        "import",
        "pack",
        "experiment",
        "tenant",
        "lengths",
        "doctor",
        "vllm-install",
    ):
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("command", ["doctor", "vllm-install"])
def test_standard_library_commands_run_without_the_extras(command: str) -> None:
    # A None entry makes every import of that name fail.
    code = f"""
import sys
for name in ("typer", "click", "numpy", "msgspec", "rich"):
    sys.modules[name] = None
from profiler.cli import main
try:
    main([{command!r}, "--help"])
except SystemExit as leaving:
    assert not leaving.code, leaving.code
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()


def test_without_typer_one_sentence_names_the_extra() -> None:
    result = _python(
        "import sys; sys.modules['typer'] = None; from profiler.cli import main; sys.exit(main(['serve']))"
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "pip install 'step-oracle[server]'" in result.stderr


def test_groups_of_both_parts_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "--help"]) == 0
    text = capsys.readouterr().out
    for command in ("show", "check", "upload", "list"):
        assert f"\n  {command} " in text


def test_a_wrong_argument_is_status_two_and_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["import", "llm-emu", str(tmp_path / "none.json"), "-o", str(tmp_path / "pack")]) == 2
    assert capsys.readouterr().err == f"step-oracle: {tmp_path / 'none.json'} is no file\n"


def test_an_unknown_command_is_status_two() -> None:
    assert main(["forecast"]) == 2


def test_lengths_fit_writes_the_table_and_says_what_it_found(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text("input_length,output_length\n" + "".join(f"{i},{i}\n" for i in range(1, 101)))
    output = tmp_path / "lengths.json"
    assert main(["lengths", "fit", str(tmp_path / "t.csv"), "-o", str(output), "--quantiles", "3", "--bins", "1"]) == 0
    assert json.loads(output.read_text())["classes"][0]["quantile_tokens"] == [1.0, 50.5, 100.0]
    assert "100 requests" in capsys.readouterr().out


def test_a_block_count_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["synthesize", "--system", "h100_sxm", "--model", str(tmp_path), "-o", str(tmp_path / "p")]
    assert main([*arguments, "--kv-blocks", "lots"]) == 2
    assert "neither a number of blocks nor `estimated`" in capsys.readouterr().err


def test_a_directory_that_is_no_pack_is_status_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    assert main(["pack", "show", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("step-oracle: manifest.json: not JSON")
