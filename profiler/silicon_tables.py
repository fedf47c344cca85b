"""How well a grid point is known, from the keys of the measured tables themselves.

The library that evaluates the operators tags a value `silicon` wherever a table took part, also between and beyond its
points. So the labels are computed here: a point is measured where the table has that very key, interpolated inside the
measured region, extrapolated outside of it. Numbers are those of step_oracle.v1.Knowledge; larger is weaker.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiler.aiconfigurator import BACKEND, System
from profiler.model_config import ModelConfig

MEASURED, INTERPOLATED, MODELLED, EXTRAPOLATED, SPEED_OF_LIGHT = 1, 2, 3, 4, 5
NAMES = {
    MEASURED: "measured",
    INTERPOLATED: "interpolated",
    MODELLED: "modelled",
    EXTRAPOLATED: "extrapolated",
    SPEED_OF_LIGHT: "speed of light",
}

_GEMM_DTYPE = {"bfloat16": "bfloat16", "float16": "bfloat16", "float32": "bfloat16"}


@dataclass(frozen=True)
class _Grid:
    """Measured keys of two ascending axes; `cells` holds the pairs that exist."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    cells: frozenset[tuple[int, int]]

    def label(self, x: int, y: int) -> int:
        if (x, y) in self.cells:
            return MEASURED
        corners = [(a, b) for a in _around(self.first, x) for b in _around(self.second, y)]
        return INTERPOLATED if corners and all(corner in self.cells for corner in corners) else EXTRAPOLATED


class SiliconTables:
    """Keys of the tables of one system, narrowed to one model and tensor-parallel size. Read-only."""

    def __init__(self, system: System, model: ModelConfig, tensor_parallel: int) -> None:
        self.paths: list[Path] = []
        self._tensor_parallel = tensor_parallel
        self._hidden_size = model.hidden_size
        self._gemm_shapes = gemm_shapes(model, tensor_parallel)
        self._logits_shape = (-(-model.vocab_size // tensor_parallel), model.hidden_size)
        gemm = self._read(system, "gemm", "gemm_perf", ["gemm_dtype", "m", "n", "k"])
        self._tokens, self._pairs = _gemm_keys(gemm, _gemm_dtype(model))
        # lm_head is kept in the model's dtype, whatever the rest is quantized to.
        self._head_tokens, self._head_pairs = _gemm_keys(gemm, _GEMM_DTYPE[model.dtype])
        self._messages = self._read_messages(system) if tensor_parallel > 1 else ()
        self._generation = self._read_attention(system, model, "generation")
        self._context = self._read_attention(system, model, "context")
        self._has_experts = model.num_experts > 0

    @property
    def measured_tokens(self) -> tuple[int, ...]:
        """Token counts the GEMM table has, ascending: the ends of its straight pieces."""
        return self._tokens

    @property
    def measured_requests(self) -> tuple[int, ...]:
        return self._generation.first

    @property
    def measured_contexts(self) -> tuple[int, ...]:
        return self._generation.second

    @property
    def measured_chunks(self) -> tuple[int, ...]:
        return self._context.second

    def dense_gemm(self, tokens: int) -> int:
        labels = [_gemm_label(self._tokens, self._pairs, shape, tokens) for shape in self._gemm_shapes]
        # Expert kernels depend on the routing, which the table assumes balanced.
        return max([*labels, MODELLED] if self._has_experts else labels)

    def logits(self, rows: int) -> int:
        return _gemm_label(self._head_tokens, self._head_pairs, self._logits_shape, rows)

    def all_reduce(self, tokens: int) -> int:
        elements = tokens * self._hidden_size
        if elements in self._messages and not self._has_experts:
            return MEASURED
        if not _around(self._messages, elements):
            return EXTRAPOLATED
        # The exchange of tokens between experts depends on the routing, which the table assumes balanced.
        return MODELLED if self._has_experts else INTERPOLATED

    def generation_attention(self, requests: int, context: int) -> int:
        return self._generation.label(requests, context)

    def context_attention(self, chunk: int, history: int) -> int:
        """Modelled at best: the tables hold no history, and rotary embedding and cache write are a bandwidth model."""
        reach = self._context.second[-1] if self._context.second else 0
        return MODELLED if chunk + history <= reach else EXTRAPOLATED

    def _read(self, system: System, family: str, table: str, columns: Sequence[str]) -> Any:
        import pyarrow.parquet as pq

        path = _newest_table(system, family, f"{table}.parquet")
        if path is None:
            return None
        self.paths.append(path)
        file = pq.ParquetFile(path)
        present = [column for column in columns if column in file.schema_arrow.names]
        return file.read(columns=present).to_pydict()

    def _read_messages(self, system: System) -> tuple[int, ...]:
        rows = self._read(system, "comm", "custom_allreduce_perf", ["num_gpus", "message_size"])
        if rows is None:
            return ()
        pairs = zip(rows["num_gpus"], rows["message_size"], strict=True)
        return tuple(sorted({int(size) for gpus, size in pairs if int(gpus) == self._tensor_parallel}))

    def _read_attention(self, system: System, model: ModelConfig, phase: str) -> _Grid:
        """Decode: (requests, context); prefill: (requests, chunk). Only rows of this rank's heads count."""
        columns = ["batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim", "window_size"]
        rows = self._read(system, "attention", f"{phase}_attention_perf", [*columns, "kv_cache_dtype"])
        if rows is None:
            return _Grid((), (), frozenset())
        heads = model.num_heads // self._tensor_parallel
        wanted = (heads, max(1, model.num_kv_heads // self._tensor_parallel), model.head_dim, 0)
        stored = "fp8" if model.kv_cache_dtype == "fp8" else "bfloat16"
        cells = set()
        # Older tables have no column for sliding windows: all of their rows are full attention.
        windows = rows.get("window_size") or [0] * len(rows["num_heads"])
        keys = zip(rows["num_heads"], rows["num_key_value_heads"], rows["head_dim"], windows, strict=True)
        points = zip(rows["batch_size"], rows["isl"], rows["step"], rows["kv_cache_dtype"], strict=True)
        for key, (batch, chunk, step, kv_dtype) in zip(keys, points, strict=True):
            if kv_dtype == stored and tuple(int(value) for value in key) == wanted:
                # A decode row has isl 1 and `step` tokens before it; a prefill row has no history (step 0).
                cells.add((int(batch), int(chunk) + int(step)))
        first = tuple(sorted({cell[0] for cell in cells}))
        second = tuple(sorted({cell[1] for cell in cells}))
        return _Grid(first, second, frozenset(cells))


def gemm_shapes(model: ModelConfig, tensor_parallel: int) -> list[tuple[int, int]]:
    """(N, K) of the linear layers one rank multiplies by, without lm_head."""
    heads = model.num_heads // tensor_parallel
    kv_heads = max(1, model.num_kv_heads // tensor_parallel)
    shapes = [
        ((heads + 2 * kv_heads) * model.head_dim, model.hidden_size),
        (model.hidden_size, heads * model.head_dim),
    ]
    if model.num_experts:
        return [*shapes, (model.num_experts, model.hidden_size)]
    intermediate = model.intermediate_size // tensor_parallel
    return [*shapes, (2 * intermediate, model.hidden_size), (model.hidden_size, intermediate)]


def _gemm_dtype(model: ModelConfig) -> str:
    return _GEMM_DTYPE.get(model.weight_format, model.weight_format)


def _gemm_keys(rows: Any, dtype: str) -> tuple[tuple[int, ...], frozenset[tuple[int, int]]]:
    keys = zip(rows["gemm_dtype"], rows["m"], rows["n"], rows["k"], strict=True)
    chosen = [(int(m), int(n), int(k)) for kind, m, n, k in keys if kind == dtype]
    return tuple(sorted({m for m, _, _ in chosen})), frozenset((n, k) for _, n, k in chosen)


def _gemm_label(tokens: Sequence[int], pairs: frozenset[tuple[int, int]], shape: tuple[int, int], count: int) -> int:
    """The library interpolates over the whole (N, K) rectangle, so inside it is interpolated.

    Beyond the largest N (the lm_head of every large vocabulary) the kernel runs more of the same tiles: a cost
    proportional to N is a model of it, not a trend of unknown shape.
    """
    if not tokens or count > tokens[-1] or count < tokens[0]:
        return EXTRAPOLATED
    if shape in pairs:
        return MEASURED if count in tokens else INTERPOLATED
    rows, columns = {n for n, _ in pairs}, {k for _, k in pairs}
    if not (shape[0] >= min(rows) and min(columns) <= shape[1] <= max(columns)):
        return EXTRAPOLATED
    return INTERPOLATED if shape[0] <= max(rows) else MODELLED


def _around(points: Sequence[int], value: int) -> tuple[int, ...]:
    """The measured points on both sides of `value`: one where it is a point itself, none where it is outside."""
    if not points or value < points[0] or value > points[-1]:
        return ()
    index = bisect_left(points, value)
    return (points[index],) if points[index] == value else (points[index - 1], points[index])


def _newest_table(system: System, family: str, file: str) -> Path | None:
    """The system's own version of a table, else the newest older one: the library fills back, never forward."""
    found = [path for path in (system.data_directory / family / BACKEND).glob(f"*/{file}") if path.is_file()]
    limit = _version_key(system.table_version)
    older = [path for path in found if _version_key(path.parent.name) <= limit]
    return max(older, key=lambda path: _version_key(path.parent.name), default=None)


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in version.split("."))
