"""Builders of test values. Every pack builder writes a whole valid pack into a new directory and returns its digest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from oracle_server.pack import (
    OPERATOR_AXES,
    ComposedLatency,
    Device,
    Engine,
    HostTime,
    HybridLatency,
    HybridTerm,
    KvCache,
    Latency,
    Manifest,
    Model,
    Operator,
    SampledLatency,
    WakePoint,
    write_pack,
)
from oracle_server.sampling.hybrid_tables import long_form
from oracle_server.sampling.shape import StepQuery

MODEL_SHAPE = "Qwen3ForCausalLM layers=2 hidden=64 intermediate=128 heads=4 kv_heads=2 head_dim=16 vocab=512"


def build_manifest(latency: Latency, **overrides: Any) -> Manifest:
    """A manifest with plausible fields that is tied to no engine configuration; `overrides` replace whole fields."""
    fields: dict[str, Any] = {
        "name": "test",
        "kind": "composed" if latency.composed is not None else "hybrid" if latency.hybrid else "sampled",
        "created": "2026-01-02T03:04:05Z",
        "licence": "Apache-2.0",
        "model": Model(id="test/model"),
        "device": Device(name="Test Device", memory_bytes=80 << 30, capability_major=9),
        "engine": Engine(),
        "kv_cache": KvCache(blocks=10_000, block_size=16, basis="assumed", source="made up for a test"),
        "latency": latency,
    }
    return Manifest(**{**fields, **overrides})


def build_constant_pack(
    directory: Path, latency_ns: int = 10_000_000, kv_blocks: int = 10_000, block_size: int = 16, **overrides: Any
) -> str:
    """A composed pack in which every step, whatever its shape, costs exactly `latency_ns`; never extrapolated."""
    wide = (0, 2**31)
    operators: dict[str, dict[tuple[int, ...], float]] = {
        "dense_gemm": {(x,): float(latency_ns) for x in wide},
        "logits": {(x,): 0.0 for x in wide},
        "generation_attention": {(n, kv): 0.0 for n in wide for kv in wide},
        "context_attention": {(chunk, history): 0.0 for chunk in wide for history in wide},
    }
    cache = KvCache(blocks=kv_blocks, block_size=block_size, basis="assumed", source="made up for a test")
    return build_composed_pack(directory, operators=operators, **{"kv_cache": cache, **overrides})


def build_composed_pack(
    directory: Path,
    *,
    operators: Mapping[str, Mapping[tuple[int, ...], float]] | None = None,
    knowledge: Mapping[str, int] | None = None,
    ratios: Sequence[float] | None = None,
    composed: Mapping[str, Any] | None = None,
    prep_ns: int = 0,
    copy_ns: int = 0,
    wake: Sequence[tuple[int, int]] = (),
    host: tuple[int, int] | None = None,
    **overrides: Any,
) -> str:
    """A composed pack.

    `operators` maps names to {grid point: ns} (default: `plausible_operators()`), `knowledge` names to the Knowledge of
    all their points (default 1, measured), `ratios` is the residual pool (None: no file), `wake` (idle ns, extra ns) of
    pauses, `host` (ns per step, ns per request), `composed` replaces fields of ComposedLatency, `overrides` fields of
    the manifest.
    """
    operators = plausible_operators() if operators is None else operators
    columns = operator_columns(operators, knowledge or {})
    latency = Latency(
        prep_ns=prep_ns,
        copy_ns=copy_ns,
        wake=tuple(WakePoint(idle_ns=idle, extra_ns=extra) for idle, extra in wake) or UNSET,
        host=HostTime(step_ns=host[0], request_ns=host[1]) if host else UNSET,
        composed=ComposedLatency(**{"operators": operator_specs(operators), **(composed or {})}),
    )
    residuals = None if ratios is None else {"ratio": np.asarray(ratios, dtype=np.float32)}
    return write_pack(directory, build_manifest(latency, **overrides), operators=columns, residuals=residuals)


def build_sampled_pack(
    directory: Path,
    *,
    samples: Mapping[str, Any] | None = None,
    sampled: Mapping[str, Any] | None = None,
    transition: bool = False,
    prep_ns: int = 0,
    copy_ns: int = 0,
    **overrides: Any,
) -> str:
    """A sampled pack.

    `samples` are the columns of samples.parquet (default: `plausible_samples()`), `sampled` replaces fields of
    SampledLatency, `overrides` fields of the manifest.
    """
    latency = Latency(
        prep_ns=prep_ns, copy_ns=copy_ns, transition=transition, sampled=SampledLatency(**(sampled or {}))
    )
    columns = plausible_samples() if samples is None else samples
    return write_pack(directory, build_manifest(latency, **overrides), samples=columns)


def build_hybrid_pack(
    directory: Path, *, ratios: Sequence[float] | None = None, hybrid: Mapping[str, Any] | None = None, **overrides: Any
) -> str:
    """A hybrid pack of `HYBRID_TERMS` and `plausible_model()`; `hybrid` replaces fields of HybridLatency, `ratios` is
    the residual pool (None: no file), `overrides` replace fields of the manifest."""
    terms = tuple(HybridTerm(name=name, above=above, coefficient_ns=ns) for name, above, ns in HYBRID_TERMS)
    latency = Latency(hybrid=HybridLatency(**{"terms": terms, **(hybrid or {})}))
    residuals = None if ratios is None else {"ratio": np.asarray(ratios, dtype=np.float32)}
    return write_pack(
        directory, build_manifest(latency, **overrides), model=long_form(plausible_model()), residuals=residuals
    )


# Name, above, nanoseconds: one of each kind, with a kink.
HYBRID_TERMS = (
    ("step", 0.0, 5e6),
    ("mixed_step", 0.0, 4e5),
    ("total_tokens", 0.0, 900.0),
    ("total_tokens", 64.0, 7_000.0),
    ("decode_requests", 0.0, 21_000.0),
    ("decode_context_tokens", 0.0, 27.5),
    ("max_decode_context_tokens", 0.0, 110.25),
    ("prefill_chunks", 0.0, 33_000.0),
    ("prefill_tokens", 16.0, 450.0),
    ("prefill_history_tokens", 0.0, 56.5),
    ("prefill_attention_pairs", 0.0, 1.75),
)


def plausible_model(seed: int = 7) -> dict[str, NDArray[np.float64]]:
    """Arrays of a hybrid model: a table whose ratios differ from corner to corner, measured mixed steps all over."""
    random = np.random.default_rng(seed)
    requests = np.array([1, 2, 4, 7, 16, 33, 64, 256])
    context = np.array([0, 16, 128, 500, 1024, 4096, 16384])
    cells = (requests.size, context.size)
    points = np.column_stack(
        (
            random.uniform(0, 9, 60),
            np.log(random.integers(1, 5, 60)),
            random.uniform(0, 9, 60),
            random.uniform(0, 5, 60),
            random.uniform(0, 9, 60),
        )
    )
    return {
        "decode_requests": requests.astype(np.float64),
        "decode_context": context.astype(np.float64),
        "decode_ratio": random.uniform(0.8, 1.25, cells),
        "decode_support": random.integers(1, 4, cells).astype(np.float64),
        "decode_distance": random.uniform(0, 2, cells),
        "mixed_support": np.column_stack((points, random.uniform(0.7, 1.4, 60))),
        "mixed_residual": np.array([0.9, 1.0, 1.1, 1.4]),
    }


def plausible_operators() -> dict[str, dict[tuple[int, ...], float]]:
    """Small grids that grow as a GPU's do, with kinks between grid points; nanoseconds."""
    tokens = (1, 8, 64, 256, 1024, 4096, 8192)
    requests = (1, 4, 16, 64, 256)
    kv = (1, 16, 128, 1024, 4096, 16384)
    return {
        "dense_gemm": {(t,): 5e6 + 900.0 * t + 3e4 * (t % 7) for t in tokens},
        "dense_elementwise": {(t,): 2e5 + 40.0 * t for t in tokens},
        "logits": {(s,): 3e5 + 1500.0 * s for s in requests},
        "generation_attention": {(n, k): 3e5 + 1.5 * n * k + 120.0 * n for n in requests for k in kv},
        "context_attention": {(c, h): 1e5 + 0.02 * c * (c + 2 * h) + 300.0 * c for c in tokens for h in (0, *kv)},
    }


def operator_specs(names: Iterable[str]) -> tuple[Operator, ...]:
    """Manifest entries for operators, numbered in the order given."""
    return tuple(Operator(id=i, name=name, axes=OPERATOR_AXES[name]) for i, name in enumerate(names))


def operator_columns(
    operators: Mapping[str, Mapping[tuple[int, ...], float]], knowledge: Mapping[str, int] | None = None
) -> dict[str, NDArray[Any]]:
    """Columns of operators.parquet for {name: {grid point: ns}}, numbered in the order given."""
    known = knowledge or {}
    rows = [
        (number, *point, *(0,) * (4 - len(point)), value, known.get(name, 1))
        for number, (name, grid) in enumerate(operators.items())
        for point, value in grid.items()
    ]
    kinds = {"operator": np.int16, "knowledge": np.int8}
    names = ("operator", "x0", "x1", "x2", "x3", "latency_ns", "knowledge")
    return {name: np.array([row[i] for row in rows], dtype=kinds.get(name, np.float64)) for i, name in enumerate(names)}


def sample_columns(rows: Iterable[Sequence[int]]) -> dict[str, NDArray[Any]]:
    """Columns of samples.parquet from rows (table, total tokens, concurrency, ns[, previous prefill tokens[,
    context]])."""
    full = [(*row, *(-1,) * (6 - len(row))) for row in rows]
    order = {
        "table": (0, np.int8),
        "total_tokens": (1, np.int32),
        "concurrency": (2, np.int32),
        "context_tokens": (5, np.int64),
        "previous_prefill_tokens": (4, np.int32),
        "latency_ns": (3, np.int64),
    }
    return {name: np.array([row[i] for row in full], dtype=kind) for name, (i, kind) in order.items()}


def plausible_samples(seed: int = 1) -> dict[str, NDArray[Any]]:
    """Decode buckets full of samples, and a sparse prefill table, some buckets with one sample only."""
    random = np.random.default_rng(seed)
    rows: list[tuple[int, ...]] = []
    for concurrency in (1, 2, 4, 8, 16, 32, 64):
        body = 5_000_000 + 50_000 * concurrency + random.integers(0, 200_000, size=40)
        tail = 9_000_000 + 50_000 * concurrency + random.integers(0, 900_000, size=5)
        rows += [(0, concurrency, concurrency, int(latency), 0) for latency in body]
        rows += [(0, concurrency, concurrency, int(latency), 512) for latency in tail]
    for concurrency in (1, 2, 5, 9, 33):
        for tokens in random.integers(concurrency, 4096, size=30):
            noise = random.integers(0, 400_000, size=random.integers(1, 12))
            rows += [(1, int(tokens), concurrency, int(6_000_000 + 8_000 * tokens + extra)) for extra in noise]
    return sample_columns(rows)


def decode_query(
    requests: int, context: int, longest: int | None = None, *, tokens: int | None = None, **fields: Any
) -> StepQuery:
    """A decode-only step; `longest` defaults to the mean context rounded up, `tokens` to `requests`."""
    query = StepQuery(
        chunk_tokens=(),
        chunk_context=(),
        num_decode_requests=requests,
        num_decode_tokens=requests if tokens is None else tokens,
        decode_context_tokens=context,
        max_decode_context_tokens=-(-context // requests) if longest is None else longest,
        concurrency=requests,
        previous_prefill_tokens=0,
        num_new_requests=0,
    )
    return query._replace(**fields)


def mixed_query(
    chunks: Iterable[tuple[int, int]], requests: int = 0, context: int = 0, longest: int | None = None, **fields: Any
) -> StepQuery:
    """A step with prefill chunks (tokens, history) and `requests` decode requests."""
    pairs = tuple(chunks)
    query = StepQuery(
        chunk_tokens=tuple(tokens for tokens, _ in pairs),
        chunk_context=tuple(history for _, history in pairs),
        num_decode_requests=requests,
        num_decode_tokens=requests,
        decode_context_tokens=context,
        max_decode_context_tokens=(-(-context // requests) if requests else 0) if longest is None else longest,
        concurrency=requests + len(pairs),
        previous_prefill_tokens=0,
        num_new_requests=len(pairs),
    )
    return query._replace(**fields)
