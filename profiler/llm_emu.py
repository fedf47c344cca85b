"""Imports LLM-Emu profile packs (JSON 2.0 and 2.1) as sampled packs, every sample in the order it was captured.

LLM-Emu files the wall time of an engine-loop iteration under the batch just scheduled (arXiv 2605.00616), so the first
decode step after a prefill carries some of the prefill's time. The import keeps the samples as they are and reports how
much of the time lies in such tails.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import InvalidArgument
from oracle_server.pack import Device, Engine, KvCache, Latency, Manifest, Model, SampledLatency, write_pack
from profiler.model_config import model_shape

_MAX_FILE_BYTES = 256 << 20
_MAX_SAMPLES = 20_000_000
_VERSIONS = ("2.0", "2.1")
DECODE, PREFILL = 0, 1
_TABLES = ((DECODE, "decode_2d_distribution"), (PREFILL, "prefill_2d_distribution"))
# Parts of the format that have no place in the pack; named in its provenance where a file holds them.
_LEFT_OUT = (
    "prefill_3d_distribution",
    "decode_3d_distribution",
    "prefill_axis_distribution",
    "decode_axis_distribution",
    "alpha_kv",
    "sched_overhead_table",
    "sched_overhead_table_v2",
    "avg_sample_ms",
    "bw_calibration",
)
# A sample so much above its cell's median is no scatter of the device.
_TAIL_FACTOR = 3.0


@dataclass(frozen=True)
class TableReport:
    """What one table holds; shares in 0 ... 1."""

    cells: int
    samples: int
    # Cells that hold fewer samples than the oracle wants to draw from.
    thin_cells: int
    # Samples above three times their cell's median, and their share of the table's whole time.
    tail_samples: int
    tail_time_share: float
    largest_ms: float


@dataclass(frozen=True)
class LlmEmuPack:
    """A parsed file. `columns` are those of samples.parquet, rows in capture order within each cell."""

    source: str
    version: str
    gpu_model: str
    model_name: str
    tokens_bucket_width: int
    concurrency_bucket_width: int
    model_config: Mapping[str, Any]
    columns: Mapping[str, NDArray[Any]]
    reports: Mapping[str, TableReport]
    left_out: tuple[str, ...]


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


def read_llm_emu(path: Path) -> LlmEmuPack:
    """Reads and checks `path`. Raises InvalidArgument that names the table, cell and value at fault."""
    if not path.is_file():
        raise InvalidArgument(f"{path} is no file", field="file")
    size = path.stat().st_size
    if size > _MAX_FILE_BYTES:
        raise InvalidArgument(f"{path} has {size} bytes; an LLM-Emu pack of at most 256 MiB is read", field="file")
    document = _parse(path)
    version = document.get("version")
    if version not in _VERSIONS:
        raise InvalidArgument(f"{path}: version {version!r} is not one of {', '.join(_VERSIONS)}", field="version")
    gpu_model = _text(path, document, "gpu_model")
    bucketing = _mapping(path, document, "bucketing")
    tables = {}
    for number, key in _TABLES:
        cells = document.get(key)
        if not isinstance(cells, list) or not cells:
            raise InvalidArgument(
                f"{path}: {key} is empty or absent; a sampled pack needs decode and prefill cells (tables of LLM-Emu 1 "
                "and the combined table alone are not imported)",
                field=key,
            )
        tables[number] = [_cell(path, key, index, cell) for index, cell in enumerate(cells)]
    config = _mapping(path, document, "model_config")
    return LlmEmuPack(
        source=path.name,
        version=version,
        gpu_model=gpu_model,
        model_name=str(document.get("model_name") or "unknown"),
        tokens_bucket_width=_width(path, bucketing, "tt_bucket_width", 1),
        concurrency_bucket_width=_width(path, bucketing, "conc_bucket_width", 5),
        model_config=config,
        columns=_columns(path, tables),
        reports={"decode": _report(tables[DECODE]), "prefill": _report(tables[PREFILL])},
        left_out=tuple(key for key in _LEFT_OUT if document.get(key)),
    )


def write_llm_emu(
    parsed: LlmEmuPack, options: ImportOptions, directory: Path, *, created: datetime | None = None
) -> str:
    """Writes `parsed` as a sampled pack into `directory`, which must not exist, and returns its digest."""
    return write_pack(directory, _manifest(parsed, options, created or datetime.now(UTC)), samples=parsed.columns)


def _manifest(parsed: LlmEmuPack, options: ImportOptions, created: datetime) -> Manifest:
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
            memory_bytes=_count("model_config.gpu", gpu, "gpu_memory_bytes", 1),
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
            sampled=SampledLatency(
                tokens_bucket_width=parsed.tokens_bucket_width,
                concurrency_bucket_width=parsed.concurrency_bucket_width,
                min_samples=options.min_samples,
                table_rule="new_requests",
            )
        ),
        coverage={
            f"{table}_{name}": value
            for table, report in parsed.reports.items()
            for name, value in (("cells", report.cells), ("samples", report.samples), ("thin_cells", report.thin_cells))
        },
        provenance={
            "source": f"LLM-Emu profile pack {parsed.version}, {parsed.source}",
            "left_out": ", ".join(parsed.left_out) or "nothing",
            "timing": "engine-loop wall time filed under the batch just scheduled, not device-busy time",
            "tail": "; ".join(
                f"{table}: {100 * report.tail_time_share:.1f} % of the time in samples above "
                f"{_TAIL_FACTOR:g} x their cell's median"
                for table, report in parsed.reports.items()
            ),
        },
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
    return None if values.get(key) is None else _count("model_config", values, key, 1)


def _optional_switch(values: Mapping[str, Any], key: str) -> bool | None:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise InvalidArgument(f"model_config.{key} is {value!r}; true or false is needed", field=key)
    return value


@dataclass(frozen=True)
class _Cell:
    tokens: int
    concurrency: int
    latency_ns: NDArray[np.int64]


def _parse(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path} is not the JSON of an LLM-Emu pack: {error}", field="file") from error
    if not isinstance(document, dict):
        raise InvalidArgument(f"{path} is not a JSON object", field="file")
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds the number {name}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("it gives a key twice in one object")
    return result


def _cell(path: Path, table: str, index: int, raw: Any) -> _Cell:
    where = f"{path}: {table}[{index}]"
    if not isinstance(raw, dict):
        raise InvalidArgument(f"{where} is not an object", field=table)
    samples = raw.get("samples")
    if not isinstance(samples, list) or not samples:
        raise InvalidArgument(f"{where} has no samples", field=table)
    if raw.get("num_samples", len(samples)) != len(samples):
        raise InvalidArgument(
            f"{where} states {raw['num_samples']} samples and holds {len(samples)}; it is cut or edited", field=table
        )
    for sample in samples:
        if isinstance(sample, bool) or not isinstance(sample, int | float) or not 0.0005 <= sample <= 6e8:
            raise InvalidArgument(
                f"{where} has the sample {sample!r}; microseconds above 0 and up to 600 seconds are allowed",
                field=table,
            )
    latency = np.floor(np.asarray(samples, dtype=np.float64) * 1000.0 + 0.5).astype(np.int64)
    tokens, concurrency = _count(where, raw, "tt", 1), _count(where, raw, "conc", 1)
    if max(tokens, concurrency) >= 1 << 31:
        raise InvalidArgument(f"{where} has tt {tokens} and conc {concurrency}; both lie below 2^31", field=table)
    return _Cell(tokens, concurrency, latency)


def _count(where: str, raw: Mapping[str, Any], key: str, lowest: int) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= 1 << 53:
        raise InvalidArgument(f"{where}.{key} is {value!r}; an integer of at least {lowest} is needed", field=key)
    return value


def _width(path: Path, bucketing: Mapping[str, Any], key: str, default: int) -> int:
    return _count(f"{path}: bucketing", {key: bucketing.get(key, default)}, key, 1)


def _text(path: Path, document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or not value:
        raise InvalidArgument(f"{path}: {key} is {value!r}; a name is needed", field=key)
    return value


def _mapping(path: Path, document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key, {})
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path}: {key} is not an object", field=key)
    return value


def _columns(path: Path, tables: Mapping[int, list[_Cell]]) -> dict[str, NDArray[Any]]:
    cells = [(number, cell) for number, listed in tables.items() for cell in listed]
    counts = [cell.latency_ns.size for _, cell in cells]
    total = sum(counts)
    if total > _MAX_SAMPLES:
        raise InvalidArgument(f"{path} holds {total} samples; at most {_MAX_SAMPLES} are imported", field="file")

    def spread(values: Iterable[int], dtype: Any) -> NDArray[Any]:
        return np.repeat(np.fromiter(values, dtype=dtype, count=len(cells)), counts)

    return {
        "table": spread((number for number, _ in cells), np.int8),
        "total_tokens": spread((cell.tokens for _, cell in cells), np.int32),
        "concurrency": spread((cell.concurrency for _, cell in cells), np.int32),
        "context_tokens": np.full(total, -1, dtype=np.int64),
        "previous_prefill_tokens": np.full(total, -1, dtype=np.int32),
        "latency_ns": np.concatenate([cell.latency_ns for _, cell in cells]),
    }


def _report(cells: list[_Cell], min_samples: int = 30) -> TableReport:
    tails = [cell.latency_ns[cell.latency_ns > _TAIL_FACTOR * np.median(cell.latency_ns)] for cell in cells]
    total_ns = sum(int(cell.latency_ns.sum()) for cell in cells)
    return TableReport(
        cells=len(cells),
        samples=sum(cell.latency_ns.size for cell in cells),
        thin_cells=sum(cell.latency_ns.size < min_samples for cell in cells),
        tail_samples=sum(tail.size for tail in tails),
        tail_time_share=sum(int(tail.sum()) for tail in tails) / total_ns,
        largest_ms=max(int(cell.latency_ns.max()) for cell in cells) / 1e6,
    )
