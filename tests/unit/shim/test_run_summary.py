"""The line at the end of an engine's life."""

from __future__ import annotations

from step_oracle.v1 import step_pb2 as pb
from vllm_shim.run_summary import RunSummary


def test_shares_are_of_steps_and_of_device_time() -> None:
    summary = RunSummary()
    for latency_ns, support, is_leased, is_late in (
        (1_000, pb.SUPPORT_EXACT, True, False),
        (2_000, pb.SUPPORT_INTERPOLATED, True, True),
        (1_000, pb.SUPPORT_EXACT, False, False),
        (12_000, pb.SUPPORT_EXTRAPOLATED, True, False),
    ):
        summary.count(latency_ns, support, is_leased=is_leased, is_late=is_late)

    assert summary.steps == 4
    assert str(summary) == (
        "4 steps; extrapolated: 25.00 % of the steps, 75.00 % of the device time; 75.0 % leased, 1 late answers"
    )


def test_an_engine_without_a_step_divides_by_nothing() -> None:
    assert str(RunSummary()).startswith("0 steps; extrapolated: 0.00 % of the steps, 0.00 % of the device time;")
