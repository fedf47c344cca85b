"""Many steps in one call: the bits of one call each, and of the naive twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builders import decode_query, mixed_query, plausible_samples
from naive import ranked_answer, sampled_answer
from oracle_server.errors import BadStep
from oracle_server.sampling.buckets import build_index
from oracle_server.sampling.draws import engine_key
from oracle_server.sampling.sampled import SampledOptions, SampledOracle
from oracle_server.sampling.shape import StepQuery

KEY = engine_key(2**64 - 1, "engine-0")


def open_sampled(samples: Any, **options: Any) -> SampledOracle:
    chosen = SampledOptions(**options)
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


def random_queries(count: int, prefill: bool) -> list[StepQuery]:
    random = np.random.default_rng(count)
    queries = []
    for _ in range(count):
        requests = int(random.integers(1, 80))
        context = requests * int(random.integers(1, 3000))
        if prefill:
            queries.append(mixed_query([(int(random.integers(1, 6000)), 7)], requests, context))
        else:
            queries.append(decode_query(requests, context))
    return queries


@pytest.mark.parametrize("table", ["decode", "prefill"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens_bucket_width": 16, "concurrency_bucket_width": 5, "min_samples": 100},
        {"fixed_buckets": 4},
        {"neighbors": "nearest"},
        {"neighbors": "hierarchical", "min_samples": 5},
    ],
)
def test_many_answers_are_those_of_single_calls_and_of_the_naive_twin(options: dict[str, Any], table: str) -> None:
    samples = plausible_samples()
    oracle = open_sampled(samples, **options)
    queries = random_queries(300, table == "prefill")
    step_index = np.arange(len(queries)) * 7 + 3
    latency, support, distance = oracle.answer_many(
        table,
        np.array([sum(query.chunk_tokens) + query.num_decode_tokens for query in queries]),
        np.array([query.concurrency for query in queries]),
        np.array([sum(query.chunk_context) + query.decode_context_tokens for query in queries]),
        KEY,
        step_index,
    )
    found = list(zip(latency.tolist(), support.tolist(), distance.tolist(), strict=True))
    singles = [oracle.answer(query, KEY, int(i)) for query, i in zip(queries, step_index, strict=True)]
    assert found == [(single.latency_ns, single.support, single.distance) for single in singles]
    naive = sampled_answer if "neighbors" not in options else ranked_answer
    expected = [naive(samples, query, KEY, int(i), **options) for query, i in zip(queries, step_index, strict=True)]
    assert [item[:2] for item in found] == [item[:2] for item in expected]
    assert distance.tolist() == pytest.approx([item[2] for item in expected])


def test_a_step_without_tokens_is_refused() -> None:
    none = np.zeros(1, dtype=np.int64)
    with pytest.raises(BadStep, match="without tokens"):
        open_sampled(plausible_samples()).answer_many("decode", none, none, none, KEY, none)


def test_no_steps_have_no_answers() -> None:
    none = np.zeros(0, dtype=np.int64)
    answers = open_sampled(plausible_samples()).answer_many("decode", none, none, none, KEY, none)
    assert [array.size for array in answers] == [0, 0, 0]
