"""What a replay process is told, and the requests it is given; both travel as JSON.

The parent process writes them, the worker in vLLM's environment reads them: standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

ROUTERS: Final = ("round_robin", "least_requests")


@dataclass(frozen=True, slots=True)
class Request:
    """One request. Its prompt is `prompt_token_ids`, or made from `blocks`, or made up so that it shares nothing."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    # Nanoseconds after the first moment of the workload; in a closed loop the moment is decided by the loop.
    arrival_ns: int = 0
    prompt_token_ids: tuple[int, ...] = ()
    # Ids of the prompt's blocks of 512 tokens, the last one cut: equal ids stand for equal tokens (Mooncake).
    blocks: tuple[int, ...] = ()
    # Index of the step before which a recorded engine admitted the request; -1: it arrives by time.
    admit_step: int = -1


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run of a process."""

    seed: int
    # Path prefix of the step trace; "<engine id>.trace" is appended. Empty: none.
    trace_prefix: str = ""
    # Answer every step with the latency of the run before: the same steps at no cost of the oracle.
    null_oracle: bool = False
    # Requests of this run alone, and users of its closed loop; empty and 0: the job's.
    requests: str = ""
    users: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a worker needs. Paths are absolute."""

    compiled_pack: str
    model: str
    requests: str
    results: str
    # Arguments of vLLM's command line, which win over `engine_defaults` (by EngineArgs field).
    engine_args: tuple[str, ...] = ()
    engine_defaults: Mapping[str, Any] = field(default_factory=dict)
    runs: tuple[RunSpec, ...] = (RunSpec(seed=0),)
    engine_id: str = "replay"
    engines: int = 1
    router: str = "round_robin"
    # Users of a closed loop; 0: requests arrive at their times.
    users: int = 0
    refuse_extrapolated: bool = False
    allow_mismatch: tuple[str, ...] = ()
    # Folder of vLLM's modules compiled to C (compiled.py); empty: all of vLLM runs as Python.
    compiled_modules: str = ""


def write_job(path: Path, job: Job) -> None:
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")


def read_job(path: Path) -> Job:
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["runs"] = tuple(RunSpec(**run) for run in fields["runs"])
    for name in ("engine_args", "allow_mismatch"):
        fields[name] = tuple(fields[name])
    return Job(**fields)


def write_requests(path: Path, requests: Iterable[Request]) -> None:
    """One JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            file.write(json.dumps(asdict(request)) + "\n")


def read_requests(path: Path) -> list[Request]:
    requests = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            fields = json.loads(line)
            for name in ("prompt_token_ids", "blocks"):
                fields[name] = tuple(fields[name])
            requests.append(Request(**fields))
    return requests
