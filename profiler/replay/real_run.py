"""A measured run beside its workload: LLMServingSim's `run` folders (requests.jsonl, meta.json)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oracle_server.errors import InvalidArgument
from profiler.replay.job import Request
from profiler.replay.metrics import Latencies, latencies

_TIMES = ("arrival_time", "queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
_ID = re.compile(r".*?(\d+)")
# Not an argument of an engine but a name that only the machine of the run could resolve.
_NOT_ARGUMENTS = {"model"}


@dataclass(frozen=True)
class RealRun:
    """What was measured. `requests` are in order of arrival, `latencies` in the same order, both from time 0."""

    requests: tuple[Request, ...]
    latencies: Latencies
    # EngineArgs fields of vLLM.
    engine_defaults: Mapping[str, Any]
    vllm_version: str
    device: str
    # Logged by the engine of the run; None where its record does not say.
    kv_blocks: int | None
    # Requests of the workload that the run does not have; they are left out of the replay too.
    unmeasured: int


def read_real_run(folder: Path, workload: Sequence[Request]) -> RealRun:
    """The run in `folder` of the requests in `workload`: request `<name>-<i>` is line i of the file, from 0 on.

    Arrivals are wall time and all other stamps monotonic: they are aligned by the smallest difference between arrival
    and queued, so that TTFT counts from the arrival and not from when a busy engine looked.
    """
    meta = _json(folder / "meta.json")
    rows = _rows(folder / "requests.jsonl")
    by_id = {request.request_id: request for request in workload}
    numbers = [row["number"] for row in rows]
    if len(set(numbers)) != len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise InvalidArgument(f"{folder}: request {twice} stands there twice", field="real_run")
    offset_ns = min(row["queued_ts"] - row["arrival_time"] for row in rows)
    zero_ns = min(row["arrival_time"] for row in rows)
    rows.sort(key=lambda row: (row["arrival_time"], row["number"]))
    requests = []
    for row in rows:
        known = by_id.get(f"bench-{row['number']}")
        if known is None or known.prompt_tokens != row["input_toks"]:
            raise InvalidArgument(
                f"{folder}: request {row['request_id']} has {row['input_toks']} prompt tokens, line "
                f"{row['number'] + 1} of --requests has {known.prompt_tokens if known else 'none'}: it is another "
                "workload",
                field="real_run",
            )
        requests.append(replace(known, output_tokens=row["output_toks"], arrival_ns=row["arrival_time"] - zero_ns))
    measured = latencies(
        [row["arrival_time"] + offset_ns for row in rows],
        [row["first_token_ts"] for row in rows],
        [row["last_token_ts"] for row in rows],
        [row["output_toks"] for row in rows],
    )
    arguments = {
        name: value
        for name, value in meta.get("engine_kwargs", {}).items()
        if value is not None and name not in _NOT_ARGUMENTS
    }
    # The measured engine's, where it was left to its version's default: KV blocks follow from it.
    utilization = meta.get("kv_cache", {}).get("gpu_memory_utilization")
    if utilization is not None:
        arguments.setdefault("gpu_memory_utilization", utilization)
    return RealRun(
        tuple(requests),
        measured,
        arguments,
        str(meta.get("vllm_version", "")),
        str(meta.get("hardware", {}).get("device_name", "")),
        meta.get("kv_cache", {}).get("num_gpu_blocks"),
        len(workload) - len(rows),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows with times in whole nanoseconds and the request's number."""
    rows = []
    for line_number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            number = _ID.fullmatch(row["request_id"])
            if number is None:
                raise ValueError(f"request_id {row['request_id']!r} does not end in a number")
            times = {name: round(float(row[name]) * 1e9) for name in _TIMES}
            rows.append(
                {
                    "request_id": row["request_id"],
                    "number": int(number[1]),
                    "input_toks": int(row["input_toks"]),
                    "output_toks": int(row["output_toks"]),
                    **times,
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"{path}, line {line_number}: {error!r}", field="real_run") from error
    if not rows:
        raise InvalidArgument(f"{path} holds no request", field="real_run")
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise InvalidArgument(f"{path}: not JSON ({error})", field="real_run") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path}: an object is needed", field="real_run")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}", field="real_run") from error
