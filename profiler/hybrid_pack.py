"""Fits a hybrid pack from measured steps and writes it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from oracle_server import pack
from oracle_server.errors import InvalidArgument
from oracle_server.sampling.hybrid_tables import long_form
from profiler.hybrid_fit import FitOptions, HybridModel, fit_hybrid
from profiler.hybrid_report import RegionLine, TermLine, region_lines, term_lines
from profiler.hybrid_samples import SampleFile, read_samples


@dataclass(frozen=True)
class FitRequest:
    """What `step-oracle fit` is told. None and empty: not known."""

    samples: Path
    device_name: str
    device_memory_bytes: int
    form: str = "auto"
    kv_blocks: int | None = None
    kv_blocks_assumed: int | None = None
    block_size: int = 16
    model_id: str = "unknown"
    model_shape: str = ""
    dtype: str = ""
    tensor_parallel: int = 1
    vllm_version: str | None = None
    graph_capture_sizes: tuple[int, ...] = ()
    licence: str = "unknown"
    name: str | None = None


@dataclass(frozen=True)
class Fit:
    """A fitted pack, ready to be written, with what is known of its errors."""

    request: FitRequest
    file: SampleFile
    model: HybridModel
    terms: Sequence[TermLine]
    regions: Sequence[RegionLine]
    kv_cache: pack.KvCache


def fit(request: FitRequest) -> Fit:
    """Reads the samples, fits, and judges the fit on regions left out. Raises InvalidArgument naming what is wrong."""
    file = read_samples(request.samples, request.form, request.block_size)
    kv_cache = _kv_cache(request, file)
    options = FitOptions(
        max_context_known=file.max_context_known, graph_capture_sizes=tuple(sorted(request.graph_capture_sizes))
    )
    model = fit_hybrid(file.steps, options)
    return Fit(request, file, model, term_lines(model, file.steps), region_lines(file.steps, options), kv_cache)


def write_fit(fitted: Fit, directory: Path, *, created: datetime | None = None) -> str:
    """Writes the fitted model as a hybrid pack into `directory`, which must not exist, and returns its digest."""
    return write_manifest(fitted, manifest_of(fitted, created or datetime.now(UTC)), directory)


def write_manifest(fitted: Fit, manifest: pack.Manifest, directory: Path) -> str:
    """Write the fitted model under a manifest that may say more than `manifest_of`; returns the digest."""
    return pack.write_pack(
        directory,
        manifest,
        model=long_form(fitted.model.arrays),
        residuals={"ratio": fitted.model.residuals.astype(np.float32)},
    )


def _kv_cache(request: FitRequest, file: SampleFile) -> pack.KvCache:
    if request.kv_blocks is not None and request.kv_blocks_assumed is not None:
        raise InvalidArgument(
            "--kv-blocks is a measured count and --kv-blocks-assumed is not: give one", field="kv_blocks"
        )
    if request.kv_blocks_assumed is not None:
        return pack.KvCache(
            blocks=request.kv_blocks_assumed,
            block_size=request.block_size,
            basis="assumed",
            source="given to the fit; nobody measured it",
        )
    if request.kv_blocks is not None:
        return pack.KvCache(
            blocks=request.kv_blocks, block_size=request.block_size, basis="measured", source="given to the fit"
        )
    if file.kv_blocks is not None:
        return pack.KvCache(
            blocks=file.kv_blocks,
            block_size=request.block_size,
            basis="measured",
            source=f"the engine's own count in {request.samples.name}; its block size is the fit's --block-size",
        )
    raise InvalidArgument(
        "the samples do not say how many KV blocks the engine had, and a pack has to: give --kv-blocks (measured) or "
        "--kv-blocks-assumed",
        field="kv_blocks",
    )


def manifest_of(fitted: Fit, created: datetime) -> pack.Manifest:
    """What the request and the samples say of the pack."""
    request, model, steps = fitted.request, fitted.model, fitted.file.steps
    options = model.options
    decode = steps.take(~steps.mixed)
    held_out = [line for line in fitted.regions if not line.region.startswith("in distribution")] or fitted.regions
    uncertainty = None
    if held_out:
        uncertainty = pack.Uncertainty(
            low_percent=round(min(line.percentiles[0] for line in held_out), 2),
            high_percent=round(max(line.percentiles[1] for line in held_out), 2),
            basis=f"widest 5 to 95 % of truth / answer over {len(held_out)} regions left out of the fit",
        )
    return pack.Manifest(
        name=request.name or f"fit-{request.samples.stem}",
        kind="hybrid",
        created=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        licence=request.licence,
        model=pack.Model(id=request.model_id, shape=request.model_shape, dtype=request.dtype),
        device=pack.Device(
            name=request.device_name, memory_bytes=request.device_memory_bytes, count=request.tensor_parallel
        ),
        parallel=pack.Parallel(tensor=request.tensor_parallel),
        engine=pack.Engine(vllm_version=request.vllm_version),
        kv_cache=fitted.kv_cache,
        latency=pack.Latency(
            hybrid=pack.HybridLatency(
                terms=tuple(
                    pack.HybridTerm(name=term.name, coefficient_ns=term.coefficient_ns, above=term.above)
                    for term in model.terms
                ),
                shrink_distance=options.shrink_distance,
                exact_distance=options.exact_distance,
                neighbors=options.neighbors,
                max_context_edge=options.max_context_edge,
                graph_capture_sizes=options.graph_capture_sizes,
            )
        ),
        coverage={
            "steps": len(steps),
            "mixed_steps": int(np.count_nonzero(steps.mixed)),
            "outliers": model.outliers,
            "decode_requests": int(steps.decode_requests.max()),
            "context_tokens": int((decode.context_tokens // np.maximum(1, decode.decode_requests)).max()),
            "chunk_tokens": int(steps.prefill_tokens.max()),
            "history_tokens": int(steps.history_tokens.max()),
        },
        uncertainty=uncertainty,
        provenance={
            "fitted by": "step-oracle fit",
            "samples": request.samples.name,
            "samples sha256": hashlib.sha256(request.samples.read_bytes()).hexdigest(),
            **{f"note {number}": note for number, note in enumerate(fitted.file.notes, start=1)},
        },
    )
