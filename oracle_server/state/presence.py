"""Who an engine is and how it stands with the server it is at, as the other servers of a fleet read it."""

from __future__ import annotations

import msgspec

from oracle_server import pack as packs
from oracle_server.state.engines import EngineRecord
from oracle_server.state.identity import EngineIdentity


class Presence(msgspec.Struct, frozen=True):
    """What activations, quotas and attachments at another server have to know; as its record has it."""

    identity: EngineIdentity
    facts: packs.EngineFacts
    allowed: frozenset[str]
    has_stream: bool
    ended: bool


_decoder = msgspec.msgpack.Decoder(Presence)


def write_presence(record: EngineRecord) -> bytes:
    """As it is kept in the database; nothing of an engine that has closed its stream."""
    if record.closed:
        return b""
    return msgspec.msgpack.encode(
        Presence(record.identity, record.facts, record.allowed, record.stream is not None, record.ended)
    )


def read_presence(data: bytes) -> Presence | None:
    """The inverse; None of an engine that has gone for good, or that a newer server has described."""
    try:
        return _decoder.decode(data) if data else None
    except msgspec.DecodeError:
        return None
