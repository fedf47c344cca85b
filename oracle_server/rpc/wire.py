"""Messages of step_oracle.v1 <-> plain values. A step is checked here, by hand, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from oracle_server import pack as packs
from oracle_server.errors import BadStep, InvalidArgument
from oracle_server.sampling.answer import DecodeRecord
from oracle_server.sampling.shape import StepQuery, check_query
from oracle_server.state import binding as bindings
from oracle_server.state import names, principal, store
from oracle_server.state.binding import Binding, LengthClass, LengthTable, Overlay, Rule
from oracle_server.state.engines import EngineRecord
from oracle_server.state.experiments import LiveExperiment
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.shadow import Comparison, Differences, Region
from oracle_server.state.snapshot import EnginePlan, NewRequest, StepAnswer
from oracle_server.state.store import GenerationRow, PackRow, TenantRow, TokenRow
from step_oracle.v1 import experiment_pb2, oracle_service_pb2, pack_pb2, step_pb2, tenant_pb2

MAX_CHUNKS = 4096
MAX_NEW_REQUESTS = 65_536
MAX_TOKENS = 1 << 24
MAX_CONTEXT_TOKENS = 1 << 40
# A step index enters the kernels as a signed 64-bit integer.
MAX_STEP_INDEX = (1 << 63) - 1

_FACTS = tuple(field.name for field in dataclasses.fields(packs.EngineFacts))
_NONE: tuple[int, ...] = ()
# The fields of step_pb2.Lease that a DecodeRecord gives, in its order; its last one is the pool.
_LEASED = tuple("support_distance" if name == "distance" else name for name in DecodeRecord._fields[:-1])
_POLICIES = {
    experiment_pb2.SUPPORT_POLICY_UNSPECIFIED: bindings.SUPPORT_SERVE,
    experiment_pb2.SUPPORT_POLICY_SERVE: bindings.SUPPORT_SERVE,
    experiment_pb2.SUPPORT_POLICY_REFUSE: bindings.SUPPORT_REFUSE,
}
_QUOTA = ("max_engines", "max_steps_per_second", "max_packs", "max_pack_bytes", "max_streams")
_OVER_RATE = {
    store.OVER_RATE_MARK: tenant_pb2.OVER_RATE_POLICY_MARK,
    store.OVER_RATE_DETACH: tenant_pb2.OVER_RATE_POLICY_DETACH,
}
_SCOPES = {
    principal.SCOPE_ENGINE: tenant_pb2.TOKEN_SCOPE_ENGINE,
    principal.SCOPE_ADMIN: tenant_pb2.TOKEN_SCOPE_ADMIN,
}
# As the database keeps integers.
_MAX_QUOTA = (1 << 63) - 1


# Steps


def read_step(step: step_pb2.StepRequest) -> tuple[StepQuery, tuple[int, ...], tuple[NewRequest, ...]]:
    """(shape, draft tokens of each request that has any, new requests) of a step; BadStep where it cannot be."""
    shape = step.shape
    requests = shape.num_decode_requests
    tokens = all_tokens = shape.num_decode_tokens
    chunk_tokens = chunk_context = _NONE
    if chunks := shape.prefill_chunks:
        chunk_tokens, chunk_context = _read_chunks(step, chunks)
        all_tokens += sum(chunk_tokens)
    new = shape.new_requests
    query = StepQuery(
        chunk_tokens,
        chunk_context,
        requests,
        tokens,
        shape.decode_context_tokens,
        shape.max_decode_context_tokens,
        shape.concurrency,
        shape.previous_prefill_tokens,
        len(new),
    )
    if all_tokens > MAX_TOKENS:
        raise _bad(step, f"{all_tokens} tokens; allowed: {MAX_TOKENS}", "shape")
    if query.decode_context_tokens > MAX_CONTEXT_TOKENS:
        raise _bad(
            step,
            f"{query.decode_context_tokens} context tokens; allowed: {MAX_CONTEXT_TOKENS}",
            "decode_context_tokens",
        )
    if step.step_index > MAX_STEP_INDEX:
        raise _bad(step, "an index above 2^63 - 1", "step_index")
    try:
        check_query(query)
    except BadStep as error:
        raise _bad(step, error.message, error.field) from None
    drafts = _NONE
    if tokens != requests or shape.num_draft_tokens:
        drafts = tuple(shape.num_draft_tokens)
        if len(drafts) > requests or 0 in drafts or sum(drafts) != tokens - requests:
            raise _bad(
                step,
                f"{len(drafts)} requests with {sum(drafts)} draft tokens among {requests} decode requests with "
                f"{tokens} tokens: draft tokens are positive and add up to num_decode_tokens - num_decode_requests",
                "num_draft_tokens",
            )
    return query, drafts, _read_new_requests(step, new) if new else ()


def write_reply(reply: step_pb2.StepReply, step_index: int, generation: int, answer: StepAnswer) -> None:
    """Fill the reply to one step."""
    reply.step_index = step_index
    reply.latency_ns.append(answer.latency_ns)
    reply.prep_ns = answer.prep_ns
    reply.copy_ns = answer.copy_ns
    if answer.host_ns:
        reply.host_ns = answer.host_ns
    reply.generated_tokens = answer.generated_tokens
    if answer.accepted_draft_tokens:
        reply.accepted_draft_tokens.extend(answer.accepted_draft_tokens)
    for output_tokens, source in answer.targets:
        reply.target_output_tokens.add(output_tokens=output_tokens, source=source)
    reply.generation = generation
    reply.support = answer.support  # type: ignore[assignment]
    reply.knowledge = answer.knowledge  # type: ignore[assignment]
    reply.support_distance = answer.distance
    if answer.stall_ns or answer.is_error:
        reply.injected_stall_ns = answer.stall_ns
        reply.injected_error = answer.is_error


def write_lease(lease: step_pb2.Lease, plan: EnginePlan, record: DecodeRecord) -> None:
    """Fill a lease but for its residual pool and its numbers on the stream."""
    for name, value in zip(_LEASED, record[:-1], strict=True):
        setattr(lease, name, value)
    lease.latency_pool_ns.extend(record.latency_pool_ns)
    lease.generation = plan.generation
    lease.prep_ns = plan.prep_ns
    lease.copy_ns = plan.copy_ns
    lease.host_ns = plan.host_ns(record.num_decode_requests)
    lease.draw_key = plan.key


# What reads repeated fields gets them, and looks at each item once: an item costs more than its numbers.


def _read_chunks(
    step: step_pb2.StepRequest, chunks: Sequence[step_pb2.PrefillChunk]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(tokens, context tokens) of the prefill chunks."""
    if len(chunks) > MAX_CHUNKS:
        raise _bad(step, f"{len(chunks)} prefill chunks; allowed: {MAX_CHUNKS}", "prefill_chunks")
    tokens, context = [], []
    for chunk in chunks:
        tokens.append(chunk.num_tokens)
        context.append(chunk.context_tokens)
    return tuple(tokens), tuple(context)


def _read_new_requests(step: step_pb2.StepRequest, new: Sequence[step_pb2.NewRequest]) -> tuple[NewRequest, ...]:
    if len(new) > MAX_NEW_REQUESTS:
        raise _bad(step, f"{len(new)} new requests; allowed: {MAX_NEW_REQUESTS}", "new_requests")
    found = []
    for request in new:
        key = request.request_key
        if not key:
            raise _bad(step, "a new request without a request_key", "new_requests.request_key")
        found.append(
            NewRequest(key, request.prompt_tokens, request.ignore_eos, request.output_tokens_hint, request.length_class)
        )
    return tuple(found)


def _bad(step: step_pb2.StepRequest, what: str, field: str) -> BadStep:
    return BadStep(f"step {step.step_index} cannot be: {what}", field=field)


# Engines


def read_identity(engine: oracle_service_pb2.EngineIdentity) -> EngineIdentity:
    """Who an engine is; InvalidArgument."""
    tenant, experiment = names.parse_experiment(engine.experiment, "engine.experiment")
    labels = dict(engine.labels)
    bindings.check_labels(labels, "engine.labels")
    return EngineIdentity(
        names.experiment_name(tenant, experiment),
        names.check_engine_id(engine.engine_id, "engine.engine_id"),
        labels,
        engine.model,
        engine.tensor_parallel_size,
    )


def read_facts(config: oracle_service_pb2.EngineConfig) -> packs.EngineFacts:
    """The engine's configuration as packs compare it."""
    values = {name: getattr(config, name) for name in _FACTS}
    values["graph_capture_sizes"] = tuple(config.graph_capture_sizes)
    return packs.EngineFacts(**values)


def write_engine(record: EngineRecord, generation: int) -> experiment_pb2.AttachedEngine:
    """One line of ListEngines."""
    counts = record.counts
    return experiment_pb2.AttachedEngine(
        engine_id=record.identity.engine_id,
        incarnation=record.incarnation,
        pack_digest=record.accepted_digest,
        generation=generation,
        model=record.identity.model,
        vllm_version=record.facts.vllm_version,
        labels=record.identity.labels,
        streaming=record.stream is not None,
        steps=counts.steps,
        extrapolated_steps=counts.extrapolated_steps,
        late_answers=counts.late_answers,
        leased_steps=counts.leased_steps,
        reconnects=counts.reconnects,
        degraded=record.degraded,
        lateness_buckets=counts.lateness_buckets,
        lateness_sum_ns=counts.lateness_sum_ns,
    )


def write_differences(differences: Iterable[packs.Difference]) -> list[oracle_service_pb2.ManifestDifference]:
    """Differences between an engine and a manifest."""
    severities = {
        "warn": oracle_service_pb2.ManifestDifference.SEVERITY_WARN,
        "refuse": oracle_service_pb2.ManifestDifference.SEVERITY_REFUSE,
    }
    return [
        oracle_service_pb2.ManifestDifference(
            field=d.field, pack_value=d.pack_value, engine_value=d.engine_value, severity=severities[d.severity]
        )
        for d in differences
    ]


# Experiments


def read_binding(message: experiment_pb2.Binding) -> Binding:
    """A binding as the state keeps it; InvalidArgument."""
    if message.support_policy not in _POLICIES:
        raise InvalidArgument(
            f"support_policy is {message.support_policy}; allowed: SERVE and REFUSE", field="binding.support_policy"
        )
    table = None
    if message.HasField("length_table"):
        classes = tuple(
            LengthClass(c.name, tuple(c.prompt_bin_begin), tuple(c.quantile_tokens), c.quantiles_per_bin)
            for c in message.length_table.classes
        )
        table = LengthTable(classes, message.length_table.provenance)
    return Binding(
        rules=tuple(
            Rule(r.pack_digest, dict(r.labels), r.model, r.tensor_parallel_size, r.fraction, r.fraction_salt)
            for r in message.rules
        ),
        default_pack_digest=message.default_pack_digest,
        seed=message.seed,
        support_policy=_POLICIES[message.support_policy],
        length_table=table,
        draft_acceptance_rate=message.draft_acceptance_rate,
        time_scale=message.time_scale or 1.0,
        overlays=tuple(map(_read_overlay, message.overlays)),
        shadow_pack_digest=message.shadow_pack_digest,
    )


def _read_overlay(overlay: experiment_pb2.Overlay) -> Overlay:
    values = {name: getattr(overlay, name) for name in Overlay.__struct_fields__}
    values["slow_down_factor"] = overlay.slow_down_factor or 1.0
    return Overlay(**(values | {"labels": dict(overlay.labels), "engine_ids": tuple(overlay.engine_ids)}))


def write_binding(binding: Binding) -> experiment_pb2.Binding:
    """The inverse of read_binding."""
    message = experiment_pb2.Binding(
        rules=[
            experiment_pb2.Rule(
                labels=rule.labels,
                model=rule.model,
                tensor_parallel_size=rule.tensor_parallel_size,
                fraction=rule.fraction,
                fraction_salt=rule.fraction_salt,
                pack_digest=rule.pack_digest,
            )
            for rule in binding.rules
        ],
        default_pack_digest=binding.default_pack_digest,
        seed=binding.seed,
        support_policy=(
            experiment_pb2.SUPPORT_POLICY_REFUSE
            if binding.support_policy == bindings.SUPPORT_REFUSE
            else experiment_pb2.SUPPORT_POLICY_SERVE
        ),
        draft_acceptance_rate=binding.draft_acceptance_rate,
        time_scale=binding.time_scale,
        overlays=[experiment_pb2.Overlay(**msgspec.structs.asdict(overlay)) for overlay in binding.overlays],
        shadow_pack_digest=binding.shadow_pack_digest,
    )
    if binding.length_table is not None:
        message.length_table.provenance = binding.length_table.provenance
        for c in binding.length_table.classes:
            message.length_table.classes.add(
                name=c.name,
                prompt_bin_begin=c.prompt_bin_begin,
                quantile_tokens=c.quantile_tokens,
                quantiles_per_bin=c.quantiles_per_bin,
            )
    return message


def write_experiment(live: LiveExperiment, record: GenerationRow, attached: int) -> experiment_pb2.Experiment:
    """An experiment at one of its generations."""
    return experiment_pb2.Experiment(
        name=live.name,
        generation=record.generation,
        binding=write_binding(record.binding),
        create_time=timestamp(live.create_time_ns),
        update_time=timestamp(record.create_time_ns),
        attached_engines=attached,
    )


def write_generation(record: GenerationRow) -> experiment_pb2.GenerationRecord:
    """One line of an experiment's history."""
    return experiment_pb2.GenerationRecord(
        generation=record.generation,
        binding=write_binding(record.binding),
        create_time=timestamp(record.create_time_ns),
        reason=record.reason,
        principal=record.author.principal,
        comment=record.author.comment,
    )


def write_comparison(comparison: Comparison) -> experiment_pb2.GetShadowReportResponse:
    """What a shadow pack showed."""
    return experiment_pb2.GetShadowReportResponse(
        generation=comparison.generation,
        shadow_pack_digest=comparison.shadow_pack_digest,
        regions=_write_regions(comparison.totals()),
        engines=[
            experiment_pb2.ShadowedEngine(
                engine_id=engine_id, pack_digest=engine.pack_digest, regions=_write_regions(engine.regions)
            )
            for engine_id, engine in sorted(comparison.engines.items())
        ],
    )


def _write_regions(regions: Mapping[Region, Differences]) -> list[experiment_pb2.ShadowRegion]:
    written = []
    for (mixed, support, shadow_support), differences in sorted(regions.items()):
        values = msgspec.structs.asdict(differences)
        buckets = values.pop("relative_buckets")
        written.append(
            experiment_pb2.ShadowRegion(
                mixed=mixed,
                support=support,  # type: ignore[arg-type]
                shadow_support=shadow_support,  # type: ignore[arg-type]
                relative_difference_buckets=buckets,
                **values,
            )
        )
    return written


# Packs and tenants


def write_pack(row: PackRow) -> pack_pb2.ProfilePack:
    """A stored pack."""
    return pack_pb2.ProfilePack(
        name=names.pack_name(row.tenant, row.digest),
        digest=row.digest,
        manifest_json=row.manifest.decode(),
        size_bytes=row.size_bytes,
        create_time=timestamp(row.create_time_ns),
    )


def write_tenant(row: TenantRow) -> tenant_pb2.Tenant:
    """A tenant and its limits."""
    return tenant_pb2.Tenant(
        name=names.tenant_name(row.tenant),
        quota=tenant_pb2.TenantQuota(
            **{name: getattr(row, name) for name in _QUOTA}, over_rate=_OVER_RATE[row.over_rate]
        ),
    )


def read_tenant(tenant: str, quota: tenant_pb2.TenantQuota) -> TenantRow:
    """A tenant with this quota; InvalidArgument."""
    limits = {name: getattr(quota, name) for name in _QUOTA}
    for name, value in limits.items():
        if value > _MAX_QUOTA:
            raise InvalidArgument(f"quota.{name} is {value}; allowed: 0 (no limit) to 2^63 - 1", field=f"quota.{name}")
    policies = {number: policy for policy, number in _OVER_RATE.items()}
    over_rate = policies.get(quota.over_rate or tenant_pb2.OVER_RATE_POLICY_MARK)
    if over_rate is None:
        raise InvalidArgument(
            f"quota.over_rate is {quota.over_rate}; allowed: MARK and DETACH", field="quota.over_rate"
        )
    return TenantRow(tenant, **limits, over_rate=over_rate)


def read_scope(scope: int) -> str:
    """A scope as the state keeps it; InvalidArgument."""
    for name, number in _SCOPES.items():
        if number == scope:
            return name
    raise InvalidArgument(f"scope is {scope}; allowed: ENGINE and ADMIN", field="scope")


def write_token(row: TokenRow) -> tenant_pb2.Token:
    """A token without its secret."""
    return tenant_pb2.Token(
        name=names.token_name(row.tenant, row.number),
        scope=_SCOPES[row.scope],
        comment=row.comment,
        create_time=timestamp(row.create_time_ns),
        revoke_time=timestamp(row.revoke_time_ns) if row.revoke_time_ns else None,
    )


def timestamp(time_ns: int) -> Timestamp:
    """Nanoseconds since 1970 as a message."""
    return Timestamp(seconds=time_ns // 1_000_000_000, nanos=time_ns % 1_000_000_000)
