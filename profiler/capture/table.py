"""A capture as one Parquet table: a row per step, units with every column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from oracle_server.errors import InvalidArgument
from profiler.capture.steps import CapturedRun, CapturedStep

if TYPE_CHECKING:
    import pyarrow as pa

# Column -> (Arrow type, unit, value). `fit --format table` reads the same names.
COLUMNS: Final[dict[str, tuple[str, str, Callable[[CapturedStep], Any]]]] = {
    "step_index": ("int64", "count of the scheduler's outputs", lambda step: step.step_index),
    "warm_up": ("bool", "in a plan's warm-up", lambda step: step.warm_up),
    "was_idle": ("bool", "the device had nothing to do when the step came", lambda step: step.was_idle),
    "total_tokens": ("int32", "tokens", lambda step: step.total_tokens),
    "concurrency": ("int32", "requests", lambda step: step.num_decode_requests + len(step.chunk_tokens)),
    "num_decode_requests": ("int32", "requests", lambda step: step.num_decode_requests),
    "num_decode_tokens": ("int32", "tokens", lambda step: step.num_decode_tokens),
    "decode_context_tokens": ("int64", "tokens, summed over decode requests", lambda step: step.decode_context_tokens),
    "max_decode_context_tokens": ("int64", "tokens", lambda step: step.max_decode_context_tokens),
    "prefill_chunk_tokens": ("list", "tokens, one entry per chunk", lambda step: list(step.chunk_tokens)),
    "prefill_chunk_context_tokens": ("list", "tokens, one entry per chunk", lambda step: list(step.chunk_context)),
    "previous_prefill_tokens": ("int32", "tokens of the step before", lambda step: step.previous_prefill_tokens),
    "num_new_requests": ("int32", "requests", lambda step: step.num_new_requests),
    "generated_tokens": ("int32", "tokens", lambda step: step.generated_tokens),
    "dispatch_ns": ("int64", "ns of CLOCK_MONOTONIC", lambda step: step.dispatch_ns),
    "device_start_ns": ("int64", "ns of CLOCK_MONOTONIC", lambda step: step.device_start_ns),
    "device_end_ns": ("int64", "ns of CLOCK_MONOTONIC", lambda step: step.device_end_ns),
    "result_ns": ("int64", "ns of CLOCK_MONOTONIC", lambda step: step.result_ns),
    "latency_ns": ("int64", "ns, device-busy time", lambda step: step.latency_ns),
    "prep_ns": (
        "int64",
        "ns from dispatch to device start; null where the device was busy",
        lambda step: step.device_start_ns - step.dispatch_ns if step.was_idle else None,
    ),
    "copy_ns": ("int64", "ns from device end to result", lambda step: step.result_ns - step.device_end_ns),
    "host_ns": (
        "int64",
        "ns from the result before to dispatch, the capture's own left out; null where the engine may have waited",
        lambda step: step.host_ns or None,
    ),
}


def steps_table(runs: Sequence[CapturedRun]) -> pa.Table:
    """Steps of all runs; the first column, `run`, names theirs."""
    import pyarrow as pa

    kinds = {"int32": pa.int32(), "int64": pa.int64(), "bool": pa.bool_(), "list": pa.list_(pa.int32())}
    fields = [pa.field("run", pa.string(), metadata={"unit": "name of the run"})]
    arrays = [pa.array([run.name for run in runs for _ in run.steps], pa.string())]
    for name, (kind, unit, value) in COLUMNS.items():
        fields.append(pa.field(name, kinds[kind], metadata={"unit": unit}))
        arrays.append(pa.array([value(step) for run in runs for step in run.steps], kinds[kind]))
    return pa.table(arrays, schema=pa.schema(fields, metadata={"written by": "step-oracle trace export"}))


def write_table(runs: Sequence[CapturedRun], path: Path) -> int:
    """Write the table as Parquet (or CSV, by its name) without overwriting; the number of rows."""
    if path.exists():
        raise InvalidArgument(f"{path} exists; choose another name", field="output")
    table = steps_table(runs)
    if path.suffix.lower() == ".csv":
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.csv

        for name, (kind, _, _) in COLUMNS.items():
            if kind == "list":
                text = pc.binary_join(pc.cast(table[name], pa.list_(pa.string())), " ")
                table = table.set_column(table.column_names.index(name), name, text)
        pyarrow.csv.write_csv(table, path)
    else:
        import pyarrow.parquet as pq

        pq.write_table(table, path, compression="zstd")
    return int(table.num_rows)
