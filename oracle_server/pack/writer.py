"""Writes packs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle_server.errors import InvalidArgument, PackInvalid
from oracle_server.pack.columns import (
    COLUMNS,
    MODEL_FILE,
    OPERATORS_FILE,
    RESIDUALS_FILE,
    SAMPLES_FILE,
    UNITS,
    check_columns,
)
from oracle_server.pack.compile import build_arrays
from oracle_server.pack.durable import partial_directory, publish, write_synced
from oracle_server.pack.manifest import MANIFEST_FILE, Manifest, PackFile, digest_of, manifest_bytes, parse_manifest


def write_pack(
    directory: Path,
    manifest: Manifest,
    *,
    samples: Mapping[str, ArrayLike] | None = None,
    operators: Mapping[str, ArrayLike] | None = None,
    model: Mapping[str, ArrayLike] | None = None,
    residuals: Mapping[str, ArrayLike] | None = None,
) -> str:
    """Write a pack and return its digest.

    The columns of each file are those of README.md; they are converted where no value changes. `files` and `units` of
    the manifest are filled in. Raises PackInvalid for anything `check_pack` would refuse, and InvalidArgument if
    `directory` exists: a pack is never overwritten. The directory appears whole or not at all.
    """
    if directory.exists() or directory.is_symlink():
        raise InvalidArgument(
            f"{directory} exists; a pack is never overwritten, choose another name", field="directory"
        )
    given = {SAMPLES_FILE: samples, OPERATORS_FILE: operators, MODEL_FILE: model, RESIDUALS_FILE: residuals}
    files = {name: _convert(name, columns) for name, columns in given.items() if columns is not None}
    encoded = {name: parquet_bytes(name, columns) for name, columns in files.items()}
    manifest = msgspec.structs.replace(
        manifest,
        files=tuple(
            PackFile(
                name=name,
                sha256=hashlib.sha256(data).hexdigest(),
                size_bytes=len(data),
                rows=next(iter(files[name].values())).size,
            )
            for name, data in encoded.items()
        ),
        units={f"{name}/{column}": unit for name in files for column, unit in UNITS[name].items()},
    )
    data = manifest_bytes(manifest)
    # Reading the bytes back applies every constraint of the manifest: constructors do not.
    manifest = parse_manifest(data)
    check_columns(manifest, files)
    build_arrays(manifest, files)
    with partial_directory(directory) as partial:
        for name, content in encoded.items():
            write_synced(partial / name, content)
        write_synced(partial / MANIFEST_FILE, data)
        publish(partial, directory)
    return digest_of(data)


def parquet_bytes(name: str, columns: Mapping[str, NDArray[Any]]) -> bytes:
    """One file of a pack: zstd, page checksums, encodings PLAIN, RLE_DICTIONARY and BYTE_STREAM_SPLIT only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Keys repeat and latencies do not: byte-stream-split halves a float column that a dictionary would bloat.
    split = [column for column, kind in COLUMNS[name].items() if kind == "float64" and column == "latency_ns"]
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({column: pa.array(values) for column, values in columns.items()}),
        sink,
        compression="zstd",
        use_dictionary=[column for column in COLUMNS[name] if column != "latency_ns"],
        use_byte_stream_split=split or False,
        write_page_checksum=True,
        store_schema=False,
        row_group_size=1 << 20,
    )
    return bytes(sink.getvalue())


def _convert(name: str, columns: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
    if set(columns) != set(COLUMNS[name]):
        raise PackInvalid(f"columns are {sorted(columns)}; they have to be {sorted(COLUMNS[name])}", where=name)
    converted = {}
    for column, kind in COLUMNS[name].items():
        array = np.asarray(columns[column])
        if array.ndim != 1 or array.dtype.kind not in "iuf":
            raise PackInvalid("a column is a one-dimensional array of numbers", where=f"{name}: {column}")
        with np.errstate(invalid="ignore", over="ignore"):
            result = array.astype(kind)
        # Rounding to a narrower float is what a float column is for; an integer must come out as it went in.
        if np.dtype(kind).kind == "i" and not np.array_equal(result, array):
            raise PackInvalid(f"a value does not fit {kind}", where=f"{name}: {column}")
        converted[column] = result
    if len({array.size for array in converted.values()}) != 1:
        raise PackInvalid("columns have different lengths", where=name)
    return converted
