"""What is read from a model's config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oracle_server.errors import InvalidArgument
from profiler.kv_blocks import estimate_kv_blocks
from profiler.model_config import ModelConfig, model_shape, read_model_config

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
LLAMA_8B = QWEN3_8B | {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
CODELLAMA_34B = LLAMA_8B | {
    "num_hidden_layers": 48,
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_attention_heads": 64,
    "vocab_size": 32000,
}


def _read(folder: Path, config: dict[str, Any], **files: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return read_model_config(folder)


def test_the_shape_line_is_the_one_of_the_proto_comment() -> None:
    assert model_shape(QWEN3_8B) == (
        "Qwen3ForCausalLM layers=36 hidden=4096 intermediate=12288 heads=32 kv_heads=8 head_dim=128 vocab=151936"
    )


def test_kv_heads_and_head_dim_default_as_the_configuration_classes_do() -> None:
    config = {key: value for key, value in LLAMA_8B.items() if key not in ("num_key_value_heads", "head_dim")}
    assert model_shape(config).split(" heads=")[1] == "32 kv_heads=32 head_dim=128 vocab=128256"


def test_an_absent_field_prints_as_zero() -> None:
    assert model_shape({"architectures": ["X"]}) == (
        "X layers=0 hidden=0 intermediate=0 heads=0 kv_heads=0 head_dim=0 vocab=0"
    )


def test_kv_bytes_of_a_rank_stop_shrinking_at_one_head(tmp_path: Path) -> None:
    model = _read(tmp_path, QWEN3_8B)
    assert model.kv_bytes_per_token_of_rank(1) == model.kv_bytes_per_token == 2 * 36 * 8 * 128 * 2
    assert model.kv_bytes_per_token_of_rank(8) == model.kv_bytes_per_token_of_rank(16) == 2 * 36 * 128 * 2


@pytest.mark.parametrize(
    ("config", "method", "weight_format"),
    [
        ({}, "", "bfloat16"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8", "fp8"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8", "fp8_block"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq", "int4"),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}},
                }
            },
            "compressed-tensors",
            "fp8",
        ),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors", "unknown"),
        ({"quantization_config": {"quant_method": "exotic"}}, "exotic", "unknown"),
    ],
)
def test_quantization_comes_from_the_config(
    config: dict[str, Any], method: str, weight_format: str, tmp_path: Path
) -> None:
    model = _read(tmp_path, QWEN3_8B | config)
    assert (model.quantization, model.weight_format) == (method, weight_format)


def test_modelopts_4_bit_checkpoints_have_vllms_own_name(tmp_path: Path) -> None:
    model = _read(tmp_path, QWEN3_8B | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}})
    assert (model.quantization, model.weight_format) == ("modelopt_fp4", "nvfp4")


def test_a_modelopt_file_beside_the_config_counts(tmp_path: Path) -> None:
    model = _read(tmp_path, QWEN3_8B, hf_quant_config={"quantization": {"quant_algo": "FP8"}})
    assert (model.quantization, model.weight_format) == ("modelopt", "fp8")


def test_the_name_of_the_directory_is_the_model_and_no_path_leaks(tmp_path: Path) -> None:
    assert _read(tmp_path, QWEN3_8B | {"_name_or_path": "/home/somebody/x"}).model_id == tmp_path.name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({key: value for key, value in QWEN3_8B.items() if key != "hidden_size"}), "hidden_size is None"),
        (json.dumps(QWEN3_8B | {"vocab_size": "many"}), "vocab_size is 'many'"),
        (json.dumps(QWEN3_8B | {"torch_dtype": "float8"}), "dtype 'float8'"),
    ],
)
def test_a_bad_config_is_refused_with_its_fault(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InvalidArgument, match=message):
        read_model_config(tmp_path)


def test_a_model_hub_name_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="never a name on a model hub"):
        read_model_config(Path("Qwen/Qwen3-8B"))


# Counts that real engines logged: H100 CodeLlama-34B TP2, H100 Llama-2-70B TP4, RTX 4090 Llama-3.1-8B (23.52 GiB).
@pytest.mark.parametrize(
    ("config", "tensor_parallel", "memory_gib", "logged"),
    [
        (CODELLAMA_34B, 2, 80.0, 26602),
        (CODELLAMA_34B | {"num_hidden_layers": 80, "intermediate_size": 28672}, 4, 80.0, 31356),
        (LLAMA_8B, 1, 23.52, 2588),
    ],
)
def test_estimated_kv_blocks_lie_within_two_percent_of_logged_ones(
    config: dict[str, Any], tensor_parallel: int, memory_gib: float, logged: int, tmp_path: Path
) -> None:
    estimate = estimate_kv_blocks(
        _read(tmp_path, config),
        memory_bytes=int(memory_gib * 2**30),
        tensor_parallel=tensor_parallel,
        gpu_memory_utilization=0.9,
        max_num_batched_tokens=2048,
        block_size=16,
    )
    assert estimate.blocks == pytest.approx(logged, rel=0.02)


def _estimate(model: ModelConfig) -> int:
    return estimate_kv_blocks(
        model,
        memory_bytes=24 << 30,
        tensor_parallel=1,
        gpu_memory_utilization=0.9,
        max_num_batched_tokens=2048,
        block_size=16,
    ).blocks


def test_a_model_that_does_not_fit_has_no_kv_blocks(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="does not fit"):
        _estimate(_read(tmp_path, CODELLAMA_34B))


def test_an_unknown_weight_format_asks_for_the_block_count(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="give --kv-blocks"):
        _estimate(_read(tmp_path, LLAMA_8B | {"quantization_config": {"quant_method": "exotic"}}))
