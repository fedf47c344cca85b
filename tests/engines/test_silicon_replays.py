"""Closed loops of measured rows with real vLLM: rows of one pack share a process and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from environments import VllmEnvironment
from profiler.silicon_points import read_rows
from profiler.silicon_replays import predict

pytestmark = [pytest.mark.vllm, pytest.mark.one_vllm, pytest.mark.slow]
pytest.importorskip("aiconfigurator_core", reason="the `synthesize` extra is not installed")


def test_each_row_of_a_process_has_its_own_users_and_lengths(vllm: VllmEnvironment) -> None:
    row = next(point for point in read_rows().points if point.model == "Qwen/Qwen3-32B" and point.tensor_parallel == 8)
    many = replace(row, id="many", concurrency=16, prompt_tokens=64, output_tokens=20)
    alone = replace(row, id="alone", concurrency=1, prompt_tokens=2048, output_tokens=20)
    venv = vllm.python.parent.parent

    together = predict([many, alone], venv)

    assert [found.point for found in together] == [many, alone]
    # Requests of 16 users are scheduled and read beside each other; a long prompt takes longer than a short one.
    assert together[0].tpot_ms > 1.05 * together[1].tpot_ms
    assert together[1].ttft_ms > together[0].ttft_ms
    assert predict([alone], venv) == together[1:]
