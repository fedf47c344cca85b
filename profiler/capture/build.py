"""A capture into a profile pack: its steps into samples or a fit, its facts into the manifest."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from oracle_server import pack
from oracle_server.errors import InvalidArgument
from profiler.capture.step_times import (
    MOMENT_SECONDS,
    UNSETTLED_STEPS,
    after_prefill_factor,
    awake_runs,
    copies_ns,
    host_time,
    moment_scatter,
    settled_runs,
    wake_points,
)
from profiler.capture.steps import CapturedRun, CapturedStep, read_capture
from profiler.capture.table import write_table
from profiler.hybrid_pack import FitRequest, fit, manifest_of, write_manifest
from profiler.hybrid_report import report_lines

KINDS: Final = ("hybrid", "sampled")
# Runs that differ in one of these measured two configurations; a pack is one.
_COLD: Final = (
    *("vllm_version", "model_shape", "dtype", "quantization", "kv_cache_dtype", "tensor_parallel_size"),
    *("pipeline_parallel_size", "data_parallel_size", "block_size", "max_model_len", "max_num_seqs"),
    *("max_num_batched_tokens", "async_scheduling", "chunked_prefill", "kv_bytes_per_token"),
    "graph_capture_sizes",
)
# Blocks follow from the memory that is free at the start: on a GPU they differ a little from start to start.
_KV_BLOCKS_APART: Final = 0.05
# Devices that hold still stay within it; beyond, what was measured in one moment is wrong by as much.
_STILL_PERCENT: Final = 3.0
_DRIFTS: Final = (
    "; it drifts: what was measured in one moment alone is off by as much. Give the plan longer, or an idle machine"
)
_CONTEXT_BUCKET_WIDTH: Final = 256
_MIN_SAMPLES: Final = 16


@dataclass(frozen=True)
class BuildRequest:
    """What `step-oracle build` is told."""

    capture: Path
    kind: str = "hybrid"
    # First steps of every run to leave out; those of a plan's warm-up are left out by themselves.
    skip_steps: int = 0
    # Of every run the steps with these numbers alone, each from the first up to before the second, counted from 0
    # without a warm-up's; empty: all.
    steps: tuple[tuple[int, int], ...] = ()
    licence: str = "unknown"
    name: str | None = None


@dataclass(frozen=True)
class Built:
    """A pack on disk, and what people are told about it."""

    digest: str
    lines: tuple[str, ...]


def build_pack(request: BuildRequest, directory: Path, *, created: datetime | None = None) -> Built:
    """Build a pack from a capture. Raises InvalidArgument saying what the capture lacks, and PackInvalid."""
    if request.kind not in KINDS:
        raise InvalidArgument(f"kind {request.kind!r} is none of {', '.join(KINDS)}", field="kind")
    runs = read_capture(request.capture)
    _check_same(runs)
    kept, left_out = _usable(runs, request)
    steps = [step for run in kept for step in run.steps]
    if not steps:
        raise InvalidArgument(f"{request.capture} holds no usable step ({_told(left_out)})", field="capture")
    blocks = [run.engine["engine"]["num_kv_blocks"] for run in runs]
    # The smallest: an emulated engine never has room that one of these engines had not.
    facts, rank = {**runs[0].engine["engine"], "num_kv_blocks": min(blocks)}, runs[0].ranks[0]
    common = _common_fields(request, runs, kept, facts)
    moment = created or datetime.now(UTC)
    if request.kind == "sampled":
        manifest = _sampled_manifest(request, steps, facts, rank, common, moment)
        digest = pack.write_pack(directory, manifest, samples=_samples(steps))
        lines: list[str] = []
    else:
        digest, lines = _write_hybrid(request, kept, directory, facts, rank, common, moment)
    prep_us, copy_us = (common["latency"][name] / 1e3 for name in ("prep_ns", "copy_ns"))
    host = common["latency"].get("host")
    host_told = f"{host.step_ns / 1e3:.0f} us + {host.request_ns / 1e3:.2f} us per request" if host else "not known"
    told = f"{facts['num_kv_blocks']} of {facts['block_size']} tokens, measured"
    if len(set(blocks)) > 1:
        told += f" (the fewest; the runs had {', '.join(map(str, blocks))})"
    head = [
        f"  {len(steps)} steps of {len(kept)} runs; left out: {_told(left_out)}",
        f"  KV blocks: {told}; prep {prep_us:.0f} us, copy {copy_us:.0f} us, host {host_told}",
        *(f"  note: {run.name}: {note}" for run in runs for note in run.notes),
    ]
    return Built(digest, (*head, *lines))


def run_digest(run: Path, name: str) -> str:
    """Names the measurements of a run, to tell later whether a pack was made of them."""
    suffix = name.removeprefix(run.name)
    return hashlib.sha256((run / f"engine{suffix}.capture").read_bytes()).hexdigest()


def run_folder(capture: Path, run: CapturedRun) -> Path:
    """The folder of a run of a capture."""
    name = run.name.partition("-dp")[0]
    return capture if capture.name == name else capture / name


def _check_same(runs: Sequence[CapturedRun]) -> None:
    first = runs[0].engine["engine"]
    for run in runs[1:]:
        other = run.engine["engine"]
        differing = [
            f"{name} is {first.get(name)} and {other.get(name)}" for name in _COLD if first.get(name) != other.get(name)
        ]
        if differing:
            raise InvalidArgument(
                f"{runs[0].name} and {run.name} are of two configurations: {'; '.join(differing)}; give one run",
                field="capture",
            )
    blocks = [run.engine["engine"]["num_kv_blocks"] for run in runs]
    if max(blocks) > (1 + _KV_BLOCKS_APART) * min(blocks):
        raise InvalidArgument(
            f"the runs have {', '.join(map(str, blocks))} KV blocks, more than {100 * _KV_BLOCKS_APART:.0f} % apart: "
            "the engines had other memory; give one run, or pin them with --num-gpu-blocks-override",
            field="capture",
        )
    if first["pipeline_parallel_size"] > 1:
        raise InvalidArgument(
            "pipeline parallelism: a step has a latency per stage, which is not built yet", field="capture"
        )
    if not all(run.ranks for run in runs):
        raise InvalidArgument("no rank wrote a file, so no step has a latency", field="capture")
    for run in runs:
        ranks = first["tensor_parallel_size"]
        if len(run.ranks) < ranks:
            raise InvalidArgument(
                f"{run.name} has files of {len(run.ranks)} of {ranks} ranks: the others ran on another machine, whose "
                "clock is another; capture an engine of one machine",
                field="capture",
            )


def _usable(runs: Sequence[CapturedRun], request: BuildRequest) -> tuple[list[CapturedRun], dict[str, int]]:
    if request.steps and request.skip_steps:
        raise InvalidArgument("--skip-steps beside --steps: give one of them", field="steps")
    for begin, end in request.steps:
        if not 0 <= begin < end:
            raise InvalidArgument(f"steps {begin}:{end} are none: give FROM:TO with FROM below TO", field="steps")
    spans = request.steps or ((request.skip_steps, sys.maxsize),)
    reason = "not asked for" if request.steps else "first of a run"
    left_out: Counter[str] = Counter()
    kept = []
    for run in runs:
        after = [step for step in run.steps if not step.warm_up]
        asked = [step for number, step in enumerate(after) if any(begin <= number < end for begin, end in spans)]
        steps = [step for step in asked if step.latency_ns > 0]
        left_out["of the warm-up"] += len(run.steps) - len(after)
        left_out[reason] += len(after) - len(asked)
        left_out["without a latency"] += len(asked) - len(steps)
        kept.append(replace(run, steps=tuple(steps)))
    return kept, {reason: count for reason, count in left_out.items() if count}


def _told(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "nothing"


def _common_fields(
    request: BuildRequest, whole: Sequence[CapturedRun], runs: Sequence[CapturedRun], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields that both kinds of pack take from the capture; `runs`: their usable steps alone."""
    rank = runs[0].ranks[0]
    idle = [step.device_start_ns - step.dispatch_ns for run in runs for step in run.steps if step.was_idle]
    copies = copies_ns(whole, runs)
    device, capability = rank["device"], [*rank["device"]["capability"], 0, 0]
    return {
        "latency": {
            "prep_ns": max(0, int(np.median(idle))) if idle else 0,
            "copy_ns": max(0, int(np.median(copies))),
            **({"host": host} if (host := host_time(runs)) else {}),
        },
        "model": pack.Model(
            id=facts["model"].rstrip("/").rpartition("/")[2] or "unknown",
            shape=facts["model_shape"],
            dtype=facts["dtype"],
            quantization=facts["quantization"] or "none",
            kv_cache_dtype=facts["kv_cache_dtype"],
        ),
        "device": pack.Device(
            name=device["name"],
            memory_bytes=device["memory_bytes"],
            capability_major=capability[0],
            capability_minor=capability[1],
            count=facts["tensor_parallel_size"],
        ),
        "parallel": pack.Parallel(tensor=facts["tensor_parallel_size"], data=facts["data_parallel_size"]),
        "engine": pack.Engine(
            vllm_version=facts["vllm_version"],
            attention_backend=", ".join(rank["attention_backends"]) or None,
            model_runner=rank["model_runner"],
            max_model_len=facts["max_model_len"],
            max_num_seqs=facts["max_num_seqs"],
            max_num_batched_tokens=facts["max_num_batched_tokens"],
            graph_capture_sizes=tuple(facts["graph_capture_sizes"]),
            async_scheduling=facts["async_scheduling"],
            prefix_caching=facts["prefix_caching"],
            chunked_prefill=facts["chunked_prefill"],
            gpu_memory_utilization=facts["gpu_memory_utilization"],
        ),
        "kv_cache": pack.KvCache(
            blocks=facts["num_kv_blocks"],
            block_size=facts["block_size"],
            bytes_per_token=facts["kv_bytes_per_token"],
            basis="measured",
            source="the captured engine's own count",
        ),
        "provenance": {
            "built by": "step-oracle build",
            "timing": runs[0].timing,
            "cudagraph mode": runs[0].engine.get("cudagraph_mode") or "unknown",
            "driver": rank["driver"],
            "libraries": ", ".join(f"{name} {version}" for name, version in sorted(rank["libraries"].items())),
            **{
                f"run {number}": f"{run.name} sha256 {run_digest(run_folder(request.capture, run), run.name)}"
                for number, run in enumerate(runs, start=1)
            },
        },
    }


def _sampled_manifest(
    request: BuildRequest,
    steps: Sequence[CapturedStep],
    facts: Mapping[str, Any],
    rank: Mapping[str, Any],
    common: Mapping[str, Any],
    created: datetime,
) -> pack.Manifest:
    return pack.Manifest(
        name=request.name or _name(facts, rank),
        kind="sampled",
        created=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        licence=request.licence,
        coverage={
            "steps": len(steps),
            "mixed_steps": sum(bool(step.chunk_tokens) for step in steps),
            "decode_requests": max(step.num_decode_requests for step in steps),
            "chunk_tokens": max(sum(step.chunk_tokens) for step in steps),
        },
        **{
            **common,
            "latency": pack.Latency(
                **common["latency"],
                sampled=pack.SampledLatency(
                    neighbors="hierarchical",
                    context_bucket_width=_CONTEXT_BUCKET_WIDTH,
                    min_samples=_MIN_SAMPLES,
                ),
            ),
        },
    )


def _samples(steps: Sequence[CapturedStep]) -> dict[str, Any]:
    return {
        "table": np.array([int(bool(step.chunk_tokens)) for step in steps]),
        "total_tokens": np.array([step.total_tokens for step in steps]),
        "concurrency": np.array([step.num_decode_requests + len(step.chunk_tokens) for step in steps]),
        "context_tokens": np.array([step.decode_context_tokens + sum(step.chunk_context) for step in steps]),
        "previous_prefill_tokens": np.array([step.previous_prefill_tokens for step in steps]),
        "latency_ns": np.array([step.latency_ns for step in steps]),
    }


def _write_hybrid(
    request: BuildRequest,
    runs: Sequence[CapturedRun],
    directory: Path,
    facts: Mapping[str, Any],
    rank: Mapping[str, Any],
    common: Mapping[str, Any],
    created: datetime,
) -> tuple[str, list[str]]:
    """Fit what `trace export` would have written, and say in the manifest what the capture knows beyond it."""
    awake, woken = awake_runs(runs)
    settled, unsettled = settled_runs(awake)
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / "steps.parquet"
        write_table(settled, table)
        fitted = fit(
            FitRequest(
                samples=table,
                device_name=rank["device"]["name"],
                device_memory_bytes=rank["device"]["memory_bytes"],
                form="table",
                kv_blocks=facts["num_kv_blocks"],
                block_size=facts["block_size"],
                tensor_parallel=facts["tensor_parallel_size"],
                graph_capture_sizes=tuple(facts["graph_capture_sizes"]),
                licence=request.licence,
                name=request.name or _name(facts, rank),
            )
        )
        manifest = manifest_of(fitted, created)
    latency = msgspec.structs.replace(manifest.latency, **common["latency"])
    lines = report_lines(fitted.file, fitted.model, fitted.regions)
    oracle = fitted.model.oracle()
    if factor := after_prefill_factor(unsettled, oracle, float(np.median(fitted.model.residuals))):
        hybrid = msgspec.structs.replace(pack.hybrid_latency(manifest), after_prefill_factor=round(factor, 4))
        latency = msgspec.structs.replace(latency, hybrid=hybrid)
        lines.insert(0, f"  after prefill: the first decode step after a prompt's takes {factor:.3f} times as long")
    if points := wake_points(woken, oracle):
        latency = msgspec.structs.replace(latency, wake=points)
        told = ", ".join(f"{point.extra_ns / 1e6:.2f} ms after {point.idle_ns / 1e9:.2f} s" for point in points)
        lines.insert(0, f"  wake: {len(woken)} steps after a pause take longer by {told}")
    if unsettled:
        lines.insert(0, f"  not fitted: {len(unsettled)} decode steps, the first {UNSETTLED_STEPS} after a prompt's")
    if found := moment_scatter(settled, oracle):
        held = (
            f"whole moments of {MOMENT_SECONDS} s were {found[0]:.1f} % longer or shorter than the pack says (standard "
            f"deviation of {found[1]})"
        )
        lines.insert(0, f"  how still the device held: {held}" + (_DRIFTS if found[0] > _STILL_PERCENT else ""))
        common["provenance"]["how still the device held"] = held
    manifest = msgspec.structs.replace(manifest, **{**common, "latency": latency})
    return write_manifest(fitted, manifest, directory), lines


def _name(facts: Mapping[str, Any], rank: Mapping[str, Any]) -> str:
    model = facts["model"].rstrip("/").rpartition("/")[2]
    return f"{model} on {rank['device']['name']}, TP{facts['tensor_parallel_size']}"
