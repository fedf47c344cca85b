"""Which measured closed loops are replayed, which are left out and why, and what is sent for one."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from oracle_server.errors import FailedPrecondition
from profiler.model_config import read_model_config
from profiler.silicon_points import SiliconRows, default_path, read_rows, speed_of_light_share, summarize
from profiler.silicon_replays import requests_of

pytest.importorskip("aiconfigurator_core", reason="the `synthesize` extra is not installed")

ROW = {
    "id": "row",
    "silicon_data_source": "source_file=public.csv; silicon_concurrency=8",
    "backend": "vllm",
    "backend_version": "",
    "model_path": "meta-llama/Llama-3.1-70B",
    "system": "h200_sxm",
    "mode": "agg",
    "isl": "1024",
    "osl": "1024",
    "gemm_quant_mode": "fp8",
    "tp_size": "4.0",
    "silicon_ttft_ms": "101.1",
    "silicon_tpot_ms": "10.1",
}


def _rows(folder: Path, *rows: Mapping[str, str]) -> SiliconRows:
    path = folder / "silicon_sample.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROW)
        writer.writeheader()
        writer.writerows([{**ROW, **row} for row in rows])
    return read_rows(path)


def _reason(folder: Path, **row: str) -> str:
    rows = _rows(folder, row)
    assert not rows.points
    return rows.screened[0][1]


def test_a_row_becomes_a_point(tmp_path: Path) -> None:
    (point,) = _rows(tmp_path, {}).points
    assert (point.concurrency, point.tensor_parallel, point.prompt_tokens) == (8, 4, 1024)
    assert point.source_file == "public.csv"


def test_a_launch_script_adds_an_8_bit_cache_and_static_scales(tmp_path: Path) -> None:
    h200, h100 = _rows(tmp_path, {}, {"system": "h100_sxm"}).points
    (config, cache), (_, h100_cache) = h200.launched(), h100.launched()
    assert (cache, h100_cache) == ("fp8", "auto")
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert h200.config["quantization_config"] == {"quant_method": "fp8", "activation_scheme": "dynamic"}


def test_other_backends_are_left_away_and_mixtures_counted(tmp_path: Path) -> None:
    rows = _rows(tmp_path, {"backend": "sglang"}, {"model_path": "openai/gpt-oss-120b"})
    assert (rows.points, rows.screened) == ((), ())
    assert rows.mixtures == {"openai/gpt-oss-120b": 1}


def test_a_disaggregated_row_is_left_out(tmp_path: Path) -> None:
    assert "engines of their own" in _reason(tmp_path, mode="disagg", tp_size="")


def test_a_row_that_states_no_concurrency_is_left_out(tmp_path: Path) -> None:
    assert _reason(tmp_path, silicon_data_source="source_file=public.csv") == "states no concurrency"


def test_a_row_that_waits_for_kv_blocks_is_left_out(tmp_path: Path) -> None:
    assert "TTFT 40 s" in _reason(tmp_path, silicon_ttft_ms="39807")


def test_one_row_faster_than_light_discredits_the_concurrency_of_its_whole_file(tmp_path: Path) -> None:
    impossible = {"id": "fast", "silicon_data_source": "source_file=other.csv; silicon_concurrency=512"}
    rows = _rows(
        tmp_path, impossible, {"id": "same", "silicon_data_source": "source_file=other.csv; silicon_concurrency=8"}, {}
    )
    assert [point.id for point in rows.points] == ["row"]
    assert [point.id for point, _ in rows.screened] == ["fast", "same"]
    assert "fast needs" in rows.screened[1][1]


def test_the_speed_of_light_counts_linear_layers_and_one_read_of_the_cache(tmp_path: Path) -> None:
    (point,) = _rows(tmp_path, {}).points
    weights = 80 * (8192 * 128 * (2 * 64 + 2 * 8) + 3 * 8192 * 28672)
    flops = 8 * 2048 * 2 * weights / 4
    read_bytes = 8 * 1024 * 1536 * 2 * 80 * 8 * 128 / 4
    least_s = flops / 1978e12 + read_bytes / 4.8e12
    assert speed_of_light_share(point) == pytest.approx(least_s / (0.1011 + 0.0101 * 1023))


def test_a_changed_file_is_refused_with_the_row(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"'row'.*int9"):
        _rows(tmp_path, {"gemm_quant_mode": "int9"})


def test_the_installed_file_has_no_row_that_is_neither_replayed_nor_named() -> None:
    rows = read_rows()
    with default_path().open(newline="") as file:
        dense = {
            row["id"]
            for row in csv.DictReader(file)
            if row["backend"] == "vllm" and ("Llama-3.1" in row["model_path"] or "Qwen3-32B" in row["model_path"])
        }
    named = [point.id for point in rows.points] + [point.id for point, _ in rows.screened]
    assert sorted(named) == sorted(dense)
    assert all(reason for _, reason in rows.screened)
    # What is left is nowhere near what hardware can do.
    assert max(speed_of_light_share(point) for point in rows.points) < 0.5


def test_configurations_are_the_public_ones(tmp_path: Path) -> None:
    rows = read_rows()
    models = {}
    for point in [*rows.points, *(point for point, _ in rows.screened)]:
        (tmp_path / "config.json").write_text(json.dumps(point.config))
        config = read_model_config(tmp_path)
        models[point.model, point.weight_format] = (
            config.weight_format,
            round(config.weight_bytes_of_rank(1) / 1e9, 1),
        )
    assert models["meta-llama/Llama-3.1-70B", "fp8"] == ("fp8", 72.7)
    assert models["meta-llama/Llama-3.1-70B", "nvfp4"] == ("nvfp4", 42.7)
    assert models["nvidia/Llama-3.1-8B-Instruct-FP8", "fp8"] == ("fp8", 9.1)
    assert models["Qwen/Qwen3-32B", ""] == ("bfloat16", 65.5)


def test_nothing_is_added_to_rows_whose_launch_nobody_published() -> None:
    (point, *_) = (point for point in read_rows().points if point.model == "Qwen/Qwen3-32B")
    assert point.launched() == (point.config, "auto")


def test_lengths_are_drawn_from_four_fifths_to_all_of_the_stated_ones(tmp_path: Path) -> None:
    (point,) = _rows(tmp_path, {}).points
    requests = requests_of(point)
    assert len(requests) == 80
    for lengths in ([r.prompt_tokens for r in requests], [r.output_tokens for r in requests]):
        assert 819 <= min(lengths) < 840 < 1000 < max(lengths) <= 1024
    assert requests == requests_of(point)


def test_users_of_long_outputs_send_fewer_requests(tmp_path: Path) -> None:
    (point,) = _rows(tmp_path, {"osl": "8192"}).points
    assert len(requests_of(point)) == 16


def test_a_summary_keeps_the_sign_of_errors() -> None:
    summary = summarize([-10.0, -2.0, 4.0])
    assert (summary.count, summary.median) == (3, -2.0)
    assert [summary.mean, summary.mape] == pytest.approx([-8 / 3, 16 / 3])
    assert [summary.p10, summary.p90] == pytest.approx([-8.4, 2.8])
