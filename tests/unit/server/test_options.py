"""What a server asks of gRPC."""

from __future__ import annotations

from oracle_server.rpc.step_stream import AGE_SPREAD
from oracle_server.server import options


def test_no_connection_is_too_old_before_its_stream_is() -> None:
    """Else the engine's channel opens a second one beside it."""
    age = dict(options(max_stream_age_seconds=480.0))["grpc.max_connection_age_ms"]
    assert 0.9 * age > 480_000 * (1 + AGE_SPREAD)


def test_where_streams_do_not_age_connections_do_not_either() -> None:
    assert "grpc.max_connection_age_ms" not in dict(options())
