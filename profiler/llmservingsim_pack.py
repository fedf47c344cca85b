"""Writes a bundle of LLMServingSim as a composed pack: its operators, and the terms beside them by name."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from oracle_server import pack
from profiler.llmservingsim import Bundle
from profiler.llmservingsim_run import positive_count, sub_mapping
from profiler.operators import Operator, columns_of, manifest_operators


def write_bundle(bundle: Bundle, directory: Path, *, created: datetime | None = None) -> str:
    """Writes `bundle` as a composed pack into `directory`, which must not exist, and returns its digest."""
    return pack.write_pack(
        directory, _manifest(bundle, created or datetime.now(UTC)), operators=columns_of(bundle.operators)
    )


def _manifest(bundle: Bundle, created: datetime) -> pack.Manifest:
    request, model = bundle.request, bundle.model
    by_name = {operator.name: operator for operator in bundle.operators}
    decode, mixed = bundle.skew or (None, None)
    return pack.Manifest(
        name=request.name or f"llmservingsim-{bundle.meta.get('hardware', 'device')}-tp{request.tensor_parallel}",
        kind="composed",
        created=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        licence=request.licence,
        model=pack.Model(
            id=str(bundle.meta.get("model") or model.model_id),
            shape=model.shape,
            dtype=model.dtype,
            quantization=model.quantization,
            kv_cache_dtype="auto",
        ),
        device=bundle.device,
        parallel=pack.Parallel(tensor=request.tensor_parallel, data=request.data_parallel),
        engine=_engine(bundle),
        kv_cache=bundle.kv_cache,
        latency=pack.Latency(
            composed=pack.ComposedLatency(
                operators=manifest_operators(bundle.operators),
                skew_decode=decode.coefficient if decode else 0.0,
                skew_mixed=mixed.coefficient if mixed else 0.0,
                # The smallest prefill, what a further one does not pay again.
                launch_floor_ns=float(by_name["context_attention"].latency_ns[0, 0]),
                host_ns_per_step=request.host_ns_per_step,
                host_ns_per_sequence=request.host_ns_per_sequence,
                graph_capture_sizes=request.graph_capture_sizes,
            )
        ),
        coverage=_coverage(by_name),
        corrections=_corrections(bundle),
        provenance=_provenance(bundle),
    )


def _engine(bundle: Bundle) -> pack.Engine:
    """Operators are tied to no limit of the scheduler; a measured block count is tied to what its engine reserved."""
    version = bundle.meta.get("vllm_version")
    measured_here = bundle.kv_cache.basis == "measured" and bundle.request.kv_blocks is None
    kwargs = sub_mapping(bundle.run, "engine_kwargs") if measured_here else {}
    utilization = sub_mapping(bundle.run, "kv_cache").get("gpu_memory_utilization") if measured_here else None
    return pack.Engine(
        vllm_version=str(version) if version else None,
        max_num_seqs=positive_count(kwargs, "max_num_seqs") or None,
        max_num_batched_tokens=positive_count(kwargs, "max_num_batched_tokens") or None,
        gpu_memory_utilization=float(utilization) if isinstance(utilization, int | float) else None,
    )


def _corrections(bundle: Bundle) -> tuple[pack.Correction, ...]:
    request = bundle.request
    found = []
    if bundle.skew is not None:
        source = "least squares over the bundle's skew.csv, weight 1 / t_mean^2"
        for name, skew, batches in (
            ("skew_decode", bundle.skew[0], "decode-only"),
            ("skew_mixed", bundle.skew[1], "mixed"),
        ):
            reason = (
                f"uneven contexts of {batches} batches: share of (cost at the longest - cost at the mean context), "
                f"standard error {skew.standard_error:.5f} over {skew.rows} rows"
            )
            found.append(pack.Correction(name=name, value=skew.coefficient, reason=reason, source=source))
    if bundle.link is not None:
        found.append(
            pack.Correction(
                name="link_gbytes_per_s",
                value=bundle.link.bytes_per_s / 1e9,
                reason=f"{_exchanges(bundle)}, {bundle.link.latency_s * 1e6:g} us a hop; the tables hold no "
                "communication",
                source=bundle.link.source,
            )
        )
    if bundle.model.num_experts:
        found.append(_routing(bundle))
    for name, value in (
        ("host_ns_per_step", request.host_ns_per_step),
        ("host_ns_per_sequence", request.host_ns_per_sequence),
    ):
        if value:
            reason = "time of the host that no operator of the device hides"
            found.append(pack.Correction(name=name, value=value, reason=reason, source="given to the import"))
    return tuple(found)


def _exchanges(bundle: Bundle) -> str:
    """What goes over the link."""
    request = bundle.request
    kinds = []
    if request.tensor_parallel > 1:
        kinds.append(f"ring all-reduce over {request.tensor_parallel} ranks in each layer")
    if request.data_parallel > 1:
        kinds.append(f"all-gather and reduce-scatter of tokens over {request.expert_parallel} ranks in each MoE layer")
    return " and ".join(kinds)


def _routing(bundle: Bundle) -> pack.Correction:
    """How many experts a step reaches is nowhere measured."""
    model, request = bundle.model, bundle.request
    tokens = "T" if request.data_parallel == 1 else f"{request.data_parallel} T"
    held = model.num_experts // request.expert_parallel
    others = "" if request.data_parallel == 1 else "; the other data-parallel ranks have as many tokens"
    return pack.Correction(
        name="experts_per_token",
        value=float(model.experts_per_token),
        reason=f"balanced routing assumed: a step of T tokens reaches {held} (1 - (1 - {model.experts_per_token} / "
        f"{model.num_experts})^({tokens})) of the {held} experts of a rank; trained routers reach fewer{others}",
        source="assumed; the number is num_experts_per_tok of config.json",
    )


def _coverage(operators: Mapping[str, Operator]) -> dict[str, str | int | float | bool]:
    """The largest value of each axis."""
    decode, chunks = operators["generation_attention"].points, operators["context_attention"].points
    coverage: dict[str, str | int | float | bool] = {
        "total_tokens": operators["dense_gemm"].points[0][-1],
        "decode_requests": decode[0][-1],
        "context_tokens": decode[1][-1],
        "chunk_tokens": chunks[0][-1],
        "history_tokens": chunks[1][-1],
    }
    if "mixed_attention" in operators:
        coverage["mixed_decode_requests"] = operators["mixed_attention"].points[2][-1]
    return coverage


def _provenance(bundle: Bundle) -> dict[str, str]:
    meta = bundle.meta
    effective = sub_mapping(meta, "engine_effective")
    entries = {
        "source": f"LLMServingSim bundle, profiler {meta.get('profiler_version', 'unknown')}, "
        f"vLLM {meta.get('vllm_version', 'unknown')}, variant {meta.get('variant', 'unknown')}, "
        f"profiled at {meta.get('profiled_at', 'an unknown time')}",
        "timing": "kernel time of one layer"
        + (", eager" if effective.get("enforce_eager") else "")
        + f", {meta.get('measurement_iterations', 'unknown')} iterations a point; all layers taken to cost the same",
    }
    if bundle.skew is None:
        entries["skew"] = "the bundle has no skew.csv: uneven contexts cost what their mean costs"
    elif sub_mapping(meta, "skew_profile").get("enabled") is False:
        entries["skew"] = "meta.yaml says that skew was not profiled, yet skew.csv holds rows; they are used"
    names = {operator.name for operator in bundle.operators}
    if "all_reduce" in names:
        entries["all_reduce"] = "modelled as a ring; no collective was measured"
    if "moe" in names:
        entries["moe"] = "moe.csv at the number of experts that balanced routing reaches, at every number of tokens"
    if "expert_exchange" in names:
        entries["expert_exchange"] = "modelled as rings; no collective was measured"
    return entries | {f"sha256 {name}": digest for name, digest in sorted(bundle.digests.items())}
