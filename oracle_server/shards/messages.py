"""What the parent and its shards say to each other."""

from __future__ import annotations

from typing import Any

import msgspec

from oracle_server.config import TlsFiles
from oracle_server.pack import EngineFacts
from oracle_server.shards.calls import Failure, Method
from oracle_server.state.credentials import Admission
from oracle_server.state.engines import EngineCounts
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.shadow import Comparison
from oracle_server.state.store import ExperimentRow


class ShardTask(msgspec.Struct, frozen=True):
    """What a shard is started with."""

    # Its place, 0 to N - 1, which one that follows it takes over, and the number of its process, which nobody else has.
    shard: int
    process: int
    parent_pid: int
    listen: tuple[str, ...]
    state_dir: str
    leases: bool
    # Where the parent answers, and where the shard answers the parent.
    parent: str
    control: str
    tls: TlsFiles | None
    # Whether callers need a credential.
    gated: bool


class OpenStream(msgspec.Struct, frozen=True):
    """An engine wants to open a stream at a shard; `key` names the stream in that process."""

    process: int
    key: int
    identity: EngineIdentity
    facts: EngineFacts
    incarnation: int
    allowed: frozenset[str]


class OpenedStream(msgspec.Struct, frozen=True):
    """The parent's consent."""

    incarnation: int
    generation: int
    accepted_digest: str


class CloseStream(msgspec.Struct, frozen=True):
    """A stream has ended; `counts` is what its engine did on it."""

    process: int
    key: int
    by_engine: bool
    counts: EngineCounts


class CatchUp(msgspec.Struct, frozen=True):
    """An engine at a shard has seen a generation at another server of the fleet."""

    experiment: str
    generation: int


class EndStream(msgspec.Struct, frozen=True):
    """A stream has to end: a newer one has taken its engine over."""

    key: int
    failure: Failure


class Serve(msgspec.Struct, frozen=True):
    """Take connections; `healthy`: all shards were ready before."""

    healthy: bool


class Serving(msgspec.Struct, frozen=True):
    """The addresses with their real ports."""

    addresses: tuple[str, ...]


class Report(msgspec.Struct, frozen=True):
    """The counts of a shard since its start, by the names of Metrics; those of its open streams since their opening;
    steps answered without a stream since its start, by experiment.
    """

    metrics: dict[str, Any]
    streams: dict[int, EngineCounts]
    sampled: dict[str, int] = {}


# To the parent. None: nothing to say.
OPEN_STREAM = Method("OpenStream", OpenStream, OpenedStream)
CLOSE_STREAM = Method("CloseStream", CloseStream, type(None))
# An experiment the shard does not know: the error that is due, or nothing.
FIND_EXPERIMENT = Method("FindExperiment", str, type(None))
CATCH_UP = Method("CatchUp", CatchUp, type(None))

# To a shard.
PREPARE = Method("Prepare", tuple[str, ...], type(None))
FOLLOW = Method("Follow", ExperimentRow, type(None))
FORGET = Method("Forget", str, type(None))
ADMIT = Method("Admit", Admission, type(None))
SERVE = Method("Serve", Serve, Serving)
SET_HEALTHY = Method("SetHealthy", type(None), type(None))
END_STREAM = Method("EndStream", EndStream, type(None))
COUNT = Method("Count", type(None), Report)
# By the name of the experiment.
COMPARISONS = Method("Comparisons", str, list[Comparison])
DRAIN = Method("Drain", float, Report)
