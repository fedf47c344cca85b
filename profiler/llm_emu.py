"""Reads LLM-Emu profile packs (JSON 2.0 and 2.1), every sample in the order it was captured.

LLM-Emu files the wall time of an engine-loop iteration under the batch just scheduled (arXiv 2605.00616), so the first
decode step after a prefill carries some of the prefill's time (`llm_emu_transition.py`). Context tokens come from the
3-D tables that AMD's packs have (`llm_emu_context.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import InvalidArgument
from profiler.llm_emu_context import interleave

_MAX_FILE_BYTES = 256 << 20
_MAX_SAMPLES = 20_000_000
_VERSIONS = ("2.0", "2.1")
DECODE, PREFILL = 0, 1
_TABLES = ((DECODE, "decode_2d_distribution"), (PREFILL, "prefill_2d_distribution"))
_CONTEXT_TABLES = {
    "prefill_2d_distribution": "prefill_3d_distribution",
    "decode_2d_distribution": "decode_3d_distribution",
}
# Parts of the format that have no place in the pack; named in its provenance where a file holds them.
_LEFT_OUT = (
    "prefill_axis_distribution",
    "decode_axis_distribution",
    "alpha_kv",
    "sched_overhead_table",
    "sched_overhead_table_v2",
    "avg_sample_ms",
    "bw_calibration",
)
# A sample so much above its cell's median is no scatter of the device.
FAR_FACTOR = 3.0


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
    """A parsed file.

    `columns` are those of samples.parquet as LLM-Emu files its samples, rows in capture order within each cell;
    `context_tokens` is the column of that name where the 3-D tables give it, else None.
    """

    source: str
    version: str
    gpu_model: str
    model_name: str
    tokens_bucket_width: int
    concurrency_bucket_width: int
    context_bucket_width: int
    model_config: Mapping[str, Any]
    columns: Mapping[str, NDArray[Any]]
    context_tokens: NDArray[np.int64] | None
    reports: Mapping[str, TableReport]
    left_out: tuple[str, ...]


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
    tables: dict[int, list[_Cell]] = {}
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
    contexts = [_contexts(path, document, key, tables[number]) for number, key in _TABLES]
    known = [column for column in contexts if column is not None]
    return LlmEmuPack(
        source=path.name,
        version=version,
        gpu_model=gpu_model,
        model_name=str(document.get("model_name") or "unknown"),
        tokens_bucket_width=_width(path, bucketing, "tt_bucket_width", 1),
        concurrency_bucket_width=_width(path, bucketing, "conc_bucket_width", 5),
        context_bucket_width=_width(path, bucketing, "kv_bucket_width", 4096),
        model_config=config,
        columns=_columns(path, tables),
        context_tokens=np.concatenate(known) if len(known) == len(contexts) else None,
        reports={"decode": _report(tables[DECODE]), "prefill": _report(tables[PREFILL])},
        left_out=tuple(
            key
            for key in (*(_CONTEXT_TABLES.values() if len(known) < len(contexts) else ()), *_LEFT_OUT)
            if document.get(key)
        ),
    )


@dataclass(frozen=True)
class _Cell:
    tokens: int
    concurrency: int
    # Bucket center, of cells of a 3-D table.
    context: int
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
    tokens, concurrency = whole_number(where, raw, "tt", 1), whole_number(where, raw, "conc", 1)
    if max(tokens, concurrency) >= 1 << 31:
        raise InvalidArgument(f"{where} has tt {tokens} and conc {concurrency}; both lie below 2^31", field=table)
    context = whole_number(where, raw, "kv", 0) if "kv" in raw else 0
    return _Cell(tokens, concurrency, context, latency)


def _contexts(path: Path, document: Mapping[str, Any], key: str, cells: list[_Cell]) -> NDArray[np.int64] | None:
    """Context tokens of the samples of a 2-D table; None without a 3-D table of just these samples."""
    listed = document.get(_CONTEXT_TABLES[key])
    if not isinstance(listed, list) or not listed:
        return None
    parts: dict[tuple[int, int], list[_Cell]] = {}
    for index, raw in enumerate(listed):
        part = _cell(path, _CONTEXT_TABLES[key], index, raw)
        parts.setdefault((part.tokens, part.concurrency), []).append(part)
    result = []
    for cell in cells:
        candidates = parts.get((cell.tokens, cell.concurrency), [])
        taken = interleave(cell.latency_ns.tolist(), [part.latency_ns.tolist() for part in candidates])
        if taken is None:
            return None
        result += [candidates[number].context for number in taken]
    return np.array(result, dtype=np.int64)


def whole_number(where: str, raw: Mapping[str, Any], key: str, lowest: int) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= 1 << 53:
        raise InvalidArgument(f"{where}.{key} is {value!r}; an integer of at least {lowest} is needed", field=key)
    return value


def _width(path: Path, bucketing: Mapping[str, Any], key: str, default: int) -> int:
    return whole_number(f"{path}: bucketing", {key: bucketing.get(key, default)}, key, 1)


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
    tails = [cell.latency_ns[cell.latency_ns > FAR_FACTOR * np.median(cell.latency_ns)] for cell in cells]
    total_ns = sum(int(cell.latency_ns.sum()) for cell in cells)
    return TableReport(
        cells=len(cells),
        samples=sum(cell.latency_ns.size for cell in cells),
        thin_cells=sum(cell.latency_ns.size < min_samples for cell in cells),
        tail_samples=sum(tail.size for tail in tails),
        tail_time_share=sum(int(tail.sum()) for tail in tails) / total_ns,
        largest_ms=max(int(cell.latency_ns.max()) for cell in cells) / 1e6,
    )
