"""Corrections of operator tables, on tables small enough to follow by hand."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest

from profiler.aiconfigurator import OperatorModel, System
from profiler.corrections import corrected, schedules_asynchronously, step_terms
from profiler.model_config import ModelConfig
from profiler.operators import Link, Operator, columns_of
from profiler.silicon_tables import EXTRAPOLATED, MEASURED, MODELLED

# 1 layer, 1 KV head of 1 element in 2 bytes: 4 bytes of KV per token.
TINY = ModelConfig(
    directory=Path(),
    model_id="tiny",
    shape="",
    num_layers=1,
    hidden_size=1,
    intermediate_size=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    vocab_size=1,
    max_position_embeddings=0,
    dtype="bfloat16",
    quantization="",
    weight_format="bfloat16",
    tied_embeddings=False,
    num_experts=0,
    expert_intermediate_size=0,
)


class _DecodeReads:
    """A library whose decode attention of one request takes 10 ns per KV token."""

    def generation_attention(self, requests: int, context: int) -> float:
        return 10.0 * requests * context


def _decode(latency: list[list[float]], knowledge: int = MEASURED) -> Operator:
    values = np.array(latency)
    points = ((1, 2), (100, 200, 400))
    known = np.full(values.shape, knowledge, dtype=np.int8)
    return Operator(
        "generation_attention", ("decode_requests", "mean_context_tokens"), "attention", points, values, known
    )


def _prefill(latency: list[list[float]]) -> Operator:
    values = np.array(latency)
    known = np.full(values.shape, MODELLED, dtype=np.int8)
    points = ((1, 50), (0, 100, 300))
    return Operator("context_attention", ("chunk_tokens", "history_tokens"), "attention", points, values, known)


def _correct(decode: Operator, prefill: Operator) -> tuple[Operator, Operator]:
    operators, _ = corrected([decode, prefill], cast(OperatorModel, _DecodeReads()), TINY, 1)
    return operators[0], operators[1]


_CHEAP_PREFILL = _prefill([[9000.0] * 3, [9000.0] * 3])


def test_no_decode_point_beats_the_bandwidth_of_the_largest_reads() -> None:
    # The largest read, 2 x 400 tokens of 4 bytes in 1,600 ns, runs at 2 bytes/ns; the smallest shows 8.
    decode, _ = _correct(_decode([[50.0, 700.0, 1000.0], [700.0, 1000.0, 1600.0]]), _CHEAP_PREFILL)
    assert decode.latency_ns.tolist() == [[200.0, 700.0, 1000.0], [700.0, 1000.0, 1600.0]]


def test_extrapolated_points_do_not_set_the_bandwidth() -> None:
    operator = _decode([[200.0, 400.0, 800.0], [400.0, 800.0, 1.0]])
    knowledge = operator.knowledge.copy()
    knowledge[1, 2] = EXTRAPOLATED
    decode, _ = _correct(
        Operator(operator.name, operator.axes, operator.group, operator.points, operator.latency_ns, knowledge),
        _CHEAP_PREFILL,
    )
    assert decode.latency_ns[1, 2] == 1600.0


def test_a_chunk_with_history_costs_at_least_a_decode_read() -> None:
    flat = _decode([[1e4] * 3, [1e4] * 3])
    _, prefill = _correct(flat, _prefill([[5.0, 5.0, 5.0], [5.0, 5000.0, 5000.0]]))
    # 10 ns per token of chunk and history; without history nothing is lifted.
    assert prefill.latency_ns.tolist() == [[5.0, 1010.0, 3010.0], [5.0, 5000.0, 5000.0]]


def test_more_history_never_costs_less() -> None:
    flat = _decode([[1e4] * 3, [1e4] * 3])
    _, prefill = _correct(flat, _prefill([[8000.0, 7000.0, 6000.0], [8000.0, 9000.0, 7000.0]]))
    assert prefill.latency_ns.tolist() == [[8000.0] * 3, [8000.0, 9000.0, 9000.0]]


def test_every_correction_names_value_reason_and_source() -> None:
    _, first = corrected([_decode([[1.0] * 3] * 2), _CHEAP_PREFILL], cast(OperatorModel, _DecodeReads()), TINY, 1)
    _, second = step_terms(_system("h100_sxm"), None, None)
    for item in [*first, *second]:
        assert item.name
        assert item.reason
        assert item.source


def _system(name: str) -> System:
    return System(name, "0.24.0", name, 1 << 30, (9, 0), 450e9, Path())


@pytest.mark.parametrize(("system", "factor"), [("h100_sxm", 1.0), ("l40s", 2.0), ("rtx_pro_6000_server", 2.0)])
def test_decode_attention_in_mixed_steps_doubles_only_without_split(system: str, factor: float) -> None:
    assert step_terms(_system(system), None, None)[0].mixed_decode_factor == factor


@pytest.mark.parametrize(
    ("version", "is_async"),
    [(None, True), ("0.12.0", False), ("v0.13.5", False), ("0.14.0", True), ("0.33.0", True), ("nightly", True)],
)
def test_host_time_counts_only_under_synchronous_scheduling(version: str | None, is_async: bool) -> None:
    assert schedules_asynchronously(version) is is_async
    terms, _ = step_terms(_system("h100_sxm"), version, None)
    assert (terms.host_ns_per_step == 0) is is_async


def test_an_option_beats_the_version_for_scheduling() -> None:
    assert step_terms(_system("h100_sxm"), "0.33.0", False)[0].host_ns_per_sequence == 46_000


def test_a_link_moves_all_but_its_share_of_the_message() -> None:
    link = Link(bytes_per_s=1e9, latency_s=5e-6)
    assert link.all_reduce_ns(2, 0) == pytest.approx(5000.0)
    # Two ranks send half a message twice, four ranks three quarters twice.
    assert link.all_reduce_ns(2, 1000) == pytest.approx(5000.0 + 1000.0)
    assert link.all_reduce_ns(4, 1000) == pytest.approx(5000.0 + 1500.0)


def test_the_long_form_has_one_row_per_grid_point_with_the_last_axis_fastest() -> None:
    columns = columns_of([_decode([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])])
    assert columns["x0"].tolist() == [1, 1, 1, 2, 2, 2]
    assert columns["x1"].tolist() == [100, 200, 400] * 2
    assert columns["latency_ns"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert not columns["x2"].any()
    assert not columns["operator"].any()
