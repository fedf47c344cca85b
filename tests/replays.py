"""`step-oracle replay` as a user runs it, with the newest tested vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from environments import VLLM_VERSIONS, vllm_environment
from fleet import step_oracle


def replay(pack: Path, model_config: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON of one replay; `folder` receives it."""
    venv = vllm_environment(VLLM_VERSIONS[-1]).python.parent.parent
    result = folder / "replay.json"
    model = ("--model-config", str(model_config), "--vllm", str(venv))
    step_oracle("replay", "--pack", str(pack), *model, "--json", str(result), *arguments)
    found: dict[str, Any] = json.loads(result.read_text())
    return found
