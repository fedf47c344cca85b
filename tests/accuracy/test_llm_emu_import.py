"""A real LLM-Emu pack of an MI300X becomes a pack that answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from gates import Gates
from oracle_server.pack import open_oracle
from oracle_server.sampling.answer import SUPPORT_EXACT
from oracle_server.sampling.shape import StepQuery
from profiler.llm_emu import read_llm_emu
from profiler.llm_emu_pack import ImportOptions, write_llm_emu
from profiler.surface import read_pack

pytestmark = pytest.mark.accuracy


def test_the_mi300x_pack_imports_and_answers(data_folder: Path, tmp_path: Path, gates: Gates) -> None:
    parsed = read_llm_emu(data_folder / "llm_emu_packs" / "MI300X-Qwen3-8B.json")
    decode, prefill = parsed.reports["decode"], parsed.reports["prefill"]
    assert (decode.cells, decode.samples, prefill.cells, prefill.samples) == (84, 10_582, 195, 2_793)
    write_llm_emu(parsed, ImportOptions(licence="MIT"), tmp_path / "pack")
    report, compiled = read_pack(tmp_path / "pack")
    cache = report.manifest.kv_cache
    assert (cache.blocks, cache.block_size, cache.basis, cache.bytes_per_token) == (66_954, 16, "measured", 147_456)
    oracle = open_oracle(compiled)
    answers = [oracle.answer(StepQuery((), (), 1, 1, 1024, 1024, 1, 0, 0), 1, step) for step in range(2000)]
    assert {answer.support for answer in answers} == {SUPPORT_EXACT}
    median = sorted(answer.latency_ns for answer in answers)[1000] / 1e6
    print(f"\nMI300X, one decode request: median {median:.2f} ms; time in tails {100 * decode.tail_time_share:.1f} %")
    # TPOT of one stream on the real device was 5.11 ms.
    gate = "MI300X pack, step by step"
    gates.source(gate, "ROCm/rocm-aic @ c379040 (LLM-Emu): steps and published points of a real MI300X, Qwen3-8B")
    gates.check(gate, "median decode step beside the published TPOT", 100 * (median / 5.11 - 1), at_most=3.0)
