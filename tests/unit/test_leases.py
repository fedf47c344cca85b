"""The law of leases: what a shim makes of one is, bit for bit, what the server would have sent."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from builders import build_composed_pack, build_hybrid_pack, build_sampled_pack, decode_query, sample_columns
from oracle_server import pack as packs
from oracle_server.rpc import wire
from oracle_server.rpc.leases import Leases
from oracle_server.sampling import draws
from oracle_server.sampling.shape import StepQuery
from oracle_server.state.binding import Binding, Overlay
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.snapshot import EnginePlan, LoadedPack, Snapshot
from step_oracle.v1 import step_pb2 as pb
from vllm_shim.draws import StepDraws
from vllm_shim.lease import HeldLease, LeasedReply, LeaseTable

EXPERIMENT = "tenants/default/experiments/e"
ENGINE = EngineIdentity(EXPERIMENT, "server-1/dp0", {"rack": "7"}, "m", 1)
KEY = 2**64 - 77
RATIOS = [0.9 + 0.001 * i for i in range(256)]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedPack]:
    folder = tmp_path_factory.mktemp("packs")
    skewed = {"skew_decode": 0.07, "host_ns_per_step": 9e4, "graph_capture_sizes": (1, 2, 4, 8, 16, 32, 64)}
    build_composed_pack(
        folder / "composed", ratios=RATIOS, composed=skewed, prep_ns=31_000, copy_ns=17_001, host=(70_001, 333)
    )
    build_composed_pack(folder / "plain", ratios=[0.93, 1.0, 1.11])
    build_hybrid_pack(folder / "hybrid", ratios=RATIOS)
    build_hybrid_pack(folder / "hybrid_after_prefill", ratios=RATIOS, hybrid={"after_prefill_factor": 1.1})
    build_sampled_pack(folder / "cells", samples=cells(), copy_ns=900_001)
    build_sampled_pack(folder / "transition", samples=cells(), transition=True, prep_ns=31_000)
    levels = {"neighbors": "hierarchical", "context_bucket_width": 2048, "min_samples": 4}
    build_sampled_pack(folder / "levels", samples=cells(2048), sampled=levels, transition=True)
    loaded = {}
    for path in sorted(folder.iterdir()):
        packs.compile_pack(path, folder / f"compiled-{path.name}")
        compiled = packs.load_compiled(folder / f"compiled-{path.name}")
        loaded[path.name] = LoadedPack(path.name, compiled.manifest, packs.open_oracle(compiled))
    return loaded


def cells(context_width: int = 0) -> dict[str, Any]:
    """Decode cells of 1 to 70 requests, but none of 5, 10 and so on; 3 requests are measured 300 times. Nanoseconds
    that no float32 holds. With a width the cells have a context, and at every third one too few samples."""
    draw = random.Random(8)
    rows: list[tuple[int, ...]] = [(1, 512, 1, 40_000_000, 0, 0)]
    for n in (n for n in range(1, 71) if n % 5):
        rows.append((0, n, n, 90_000_001, 512, 0))
        for bucket in range(n * 8_192 // context_width if context_width else 1):
            count = 300 if n == 3 else 2 if context_width and bucket % 3 == 2 else draw.randrange(4, 12)
            context = bucket * context_width
            rows += [(0, n, n, draw.randrange(17_000_000, 80_000_000), 0, context) for _ in range(count)]
    return sample_columns(rows)


def plan_of(pack: LoadedPack, generation: int = 1, **binding: Any) -> EnginePlan:
    bound = Binding(rules=(), default_pack_digest=pack.digest, **{"seed": 2**64 - 5, **binding})
    return Snapshot(EXPERIMENT, generation, bound, {pack.digest: pack}).plan(ENGINE)


def served(plan: EnginePlan, step_index: int, query: StepQuery) -> pb.StepReply:
    reply = pb.StepReply()
    wire.write_reply(reply, step_index, plan.generation, plan.answer(step_index, query, (), ()))
    return reply


def granted(plan: EnginePlan, query: StepQuery, leases: Leases | None = None) -> pb.Lease | None:
    reply = pb.StepReply()
    (leases or Leases()).grant(reply, plan, query)
    # As it comes off the wire.
    return pb.StepReply.FromString(reply.SerializeToString()).lease if reply.HasField("lease") else None


@dataclass
class Engine:
    """What a scheduler makes of a batch: it decodes, requests come and go, one is preempted and comes back longer."""

    draw: random.Random
    contexts: list[int] = field(default_factory=lambda: [100])
    step_index: int = -1

    def steps(self, count: int) -> Iterator[tuple[int, StepQuery]]:
        """(Step index, decode-only step)."""
        for _ in range(count):
            draw = self.draw.random()
            self.step_index += 1
            arrives = draw < 0.006 and len(self.contexts) < 70
            if arrives:
                # A prefill and a decode-only step behind it; now and then a long prompt, beyond what packs measured.
                prompts = (1, 16, 40, 700, 1024, 5_000)
                self.contexts.append(self.draw.choice(prompts) if draw > 0.0001 else 90_000)
                self.step_index += 1
            elif draw < 0.013 and len(self.contexts) > 1:
                longest = self.contexts.index(max(self.contexts))
                self.contexts.pop(longest if draw < 0.01 else self.draw.randrange(len(self.contexts)))
            elif draw < 0.014:
                self.step_index += self.draw.choice((1, 3, 1 << 40)) if self.step_index < 1 << 60 else 1
            self.contexts = [context + 1 for context in self.contexts]
            total, longest = sum(self.contexts), max(self.contexts)
            previous = 512 if arrives else 0
            yield self.step_index, decode_query(len(self.contexts), total, longest, previous_prefill_tokens=previous)


def compare(plans: list[EnginePlan], seed: int, count: int) -> tuple[int, int]:
    """(Steps answered from leases, asked for) of one engine that is swapped from plan to plan and now and then
    reconnects; every leased answer is compared with what the server of the moment says."""
    draw = random.Random(seed)
    plan, table, leases = plans[0], LeaseTable(), Leases()
    leased = asked = 0
    for step_index, query in Engine(draw).steps(count):
        event = draw.random()
        if event < 0.0005:
            plan = plans[(plans.index(plan) + 1) % len(plans)]
            table.clear()
        elif event < 0.001:
            table.clear()
            leases = Leases()
        where = query.num_decode_requests, query.decode_context_tokens, query.max_decode_context_tokens
        lease = table.find(*where, query.previous_prefill_tokens)
        if lease is not None:
            leased += 1
            assert lease.generation == plan.generation
            answer = LeasedReply(lease, step_index, *where[1:]).message()
            assert answer == served(plan, step_index, query), (step_index, query)
            continue
        asked += 1
        new = granted(plan, query, leases)
        if new is not None:
            table.take(new)
            assert table.find(*where, 0) is not None
    return leased, asked


SLOW = (Overlay(1.37, {"rack": "7"}, 0.0, ""),)


def plans_of(oracles: dict[str, LoadedPack]) -> list[EnginePlan]:
    """Models, seeds and factors, one generation each."""
    composed, plain, hybrid, after_prefill = (
        oracles[name] for name in ("composed", "plain", "hybrid", "hybrid_after_prefill")
    )
    return [
        plan_of(composed, 1),
        plan_of(hybrid, 2, seed=3),
        plan_of(composed, 3, time_scale=0.25, overlays=SLOW),
        plan_of(plain, 4, time_scale=1 / 3),
        plan_of(after_prefill, 5, overlays=SLOW),
    ]


def sampled_plans_of(oracles: dict[str, LoadedPack]) -> list[EnginePlan]:
    """The same of sampled packs, among them one of another model."""
    return [
        plan_of(oracles["cells"], 1),
        plan_of(oracles["transition"], 2, time_scale=1 / 3),
        plan_of(oracles["levels"], 3, seed=3, overlays=SLOW),
        plan_of(oracles["composed"], 4),
        plan_of(oracles["transition"], 5),
        plan_of(oracles["levels"], 6),
        plan_of(oracles["cells"], 7, time_scale=0.25, overlays=SLOW),
    ]


def test_leased_and_served_answers_are_the_same_bits(oracles: dict[str, LoadedPack]) -> None:
    leased, asked = compare(plans_of(oracles), 1, 30_000)
    assert leased > 10 * asked > 0


@pytest.mark.parametrize("number", range(7))
def test_leased_and_served_answers_of_sampled_packs_are_the_same_bits(
    number: int, oracles: dict[str, LoadedPack]
) -> None:
    plans = sampled_plans_of(oracles)
    leased, asked = compare(plans[number:] + plans[:number], number, 8_000)
    assert leased > asked > 0


@pytest.mark.slow
def test_leased_and_served_answers_are_the_same_bits_over_a_million_steps(oracles: dict[str, LoadedPack]) -> None:
    plans = plans_of(oracles) + sampled_plans_of(oracles)
    plans = [plans[generation * 5 % 12] for generation in range(12)]
    results = [compare(plans[seed % 12 :] + plans[: seed % 12], seed, 130_000) for seed in range(12)]
    leased, asked = (sum(column) for column in zip(*results, strict=True))
    print(f"{leased} leased answers equal to the served ones, {asked} steps asked for")
    assert leased >= 1_000_000


def test_a_lease_holds_at_every_edge_of_its_piece_and_not_beyond(oracles: dict[str, LoadedPack]) -> None:
    plan = plan_of(oracles["composed"])
    lease = granted(plan, decode_query(4, 4 * 500, 700))
    assert lease is not None
    table = LeaseTable()
    table.take(lease)
    first, last = lease.context_tokens_begin, lease.context_tokens_end - 1
    low, high = lease.max_context_tokens_begin, lease.max_context_tokens_end - 1
    for context, longest in ((first, low), (first, high), (last, low), (last, high)):
        assert table.find(4, context, longest, 0) is not None
    # The edges four requests can reach: the longest has a quarter of their tokens at least, and leaves three.
    most = min(last, 4 * high)
    reachable = [
        (context, longest)
        for context in (first, most)
        for longest in (low, -(-context // 4), context - 3, high)
        if low <= longest <= high and longest + 3 <= context <= 4 * longest
    ]
    assert {context for context, _ in reachable} == {first, most}
    assert {low, high} <= {longest for _, longest in reachable}
    for context, longest in reachable:
        held: Any = table.find(4, context, longest, 0)
        assert LeasedReply(held, 9, context, longest).message() == served(plan, 9, decode_query(4, context, longest))
    for context, longest in ((first - 1, low), (last + 1, low), (first, low - 1), (first, high + 1)):
        assert table.find(4, context, longest, 0) is None
    assert table.find(5, first, low, 0) is None


def test_a_piece_whose_points_differ_in_distance_is_not_leased(oracles: dict[str, LoadedPack]) -> None:
    plan = plan_of(oracles["composed"])
    beyond = decode_query(2, 2 * 20_000, 20_000)
    distances = {
        served(plan, 0, beyond).support_distance,
        served(plan, 0, decode_query(2, 50_000, 25_000)).support_distance,
    }
    assert len(distances) == 2
    assert granted(plan, beyond) is None
    # Beyond the number of requests that were measured, all points of a piece are equally far out.
    many = granted(plan, decode_query(400, 400 * 500, 700))
    assert many is not None
    assert many.support == pb.SUPPORT_EXTRAPOLATED
    assert many.support_distance > 0


def test_what_would_be_refused_is_not_leased(oracles: dict[str, LoadedPack]) -> None:
    outside, inside = decode_query(400, 400 * 500, 700), decode_query(4, 4 * 500, 700)
    assert granted(plan_of(oracles["composed"]), outside) is not None
    refusing = plan_of(oracles["composed"], support_policy="refuse")
    assert granted(refusing, outside) is None
    assert granted(refusing, inside) is not None


@pytest.mark.parametrize("factors", [{}, {"time_scale": 1 / 3, "overlays": SLOW}])
def test_every_exact_cell_of_a_sampled_pack_is_leased_and_nothing_else(
    factors: dict[str, Any], oracles: dict[str, LoadedPack]
) -> None:
    for name in ("cells", "transition", "levels"):
        plan = plan_of(oracles[name], **factors)
        leased = 0
        for requests in range(1, 75):
            for context in range(requests * 100, requests * 9_000, requests * 700):
                query = decode_query(requests, context)
                reply, lease = served(plan, 7, query), granted(plan, query)
                is_exact = reply.support == pb.SUPPORT_EXACT and requests != 3
                assert (lease is not None) is is_exact, (name, query)
                if lease is not None:
                    leased += 1
                    assert (
                        LeasedReply(HeldLease(lease, (), StepDraws(lease.draw_key, 1)), 7, context, requests).message()
                        == reply
                    )
        assert leased > 100


def test_a_cell_holds_the_context_of_its_bucket_and_no_more(oracles: dict[str, LoadedPack]) -> None:
    lease = granted(plan_of(oracles["levels"]), decode_query(2, 3_000))
    assert lease is not None
    assert (lease.context_tokens_begin, lease.context_tokens_end) == (2048, 4096)
    assert (lease.max_context_tokens_begin, lease.max_context_tokens_end) == (0, 1 << 53)
    table = LeaseTable()
    table.take(lease)
    found = [table.find(2, context, 1_000, 0) is not None for context in (2047, 2048, 4095, 4096)]
    assert found == [False, True, True, False]
    assert table.find(1, 3_000, 3_000, 0) is None
    # Without the axis, one cell holds every context.
    whole = granted(plan_of(oracles["cells"]), decode_query(2, 3_000))
    assert whole is not None
    assert (whole.context_tokens_begin, whole.context_tokens_end) == (0, 1 << 53)


def test_a_hybrid_pack_that_tells_steps_after_prefill_apart_leases_none_of_them(oracles: dict[str, LoadedPack]) -> None:
    plan = plan_of(oracles["hybrid_after_prefill"])
    body, tail = decode_query(4, 3_000), decode_query(4, 3_000, previous_prefill_tokens=512)

    assert granted(plan, tail) is None
    lease = granted(plan, body)
    assert lease is not None
    assert lease.not_after_prefill
    assert served(plan, 0, tail).latency_ns[0] == pytest.approx(1.1 * served(plan, 0, body).latency_ns[0])


def test_the_step_after_a_prefill_brings_no_cell_of_a_pack_with_a_transition_term(
    oracles: dict[str, LoadedPack],
) -> None:
    body, tail = decode_query(2, 3_000), decode_query(2, 3_000, previous_prefill_tokens=512)
    plan = plan_of(oracles["transition"])
    assert granted(plan, tail) is None
    lease = granted(plan, body)
    assert lease is not None
    assert lease.not_after_prefill
    assert 90_000_001 not in lease.latency_pool_ns
    assert served(plan, 0, tail).latency_ns[0] == 90_000_001
    plain = granted(plan_of(oracles["cells"]), tail)
    assert plain is not None
    assert not plain.not_after_prefill
    assert 90_000_001 in plain.latency_pool_ns


def test_a_cell_that_leaves_the_range_of_the_wire_is_not_leased(oracles: dict[str, LoadedPack]) -> None:
    assert granted(plan_of(oracles["cells"], time_scale=1e6, overlays=SLOW), decode_query(2, 3_000)) is not None
    beyond = plan_of(oracles["cells"], time_scale=1e6, overlays=(Overlay(1e6, {}, 0.0, ""),))
    assert granted(beyond, decode_query(2, 3_000)) is None


def test_a_pool_travels_once_per_generation_of_a_stream(oracles: dict[str, LoadedPack]) -> None:
    leases, first, second = Leases(), plan_of(oracles["composed"]), plan_of(oracles["composed"], 2)
    sizes = []
    for plan in (first, second):
        for requests in (3, 5):
            lease = granted(plan, decode_query(requests, requests * 500, 700), leases)
            assert lease is not None
            sizes.append(len(lease.residual_pool))
    assert sizes == [256, 0, 256, 0]


def test_a_lease_without_a_known_pool_is_left_out() -> None:
    table = LeaseTable()
    table.take(pb.Lease(num_decode_requests=1, context_tokens_end=9, max_context_tokens_end=9, pool_id=3))
    assert table.find(1, 5, 5, 0) is None


def test_a_lease_with_latencies_answers_one_of_them() -> None:
    pool = [17_000_001, (1 << 63) - 1, 3]
    table = LeaseTable()
    end: dict[str, Any] = {"context_tokens_end": 9, "max_context_tokens_end": 9}
    # The other pool of the stream has no say.
    table.take(pb.Lease(num_decode_requests=2, residual_pool=[1.0], intercept_ns=5, **end))
    table.take(pb.Lease(num_decode_requests=1, latency_pool_ns=pool, draw_key=KEY, **end))
    lease = table.find(1, 5, 5, 0)
    for step_index in range(300):
        expected = pool[draws.index_below(draws.draw(KEY, step_index, 1, 0), 3)]
        assert LeasedReply(lease, step_index, 5, 5).message().latency_ns == [expected]


def test_a_lease_of_a_pack_with_a_transition_term_is_not_for_the_step_after_a_prefill() -> None:
    table = LeaseTable()
    whole: dict[str, Any] = {
        "num_decode_requests": 1,
        "context_tokens_end": 9,
        "max_context_tokens_end": 9,
        "residual_pool": [1.0],
    }
    table.take(pb.Lease(**whole, not_after_prefill=True))
    assert table.find(1, 5, 5, 16) is None
    assert table.find(1, 5, 5, 0) is not None


def test_a_table_keeps_a_bounded_number_of_leases() -> None:
    table = LeaseTable()
    for requests in range(10_000):
        whole: dict[str, Any] = {"context_tokens_end": 9, "max_context_tokens_end": 9}
        table.take(pb.Lease(num_decode_requests=requests, residual_pool=[1.0] if not requests else [], **whole))
    assert table._size <= 4096
    assert table.find(9_999, 5, 5, 0) is not None
