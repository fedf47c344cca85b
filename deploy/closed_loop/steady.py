"""The closed loop's side of the steady device: what it needs of the engine, and what the engine says of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from deploy.closed_loop.steady_device.law import WEIGHTS_VARIABLE

_PACKAGE: Final = Path(__file__).with_name("steady_device")
STEADY_WORKER: Final = f"{_PACKAGE.name}.worker.SteadyWorker"
# Computed well within the time of every step, also by a core that others use.
STEADY_MODEL: Final[Mapping[str, object]] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def install_steady_device(site: Path) -> None:
    """On the path of engines that have this site."""
    shutil.copytree(_PACKAGE, site / _PACKAGE.name)


def steady_variables(weights_ms: float) -> dict[str, str]:
    """Of an engine whose device reads its weights in this time."""
    return {WEIGHTS_VARIABLE: f"{weights_ms:g}"}


def overruns(log_path: Path) -> str:
    """How many steps took longer than the law says, in the engine's last words about it."""
    told = re.findall(r"steady device: (.*)", log_path.read_text(encoding="utf-8", errors="replace"))
    return told[-1] if told else "it did not say how many steps took longer than they should"
