"""Capture files on disk: framed records with a checksum each, appended by a thread of their own (capture.proto)."""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from oracle_server.errors import InvalidArgument
from profiler.capture.pause import Pause
from step_oracle.v1 import capture_pb2 as pb

MAGIC = b"SOCAPT1\n"
FLUSH_SECONDS = 0.25
# Many more steps than come in one flush: a block stays small, so that the interpreter is never held for long.
_STEPS_PER_BLOCK = 256
_FRAME = struct.Struct("<II")
_MAX_RECORD_BYTES = 64 << 20


class CaptureWriter:
    """Appends what `append` is given to one file, four times a second.

    `append`, `hook_ns` and `beside_ns` belong to the thread that steps; the writer's own thread does the rest. That
    thread asks for the interpreter and gets it when the stepping thread waits for the device. A killed process loses
    what was appended since the last write: the kernel has the rest. Where a write or the device fails, the engine goes
    on serving: the failure is said once, and nothing more is kept.
    """

    def __init__(
        self,
        path: Path,
        header: pb.CaptureHeader,
        encode: Callable[[Sequence[Any]], pb.CaptureRecord | None],
        begin_thread: Callable[[], None] = lambda: None,
        pause: Pause | None = None,
    ) -> None:
        """`encode` turns appended items into a record, or None where they are not ready: they are offered again.

        `begin_thread` is the first thing the writer's thread calls; `pause` looks whenever it has written. Raises
        FileExistsError where the file exists: a start of an engine has a folder of its own.
        """
        # Time of the thread that steps in capture code; of a scheduler's, in what of it runs while the device works.
        self.hook_ns = self.beside_ns = 0
        self._encode = encode
        self._items: deque[Any] = deque()
        self._told_hook_ns = self._told_beside_ns = self._told_cpu_ns = 0
        self._path, self._begin_thread, self._pause = path, begin_thread, pause
        # Set by the writer's thread, once; read by the other, where a step too many does no harm.
        self._failed = False
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        # One write: a file that has anything has all of its header, unless the disk is full.
        self._write(MAGIC + framed(pb.CaptureRecord(header=header)))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="step-oracle-capture", daemon=True)
        self._thread.start()

    def append(self, item: Any) -> None:
        """Hand over one step."""
        if not self._failed:
            self._items.append(item)

    def close(self) -> None:
        """Write what is left and end the thread; a second call does nothing."""
        if not self._end.is_set():
            self._end.set()
            self._thread.join()
            os.close(self._file)

    def _run(self) -> None:
        ended = False
        try:
            self._begin_thread()
            while not ended:
                ended = self._end.wait(FLUSH_SECONDS)
                while self._flush():
                    pass
                if self._pause is not None:
                    self._look(self._pause)
        except (OSError, RuntimeError) as error:
            self._failed = True
            self._items.clear()
            line = f"step-oracle: {self._path} is not written any more ({error}): later steps are not captured"
            print(line, file=sys.stderr, flush=True)

    def _look(self, pause: Pause) -> None:
        was_on = pause.is_on
        pause.look(is_written=not self._items)
        if was_on and not pause.is_on:
            # Looking for the end of a pause is no part of any step.
            self._told_cpu_ns = time.thread_time_ns()

    def _flush(self) -> bool:
        """Write one block; whether there may be another."""
        items = [self._items[i] for i in range(min(len(self._items), _STEPS_PER_BLOCK))]
        record = self._encode(items) if items else None
        if record is None:
            return False
        block = record.scheduled if record.HasField("scheduled") else record.device
        for _ in block.steps:
            self._items.popleft()
        hook_ns, beside_ns, cpu_ns = self.hook_ns, self.beside_ns, time.thread_time_ns()
        block.hook_ns, self._told_hook_ns = hook_ns - self._told_hook_ns, hook_ns
        if record.HasField("scheduled"):
            record.scheduled.beside_ns, self._told_beside_ns = beside_ns - self._told_beside_ns, beside_ns
        block.writer_cpu_ns, self._told_cpu_ns = cpu_ns - self._told_cpu_ns, cpu_ns
        self._write(framed(record))
        return len(block.steps) == _STEPS_PER_BLOCK

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]


def framed(record: pb.CaptureRecord) -> bytes:
    """A record as it stands in a file."""
    data = record.SerializeToString()
    return _FRAME.pack(len(data), zlib.crc32(data)) + data


@dataclass(frozen=True)
class CaptureFile:
    """What a file holds. `cut_bytes`: how much of its end is no whole record, and `reason` what is wrong with it."""

    path: Path
    header: pb.CaptureHeader
    records: tuple[pb.CaptureRecord, ...]
    cut_bytes: int = 0
    reason: str = ""


def read_capture_file(path: Path) -> CaptureFile:
    """Read all whole records. What follows the first broken one is cut: nothing tells where the next would begin.

    Raises InvalidArgument where the file is no capture file.
    """
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        raise InvalidArgument(f"{path} does not begin as a capture file does", field="capture")
    records, at, reason = read_records(data, len(MAGIC))
    if not records or not records[0].HasField("header"):
        raise InvalidArgument(f"{path} has no header: {reason or 'it is empty'}", field="capture")
    return CaptureFile(path, records[0].header, tuple(records[1:]), len(data) - at, reason)


def read_records(data: bytes, at: int) -> tuple[list[pb.CaptureRecord], int, str]:
    """Whole records from `at` on, where they end, and what is wrong there; "" where `data` ends too."""
    records, reason = [], ""
    while at < len(data) and not reason:
        record, end, reason = _read_record(data, at)
        if not reason:
            records.append(record)
            at = end
    return records, at, reason


def _read_record(data: bytes, at: int) -> tuple[pb.CaptureRecord, int, str]:
    record = pb.CaptureRecord()
    if len(data) - at < _FRAME.size:
        return record, at, "the last record is not whole"
    size, checksum = _FRAME.unpack_from(data, at)
    begin = at + _FRAME.size
    if size > _MAX_RECORD_BYTES:
        return record, at, f"a record of {size} bytes at byte {at}"
    if len(data) - begin < size:
        return record, at, "the last record is not whole"
    payload = data[begin : begin + size]
    if zlib.crc32(payload) != checksum:
        return record, at, f"the checksum of the record at byte {at} is wrong"
    try:
        record.ParseFromString(payload)
    except DecodeError:
        return record, at, f"the record at byte {at} is no CaptureRecord"
    return record, begin + size, ""
