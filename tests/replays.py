"""`step-oracle replay` as a user runs it, with the newest tested vLLM."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

from environments import VLLM_VERSIONS, vllm_environment
from fleet import step_oracle
from profiler.replay.metrics import METRICS, Latencies, known, latencies
from profiler.replay.real_run import read_real_run
from profiler.replay.workload import read_workload


class MeasuredRun(NamedTuple):
    """A real run of 300 requests and the operators of its GPU, in LLMServingSim's data."""

    bundle: str
    # Options of the import. The 4090's engine logged its KV blocks; nobody noted the other one's, and it never runs out
    # of any such number.
    kv_blocks: tuple[str, str]
    # How many times real time a process replays it at least.
    least_speed: float

    def folder(self, data_folder: Path) -> Path:
        return data_folder / "llmservingsim" / self.bundle / "run"

    def requests(self, data_folder: Path) -> Path:
        return data_folder / "llmservingsim" / "sharegpt-llama-3.1-8b-300-sps10.jsonl"

    def model_config(self, data_folder: Path) -> Path:
        return data_folder / "llmservingsim" / "Llama-3.1-8B.config.json"

    def pack(self, data_folder: Path, folder: Path, kv_blocks: tuple[str, str] | None = None) -> Path:
        """A composed pack of the GPU's operators, written to `folder`."""
        bundle = data_folder / "llmservingsim" / self.bundle
        config = ("--model-config", str(self.model_config(data_folder)), "--tp", "1")
        step_oracle("import", "llmservingsim", str(bundle), *config, *(kv_blocks or self.kv_blocks), "-o", str(folder))
        return folder


MEASURED_RUNS: Final = {
    "RTX 4090": MeasuredRun("RTX4090-Llama-3.1-8B-tp1", ("--kv-blocks", "2588"), 50),
    "RTX PRO 6000": MeasuredRun("RTXPRO6000-Llama-3.1-8B-tp1", ("--kv-blocks-assumed", "35000"), 15),
}


class Replayed(NamedTuple):
    """The JSON of one replay and what was printed beside it."""

    document: dict[str, Any]
    printed: str

    @property
    def times_real_time(self) -> list[float]:
        """Of each run, then of the null oracle where one ran; of the machine, so not in the JSON."""
        return [float(text) for text in re.findall(r"([\d.]+) x real time", self.printed)]


def replay(pack: Path, model_config: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON of one replay; `folder` receives it."""
    return replay_printed(pack, model_config, folder, *arguments).document


def replay_printed(pack: Path, model_config: Path, folder: Path, *arguments: str) -> Replayed:
    venv = vllm_environment(VLLM_VERSIONS[-1]).python.parent.parent
    result = folder / "replay.json"
    model = ("--model-config", str(model_config), "--vllm", str(venv))
    printed = step_oracle("replay", "--pack", str(pack), *model, "--json", str(result), *arguments)
    return Replayed(json.loads(result.read_text()), printed)


def replayed_latencies(document: dict[str, Any]) -> dict[str, list[float]]:
    """TTFT, TPOT and E2E of each request of the first run that has it, milliseconds."""
    requests = document["runs"][0]["requests"]
    names = ("arrival_ns", "first_token_ns", "last_token_ns", "output_tokens")
    return _by_metric(latencies(**{name: [entry[name] for entry in requests] for name in names}))


def measured_latencies(real_run: Path, requests: Path) -> dict[str, list[float]]:
    """The same of a measured run."""
    return _by_metric(read_real_run(real_run, read_workload(requests, None)).latencies)


def _by_metric(found: Latencies) -> dict[str, list[float]]:
    return {metric: known(getattr(found, metric)).tolist() for metric in METRICS}
