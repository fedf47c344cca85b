"""Measured steps to fit a hybrid pack from: a table of step shapes, a step trace of the shim, or BLIS's step table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import InvalidArgument
from oracle_server.sampling.hybrid import attention_pairs
from oracle_server.sampling.shape import StepQuery

Ints = NDArray[np.int64]
FORMATS: Final = ("auto", "table", "trace", "blis")

# Columns of a samples table. A chunk column holds a list in Parquet, numbers with a space between in CSV; without the
# two of them, num_prefill_chunks and prefill_tokens say how many chunks of one size without history there are.
NEEDED: Final = ("num_decode_requests", "decode_context_tokens", "latency_ns")
OPTIONAL: Final = (
    "num_decode_tokens",
    "max_decode_context_tokens",
    "prefill_chunk_tokens",
    "prefill_chunk_context_tokens",
    "num_prefill_chunks",
    "prefill_tokens",
)


@dataclass(frozen=True)
class StepSamples:
    """Steps in capture order, int64[n] each: what the hybrid model sees of a step, and how long it took."""

    chunks: Ints
    prefill_tokens: Ints
    history_tokens: Ints
    # Query-key pairs of prefill attention.
    pairs: Ints
    decode_requests: Ints
    decode_tokens: Ints
    context_tokens: Ints
    max_context_tokens: Ints
    latency_ns: Ints
    # The same steps as an oracle is asked, StepQuery each.
    queries: NDArray[np.object_]

    def __len__(self) -> int:
        return int(self.latency_ns.size)

    @property
    def mixed(self) -> NDArray[np.bool_]:
        """Steps with prefill work."""
        return self.chunks > 0

    def take(self, rows: NDArray[Any]) -> StepSamples:
        """Some of the steps, by index or by a mask."""
        return StepSamples(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True)
class SampleFile:
    """What a file says: its steps and what is known about how they were measured."""

    steps: StepSamples
    # Steps the file has but that no latency can be fitted from, with the reason.
    left_out: Mapping[str, int]
    # False: the longest context is set to the mean, so its term is left out.
    max_context_known: bool
    kv_blocks: int | None = None
    block_size: int | None = None
    notes: tuple[str, ...] = ()


def read_samples(path: Path, form: str = "auto", block_size: int = 16) -> SampleFile:
    """Read measured steps; raises InvalidArgument naming file, column and row.

    `auto` reads .parquet and .csv as a table (a Parquet file with a column step.ts_start_ns as BLIS's), anything else
    as a step trace. `block_size` is used where blocks say how many tokens of context there are.
    """
    if form not in FORMATS:
        raise InvalidArgument(f"format {form!r} is none of {', '.join(FORMATS)}", field="format")
    try:
        if form == "auto":
            form = _form_of(path)
        if form == "trace":
            return _read_trace(path)
        columns = _read_columns(path)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}", field="samples") from None
    return _from_blis(path, columns, block_size) if form == "blis" else _from_table(path, columns)


def _form_of(path: Path) -> str:
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        return "blis" if "step.ts_start_ns" in pq.read_schema(path).names else "table"
    return "table" if path.suffix.lower() == ".csv" else "trace"


def _read_columns(path: Path) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".csv":
        with path.open(newline="") as file:
            names = [name.strip('"') for name in file.readline().strip().split(",")]
        chunk_columns = [name for name in names if name.startswith("prefill_chunk_")]
        options = pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in chunk_columns}, strings_can_be_null=False
        )
        table = pyarrow.csv.read_csv(path, convert_options=options)
    else:
        table = pq.read_table(path)
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _from_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> SampleFile:
    for name in NEEDED:
        if name not in columns:
            raise InvalidArgument(
                f"{path} has no column {name}; a samples table has {', '.join(NEEDED)}, and of {', '.join(OPTIONAL)} "
                "those that are known",
                field="samples",
            )
    count = len(columns["latency_ns"])
    requests, context, latency = (_whole(path, name, columns[name]) for name in NEEDED)
    decode_tokens = _whole(path, "num_decode_tokens", columns.get("num_decode_tokens", requests))
    known = "max_decode_context_tokens" in columns
    longest = (
        _whole(path, "max_decode_context_tokens", columns["max_decode_context_tokens"])
        if known
        else _mean_up(context, requests)
    )
    if "prefill_chunk_tokens" in columns:
        tokens = [_chunk(path, "prefill_chunk_tokens", row, cell) for row, cell in _rows(columns, count, 0)]
        histories = [_chunk(path, "prefill_chunk_context_tokens", row, cell) for row, cell in _rows(columns, count, 1)]
        if "prefill_chunk_context_tokens" not in columns:
            histories = [(0,) * len(chunk) for chunk in tokens]
    else:
        chunks = _whole(path, "num_prefill_chunks", columns.get("num_prefill_chunks", np.zeros(count)))
        prefill = _whole(path, "prefill_tokens", columns.get("prefill_tokens", np.zeros(count)))
        tokens = [_even(int(k), int(p)) for k, p in zip(chunks, prefill, strict=True)]
        histories = [(0,) * len(chunk) for chunk in tokens]
    for row, (chunk, history) in enumerate(zip(tokens, histories, strict=True)):
        if len(chunk) != len(history) or any(token < 1 for token in chunk):
            raise InvalidArgument(
                f"{path}, row {row}: chunks {chunk} with histories {history}; a chunk has tokens and one history",
                field="samples",
            )
    steps = _steps(tokens, histories, requests, decode_tokens, context, longest, latency)
    return _checked(path, steps, known, {})


def _from_blis(path: Path, columns: Mapping[str, Sequence[Any]], block_size: int) -> SampleFile:
    """BLIS's step table (inference-sim/inference-sim).

    A step takes from its start to the start of the next: `step.duration_us` is dispatch alone, about 2 % of it. So only
    steps whose successor is in the table are samples. Context is what all used blocks hold, shared over the requests
    of the step; prompts of one step are taken to be of one size, and what they found in the prefix cache is their
    share of the used blocks.
    """
    names = (
        "step.id",
        "step.ts_start_ns",
        "batch.num_prefill_reqs",
        "batch.num_decode_reqs",
        "batch.prefill_tokens",
        "batch.decode_tokens",
        "kv.blocks_total_gpu",
        "kv.blocks_free_gpu",
    )
    for name in names:
        if name not in columns:
            raise InvalidArgument(f"{path} has no column {name}; it is not a BLIS step table", field="samples")
    table = {name: _whole(path, name, columns[name]) for name in names}
    run = np.unique(np.asarray(columns.get("experiment_id", [""] * table["step.id"].size)), return_inverse=True)[1]
    order = np.lexsort((table["step.id"], run))
    table = {name: values[order] for name, values in table.items()}
    run = run[order]
    first = np.flatnonzero((np.diff(table["step.id"]) == 1) & (np.diff(run) == 0))
    latency = table["step.ts_start_ns"][first + 1] - table["step.ts_start_ns"][first]
    chosen = {name: values[first] for name, values in table.items()}
    chunks, requests = chosen["batch.num_prefill_reqs"], chosen["batch.num_decode_reqs"]
    used = (chosen["kv.blocks_total_gpu"] - chosen["kv.blocks_free_gpu"]) * block_size
    share = used // np.maximum(1, requests + chunks)
    context = share * requests
    tokens = [_even(int(k), int(p)) for k, p in zip(chunks, chosen["batch.prefill_tokens"], strict=True)]
    histories = [tuple(max(0, int(each) - token) for token in chunk) for chunk, each in zip(tokens, share, strict=True)]
    steps = _steps(
        tokens, histories, requests, chosen["batch.decode_tokens"], context, _mean_up(context, requests), latency
    )
    sample = _checked(path, steps, False, {"no next step": int(table["step.id"].size - first.size)})
    blocks = np.unique(table["kv.blocks_total_gpu"])
    return SampleFile(
        sample.steps,
        sample.left_out,
        False,
        kv_blocks=int(blocks[0]) if blocks.size == 1 else None,
        block_size=block_size,
        notes=(f"context tokens are used KV blocks x {block_size}, shared evenly over the requests of a step",),
    )


def _read_trace(path: Path) -> SampleFile:
    """A step trace of the shim (trace.proto): how long the device was busy with each step."""
    from oracle_server.cli.traces import traced_steps

    found = list(traced_steps(path))
    if not found:
        raise InvalidArgument(f"{path} holds no step", field="samples")
    requests, decode_tokens, context, longest, latency = np.array([step[2:] for step in found], dtype=np.int64).T
    tokens, histories = [step.chunk_tokens for step in found], [step.chunk_context for step in found]
    return _checked(path, _steps(tokens, histories, requests, decode_tokens, context, longest, latency), True, {})


def _steps(
    tokens: Sequence[tuple[int, ...]],
    histories: Sequence[tuple[int, ...]],
    requests: Ints,
    decode_tokens: Ints,
    context: Ints,
    longest: Ints,
    latency: Ints,
) -> StepSamples:
    queries = np.empty(len(tokens), dtype=object)
    queries[:] = [
        StepQuery(chunk, history, *row, row[0] + len(chunk), 0, 0)
        for chunk, history, row in zip(
            tokens,
            histories,
            zip(requests.tolist(), decode_tokens.tolist(), context.tolist(), longest.tolist(), strict=True),
            strict=True,
        )
    ]
    return StepSamples(
        queries=queries,
        chunks=np.array([len(chunk) for chunk in tokens], dtype=np.int64),
        prefill_tokens=np.array([sum(chunk) for chunk in tokens], dtype=np.int64),
        history_tokens=np.array([sum(history) for history in histories], dtype=np.int64),
        pairs=np.array([attention_pairs(t, h) for t, h in zip(tokens, histories, strict=True)], dtype=np.int64),
        decode_requests=requests,
        decode_tokens=decode_tokens,
        context_tokens=context,
        max_context_tokens=longest,
        latency_ns=latency,
    )


def _checked(path: Path, steps: StepSamples, known: bool, left_out: dict[str, int]) -> SampleFile:
    """The steps a fit can use; a shape that contradicts itself is an error, one without work or time is left out."""
    bad = (
        (steps.decode_tokens < steps.decode_requests)
        | (steps.context_tokens < 0)
        | ((steps.decode_requests == 0) & (steps.context_tokens > 0))
        | (steps.max_context_tokens > steps.context_tokens)
        | (steps.max_context_tokens * np.maximum(1, steps.decode_requests) < steps.context_tokens)
    )
    if bad.any():
        row = int(np.argmax(bad))
        raise InvalidArgument(
            f"{path}, sample {row}: {int(steps.decode_requests[row])} decode requests with "
            f"{int(steps.context_tokens[row])} context tokens, the longest {int(steps.max_context_tokens[row])}, and "
            f"{int(steps.decode_tokens[row])} tokens contradict each other",
            field="samples",
        )
    reasons = {
        "no tokens": (steps.decode_tokens + steps.prefill_tokens) == 0,
        "draft tokens": steps.decode_tokens > steps.decode_requests,
        "no latency": steps.latency_ns <= 0,
        "longer than 600 s": steps.latency_ns > 600_000_000_000,
    }
    drop = np.zeros(len(steps), dtype=bool)
    for reason, rows in reasons.items():
        if np.any(rows & ~drop):
            left_out = {**left_out, reason: int(np.count_nonzero(rows & ~drop))}
        drop |= rows
    return SampleFile(steps.take(~drop), left_out, known)


def _rows(columns: Mapping[str, Sequence[Any]], count: int, number: int) -> list[tuple[int, Any]]:
    name = ("prefill_chunk_tokens", "prefill_chunk_context_tokens")[number]
    return list(enumerate(columns.get(name, [()] * count)))


def _chunk(path: Path, name: str, row: int, cell: Any) -> tuple[int, ...]:
    try:
        values = cell.split() if isinstance(cell, str) else (cell if cell is not None else ())
        chunk = tuple(int(value) for value in values)
        if any(value < 0 for value in chunk):
            raise ValueError("below 0")
    except (TypeError, ValueError):
        raise InvalidArgument(f"{path}, row {row}: {name} is {cell!r}, not a list of counts", field="samples") from None
    return chunk


def _even(chunks: int, tokens: int) -> tuple[int, ...]:
    """`tokens` shared over `chunks` as evenly as whole numbers allow."""
    if chunks < 1:
        return ()
    return tuple(tokens // chunks + (1 if number < tokens % chunks else 0) for number in range(chunks))


def _mean_up(context: Ints, requests: Ints) -> Ints:
    return np.where(requests > 0, -(-context // np.maximum(1, requests)), 0)


def _whole(path: Path, name: str, values: Any) -> Ints:
    array = np.asarray(values)
    try:
        whole = array.astype(np.int64)
    except (TypeError, ValueError, OverflowError):
        raise InvalidArgument(f"{path}: {name} is not a column of whole numbers", field="samples") from None
    if whole.shape != array.shape or whole.ndim != 1 or not np.array_equal(whole, array) or np.any(whole < 0):
        raise InvalidArgument(f"{path}: {name} holds other than whole numbers from 0", field="samples")
    return whole
