"""Makes a composed pack from aiconfigurator-core's operator tables: no GPU, no capture, only a model's config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from oracle_server import pack
from oracle_server.errors import InvalidArgument
from profiler.aiconfigurator import OperatorModel, System, library_root, library_version, read_system, table_digests
from profiler.corrections import Correction, StepTerms, corrected, schedules_asynchronously, step_terms
from profiler.kv_blocks import OVERHEAD_BYTES, estimate_kv_blocks
from profiler.model_config import KV_CACHE_DTYPES, ModelConfig, read_model_config
from profiler.operators import GridLimits, Link, Operator, columns_of, evaluate_operators, manifest_operators
from profiler.silicon_tables import EXTRAPOLATED, SiliconTables
from profiler.uncertainty import Uncertainty, uncertainty_of

# Of a step's latency around its median, log-normal: vLLM 0.15.1 decode steps of two H100 runs (0.6-2.2 % seen).
RESIDUAL_SIGMA = 0.012
RESIDUAL_COUNT = 256

KvBasis = Literal["measured", "estimated", "assumed"]


@dataclass(frozen=True)
class SynthesisRequest:
    """What the user asks for; None means that the pack is not tied to a value."""

    system: str
    model_directory: Path
    tensor_parallel: int = 1
    vllm_version: str | None = None
    async_scheduling: bool | None = None
    # None: estimate.
    kv_blocks: int | None = None
    kv_blocks_basis: KvBasis = "assumed"
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    kv_cache_dtype: str = "auto"
    link: Link | None = None
    allow_transferred: bool = False
    corrections: bool = True
    name: str | None = None


@dataclass(frozen=True)
class Synthesis:
    """Everything a pack is written from, before it is written."""

    request: SynthesisRequest
    system: System
    model: ModelConfig
    operators: tuple[Operator, ...]
    terms: StepTerms
    corrections: tuple[Correction, ...]
    # None: nothing like the device was compared with a run.
    uncertainty: Uncertainty | None
    kv_blocks: int
    kv_basis: KvBasis
    kv_source: str
    table_digests: Mapping[str, str]
    # Operators answered from another device's or shape's table.
    transferred: tuple[str, ...]


def synthesize(request: SynthesisRequest) -> Synthesis:
    """Evaluates the operators, corrects them and settles the KV blocks. Deterministic for one library version.

    Raises InvalidArgument for a system, model or option that cannot be synthesized, FailedPrecondition where the
    library is absent.
    """
    _check(request)
    library_root()
    system = read_system(request.system)
    model = replace(
        read_model_config(request.model_directory, dtype=request.dtype), kv_cache_dtype=request.kv_cache_dtype
    )
    tensor_parallel = request.tensor_parallel
    if model.num_heads % tensor_parallel:
        raise InvalidArgument(
            f"{model.num_heads} attention heads cannot be split over tensor parallel {tensor_parallel}", field="tp"
        )
    source = OperatorModel(
        model.directory,
        system,
        tensor_parallel,
        transferred=request.allow_transferred,
        kv_cache_dtype=request.kv_cache_dtype,
    )
    tables = SiliconTables(system, model, tensor_parallel)
    defaults = GridLimits()
    limits = GridLimits(
        tokens=max(defaults.tokens, request.max_num_batched_tokens or 0),
        requests=max(defaults.requests, request.max_num_seqs or 0),
        context=max(defaults.context, request.max_model_len or 0),
    )
    operators = evaluate_operators(
        source, tables, model, tensor_parallel=tensor_parallel, limits=limits, link=request.link
    )
    terms, corrections = StepTerms(), list[Correction]()
    if request.corrections:
        operators, corrections = corrected(operators, source, model, tensor_parallel)
        terms, more = step_terms(system, request.vllm_version, request.async_scheduling)
        corrections += more
    corrections.append(_residual_correction())
    if request.link is not None and tensor_parallel > 1:
        corrections.append(_link_correction(request.link))
    blocks, basis, sentence = _kv_blocks(request, system, model)
    if basis == "estimated":
        corrections.append(_overhead_correction())
    transferred = tuple(sorted({name for operator in operators for name in operator.transferred}))
    return Synthesis(
        request=request,
        system=system,
        model=model,
        operators=tuple(operators),
        terms=terms,
        corrections=tuple(corrections),
        uncertainty=uncertainty_of(
            system,
            tensor_parallel,
            has_link=request.link is not None,
            has_experts=model.num_experts > 0,
            is_corrected=request.corrections,
            is_transferred=bool(transferred),
        ),
        kv_blocks=blocks,
        kv_basis=basis,
        kv_source=sentence,
        table_digests=table_digests(tables.paths),
        transferred=transferred,
    )


def write_synthesis(synthesis: Synthesis, directory: Path, *, created: datetime | None = None) -> str:
    """Writes the pack into `directory`, which must not exist, and returns its digest."""
    manifest = _manifest(synthesis, created or datetime.now(UTC))
    return pack.write_pack(
        directory,
        manifest,
        operators=columns_of(synthesis.operators),
        residuals={"ratio": residual_pool()},
    )


def _manifest(synthesis: Synthesis, created: datetime) -> pack.Manifest:
    request, system, model = synthesis.request, synthesis.system, synthesis.model
    by_name = {operator.name: operator for operator in synthesis.operators}
    terms = synthesis.terms
    return pack.Manifest(
        name=request.name or f"{system.name}-{model.model_id.replace('/', '--')}-tp{request.tensor_parallel}",
        kind="composed",
        created=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        licence="Apache-2.0",
        model=pack.Model(
            id=model.model_id,
            shape=model.shape,
            dtype=model.dtype,
            quantization=model.quantization,
            kv_cache_dtype=model.kv_cache_dtype,
        ),
        device=pack.Device(
            name=system.device_name,
            memory_bytes=system.memory_bytes,
            capability_major=system.capability[0],
            capability_minor=system.capability[1],
            count=request.tensor_parallel,
        ),
        parallel=pack.Parallel(tensor=request.tensor_parallel),
        engine=pack.Engine(
            vllm_version=request.vllm_version,
            max_model_len=request.max_model_len,
            max_num_seqs=request.max_num_seqs,
            max_num_batched_tokens=request.max_num_batched_tokens,
            async_scheduling=_async_scheduling(request),
            # Only an estimated block count follows from it.
            gpu_memory_utilization=request.gpu_memory_utilization if synthesis.kv_basis == "estimated" else None,
        ),
        kv_cache=pack.KvCache(
            blocks=synthesis.kv_blocks,
            block_size=request.block_size,
            bytes_per_token=model.kv_bytes_per_token_of_rank(request.tensor_parallel),
            basis=synthesis.kv_basis,
            source=synthesis.kv_source,
        ),
        latency=pack.Latency(
            composed=pack.ComposedLatency(
                operators=manifest_operators(synthesis.operators),
                skew_decode=terms.skew_decode,
                skew_mixed=terms.skew_mixed,
                mixed_decode_factor=terms.mixed_decode_factor,
                # The part of a prefill's attention that does not depend on its length, paid once per step.
                launch_floor_ns=float(by_name["context_attention"].latency_ns[0, 0]),
                host_ns_per_step=float(terms.host_ns_per_step),
                host_ns_per_sequence=float(terms.host_ns_per_sequence),
            )
        ),
        coverage=_coverage(by_name),
        corrections=tuple(
            pack.Correction(name=item.name, value=float(item.value), reason=item.reason, source=item.source)
            for item in synthesis.corrections
        ),
        uncertainty=_uncertainty(synthesis.uncertainty),
        provenance=_provenance(synthesis),
    )


def _uncertainty(stated: Uncertainty | None) -> pack.Uncertainty | None:
    if stated is None:
        return None
    return pack.Uncertainty(low_percent=stated.low_percent, high_percent=stated.high_percent, basis=stated.basis)


def _async_scheduling(request: SynthesisRequest) -> bool | None:
    """What the host term assumes; None where neither an option nor a version tied it."""
    if request.async_scheduling is not None or request.vllm_version is None:
        return request.async_scheduling
    return schedules_asynchronously(request.vllm_version)


def _coverage(operators: Mapping[str, Operator]) -> dict[str, str | int | float | bool]:
    """The largest value of each axis, stored and measured."""
    decode = operators["generation_attention"]
    known = decode.knowledge != EXTRAPOLATED
    requests, contexts = (np.asarray(axis) for axis in decode.points)
    return {
        "total_tokens": operators["dense_gemm"].points[0][-1],
        "decode_requests": int(requests[-1]),
        "context_tokens": int(contexts[-1]),
        "chunk_tokens": operators["context_attention"].points[0][-1],
        "history_tokens": operators["context_attention"].points[1][-1],
        "measured_decode_kv_tokens": int((requests[:, None] * contexts[None, :])[known].max(initial=0)),
    }


def _provenance(synthesis: Synthesis) -> dict[str, str]:
    request, system = synthesis.request, synthesis.system
    entries = {
        "source": f"aiconfigurator-core {library_version()}, system {system.name}, vLLM tables {system.table_version}",
        "notice": "operator tables of aiconfigurator-core, Copyright NVIDIA Corporation and affiliates, Apache-2.0",
    }
    if synthesis.transferred:
        entries["transferred"] = ", ".join(synthesis.transferred)
    if request.tensor_parallel > 1:
        entries["link"] = "given by the user" if request.link is not None else "the machine the tables were taken on"
    return entries | {f"sha256 {path}": digest for path, digest in sorted(synthesis.table_digests.items())}


def residual_pool(sigma: float = RESIDUAL_SIGMA, count: int = RESIDUAL_COUNT) -> NDArray[np.float32]:
    """`count` equally likely ratios (float32), the mid-quantiles of a log-normal, scaled to mean 1."""
    normal = NormalDist()
    ratios = np.array([math.exp(sigma * normal.inv_cdf((index + 0.5) / count)) for index in range(count)])
    pool: NDArray[np.float32] = (ratios / ratios.mean()).astype(np.float32)
    return pool


def _check(request: SynthesisRequest) -> None:
    positive: Sequence[tuple[str, int | None]] = (
        ("tp", request.tensor_parallel),
        ("kv_blocks", request.kv_blocks),
        ("block_size", request.block_size),
        ("max_num_batched_tokens", request.max_num_batched_tokens),
        ("max_num_seqs", request.max_num_seqs),
        ("max_model_len", request.max_model_len),
    )
    for field, value in positive:
        if value is not None and value < 1:
            raise InvalidArgument(f"{field} is {value}; it has to be at least 1", field=field)
    if request.kv_cache_dtype not in KV_CACHE_DTYPES:
        raise InvalidArgument(
            f"kv_cache_dtype is {request.kv_cache_dtype!r}; tables know {' and '.join(KV_CACHE_DTYPES)}",
            field="kv_cache_dtype",
        )
    if not 0.0 < request.gpu_memory_utilization <= 1.0:
        raise InvalidArgument(
            f"gpu_memory_utilization is {request.gpu_memory_utilization}; it lies in (0, 1]",
            field="gpu_memory_utilization",
        )
    if request.link is not None and (request.link.bytes_per_s <= 0 or request.link.latency_s < 0):
        raise InvalidArgument("the link needs a positive bandwidth and a latency of at least 0", field="link")


def _kv_blocks(request: SynthesisRequest, system: System, model: ModelConfig) -> tuple[int, KvBasis, str]:
    if request.kv_blocks is not None:
        return request.kv_blocks, request.kv_blocks_basis, "given to synthesize by its user"
    estimate = estimate_kv_blocks(
        model,
        memory_bytes=system.memory_bytes,
        tensor_parallel=request.tensor_parallel,
        gpu_memory_utilization=request.gpu_memory_utilization,
        max_num_batched_tokens=request.max_num_batched_tokens or 2048,
        block_size=request.block_size,
    )
    return estimate.blocks, "estimated", estimate.sentence


def _residual_correction() -> Correction:
    return Correction(
        "residual_sigma",
        RESIDUAL_SIGMA,
        f"steps of one shape scatter log-normally; {RESIDUAL_COUNT} equally likely ratios of mean 1",
        "robust deviation of vLLM 0.15.1 decode steps on H100, two runs (0.6-2.2 %); no heavy tail is modelled",
    )


def _overhead_correction() -> Correction:
    return Correction(
        "kv_overhead_gib",
        round(OVERHEAD_BYTES / 2**30, 2),
        "memory that neither weights, activations, NCCL nor KV cache hold",
        "fits three measured block counts within 1 % (H100 TP2 and TP4, RTX 4090)",
    )


def _link_correction(link: Link) -> Correction:
    return Correction(
        "link_gbytes_per_s",
        link.bytes_per_s / 1e9,
        f"all-reduce over the emulated machine's own link, {link.latency_s * 1e6:g} us for a small message",
        "given to synthesize by its user",
    )
