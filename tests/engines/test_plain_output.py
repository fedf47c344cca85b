"""The short way of a decode-only step's output makes what the long way makes, beside each vLLM."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from environments import REPOSITORY, VllmEnvironment

pytestmark = pytest.mark.vllm


def test_the_short_way_makes_what_the_long_way_makes(vllm: VllmEnvironment, site: Path) -> None:
    script = REPOSITORY / "tests" / "engines" / "plain_output.py"
    done = subprocess.run(
        [str(vllm.python), str(script), "7"],
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    short, long = map(int, done.stdout.split()[-2:])
    assert short > 1000
    assert long > 100
