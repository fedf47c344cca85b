"""How many steps never leave the engine: `make lease-share`.

Azure's public traces of 2023 (conversation, code; lengths from the trace, Poisson arrivals at 1 and 4 requests per
second), replayed by the real scheduler of vLLM under the shim's own code. Every step of the replay is then looked up in
the shim's lease table; what it does not hold is asked for and comes with the server's own grant. Printed beside the
share of all steps is its ceiling: the decode-only steps, the only ones that can be leased.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from environments import VLLM_VERSIONS, measured_data, vllm_environment
from fleet import replies, step_oracle
from oracle_server import pack as packs
from oracle_server.rpc import wire
from oracle_server.rpc.leases import Leases
from oracle_server.state.binding import Binding
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.snapshot import EnginePlan, LoadedPack, Snapshot
from step_oracle.v1 import step_pb2
from vllm_shim.lease import LeasedReply, LeaseTable

ENGINE = "--max-model-len 16384 --max-num-seqs 256 --max-num-batched-tokens 2048"
EXPERIMENT = "tenants/default/experiments/default"


def main() -> int:
    options = parsed()
    with tempfile.TemporaryDirectory(prefix="step-oracle-bench-") as name:
        rows = list(measure(options.data, Path(name), options.vllm_version, options.seconds))
    table = Table(title=f"Steps answered without a message, vLLM {options.vllm_version}, {options.seconds} s each")
    for column in ("workload", "steps", "messages", "of leasable", "of all", "ceiling", "leases"):
        table.add_column(column, justify="right")
    for row in rows:
        shares = (row["leased"] / row["leasable"], row["leased"] / row["steps"], row["leasable"] / row["steps"])
        counts = (str(row["steps"]), str(row["steps"] - row["leased"]))
        table.add_row(row["workload"], *counts, *(f"{share:.2%}" for share in shares), str(row["leases"]))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=measured_data())
    parser.add_argument("--vllm-version", default=VLLM_VERSIONS[-1])
    parser.add_argument("--seconds", type=int, default=600, help="length of each workload")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    if not options.data.is_dir():
        parser.error(f"no data in {options.data}; give --data or set STEP_ORACLE_DATA")
    return options


def measure(data: Path, folder: Path, version: str, seconds: int) -> Iterator[dict[str, Any]]:
    """One row of counts per workload."""
    bundle = data / "llmservingsim"
    config = ("--model-config", str(bundle / "Llama-3.1-8B.config.json"))
    pack = ("--tp", "1", "--kv-blocks-assumed", "35000", "-o", str(folder / "pack"))
    step_oracle("import", "llmservingsim", str(bundle / "RTXPRO6000-Llama-3.1-8B-tp1"), *config, *pack)
    venv = vllm_environment(version).python.parent.parent
    for name in ("conv", "code"):
        for rate in (1, 4):
            requests = folder / "requests.csv"
            write_workload(data / "workloads" / f"azure2023_{name}.csv", requests, rate, seconds)
            trace = folder / f"{name}-{rate}"
            run = ("--requests", str(requests), "--vllm", str(venv), "--trace", f"{trace}/")
            step_oracle("replay", "--pack", str(folder / "pack"), *config, "--engine-args", ENGINE, *run)
            yield {"workload": f"{name}, {rate}/s"} | count(replies(trace), plan_of(folder / "pack", folder))


def write_workload(source: Path, target: Path, rate: int, seconds: int) -> None:
    """The first requests of a trace with Poisson arrivals instead of its own."""
    draw, arrival = random.Random(f"{source.name} {rate}"), datetime(2023, 11, 16)  # noqa: DTZ001
    with source.open(newline="") as rows, target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
        for row, _ in zip(csv.DictReader(rows), range(rate * seconds), strict=False):
            arrival += timedelta(seconds=draw.expovariate(rate))
            writer.writerow((arrival.isoformat(" ", "microseconds"), row["ContextTokens"], row["GeneratedTokens"]))


def plan_of(pack: Path, folder: Path) -> EnginePlan:
    """What the server would answer the replay's engine from."""
    compiled_folder = folder / "compiled"
    if not compiled_folder.exists():
        packs.compile_pack(pack, compiled_folder)
    compiled = packs.load_compiled(compiled_folder)
    loaded = LoadedPack("pack", compiled.manifest, packs.open_oracle(compiled))
    snapshot = Snapshot(EXPERIMENT, 1, Binding(rules=(), default_pack_digest="pack", seed=0), {"pack": loaded})
    return snapshot.plan(EngineIdentity(EXPERIMENT, "replay", {}, "", 0))


def count(steps: list[Any], plan: EnginePlan) -> dict[str, int]:
    """Steps, leasable ones, leased ones and leases granted of one engine; every leased answer is the replayed one."""
    table, leases = LeaseTable(), Leases()
    leasable = leased = granted = 0
    for step in steps:
        shape = step.request.shape
        if shape.prefill_chunks:
            continue
        leasable += 1
        where = (shape.decode_context_tokens, shape.max_decode_context_tokens)
        lease = table.find(shape.num_decode_requests, *where, shape.previous_prefill_tokens)
        if lease is not None:
            leased += 1
            assert LeasedReply(lease, step.request.step_index, *where).message() == step.reply, step
            continue
        reply = step_pb2.StepReply()
        query, _, _ = wire.read_step(step.request)
        leases.grant(reply, plan, query)
        if reply.HasField("lease"):
            granted += 1
            table.take(reply.lease)
    return {"steps": len(steps), "leasable": leasable, "leased": leased, "leases": granted}


if __name__ == "__main__":
    raise SystemExit(main())
