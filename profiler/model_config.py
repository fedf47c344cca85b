"""What a model's bare config.json says about its cost: dimensions, shape line, weight and KV bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle_server.errors import InvalidArgument

_MAX_CONFIG_BYTES = 1 << 20
_OPTIONAL_DIMENSIONS = (
    "intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_experts",
    "num_local_experts",
    "moe_intermediate_size",
)
_BYTES_PER_ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4}
# vLLM's --kv-cache-dtype as far as tables know it; auto is the model's dtype.
KV_CACHE_DTYPES = ("auto", "fp8")
# nvfp4 has one 8-bit scale for 16 weights; int4 (AWQ, GPTQ) about as much.
_BYTES_PER_WEIGHT = {**_BYTES_PER_ELEMENT, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5625, "int4": 0.5625}


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a decoder-only transformer; counts are of the whole model, not of one rank."""

    directory: Path
    model_id: str
    shape: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    dtype: str
    # "" without quantization; else the method as vLLM names it.
    quantization: str
    # Of the quantized layers: a dtype, "fp8", "fp8_block" (scales per block of weights), "nvfp4", "int4" or "unknown".
    weight_format: str
    tied_embeddings: bool
    # 0 for a dense model.
    num_experts: int
    expert_intermediate_size: int
    # What the engine is told, one of KV_CACHE_DTYPES; no property of the checkpoint.
    kv_cache_dtype: str = "auto"
    # Experts each token chooses, layers that have experts, and whether a layer has some that every token runs.
    experts_per_token: int = 0
    num_moe_layers: int = 0
    has_shared_experts: bool = False

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token over all ranks, keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self._kv_element_bytes

    def kv_bytes_per_token_of_rank(self, tensor_parallel: int) -> int:
        """As `kv_bytes_per_token`, on one tensor-parallel rank; ranks beyond the KV heads hold copies."""
        heads = max(1, self.num_kv_heads // tensor_parallel)
        return 2 * self.num_layers * heads * self.head_dim * self._kv_element_bytes

    @property
    def _kv_element_bytes(self) -> int:
        return 1 if self.kv_cache_dtype == "fp8" else _BYTES_PER_ELEMENT[self.dtype]

    def weight_bytes_of_rank(self, tensor_parallel: int) -> float:
        """Bytes of weights on one tensor-parallel rank; norms, biases and scales (below 0.1 %) are left out.

        Raises InvalidArgument for a quantization whose bytes per weight we do not know.
        """
        weight_bytes = _BYTES_PER_WEIGHT.get(self.weight_format)
        if weight_bytes is None:
            raise InvalidArgument(
                f"how much memory weights of quantization {self.quantization!r} take is not known; give --kv-blocks",
                field="kv_blocks",
            )
        kv_heads = max(tensor_parallel, self.num_kv_heads)
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * kv_heads)
        if self.num_experts:
            ffn = self.num_experts * (3 * self.expert_intermediate_size + 1) * self.hidden_size
        else:
            ffn = 3 * self.intermediate_size * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        embedding_bytes = embeddings * _BYTES_PER_ELEMENT[self.dtype]
        return (self.num_layers * (attention + ffn) * weight_bytes + embedding_bytes) / tensor_parallel


def read_model_config(directory: Path, *, dtype: str | None = None) -> ModelConfig:
    """Reads `directory`/config.json; `dtype` overrides the one the checkpoint states.

    Raises InvalidArgument for a directory without config.json, a config that is no JSON object, lacks a dimension, or
    whose dtype or quantization we have no bytes for.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise InvalidArgument(
            f"{directory} has no config.json; --model takes a local directory with the model's config.json, "
            "never a name on a model hub",
            field="model",
        )
    return read_model_config_file(path, dtype=dtype)


def read_model_config_file(path: Path, *, dtype: str | None = None) -> ModelConfig:
    """As `read_model_config`, from a config.json of any name; the model's id is the name of its directory."""
    if not path.is_file():
        raise InvalidArgument(f"{path} is no file; a model's local config.json is needed", field="model")
    directory = path.parent
    raw = _read_object(path)
    for name in _OPTIONAL_DIMENSIONS:
        if raw.get(name) is not None:
            _dimension(raw, name, path)
    heads = _dimension(raw, "num_attention_heads", path)
    hidden = _dimension(raw, "hidden_size", path)
    num_experts = int(raw.get("num_experts") or raw.get("num_local_experts") or 0)
    vocab_size = _dimension(raw, "vocab_size", path)
    num_layers = _dimension(raw, "num_hidden_layers", path)
    resolved_dtype = dtype or str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if resolved_dtype not in _BYTES_PER_ELEMENT:
        raise InvalidArgument(
            f"dtype {resolved_dtype!r} is not one of {', '.join(sorted(_BYTES_PER_ELEMENT))}", field="dtype"
        )
    quantization, weight_format = _quantization(raw, directory, resolved_dtype)
    return ModelConfig(
        directory=directory.resolve(),
        model_id=directory.resolve().name,
        shape=model_shape(raw),
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=int(raw.get("intermediate_size") or 0),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        vocab_size=vocab_size,
        max_position_embeddings=int(raw.get("max_position_embeddings") or 0),
        dtype=resolved_dtype,
        quantization=quantization,
        weight_format=weight_format,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        num_experts=num_experts,
        expert_intermediate_size=int(raw.get("moe_intermediate_size") or raw.get("intermediate_size") or 0),
        experts_per_token=_count(raw, "num_experts_per_tok") if num_experts else 0,
        num_moe_layers=_num_moe_layers(raw, num_layers) if num_experts else 0,
        has_shared_experts=bool(raw.get("n_shared_experts") or raw.get("shared_expert_intermediate_size")),
    )


def _num_moe_layers(raw: Mapping[str, Any], num_layers: int) -> int:
    """Qwen leaves experts out of `mlp_only_layers` and of all but every `decoder_sparse_step`-th layer; others of the
    first `first_k_dense_replace`."""
    stated = raw.get("mlp_only_layers")
    dense = stated if isinstance(stated, list) else []
    first, step = _count(raw, "first_k_dense_replace"), _count(raw, "decoder_sparse_step") or 1
    return sum(i >= first and i not in dense and (i + 1) % step == 0 for i in range(num_layers))


def _count(raw: Mapping[str, Any], name: str) -> int:
    """A positive integer; 0 where it is absent or something else."""
    value = raw.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def model_shape(config: Mapping[str, Any]) -> str:
    """The line an engine reports as EngineConfig.model_shape, from config.json alone.

    Two values that config.json may leave out follow the defaults the configuration classes put in their place, because
    the engine reports the filled-in configuration: KV heads default to the heads, head_dim to hidden / heads.
    """
    heads = int(config.get("num_attention_heads") or 0)
    hidden = int(config.get("hidden_size") or 0)
    architectures = config.get("architectures") or [""]
    fields = {
        "layers": config.get("num_hidden_layers") or 0,
        "hidden": hidden,
        "intermediate": config.get("intermediate_size") or 0,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or (hidden // heads if heads else 0),
        "vocab": config.get("vocab_size") or 0,
    }
    return " ".join([str(architectures[0]), *(f"{name}={int(value)}" for name, value in fields.items())])


def _quantization(raw: Mapping[str, Any], directory: Path, dtype: str) -> tuple[str, str]:
    """Method and weight format, from config.json or from ModelOpt's hf_quant_config.json beside it."""
    stated = raw.get("quantization_config")
    if isinstance(stated, dict) and stated.get("quant_method"):
        method = str(stated["quant_method"])
        if method == "fp8":
            return method, "fp8_block" if stated.get("weight_block_size") else "fp8"
        algorithm = str(stated.get("quant_algo") or "")
        if method in ("awq", "gptq"):
            return method, "int4" if stated.get("bits") == 4 else "unknown"
        if method == "compressed-tensors":
            return method, _compressed_format(stated)
        return _modelopt(algorithm) if method == "modelopt" else (method, _MODELOPT_FORMATS.get(algorithm, "unknown"))
    beside = directory / "hf_quant_config.json"
    if not beside.is_file():
        return "", dtype
    inner = _read_object(beside).get("quantization")
    algorithm = str(inner.get("quant_algo") or "") if isinstance(inner, dict) else ""
    return _modelopt(algorithm)


def _modelopt(algorithm: str) -> tuple[str, str]:
    """vLLM (0.18 to 0.33) has a method of its own for ModelOpt's 4-bit checkpoints."""
    return "modelopt_fp4" if algorithm == "NVFP4" else "modelopt", _MODELOPT_FORMATS.get(algorithm, "unknown")


def _compressed_format(stated: Mapping[str, Any]) -> str:
    """The one format of all groups of layers."""
    groups = stated.get("config_groups")
    if not isinstance(groups, dict):
        return "unknown"
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    kinds = {(item.get("type"), item.get("num_bits")) for item in weights if isinstance(item, dict)}
    if len(kinds) != 1 or len(weights) != len(groups):
        return "unknown"
    formats: dict[tuple[object, object], str] = {("float", 8): "fp8", ("int", 4): "int4"}
    return formats.get(kinds.pop(), "unknown")


_MODELOPT_FORMATS = {"FP8": "fp8", "NVFP4": "nvfp4"}


def _read_object(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise InvalidArgument(f"{path} is larger than 1 MiB, so it is no model config", field="model")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path} is not JSON: {error}", field="model") from error
    if not isinstance(raw, dict):
        raise InvalidArgument(f"{path} is not a JSON object", field="model")
    return raw


def _dimension(raw: Mapping[str, Any], name: str, path: Path) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise InvalidArgument(
            f"{path}: {name} is {value!r}; a positive integer is needed (multimodal configs that nest it are not "
            "supported)",
            field="model",
        )
    return value
