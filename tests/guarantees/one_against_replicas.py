"""One server and four replicas answer the same steps of a pinned generation: byte for byte alike."""

from __future__ import annotations

from pathlib import Path

from guarantees.hot_swaps import binding_of, build_packs
from guarantees.one_against_shards import GENERATION_LIKE, LONG, QUICK, Sizes, compare
from guarantees.row import Guarantee, Row, judged
from oracle_calls import Calls
from oracle_process import OracleProcess
from postgres_server import PostgresServer
from replicated_servers import ReplicatedServers

REPLICAS = 4


def run(folder: Path, sizes: Sizes) -> list[Row]:
    packs = build_packs(folder)
    # As old as they may become in a run: an engine's stream is driven by hand here.
    arguments = ("--max-stream-age", "0")
    with (
        OracleProcess(folder / "one", arguments=arguments) as one,
        PostgresServer() as postgres,
        ReplicatedServers(folder, REPLICAS, arguments=arguments, database_url=postgres.new_database()) as many,
        Calls(one.target) as alone,
    ):
        for pack in packs:
            alone.create(alone.upload(pack), pack.name, **binding_of(GENERATION_LIKE))
            many.create(pack, pack.name, **binding_of(GENERATION_LIKE))
        names = [f"tenants/default/experiments/{pack.name}" for pack in packs]
        compared, different = compare(alone, [Calls(server.target) for server in many.servers], names, sizes)
    return [
        judged(
            "one server and four replicas of one PostgreSQL answer alike",
            f"{compared:,} steps at a pinned generation of three packs, overlays included, each replica a quarter",
            f"{different} differences",
            "0",
            holds=different == 0 and compared == sizes.steps,
        )
    ]


GUARANTEE = Guarantee(run, LONG, QUICK)
