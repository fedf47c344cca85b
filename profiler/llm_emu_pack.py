"""Writes a parsed LLM-Emu pack as a pack of ours: by default with every sample given to the step it is from, as a
control with LLM-Emu's own rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import InvalidArgument
from oracle_server.pack import (
    Correction,
    Device,
    Engine,
    KvCache,
    Latency,
    Manifest,
    Model,
    SampledLatency,
    write_pack,
)
from profiler.llm_emu import DECODE, FAR_FACTOR, PREFILL, LlmEmuPack, whole_number
from profiler.llm_emu_transition import TAIL_FACTOR, continues_prefill, tails_of
from profiler.model_config import model_shape


@dataclass(frozen=True)
class ImportOptions:
    """What the file does not say or says wrong; None or "" leaves it to the file."""

    kv_blocks: int | None = None
    block_size: int | None = None
    name: str | None = None
    architecture: str = ""
    dtype: str = ""
    min_samples: int = 30
    licence: str = "unknown"
    # LLM-Emu's own oracle: k1, kN or auto, over whole cells and two axes; "": ours.
    control: str = ""
    # Samples above this are left out.
    drop_longer_than_ms: float | None = None


@dataclass(frozen=True)
class ImportReport:
    """What was written; shares in 0 ... 1."""

    digest: str
    # Decode samples given to steps after prefill work, and their share of the time of all decode steps.
    tail_samples: int
    tail_time_share: float
    # Samples of LLM-Emu's decode table that go on with a chunked prefill.
    continuation_samples: int
    has_context: bool
    dropped_samples: int


def write_llm_emu(
    parsed: LlmEmuPack, options: ImportOptions, directory: Path, *, created: datetime | None = None
) -> ImportReport:
    """Writes `parsed` as a sampled pack into `directory`, which must not exist."""
    oracle = _control(options)
    columns = dict(parsed.columns)
    if oracle is None and parsed.context_tokens is not None:
        columns["context_tokens"] = parsed.context_tokens
    kept = np.ones(columns["latency_ns"].size, dtype=bool)
    if options.drop_longer_than_ms is not None:
        kept = columns["latency_ns"] <= options.drop_longer_than_ms * 1e6
        columns = {name: column[kept] for name, column in columns.items()}
    tails = continuations = np.zeros(columns["latency_ns"].size, dtype=bool)
    if oracle is None:
        columns, tails, continuations = _refiled(columns, parsed.concurrency_bucket_width)
        oracle = SampledLatency(min_samples=options.min_samples, neighbors="hierarchical")
        if parsed.context_tokens is not None:
            oracle = msgspec.structs.replace(oracle, context_bucket_width=parsed.context_bucket_width)
    decode = columns["table"] == DECODE
    report = ImportReport(
        digest="",
        tail_samples=int(tails.sum()),
        tail_time_share=float(columns["latency_ns"][tails].sum() / max(1, columns["latency_ns"][decode].sum())),
        continuation_samples=int(continuations.sum()),
        has_context=oracle.context_bucket_width is not msgspec.UNSET,
        dropped_samples=int((~kept).sum()),
    )
    manifest = _manifest(parsed, options, oracle, report, created or datetime.now(UTC))
    return replace(report, digest=write_pack(directory, manifest, samples=columns))


def _control(options: ImportOptions) -> SampledLatency | None:
    """LLM-Emu's rules for its K; None where no control is asked for."""
    floor = options.min_samples
    if not options.control:
        return None
    rules = SampledLatency(min_samples=floor, max_buckets=min(max(32, floor), 1024), table_rule="new_requests")
    if options.control == "auto":
        return rules
    number = re.fullmatch(r"k([1-9][0-9]{0,3})", options.control)
    if number is None or int(number[1]) > 1024:
        raise InvalidArgument(f"--control {options.control!r} is none of k1, k2 ... k1024, auto", field="control")
    if int(number[1]) == 1:
        return msgspec.structs.replace(rules, neighbors="nearest")
    return msgspec.structs.replace(rules, fixed_buckets=int(number[1]))


def _refiled(
    columns: Mapping[str, NDArray[Any]], concurrency_bucket_width: int
) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_], NDArray[np.bool_]]:
    """Columns with every sample in the table of the step it is from; which are tails; which went to prefill."""
    decode = columns["table"] == DECODE
    continued = decode & continues_prefill(columns, concurrency_bucket_width)
    if (continued == decode).all():
        # Nothing would be left to decode from: then these are no chunks.
        continued = np.zeros_like(continued)
    decode &= ~continued
    tails = np.zeros_like(decode)
    tails[decode] = tails_of({name: column[decode] for name, column in columns.items()})
    table = np.where(decode, DECODE, PREFILL).astype(np.int8)
    # 1 stands for some: how much prefill it was is not known.
    previous = np.where(decode, tails, -1).astype(np.int32)
    return {**columns, "table": table, "previous_prefill_tokens": previous}, tails, continued


def _manifest(
    parsed: LlmEmuPack, options: ImportOptions, oracle: SampledLatency, report: ImportReport, created: datetime
) -> Manifest:
    config = parsed.model_config
    gpu: Mapping[str, Any] = config["gpu"] if isinstance(config.get("gpu"), dict) else {}
    shape = ""
    if options.architecture and all(_optional_count(config, name) for name in _SHAPE_FIELDS):
        shape = model_shape({**config, "architectures": [options.architecture]})
    utilization = config.get("gpu_memory_utilization")
    return Manifest(
        name=options.name or Path(parsed.source).stem,
        kind="sampled",
        created=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        licence=options.licence,
        model=Model(
            id=parsed.model_name,
            shape=shape,
            dtype=options.dtype,
            kv_cache_dtype=str(config.get("kv_cache_dtype") or ""),
        ),
        device=Device(
            name=str(gpu.get("gpu_name") or parsed.gpu_model),
            memory_bytes=whole_number("model_config.gpu", gpu, "gpu_memory_bytes", 1),
            capability_major=_capability(gpu)[0],
            capability_minor=_capability(gpu)[1],
            count=_optional_count(gpu, "gpu_count") or 1,
        ),
        engine=Engine(
            vllm_version=str(config["vllm_version"]) if config.get("vllm_version") else None,
            max_model_len=_optional_count(config, "max_model_len"),
            max_num_seqs=_optional_count(config, "max_num_seqs"),
            max_num_batched_tokens=_optional_count(config, "max_num_batched_tokens"),
            async_scheduling=_optional_switch(config, "async_scheduling"),
            prefix_caching=_optional_switch(config, "enable_prefix_caching"),
            chunked_prefill=_optional_switch(config, "enable_chunked_prefill"),
            gpu_memory_utilization=float(utilization) if isinstance(utilization, int | float) else None,
        ),
        kv_cache=_kv_cache(config, gpu, options),
        latency=Latency(
            transition=report.tail_samples > 0,
            sampled=msgspec.structs.replace(
                oracle,
                tokens_bucket_width=parsed.tokens_bucket_width,
                concurrency_bucket_width=parsed.concurrency_bucket_width,
            ),
        ),
        coverage={
            f"{table}_{name}": value
            for table, held in parsed.reports.items()
            for name, value in (("cells", held.cells), ("samples", held.samples), ("thin_cells", held.thin_cells))
        },
        corrections=_corrections(options, report),
        provenance={
            "source": f"LLM-Emu profile pack {parsed.version}, {parsed.source}",
            "left_out": ", ".join(parsed.left_out) or "nothing",
            **_rules(options, report),
            "timing": "engine-loop wall time filed under the batch just scheduled, not device-busy time",
            "tail": "; ".join(
                f"{table}: {100 * held.tail_time_share:.1f} % of the time in samples above "
                f"{FAR_FACTOR:g} x their cell's median"
                for table, held in parsed.reports.items()
            ),
        },
    )


def _rules(options: ImportOptions, report: ImportReport) -> dict[str, str]:
    """What was done to the samples, in sentences."""
    if options.control:
        return {"control": f"LLM-Emu's own oracle, K = {options.control.removeprefix('k')}: whole cells, two axes"}
    return {
        "transition": f"{report.tail_samples} decode samples above {TAIL_FACTOR:g} x the median of their bucket, "
        f"{100 * report.tail_time_share:.1f} % of decode time, are those of steps after prefill work "
        "(previous_prefill_tokens 1: some; 0: none)",
        "continuations": f"{report.continuation_samples} samples of the decode table with more tokens than requests "
        "go on with a chunked prefill and stand in the prefill table",
        "context_tokens": "of all requests of the step, centers of the 3-D tables' buckets"
        if report.has_context
        else "not known",
    }


def _corrections(options: ImportOptions, report: ImportReport) -> tuple[Correction, ...]:
    if options.drop_longer_than_ms is None:
        return ()
    return (
        Correction(
            name="drop_longer_than_ms",
            value=options.drop_longer_than_ms,
            reason=f"{report.dropped_samples} samples were left out as no steps of the device",
            source="given to the import by its user",
        ),
    )


def _kv_cache(config: Mapping[str, Any], gpu: Mapping[str, Any], options: ImportOptions) -> KvCache:
    block_size = options.block_size or _optional_count(config, "block_size")
    if not block_size:
        raise InvalidArgument("the file has no block_size; give --block-size", field="block_size")
    blocks = options.kv_blocks or _optional_count(config, "num_gpu_blocks")
    if not blocks:
        raise InvalidArgument(
            "the file does not say how many KV blocks the engine had, and without them a run's queueing is wrong (31 % "
            "too many: TPOT +18 %); give --kv-blocks, vLLM logs them at its start",
            field="kv_blocks",
        )
    if options.kv_blocks:
        return KvCache(blocks=blocks, block_size=block_size, basis="assumed", source="given to the import by its user")
    return KvCache(
        blocks=blocks,
        block_size=block_size,
        bytes_per_token=_kv_bytes_per_token(config, gpu, blocks * block_size),
        basis="measured",
        source="model_config.num_gpu_blocks of the capture",
    )


def _kv_bytes_per_token(config: Mapping[str, Any], gpu: Mapping[str, Any], tokens: int) -> int:
    """What the pool held per token, 0 where the file does not say; its unused last part makes it look a little more."""
    available = _optional_count(gpu, "available_kv_cache_bytes")
    if not available:
        return 0
    dimensions = [
        _optional_count(config, name) or 0 for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")
    ]
    elements = 2 * math.prod(dimensions)
    per_token = available // tokens
    exact = [elements * size for size in (1, 2, 4) if abs(per_token - elements * size) <= 0.001 * elements * size]
    return exact[0] if elements and exact else per_token


_SHAPE_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def _capability(gpu: Mapping[str, Any]) -> tuple[int, int]:
    value = gpu.get("gpu_compute_capability")
    if isinstance(value, list) and len(value) == 2 and all(type(part) is int and part >= 0 for part in value):
        return value[0], value[1]
    return 0, 0


def _optional_count(values: Mapping[str, Any], key: str) -> int | None:
    return None if values.get(key) is None else whole_number("model_config", values, key, 1)


def _optional_switch(values: Mapping[str, Any], key: str) -> bool | None:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise InvalidArgument(f"model_config.{key} is {value!r}; true or false is needed", field=key)
    return value
