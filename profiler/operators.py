"""The operators of a composed pack: what each cost depends on, its grid, its values and how each value is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from numpy.typing import NDArray

from oracle_server import pack
from oracle_server.errors import InvalidArgument
from profiler.aiconfigurator import ALL_REDUCE, ELEMENTWISE, GEMM, OperatorModel
from profiler.grids import context_grid, request_grid, row_grid, token_grid
from profiler.model_config import ModelConfig
from profiler.silicon_tables import MODELLED, NAMES, SiliconTables


@dataclass(frozen=True)
class Operator:
    """One full grid. `latency_ns` and `knowledge` have the shape of the grid, axes in the order of `axes`."""

    name: str
    axes: tuple[str, ...]
    group: str
    points: tuple[tuple[int, ...], ...]
    latency_ns: NDArray[np.float64]
    knowledge: NDArray[np.int8]
    # Library operators whose value comes from another device's or shape's table.
    transferred: frozenset[str] = frozenset()

    def summary(self) -> str:
        """For example "measured 12 %, interpolated 88 %" of the grid points."""
        counts = [(label, int((self.knowledge == number).sum())) for number, label in NAMES.items()]
        return ", ".join(f"{label} {100 * count / self.knowledge.size:.0f} %" for label, count in counts if count)


def manifest_operators(operators: Sequence[Operator]) -> tuple[pack.Operator, ...]:
    """What a manifest says of them, numbered in their order."""
    return tuple(
        pack.Operator(
            id=number, name=operator.name, axes=operator.axes, group=operator.group, knowledge=operator.summary()
        )
        for number, operator in enumerate(operators)
    )


@dataclass(frozen=True)
class GridLimits:
    """Largest value of each axis."""

    tokens: int = 8192
    requests: int = 512
    context: int = 131_072


@dataclass(frozen=True)
class Link:
    """The wire between tensor-parallel ranks of the emulated machine, as nccl-tests' all_reduce_perf prints it."""

    # Bus bandwidth of the largest message.
    bytes_per_s: float
    # Time of the smallest message.
    latency_s: float

    def all_reduce_ns(self, tensor_parallel: int, message_bytes: int) -> float:
        """Latency plus the 2 (n-1)/n of the message that every rank sends (Patarasuk and Yuan 2009)."""
        sent_bytes = 2 * (tensor_parallel - 1) / tensor_parallel * message_bytes
        return 1e9 * (self.latency_s + sent_bytes / self.bytes_per_s)


def evaluate_operators(
    source: OperatorModel,
    tables: SiliconTables,
    model: ModelConfig,
    *,
    tensor_parallel: int,
    limits: GridLimits,
    link: Link | None = None,
) -> list[Operator]:
    """Evaluates every operator over its grid, uncorrected; nanoseconds per step of one rank."""
    tokens = token_grid(limits.tokens, tables.measured_tokens)
    rows = row_grid(limits.requests, tables.measured_tokens)
    requests = request_grid(limits.requests, tables.measured_requests)
    contexts = context_grid(limits.context, tables.measured_contexts)
    chunks = context_grid(limits.tokens, tables.measured_chunks)
    histories = context_grid(limits.context, tables.measured_chunks, first=0)
    gemm = [name for name in GEMM if name in source.names]
    total = ("total_tokens",)
    build = partial(_evaluate, source)
    dense = build("dense_gemm", total, "dense", (tokens,), lambda t: source.dense(gemm, t), tables.dense_gemm)
    elementwise = build(
        "dense_elementwise", total, "dense", (tokens,), lambda t: source.dense(ELEMENTWISE, t), lambda _: MODELLED
    )
    logits = build("logits", ("logits_rows",), "logits", (rows,), source.logits, tables.logits)
    decode = build(
        "generation_attention",
        ("decode_requests", "mean_context_tokens"),
        "attention",
        (requests, contexts),
        source.generation_attention,
        tables.generation_attention,
    )
    prefill = build(
        "context_attention",
        ("chunk_tokens", "history_tokens"),
        "attention",
        (chunks, histories),
        source.context_attention,
        tables.context_attention,
    )
    if tensor_parallel == 1:
        return [dense, elementwise, logits, decode, prefill]
    if link is None:
        cost: Callable[[int], float] = partial(source.dense, ALL_REDUCE)
        label: Callable[[int], int] = tables.all_reduce
    else:
        cost, label = partial(_all_reduce_ns, link, model, tensor_parallel), lambda _: MODELLED
    all_reduce = build("all_reduce", total, "communication", (tokens,), cost, label)
    return [dense, elementwise, all_reduce, logits, decode, prefill]


def columns_of(operators: Sequence[Operator]) -> Mapping[str, NDArray[np.generic]]:
    """The long form of operators.parquet: one row per grid point, last axis fastest."""
    parts = []
    for number, operator in enumerate(operators):
        mesh = np.meshgrid(*[np.asarray(axis, dtype=np.float64) for axis in operator.points], indexing="ij")
        size = operator.latency_ns.size
        axes = [axis.ravel() for axis in mesh] + [np.zeros(size)] * (4 - len(mesh))
        parts.append(
            (np.full(size, number, dtype=np.int16), *axes, operator.latency_ns.ravel(), operator.knowledge.ravel())
        )
    names = ("operator", "x0", "x1", "x2", "x3", "latency_ns", "knowledge")
    return {name: np.concatenate([part[index] for part in parts]) for index, name in enumerate(names)}


def _evaluate(
    source: OperatorModel,
    name: str,
    axes: tuple[str, ...],
    group: str,
    points: Sequence[Sequence[int]],
    cost: Callable[..., float],
    label: Callable[..., int],
) -> Operator:
    shape = [len(axis) for axis in points]
    latency = np.array([cost(*point) for point in product(*points)], dtype=np.float64).reshape(shape)
    if not np.isfinite(latency).all() or (latency < 0).any():
        raise InvalidArgument(f"operator {name} has a value that is no latency (negative, infinite or NaN)")
    knowledge = np.array([label(*point) for point in product(*points)], dtype=np.int8).reshape(shape)
    transferred = source.take_transferred()
    if transferred:
        knowledge = np.maximum(knowledge, np.int8(MODELLED))
    return Operator(name, axes, group, tuple(tuple(axis) for axis in points), latency, knowledge, transferred)


def _all_reduce_ns(link: Link, model: ModelConfig, tensor_parallel: int, tokens: int) -> float:
    """Two in each layer, after attention and after the feed-forward part, and one after the embedding."""
    count = 2 * model.num_layers + 1
    return count * link.all_reduce_ns(tensor_parallel, tokens * model.hidden_size * 2)
