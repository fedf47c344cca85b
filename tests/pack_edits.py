"""Changes to packs on disk that their writer would not make; changed files are signed anew."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def edit_manifest(pack: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change manifest.json through `edit`."""
    path = pack / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def replace_file(pack: Path, name: str, data: bytes, rows: int | None = None) -> None:
    """Replace a file and sign it anew, so that only what is wrong inside of it is wrong."""
    (pack / name).write_bytes(data)

    def sign(document: dict[str, Any]) -> None:
        for file in document["files"]:
            if file["name"] == name:
                file.update(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
                if rows is not None:
                    file["rows"] = rows

    edit_manifest(pack, sign)


def edit_columns(pack: Path, name: str, edit: Callable[[dict[str, Any]], object], **options: Any) -> None:
    """Change the columns of a file through `edit` (numpy arrays or pyarrow arrays) and sign it anew."""
    table = pq.read_table(pack / name)
    columns: dict[str, Any] = {column: table[column].to_numpy().copy() for column in table.column_names}
    edit(columns)
    write_columns(pack, name, columns, **options)


def write_columns(pack: Path, name: str, columns: Mapping[str, Any], rows: int | None = None, **options: Any) -> None:
    """Write columns as they are and sign the file."""
    table = pa.table({column: pa.array(values) for column, values in columns.items()})
    sink = io.BytesIO()
    pq.write_table(table, sink, **{"write_page_checksum": True, "compression": "zstd", **options})
    replace_file(pack, name, sink.getvalue(), table.num_rows if rows is None else rows)


def put(column: str, row: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(columns: dict[str, Any]) -> None:
        columns[column][row] = value

    return edit


def set_field(path: str, value: Any) -> Callable[[Path], None]:
    """Set one manifest field, for example "kv_cache.blocks" or "files.0.name"."""

    def spoil(pack: Path) -> None:
        def edit(document: Any) -> None:
            *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
            for key in parents:
                document = document[key]
            document[last] = value

        edit_manifest(pack, edit)

    return spoil


def drop_field(path: str) -> Callable[[Path], None]:
    def spoil(pack: Path) -> None:
        def edit(document: Any) -> None:
            *parents, last = path.split(".")
            for key in parents:
                document = document[key]
            del document[last]

        edit_manifest(pack, edit)

    return spoil


def manifest_text(change: Callable[[str], str]) -> Callable[[Path], None]:
    def spoil(pack: Path) -> None:
        path = pack / "manifest.json"
        path.write_text(change(path.read_text()))

    return spoil


def columns_of(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda pack: edit_columns(pack, name, edit)
