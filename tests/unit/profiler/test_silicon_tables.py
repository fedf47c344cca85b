"""Labels of grid points, from tables of a few rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiler.aiconfigurator import System
from profiler.model_config import ModelConfig, read_model_config
from profiler.silicon_tables import EXTRAPOLATED, INTERPOLATED, MEASURED, MODELLED, SiliconTables

# Hidden 64, 4 heads of 16, 2 KV heads, intermediate 96: a rank multiplies by (128, 64), (64, 64), (192, 64), (64, 96).
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "torch_dtype": "bfloat16",
}
_SHAPES = [(128, 64), (64, 64), (192, 64), (64, 96), (512, 64)]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def _gemm(shapes: list[tuple[int, int]], tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k} for n, k in shapes for m in tokens]


def _attention(cells: list[tuple[int, int, int]], **columns: Any) -> list[dict[str, Any]]:
    shape = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "kv_cache_dtype": "bfloat16"} | columns
    return [{"batch_size": batch, "isl": isl, "step": step} | shape for batch, isl, step in cells]


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(_CONFIG))
    return read_model_config(tmp_path)


@pytest.fixture
def system(tmp_path: Path) -> System:
    data = tmp_path / "data"
    _write(data / "gemm/vllm/1.2.0/gemm_perf.parquet", _gemm(_SHAPES, (1, 16, 64)))
    decode = [(1, 1, 15), (1, 1, 31), (4, 1, 15), (4, 1, 31), (8, 1, 15)]
    _write(data / "attention/vllm/1.2.0/generation_attention_perf.parquet", _attention(decode, window_size=0))
    prefill = _attention([(1, 16, 0), (1, 256, 0)])
    _write(data / "attention/vllm/1.2.0/context_attention_perf.parquet", prefill)
    _write(
        data / "comm/vllm/1.1.0/custom_allreduce_perf.parquet",
        [{"num_gpus": 2, "message_size": size} for size in (64, 6400)],
    )
    return System("made", "1.2.0", "Made", 1 << 30, (9, 0), 450e9, data)


def test_a_token_count_of_the_table_is_measured_and_one_between_is_not(system: System, model: ModelConfig) -> None:
    tables = SiliconTables(system, model, 1)
    assert tables.measured_tokens == (1, 16, 64)
    assert [tables.dense_gemm(tokens) for tokens in (1, 16, 17, 64, 65)] == [
        MEASURED,
        MEASURED,
        INTERPOLATED,
        MEASURED,
        EXTRAPOLATED,
    ]


def test_the_weakest_matrix_gives_the_label(system: System, model: ModelConfig) -> None:
    wider = replace(model, intermediate_size=160)
    assert SiliconTables(system, wider, 1).dense_gemm(16) == EXTRAPOLATED
    between = replace(model, intermediate_size=80)
    assert SiliconTables(system, between, 1).dense_gemm(16) == INTERPOLATED


def test_a_vocabulary_beyond_the_table_is_modelled(system: System, model: ModelConfig) -> None:
    assert SiliconTables(system, model, 1).logits(16) == MEASURED
    assert SiliconTables(system, replace(model, vocab_size=5000), 1).logits(16) == MODELLED


def test_decode_points_need_measured_neighbours_on_all_sides(system: System, model: ModelConfig) -> None:
    tables = SiliconTables(system, model, 1)
    assert tables.generation_attention(4, 16) == MEASURED
    assert tables.generation_attention(2, 20) == INTERPOLATED
    # 8 requests were measured at context 16 alone.
    assert tables.generation_attention(6, 20) == EXTRAPOLATED
    assert tables.generation_attention(6, 16) == INTERPOLATED
    assert tables.generation_attention(4, 33) == EXTRAPOLATED


def test_heads_nobody_measured_are_extrapolated(system: System, model: ModelConfig) -> None:
    assert SiliconTables(system, replace(model, num_kv_heads=4), 1).generation_attention(4, 16) == EXTRAPOLATED


def test_a_chunk_is_modelled_up_to_the_longest_measured_prompt(system: System, model: ModelConfig) -> None:
    tables = SiliconTables(system, model, 1)
    assert tables.context_attention(16, 0) == MODELLED
    assert tables.context_attention(200, 56) == MODELLED
    assert tables.context_attention(200, 57) == EXTRAPOLATED


def test_an_older_table_is_read_where_the_own_version_has_none(system: System, model: ModelConfig) -> None:
    tables = SiliconTables(system, model, 2)
    assert [tables.all_reduce(tokens) for tokens in (1, 50, 100, 101)] == [
        MEASURED,
        INTERPOLATED,
        MEASURED,
        EXTRAPOLATED,
    ]
    assert any("1.1.0" in path.parts for path in tables.paths)


def test_experts_are_modelled_at_best(system: System, model: ModelConfig) -> None:
    tables = SiliconTables(system, replace(model, num_experts=64), 1)
    assert tables.dense_gemm(16) == MODELLED
