"""Operators a composed pack may have beside the needed ones: mixed attention on four axes, experts, the sampler."""

from __future__ import annotations

import hashlib
import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from builders import decode_query, mixed_query, operator_columns, plausible_operators
from naive import Grid, composed_answer, grid_value
from oracle_server.errors import PackInvalid
from oracle_server.sampling.composed import ComposedOptions, ComposedOracle
from oracle_server.sampling.draws import engine_key
from oracle_server.sampling.grids import build_arrays
from oracle_server.sampling.shape import StepQuery

RATIOS = tuple(np.array([0.97, 1.0, 1.11], dtype=np.float32).tolist())
KNOWLEDGE = {"mixed_attention": 2, "sampler": 1, "moe": 3, "expert_exchange": 4}
KEY = engine_key(42, "engine-0")
AXES = (16, 64, 256), (0, 16, 128, 1024), (1, 4, 16, 64), (16, 128, 1024, 4096)
Operators = dict[str, dict[tuple[int, ...], float]]


def extended_operators() -> Operators:
    """`plausible_operators` with a sampler and mixed attention that grows, but not evenly, along every axis."""
    bumps = np.random.default_rng(7).uniform(0.8, 1.25, size=tuple(len(axis) for axis in AXES))
    mixed: dict[tuple[int, ...], float] = {
        point: float(bump) * (2e5 + 0.02 * point[0] * (point[0] + 2 * point[1]) + 2.5 * point[2] * point[3])
        for point, bump in zip(itertools.product(*AXES), bumps.ravel(), strict=True)
    }
    sampler: dict[tuple[int, ...], float] = {(rows,): 1e5 + 700.0 * rows + 9e3 * (rows % 5) for rows in (1, 4, 16, 64)}
    return {**plausible_operators(), "sampler": sampler, "mixed_attention": mixed}


def expert_operators() -> Operators:
    """Experts that saturate, and what ranks exchange for them."""
    return {
        "moe": {(tokens,): 2e5 + 4e4 * min(tokens, 30) + 300.0 * tokens for tokens in range(1, 65)},
        "expert_exchange": {(tokens,): 9e4 + 70.0 * tokens for tokens in (1, 512)},
    }


def value_at(grid: Grid, *point: int) -> float:
    """By the naive twin."""
    return float(grid_value(grid, [Fraction(x) for x in point])[0])


def open_composed(operators: Operators, ratios: tuple[float, ...] = RATIOS, **options: Any) -> ComposedOracle:
    arrays = build_arrays(operator_columns(operators, KNOWLEDGE), dict(enumerate(operators)))
    return ComposedOracle({**arrays, "residuals": np.array(ratios, dtype=np.float32)}, ComposedOptions(**options))


def shapes(seed: int, count: int) -> list[StepQuery]:
    """Steps of every kind: on grid points, between them, below and beyond every axis."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        chunks = [
            (int(random.choice([1, 15, 16, 40, 64, 256, 700])), int(random.choice([0, 5, 16, 100, 128, 1024, 3000])))
            for _ in range(int(random.integers(0, 4)))
        ]
        n = int(random.choice([0, 1, 3, 4, 16, 50, 64, 100]))
        n = n or int(not chunks)
        longest = int(random.choice([1, 15, 16, 17, 128, 500, 1024, 4096, 9000])) if n else 0
        context = int(random.choice([longest + n - 1, n * longest])) if n else 0
        context = int(random.integers(context, n * longest + 1)) if n else 0
        drafts = int(random.integers(0, 2)) * n * int(random.integers(0, 2))
        found.append(mixed_query(chunks, n, context, longest, num_decode_tokens=n + drafts))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skew_decode": 0.04, "skew_mixed": 0.06, "launch_floor_ns": 50_000.0, "mixed_decode_factor": 2.0},
        {"skew_mixed": 1.0, "host_ns_per_step": 300_000.0, "graph_capture_sizes": (1, 8, 64)},
    ],
)
@pytest.mark.parametrize("more", [{}, expert_operators()], ids=["dense", "experts"])
def test_steps_with_measured_mixed_attention_equal_their_naive_twin(more: Operators, options: dict[str, Any]) -> None:
    operators = extended_operators() | more
    oracle = open_composed(operators, **options)
    for step, query in enumerate(shapes(3, 600)):
        expected, support, distance, known = composed_answer(
            operators, query, KEY, step, knowledge=KNOWLEDGE, ratios=RATIOS, **options
        )
        actual = oracle.answer(query, KEY, step)
        assert abs(actual.latency_ns - expected) <= 0.5 + 1e-12 * expected + 1e-6, query
        assert (actual.support, actual.knowledge) == (support, known), query
        assert actual.distance == pytest.approx(distance, rel=1e-12, abs=0.0), query


def test_a_measured_mixed_step_costs_what_was_measured() -> None:
    operators = extended_operators()
    answer = open_composed(operators, (1.0,), skew_mixed=0.06).answer(mixed_query([(64, 128)], 4, 4096, 1024), KEY, 0)
    fixed = sum(value_at(operators[name], 68) for name in ("dense_gemm", "dense_elementwise"))
    fixed += sum(value_at(operators[name], 5) for name in ("logits", "sampler"))
    assert answer.latency_ns == pytest.approx(fixed + operators["mixed_attention"][64, 128, 4, 1024], abs=0.51)
    # Nothing of the step is a rule: it lies between measurements, no more.
    assert answer.knowledge == 2


@pytest.mark.parametrize(
    ("chunk", "history", "n", "kv", "uses"),
    [
        (64, 128, 4, 1024, True),
        (65, 128, 4, 1024, True),
        (40, 130, 3, 1030, True),
        (64, 128, 16, 1024, False),
        (256, 128, 4, 1024, False),
        # Beyond an axis the line of the last two points goes on, and both of them count.
        (257, 128, 4, 1024, True),
        (257, 1025, 65, 5000, False),
        (64, 128, 4, 1025, True),
    ],
)
def test_knowledge_is_the_weakest_of_the_corners_used(chunk: int, history: int, n: int, kv: int, uses: bool) -> None:
    operators = extended_operators()
    columns = operator_columns(operators)
    number = list(operators).index("mixed_attention")
    weak = columns["operator"] == number
    for axis, x in enumerate((64, 128, 4, 1024)):
        weak &= columns[f"x{axis}"] == x
    assert weak.sum() == 1
    columns["knowledge"][weak] = 5
    arrays = build_arrays(columns, dict(enumerate(operators)))
    oracle = ComposedOracle({**arrays, "residuals": np.ones(1, dtype=np.float32)}, ComposedOptions())
    answer = oracle.answer(mixed_query([(chunk, history)], n, n * kv, kv), KEY, 0)
    assert (answer.knowledge == 5) == uses


def test_uneven_contexts_never_make_a_mixed_step_cheaper() -> None:
    operators = extended_operators()
    # A grid that falls with the context, as noise can make it at short ones.
    operators["mixed_attention"] = {point: 1e6 - 100.0 * point[3] for point in itertools.product(*AXES)}
    even = mixed_query([(64, 0)], 4, 512, 128)
    uneven = mixed_query([(64, 0)], 4, 512, 400)
    plain = open_composed(operators, (1.0,)).answer(even, KEY, 0).latency_ns
    assert open_composed(operators, (1.0,), skew_mixed=0.5).answer(uneven, KEY, 0).latency_ns == plain
    operators["mixed_attention"] = {point: 1e6 + 100.0 * point[3] for point in itertools.product(*AXES)}
    rising = open_composed(operators, (1.0,), skew_mixed=0.5)
    added = rising.answer(uneven, KEY, 0).latency_ns - rising.answer(even, KEY, 0).latency_ns
    assert added == pytest.approx(0.5 * 100.0 * (400 - 128), abs=1.0)


def test_a_further_chunk_adds_its_own_attention_less_the_launch_floor() -> None:
    operators = extended_operators()
    oracle = open_composed(operators, (1.0,), launch_floor_ns=90_000.0)
    # Tokens, rows and decode requests stay the same: one chunk is 64 tokens, or 56 and 8.
    both = oracle.answer(mixed_query([(64, 128), (8, 0)], 4, 4096), KEY, 0)
    one = oracle.answer(mixed_query([(64, 128)], 12, 12 * 1024), KEY, 0)
    assert both.knowledge == 3
    rows = sum(value_at(operators[name], 6) - value_at(operators[name], 13) for name in ("logits", "sampler"))
    attention = operators["context_attention"][8, 0] - 90_000.0 + operators["mixed_attention"][64, 128, 4, 1024]
    alone = value_at(operators["mixed_attention"], 64, 128, 12, 1024)
    assert both.latency_ns - one.latency_ns == pytest.approx(rows + attention - alone, abs=1.1)


def test_decode_only_steps_do_not_read_mixed_attention() -> None:
    operators = extended_operators()
    without = {name: grid for name, grid in operators.items() if name != "mixed_attention"}
    first, second = open_composed(operators, skew_decode=0.1), open_composed(without, skew_decode=0.1)
    for n, context, longest in [(1, 1, 1), (4, 4096, 3000), (300, 90_000, 800)]:
        assert first.decode_record(n, context, longest) == second.decode_record(n, context, longest)
        assert first.answer(decode_query(n, context, longest), KEY, 5) == second.answer(
            decode_query(n, context, longest), KEY, 5
        )


def test_the_record_of_a_pack_with_a_sampler_gives_the_served_bits() -> None:
    oracle = open_composed(extended_operators(), skew_decode=0.04)
    random = np.random.default_rng(1)
    for step in range(2_000):
        n = int(random.integers(1, 90))
        longest = int(random.integers(1, 9_000))
        context = int(random.integers(longest + n - 1, n * longest + 1)) if n > 1 else longest
        record = oracle.decode_record(n, context, longest, 1.3)
        assert record is not None
        assert record.covers(n, context, longest)
        served = oracle.answer(decode_query(n, context, longest), KEY, step, 1.3)
        assert served.latency_ns in {record.latency_ns(context, longest, ratio) for ratio in RATIOS}


def test_the_order_of_chunks_beside_decodes_does_not_matter() -> None:
    oracle = open_composed(extended_operators(), skew_mixed=0.06)
    chunks = [(64, 16), (40, 128), (16, 1024), (8, 0)]
    answers = {oracle.answer(mixed_query(order, 7, 7000, 2000), KEY, 3) for order in itertools.permutations(chunks)}
    assert len(answers) == 1


def test_packs_without_the_further_operators_answer_as_they_always_have() -> None:
    # The digest is of the answers of the first release of the composed model; a pack's answers never change.
    operators = plausible_operators()
    options: dict[str, Any] = {
        "skew_decode": 0.04,
        "skew_mixed": 0.06,
        "mixed_decode_factor": 2.0,
        "launch_floor_ns": 50_000.0,
    }
    oracle = open_composed(operators, **options, host_ns_per_sequence=46.25, graph_capture_sizes=(1, 8, 64))
    digest = hashlib.sha256()
    for step in range(400):
        # Spelled out without a random generator: no library decides what is asked.
        n = step % 97 if step % 4 else step % 97 + 1
        longest = 100 + step * (1 + n % 3)
        context = n * (100 + step)
        chunks = [((step * 37 + i) % 900 + 1, (step * 91) % 5000) for i in range(step % 4)]
        query = mixed_query(chunks, n, context, longest if n > 1 else context)
        digest.update(repr(tuple(oracle.answer(query, KEY, step, 1.25))).encode())
    assert digest.hexdigest() == FIRST_RELEASE


FIRST_RELEASE = "d4ceb56ebc45222712e0da59ad4dad52609c5896db87f4109cb6409b520ad6fa"


def bad_mixed(change: Any) -> Operators:
    operators = extended_operators()
    change(operators["mixed_attention"])
    return operators


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grid: grid.pop((64, 128, 4, 1024)), "first missing is chunk_tokens=64, history_tokens=128"),
        (lambda grid: grid.update({(64, 128, 4, 1000): 1.0}), "the grid is not full"),
        (lambda grid: grid.update({(64, 128, 4.5, 1024): 1.0}), "whole numbers"),
    ],
)
def test_a_mixed_grid_with_a_gap_is_refused(change: Any, message: str) -> None:
    with pytest.raises(PackInvalid, match=message):
        open_composed(bad_mixed(change))


def test_a_mixed_grid_of_one_request_count_is_refused() -> None:
    operators = extended_operators()
    operators["mixed_attention"] = {p: v for p, v in operators["mixed_attention"].items() if p[2] == 4}
    with pytest.raises(PackInvalid, match="at least two points"):
        open_composed(operators)
