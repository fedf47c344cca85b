"""Ranked neighbours (nearest, hierarchical): against their naive twin, the statistics of their draws, their laws."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import decode_query, mixed_query, plausible_samples, sample_columns
from naive import ranked_answer
from oracle_server.errors import PackInvalid
from oracle_server.sampling.buckets import build_index
from oracle_server.sampling.draws import engine_key
from oracle_server.sampling.sampled import SampledOptions, SampledOracle
from oracle_server.sampling.shape import StepQuery

KEY = engine_key(42, "engine-0")
UNKNOWN = -1


def open_ranked(samples: Any, *, table_rule: str = "prefill_tokens", **options: Any) -> SampledOracle:
    chosen = SampledOptions(**options, prefill_by_new_requests=table_rule == "new_requests")
    arrays = build_index(
        samples,
        tokens_width=chosen.tokens_bucket_width,
        concurrency_width=chosen.concurrency_bucket_width,
        transition=chosen.transition,
        neighbors=chosen.neighbors,
        context_width=chosen.context_bucket_width,
        min_samples=chosen.min_samples,
    )
    return SampledOracle(arrays, chosen)


def samples_with_context(seed: int = 1) -> dict[str, NDArray[Any]]:
    samples = plausible_samples(seed)
    random = np.random.default_rng(seed)
    context = random.integers(0, 30, samples["table"].size) * 100 * samples["concurrency"]
    return {**samples, "context_tokens": context.astype(np.int64)}


def random_queries(seed: int, count: int) -> list[StepQuery]:
    random = np.random.default_rng(seed)
    queries = []
    for _ in range(count):
        requests = int(random.integers(1, 80))
        if random.random() < 0.5:
            context = requests * int(random.integers(1, 4000))
            query = decode_query(requests, context, previous_prefill_tokens=int(random.integers(2)))
        else:
            chunk = int(random.integers(1, 6000)), int(random.integers(0, 3000))
            query = mixed_query([chunk], requests - 1, 100 * (requests - 1))
            query = query._replace(num_new_requests=int(random.integers(2)))
        queries.append(query)
    return queries


@pytest.mark.parametrize(
    "options",
    [
        {"neighbors": "nearest"},
        {"neighbors": "nearest", "concurrency_bucket_width": 5, "table_rule": "new_requests"},
        {"neighbors": "hierarchical"},
        {"neighbors": "hierarchical", "context_bucket_width": 512},
        {"neighbors": "hierarchical", "context_bucket_width": 1, "transition": True, "min_samples": 3},
        {"neighbors": "hierarchical", "context_bucket_width": 4096, "tokens_bucket_width": 16, "min_samples": 200},
    ],
)
def test_the_kernel_equals_its_naive_twin(options: dict[str, Any]) -> None:
    samples = samples_with_context()
    oracle = open_ranked(samples, **options)
    for step, query in enumerate(random_queries(3, 300)):
        answer = oracle.answer(query, KEY, step)
        expected = ranked_answer(samples, query, KEY, step, **options)
        assert (answer.latency_ns, answer.support, answer.distance) == expected


Row = tuple[int, int, int, int, int, int]


@given(
    st.lists(
        st.tuples(
            st.just(1), st.integers(1, 60), st.integers(1, 12), st.integers(1, 10**9), st.just(0), st.integers(0, 999)
        ),
        min_size=1,
        max_size=40,
    ),
    st.tuples(st.integers(1, 80), st.integers(1, 20), st.integers(0, 1200)),
    st.integers(1, 20),
    st.sampled_from(["nearest", "hierarchical"]),
    st.integers(0, 2**64 - 1),
)
def test_any_table_answers_as_its_naive_twin(
    rows: list[Row], point: tuple[int, int, int], min_samples: int, neighbors: str, key: int
) -> None:
    samples = sample_columns([*rows, (0, 1, 1, 1, 0, 0)])
    tokens, concurrency, context = point
    query = mixed_query([(tokens, context)])._replace(concurrency=concurrency)
    options: dict[str, Any] = {"neighbors": neighbors, "min_samples": min_samples}
    if neighbors == "hierarchical":
        options["context_bucket_width"] = 50
    answer = open_ranked(samples, **options).answer(query, key, 3)
    assert (answer.latency_ns, answer.support, answer.distance) == ranked_answer(samples, query, key, 3, **options)
    assert answer.latency_ns in {row[3] for row in rows}


def test_context_never_outvotes_tokens_or_concurrency() -> None:
    # The bucket with the right tokens has the wrong concurrency and context; one with the right context is far.
    samples = sample_columns(
        [(1, 100, 4, 7, 0, 90_000), (1, 101, 1, 8, 0, 0), (1, 100, 9, 9, 0, 0), (0, 1, 1, 5, 0, 0)]
    )
    oracle = open_ranked(samples, neighbors="hierarchical", min_samples=1, context_bucket_width=1)
    query = mixed_query([(97, 0)], 3, 3, 1)
    assert {oracle.answer(query, KEY, step).latency_ns for step in range(100)} == {7}


def test_the_mean_of_draws_between_two_levels_is_their_interpolation() -> None:
    # Between (10, 100 ns) and (20, 200 ns) at 13 the mean is 130 ns. A draw has standard deviation sqrt(0.3 * 0.7) *
    # 100 = 45.8 ns, the mean of 40,000 of them 0.23 ns. Five of these: a false alarm in one of 1.7 million seeds; the
    # Shepard weights of joint neighbours (49 : 9) give 115.5 ns.
    samples = sample_columns([(0, 10, 10, 100), (0, 20, 20, 200), (1, 9, 1, 9)])
    oracle = open_ranked(samples, neighbors="hierarchical", min_samples=1)
    query = decode_query(13, 1300)._replace(concurrency=10)
    # At 20 tokens only concurrency 20 is known: the second axis takes what there is.
    answers = [oracle.answer(query, KEY, step) for step in range(40_000)]
    assert abs(sum(answer.latency_ns for answer in answers) / 40_000 - 130) < 5 * 0.23


def test_axes_and_samples_are_drawn_independently() -> None:
    # Two levels of tokens, of concurrency and of context, queried in the middle of each, with two samples: 16 outcomes
    # of 1,000 expected in 16,000 draws. Chi-square with 15 degrees of freedom: 63 is passed by chance once in thirteen
    # million seeds; two axes that share a draw leave half of the outcomes empty (16,000).
    corners = [(t, c, k, s) for t in (100, 200) for c in (10, 20) for k in (1000, 2000) for s in (0, 1)]
    rows = [(1, t, c, t * 10_000 + c * 100 + k // 100 + s, 0, k) for t, c, k, s in corners]
    oracle = open_ranked(
        sample_columns([*rows, (0, 1, 1, 5, 0, 0)]), neighbors="hierarchical", min_samples=2, context_bucket_width=1
    )
    query = mixed_query([(150, 1500)])._replace(concurrency=15)
    counts = Counter(oracle.answer(query, KEY, step).latency_ns for step in range(16_000))
    assert sum((counts[row[3]] - 1000) ** 2 / 1000 for row in rows) < 63


def test_thin_neighbors_are_pooled_and_full_ones_kept_apart() -> None:
    thin = [(0, tokens, 7, tokens, 0, 0) for tokens in (40, 41, 42)]
    full = [(0, 43, 7, 430 + i, 0, 0) for i in range(3)]
    oracle = open_ranked(sample_columns([*thin, *full, (1, 9, 1, 9)]), neighbors="hierarchical", min_samples=3)
    pooled = oracle.answer(decode_query(41, 41)._replace(concurrency=7), KEY, 0)
    drawn = {oracle.answer(decode_query(41, 41)._replace(concurrency=7), KEY, step).latency_ns for step in range(100)}
    assert drawn == {40, 41, 42}
    assert (pooled.support, pooled.distance) == (2, 0.0), "a pool is no measurement of one of its buckets"
    alone = oracle.answer(decode_query(43, 43)._replace(concurrency=7), KEY, 0)
    assert (alone.support, alone.knowledge, alone.distance) == (1, 1, 0.0)


def test_buckets_far_apart_are_not_pooled_however_thin() -> None:
    oracle = open_ranked(
        sample_columns([(0, 40, 7, 1), (0, 51, 7, 2), (1, 9, 1, 9)]), neighbors="hierarchical", min_samples=100
    )
    for tokens, latency in ((40, 1), (51, 2)):
        query = decode_query(tokens, tokens)._replace(concurrency=7)
        assert {oracle.answer(query, KEY, step).latency_ns for step in range(50)} == {latency}


@pytest.mark.parametrize(
    ("tokens", "concurrency", "context"), [(9, 4, 100), (21, 4, 100), (10, 3, 100), (10, 4, 99), (10, 4, 201)]
)
def test_outside_of_what_was_measured_there_is_extrapolated(tokens: int, concurrency: int, context: int) -> None:
    # (10, 4) is known from context 100 to 200; that (20, 8) reaches to 300 makes none of these less extrapolated.
    samples = sample_columns([(0, 10, 4, 5, 0, 100), (0, 10, 4, 5, 0, 200), (0, 20, 8, 6, 0, 300), (1, 9, 1, 9, 0, 0)])
    oracle = open_ranked(samples, neighbors="hierarchical", min_samples=1, context_bucket_width=1)
    answer = oracle.answer(decode_query(tokens, context)._replace(concurrency=concurrency), KEY, 0)
    assert (answer.support, answer.knowledge) == (3, 4)
    assert answer.distance > 0
    inside = oracle.answer(decode_query(10, 150)._replace(concurrency=4), KEY, 0)
    assert (inside.support, inside.knowledge) == (2, 2)


def test_nearest_takes_one_bucket_and_the_lower_of_two_as_near() -> None:
    samples = sample_columns([(1, 10, 1, 1), (1, 20, 1, 2), (1, 20, 9, 3), (1, 10, 5, 4), (1, 10, 9, 5), (0, 1, 1, 9)])
    oracle = open_ranked(samples, neighbors="nearest")
    for tokens, concurrency, latency in ((15, 1, 1), (16, 5, 2), (16, 6, 3), (15, 7, 4), (1, 8, 5)):
        query = mixed_query([(tokens, 0)])._replace(concurrency=concurrency)
        assert {oracle.answer(query, KEY, step).latency_ns for step in range(20)} == {latency}


def test_context_as_a_key_needs_context_in_every_sample() -> None:
    samples = sample_columns([(0, 1, 1, 5, 0, 10), (1, 1, 1, 5, 0, 10), (1, 1, 1, 5, 0, UNKNOWN)])
    with pytest.raises(PackInvalid, match="without context tokens") as caught:
        open_ranked(samples, neighbors="hierarchical", context_bucket_width=1)
    assert caught.value.where == "samples.parquet: context_tokens, row 2"


def test_samples_keep_the_order_of_the_file() -> None:
    rows = [(0, 4, 4, 100 + i, 0, 0) for i in range(7)] + [(1, 9, 1, 9, 0, 0)]
    arrays = build_index(
        sample_columns(rows[::-1]), tokens_width=1, concurrency_width=1, transition=False, neighbors="hierarchical"
    )
    assert arrays["decode.level_ns"].tolist() == [106, 105, 104, 103, 102, 101, 100]
