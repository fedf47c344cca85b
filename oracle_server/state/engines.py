"""The engines of an experiment: who is attached, with which configuration, on which stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from oracle_server import pack as packs
from oracle_server.errors import EngineMismatch, NoRuleMatches, OracleError
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.snapshot import LoadedPack, Snapshot

# An engine without a stream yet holds its id this long after its attach: vLLM builds its KV cache in between.
ATTACH_SECONDS = 30.0
# Records of engines that are gone are kept this long, so that one that comes back goes on counting.
LINGER_SECONDS = 600.0


class EngineStream(Protocol):
    """An open StreamSteps call."""

    def announce(self, generation: int) -> None:
        """Push the new generation to the engine."""

    def end(self, error: OracleError) -> None:
        """End the stream with the error, soon."""


class ElsewhereStream:
    """Stands for a stream at another server of the fleet, which has its own word of every change."""

    def announce(self, generation: int) -> None:
        """Nothing: its server does."""

    def end(self, error: OracleError) -> None:
        """Nothing: its server does, once it has read why."""


# So far below what messages and databases hold that steps may be counted on.
COUNT_LIMIT = 1 << 62
_OF_THE_SHIM = ("steps", "extrapolated_steps", "late_answers", "leased_steps", "reconnects", "lateness_sum_ns")


@dataclass(slots=True)
class EngineCounts:
    """What an engine did since this server knows it."""

    steps: int = 0
    extrapolated_steps: int = 0
    late_answers: int = 0
    leased_steps: int = 0
    reconnects: int = 0
    # As step_oracle.v1.ShimCounts.lateness_buckets; empty until its shim has said some.
    lateness_buckets: list[int] = field(default_factory=list)
    lateness_sum_ns: int = 0

    def add_lateness(self, buckets: Sequence[int]) -> None:
        """Add bucket by bucket; a newer shim may know more of them."""
        known = self.lateness_buckets
        known.extend([0] * (len(buckets) - len(known)))
        for i, count in enumerate(buckets):
            known[i] += count

    def saturate(self) -> None:
        """Keep what shims counted where messages and databases can hold it, whatever they say."""
        for name in _OF_THE_SHIM:
            setattr(self, name, min(getattr(self, name), COUNT_LIMIT))
        self.lateness_buckets = [min(count, COUNT_LIMIT) for count in self.lateness_buckets]


@dataclass(slots=True)
class EngineRecord:
    """One engine. Written by the event loop only."""

    identity: EngineIdentity
    # Its num_kv_blocks are those it has, or was given at attach.
    facts: packs.EngineFacts
    incarnation: int
    # The pack whose cold fields the engine was last compared with and let pass.
    accepted_digest: str
    allowed: frozenset[str]
    # When it attached, or lost its stream, by the monotonic clock.
    since: float
    stream: EngineStream | None = None
    # Its stream ended: `closed` where the engine closed it, else it broke and the engine may be on its way back.
    ended: bool = False
    closed: bool = False
    counts: EngineCounts = field(default_factory=EngineCounts)
    # counts.steps as of the last look at its tenant's rate, and whether it took some while that was over the quota.
    rated_steps: int = 0
    degraded: bool = False
    # The server of the fleet that has it; empty: this one. And the revision with which that was last written here.
    elsewhere: str = ""
    placed: int = 0

    def is_live(self, now: float) -> bool:
        """True while it has a stream, or may still open its first one: nobody else can have its id."""
        return self.stream is not None or (not self.ended and now - self.since < ATTACH_SECONDS)

    def may_return(self, now: float) -> bool:
        """True while it is live, or its stream broke a moment ago: an activation must fit it too."""
        return self.is_live(now) or (not self.closed and now - self.since < ATTACH_SECONDS)


def check_engine(
    pack: LoadedPack, facts: packs.EngineFacts, allowed: frozenset[str], *, frozen: bool
) -> tuple[tuple[packs.Difference, ...], tuple[packs.Difference, ...]]:
    """(let pass, refused) differences of an engine from a pack.

    `frozen`: the engine runs already, so what vLLM derived from the pack at its start cannot change any more.
    """
    differences = packs.cold_differences(pack.manifest, facts, frozen=frozen)
    refused = tuple(d for d in differences if d.severity == "refuse" and d.field not in allowed)
    return tuple(d for d in differences if d not in refused), refused


def check_activation(
    snapshot: Snapshot, engines: Iterable[EngineRecord], allowed: frozenset[str]
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """(pack of each engine, warnings) under another snapshot; EngineMismatch with every item of every engine."""
    accepted: dict[str, str] = {}
    passed: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for engine in engines:
        engine_id = engine.identity.engine_id
        try:
            pack = snapshot.pack_for(engine.identity)
        except NoRuleMatches:
            refused.setdefault("no rule fits and there is no default pack", []).append(engine_id)
            continue
        accepted[engine_id] = pack.digest
        if pack.digest == engine.accepted_digest:
            continue
        let_pass, against = check_engine(pack, engine.facts, allowed | engine.allowed, frozen=True)
        for difference in let_pass:
            passed.setdefault(sentence(difference), []).append(engine_id)
        for difference in against:
            refused.setdefault(sentence(difference), []).append(engine_id)
    if refused:
        raise mismatch(
            f"generation {snapshot.generation} of {snapshot.experiment} does not fit the engines attached",
            _grouped(refused),
        )
    return accepted, tuple(_grouped(passed))


def mismatch(what: str, items: Sequence[str]) -> EngineMismatch:
    """The refusal, with the whole list: every item is fixed at once, not one per attempt."""
    fields = sorted({item.partition(":")[0] for item in items if ":" in item})
    advice = f"; allow them by name ({', '.join(fields)}) where that is meant" if fields else ""
    return EngineMismatch(f"{what}: {'; '.join(items)}{advice}", items)


def sentence(difference: packs.Difference) -> str:
    """A difference in words, beginning with the name that allows it."""
    return f"{difference.field}: the pack has {difference.pack_value}, the engine {difference.engine_value}"


def _grouped(items: Mapping[str, list[str]]) -> list[str]:
    grouped = []
    for item, engine_ids in items.items():
        shown = ", ".join(engine_ids[:3])
        more = f" and {len(engine_ids) - 3} more" if len(engine_ids) > 3 else ""
        grouped.append(f"{item} (engines {shown}{more})")
    return grouped
