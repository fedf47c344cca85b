"""Import of LLM-Emu profile packs."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracle_server.errors import InvalidArgument
from oracle_server.pack import check_pack, open_oracle
from oracle_server.sampling.shape import StepQuery
from profiler.llm_emu import read_llm_emu
from profiler.llm_emu_context import interleave
from profiler.llm_emu_pack import ImportOptions, write_llm_emu
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
    options = ImportOptions(architecture="Qwen3ForCausalLM")
    digest = write_llm_emu(parsed, options, tmp_path / "pack", created=NOW).digest
    manifest = check_pack(tmp_path / "pack").manifest
    assert check_pack(tmp_path / "pack").digest == digest
    assert manifest.latency.sampled is not None
    assert manifest.latency.sampled.table_rule == "prefill_tokens"
    assert manifest.latency.sampled.concurrency_bucket_width == 5
    assert (manifest.kv_cache.blocks, manifest.kv_cache.block_size, manifest.kv_cache.basis) == (10_000, 16, "measured")
    assert manifest.kv_cache.bytes_per_token == 147_456
    assert manifest.model.shape.startswith("Qwen3ForCausalLM layers=36 hidden=4096")
    assert (manifest.device.capability_major, manifest.device.capability_minor) == (8, 6)


def test_the_control_draws_from_whole_cells_of_two_axes_whatever_came_before(tmp_path: Path) -> None:
    parsed = read_llm_emu(_file(tmp_path, document()))
    write_llm_emu(parsed, ImportOptions(control="auto"), tmp_path / "pack", created=NOW)
    oracle = open_oracle(read_pack(tmp_path / "pack")[1])
    for previous in (0, 128):
        decode = StepQuery((), (), 1, 1, 500, 500, 1, previous, 0)
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
    digests = {write_llm_emu(parsed, ImportOptions(), tmp_path / name, created=NOW).digest for name in ("a", "b")}
    assert len(digests) == 1


def with_context(**changes: Any) -> dict[str, Any]:
    """`document` with 3-D tables: the middle sample of (1, 2) is from 6,144 KV tokens."""
    return document(
        decode_3d_distribution=[
            {"tt": 1, "conc": 2, "kv": 2048, "num_samples": 2, "samples": [5000.1, 90000.0]},
            {"tt": 1, "conc": 2, "kv": 6144, "num_samples": 1, "samples": [4000.2]},
            {"tt": 8, "conc": 7, "kv": 10240, "num_samples": 1, "samples": [6000.0]},
        ],
        prefill_3d_distribution=[{"tt": 128, "conc": 2, "kv": 2048, "num_samples": 2, "samples": [12000.0, 11000.0]}],
        **changes,
    )


def test_context_of_the_3d_tables_keeps_the_order_of_the_samples(tmp_path: Path) -> None:
    parsed = read_llm_emu(_file(tmp_path, with_context()))
    assert parsed.context_tokens is not None
    assert parsed.context_tokens.tolist() == [2048, 6144, 2048, 10240, 2048, 2048]
    assert parsed.columns["latency_ns"].tolist()[:3] == [5_000_100, 4_000_200, 90_000_000]
    assert not parsed.left_out
    write_llm_emu(parsed, ImportOptions(min_samples=1), tmp_path / "pack", created=NOW)
    manifest = check_pack(tmp_path / "pack").manifest
    assert manifest.latency.sampled is not None
    assert manifest.latency.sampled.context_bucket_width == 4096
    oracle = open_oracle(read_pack(tmp_path / "pack")[1])
    deep = StepQuery((), (), 1, 1, 5000, 5000, 1, 0, 0)
    assert {oracle.answer(deep, 7, step).latency_ns for step in range(50)} == {4_000_200}


@pytest.mark.parametrize(
    "decode",
    [
        [{"tt": 1, "conc": 2, "kv": 2048, "num_samples": 1, "samples": [5000.1]}],
        [
            {"tt": 1, "conc": 2, "kv": 2048, "num_samples": 3, "samples": [90000.0, 5000.1, 4000.2]},
            {"tt": 8, "conc": 7, "kv": 2048, "num_samples": 1, "samples": [6000.0]},
        ],
    ],
    ids=["samples are missing", "in another order"],
)
def test_3d_tables_of_other_samples_are_left_out_and_named(decode: list[dict[str, Any]], tmp_path: Path) -> None:
    content = {**with_context(), "decode_3d_distribution": decode}
    parsed = read_llm_emu(_file(tmp_path, content))
    assert parsed.context_tokens is None
    assert parsed.left_out == ("prefill_3d_distribution", "decode_3d_distribution")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=40))
def test_every_interleaving_is_taken_apart(items: list[tuple[int, int]]) -> None:
    parts = [[float(value) for part, value in items if part == number] for number in range(4)]
    whole = [float(value) for _, value in items]
    taken = interleave(whole, parts)
    assert taken is not None
    assert [[value for value, of in zip(whole, taken, strict=True) if of == number] for number in range(4)] == parts


def test_a_decode_step_after_prefill_draws_the_tail_and_others_the_body(tmp_path: Path) -> None:
    # As in published packs: every 15th sample of a stream of 16-token answers holds the rest of a prefill.
    samples = [12_400.0 if number % 15 == 0 else 5000.0 + number for number in range(60)]
    cells = [
        {"tt": 1, "conc": 2, "num_samples": 60, "samples": samples},
        # Two samples: the cell alone could not tell which is slow; its neighbour in tokens can.
        {"tt": 2, "conc": 2, "num_samples": 2, "samples": [5500.0, 20_000.0]},
    ]
    parsed = read_llm_emu(_file(tmp_path, document(decode_2d_distribution=cells)))
    report = write_llm_emu(parsed, ImportOptions(min_samples=1), tmp_path / "pack", created=NOW)
    assert (report.tail_samples, report.continuation_samples) == (5, 0)
    manifest = check_pack(tmp_path / "pack").manifest
    assert manifest.latency.transition
    oracle = open_oracle(read_pack(tmp_path / "pack")[1])
    for previous, expected in ((0, {5000.0 + n for n in range(60) if n % 15}), (512, {12_400.0})):
        decode = StepQuery((), (), 1, 1, 500, 500, 1, previous, 0)
        drawn = {oracle.answer(decode, 7, step).latency_ns / 1000 for step in range(2000)}
        assert drawn == expected
    record = oracle.decode_record(1, 500, 500)
    assert record is not None
    assert record.not_after_prefill, "no lease may leave the transition out"
    assert 12_400_000 not in record.latency_pool_ns


def test_a_chunk_that_goes_on_is_a_prefill_step(tmp_path: Path) -> None:
    cells = [*document()["decode_2d_distribution"], {"tt": 512, "conc": 2, "num_samples": 1, "samples": [70_000.0]}]
    parsed = read_llm_emu(_file(tmp_path, document(decode_2d_distribution=cells)))
    report = write_llm_emu(parsed, ImportOptions(min_samples=1), tmp_path / "pack", created=NOW)
    assert report.continuation_samples == 1
    oracle = open_oracle(read_pack(tmp_path / "pack")[1])
    continued = StepQuery((511,), (64,), 1, 1, 400, 400, 2, 511, 0)
    assert oracle.answer(continued, 7, 0).latency_ns == 70_000_000


def test_a_pack_without_tails_has_no_transition(tmp_path: Path) -> None:
    cells = [{"tt": 1, "conc": 2, "num_samples": 3, "samples": [5000.0, 5001.0, 5002.0]}]
    parsed = read_llm_emu(_file(tmp_path, document(decode_2d_distribution=cells)))
    assert write_llm_emu(parsed, ImportOptions(), tmp_path / "pack", created=NOW).tail_samples == 0
    assert not check_pack(tmp_path / "pack").manifest.latency.transition


@pytest.mark.parametrize(
    ("control", "neighbors", "fixed"), [("k1", "nearest", 0), ("k7", "joint", 7), ("auto", "joint", 0)]
)
def test_a_control_is_llm_emus_rule_and_stands_in_the_manifest(
    control: str, neighbors: str, fixed: int, tmp_path: Path
) -> None:
    parsed = read_llm_emu(_file(tmp_path, with_context()))
    write_llm_emu(parsed, ImportOptions(control=control, min_samples=50), tmp_path / "pack", created=NOW)
    report, compiled = read_pack(tmp_path / "pack")
    rules = report.manifest.latency.sampled
    assert rules is not None
    assert (rules.neighbors or "joint", rules.fixed_buckets or 0) == (neighbors, fixed)
    assert (rules.min_samples, rules.max_buckets, rules.table_rule) == (50, 50, "new_requests")
    assert not report.manifest.latency.transition
    assert control.removeprefix("k") in report.manifest.provenance["control"]
    continued = StepQuery((4,), (64,), 4, 4, 400, 100, 5, 0, 0)
    assert open_oracle(compiled).answer(continued, 7, 0).latency_ns == 6_000_000, (
        "a chunk without a new request reads the decode table"
    )


@pytest.mark.parametrize("control", ["k0", "k", "k1025", "K1", "automatic", "1"])
def test_an_unknown_control_is_refused(control: str, tmp_path: Path) -> None:
    parsed = read_llm_emu(_file(tmp_path, document()))
    with pytest.raises(InvalidArgument, match="is none of k1"):
        write_llm_emu(parsed, ImportOptions(control=control), tmp_path / "pack", created=NOW)


def test_dropped_samples_are_a_correction(tmp_path: Path) -> None:
    parsed = read_llm_emu(_file(tmp_path, document()))
    report = write_llm_emu(parsed, ImportOptions(drop_longer_than_ms=50.0), tmp_path / "pack", created=NOW)
    checked = check_pack(tmp_path / "pack")
    assert (report.dropped_samples, checked.rows["samples.parquet"]) == (1, 5)
    assert [(one.name, one.value) for one in checked.manifest.corrections] == [("drop_longer_than_ms", 50.0)]


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
