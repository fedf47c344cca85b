"""Import of LLM-Emu profile packs."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from oracle_server.errors import InvalidArgument
from oracle_server.pack import check_pack, open_oracle
from oracle_server.sampling.shape import StepQuery
from profiler.llm_emu import ImportOptions, read_llm_emu, write_llm_emu
from profiler.surface import read_pack

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def document(**changes: Any) -> dict[str, Any]:
    """A small pack: decode cells (1, 2) and (8, 7), one prefill cell (128, 2)."""
    return {
        "version": "2.0",
        "gpu_model": "A40",
        "model_name": "Qwen/Qwen3-8B",
        "profile_type": "serving_step_cycle_2d",
        "bucketing": {"tt_bucket_width": 1, "conc_bucket_width": 5},
        "decode_2d_distribution": [
            {"tt": 1, "conc": 2, "num_samples": 3, "samples": [5000.1, 4000.2, 90000.0]},
            {"tt": 8, "conc": 7, "num_samples": 1, "samples": [6000.0]},
        ],
        "prefill_2d_distribution": [{"tt": 128, "conc": 2, "num_samples": 2, "samples": [12000.0, 11000.0]}],
        "step_cycle_2d_distribution": [],
        "model_config": {
            "num_hidden_layers": 36,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 151936,
            "intermediate_size": 12288,
            "head_dim": 128,
            "block_size": 16,
            "num_gpu_blocks": 10_000,
            "gpu": {
                "gpu_name": "NVIDIA A40",
                "gpu_memory_bytes": 47_709_159_424,
                "gpu_compute_capability": [8, 6],
                "gpu_count": 1,
                "available_kv_cache_bytes": 147_456 * 160_000,
            },
        },
    } | changes


def _file(folder: Path, content: dict[str, Any] | str) -> Path:
    path = folder / "A40.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_samples_keep_their_order_and_become_nanoseconds(tmp_path: Path) -> None:
    columns = read_llm_emu(_file(tmp_path, document())).columns
    assert columns["latency_ns"].tolist() == [5_000_100, 4_000_200, 90_000_000, 6_000_000, 12_000_000, 11_000_000]
    assert columns["table"].tolist() == [0, 0, 0, 0, 1, 1]
    assert columns["total_tokens"].tolist() == [1, 1, 1, 8, 128, 128]
    assert columns["concurrency"].tolist() == [2, 2, 2, 7, 2, 2]


def test_what_the_file_does_not_know_is_marked_unknown(tmp_path: Path) -> None:
    columns = read_llm_emu(_file(tmp_path, document())).columns
    assert set(columns["context_tokens"].tolist()) == set(columns["previous_prefill_tokens"].tolist()) == {-1}


def test_the_written_pack_is_one_a_server_takes(tmp_path: Path) -> None:
    parsed = read_llm_emu(_file(tmp_path, document()))
    digest = write_llm_emu(parsed, ImportOptions(architecture="Qwen3ForCausalLM"), tmp_path / "pack", created=NOW)
    manifest = check_pack(tmp_path / "pack").manifest
    assert check_pack(tmp_path / "pack").digest == digest
    assert manifest.latency.sampled is not None
    assert manifest.latency.sampled.table_rule == "new_requests"
    assert manifest.latency.sampled.concurrency_bucket_width == 5
    assert (manifest.kv_cache.blocks, manifest.kv_cache.block_size, manifest.kv_cache.basis) == (10_000, 16, "measured")
    assert manifest.kv_cache.bytes_per_token == 147_456
    assert manifest.model.shape.startswith("Qwen3ForCausalLM layers=36 hidden=4096")
    assert (manifest.device.capability_major, manifest.device.capability_minor) == (8, 6)


def test_an_exact_bucket_answers_with_its_own_samples(tmp_path: Path) -> None:
    parsed = read_llm_emu(_file(tmp_path, document()))
    write_llm_emu(parsed, ImportOptions(), tmp_path / "pack", created=NOW)
    oracle = open_oracle(read_pack(tmp_path / "pack")[1])
    decode = StepQuery((), (), 1, 1, 500, 500, 1, 0, 0)
    drawn = {oracle.answer(decode, 7, step).latency_ns for step in range(100)}
    assert drawn == {5_000_100, 4_000_200, 90_000_000}
    continued = StepQuery((4,), (64,), 4, 4, 400, 100, 5, 0, 0)
    assert oracle.answer(continued, 7, 0).latency_ns == 6_000_000, (
        "a chunk without a new request reads the decode table"
    )


def test_a_given_block_count_is_assumed_and_replaces_the_files(tmp_path: Path) -> None:
    parsed = read_llm_emu(_file(tmp_path, document()))
    write_llm_emu(parsed, ImportOptions(kv_blocks=77), tmp_path / "pack", created=NOW)
    cache = check_pack(tmp_path / "pack").manifest.kv_cache
    assert (cache.blocks, cache.basis, cache.bytes_per_token) == (77, "assumed", 0)


def test_a_pack_without_kv_blocks_is_no_pack(tmp_path: Path) -> None:
    content = document()
    del content["model_config"]["num_gpu_blocks"]
    parsed = read_llm_emu(_file(tmp_path, content))
    with pytest.raises(InvalidArgument, match="give --kv-blocks"):
        write_llm_emu(parsed, ImportOptions(), tmp_path / "pack", created=NOW)


def test_third_axes_are_left_out_and_named(tmp_path: Path) -> None:
    axis = [{"tt": 1, "conc": 2, "new_reqs": 1, "num_samples": 1, "samples": [1.0]}]
    content = document(version="2.1", prefill_axis_distribution=axis)
    parsed = read_llm_emu(_file(tmp_path, content))
    write_llm_emu(parsed, ImportOptions(), tmp_path / "pack", created=NOW)
    assert check_pack(tmp_path / "pack").manifest.provenance["left_out"] == "prefill_axis_distribution"


def test_samples_far_above_their_cells_median_are_reported(tmp_path: Path) -> None:
    report = read_llm_emu(_file(tmp_path, document())).reports["decode"]
    assert (report.cells, report.samples, report.thin_cells, report.tail_samples) == (2, 4, 2, 1)
    assert report.tail_time_share == pytest.approx(90_000_000 / 105_000_300)


def test_one_import_is_one_digest(tmp_path: Path) -> None:
    parsed = read_llm_emu(_file(tmp_path, document()))
    digests = {write_llm_emu(parsed, ImportOptions(), tmp_path / name, created=NOW) for name in ("a", "b")}
    assert len(digests) == 1


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in document().items() if name != key}


def _cell(**changes: Any) -> dict[str, Any]:
    cell = {"tt": 1, "conc": 2, "num_samples": 1, "samples": [1.0]} | changes
    return document(decode_2d_distribution=[cell])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: "{", "not the JSON of an LLM-Emu pack"),
        (lambda: "[]", "not a JSON object"),
        (lambda: "[" * 100_000, "not the JSON of an LLM-Emu pack"),
        (lambda: json.dumps(_cell(samples=[float("nan")])), "holds the number NaN"),
        (lambda: json.dumps(_cell(samples=[float("inf")])), "holds the number Infinity"),
        (lambda: '{"version": "2.0", "version": "2.1"}', "a key twice"),
        (lambda: document(version="3.0"), "version '3.0' is not one of 2.0, 2.1"),
        (lambda: _without("gpu_model"), "gpu_model is None"),
        (lambda: _without("prefill_2d_distribution"), "prefill_2d_distribution is empty or absent"),
        (lambda: document(decode_2d_distribution=[3]), r"decode_2d_distribution\[0\] is not an object"),
        (lambda: _cell(samples=[]), "has no samples"),
        (lambda: _cell(num_samples=2), "states 2 samples and holds 1"),
        (lambda: _cell(samples=[-1.0]), "has the sample -1.0"),
        (lambda: _cell(samples=[0.0]), "has the sample 0.0"),
        (lambda: _cell(samples=[1e300]), r"has the sample 1e\+300"),
        (lambda: _cell(samples=["5"]), "has the sample '5'"),
        (lambda: _cell(samples=[True]), "has the sample True"),
        (lambda: _cell(tt=0), "tt is 0"),
        (lambda: _cell(conc=2**31), "conc 2147483648; both lie below"),
        (lambda: document(bucketing={"conc_bucket_width": 0}), "conc_bucket_width is 0"),
        (lambda: document(model_config=[]), "model_config is not an object"),
    ],
)
def test_a_bad_file_is_refused_with_its_fault(
    content: Callable[[], dict[str, Any] | str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        read_llm_emu(_file(tmp_path, content()))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_gpu_blocks", "many", "num_gpu_blocks"),
        ("block_size", -1, "block_size"),
        ("max_model_len", 0, "max_model_len"),
        ("async_scheduling", "yes", "async_scheduling"),
    ],
)
def test_a_bad_serving_setting_is_refused(key: str, value: object, message: str, tmp_path: Path) -> None:
    content = document()
    content["model_config"][key] = value
    with pytest.raises(InvalidArgument, match=message):
        write_llm_emu(read_llm_emu(_file(tmp_path, content)), ImportOptions(), tmp_path / "pack", created=NOW)
