"""Step trace on demand: what was asked, what was answered, when it happened (format: step_oracle/v1/trace.proto)."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import BinaryIO, Literal

from step_oracle.v1 import trace_pb2 as pb


class TraceWriter:
    """Writes records to one file per engine, one write per record, so that a killed engine leaves whole records.

    Engine thread only. A file of an earlier start is kept and gets a second header, unless it shall be replaced.
    """

    def __init__(self, prefix: str, header: pb.TraceHeader, *, replace: bool = False) -> None:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", header.engine.engine_id)
        mode: Literal["wb", "ab"] = "wb" if replace else "ab"
        self._file: BinaryIO = Path(f"{prefix}{name}.trace").open(mode, buffering=0)  # noqa: SIM115
        self._append(pb.TraceRecord(header=header))

    def write(self, step: pb.TraceStep) -> None:
        self._append(pb.TraceRecord(step=step))

    def close(self) -> None:
        self._file.close()

    def _append(self, record: pb.TraceRecord) -> None:
        data = record.SerializeToString()
        self._file.write(struct.pack("<I", len(data)) + data)
