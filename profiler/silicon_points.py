"""Closed loops that others measured with vLLM: which of them a replay can be held against, and why not the others.

aiconfigurator-core ships `silicon_sample.csv`: model, system, tensor parallelism, prompt and output tokens,
concurrency, mean TTFT and TPOT. It holds no engine arguments; what is known of them stands here with its source.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from oracle_server.errors import FailedPrecondition
from profiler.aiconfigurator import library_root

_LLAMA: Final[Mapping[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
# config.json of the dense models, without what costs no time.
DENSE_MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "meta-llama/Llama-3.1-70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "nvidia/Llama-3.1-8B-Instruct-FP8": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "Qwen/Qwen3-32B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "max_position_embeddings": 40960,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
    },
}
_QUANTIZATION: Final[Mapping[str, Mapping[str, Any]]] = {
    "": {},
    "fp8": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
    "nvfp4": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
}

# What InferenceMAX's launch scripts (benchmarks/70b_fp8_{h200_slurm,b200_docker,h100_docker}.sh) add to the
# Llama-3.1-70B rows: `kv-cache-dtype: fp8` on H200 and B200, not on H100. `--quantization=modelopt`, whose activations
# have static scales, is stated for H100 only and assumed of the others. Overload rows confirm the cache: TTFT tells
# when it is full, at 99 % of an 8-bit cache on H200 TP1 (197 % of a 16-bit one) and 95 to 101 % of a 16-bit one on
# H100 TP2. Of other models' launches nothing is known.
_LAUNCHED_MODEL: Final = "meta-llama/Llama-3.1-70B"
_LAUNCHED_WITH_FP8_CACHE: Final = ("h200_sxm", "b200_sxm")
_STATIC_FP8: Final[Mapping[str, Any]] = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}

# Rows that the host term of synchronous scheduling was fitted on (corrections.py): no test of it.
_FITTED_MODEL: Final = "Qwen/Qwen3-32B"
_FITTED_TOKENS: Final = 1024
_FITTED_CONCURRENCIES: Final = (8, 32, 128)

# Mean TTFT from which users wait for KV blocks: such a row says how many there are, not how long a step takes.
OVERLOAD_TTFT_MS: Final = 5000.0


@dataclass(frozen=True)
class SiliconPoint:
    """One row: a closed loop of `concurrency` users on one engine."""

    id: str
    source_file: str
    model: str
    system: str
    # "" where the row has none.
    vllm_version: str
    # "" for the model's dtype.
    weight_format: str
    tensor_parallel: int
    prompt_tokens: int
    output_tokens: int
    # 0 where the row states none.
    concurrency: int
    ttft_ms: float
    tpot_ms: float
    is_disaggregated: bool

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the model, quantized as the row says."""
        return {**DENSE_MODELS[self.model], **_QUANTIZATION[self.weight_format]}

    def launched(self) -> tuple[dict[str, Any], str]:
        """As `config`, and the KV cache's dtype, with what is known of the launch beyond the row."""
        if self.model != _LAUNCHED_MODEL:
            return self.config, "auto"
        config = {**self.config, **_STATIC_FP8} if self.weight_format == "fp8" else self.config
        return config, "fp8" if self.system in _LAUNCHED_WITH_FP8_CACHE else "auto"

    @property
    def is_fitted(self) -> bool:
        """Whether a correction of the packs was fitted on this row."""
        tokens = (self.prompt_tokens, self.output_tokens)
        return (
            self.model == _FITTED_MODEL
            and not self.weight_format
            and tokens == (_FITTED_TOKENS, _FITTED_TOKENS)
            and self.concurrency in _FITTED_CONCURRENCIES
        )

    @property
    def label(self) -> str:
        return f"{self.prompt_tokens} in, {self.output_tokens} out, {self.concurrency} users"


@dataclass(frozen=True)
class SiliconRows:
    """All vLLM rows: those to replay, and (row, reason) of the dense ones that are left out."""

    points: tuple[SiliconPoint, ...]
    screened: tuple[tuple[SiliconPoint, str], ...]
    # Rows of each other model.
    mixtures: Mapping[str, int]

    def narrowed(self, text: str) -> SiliconRows:
        """The rows whose id contains `text`."""
        return SiliconRows(
            tuple(point for point in self.points if text in point.id),
            tuple((point, reason) for point, reason in self.screened if text in point.id),
            {} if text else self.mixtures,
        )


def default_path() -> Path:
    return library_root() / "systems" / "silicon_sample.csv"


def read_rows(path: Path | None = None) -> SiliconRows:
    """Reads and screens; `path` None: the file of the installed library. In the order of the file."""
    path = path or default_path()
    dense: list[SiliconPoint] = []
    mixtures: dict[str, int] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["backend"] != "vllm":
                continue
            if row["model_path"] in DENSE_MODELS:
                dense.append(_point(path, row))
            else:
                mixtures[row["model_path"]] = mixtures.get(row["model_path"], 0) + 1
    impossible = _impossible_files(dense)
    points, screened = [], []
    for point in dense:
        reason = _reason_against(point, impossible)
        if reason:
            screened.append((point, reason))
        else:
            points.append(point)
    return SiliconRows(tuple(points), tuple(screened), mixtures)


def speed_of_light_share(point: SiliconPoint) -> float:
    """Least time one engine needs for the row's work at the datasheet's rates, over the time the row took.

    Linear layers of all tokens at the peak of the tensor cores, and after them (kernels of one stream do not overlap)
    the KV cache of all output tokens at 8 bits and full memory bandwidth. Everything else is free.
    """
    config, peak = point.config, _peaks(point)
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    weights = layers * hidden * (head_dim * (2 * heads + 2 * kv_heads) + 3 * config["intermediate_size"])
    flops = 2 * weights * (point.prompt_tokens + point.output_tokens)
    read_bytes = (
        2 * layers * kv_heads * head_dim * point.output_tokens * (point.prompt_tokens + point.output_tokens / 2)
    )
    least_s: float = point.concurrency * (flops / peak[0] + read_bytes / peak[1]) / point.tensor_parallel
    return least_s / (1e-3 * (point.ttft_ms + point.tpot_ms * (point.output_tokens - 1)))


@dataclass(frozen=True)
class ErrorSummary:
    """Signed errors of a group of rows, in percent."""

    count: int
    mape: float
    mean: float
    median: float
    p10: float
    p90: float


def summarize(errors_percent: Sequence[float]) -> ErrorSummary:
    values = np.asarray(errors_percent, dtype=np.float64)
    p10, median, p90 = (float(value) for value in np.percentile(values, (10, 50, 90)))
    return ErrorSummary(len(values), float(np.abs(values).mean()), float(values.mean()), median, p10, p90)


def _point(path: Path, row: Mapping[str, str]) -> SiliconPoint:
    try:
        stated = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
        file = re.search(r"source_file=([^;]*)", row["silicon_data_source"])
        weight_format = row["gemm_quant_mode"]
        if weight_format not in _QUANTIZATION:
            raise ValueError(f"gemm_quant_mode {weight_format!r} is not known")
        return SiliconPoint(
            id=row["id"],
            source_file=Path(file[1]).name if file else "",
            model=row["model_path"],
            system=row["system"],
            vllm_version=row["backend_version"],
            weight_format=weight_format,
            tensor_parallel=int(float(row["tp_size"] or 0)),
            prompt_tokens=int(row["isl"]),
            output_tokens=int(row["osl"]),
            concurrency=int(stated[1]) if stated else 0,
            ttft_ms=float(row["silicon_ttft_ms"]),
            tpot_ms=float(row["silicon_tpot_ms"]),
            is_disaggregated=row["mode"] == "disagg",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FailedPrecondition(
            f"{path}: row {row.get('id')!r} is not as in aiconfigurator-core 0.12: {error}"
        ) from error


def _impossible_files(points: Iterable[SiliconPoint]) -> Mapping[str, tuple[str, float]]:
    """The worst row of each source file that has one no engine can have produced."""
    worst: dict[str, tuple[str, float]] = {}
    for point in points:
        if point.concurrency and not point.is_disaggregated:
            share = speed_of_light_share(point)
            if share > max(1.0, worst.get(point.source_file, ("", 0.0))[1]):
                worst[point.source_file] = (point.id, share)
    return worst


def _reason_against(point: SiliconPoint, impossible: Mapping[str, tuple[str, float]]) -> str:
    """Empty for a row to replay."""
    if point.is_disaggregated:
        return "prefill and decode on engines of their own"
    if not point.concurrency:
        return "states no concurrency"
    if point.source_file in impossible:
        row, share = impossible[point.source_file]
        return (
            f"its file's concurrency is not one engine's: {row.rsplit('_', 4)[0]} needs {share:.2f} times the speed of "
            "light"
        )
    if point.ttft_ms >= OVERLOAD_TTFT_MS:
        return f"overloaded: TTFT {point.ttft_ms / 1e3:.0f} s is a wait for KV blocks"
    return ""


def _peaks(point: SiliconPoint) -> tuple[float, float]:
    """FLOP/s of the weight format and bytes/s of memory, by the library's datasheet values."""
    import yaml  # type: ignore[import-untyped]  # a dependency of aiconfigurator-core

    described = yaml.safe_load((library_root() / "systems" / f"{point.system}.yaml").read_text(encoding="utf-8"))["gpu"]
    name = {"": "bfloat16_tc_flops", "fp8": "fp8_tc_flops", "nvfp4": "fp4_tc_flops"}[point.weight_format]
    return float(described[name]), float(described["mem_bw"])
