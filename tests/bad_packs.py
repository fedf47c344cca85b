"""The corpus of malformed packs: one function per fault, named after it. Each spoils a valid pack in a directory.

BAD_PACKS maps each fault to (the kind of pack it spoils, the function, what the refusal has to name, a part of its
message).
"""

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
    drop_field,
    edit_columns,
    edit_manifest,
    manifest_text,
    put,
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


Spoil = Callable[[Path], None]

BAD_PACKS: dict[str, tuple[str, Spoil, str, str]] = {
    "truncated_parquet": ("sampled", truncated_parquet, SAMPLES, "not a readable Parquet file"),
    "truncated_parquet_unsigned": ("sampled", truncated_parquet_unsigned, SAMPLES, "bytes; the manifest says"),
    "wrong_digest": ("sampled", set_field("files.0.sha256", "0" * 64), SAMPLES, "sha256 is"),
    "digest_in_upper_case": ("sampled", set_field("files.0.sha256", "A" * 64), "files[0].sha256", "matching regex"),
    "flipped_bit": ("sampled", flipped_bit, SAMPLES, "sha256 is"),
    "flipped_bit_signed_anew": ("sampled", flipped_bit_signed_anew, SAMPLES, "not a readable Parquet file"),
    "zip_instead_of_parquet": ("sampled", zip_instead_of_parquet, SAMPLES, "not a readable Parquet file"),
    "text_instead_of_parquet": (
        "sampled",
        lambda pack: replace_file(pack, SAMPLES, b"total_tokens,latency\n1,2\n"),
        SAMPLES,
        "not a readable Parquet file",
    ),
    "parquet_bomb": ("sampled", parquet_bomb, "files[0].rows", "20000000"),
    "parquet_bomb_that_declares_few_rows": (
        "sampled",
        parquet_bomb_that_declares_few_rows,
        SAMPLES,
        "40000000 rows; the manifest says 1000",
    ),
    "declared_rows_without_end": ("sampled", set_field("files.0.rows", 10**15), "files[0].rows", "<= 20000000"),
    "declared_rows_too_many": ("sampled", set_field("files.0.rows", 19_999_999), SAMPLES, "the manifest says 19999999"),
    "declared_size_wrong": ("sampled", set_field("files.0.size_bytes", 17), SAMPLES, "the manifest says 17"),
    "declared_size_too_large": ("sampled", set_field("files.0.size_bytes", 2**40), "files[0].size_bytes", "<="),
    "symbolic_link_as_file": ("sampled", symbolic_link_as_file, SAMPLES, "links are not followed"),
    "symbolic_link_as_manifest": ("sampled", symbolic_link_as_manifest, "manifest.json", "links are not followed"),
    "directory_as_file": ("sampled", directory_as_file, SAMPLES, "not a regular file"),
    "fifo_as_file": ("sampled", fifo_as_file, SAMPLES, "not a regular file"),
    "absent_file": ("sampled", absent_file, SAMPLES, "cannot be opened"),
    "absent_manifest": ("sampled", absent_manifest, "manifest.json", "cannot be opened"),
    "file_name_leaves_the_pack": ("sampled", set_field("files.0.name", "../samples.parquet"), "files[0].name", "holds"),
    "file_name_is_absolute": ("sampled", set_field("files.0.name", "/etc/passwd"), "files[0].name", "holds"),
    "file_name_with_zero_byte": ("sampled", set_field("files.0.name", "a\0b"), "files[0].name", "holds"),
    "file_of_another_kind": ("sampled", set_field("files.0.name", OPERATORS), "files[0].name", "holds"),
    "files_named_twice": ("sampled", files_named_twice, "files[1].name", "twice"),
    "no_files": ("sampled", no_files, "files", "needs samples.parquet"),
    "empty_samples": ("sampled", empty_samples, "files[0].rows", ">= 1"),
    "no_decode_sample": ("sampled", no_decode_sample, SAMPLES, "no sample for the table 'decode'"),
    "no_prefill_sample": ("sampled", no_prefill_sample, SAMPLES, "no sample for the table 'prefill'"),
    "column_of_strings": ("sampled", column_of_strings, "samples.parquet: note", "no such column"),
    "column_with_strings_instead_of_numbers": (
        "sampled",
        column_with_strings_instead_of_numbers,
        "samples.parquet: latency_ns",
        "string",
    ),
    "column_of_lists": ("sampled", column_of_lists, "samples.parquet: latency_ns", "list"),
    "column_of_floats_instead_of_integers": (
        "sampled",
        column_of_floats_instead_of_integers,
        "samples.parquet: latency_ns",
        "double",
    ),
    "unsigned_column": ("sampled", unsigned_column, "samples.parquet: latency_ns", "uint64"),
    "column_of_timestamps": ("sampled", column_of_timestamps, "samples.parquet: latency_ns", "timestamp"),
    "absent_column": ("sampled", absent_column, "samples.parquet: concurrency", "absent"),
    "column_with_an_empty_value": ("sampled", column_with_an_empty_value, "latency_ns", "1 empty values"),
    "delta_encoding": ("sampled", delta_encoding, "samples.parquet: latency_ns", "DELTA_BINARY_PACKED"),
    "foreign_compression": ("sampled", foreign_compression, "samples.parquet: table", "GZIP"),
    "latency_zero": ("sampled", columns_of(SAMPLES, put("latency_ns", 3, 0)), "latency_ns, row 3", "is 0"),
    "latency_negative": ("sampled", columns_of(SAMPLES, put("latency_ns", 3, -5)), "latency_ns, row 3", "is -5"),
    "latency_above_600_seconds": (
        "sampled",
        columns_of(SAMPLES, put("latency_ns", 3, 600_000_000_001)),
        "latency_ns, row 3",
        "600 seconds",
    ),
    "tokens_zero": ("sampled", columns_of(SAMPLES, put("total_tokens", 7, 0)), "total_tokens, row 7", "at least 1"),
    "concurrency_negative": (
        "sampled",
        columns_of(SAMPLES, put("concurrency", 7, -1)),
        "concurrency, row 7",
        "at least 1",
    ),
    "context_below_unknown": ("sampled", columns_of(SAMPLES, put("context_tokens", 7, -2)), "context_tokens", "-1"),
    "table_unknown": ("sampled", columns_of(SAMPLES, put("table", 7, 2)), "table, row 7", "0 or 1"),
    "transition_without_samples": (
        "sampled",
        transition_without_samples,
        SAMPLES,
        "'after_prefill'",
    ),
    "operator_latency_nan": (
        "composed",
        columns_of(OPERATORS, put("latency_ns", 2, float("nan"))),
        "latency_ns, row 2",
        "nan",
    ),
    "operator_latency_infinite": (
        "composed",
        columns_of(OPERATORS, put("latency_ns", 2, float("inf"))),
        "latency_ns, row 2",
        "inf",
    ),
    "operator_latency_negative": (
        "composed",
        columns_of(OPERATORS, put("latency_ns", 2, -1.0)),
        "latency_ns, row 2",
        "-1.0",
    ),
    "dense_that_costs_nothing": (
        "composed",
        columns_of(OPERATORS, put("latency_ns", 2, 0.0)),
        "dense_gemm",
        "costs nothing",
    ),
    "grid_coordinate_nan": ("composed", columns_of(OPERATORS, put("x0", 2, float("nan"))), "x0, row 2", "finite"),
    "grid_coordinate_fraction": ("composed", columns_of(OPERATORS, put("x0", 2, 1.5)), "x0", "whole numbers"),
    "grid_coordinate_negative": ("composed", columns_of(OPERATORS, put("x0", 2, -1.0)), "x0", "whole numbers"),
    "grid_coordinate_on_an_unused_axis": ("composed", columns_of(OPERATORS, put("x3", 2, 1.0)), "x3", "has to be 0"),
    "knowledge_unknown": ("composed", columns_of(OPERATORS, put("knowledge", 2, 9)), "knowledge, row 2", "1 to 5"),
    "without_one_grid_point": ("composed", without_one_grid_point, "context_attention", "not full"),
    "grid_that_is_not_full": ("composed", grid_that_is_not_full, "generation_attention", "mean_context_tokens=128"),
    "grid_point_given_twice": ("composed", grid_point_given_twice, "dense_gemm", "given twice"),
    "axis_with_one_point": ("composed", axis_with_one_point, "logits", "at least two points"),
    "operator_without_rows": ("composed", operator_without_rows, "logits", "whole numbers"),
    "operator_number_unknown": (
        "composed",
        columns_of(OPERATORS, put("operator", 0, 77)),
        "operators.parquet: operator",
        "77",
    ),
    "operator_name_unknown": (
        "composed",
        set_field("latency.composed.operators.0.name", "flux_capacitor"),
        "operators[0].name",
        "flux_capacitor",
    ),
    "operator_axes_wrong": (
        "composed",
        set_field("latency.composed.operators.0.axes", ["rows"]),
        "operators[0].axes",
        "total_tokens",
    ),
    "operator_named_twice": (
        "composed",
        set_field("latency.composed.operators.1.name", "dense_gemm"),
        "latency.composed.operators",
        "twice",
    ),
    "operators_with_one_id": (
        "composed",
        set_field("latency.composed.operators.1.id", 0),
        "latency.composed.operators",
        "one id",
    ),
    "needed_operator_absent": (
        "composed",
        needed_operator_absent,
        "latency.composed.operators",
        "no operator 'logits'",
    ),
    "residual_zero": ("composed", columns_of(RESIDUALS, put("ratio", 1, 0.0)), "ratio, row 1", "above 0"),
    "residual_nan": ("composed", columns_of(RESIDUALS, put("ratio", 1, float("nan"))), "ratio, row 1", "nan"),
    "residual_infinite": ("composed", columns_of(RESIDUALS, put("ratio", 1, float("inf"))), "ratio, row 1", "inf"),
    "many_residuals": ("composed", many_residuals, "files[1].rows", "at most 256"),
    "skew_above_one": ("composed", set_field("latency.composed.skew_decode", 1.5), "skew_decode", "<= 1.0"),
    "skew_above_the_factor": (
        "composed",
        skew_above_the_factor,
        "mixed_decode_factor",
        "cost less than nothing",
    ),
    "graph_sizes_that_fall": (
        "composed",
        set_field("latency.composed.graph_capture_sizes", [1, 4, 2]),
        "graph_capture_sizes",
        "ascend",
    ),
    "transition_of_a_composed_pack": ("composed", set_field("latency.transition", True), "transition", "only sampled"),
    "neighbors_unknown": (
        "sampled",
        set_field("latency.sampled.neighbors", "euclid"),
        "latency.sampled.neighbors",
        "euclid",
    ),
    "fixed_buckets_of_ranked_neighbors": (
        "sampled",
        ranked_neighbors("fixed_buckets", 4),
        "latency.sampled.fixed_buckets",
        "belongs to joint neighbors",
    ),
    "context_of_joint_neighbors": (
        "sampled",
        set_field("latency.sampled.context_bucket_width", 4096),
        "latency.sampled.context_bucket_width",
        "belongs to hierarchical neighbors",
    ),
    "context_as_a_key_but_unknown": (
        "sampled",
        ranked_neighbors("context_bucket_width", 4096),
        "context_tokens, row",
        "without context tokens",
    ),
    "schema_unknown": ("sampled", set_field("schema", "step_oracle.pack/2"), "schema", "step_oracle.pack/1"),
    "schema_absent": ("sampled", drop_field("schema"), "schema", "None"),
    "hybrid_without_its_model": ("hybrid", no_files, "files", "needs model.parquet"),
    "hybrid_without_options": ("hybrid", set_field("latency.hybrid", None), "latency.hybrid", "gives"),
    "hybrid_options_of_another_kind": ("composed", set_field("latency.hybrid", {"terms": []}), "latency.hybrid", "no"),
    "term_unknown": ("hybrid", set_field("latency.hybrid.terms.1.name", "gpu"), "terms[1].name", "unknown term"),
    "term_negative": ("hybrid", set_field("latency.hybrid.terms.1.coefficient_ns", -1.0), "coefficient_ns", ">= 0"),
    "term_given_twice": ("hybrid", set_field("latency.hybrid.terms.1.name", "step"), "latency.hybrid.terms", "twice"),
    "kink_in_context": ("hybrid", set_field("latency.hybrid.terms.5.above", 9.0), "terms[5].above", "no kinks"),
    "terms_absent": ("hybrid", set_field("latency.hybrid.terms", []), "latency.hybrid.terms", "cost nothing"),
    "neighbors_none": ("hybrid", set_field("latency.hybrid.neighbors", 0), "neighbors", ">= 1"),
    "neighbors_too_many": ("hybrid", set_field("latency.hybrid.neighbors", 17), "neighbors", "<= 16"),
    "array_unknown": ("hybrid", columns_of(MODEL, put("array", 0, 99)), "model.parquet: array", "array 99"),
    "array_with_a_gap": ("hybrid", array_with_a_gap, "model.parquet: decode_ratio", "each once"),
    "array_index_negative": ("hybrid", columns_of(MODEL, put("row", 5, -1)), "row, row 5", "is -1"),
    "array_value_nan": ("hybrid", columns_of(MODEL, put("value", 5, np.nan)), "value, row 5", "finite"),
    "ratio_zero": ("hybrid", of_array("decode_ratio", 0, 0.0), "model.parquet: decode_ratio", "(0, 0) is 0"),
    "edges_descending": ("hybrid", of_array("decode_requests", 2, 1.0), "model.parquet: decode_requests", "ascending"),
    "edges_not_from_zero": ("hybrid", of_array("decode_context", 0, 1.0), "model.parquet: decode_context", "from 0"),
    "support_four": ("hybrid", of_array("decode_support", 0, 4.0), "model.parquet: decode_support", "1, 2 or 3"),
    "distance_negative": ("hybrid", of_array("decode_distance", 0, -1.0), "model.parquet: decode_distance", "is -1"),
    "mixed_ratio_huge": (
        "hybrid",
        of_array("mixed_support", 5, 1e9),
        "model.parquet: mixed_support",
        "is 1000000000.0",
    ),
    "mixed_residual_zero": ("hybrid", of_array("mixed_residual", 0, 0.0), "model.parquet: mixed_residual", "is 0"),
    "kind_unknown": ("sampled", set_field("kind", "oracular"), "kind", "oracular"),
    "kind_without_its_options": ("sampled", set_field("latency.sampled", None), "latency.sampled", "gives"),
    "kv_blocks_absent": ("sampled", drop_field("kv_cache.blocks"), "kv_cache", "blocks"),
    "kv_cache_absent": ("sampled", drop_field("kv_cache"), "manifest.json", "kv_cache"),
    "kv_blocks_zero": ("sampled", set_field("kv_cache.blocks", 0), "kv_cache.blocks", ">= 1"),
    "kv_blocks_fraction": ("sampled", set_field("kv_cache.blocks", 10.5), "kv_cache.blocks", "int"),
    "kv_blocks_text": ("sampled", set_field("kv_cache.blocks", "10"), "kv_cache.blocks", "int"),
    "kv_basis_unknown": ("sampled", set_field("kv_cache.basis", "guessed"), "kv_cache.basis", "guessed"),
    "created_is_no_time": ("sampled", set_field("created", "yesterday"), "created", "matching regex"),
    "prep_negative": ("sampled", set_field("latency.prep_ns", -1), "latency.prep_ns", ">= 0"),
    "not_json": ("sampled", manifest_text(lambda text: text[:-5]), "manifest.json", "not JSON"),
    "not_utf8": (
        "sampled",
        manifest_not_utf8,
        "manifest.json",
        "not JSON",
    ),
    "manifest_is_a_list": ("sampled", manifest_text(lambda text: f"[{text}]"), "manifest.json", "JSON object"),
    "key_given_twice": (
        "sampled",
        manifest_text(lambda text: text.replace('"blocks":', '"blocks":1,"blocks":', 1)),
        "manifest.json",
        "'blocks' stands twice",
    ),
    "number_nan": (
        "sampled",
        manifest_text(lambda text: text.replace('"coverage":{}', '"coverage":{"x":NaN}', 1)),
        "manifest.json",
        "NaN is not a JSON number",
    ),
    "number_infinite": (
        "sampled",
        manifest_text(lambda text: text.replace('"coverage":{}', '"coverage":{"x":1e999}', 1)),
        "manifest.json",
        "out of range",
    ),
    "lone_surrogate": (
        "sampled",
        manifest_text(lambda text: text.replace('"coverage":{}', '"coverage":{"x":"\\ud800"}', 1)),
        "manifest.json",
        "no canonical form",
    ),
    "json_33_levels_deep": (
        "sampled",
        manifest_text(lambda text: text.replace('"coverage":{}', '"more":' + "[" * 33 + "]" * 33, 1)),
        "manifest.json",
        "deeper than 32",
    ),
    "json_200000_levels_deep": (
        "sampled",
        manifest_text(lambda text: "[" * 200_000 + "]" * 200_000),
        "manifest.json",
        "deeper than 32",
    ),
    "manifest_over_one_mebibyte": ("sampled", manifest_over_one_mebibyte, "manifest.json", "at most 1048576"),
}
