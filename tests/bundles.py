"""Small LLMServingSim bundles, dense and with experts."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from profiler.llmservingsim import ImportRequest

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LAYERS = 2
TOKENS = (1, 16, 64)
SEQUENCES = (1, 4)
CHUNKS, HISTORIES, REQUESTS, CONTEXTS = (16, 32, 64), (0, 16, 32), (1, 2, 4), (16, 32)
PER_LAYER = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "layernorm", "rotary_emb", "act_fn")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "torch_dtype": "bfloat16",
}
META: dict[str, Any] = {
    "profiler_version": "1.0.0",
    "vllm_version": "0.19.0",
    "gpu": "Test GPU",
    "hardware": "TESTGPU",
    "model": "test/llama",
    "tp_degrees": [1],
    "engine_effective": {
        "block_size": 16,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 4,
        "hf_overrides": {"num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 512},
    },
    "attention_grid": {"chunks": "0, 16-64 x2", "n_decode": "0, 1-4 x2", "kv": "0, 16-32 x2"},
    "measurement_iterations": 3,
}
RUN: dict[str, Any] = {
    "engine_kwargs": {"tensor_parallel_size": 1, "max_num_seqs": 4, "max_num_batched_tokens": 64},
    "kv_cache": {"num_gpu_blocks": 123, "block_size": 16, "gpu_memory_utilization": 0.9},
    "hardware": {"device_name": "Test GPU", "device_total_memory_bytes": 24 << 30, "device_capability": "8.9"},
}
Rows = list[list[Any]]


def dense_us(layer: str, tokens: int) -> float:
    return 10.0 + len(layer) + 0.5 * tokens


def attention_us(chunk: int, history: int, requests: int, context: int) -> float:
    return 5.0 + 0.01 * chunk * (chunk + 2 * history) + 0.002 * requests * context * (3 if chunk else 1)


def tables() -> dict[str, Rows]:
    """The rows of a bundle's CSV files, without their headers."""
    points = [(0, 0, n, kv) for n, kv in product(REQUESTS, CONTEXTS)]
    points += [(c, h, 0, 0) for c, h in product(CHUNKS, HISTORIES)]
    # As in a real profile: one request fewer beside a chunk.
    points += [(c, h, n, kv) for c, h, n, kv in product(CHUNKS, HISTORIES, REQUESTS[:-1], CONTEXTS)]
    skew: Rows = []
    for regime, share in (("pure", 0.04), ("mixed", 0.06)):
        for mean, longest in ((50.0, 80.0), (100.0, 130.0), (60.0, 200.0)):
            skew.append([regime, mean, longest, mean + share * (longest - mean)])
    return {
        "dense.csv": [
            [layer, t, dense_us(layer, t)] for layer in (*PER_LAYER, "embedding", "final_layernorm") for t in TOKENS
        ],
        "per_sequence.csv": [[layer, s, dense_us(layer, s)] for layer in ("lm_head", "sampler") for s in SEQUENCES],
        "attention.csv": [[*point, attention_us(*point)] for point in points],
        "skew.csv": skew,
    }


HEADERS = {
    "dense.csv": ["layer", "tokens", "time_us"],
    "per_sequence.csv": ["layer", "sequences", "time_us"],
    "attention.csv": ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"],
    "moe.csv": ["tokens", "activated_experts", "time_us"],
    "skew.csv": ["regime", "t_mean_us", "t_max_us", "t_skew_us"],
}


def write_tables(folder: Path, content: dict[str, Rows]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in content.items():
        text = io.StringIO()
        header = HEADERS[name]
        # Newer tables of experts say of which group.
        header = ["ep", *header] if name == "moe.csv" and rows and len(rows[0]) > len(header) else header
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        (folder / name).write_text(text.getvalue())


def build_bundle(
    root: Path,
    content: dict[str, Rows] | None = None,
    *,
    meta: dict[str, Any] | None = None,
    run: dict[str, Any] | None = RUN,
    folder: str = "tp1",
) -> Path:
    """A bundle in `root`/bundle and the model's config beside it."""
    directory = root / "bundle"
    write_tables(directory / folder, tables() if content is None else content)
    (directory / "meta.yaml").write_text(yaml.safe_dump(META | (meta or {})))
    if run is not None:
        (directory / "run").mkdir()
        (directory / "run" / "meta.json").write_text(json.dumps(run))
    (root / "llama.json").write_text(json.dumps(CONFIG))
    return directory


def request(root: Path, **fields: Any) -> ImportRequest:
    return ImportRequest(**{"directory": root / "bundle", "model_config": root / "llama.json", **fields})


# Qwen3-MoE in small: eight experts, two a token.
EXPERTS, EXPERTS_PER_TOKEN = 8, 2
EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 64)
MOE_CONFIG: dict[str, Any] = CONFIG | {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": EXPERTS_PER_TOKEN,
}
MOE_LAYER = ("qkv_proj", "o_proj", "layernorm", "rotary_emb")


def expert_us(tokens: int, experts: int, group: int = 1) -> float:
    """Grows with both, and not evenly."""
    return 20.0 + 6.0 * experts + (0.3 * tokens + 0.02 * tokens * experts) / group + (tokens * experts) % 7


def expert_rows(group: int = 1) -> Rows:
    """moe.csv of a rank of a group of that size: what its tokens can reach."""
    per_token = max(1, EXPERTS_PER_TOKEN // group)
    return [
        [tokens, experts, expert_us(tokens, experts, group)]
        for tokens in EXPERT_TOKENS
        for experts in (1, 2, 4, 8)
        if per_token <= experts <= min(EXPERTS // group, tokens * per_token)
    ]


def moe_tables(*groups: int) -> dict[str, Rows]:
    """As `tables`, of a model all of whose layers have experts; with `groups` moe.csv has a column for them."""
    content = tables()
    content["dense.csv"] = [
        row for row in content["dense.csv"] if row[0] not in ("gate_up_proj", "down_proj", "act_fn")
    ]
    content["moe.csv"] = [[group, *row] for group in groups for row in expert_rows(group)] if groups else expert_rows()
    return content


def moe_request(root: Path, content: dict[str, Rows] | None = None, **fields: Any) -> ImportRequest:
    """Writes a MoE bundle of one tensor-parallel rank below `root` and asks for it.

    The bundle's run is one of a single rank, whose KV blocks are none of data-parallel ones.
    """
    if fields.get("data_parallel", 1) > 1:
        fields = {"kv_blocks_assumed": 77, **fields}
    build_bundle(root, moe_tables() if content is None else content)
    (root / "llama.json").write_text(json.dumps(MOE_CONFIG))
    return request(root, **fields)
