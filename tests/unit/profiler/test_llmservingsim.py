"""Import of LLMServingSim bundles: what is composed from the tables, and which tables are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import decode_query, mixed_query
from bundles import (
    CHUNKS,
    CONFIG,
    CONTEXTS,
    HISTORIES,
    LAYERS,
    META,
    NOW,
    PER_LAYER,
    REQUESTS,
    RUN,
    Rows,
    attention_us,
    build_bundle,
    dense_us,
    request,
    tables,
    write_tables,
)
from oracle_server.errors import InvalidArgument
from oracle_server.pack import check_pack, open_oracle
from profiler.cli import main
from profiler.llmservingsim import read_bundle
from profiler.llmservingsim_link import RingLink
from profiler.llmservingsim_pack import write_bundle
from profiler.llmservingsim_tables import DeclaredGrid, attention_operators, parse_axis, skew_coefficients
from profiler.surface import read_pack


def test_a_step_costs_the_sum_of_its_measured_layers(tmp_path: Path) -> None:
    build_bundle(tmp_path)
    write_bundle(read_bundle(request(tmp_path)), tmp_path / "pack", created=NOW)
    oracle = open_oracle(read_pack(tmp_path / "pack")[1])

    def dense(tokens: int, rows: int) -> float:
        layers = sum(dense_us(layer, tokens) for layer in PER_LAYER) + dense_us("layernorm", tokens)
        ends = dense_us("embedding", tokens) + dense_us("final_layernorm", tokens)
        return LAYERS * layers + ends + dense_us("lm_head", rows) + dense_us("sampler", rows)

    decode = oracle.answer(decode_query(1, 16), 0, 0)
    assert decode.latency_ns == round(1e3 * (dense(1, 1) + LAYERS * attention_us(0, 0, 1, 16)))
    assert (decode.support, decode.knowledge) == (1, 1)
    prefill = oracle.answer(mixed_query([(64, 16)]), 0, 0)
    assert prefill.latency_ns == round(1e3 * (dense(64, 1) + LAYERS * attention_us(64, 16, 0, 0)))
    mixed = oracle.answer(mixed_query([(16, 32)], 2, 64), 0, 0)
    assert mixed.latency_ns == round(1e3 * (dense(18, 3) + LAYERS * attention_us(16, 32, 2, 32)))
    assert mixed.knowledge == 2


def test_the_pack_says_what_the_bundle_says(tmp_path: Path) -> None:
    build_bundle(tmp_path)
    digest = write_bundle(read_bundle(request(tmp_path, licence="MIT")), tmp_path / "pack", created=NOW)
    report = check_pack(tmp_path / "pack")
    manifest = report.manifest
    assert report.digest == digest
    assert not report.warnings or all("dense_gemm" in warning for warning in report.warnings)
    assert (manifest.model.id, manifest.licence, manifest.parallel.tensor) == ("test/llama", "MIT", 1)
    assert (manifest.device.name, manifest.device.memory_bytes) == ("Test GPU", 24 << 30)
    assert (manifest.device.capability_major, manifest.device.capability_minor) == (8, 9)
    assert manifest.engine.vllm_version == "0.19.0"
    cache = manifest.kv_cache
    assert (cache.blocks, cache.block_size, cache.basis) == (123, 16, "measured")
    assert cache.bytes_per_token == 2 * LAYERS * 2 * 16 * 2
    composed = manifest.latency.composed
    assert composed is not None
    assert composed.launch_floor_ns == pytest.approx(1e3 * LAYERS * attention_us(16, 0, 0, 0))
    assert manifest.coverage["mixed_decode_requests"] == 2
    assert {"sha256 dense.csv", "sha256 meta.yaml"} <= set(manifest.provenance)


@pytest.mark.parametrize("folder", ["tp1", "operators/tp1", "operators", "."])
def test_the_published_layouts_are_found(folder: str, tmp_path: Path) -> None:
    directory = build_bundle(tmp_path, folder=folder)
    if folder.startswith("operators"):
        (directory / "meta.yaml").rename(directory / "operators" / "meta.yaml")
    assert len(read_bundle(request(tmp_path)).operators) == 7


def test_skew_is_the_weighted_least_squares_share(tmp_path: Path) -> None:
    write_tables(tmp_path, tables())
    pure, mixed = skew_coefficients(tmp_path / "skew.csv")
    assert [pure.coefficient, mixed.coefficient] == pytest.approx([0.04, 0.06])
    assert [pure.rows, pure.standard_error] == pytest.approx([3, 0.0], abs=1e-9)
    # Rows weigh by their relative size: scaling one batch changes nothing, and rows without a spread do not count.
    rows = [["pure", 10.0, 20.0, 11.0], ["pure", 1000.0, 2000.0, 1200.0], ["pure", 10.0, 10.0, 99.0]]
    write_tables(tmp_path, {"skew.csv": [*rows, *[["mixed", *row[1:]] for row in rows]]})
    pure, _ = skew_coefficients(tmp_path / "skew.csv")
    assert [pure.coefficient, pure.rows] == pytest.approx([0.15, 2])
    assert pure.standard_error == pytest.approx(math.sqrt(0.05**2 * 2 / 1 / 2))


def test_a_bundle_without_skew_has_none_and_says_so(tmp_path: Path) -> None:
    content = tables()
    del content["skew.csv"]
    build_bundle(tmp_path, content)
    write_bundle(read_bundle(request(tmp_path)), tmp_path / "pack", created=NOW)
    manifest = check_pack(tmp_path / "pack").manifest
    assert manifest.latency.composed is not None
    assert manifest.latency.composed.skew_mixed == 0.0
    assert "no skew.csv" in manifest.provenance["skew"]


def test_axes_are_read_as_meta_yaml_writes_them() -> None:
    assert parse_axis("0, 16-2048 x2")[:4] == (0, 16, 32, 64)
    assert parse_axis("16-2048 x1.5") == (16, 24, 36, 54, 81, 122, 182, 273, 410, 615, 923, 1384, 2048)
    assert parse_axis("1-256 x2")[-1] == 256


def test_a_coordinate_of_another_pass_joins_an_axis_only_where_it_fills_the_grid(tmp_path: Path) -> None:
    content = tables()
    for n in REQUESTS:
        content["attention.csv"].append([0, 0, n, 24, attention_us(0, 0, n, 24)])
    content["attention.csv"].append([24, 0, 0, 0, attention_us(24, 0, 0, 0)])
    write_tables(tmp_path, content)
    declared = DeclaredGrid((0, *CHUNKS), (0, *REQUESTS), HISTORIES)
    operators = {
        operator.name: operator
        for operator in attention_operators(tmp_path / "attention.csv", 1, declared, most_sequences=4)
    }
    assert operators["generation_attention"].points == (REQUESTS, (16, 24, 32))
    assert operators["context_attention"].points == (CHUNKS, HISTORIES)
    assert operators["mixed_attention"].points == (CHUNKS, HISTORIES, REQUESTS[:-1], CONTEXTS)


def _edit(name: str, change: Callable[[Rows], Any]) -> dict[str, Rows]:
    content = tables()
    change(content[name])
    return content


FAULTS: dict[str, tuple[str, Callable[[Rows], Any], str]] = {
    "a missing layer": (
        "dense.csv",
        lambda rows: rows.__setitem__(slice(None), [row for row in rows if row[0] != "o_proj"]),
        "dense.csv has no rows for the layer 'o_proj'",
    ),
    "a missing sampler": (
        "per_sequence.csv",
        lambda rows: rows.__setitem__(slice(None), [row for row in rows if row[0] != "sampler"]),
        "per_sequence.csv has no rows for the layer 'sampler'",
    ),
    "an unknown layer": (
        "dense.csv",
        lambda rows: rows.append(["moe_router", 1, 3.0]),
        "how often a step runs the layer 'moe_router' is not known",
    ),
    "a gap in a layer": ("dense.csv", lambda rows: rows.pop(1), "no row for qkv_proj at 16 tokens, where o_proj"),
    "a cut table": (
        "dense.csv",
        lambda rows: rows.__setitem__(slice(None), [row for row in rows if row[1] < 64]),
        "dense.csv ends at 16 tokens; meta.yaml says it was profiled up to 64",
    ),
    "too few sequences": (
        "per_sequence.csv",
        lambda rows: rows.__setitem__(slice(None), [row for row in rows if row[1] < 4]),
        "per_sequence.csv ends at 1 sequences",
    ),
    "a gap in decode attention": (
        "attention.csv",
        lambda rows: rows.pop(3),
        "no row for prefill_chunk=0, kv_prefill=0, n_decode=2, kv_decode=32",
    ),
    "a gap beside a chunk": (
        "attention.csv",
        lambda rows: rows.remove([32, 16, 2, 16, attention_us(32, 16, 2, 16)]),
        "no row for prefill_chunk=32, kv_prefill=16, n_decode=2, kv_decode=16",
    ),
    "no mixed rows at all": (
        "attention.csv",
        lambda rows: rows.__setitem__(slice(None), [row for row in rows if not (row[0] and row[2])]),
        "no row for prefill_chunk=16, kv_prefill=0, n_decode=1, kv_decode=16",
    ),
    "NaN": ("dense.csv", lambda rows: rows[4].__setitem__(2, "nan"), "dense.csv, line 6: time_us is 'nan'"),
    "an empty time": ("dense.csv", lambda rows: rows[4].__setitem__(2, ""), "dense.csv, line 6: time_us is ''"),
    "infinity": (
        "attention.csv",
        lambda rows: rows[0].__setitem__(4, "inf"),
        "attention.csv, line 2: time_us is 'inf'",
    ),
    "a negative time": ("per_sequence.csv", lambda rows: rows[3].__setitem__(2, -1.5), "line 5: time_us is '-1.5'"),
    "a time of zero": (
        "attention.csv",
        lambda rows: rows[9].__setitem__(4, 0),
        "attention.csv, line 11: time_us is '0'",
    ),
    "a negative coordinate": ("attention.csv", lambda rows: rows[2].__setitem__(3, -16), "line 4: kv_decode is '-16'"),
    "half a token": ("dense.csv", lambda rows: rows[2].__setitem__(1, 1.5), "dense.csv, line 4: tokens is '1.5'"),
    "no token": ("dense.csv", lambda rows: rows[0].__setitem__(1, 0), "dense.csv, line 2: tokens is 0"),
    "a row given twice": (
        "attention.csv",
        lambda rows: rows.append(rows[5]),
        "line 53: prefill_chunk=0, kv_prefill=0, n_decode=4, kv_decode=32 is given twice, first in line 7",
    ),
    "a layer's row given twice": (
        "dense.csv",
        lambda rows: rows.append(["act_fn", 16, 9.0]),
        "line 29: act_fn at 16 tokens is given twice, first in line 21",
    ),
    "a context without a request": (
        "attention.csv",
        lambda rows: rows.append([16, 0, 0, 16, 5.0]),
        "prefill_chunk=16, kv_prefill=0, n_decode=0, kv_decode=16 is no batch",
    ),
    "a cut row": ("dense.csv", lambda rows: rows[2].pop(), "dense.csv, line 4: the row is cut"),
    "an unknown regime": ("skew.csv", lambda rows: rows[0].__setitem__(0, "odd"), "skew.csv, line 2: the regime 'odd'"),
    "a skew beyond the longest": (
        "skew.csv",
        lambda rows: rows.__setitem__(slice(None), [[*row[:3], row[2] * 2] for row in rows]),
        "a share between 0 and 1",
    ),
    "a skew that speeds up": (
        "skew.csv",
        lambda rows: rows.__setitem__(slice(None), [[*row[:3], row[1] / 2] for row in rows]),
        "a share between 0 and 1",
    ),
    "NaN in the skew": ("skew.csv", lambda rows: rows[1].__setitem__(2, "nan"), "skew.csv, line 3: t_max_us is 'nan'"),
    "no rows": ("dense.csv", lambda rows: rows.clear(), "dense.csv has no rows"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_table_is_refused_with_the_row_at_fault(fault: str, tmp_path: Path) -> None:
    name, change, message = FAULTS[fault]
    build_bundle(tmp_path, _edit(name, change))
    with pytest.raises(InvalidArgument) as refused:
        read_bundle(request(tmp_path))
    assert message in str(refused.value)
    assert refused.value.field == name


def test_a_table_without_a_column_or_no_table_is_refused(tmp_path: Path) -> None:
    directory = build_bundle(tmp_path)
    (directory / "tp1" / "dense.csv").write_text("layer,tokens\nqkv_proj,1\n")
    with pytest.raises(InvalidArgument, match=r"dense\.csv, line 1: no column time_us"):
        read_bundle(request(tmp_path))
    (directory / "tp1" / "dense.csv").unlink()
    with pytest.raises(InvalidArgument, match=r"the bundle has no dense\.csv"):
        read_bundle(request(tmp_path))


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({}, {"tensor_parallel": 2}, "holds no operator tables .* for --tp 2; there is tp1"),
        ({"tp_degrees": [2]}, {}, r"--tp 1, but the bundle was profiled for tensor parallel 2 \(tp_degrees"),
        ({"tp_degrees": []}, {"tensor_parallel": 3}, "holds no operator tables"),
    ],
)
def test_tables_of_another_tensor_parallel_size_are_refused(
    changes: dict[str, Any], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    build_bundle(tmp_path, meta=changes)
    with pytest.raises(InvalidArgument, match=message):
        read_bundle(request(tmp_path, **fields))


def test_where_the_tables_do_not_say_their_tensor_parallel_size_run_or_folder_has_to(tmp_path: Path) -> None:
    link = RingLink(16e9, 1e-6, "test")
    directory = build_bundle(tmp_path, meta={"tp_degrees": [1, 2]}, folder="operators")
    (directory / "meta.yaml").rename(directory / "operators" / "meta.yaml")
    asked = request(tmp_path, tensor_parallel=2, link=link, kv_blocks_assumed=10)
    with pytest.raises(InvalidArgument, match=r"the tables are of tensor parallel 1 \(run/meta.json\)"):
        read_bundle(asked)
    (directory / "run" / "meta.json").unlink()
    with pytest.raises(InvalidArgument, match="cannot be told"):
        read_bundle(asked)


def test_the_config_of_another_model_is_refused(tmp_path: Path) -> None:
    build_bundle(tmp_path)
    (tmp_path / "llama.json").write_text(json.dumps(CONFIG | {"intermediate_size": 256}))
    with pytest.raises(InvalidArgument, match=r"another model .* intermediate_size 128 instead of 256"):
        read_bundle(request(tmp_path))


def test_tables_of_another_dtype_are_refused(tmp_path: Path) -> None:
    build_bundle(tmp_path, meta={"variant": "fp16"})
    with pytest.raises(InvalidArgument, match="variant fp16; the config says bfloat16"):
        read_bundle(request(tmp_path))


def test_the_kv_blocks_of_a_run_with_another_tensor_parallel_size_are_not_taken(tmp_path: Path) -> None:
    directory = build_bundle(tmp_path, meta={"tp_degrees": [1, 2], "engine_effective": {}})
    write_tables(directory / "tp2", tables())
    asked = request(tmp_path, tensor_parallel=2, link=RingLink(16e9, 1e-6, "test"))
    with pytest.raises(InvalidArgument, match="does not say how many KV blocks"):
        read_bundle(asked)
    bundle = read_bundle(request(tmp_path))
    assert (bundle.kv_cache.blocks, bundle.kv_cache.basis) == (123, "measured")


def test_the_kv_blocks_of_a_run_of_several_data_parallel_ranks_are_not_taken(tmp_path: Path) -> None:
    """vLLM adds them up, and the record does not say whether it is that sum; a run of one says it for each of two."""
    directory = build_bundle(tmp_path)
    assert read_bundle(request(tmp_path, data_parallel=2)).kv_cache.blocks == 123
    run = RUN | {"engine_kwargs": RUN["engine_kwargs"] | {"data_parallel_size": 2}}
    (directory / "run" / "meta.json").write_text(json.dumps(run))
    for ranks in (1, 2):
        with pytest.raises(InvalidArgument, match=r"\(its run was of data parallel 2\)"):
            read_bundle(request(tmp_path, data_parallel=ranks))


def test_two_ranks_add_a_ring_all_reduce_twice_a_layer(tmp_path: Path) -> None:
    overrides = {"num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 256}
    meta = {"tp_degrees": [2], "engine_effective": {**META["engine_effective"], "hf_overrides": overrides}}
    build_bundle(tmp_path, meta=meta, run=None, folder="tp2")
    link = RingLink(16e9, 5e-6, "test")
    asked = request(tmp_path, tensor_parallel=2, kv_blocks=77, device_memory_bytes=1 << 30, link=link)
    bundle = read_bundle(asked)
    # Two ranks: 2 hops, each with half of the message, in 16 gigabytes per second.
    message_bytes = 16 * 64 * 2
    all_reduce_us = 2 * (5 + 1e6 * (message_bytes / 2) / 16e9)
    write_bundle(bundle, tmp_path / "pack", created=NOW)
    oracle = open_oracle(read_pack(tmp_path / "pack")[1])
    dense = LAYERS * (sum(dense_us(layer, 16) for layer in PER_LAYER) + dense_us("layernorm", 16))
    ends = sum(dense_us(layer, 16) for layer in ("embedding", "final_layernorm"))
    rows = dense_us("lm_head", 1) + dense_us("sampler", 1)
    attention = LAYERS * attention_us(16, 0, 0, 0)
    answer = oracle.answer(mixed_query([(16, 0)]), 0, 0)
    assert answer.latency_ns == round(1e3 * (dense + ends + rows + attention + 2 * LAYERS * all_reduce_us))
    assert answer.knowledge == 3
    manifest = check_pack(tmp_path / "pack").manifest
    assert (manifest.kv_cache.blocks, manifest.kv_cache.basis, manifest.device.count) == (77, "measured", 2)
    assert manifest.kv_cache.bytes_per_token == 2 * LAYERS * 1 * 16 * 2


def test_the_link_may_come_from_the_bundle_but_not_from_nowhere(tmp_path: Path) -> None:
    directory = build_bundle(tmp_path, meta={"tp_degrees": [2], "engine_effective": {}}, run=None, folder="tp2")
    asked = request(tmp_path, tensor_parallel=2, kv_blocks=77, device_memory_bytes=1 << 30)
    with pytest.raises(InvalidArgument, match="give --link-gbytes-per-s and --link-latency-us"):
        read_bundle(asked)
    (directory / "run").mkdir()
    (directory / "run" / "simulator_config.json").write_text(json.dumps({"link_bw": 16, "link_latency": 20000}))
    link = read_bundle(asked).link
    assert link is not None
    assert [link.bytes_per_s, link.latency_s] == pytest.approx([16e9, 20e-6])


@pytest.mark.parametrize(
    ("run", "fields", "expected"),
    [
        (RUN, {}, (123, "measured")),
        (RUN, {"kv_blocks": 123}, (123, "measured")),
        (RUN, {"kv_blocks_assumed": 500}, (500, "assumed")),
        (None, {"kv_blocks": 500, "device_memory_bytes": 1}, (500, "measured")),
        ({"resolved_config": {"cache_config": {"num_gpu_blocks": 9}}}, {"device_memory_bytes": 1}, (9, "measured")),
    ],
)
def test_kv_blocks_are_the_runs_or_the_users(
    run: dict[str, Any] | None, fields: dict[str, Any], expected: tuple[int, str], tmp_path: Path
) -> None:
    build_bundle(tmp_path, run=run)
    cache = read_bundle(request(tmp_path, **fields)).kv_cache
    assert (cache.blocks, cache.basis) == expected


@pytest.mark.parametrize(
    ("run", "fields", "message"),
    [
        (None, {"device_memory_bytes": 1}, "does not say how many KV blocks"),
        (RUN, {"kv_blocks": 124}, "--kv-blocks 124, but the bundle's run had 123"),
        (RUN, {"kv_blocks": 1, "kv_blocks_assumed": 1}, "give one"),
        (None, {"kv_blocks": 1}, "--device-memory-gib"),
        (RUN, {"link": RingLink(1e9, 0.0, "test")}, "with --tp 1 and --dp 1 there is one only"),
        (RUN, {"link": RingLink(math.nan, 0.0, "test"), "tensor_parallel": 2}, "a bandwidth above 0"),
        (RUN, {"device_memory_bytes": math.nan}, "nan bytes of memory"),
        (RUN, {"device_memory_bytes": math.inf}, "inf bytes of memory"),
        (RUN, {"graph_capture_sizes": (0, 8)}, "at least 1"),
    ],
)
def test_kv_blocks_memory_and_links_are_never_invented(
    run: dict[str, Any] | None, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    build_bundle(tmp_path, run=run)
    with pytest.raises(InvalidArgument, match=message):
        read_bundle(request(tmp_path, **fields))


def test_the_terms_beside_the_operators_are_named(tmp_path: Path) -> None:
    build_bundle(tmp_path)
    asked = request(tmp_path, host_ns_per_step=300_000.0, graph_capture_sizes=(1, 2, 4), data_parallel=2)
    write_bundle(read_bundle(asked), tmp_path / "pack", created=NOW)
    manifest = check_pack(tmp_path / "pack").manifest
    composed = manifest.latency.composed
    assert composed is not None
    assert (composed.host_ns_per_step, composed.graph_capture_sizes) == (300_000.0, (1, 2, 4))
    assert manifest.parallel.data == 2
    assert [correction.name for correction in manifest.corrections] == ["skew_decode", "skew_mixed", "host_ns_per_step"]


def test_the_command_writes_a_pack_and_tells_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = build_bundle(tmp_path)
    arguments = ["import", "llmservingsim", str(directory), "--model-config", str(tmp_path / "llama.json"), "--tp", "1"]
    assert main([*arguments, "-o", str(tmp_path / "pack")]) == 0
    told = capsys.readouterr().out
    assert "KV blocks: 123 of 16 tokens, measured" in told
    assert "mixed_attention      3 x 3 x 2 x 2 points, measured 100 %" in told
    assert "decode 0.0400, mixed 0.0600" in told
    assert main([*arguments, "--kv-blocks", "5", "-o", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()
    assert main([*arguments, "--link-latency-us", "5", "-o", str(tmp_path / "other")]) == 2
