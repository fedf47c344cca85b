"""What goes wrong with packs: one function per fault, named after it. Each spoils a valid pack in a directory."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oracle_server.sampling.hybrid_tables import ARRAY_NAMES
from pack_edits import (
    columns_of,
    edit_columns,
    edit_manifest,
    replace_file,
    set_field,
    write_columns,
)

SAMPLES = "samples.parquet"
OPERATORS = "operators.parquet"
RESIDUALS = "residuals.parquet"
MODEL = "model.parquet"


def truncated_parquet(pack: Path) -> None:
    data = (pack / SAMPLES).read_bytes()
    replace_file(pack, SAMPLES, data[: len(data) // 2])


def truncated_parquet_unsigned(pack: Path) -> None:
    data = (pack / SAMPLES).read_bytes()
    (pack / SAMPLES).write_bytes(data[:-1])


def flipped_bit(pack: Path) -> None:
    data = bytearray((pack / SAMPLES).read_bytes())
    data[len(data) // 3] ^= 1
    (pack / SAMPLES).write_bytes(bytes(data))


def flipped_bit_signed_anew(pack: Path) -> None:
    """Only the page checksum sees it."""
    data = bytearray((pack / SAMPLES).read_bytes())
    data[len(data) // 3] ^= 1
    replace_file(pack, SAMPLES, bytes(data))


def zip_instead_of_parquet(pack: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("samples.parquet", b"x" * 1000)
    replace_file(pack, SAMPLES, buffer.getvalue())


def parquet_bomb(pack: Path, rows_declared: int | None = None) -> None:
    """40 million rows of one value: kilobytes on disk, more than a gigabyte decoded."""
    million = 1_000_000
    kinds = dict(zip(SAMPLE_NAMES, SAMPLE_TYPES, strict=True))
    table = pa.table({name: pa.array(np.ones(million, dtype=kind)) for name, kind in kinds.items()})
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_statistics=False) as writer:
        for _ in range(40):
            writer.write_table(table)
    replace_file(pack, SAMPLES, sink.getvalue(), 40 * million if rows_declared is None else rows_declared)


SAMPLE_NAMES = ("table", "total_tokens", "concurrency", "context_tokens", "previous_prefill_tokens", "latency_ns")
SAMPLE_TYPES = (np.int8, np.int32, np.int32, np.int64, np.int32, np.int64)


def parquet_bomb_that_declares_few_rows(pack: Path) -> None:
    parquet_bomb(pack, 1000)


def symbolic_link_as_file(pack: Path) -> None:
    (pack / SAMPLES).rename(pack / "elsewhere")
    (pack / SAMPLES).symlink_to(pack / "elsewhere")


def symbolic_link_as_manifest(pack: Path) -> None:
    (pack / "manifest.json").rename(pack / "elsewhere")
    (pack / "manifest.json").symlink_to(pack / "elsewhere")


def directory_as_file(pack: Path) -> None:
    (pack / SAMPLES).unlink()
    (pack / SAMPLES).mkdir()


def fifo_as_file(pack: Path) -> None:
    (pack / SAMPLES).unlink()
    os.mkfifo(pack / SAMPLES)


def absent_file(pack: Path) -> None:
    (pack / SAMPLES).unlink()


def absent_manifest(pack: Path) -> None:
    (pack / "manifest.json").unlink()


def manifest_over_one_mebibyte(pack: Path) -> None:
    edit_manifest(pack, lambda document: document["provenance"].update(filler="x" * (1 << 20)))


def empty_samples(pack: Path) -> None:
    edit_columns(pack, SAMPLES, lambda columns: columns.update({k: v[:0] for k, v in columns.items()}))


def no_decode_sample(pack: Path) -> None:
    edit_columns(pack, SAMPLES, lambda columns: columns["table"].fill(1))


def transition_without_samples(pack: Path) -> None:
    edit_columns(pack, SAMPLES, lambda columns: columns["previous_prefill_tokens"].fill(-1))
    set_field("latency.transition", True)(pack)


def ranked_neighbors(option: str, value: int) -> Callable[[Path], None]:
    def spoil(pack: Path) -> None:
        set_field("latency.sampled.neighbors", "hierarchical")(pack)
        set_field(f"latency.sampled.{option}", value)(pack)

    return spoil


def skew_above_the_factor(pack: Path) -> None:
    set_field("latency.composed.skew_mixed", 0.5)(pack)
    set_field("latency.composed.mixed_decode_factor", 0.4)(pack)


def manifest_not_utf8(pack: Path) -> None:
    (pack / "manifest.json").write_bytes(b'{"schema":"\xff"}')


def no_prefill_sample(pack: Path) -> None:
    edit_columns(pack, SAMPLES, lambda columns: columns["table"].fill(0))


def column_of_strings(pack: Path) -> None:
    edit_columns(pack, SAMPLES, lambda columns: columns.update(note=["x"] * len(columns["table"])))


def column_with_strings_instead_of_numbers(pack: Path) -> None:
    edit_columns(pack, SAMPLES, lambda columns: columns.update(latency_ns=["5"] * len(columns["table"])))


def column_of_lists(pack: Path) -> None:
    edit_columns(pack, SAMPLES, lambda columns: columns.update(latency_ns=[[5]] * len(columns["table"])))


def column_of_floats_instead_of_integers(pack: Path) -> None:
    edit_columns(pack, SAMPLES, lambda columns: columns.update(latency_ns=columns["latency_ns"].astype(np.float64)))


def unsigned_column(pack: Path) -> None:
    edit_columns(pack, SAMPLES, lambda columns: columns.update(latency_ns=columns["latency_ns"].astype(np.uint64)))


def column_of_timestamps(pack: Path) -> None:
    edit_columns(
        pack, SAMPLES, lambda columns: columns.update(latency_ns=columns["latency_ns"].astype("datetime64[ns]"))
    )


def absent_column(pack: Path) -> None:
    edit_columns(pack, SAMPLES, lambda columns: columns.pop("concurrency"))


def column_with_an_empty_value(pack: Path) -> None:
    edit_columns(
        pack,
        SAMPLES,
        lambda columns: columns.update(latency_ns=pa.array([None, *columns["latency_ns"][1:].tolist()], pa.int64())),
    )


def delta_encoding(pack: Path) -> None:
    edit_columns(
        pack,
        SAMPLES,
        lambda columns: None,
        use_dictionary=False,
        column_encoding={"latency_ns": "DELTA_BINARY_PACKED"},
    )


def foreign_compression(pack: Path) -> None:
    edit_columns(pack, SAMPLES, lambda columns: None, compression="gzip")


def without_one_grid_point(pack: Path) -> None:
    edit_columns(pack, OPERATORS, lambda columns: columns.update({k: v[:-1] for k, v in columns.items()}))


def grid_that_is_not_full(pack: Path) -> None:
    def edit(columns: dict[str, Any]) -> None:
        keep = ~((columns["operator"] == 3) & (columns["x0"] == 4) & (columns["x1"] == 128))
        columns.update({k: v[keep] for k, v in columns.items()})

    edit_columns(pack, OPERATORS, edit)


def grid_point_given_twice(pack: Path) -> None:
    edit_columns(pack, OPERATORS, lambda columns: columns.update({k: np.append(v, v[5]) for k, v in columns.items()}))


def axis_with_one_point(pack: Path) -> None:
    def edit(columns: dict[str, Any]) -> None:
        keep = (columns["operator"] != 2) | (columns["x0"] == 1)
        columns.update({k: v[keep] for k, v in columns.items()})

    edit_columns(pack, OPERATORS, edit)


def operator_without_rows(pack: Path) -> None:
    def edit(columns: dict[str, Any]) -> None:
        keep = columns["operator"] != 2
        columns.update({k: v[keep] for k, v in columns.items()})

    edit_columns(pack, OPERATORS, edit)


def needed_operator_absent(pack: Path) -> None:
    operator_without_rows(pack)
    edit_manifest(pack, lambda document: document["latency"]["composed"]["operators"].pop(2))


def files_named_twice(pack: Path) -> None:
    edit_manifest(pack, lambda document: document["files"].append(document["files"][0]))


def no_files(pack: Path) -> None:
    edit_manifest(pack, lambda document: document["files"].clear())


def many_residuals(pack: Path) -> None:
    write_columns(pack, RESIDUALS, {"ratio": np.ones(257, dtype=np.float32)})


def of_array(name: str, index: int, value: float) -> Callable[[Path], None]:
    """Change one element of an array of a hybrid model."""

    def edit(columns: dict[str, Any]) -> None:
        columns["value"][np.flatnonzero(columns["array"] == ARRAY_NAMES.index(name))[index]] = value

    return columns_of(MODEL, edit)


def array_with_a_gap(pack: Path) -> None:
    def edit(columns: dict[str, Any]) -> None:
        gap = np.flatnonzero(columns["array"] == ARRAY_NAMES.index("decode_ratio"))[3]
        columns.update({name: np.delete(values, gap) for name, values in columns.items()})

    edit_columns(pack, MODEL, edit)
