"""Which step shapes are refused."""

from __future__ import annotations

import pytest

from builders import decode_query, mixed_query
from oracle_server.errors import BadStep
from oracle_server.sampling.shape import StepQuery, check_query


@pytest.mark.parametrize(
    "query",
    [
        decode_query(1, 1),
        decode_query(4, 4000, 3997),
        decode_query(4, 4000, tokens=12),
        mixed_query([(1, 0)]),
        mixed_query([(2048, 30_000), (5, 7)], 250, 1_000_000),
        decode_query(3, 2**53 - 1, 2**53 - 5),
    ],
)
def test_a_plausible_shape_is_taken(query: StepQuery) -> None:
    check_query(query)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        (mixed_query([]), "shape"),
        (mixed_query([(0, 5)]), "prefill_chunks"),
        (mixed_query([(5, -1)]), "prefill_chunks"),
        (mixed_query([(2**31 + 1, 0)]), "prefill_chunks"),
        (mixed_query([(5, 0)])._replace(chunk_context=()), "prefill_chunks"),
        (mixed_query([(2**31, 0), (1, 0)]), "shape"),
        (decode_query(4, 400, tokens=3), "num_decode_tokens"),
        (decode_query(4, 399, 400), "decode_context_tokens"),
        (decode_query(4, 401, 100), "decode_context_tokens"),
        (decode_query(4, 0, 0), "decode_context_tokens"),
        (decode_query(2, 2**53, 2**52), "decode_context_tokens"),
        (mixed_query([(5, 0)])._replace(decode_context_tokens=3), "decode_context_tokens"),
        (decode_query(4, 400)._replace(concurrency=5), "concurrency"),
        (decode_query(4, 400)._replace(previous_prefill_tokens=-1), "previous_prefill_tokens"),
    ],
)
def test_a_shape_that_contradicts_itself_is_refused(query: StepQuery, field: str) -> None:
    with pytest.raises(BadStep) as refusal:
        check_query(query)
    assert refusal.value.field == field
