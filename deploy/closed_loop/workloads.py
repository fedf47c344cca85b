"""The workloads both engines serve, and `vllm bench serve` running one of them. No pack is made of any."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.demo.load import LengthMix, write_dataset
from deploy.demo.progress import DemoFailed, tail
from engine_process import engine_variables
from environments import VllmEnvironment

_COMMANDS = Path(__file__).with_name("vllm_commands.py")
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


def seconds_of(workloads: Sequence[Workload], mean: float) -> tuple[float, ...]:
    """How long a run of each is, `mean` on average: the lighter its load, the longer, as it has fewer requests."""
    weights = [(workload.share or 1.0) ** -0.5 for workload in workloads]
    return tuple(mean * weight * len(weights) / sum(weights) for weight in weights)


class BenchClient:
    """vLLM's own benchmark, `vllm bench serve`, for one run after the other; as a context manager.

    Its processes are children of one that has imported vLLM (vllm_commands.py): a run of 12 s took
    37 s instead of 20 on slow cores without. It is started on the cores this process may use then.
    """

    def __init__(self, environment: VllmEnvironment, site: Path, model: Path, log_path: Path) -> None:
        """`site`: a shim_site; `log_path`: what the parent says. Returns once it can run; raises DemoFailed."""
        self._model, self._log_path = model, log_path
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [str(environment.python), "-P", str(_COMMANDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=engine_variables(site, None) | {"TMPDIR": os.environ.get("TMPDIR", "/tmp")},  # noqa: S108
                text=True,
                # Ends with its children, whatever they are at.
                process_group=0,
            )
        try:
            self._reply()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> BenchClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, and a run that is under way."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def capacity(self, base_url: str, *, users: int, folder: Path, seed: int) -> float:
        """Requests per second that the engine at this address serves to so many users that it is never idle."""
        full = Workload(f"closed loop {users}", users=users, capacity=2 * users)
        result = self.run(full, base_url, folder=folder, seconds=1.0, seed=seed)
        return float(result["request_throughput"])

    def run(self, workload: Workload, base_url: str, *, folder: Path, seconds: float, seed: int) -> dict[str, Any]:
        """One run; its result. Raises DemoFailed where it or one of its requests fails."""
        folder.mkdir(parents=True)
        requests, dataset, log_path = workload.requests(seconds), folder / "requests.json", folder / "client.log"
        write_dataset(dataset, self._model, requests=requests, seed=seed, prompts=PROMPTS, outputs=OUTPUTS)
        command = ["bench", "serve", "--base-url", base_url, "--model", str(self._model)]
        command += ["--served-model-name", SERVED_MODEL, "--ignore-eos"]
        command += ["--dataset-name", "sharegpt", "--dataset-path", str(dataset), "--disable-shuffle"]
        command += ["--num-prompts", str(requests), "--seed", str(seed), "--num-warmups", str(WARMUPS)]
        command += [*workload.flags(), "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99"]
        command += ["--disable-tqdm", "--save-result", "--result-dir", str(folder), "--result-filename", "result.json"]
        status, result = self._status_of(command, log_path), folder / "result.json"
        if status or not result.exists():
            raise DemoFailed(
                f"vllm bench serve ended with {status}:\n{tail(log_path)}",
                "the lines above are the client's; ARGS='--keep DIR' keeps the engines' logs too",
            )
        document: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if document["completed"] != requests:
            raise DemoFailed(
                f"{document['completed']} of {requests} requests of {workload.name} were served",
                "ARGS='--keep DIR' keeps the logs that say why",
            )
        return document

    def _status_of(self, arguments: Sequence[str], log_path: Path) -> int:
        assert self._process.stdin is not None  # noqa: S101  it is a pipe
        command = json.dumps({"arguments": arguments, "output": str(log_path)})
        # A parent that has ended is told of below, in its own words.
        with contextlib.suppress(BrokenPipeError):
            print(command, file=self._process.stdin, flush=True)
        return int(self._reply())

    def _reply(self) -> str:
        assert self._process.stdout is not None  # noqa: S101  it is a pipe
        if not (line := self._process.stdout.readline()):
            raise DemoFailed(
                f"the process that runs vllm bench serve ended with {self._process.wait()}:\n{tail(self._log_path)}",
                "the lines above are its own; a vLLM without the benchmark's packages lacks vllm[bench]",
            )
        return line
