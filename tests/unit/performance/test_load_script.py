"""What the load generator sends is what a shim would send."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from oracle_calls import decode, prefill
from performance.load.leased import is_leasable
from performance.load.script import STREAM, Message, Script, ScriptEngine, header_block, stream_messages
from step_oracle.v1 import oracle_service_pb2 as service

PERIOD_NS = 20_000_000
STEPS = [decode(i) for i in range(200)]


def parsed(messages: list[Message]) -> list[service.StreamStepsRequest]:
    return [service.StreamStepsRequest.FromString(message.data) for message in messages]


def test_without_leases_every_step_is_a_message_and_counts_go_with_one_each_second() -> None:
    messages = stream_messages(STEPS, period_ns=PERIOD_NS, generation=3)
    requests = parsed(messages)
    assert [request.steps[0] for request in requests] == STEPS
    assert [message.due_ns for message in messages] == [i * PERIOD_NS for i in range(200)]
    assert {request.min_generation for request in requests} == {3}
    assert [i for i, request in enumerate(requests) if request.HasField("counts")] == [50, 100, 150]
    assert [request.counts.steps for request in requests if request.HasField("counts")] == [50] * 3


def test_with_leases_only_the_others_are_sent_and_their_counts() -> None:
    messages = stream_messages(STEPS, period_ns=PERIOD_NS, generation=1, sent=[0, 60, 61])
    requests = parsed(messages)
    assert [message.step_index for message in messages if message.steps] == [0, 60, 61]
    assert requests[1].counts.steps == 60
    assert requests[1].counts.leased_steps == 59
    assert requests[1].counts.last_leased_step_index == 59
    assert not requests[2].HasField("counts")


def test_an_engine_that_has_nothing_to_ask_reports_its_counts_alone() -> None:
    messages = stream_messages(STEPS, period_ns=PERIOD_NS, generation=1, sent=[0])
    alone = [message for message in messages if not message.steps]
    assert [message.due_ns for message in alone] == [100 * PERIOD_NS]
    (request,) = parsed(alone)
    assert not request.steps
    assert request.counts.leased_steps == 100


def test_counts_cover_every_leased_step_once() -> None:
    sent = [i for i in range(200) if i % 7 == 0]
    requests = parsed(stream_messages(STEPS, period_ns=PERIOD_NS, generation=1, sent=sent))
    last = max(i for i, request in enumerate(requests) if request.HasField("counts"))
    leased = sum(request.counts.leased_steps for request in requests)
    assert leased == sum(i not in sent for i in range(requests[last].steps[0].step_index))


@pytest.mark.parametrize(
    ("step", "leasable"),
    [
        (decode(0), True),
        (prefill(0, (8, 0)), False),
        (decode(0, num_decode_tokens=6, num_draft_tokens=[2]), False),
    ],
)
def test_only_decode_steps_without_drafts_are_leasable(step: object, leasable: bool) -> None:
    assert is_leasable(step.shape) is leasable  # type: ignore[attr-defined]


def test_a_header_block_needs_no_table_of_its_reader() -> None:
    """Every field is a literal without indexing or stands in the static table (RFC 7541, 6.1 and 6.2.2)."""
    block = header_block("StreamSteps")
    assert block.startswith(b"\x83\x86\x04")
    assert b"/step_oracle.v1.OracleService/StreamSteps" in block
    assert block.endswith(b"\x00\x02te\x08trailers")


def test_the_file_holds_sequences_once_and_engines_by_number(tmp_path: Path) -> None:
    sequence = [Message(5, 7, 1, b"abc")]
    engines = [ScriptEngine(0, 11, b"xy"), ScriptEngine(0, -12, b"", first=1, count=0)]
    Script(STREAM, [sequence], engines).write(tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    assert data.startswith(b"SOLOAD2\n" + struct.pack("<III", STREAM, 1, 2))
    message = struct.pack("<IqQII", 1, 5, 7, 1, 3) + b"abc"
    assert data.endswith(
        message + struct.pack("<IIIqI", 0, 0, 1, 11, 2) + b"xy" + struct.pack("<IIIqI", 0, 1, 0, -12, 0)
    )
