"""Capture files: what is written is read, and what is broken is cut where it breaks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from environments import REPOSITORY
from oracle_server.errors import InvalidArgument
from profiler.capture.recording import StepSchedule, scheduled_block
from profiler.capture.trace_file import _STEPS_PER_BLOCK, MAGIC, CaptureWriter, framed, read_capture_file
from step_oracle.v1 import capture_pb2 as pb
from step_oracle.v1.step_pb2 import StepShape
from vllm_shim.step_shape import ScheduledStep

HEADER = pb.CaptureHeader(version="test")


def step(index: int) -> StepSchedule:
    scheduled = ScheduledStep(StepShape())
    return StepSchedule(index, None, 0, scheduled, dispatch_ns=1000 * index, result_ns=1000 * index + 900)


def indices(path: Path) -> list[int]:
    return [step.step_index for record in read_capture_file(path).records for step in record.scheduled.steps]


def whole_file(path: Path) -> tuple[bytes, list[int]]:
    """A file of three records with two steps each, and where the header and each record end."""
    data, ends = MAGIC + framed(pb.CaptureRecord(header=HEADER)), []
    ends.append(len(data))
    for number in range(3):
        data += framed(scheduled_block([step(2 * number), step(2 * number + 1)]))
        ends.append(len(data))
    path.write_bytes(data)
    return data, ends


def test_steps_are_read_in_the_order_they_were_appended(tmp_path: Path) -> None:
    writer = CaptureWriter(tmp_path / "a.capture", HEADER, scheduled_block)
    for index in range(1000):
        writer.append(step(index))
    writer.close()

    assert indices(tmp_path / "a.capture") == list(range(1000))
    assert read_capture_file(tmp_path / "a.capture").cut_bytes == 0


def test_steps_that_are_not_ready_are_offered_again(tmp_path: Path) -> None:
    offered: list[int] = []
    offered_thrice = threading.Event()

    def encode(steps: Sequence[StepSchedule]) -> pb.CaptureRecord | None:
        offered.append(len(steps))
        if len(offered) < 3:
            return None
        offered_thrice.set()
        return scheduled_block(steps[:1])

    writer = CaptureWriter(tmp_path / "a.capture", HEADER, encode)
    writer.append(step(1))
    assert offered_thrice.wait(30)
    writer.close()

    assert indices(tmp_path / "a.capture") == [1]


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    writer = CaptureWriter(tmp_path / "a.capture", HEADER, scheduled_block)
    writer.close()
    writer.close()


def test_a_file_that_is_there_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "a.capture").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        CaptureWriter(tmp_path / "a.capture", HEADER, scheduled_block)

    assert (tmp_path / "a.capture").read_bytes() == b"somebody's"


def test_a_file_cut_anywhere_is_read_up_to_the_last_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "a.capture"
    data, ends = whole_file(path)
    for end in range(ends[0], len(data) + 1):
        path.write_bytes(data[:end])
        found = read_capture_file(path)
        whole = max(number for number, place in enumerate(ends) if place <= end)
        assert [len(record.scheduled.steps) for record in found.records] == [2] * whole
        assert found.cut_bytes == end - ends[whole]


def test_a_file_begins_with_one_write_of_all_of_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between two writes would leave a file that nobody can read."""
    written: list[bytes] = []
    write = os.write

    def noted(file: int, data: bytes) -> int:
        written.append(bytes(data))
        return write(file, data)

    monkeypatch.setattr(os, "write", noted)
    CaptureWriter(tmp_path / "a.capture", HEADER, scheduled_block).close()

    assert written == [MAGIC + framed(pb.CaptureRecord(header=HEADER))]


def test_a_full_disk_is_said_once_and_nothing_piles_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    writer = CaptureWriter(tmp_path / "a.capture", HEADER, scheduled_block)

    def full(_: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for index in range(3):
        writer.append(step(index))
    writer.close()
    writer.append(step(9))

    assert not writer._items
    assert capfd.readouterr().err.count("is not written any more") == 1
    assert indices(tmp_path / "a.capture") == []


def test_the_writers_thread_begins_with_what_it_is_given(tmp_path: Path) -> None:
    threads: list[str] = []

    def begin() -> None:
        threads.append(threading.current_thread().name)

    CaptureWriter(tmp_path / "a.capture", HEADER, scheduled_block, begin).close()

    assert threads == ["step-oracle-capture"]


def test_a_flipped_bit_cuts_the_file_at_its_record_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "a.capture"
    data, ends = whole_file(path)
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])
    found = read_capture_file(path)

    assert indices(path) == [0, 1, 2, 3]
    assert found.cut_bytes == ends[3] - ends[2]
    assert f"checksum of the record at byte {ends[2]}" in found.reason


@pytest.mark.parametrize("data", [b"", b"PAR1", MAGIC, MAGIC + framed(scheduled_block([step(0)]))])
def test_what_is_no_capture_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.capture").write_bytes(data)
    with pytest.raises(InvalidArgument, match=r"a\.capture"):
        read_capture_file(tmp_path / "a.capture")


def test_a_killed_writer_leaves_all_but_what_it_was_given_last(tmp_path: Path) -> None:
    """Whatever was appended before the write before the last is there, and no step is half there.

    The writer says how many steps it has been given and how many it has written: the file holds no fewer than it had
    written when it was last heard, however slow the machine.
    """
    script = (
        "import sys, time; from pathlib import Path; from profiler.capture.trace_file import CaptureWriter\n"
        "from profiler.capture.recording import StepSchedule, scheduled_block\n"
        "from step_oracle.v1 import capture_pb2 as pb, step_pb2\n"
        "from vllm_shim.step_shape import ScheduledStep\n"
        "writer = CaptureWriter(Path(sys.argv[1]), pb.CaptureHeader(version='test'), scheduled_block)\n"
        "for index in range(10**9):\n"
        "    scheduled = ScheduledStep(step_pb2.StepShape())\n"
        "    writer.append(StepSchedule(index, None, 0, scheduled, dispatch_ns=time.monotonic_ns()))\n"
        "    print(index - len(writer._items), flush=True); time.sleep(0.002)\n"
    )
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "proto")))
    command = [sys.executable, "-c", script, str(tmp_path / "a.capture")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}) as process:
        assert process.stdout is not None
        told = 0
        while told < 600:
            told = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    found = indices(tmp_path / "a.capture")

    assert found == list(range(len(found)))
    # Steps that have left the queue are in the block that is written next: at most one block is not there yet.
    assert len(found) >= told - _STEPS_PER_BLOCK
