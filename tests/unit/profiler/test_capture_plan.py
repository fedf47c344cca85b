"""Where a capture goes, and when it has been there long enough."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable

import pytest

import captures
from profiler.capture.driver import Coverage
from profiler.capture.plan import EngineLimits, Visit, batch_sizes, cost, standard_error_percent, visits

SMALL = EngineLimits(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=4096, kv_tokens=87_296)
GRAPHS = (1, 2, 4, *range(8, 513, 8))
LARGE = EngineLimits(1024, 8192, 40_960, 400_000, GRAPHS)


# A model shorter than the step's budget, as many are.
SHORT = EngineLimits(256, 8192, 4096, 500_000)


@pytest.mark.parametrize(
    "limits",
    [SMALL, LARGE, SHORT, EngineLimits(1, 16, 128, 256), EngineLimits(3, 64, 256, 400), EngineLimits(64, 64, 40, 4096)],
)
def test_no_visit_asks_for_more_than_the_engine_has(limits: EngineLimits) -> None:
    plan = visits(limits)

    assert plan
    for visit in plan:
        assert visit.requests + visit.chunks <= limits.max_num_seqs
        assert visit.requests * visit.context <= limits.kv_tokens
        assert visit.context <= limits.max_model_len
        # vLLM refuses a prompt that leaves no room for the token it is sent for.
        assert (visit.prompt if visit.chunk else visit.context) < limits.max_model_len
        assert visit.chunk * visit.chunks + visit.requests <= limits.max_num_batched_tokens
        assert visit.requests or visit.chunks


def test_both_kinds_of_step_long_contexts_and_every_power_of_two_are_visited() -> None:
    plan = visits(SMALL)

    assert {visit.requests for visit in plan if not visit.chunk} >= {1, 2, 3, 4, 8, 16, 24, 32, 48, 64}
    assert max(visit.context for visit in plan if visit.requests == 1) == 3686
    assert {visit.chunks for visit in plan if visit.chunk and visit.requests} == {1, 2, 4}
    assert any(visit.chunk + visit.requests == 512 for visit in plan)


def test_chunks_further_on_in_a_prompt_and_beside_longer_contexts_are_visited() -> None:
    further = {(visit.requests, visit.chunk, visit.before) for visit in visits(SMALL) if visit.before}

    assert {(0, 512, 512), (0, 512, 1024), (0, 128, 2048), (4, 508, 508)} <= further
    assert {visit.context for visit in visits(SMALL) if visit.chunk and visit.requests} == {128, 1024}
    assert not any(visit.before for visit in visits(SHORT)), "no prompt is longer than a step"


def test_a_chunk_counts_where_its_prompt_and_what_decodes_beside_it_are_as_long() -> None:
    made = next(step for step in captures.steps(40) if step.chunk_tokens)._replace(
        chunk_tokens=(508,), chunk_context=(508,), num_decode_requests=4, decode_context_tokens=4 * 130
    )

    assert Visit(4, 128, 508, 1, before=508).holds(made)
    assert Visit(4, 128, 508, 1, before=600).holds(made)
    assert not Visit(4, 128, 508, 1).holds(made)
    assert not Visit(4, 128, 508, 1, before=1016).holds(made)
    assert not Visit(4, 1024, 508, 1, before=508).holds(made)
    assert not Visit(0, 0, 508, 1, before=508).holds(made)


def test_both_sides_of_graph_sizes_are_visited() -> None:
    sizes = {size for size, _ in batch_sizes(LARGE)}

    assert {512, 504, 505} <= sizes
    assert len(sizes) < 64


def test_the_coarse_grid_comes_first_and_holds_both_kinds() -> None:
    levels = [visit.level for visit in visits(LARGE)]
    first = [visit for visit in visits(LARGE) if visit.level == 0]

    assert levels == sorted(levels)
    assert {bool(visit.chunk) for visit in first[:4]} == {True, False}
    assert cost(first[0]) < cost(first[-1])


DECODE = Visit(4, 128)


def measured(visit: Visit, latencies: Iterable[float]) -> Coverage:
    """So many milliseconds in each of the region's steps."""
    coverage = Coverage([visit])
    coverage.latencies[visit] += latencies
    return coverage


def test_a_region_is_tight_when_its_mean_is_known_and_not_before() -> None:
    source = random.Random(1)
    noisy = [source.gauss(10.0, 1.0) for _ in range(400)]

    assert standard_error_percent(noisy) == pytest.approx(0.5, rel=0.2)
    assert measured(DECODE, noisy).is_tight(DECODE, 1.0)
    assert not measured(DECODE, noisy[:20]).is_tight(DECODE, 1.0)
    assert not measured(DECODE, [10.0] * 7).is_tight(DECODE, 1.0)
    assert math.isinf(standard_error_percent([10.0]))


def test_one_stall_does_not_keep_a_region_open() -> None:
    assert measured(DECODE, [10.0, 10.1] * 10 + [4000.0]).is_tight(DECODE, 1.0)


@pytest.mark.parametrize("visit", [Visit(0, 0, 256, 1), Visit(4, 128, 64, 2), Visit(4, 128, 100, 1, before=508)])
def test_prompts_of_a_region_have_many_lengths_and_its_steps_all_count(visit: Visit) -> None:
    made = next(step for step in captures.steps(40) if step.chunk_tokens)
    lengths = list(itertools.islice(visit.prompts(512), 8))

    assert lengths[0] == visit.prompt == max(lengths)
    assert len(set(lengths)) > 4
    for length in lengths:
        chunk = length - visit.before
        step = made._replace(
            chunk_tokens=(chunk,) * visit.chunks,
            chunk_context=(visit.before,) * visit.chunks,
            num_decode_requests=visit.requests,
            decode_context_tokens=visit.requests * visit.context,
        )
        assert visit.holds(step), length


def test_a_chunk_that_fills_a_step_is_as_long_every_time() -> None:
    assert set(itertools.islice(Visit(4, 128, 508, 1).prompts(512), 8)) == {508}
    assert set(itertools.islice(Visit(4, 128, 254, 2).prompts(512), 8)) == {254}
    assert set(itertools.islice(Visit(0, 0, 256, 2, before=512).prompts(512), 8)) == {768}


@pytest.mark.parametrize("power", [0, 1])
def test_a_region_of_many_lengths_is_tight_whether_latency_grows_with_them_or_not(power: int) -> None:
    made = next(step for step in captures.steps(40) if step.chunk_tokens)
    made = made._replace(num_decode_requests=0, num_decode_tokens=0, decode_context_tokens=0)
    visit = Visit(0, 0, 256, 1)
    steps = []
    for number, length in enumerate(itertools.islice(visit.prompts(512), 16)):
        latency_ns = round(1e7 * (length / 256) ** power * (1 + 0.01 * (-1) ** number))
        end_ns = made.device_start_ns + latency_ns
        steps.append(made._replace(chunk_tokens=(length,), chunk_context=(0,), device_end_ns=end_ns))
    coverage = Coverage([visit])
    coverage.take(steps)

    assert len(coverage.latencies[visit]) == 16
    alike = [1 + 0.01 * (-1) ** number for number in range(16)]
    assert coverage.error_percent(visit) == pytest.approx(standard_error_percent(alike), rel=1e-3)
    assert standard_error_percent(alike) < 1.0


def test_a_step_counts_for_the_region_it_lies_in() -> None:
    decode = next(step for step in captures.steps(40) if not step.chunk_tokens)
    each = decode.decode_context_tokens // decode.num_decode_requests
    requests = decode.num_decode_requests

    assert Visit(requests, each).holds(decode)
    assert Visit(requests, round(each * 1.4)).holds(decode)
    assert not Visit(requests, 2 * each).holds(decode)
    assert not Visit(requests + 1, each).holds(decode)
    assert not Visit(requests, each, chunk=16, chunks=1).holds(decode)


def test_steps_count_for_their_region_and_those_of_a_warm_up_do_not() -> None:
    made = captures.steps(60)
    plan = [Visit(step.num_decode_requests, step.max_decode_context_tokens) for step in made if not step.chunk_tokens]
    coverage = Coverage(sorted(set(plan)))
    coverage.take([step._replace(warm_up=True) for step in made[:10]])
    coverage.take(made[10:])
    counted = sum(len(latencies) for latencies in coverage.latencies.values())

    assert counted == sum(not step.chunk_tokens for step in made[10:])
    assert coverage.decode_steps + coverage.mixed_steps == 50
    assert not coverage.makes_a_pack(), "12 steps with chunks are too few for a fit"
    assert coverage.prefill_tokens == sum(sum(step.chunk_tokens) for step in made[10:])
