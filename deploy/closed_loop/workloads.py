"""The workloads both engines serve, and `vllm bench serve` running one of them. No pack is made of any."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.demo.load import LengthMix, write_dataset
from deploy.demo.progress import DemoFailed, tail
from engine_process import engine_variables
from environments import VllmEnvironment

SERVED_MODEL = "m"
WARMUPS = 6
# A chat-like mix with long right tails, small enough for one core: means of about 150 and 40 tokens.
PROMPTS = LengthMix(median=110, sigma=0.8, least=16, most=900)
OUTPUTS = LengthMix(median=34, sigma=0.6, least=8, most=160)


@dataclass(frozen=True)
class Workload:
    """Open: a share of what the engine can serve, gamma gaps of this burstiness (1: Poisson).

    Closed: `users`, one request of each at a time. `capacity`: requests per second of the full real engine on this
    machine; 0 until it is measured.
    """

    name: str
    share: float = 0.0
    burstiness: float = 1.0
    users: int = 0
    capacity: float = 0.0

    @property
    def rate(self) -> float:
        """Requests a second; infinite for a closed loop."""
        return math.inf if self.users else self.share * self.capacity

    def on(self, capacity: float) -> Workload:
        """The same on a machine that serves so many requests per second."""
        return replace(self, capacity=capacity)

    def requests(self, seconds: float) -> int:
        """How many requests take about so long."""
        return max(4, round(seconds * self.capacity * (self.share or 1.0)))

    def flags(self) -> tuple[str, ...]:
        flags = ("--request-rate", "inf" if self.users else f"{self.rate:.4g}")
        if self.users:
            return (*flags, "--max-concurrency", str(self.users))
        return (*flags, "--burstiness", f"{self.burstiness:g}")


# A faster machine gets more requests, not an idler engine.
WORKLOADS = (
    Workload("Poisson 25 %", share=0.25),
    Workload("Poisson 50 %", share=0.5),
    Workload("bursty 40 %", share=0.4, burstiness=0.25),
    Workload("closed loop 8", users=8),
)
QUICK_WORKLOADS = (WORKLOADS[1], WORKLOADS[3])


def measured_capacity(
    environment: VllmEnvironment, base_url: str, *, users: int, model: Path, site: Path, folder: Path, seed: int
) -> float:
    """Requests per second that the engine at this address serves to so many users that it is never idle."""
    full = Workload(f"closed loop {users}", users=users, capacity=2 * users)
    result = run_bench(environment, full, base_url, model=model, site=site, folder=folder, seconds=1.0, seed=seed)
    return float(result["request_throughput"])


def run_bench(
    environment: VllmEnvironment,
    workload: Workload,
    base_url: str,
    *,
    model: Path,
    site: Path,
    folder: Path,
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """One run of vLLM's own benchmark; its result. Raises DemoFailed where it or one of its requests fails."""
    folder.mkdir(parents=True)
    requests, dataset, log_path = workload.requests(seconds), folder / "requests.json", folder / "client.log"
    write_dataset(dataset, model, requests=requests, seed=seed, prompts=PROMPTS, outputs=OUTPUTS)
    command = [str(environment.python), "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    command += ["--base-url", base_url, "--model", str(model), "--served-model-name", SERVED_MODEL, "--ignore-eos"]
    command += ["--dataset-name", "sharegpt", "--dataset-path", str(dataset), "--disable-shuffle"]
    command += ["--num-prompts", str(requests), "--seed", str(seed), "--num-warmups", str(WARMUPS), *workload.flags()]
    command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", "result.json"]
    with log_path.open("wb") as log:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=engine_variables(site, None) | {"TMPDIR": os.environ.get("TMPDIR", "/tmp")},  # noqa: S108
            check=False,
        )
    result = folder / "result.json"
    if done.returncode or not result.exists():
        raise DemoFailed(
            f"vllm bench serve ended with {done.returncode}:\n{tail(log_path)}",
            "the lines above are the client's; ARGS='--keep DIR' keeps the engines' logs too",
        )
    document: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if document["completed"] != requests:
        raise DemoFailed(
            f"{document['completed']} of {requests} requests of {workload.name} were served",
            "ARGS='--keep DIR' keeps the logs that say why",
        )
    return document
