"""A server of several processes, seen from outside: its log, its metrics, its shards."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from oracle_calls import TIMEOUT
from oracle_process import OracleProcess

TWO_SHARDS = ("--shards", "2")


def wait_for(condition: Callable[[], bool], timeout_seconds: float = TIMEOUT) -> None:
    """Poll until it holds; AssertionError after that time."""
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.02)


def events(server: OracleProcess) -> list[dict[str, object]]:
    """What the log has so far."""
    return [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]


def shard_pids(server: OracleProcess) -> dict[int, int]:
    """The shards that take connections, by number."""
    pids: dict[int, int] = {}
    for event in events(server):
        if event["event"] == "shard ready":
            pids[event["shard"]] = event["pid"]  # type: ignore[index, assignment]
        elif event["event"] == "shard ended":
            pids.pop(event["shard"], None)  # type: ignore[call-overload]
    return pids


def child_of(pid: int, shard: int) -> int:
    """The process of a shard that may not be ready yet; 0 where there is none."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if f'"shard":{shard},' in Path(f"/proc/{child}/cmdline").read_text():
            return int(child)
    return 0


def has_ended(pid: int) -> bool:
    """Whether a process runs no more; one that nobody has waited for yet counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has stopped every thread of a process."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return all((thread / "stat").read_text().rpartition(")")[2].split()[0] == "T" for thread in threads)


def metrics(server: OracleProcess) -> dict[str, float]:
    """The samples of a scrape, and `steps`: those of any support."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    text = opener.open(server.metrics_url, timeout=10).read().decode()
    pairs = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    samples = {name: float(value) for name, _, value in pairs}
    return samples | {"steps": sum(v for name, v in samples.items() if name.startswith("step_oracle_steps_total"))}


def is_healthy(target: str) -> bool:
    """What the shard at this address says of itself."""
    with grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        request = health_pb2.HealthCheckRequest(service="step_oracle.v1.OracleService")
        status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT).status
    return bool(status == health_pb2.HealthCheckResponse.SERVING)
