"""The hybrid model: against its naive twin, against its own records, and its laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from builders import HYBRID_TERMS, decode_query, mixed_query, plausible_model
from naive import hybrid_answer
from oracle_server.errors import BadStep, PackInvalid
from oracle_server.sampling.answer import SUPPORT_EXTRAPOLATED
from oracle_server.sampling.draws import draw, engine_key, index_below
from oracle_server.sampling.hybrid import HybridOptions, HybridOracle
from oracle_server.sampling.hybrid_tables import ARRAY_NAMES, Term, build_model, long_form
from oracle_server.sampling.shape import StepQuery

RATIOS = tuple(np.array([0.97, 1.0, 1.003, 1.11, 0.99, 1.05, 1.0], dtype=np.float32).tolist())
OPTIONS: dict[str, Any] = {
    "shrink_distance": 1.5,
    "exact_distance": 0.4,
    "neighbors": 5,
    "max_context_edge": 9000,
    "graph_capture_sizes": (1, 2, 4, 8, 16, 24, 32, 64),
}
KEY = engine_key(42, "engine-0")


def open_hybrid(terms: Any = HYBRID_TERMS, model: Any = None, ratios: Any = RATIOS, **options: Any) -> HybridOracle:
    arrays = build_model(long_form(model or plausible_model()), [Term(*term) for term in terms])
    return HybridOracle({**arrays, "residuals": np.array(ratios, dtype=np.float32)}, HybridOptions(**options))


def decode_shapes(seed: int, count: int) -> list[tuple[int, int, int]]:
    """(requests, context, longest): on the edges of cells, inside, below and far above them."""
    random = np.random.default_rng(seed)
    shapes = []
    for _ in range(count):
        n = int(random.choice([1, 2, 3, 4, 5, 7, 16, 17, 33, 64, 200, 256, 300, 1000]))
        kind = int(random.integers(3))
        if kind == 0:
            longest = int(random.choice([1, 16, 128, 500, 1024, 4096, 9000, 16384])) + int(random.integers(-1, 2))
        else:
            longest = int(2 ** random.uniform(0, 17))
        longest = max(longest, 1)
        low = longest + n - 1
        context = int(random.integers(low, n * longest + 1)) if n * longest > low else n * longest
        shapes.append((n, n * longest if kind == 2 else context, longest))
    return shapes


def mixed_shapes(seed: int, count: int) -> list[StepQuery]:
    random = np.random.default_rng(seed)
    shapes = []
    for _ in range(count):
        chunks = [
            (int(2 ** random.uniform(0, 13)), int(random.choice([0, 5, 700, 20_000])))
            for _ in range(int(random.integers(0, 5)))
        ]
        n = int(random.choice([0, 1, 4, 7, 64, 300]))
        if not chunks and not n:
            n = 1
        longest = int(random.integers(1, 20_000)) if n else 0
        context = int(random.integers(longest, n * longest + 1)) if n else 0
        drafts = int(random.integers(0, 3)) * n
        shapes.append(mixed_query(chunks, n, context, longest, num_decode_tokens=n + drafts))
    return shapes


def assert_equals_naive(oracle: HybridOracle, query: StepQuery, step: int, **options: Any) -> None:
    expected, support, distance, known = hybrid_answer(
        HYBRID_TERMS, plausible_model(), query, KEY, step, ratios=RATIOS, **options
    )
    actual = oracle.answer(query, KEY, step)
    # Both use doubles, in another order: a few parts in 10^13, and rounding is half a nanosecond.
    assert abs(actual.latency_ns - expected) <= 0.5 + 1e-11 * expected, query
    assert (actual.support, actual.knowledge) == (support, known), query
    assert actual.distance == pytest.approx(distance, rel=1e-9, abs=1e-12), query


@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_decode_only_equals_its_naive_twin(options: dict[str, Any]) -> None:
    oracle = open_hybrid(**options)
    for step, (n, context, longest) in enumerate(decode_shapes(1, 3000)):
        assert_equals_naive(oracle, decode_query(n, context, longest), step, **options)


@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_mixed_and_draft_steps_equal_their_naive_twin(options: dict[str, Any]) -> None:
    oracle = open_hybrid(**options)
    for step, query in enumerate(mixed_shapes(2, 2000)):
        assert_equals_naive(oracle, query, step, **options)


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_step_right_after_prefill_takes_as_many_times_as_long_as_the_pack_says(drafts: int) -> None:
    options = {**OPTIONS, "after_prefill_factor": 1.1}
    oracle = open_hybrid(**options)
    for step, (n, context, longest) in enumerate(decode_shapes(8, 500)):
        for previous in (0, 300):
            query = decode_query(n, context, longest, tokens=n * (1 + drafts), previous_prefill_tokens=previous)
            assert_equals_naive(oracle, query, step, **options)
    for step, query in enumerate(mixed_shapes(9, 500)):
        assert_equals_naive(oracle, query._replace(previous_prefill_tokens=300), step, **options)


def test_no_piece_of_a_pack_with_that_factor_is_for_a_step_right_after_prefill() -> None:
    query = decode_query(4, 900, 300, previous_prefill_tokens=300)
    apart, alike = open_hybrid(after_prefill_factor=1.1), open_hybrid()
    for oracle, not_after_prefill in ((apart, True), (alike, False)):
        record = oracle.decode_record(4, 900, 300)
        assert record is not None
        assert record.not_after_prefill is not_after_prefill
    after, other = (apart.answer(each, KEY, 3).latency_ns for each in (query, decode_query(4, 900, 300)))
    assert after == pytest.approx(1.1 * other)
    assert alike.answer(query, KEY, 3).latency_ns == other


@pytest.mark.parametrize("factor", [1.0, 1.7, 0.333])
def test_the_record_evaluated_in_plain_python_gives_the_served_bits(factor: float) -> None:
    oracle = open_hybrid(**OPTIONS)
    for step, (n, context, longest) in enumerate(decode_shapes(3, 20_000)):
        record = oracle.decode_record(n, context, longest, factor)
        assert record is not None
        assert record.covers(n, context, longest)
        # The expression of Lease in step.proto, word for word.
        ratio = oracle.residual_pool[index_below(draw(KEY, step, 1, 0), len(oracle.residual_pool))]
        base = (record.intercept_ns + record.slope_ns_per_context_token * context) + (
            record.slope_ns_per_max_context_token * longest
        )
        answer = oracle.answer(decode_query(n, context, longest), KEY, step, factor)
        assert answer.latency_ns == max(1, math.floor(base * ratio + 0.5))
        assert (answer.support, answer.knowledge) == (record.support, record.knowledge)


def test_every_point_of_a_piece_has_that_very_piece() -> None:
    oracle = open_hybrid(**OPTIONS)
    random = np.random.default_rng(4)
    tried = 0
    for n, context, longest in decode_shapes(5, 4000):
        record = oracle.decode_record(n, context, longest)
        assert record is not None
        for other in (
            record.context_tokens_begin,
            record.context_tokens_end - 1,
            int(random.integers(record.context_tokens_begin, min(record.context_tokens_end, 2**40))),
        ):
            for most in (record.max_context_tokens_begin, record.max_context_tokens_end - 1):
                # A shape no scheduler can have is in no lease either.
                if max(1, -(-other // n)) <= most <= other:
                    assert oracle.decode_record(n, other, most) == record
                    tried += 1
        outside = oracle.decode_record(n, record.context_tokens_end, longest)
        if record.context_tokens_end < 2**53:
            assert outside is not None
            assert outside.context_tokens_begin == record.context_tokens_end
    assert tried > 3000


def test_neighbouring_pieces_meet() -> None:
    """The cost jumps nowhere along context: no step is cheaper than one with a token less by more than its slope."""
    oracle = open_hybrid(ratios=(1.0,))
    for n in (1, 3, 16, 300):
        for edge in (16, 128, 500, 1024, 4096, 16384):
            below, at = (oracle.decode_record(n, n * edge - less, edge) for less in (1, 0))
            assert below is not None
            assert at is not None
            assert below.latency_ns(n * edge, edge, 1.0) == pytest.approx(at.latency_ns(n * edge, edge, 1.0), abs=2)


def test_far_from_measured_mixed_steps_the_answer_is_physics_alone() -> None:
    oracle = open_hybrid(ratios=(1.0,), model={**plausible_model(), "mixed_residual": np.ones(1)})
    answer = oracle.answer(mixed_query([(2_000_000, 0)]), KEY, 0)
    tokens = 2_000_000
    expected = 5e6 + 4e5 + 900 * tokens + 7000 * (tokens - 64) + 33_000 + 450 * (tokens - 16)
    expected += 1.75 * tokens * (tokens + 1) / 2
    assert answer.latency_ns == pytest.approx(expected, rel=1e-6)
    assert answer.support == SUPPORT_EXTRAPOLATED
    assert answer.distance > 3


def test_the_order_of_chunks_changes_no_bit() -> None:
    oracle = open_hybrid()
    chunks = [(17, 4000), (900, 3), (256, 64)]
    answers = {oracle.answer(mixed_query(order, 5, 700), KEY, 9) for order in (chunks, chunks[::-1])}
    assert len(answers) == 1


def test_a_step_without_tokens_is_refused() -> None:
    with pytest.raises(BadStep):
        open_hybrid().answer(StepQuery((), (), 0, 0, 0, 0, 0, 0, 0), KEY, 0)


def test_a_factor_multiplies_mixed_steps_before_the_residual() -> None:
    oracle = open_hybrid(ratios=(1.0,), model={**plausible_model(), "mixed_residual": np.ones(1)})
    query = mixed_query([(100, 7)], 3, 900)
    assert oracle.answer(query, KEY, 1, 2.0).latency_ns == pytest.approx(2 * oracle.answer(query, KEY, 1).latency_ns, 2)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ((("step", 0.0, 1.0), ("gpu_magic", 0.0, 1.0)), "unknown term"),
        ((("step", 0.0, 1.0), ("decode_context_tokens", 5.0, 1.0)), "no kinks"),
        ((("step", 0.0, 1.0), ("step", 0.0, 2.0)), "twice"),
        ((("decode_context_tokens", 0.0, 1.0),), "cost nothing"),
        ((("total_tokens", 8.0, 1.0),), "cost nothing"),
    ],
)
def test_terms_that_cannot_be_are_refused(terms: Any, message: str) -> None:
    with pytest.raises(PackInvalid, match=message):
        open_hybrid(terms=terms)


@pytest.mark.parametrize("name", ARRAY_NAMES)
def test_an_absent_array_is_refused_by_name(name: str) -> None:
    columns = long_form(plausible_model())
    keep = columns["array"] != ARRAY_NAMES.index(name)
    with pytest.raises(PackInvalid, match=f"no array '{name}'"):
        build_model({column: values[keep] for column, values in columns.items()}, [Term(*t) for t in HYBRID_TERMS])
