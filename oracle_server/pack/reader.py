"""Reads the data files of a pack from bytes nobody has checked. Runs in the limited child process only."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oracle_server.errors import PackDigestMismatch, PackInvalid
from oracle_server.pack.columns import (
    COLUMNS,
    KIND_FILES,
    MODEL_FILE,
    MODEL_ROWS_LIMIT,
    OPERATOR_ROWS_LIMIT,
    OPERATORS_FILE,
    RESIDUAL_ROWS_LIMIT,
    RESIDUALS_FILE,
)
from oracle_server.pack.durable import read_regular_file
from oracle_server.pack.manifest import FILE_BYTES_LIMIT, ROWS_LIMIT, Manifest, PackFile

_ROWS_LIMIT: Final = {
    OPERATORS_FILE: OPERATOR_ROWS_LIMIT,
    MODEL_FILE: MODEL_ROWS_LIMIT,
    RESIDUALS_FILE: RESIDUAL_ROWS_LIMIT,
}
_ROW_GROUPS_LIMIT: Final = 4096
# DELTA encodings are left out: a 300-byte file forces a 4 GB allocation through them (apache/arrow issue 49955).
_ENCODINGS: Final = frozenset({"PLAIN", "RLE", "RLE_DICTIONARY", "PLAIN_DICTIONARY", "BIT_PACKED", "BYTE_STREAM_SPLIT"})
_COMPRESSIONS: Final = frozenset({"ZSTD", "SNAPPY", "UNCOMPRESSED"})
_PHYSICAL: Final = {
    "int8": "INT32",
    "int16": "INT32",
    "int32": "INT32",
    "int64": "INT64",
    "float32": "FLOAT",
    "float64": "DOUBLE",
}


def read_files(directory: Path, manifest: Manifest) -> dict[str, dict[str, NDArray[Any]]]:
    """Columns of every file the manifest names; raises PackInvalid or PackDigestMismatch naming the place.

    Names come from an allow-list, links are refused, and sizes, digests, row counts, types and encodings are compared
    before a page is decoded.
    """
    _, allowed = KIND_FILES[manifest.kind]
    names = [file.name for file in manifest.files]
    for number, name in enumerate(names):
        where = f"manifest.json: files[{number}].name"
        if name not in allowed:
            raise PackInvalid(
                f"file name {name[:80]!r}; a {manifest.kind} pack holds {', '.join(sorted(allowed))}", where=where
            )
        if name in names[:number]:
            raise PackInvalid(f"{name} is named twice", where=where)
    for number, file in enumerate(manifest.files):
        limit = _ROWS_LIMIT.get(file.name, ROWS_LIMIT)
        if file.rows > limit:
            raise PackInvalid(
                f"{file.rows} rows; {file.name} has at most {limit}", where=f"manifest.json: files[{number}].rows"
            )
    return {file.name: _read_file(directory / file.name, file) for file in manifest.files}


def _read_file(path: Path, file: PackFile) -> dict[str, NDArray[Any]]:
    data = read_regular_file(path, FILE_BYTES_LIMIT)
    if len(data) != file.size_bytes:
        raise PackDigestMismatch(f"{len(data)} bytes; the manifest says {file.size_bytes}", where=file.name)
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise PackDigestMismatch(f"sha256 is {digest}; the manifest says {file.sha256}", where=file.name)
    try:
        return _read_columns(data, file)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        first = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise PackInvalid(f"not a readable Parquet file: {first}", where=file.name) from None


def _read_columns(data: bytes, file: PackFile) -> dict[str, NDArray[Any]]:
    parquet = pq.ParquetFile(
        pa.BufferReader(data),
        page_checksum_verification=True,
        thrift_string_size_limit=1 << 20,
        thrift_container_size_limit=1 << 20,
    )
    columns = COLUMNS[file.name]
    _check_footer(parquet, file, columns)
    result: dict[str, NDArray[Any]] = {}
    for name, kind in columns.items():
        # One column at a time: the peak is one column in Arrow's form beside what is decoded already.
        column = parquet.read(columns=[name], use_threads=False).column(0)
        if column.null_count or len(column) != file.rows:
            raise PackInvalid(
                f"{column.null_count} empty values in {len(column)} rows; {file.rows} numbers are expected",
                where=f"{file.name}: {name}",
            )
        result[name] = np.ascontiguousarray(column.to_numpy(), dtype=kind)
    return result


def _check_footer(parquet: Any, file: PackFile, columns: dict[str, str]) -> None:
    """Everything the footer declares, before a page is decoded: a small file can declare billions of constant rows."""
    footer = parquet.metadata
    if footer.num_rows != file.rows:
        raise PackInvalid(f"{footer.num_rows} rows; the manifest says {file.rows}", where=file.name)
    if footer.num_row_groups > _ROW_GROUPS_LIMIT:
        raise PackInvalid(
            f"{footer.num_row_groups} row groups; at most {_ROW_GROUPS_LIMIT} are allowed", where=file.name
        )
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    if sum(group.num_rows for group in groups) != file.rows or any(group.num_rows < 0 for group in groups):
        raise PackInvalid("the rows of the row groups do not add up", where=file.name)
    schema = parquet.schema_arrow
    found = {field.name: str(field.type) for field in schema}
    expected = {name: {"float32": "float", "float64": "double"}.get(kind, kind) for name, kind in columns.items()}
    if len(schema) != len(columns) or found != expected:
        for name in [*found, *expected]:
            if found.get(name) != expected.get(name):
                raise PackInvalid(
                    f"the column is {found.get(name, 'absent')}; expected is {expected.get(name, 'no such column')}",
                    where=f"{file.name}: {name[:80]}",
                )
        raise PackInvalid(f"columns are {list(found)}; expected are {list(expected)}", where=file.name)
    for group in groups:
        if group.num_columns != len(columns):
            raise PackInvalid(
                f"a row group has {group.num_columns} columns; expected are {len(columns)}", where=file.name
            )
        for number in range(group.num_columns):
            chunk = group.column(number)
            where = f"{file.name}: {chunk.path_in_schema[:80]}"
            if (
                chunk.physical_type != _PHYSICAL[columns.get(chunk.path_in_schema, "int8")]
                or chunk.num_values != group.num_rows
            ):
                raise PackInvalid(
                    f"{chunk.num_values} values of {chunk.physical_type} do not fit the schema", where=where
                )
            if not _ENCODINGS.issuperset(chunk.encodings) or chunk.compression not in _COMPRESSIONS:
                raise PackInvalid(
                    f"encodings {sorted(chunk.encodings)}, compression {chunk.compression}; "
                    f"allowed are {sorted(_ENCODINGS)} with {sorted(_COMPRESSIONS)}",
                    where=where,
                )
