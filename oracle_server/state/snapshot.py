"""One generation of an experiment, ready to answer.

answer = f(snapshot, engine identity, step_index, step): nothing here reads a clock, a server's state or a source of
randomness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from oracle_server.errors import AcceptanceUnknown, BadStep, PackRegistryUnavailable, StaleGeneration, SupportRefused
from oracle_server.pack import Manifest, host_time, wake_curve
from oracle_server.sampling import draws
from oracle_server.sampling.answer import SUPPORT_EXTRAPOLATED, Answer, DecodeRecord
from oracle_server.sampling.oracle import Oracle
from oracle_server.sampling.shape import StepQuery
from oracle_server.state.binding import SUPPORT_REFUSE, Binding, length_tables
from oracle_server.state.identity import EngineIdentity, pack_of
from oracle_server.state.overlays import effects_of, scaled

# Numbers of step_oracle.v1.LengthSource.
LENGTH_IGNORE_EOS = 1
LENGTH_HINT = 2
LENGTH_TABLE = 3
LENGTH_NONE = 4
# As the kernels have it.
LATENCY_LIMIT_NS = 1 << 62


class LoadedPack:
    """A pack compiled, mapped and ready. Immutable; shared by every snapshot that names it."""

    __slots__ = ("__weakref__", "digest", "manifest", "oracle")

    def __init__(self, digest: str, manifest: Manifest, oracle: Oracle) -> None:
        self.digest = digest
        self.manifest = manifest
        self.oracle = oracle


class NewRequest(NamedTuple):
    """What decides when a request ends."""

    request_key: str
    prompt_tokens: int
    ignore_eos: bool
    output_tokens_hint: int
    length_class: str


class StepAnswer(NamedTuple):
    """The values of a step_oracle.v1.StepReply."""

    latency_ns: int
    prep_ns: int
    copy_ns: int
    generated_tokens: int
    accepted_draft_tokens: tuple[int, ...]
    # (output tokens, length source) of each new request.
    targets: tuple[tuple[int, int], ...]
    support: int
    knowledge: int
    distance: float
    # What overlays put in: part of the latency, and whether the step fails.
    stall_ns: int = 0
    is_error: bool = False
    host_ns: int = 0


class Snapshot:
    """Immutable: a generation's binding and its packs, opened.

    `missing`: why packs of the binding are not here, by digest. Engines that they answer are refused, all others are
    answered.
    """

    __slots__ = ("binding", "experiment", "generation", "lengths", "missing", "packs")

    def __init__(
        self,
        experiment: str,
        generation: int,
        binding: Binding,
        packs: Mapping[str, LoadedPack],
        missing: Mapping[str, str] | None = None,
    ) -> None:
        self.experiment = experiment
        self.generation = generation
        self.binding = binding
        self.packs = packs
        self.missing = dict(missing or {})
        self.lengths = None if binding.length_table is None else length_tables(binding.length_table)

    def pack_for(self, identity: EngineIdentity) -> LoadedPack:
        """The pack that answers the engine; NoRuleMatches, PackRegistryUnavailable where it is not here."""
        digest = pack_of(self.binding, identity)
        if digest in self.missing:
            raise PackRegistryUnavailable(
                f"generation {self.generation} of {self.experiment} answers this engine from the pack {digest}, which "
                f"is not on this server: {self.missing[digest]}; it is asked for again until it comes"
            )
        return self.packs[digest]

    def check_generation(self, min_generation: int) -> None:
        """StaleGeneration where the engine has seen a newer generation than this one."""
        if self.generation < min_generation:
            raise StaleGeneration(
                f"{self.experiment} is at generation {self.generation} here, the engine has seen {min_generation}; "
                "retry, here or elsewhere"
            )

    def plan(self, identity: EngineIdentity) -> EnginePlan:
        """Everything about one engine that does not change from step to step; as `pack_for`."""
        return EnginePlan(self, self.pack_for(identity), identity)

    def shadow_plan(self, identity: EngineIdentity) -> EnginePlan | None:
        """What would answer the engine's steps were the shadow pack bound; None where there is none, or not here."""
        pack = self.packs.get(self.binding.shadow_pack_digest)
        return None if pack is None else EnginePlan(self, pack, identity)


class EnginePlan:
    """Immutable: what answers the steps of one engine under one snapshot."""

    __slots__ = (
        "_acceptance",
        "_experiment",
        "_host_request_ns",
        "_host_step_ns",
        "_latency_factor",
        "_lengths",
        "_oracle",
        "_pack",
        "_refuse",
        "_schedule",
        "_seed",
        "_wake",
        "copy_ns",
        "generation",
        "key",
        "leasable",
        "pack_digest",
        "prep_ns",
        "residual_pool",
        "snapshot",
    )

    def __init__(self, snapshot: Snapshot, pack: LoadedPack, identity: EngineIdentity) -> None:
        binding = snapshot.binding
        self.snapshot = snapshot
        self.generation = snapshot.generation
        self._experiment = snapshot.experiment
        self._pack = pack
        self._oracle = pack.oracle
        self._seed = binding.seed
        self.residual_pool = pack.oracle.residual_pool
        # Of all its draws.
        self.key = draws.engine_key(binding.seed, identity.engine_id)
        self.pack_digest = pack.digest
        constant, self._schedule = effects_of(binding.overlays, identity, self.key, binding.time_scale)
        self._latency_factor = binding.time_scale * constant
        # A shadow is compared at every step, and a schedule decides at every step: the server has to see them all.
        self.leasable = self._schedule is None and not binding.shadow_pack_digest
        self.prep_ns = scaled(pack.oracle.prep_ns, binding.time_scale)
        self.copy_ns = scaled(pack.oracle.copy_ns, binding.time_scale)
        self._wake = wake_curve(pack.manifest.latency)
        host = host_time(pack.manifest.latency)
        # 0: not known.
        self._host_step_ns = max(1, scaled(host[0], binding.time_scale)) if host[0] else 0
        self._host_request_ns = scaled(host[1], binding.time_scale)
        self._refuse = binding.support_policy == SUPPORT_REFUSE
        self._acceptance = binding.draft_acceptance_rate
        self._lengths = snapshot.lengths

    def answer(
        self,
        step_index: int,
        query: StepQuery,
        draft_tokens: Sequence[int],
        new_requests: Sequence[NewRequest],
        device_time_ns: int = 0,
        device_idle_ns: int = 0,
    ) -> StepAnswer:
        """The answer to one step; SupportRefused, AcceptanceUnknown.

        `device_time_ns` is how long the engine's device was busy before the step, and `device_idle_ns` how long it had
        nothing to do, as the step says.
        """
        if self._schedule is None:
            stall_ns, is_error = 0, False
            latency_ns, support, distance, knowledge = self._oracle.answer(
                query, self.key, step_index, self._latency_factor
            )
        else:
            (latency_ns, support, distance, knowledge), stall_ns, is_error = self._scheduled(
                step_index, query, device_time_ns
            )
        if support == SUPPORT_EXTRAPOLATED and self._refuse:
            self._raise_refused(step_index, query)
        accepted = self._accept(step_index, draft_tokens) if draft_tokens else ()
        return StepAnswer(
            latency_ns,
            self._prep_ns(device_idle_ns) if device_idle_ns else self.prep_ns,
            self.copy_ns,
            query.num_decode_requests + (sum(accepted) if accepted else 0),
            accepted,
            tuple([self._target(request) for request in new_requests]) if new_requests else (),
            support,
            knowledge,
            distance,
            stall_ns,
            is_error,
            self.host_ns(query.num_decode_requests + len(query.chunk_tokens)) if self._host_step_ns else 0,
        )

    def host_ns(self, requests: int) -> int:
        """StepReply.host_ns of a step of so many requests; 0: the pack does not know it."""
        return self._host_step_ns + self._host_request_ns * requests if self._host_step_ns else 0

    def _prep_ns(self, idle_ns: int) -> int:
        return self.prep_ns + scaled(self._wake.extra_ns(idle_ns), self.snapshot.binding.time_scale)

    def latency(self, step_index: int, query: StepQuery, device_time_ns: int) -> tuple[int, int]:
        """(Latency, support) of one step, overlays included, whatever the support policy says."""
        if self._schedule is None:
            return self._oracle.answer(query, self.key, step_index, self._latency_factor)[:2]
        return self._scheduled(step_index, query, device_time_ns)[0][:2]

    def lease(self, query: StepQuery) -> DecodeRecord | None:
        """The piece a decode-only step without draft tokens is answered from, where the engine may have it.

        Constant factors are folded in. None where the plan is not `leasable`, where the model has no piece, where its
        points differ in more than latency, where the support policy refuses it, or where the step itself was not
        answered from it.
        """
        if not self.leasable:
            return None
        record = self._oracle.decode_record(
            query.num_decode_requests,
            query.decode_context_tokens,
            query.max_decode_context_tokens,
            self._latency_factor,
        )
        if record is None or record.distance is None or (self._refuse and record.support == SUPPORT_EXTRAPOLATED):
            return None
        # Such a step is asked for although the engine may have the piece.
        return None if record.not_after_prefill and query.previous_prefill_tokens else record

    def _scheduled(self, step_index: int, query: StepQuery, device_time_ns: int) -> tuple[Answer, int, bool]:
        """(Answer, stalls in its latency, whether the step fails) where overlays change from step to step."""
        schedule = self._schedule
        assert schedule is not None  # noqa: S101  its callers have looked
        effect = schedule.at(step_index, device_time_ns)
        answer = self._oracle.answer(query, self.key, step_index, self._latency_factor * effect.factor)
        latency_ns = answer.latency_ns + effect.stall_ns
        if latency_ns >= LATENCY_LIMIT_NS:
            raise BadStep(
                f"step {step_index} takes {latency_ns} ns with the overlays of generation {self.generation} of "
                f"{self._experiment}, at {device_time_ns} ns of device time; allowed: below 2^62. Activate smaller ones"
            )
        return answer._replace(latency_ns=latency_ns), effect.stall_ns, effect.is_error

    def _accept(self, step_index: int, draft_tokens: Sequence[int]) -> tuple[int, ...]:
        """Accepted draft tokens of each request: each with the same probability, until the first that is not."""
        rate = self._acceptance
        if rate == 0.0:
            raise AcceptanceUnknown(
                f"step {step_index} has draft tokens and generation {self.generation} of {self._experiment} has no "
                "draft_acceptance_rate; activate one, or start the engine without speculation"
            )
        accepted = []
        first = 0
        for count in draft_tokens:
            length = 0
            # The ordinal of a draft token is its place in the whole message, whatever happened to those before it.
            while (
                length < count
                and draws.unit(draws.draw(self.key, step_index, draws.DOMAIN_ACCEPTANCE, first + length)) < rate
            ):
                length += 1
            accepted.append(length)
            first += count
        return tuple(accepted)

    def _target(self, request: NewRequest) -> tuple[int, int]:
        if request.ignore_eos:
            return 0, LENGTH_IGNORE_EOS
        if request.output_tokens_hint:
            return request.output_tokens_hint, LENGTH_HINT
        if self._lengths is None:
            return 0, LENGTH_NONE
        u = draws.request_draw(self._seed, request.request_key)
        return self._lengths.draw(u, request.prompt_tokens, request.length_class), LENGTH_TABLE

    def _raise_refused(self, step_index: int, query: StepQuery) -> None:
        coverage = ", ".join(f"{key} {value}" for key, value in sorted(self._pack.manifest.coverage.items()))
        raise SupportRefused(
            f"step {step_index} (prefill chunks {list(query.chunk_tokens[:8])} over contexts "
            f"{list(query.chunk_context[:8])}, {query.num_decode_requests} decode requests, "
            f"{query.decode_context_tokens} decode context tokens, concurrency {query.concurrency}) lies outside the "
            f"pack {self._pack.digest} ({coverage[:1000] or 'coverage not stated'}) and the support policy is refuse; "
            "activate a pack that covers it or the support policy serve"
        )
