"""The latency surfaces of a pack, as the server would answer them, for people to look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle_server.pack import CompiledPack, PackReport, compile_pack, load_compiled, open_oracle
from oracle_server.sampling.answer import KNOWLEDGE_EXTRAPOLATED, SUPPORT_EXTRAPOLATED
from oracle_server.sampling.oracle import Oracle
from oracle_server.sampling.shape import StepQuery
from profiler.grids import octaves


@dataclass(frozen=True)
class Surface:
    """`latency_ms` has one row per y and one column per x; NaN is a hole, where the pack has no sample.

    `weak` marks points nobody measured the surroundings of (extrapolated).
    """

    title: str
    x_name: str
    y_name: str
    x: tuple[int, ...]
    y: tuple[int, ...]
    latency_ms: NDArray[np.float64]
    weak: NDArray[np.bool_]


def read_pack(directory: Path) -> tuple[PackReport, CompiledPack]:
    """Checks the pack exactly as a server does and reads it into memory."""
    with TemporaryDirectory(prefix="step-oracle-") as scratch:
        out = Path(scratch) / "compiled"
        report = compile_pack(directory, out)
        compiled = load_compiled(out)
        arrays = {name: np.array(array) for name, array in compiled.arrays.items()}
    return report, dataclasses.replace(compiled, arrays=arrays)


def surfaces_of(
    compiled: CompiledPack, *, per_octave: int = 2, most_rows: int = 64, most_columns: int = 64
) -> tuple[Surface, ...]:
    """Decode steps and prefill steps.

    `most_rows` and `most_columns` bound the patches that samples are pooled in; the points of a composed model are
    always `per_octave` to an octave.
    """
    if compiled.manifest.kind == "sampled":
        tables = ("decode", "prefill")
        return tuple(_sampled(compiled.arrays, table, most_rows, most_columns) for table in tables)
    # One ratio of 1: the surface is the model itself, without the scatter around it.
    arrays = {**compiled.arrays, "residuals": np.ones(1, dtype=np.float32)}
    oracle = open_oracle(dataclasses.replace(compiled, arrays=arrays))
    coverage = compiled.manifest.coverage
    return (
        _decode(
            oracle, _limit(coverage, "decode_requests", 256), _limit(coverage, "context_tokens", 32768), per_octave
        ),
        _prefill(oracle, _limit(coverage, "chunk_tokens", 8192), _limit(coverage, "history_tokens", 32768), per_octave),
    )


def count_label(value: int) -> str:
    """Tokens or requests for an axis: 4k for 4096."""
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value)


def milliseconds_label(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _limit(coverage: Mapping[str, Any], name: str, default: int) -> int:
    value = coverage.get(name)
    return value if isinstance(value, int) and value > 0 else default


def _decode(oracle: Oracle, requests: int, context: int, per_octave: int) -> Surface:
    rows, columns = octaves(1, requests, per_octave), octaves(16, context, per_octave)

    def query(count: int, kv: int) -> StepQuery:
        return StepQuery((), (), count, count, count * kv, kv, count, 0, 0)

    values, weak = _answers(oracle, [[query(count, kv) for kv in columns] for count in rows])
    return Surface(
        "Decode step", "context tokens per request", "decode requests", tuple(columns), tuple(rows), values, weak
    )


def _prefill(oracle: Oracle, chunk: int, history: int, per_octave: int) -> Surface:
    rows, columns = octaves(1, chunk, per_octave), [0, *octaves(16, history, per_octave)[1:]]

    def query(tokens: int, kv: int) -> StepQuery:
        return StepQuery((tokens,), (kv,), 0, 0, 0, 0, 1, 0, 1)

    values, weak = _answers(oracle, [[query(tokens, kv) for kv in columns] for tokens in rows])
    return Surface(
        "Prefill step, one request",
        "context tokens before the chunk",
        "chunk tokens",
        tuple(columns),
        tuple(rows),
        values,
        weak,
    )


def _answers(oracle: Oracle, queries: Sequence[Sequence[StepQuery]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    answers = [[oracle.answer(query, 0, 0) for query in row] for row in queries]
    values = np.array([[answer.latency_ns / 1e6 for answer in row] for row in answers])
    weak = np.array(
        [
            [answer.support == SUPPORT_EXTRAPOLATED or answer.knowledge >= KNOWLEDGE_EXTRAPOLATED for answer in row]
            for row in answers
        ]
    )
    return values, weak


def _sampled(arrays: Mapping[str, NDArray[Any]], table: str, most_rows: int, most_columns: int) -> Surface:
    """Median of the samples of each patch of buckets; patches are as small as the limits let them be."""
    fields = ("row_concurrency", "row_begin", "bucket_tokens", "sample_begin", "latency_ns")
    concurrency, row_begin, tokens, sample_begin, latency = (arrays[f"{table}.{field}"] for field in fields)
    bucket_concurrency = np.repeat(concurrency, np.diff(row_begin))
    rows = [int(value) for value in concurrency]
    if len(rows) > most_rows:
        rows = _patches(rows[-1], most_rows)
    columns = _patches(int(tokens.max()), most_columns)
    columns = columns[max(int(np.searchsorted(columns, tokens.min(), side="right")) - 1, 0) :]
    row_of_bucket = np.searchsorted(rows, bucket_concurrency, side="right") - 1
    column_of_bucket = np.searchsorted(columns, tokens, side="right") - 1
    values = np.full((len(rows), len(columns)), np.nan)
    for row in range(len(rows)):
        for column in np.unique(column_of_bucket[row_of_bucket == row]):
            buckets = np.flatnonzero((row_of_bucket == row) & (column_of_bucket == column))
            samples = [latency[sample_begin[bucket] : sample_begin[bucket + 1]] for bucket in buckets]
            values[row, column] = float(np.median(np.concatenate(samples))) / 1e6
    name = "Decode step" if table == "decode" else "Step with new requests"
    return Surface(
        f"{name}, median of samples",
        "total tokens",
        "concurrency",
        tuple(columns),
        tuple(rows),
        values,
        np.zeros(values.shape, dtype=bool),
    )


def _patches(limit: int, most: int) -> list[int]:
    """Lower bounds from 1, two to an octave or as many fewer as it takes to have at most `most`."""
    for per_octave in (2, 1, 0.5, 0.25):
        bounds = octaves(1, limit, per_octave)
        if len(bounds) <= most:
            break
    return bounds
