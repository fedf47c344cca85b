"""The composed model: against its naive twin, against its own records, and its laws."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import decode_query, mixed_query, operator_columns, plausible_operators
from naive import composed_answer
from oracle_server.errors import BadStep
from oracle_server.sampling.composed import ComposedOptions, ComposedOracle
from oracle_server.sampling.draws import draw, engine_key, index_below
from oracle_server.sampling.grids import build_arrays
from oracle_server.sampling.shape import StepQuery

RATIOS = tuple(np.array([0.97, 1.0, 1.003, 1.11, 0.99, 1.05, 1.0], dtype=np.float32).tolist())
OPTIONS: dict[str, Any] = {
    "skew_decode": 0.04,
    "skew_mixed": 0.06,
    "mixed_decode_factor": 2.0,
    "launch_floor_ns": 50_000.0,
    "host_ns_per_step": 1_234.5,
    "host_ns_per_sequence": 46.25,
    "graph_capture_sizes": (1, 2, 4, 8, 16, 24, 32, 64),
}
KNOWLEDGE = {"context_attention": 3, "dense_elementwise": 2}
KEY = engine_key(42, "engine-0")


def open_composed(
    operators: dict[str, dict[tuple[int, ...], float]] | None = None,
    knowledge: dict[str, int] | None = None,
    ratios: tuple[float, ...] = RATIOS,
    **options: Any,
) -> ComposedOracle:
    grids = plausible_operators() if operators is None else operators
    arrays = build_arrays(operator_columns(grids, knowledge), dict(enumerate(grids)))
    return ComposedOracle({**arrays, "residuals": np.array(ratios, dtype=np.float32)}, ComposedOptions(**options))


def decode_shapes(seed: int, count: int) -> list[tuple[int, int, int]]:
    """Decode batches (requests, context, longest): on grid points and their edges, inside, below and far above the
    grids."""
    random = np.random.default_rng(seed)
    shapes = []
    for _ in range(count):
        n = int(random.choice([1, 2, 3, 4, 5, 16, 17, 64, 200, 256, 257, 300, 1000]))
        kind = int(random.integers(4))
        if kind == 0:
            longest = int(random.choice([1, 16, 128, 1024, 4096, 16384])) + int(random.integers(-1, 2))
        elif kind == 1:
            longest = int(random.integers(1, 40_000))
        else:
            longest = int(2 ** random.uniform(0, 17))
        longest = max(longest, 1)
        # Sum of contexts between the smallest possible and all at the longest; often exactly n times a grid point.
        low = longest + n - 1
        context = int(random.integers(low, n * longest + 1)) if n * longest > low else n * longest
        if kind == 3:
            context = n * longest
        shapes.append((n, context, longest))
    return shapes


def mixed_shapes(seed: int, count: int) -> list[StepQuery]:
    random = np.random.default_rng(seed)
    shapes = []
    for _ in range(count):
        chunks = [
            (
                int(random.choice([1, 8, 64, 100, 256, 1000, 1024, 5000, 8192])),
                int(random.choice([0, 5, 16, 700, 1024, 20_000])),
            )
            for _ in range(int(random.integers(0, 4)))
        ]
        n = int(random.choice([0, 1, 4, 7, 64, 300]))
        if not chunks and not n:
            n = 1
        longest = int(random.integers(1, 20_000)) if n else 0
        context = int(random.integers(longest, n * longest + 1)) if n else 0
        drafts = int(random.integers(0, 3)) * n
        shapes.append(mixed_query(chunks, n, context, longest, num_decode_tokens=n + drafts))
    return shapes


def assert_equals_naive(oracle: ComposedOracle, query: StepQuery, step: int, **options: Any) -> None:
    expected, support, distance, known = composed_answer(
        plausible_operators(), query, KEY, step, knowledge=KNOWLEDGE, ratios=RATIOS, **options
    )
    actual = oracle.answer(query, KEY, step)
    # The twin is exact; doubles lose at most a few parts in 10^13 and rounding half a nanosecond.
    assert abs(actual.latency_ns - expected) <= 0.5 + 1e-12 * expected + 1e-6, query
    assert (actual.support, actual.knowledge) == (support, known), query
    assert actual.distance == pytest.approx(distance, rel=1e-12, abs=0.0), query


@pytest.mark.parametrize("options", [{}, OPTIONS, {**OPTIONS, "graph_capture_sizes": (), "skew_decode": 1.0}])
def test_decode_only_equals_its_naive_twin(options: dict[str, Any]) -> None:
    oracle = open_composed(knowledge=KNOWLEDGE, **options)
    for step, (n, context, longest) in enumerate(decode_shapes(1, 1500)):
        assert_equals_naive(oracle, decode_query(n, context, longest), step, **options)


@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_mixed_and_draft_steps_equal_their_naive_twin(options: dict[str, Any]) -> None:
    oracle = open_composed(knowledge=KNOWLEDGE, **options)
    for step, query in enumerate(mixed_shapes(2, 1500)):
        assert_equals_naive(oracle, query, step, **options)


@pytest.mark.parametrize("factor", [1.0, 1.7, 0.333])
def test_the_record_evaluated_in_plain_python_gives_the_served_bits(factor: float) -> None:
    oracle = open_composed(**OPTIONS)
    for step, (n, context, longest) in enumerate(decode_shapes(3, 20_000)):
        record = oracle.decode_record(n, context, longest, factor)
        assert record is not None
        assert record.covers(n, context, longest)
        # The expression of Lease in step.proto, word for word.
        ratio = oracle.residual_pool[index_below(draw(KEY, step, 1, 0), len(oracle.residual_pool))]
        expected = max(
            1,
            math.floor(
                (
                    (record.intercept_ns + record.slope_ns_per_context_token * context)
                    + record.slope_ns_per_max_context_token * longest
                )
                * ratio
                + 0.5
            ),
        )
        answer = oracle.answer(decode_query(n, context, longest), KEY, step, factor)
        assert answer.latency_ns == expected == record.latency_ns(context, longest, ratio)
        assert (answer.support, answer.knowledge) == (record.support, record.knowledge)


def test_every_point_of_a_piece_has_that_very_piece() -> None:
    oracle = open_composed(knowledge=KNOWLEDGE, **OPTIONS)
    random = np.random.default_rng(4)
    for n, context, longest in decode_shapes(5, 4_000):
        record = oracle.decode_record(n, context, longest)
        assert record is not None
        ends = (record.context_tokens_begin, record.context_tokens_end - 1)
        max_ends = (record.max_context_tokens_begin, record.max_context_tokens_end - 1)
        inner = int(random.integers(ends[0], ends[1] + 1))
        max_inner = int(random.integers(max_ends[0], max_ends[1] + 1))
        for other, other_max in itertools.product((*ends, inner), (*max_ends, max_inner)):
            assert oracle.decode_record(n, other, other_max) == record
        # And the neighbors of the interval have another one.
        if ends[0] > 0:
            assert oracle.decode_record(n, ends[0] - 1, longest) != record
        if ends[1] < 2**53 - 1:
            assert oracle.decode_record(n, ends[1] + 1, longest) != record


def test_without_skew_a_piece_holds_for_every_longest_context() -> None:
    record = open_composed().decode_record(4, 4000, 1000)
    assert record is not None
    assert (record.max_context_tokens_begin, record.max_context_tokens_end) == (0, 2**53)
    assert record.slope_ns_per_max_context_token == 0.0


def test_a_step_on_grid_points_alone_is_exact_and_measured() -> None:
    oracle = open_composed(ratios=(1.0,), skew_decode=0.5)
    grids = plausible_operators()
    # T = 64 and S = 64 are grid points of every operator, and so is (n, kv) = (64, 1024).
    answer = oracle.answer(decode_query(64, 64 * 1024, 1024), KEY, 0)
    assert (answer.support, answer.distance, answer.knowledge) == (1, 0.0, 1)
    expected = (
        grids["dense_gemm"][64,]
        + grids["dense_elementwise"][64,]
        + grids["logits"][64,]
        + grids["generation_attention"][64, 1024]
    )
    assert answer.latency_ns == round(expected)
    # One token off in the sum or in the longest context is between measurements.
    assert oracle.answer(decode_query(64, 64 * 1024 + 1, 1025), KEY, 0).support == 2
    assert oracle.answer(decode_query(64, 64 * 1024, 1030), KEY, 0).knowledge == 2


def test_the_weakest_part_decides_support_and_knowledge() -> None:
    oracle = open_composed(knowledge={"logits": 5})
    assert oracle.answer(decode_query(64, 64 * 1024, 1024), KEY, 0)[1:] == (1, 0.0, 5)
    oracle = open_composed(knowledge={"dense_elementwise": 3})
    assert oracle.answer(decode_query(64, 64 * 1000, 1000), KEY, 0).knowledge == 3
    beyond = oracle.answer(decode_query(64, 64 * 32_768, 32_768), KEY, 0)
    assert (beyond.support, beyond.distance, beyond.knowledge) == (3, 1.0, 4)
    # 512 requests: once beyond 256 in logits and attention; 8192 tokens and 16,384 of context are the last grid points.
    assert oracle.answer(decode_query(512, 512 * 1024, 1024), KEY, 0).distance == 1.0


def test_above_a_grid_the_cost_never_falls() -> None:
    grids = plausible_operators()
    grids["dense_gemm"][8192,] = grids["dense_gemm"][4096,] - 1e6
    grids["generation_attention"][256, 16384] = 1.0
    oracle = open_composed(grids, ratios=(1.0,))
    at_end = oracle.answer(mixed_query([(8192, 0)]), KEY, 0).latency_ns
    beyond = oracle.answer(mixed_query([(16_384, 0)]), KEY, 0).latency_ns
    assert beyond > at_end
    last = oracle.answer(decode_query(256, 256 * 16384, 16384), KEY, 0).latency_ns
    assert oracle.answer(decode_query(256, 256 * 20_000, 20_000), KEY, 0).latency_ns == last


def test_below_a_grid_the_first_value_holds() -> None:
    grids = plausible_operators()
    grids["generation_attention"] = {(n, kv): v for (n, kv), v in grids["generation_attention"].items() if kv > 1}
    oracle = open_composed(grids, ratios=(1.0,))
    first = oracle.answer(decode_query(4, 64, 16), KEY, 0)
    below = oracle.answer(decode_query(4, 8, 2), KEY, 0)
    assert (first.support, below.support) == (2, 3)
    assert below.latency_ns == first.latency_ns
    assert below.distance == pytest.approx((16 - 2) / 16)


def test_only_decode_only_steps_are_padded_to_a_graph() -> None:
    plain = open_composed(ratios=(1.0,))
    padded = open_composed(ratios=(1.0,), graph_capture_sizes=(1, 64, 256))
    grids = plausible_operators()
    extra = grids["dense_gemm"][64,] + grids["dense_elementwise"][64,]
    tokens_4 = plain.answer(decode_query(4, 4096), KEY, 0).latency_ns - (
        grids["logits"][4,] + grids["generation_attention"][4, 1024]
    )
    difference = (
        padded.answer(decode_query(4, 4096), KEY, 0).latency_ns - plain.answer(decode_query(4, 4096), KEY, 0).latency_ns
    )
    assert difference == pytest.approx(extra - tokens_4, abs=1.5)
    # Beyond the largest size vLLM runs without a graph, and so does a step with a prefill chunk.
    assert padded.answer(decode_query(300, 300_000), KEY, 0) == plain.answer(decode_query(300, 300_000), KEY, 0)
    mixed = mixed_query([(5, 0)], 2, 200)
    assert padded.answer(mixed, KEY, 0) == plain.answer(mixed, KEY, 0)


def test_a_step_without_tokens_is_refused() -> None:
    with pytest.raises(BadStep, match="without tokens"):
        open_composed().answer(mixed_query([]), KEY, 0)


def test_a_latency_beyond_the_integers_is_refused() -> None:
    with pytest.raises(BadStep, match="2\\^62"):
        open_composed().answer(mixed_query([(2**31, 2**31)]), KEY, 0, factor=1e9)


def test_the_largest_shapes_are_answered() -> None:
    oracle = open_composed(**OPTIONS)
    assert oracle.answer(decode_query(2**31, 2**53 - 1, 2**31), 2**64 - 1, 2**64 - 1).support == 3
    assert oracle.answer(decode_query(1, 2**31, 2**31), 0, 0).latency_ns > 0


chunk_lists = st.lists(st.tuples(st.integers(1, 20_000), st.integers(0, 40_000)), min_size=0, max_size=6)


@st.composite
def queries(draw_from: st.DrawFn) -> StepQuery:
    chunks = draw_from(chunk_lists)
    n = draw_from(st.integers(0 if chunks else 1, 600))
    longest = draw_from(st.integers(1, 50_000)) if n else 0
    context = draw_from(st.integers(longest, n * longest)) if n else 0
    return mixed_query(chunks, n, context, longest)


_LAW_ORACLE: list[ComposedOracle] = []


def law_oracle() -> ComposedOracle:
    if not _LAW_ORACLE:
        _LAW_ORACLE.append(open_composed(knowledge=KNOWLEDGE, **OPTIONS))
    return _LAW_ORACLE[0]


@given(queries(), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_an_answer_is_positive_and_the_same_twice(query: StepQuery, key: int, step: int) -> None:
    first = law_oracle().answer(query, key, step)
    assert first.latency_ns >= 1
    assert first == open_composed(knowledge=KNOWLEDGE, **OPTIONS).answer(query, key, step)
    assert (first.support == 3) == (first.distance > 0.0)
    assert first.knowledge >= (1, 2, 4)[first.support - 1]


@given(queries(), st.randoms(use_true_random=False))
def test_the_order_of_prefill_chunks_does_not_matter(query: StepQuery, random: Any) -> None:
    pairs = list(zip(query.chunk_tokens, query.chunk_context, strict=True))
    random.shuffle(pairs)
    shuffled = query._replace(chunk_tokens=tuple(t for t, _ in pairs), chunk_context=tuple(h for _, h in pairs))
    assert law_oracle().answer(query, KEY, 9) == law_oracle().answer(shuffled, KEY, 9)


@given(st.integers(1, 300), st.sampled_from([1, 16, 128, 1024, 4096, 16384]), st.sampled_from(["context", "longest"]))
def test_the_base_is_continuous_across_the_borders_of_cells(n: int, border: int, which: str) -> None:
    oracle = open_composed(ratios=(1.0,), skew_decode=0.3)
    context, longest = n * border, border
    shapes = (
        [(context - 1, longest), (context, longest), (context + 1, longest)]
        if which == "context"
        else [(context, longest - 1), (context, longest), (context, longest + 1)]
    )
    before, at, after = (oracle.answer(decode_query(n, *shape), KEY, 0).latency_ns for shape in shapes)
    # One token moves a sum of contexts by 1.5 ns and the longest by 1.5 n ns in these grids (times 0.3), rounded.
    step = 1.5 * n + 1
    assert abs(at - before) <= step
    assert abs(after - at) <= step


def test_residuals_are_drawn_evenly() -> None:
    # 8 ratios, 16,000 draws, 2,000 expected each. Chi-square with 7 degrees of freedom: 45 is passed by chance once in
    # ten million seeds; a ratio that is never drawn gives 2,000.
    ratios = tuple(1.0 + i / 8 for i in range(8))
    oracle = open_composed(ratios=ratios)
    base = open_composed(ratios=(1.0,)).answer(decode_query(64, 64_000, 1000), KEY, 0).latency_ns
    counts = np.zeros(8)
    for step in range(16_000):
        ratio = oracle.answer(decode_query(64, 64_000, 1000), KEY, step).latency_ns / base
        counts[round((ratio - 1.0) * 8)] += 1
    assert ((counts - 2_000) ** 2 / 2_000).sum() < 45


def test_threads_get_the_answers_of_one_thread() -> None:
    oracle = open_composed(**OPTIONS)
    queries = mixed_shapes(8, 300) + [decode_query(*shape) for shape in decode_shapes(8, 300)]

    def answers(_: int) -> list[Any]:
        return [oracle.answer(query, KEY, step) for step, query in enumerate(queries)]

    expected = answers(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(answers, range(8)))


def test_a_shape_that_comes_back_gets_its_own_draw() -> None:
    oracle = open_composed()
    query = decode_query(4, 400)
    assert len({oracle.answer(query, KEY, step).latency_ns for step in range(200)}) > 3
    assert oracle.answer(query, KEY, 7) == oracle.answer(query, KEY, 7)
    other = engine_key(42, "engine-1")
    assert [oracle.answer(query, KEY, s) for s in range(50)] != [oracle.answer(query, other, s) for s in range(50)]
