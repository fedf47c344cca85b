"""`step-oracle replay` as a user runs it, with the newest tested vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from environments import VLLM_VERSIONS, vllm_environment


def replay(pack: Path, model_config: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON of one replay; `folder` receives it."""
    venv = vllm_environment(VLLM_VERSIONS[-1]).python.parent.parent
    result = folder / "replay.json"
    command = [sys.executable, "-m", "profiler.cli", "replay", "--pack", str(pack)]
    command += ["--model-config", str(model_config), "--vllm", str(venv), "--json", str(result), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def step_oracle(*arguments: str) -> str:
    """Any other command; its standard output."""
    done = subprocess.run([sys.executable, "-m", "profiler.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stderr[-3000:]}"
    return done.stdout
