"""Packs of MoE bundles answer the sum of the bundle's own CSV rows. The bundle is made here; none is in our data."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import mixed_query
from bundles import (
    EXPERT_TOKENS,
    EXPERTS,
    EXPERTS_PER_TOKEN,
    LAYERS,
    MOE_LAYER,
    expert_rows,
    moe_request,
    moe_tables,
    tables,
)
from gates import Gates
from oracle_server.pack import open_oracle
from profiler.llmservingsim import read_bundle
from profiler.llmservingsim_link import RingLink
from profiler.llmservingsim_pack import write_bundle
from profiler.surface import read_pack

pytestmark = pytest.mark.accuracy

LINK = RingLink(25e9, 3e-6, "test")
GATE = "made-up MoE bundle against its CSV rows"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_random_steps_of_a_moe_model_cost_the_sum_of_the_csv_rows(ranks: int, gates: Gates, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"data_parallel": ranks, "expert_parallel": ranks, "link": LINK} if ranks > 1 else {}
    write_bundle(read_bundle(moe_request(tmp_path, moe_tables(1, 2, 4), **fields)), tmp_path / "pack")
    oracle = open_oracle(read_pack(tmp_path / "pack")[1])
    random = np.random.default_rng(5)
    attention = {tuple(row[:4]): row[4] for row in tables()["attention.csv"]}
    errors = []
    for step in range(500):
        requests, chunk = int(random.choice([0, 1, 2])), int(random.choice([0, 16, 32]))
        if not requests + chunk or requests + chunk > EXPERT_TOKENS[-1] // ranks:
            continue
        # One context for all, so that no skew is in the sum.
        context = int(random.choice([16, 32])) * bool(requests)
        history = int(random.choice([0, 16, 32])) * bool(chunk)
        query = mixed_query([(chunk, history)] if chunk else [], requests, requests * context)
        expected_us = (
            layers_us(requests + chunk, requests + bool(chunk))
            + LAYERS * attention[chunk, history, requests, context]
            + LAYERS * experts_us(requests + chunk, ranks)
            + LAYERS * exchange_us(requests + chunk, ranks)
        )
        errors.append(abs(oracle.answer(query, 1, step).latency_ns / (1e3 * expected_us) - 1.0))
    assert len(errors) > 100
    # Steps last 300 us and more, so that rounding to a nanosecond is below 2 ppm.
    what = f"synthetic MoE bundle, expert parallel {ranks}, {len(errors)} steps, largest difference"
    gates.source(GATE, "a bundle made up for this test")
    gates.check(GATE, what, 1e6 * max(errors), at_most=2.0, unit="ppm")


def layers_us(tokens: int, rows: int) -> float:
    dense: dict[str, dict[int, float]] = {}
    for layer, count, cost in tables()["dense.csv"]:
        dense.setdefault(layer, {})[count] = cost
    per_sequence: dict[str, dict[int, float]] = {}
    for layer, count, cost in tables()["per_sequence.csv"]:
        per_sequence.setdefault(layer, {})[count] = cost
    layer_us = sum(line(dense[name], tokens) for name in (*MOE_LAYER, "layernorm"))
    ends = line(dense["embedding"], tokens) + line(dense["final_layernorm"], tokens)
    return LAYERS * layer_us + ends + sum(line(per_sequence[name], rows) for name in ("lm_head", "sampler"))


def experts_us(tokens: int, ranks: int) -> float:
    """The row of the tokens of all ranks, at the experts that one of them is expected to need."""
    rows: dict[int, dict[int, float]] = {}
    for count, experts, cost in expert_rows(ranks):
        rows.setdefault(count, {})[experts] = cost
    misses = (1 - EXPERTS_PER_TOKEN / EXPERTS) ** (ranks * tokens)
    reached = EXPERTS / ranks * (1 - misses)
    return line({count: line(row, reached) for count, row in rows.items()}, ranks * tokens)


def exchange_us(tokens: int, ranks: int) -> float:
    """Hidden states of 64 numbers there and back, with weight and id of each chosen expert on the way there."""
    if ranks == 1:
        return 0.0
    sent = tokens * (2 * 64 * 2 + EXPERTS_PER_TOKEN * 8)
    return (ranks - 1) * (2 * LINK.latency_s + sent / LINK.bytes_per_s) * 1e6


def line(points: Mapping[int, float], x: float) -> float:
    """On the line between two neighbours, beyond the last on the line of the last two, before the first its value."""
    axis = sorted(points)
    if x <= axis[0] or len(axis) == 1:
        return points[axis[0]]
    low, high = next((pair for pair in pairwise(axis) if x <= pair[1]), (axis[-2], axis[-1]))
    slope = (points[high] - points[low]) / (high - low)
    return points[low] + slope * (x - low) if x <= high else points[high] + max(slope, 0.0) * (x - high)
