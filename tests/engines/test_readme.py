"""The README's commands run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from environments import REPOSITORY, vllm_environment
from model_dir import write_model_dir

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# What a person does between two lines: wait until what was started is there, and look at what it says.
WAIT_FOR = """
wait_for() { for _ in $(seq 600); do "$@" >/dev/null 2>&1 && return; sleep 0.25; done; echo "never: $*" >&2; exit 9; }
"""
AFTER = {
    "step-oracle serve": "wait_for step-oracle health",
    "vllm/bin/vllm serve": (
        "wait_for python3 -c 'import urllib.request as u; u.urlopen(\"http://127.0.0.1:8000/health\")'"
    ),
}
# Both started in the background; whatever happens, they end with the script.
PROLOGUE = "set -eo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\n"


def by_hand() -> list[str]:
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## By hand")[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block
    return block[1].splitlines()


def script(lines: list[str]) -> str:
    written = [PROLOGUE, WAIT_FOR]
    for line in lines:
        written.append(line)
        written += [wait for start, wait in AFTER.items() if line.startswith(start)]
    return "\n".join(written)


def test_the_commands_by_hand_work_as_written(tmp_path: Path) -> None:
    lines = by_hand()
    assert any(line.startswith("vllm/bin/vllm serve") for line in lines)
    _copy_environment(vllm_environment("0.33.0").python.parent.parent, tmp_path / "vllm")
    model = write_model_dir(tmp_path / "qwen3-8b", "qwen3-8b")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("STEP_ORACLE_", "VLLM_"))}
    variables |= {"MODEL": str(model), "OMP_NUM_THREADS": "1"}
    # The checkout's own folder is where pip installs from; everything else lands in the test's folder.
    written = script([line.replace("pip install '.", f"pip install -q '{REPOSITORY}") for line in lines])
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(
            ["bash", "-c", written], cwd=tmp_path, env=variables, stdout=log, stderr=subprocess.STDOUT, timeout=600
        )
    text = (tmp_path / "log").read_text(errors="replace")
    assert done.returncode == 0, text[-6000:]
    assert (tmp_path / "h100.png").stat().st_size > 10_000
    # Created with one pack, swapped to the other, rolled back.
    assert re.search(r"default: generation 3\b", text), text[-6000:]


def test_every_step_oracle_command_of_the_readmes_exists() -> None:
    """A command that was renamed must not live on in a README."""
    known = subprocess.run(
        [str(Path(sys.executable).with_name("step-oracle")), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for readme in REPOSITORY.glob("**/README.md"):
        if ".venv" in readme.parts:
            continue
        for verb in re.findall(r"^(?:.*/bin/)?step-oracle ([a-z-]+)", readme.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^  {verb} ", known, re.MULTILINE), f"{readme}: step-oracle {verb}"


def _copy_environment(source: Path, target: Path) -> None:
    """A copy of a cached environment that takes itself for the original, so that installing into it is quick."""
    subprocess.run(["cp", "-al", str(source), str(target)], check=True)
    for path in (target / "bin").iterdir():
        if path.is_file() and not path.is_symlink() and path.read_bytes()[:2] == b"#!":
            text = path.read_text(encoding="utf-8").replace(str(source), str(target))
            mode = path.stat().st_mode
            path.unlink()
            path.write_text(text, encoding="utf-8")
            path.chmod(mode)
