"""What tests with real engines share: packs whose answers are known, the command line, traces, a client."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI

from builders import build_constant_pack
from engine_process import EngineProcess
from oracle_process import OracleProcess
from oracle_server.pack import KvCache

MODEL = "m"
KV_BLOCKS = 4000
STEP_NS = 5_000_000

StartEngine = Callable[..., EngineProcess]


def step_oracle(*arguments: str) -> str:
    """The command line as a user runs it; its standard output."""
    command = [sys.executable, "-m", "profiler.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done.stdout


def upload(oracle: OracleProcess, folder: Path, latency_ns: int, **overrides: Any) -> str:
    """Builds and uploads a pack in which every step takes `latency_ns`; its digest."""
    digest = build_constant_pack(folder, latency_ns=latency_ns, kv_blocks=KV_BLOCKS, **overrides)
    step_oracle("pack", "upload", str(folder), "--target", oracle.target)
    return digest


def kv_cache(blocks: int) -> KvCache:
    return KvCache(blocks=blocks, block_size=16, basis="assumed", source="made up for a test")


def replies(trace_folder: Path) -> list[Any]:
    """The steps of every trace in a folder, in file order."""
    from step_oracle.v1 import trace_pb2

    steps = []
    for path in sorted(trace_folder.glob("*.trace")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            size = int.from_bytes(data[position : position + 4], "little")
            record = trace_pb2.TraceRecord.FromString(data[position + 4 : position + 4 + size])
            if record.HasField("step"):
                steps.append(record.step)
            position += 4 + size
    return steps


@contextmanager
def client(engine: EngineProcess) -> Iterator[OpenAI]:
    """The OpenAI client on an engine; it neither retries nor waits for ever."""
    with OpenAI(base_url=f"{engine.base_url}/v1", api_key="none", max_retries=0, timeout=120) as opened:
        yield opened


def complete(engine: EngineProcess, prompt: str | list[int] = "one two three", **options: Any) -> Any:
    """One completion of exactly `max_tokens` tokens, unless options say otherwise."""
    with client(engine) as opened:
        settings: dict[str, Any] = {"max_tokens": 16, "extra_body": {"ignore_eos": True}} | options
        return opened.completions.create(model=MODEL, prompt=prompt, **settings)


def experiment(oracle: OracleProcess, name: str = "default") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(step_oracle("experiment", "get", name, "--target", oracle.target, "--json"))
    return found
