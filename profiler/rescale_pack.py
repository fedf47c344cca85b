"""Writes a rescaled pack: every operator times its factor, and what was changed by how much and why."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from oracle_server import pack
from oracle_server.errors import InvalidArgument
from oracle_server.sampling.answer import KNOWLEDGE_MODELLED
from oracle_server.sampling.grids import AXIS0_SIZE, OPERATOR_AXES, VALUES
from profiler.hybrid_samples import StepSamples, read_samples
from profiler.operators import Operator, columns_of
from profiler.rescale import (
    ATTENTION,
    DENSE,
    Estimate,
    Rescaling,
    axes_of,
    fit_rescaling,
    parts_of,
    queries_of,
    scaled_grid,
)
from profiler.surface import read_pack


@dataclass(frozen=True)
class RescaleRequest:
    """What the user asks for."""

    directory: Path
    trace: Path
    # As many steps at most, evenly over the trace; the others judge the fit.
    steps: int = 200
    # A count that the measured engine logged; None: the pack's stays.
    kv_blocks: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class RescaledPack:
    """A fit, and the pack it belongs to."""

    request: RescaleRequest
    rescaling: Rescaling
    # Steps of the trace the fit has not seen, and their mean signed and absolute error in percent, before and after.
    unseen: int
    unseen_before_percent: tuple[float, float]
    unseen_after_percent: tuple[float, float]
    report: pack.PackReport
    compiled: pack.CompiledPack


def rescale(request: RescaleRequest) -> RescaledPack:
    """Reads pack and trace and fits. Raises InvalidArgument where either is none of its kind."""
    report, compiled = read_pack(request.directory)
    samples = read_samples(request.trace).steps
    chosen = _evenly(samples, request.steps)
    parts = parts_of(compiled, queries_of(samples))
    latency_ns = samples.latency_ns.astype(np.float64)
    rescaling = fit_rescaling(parts.take(chosen), latency_ns[chosen])
    unseen = ~chosen
    before, after = (0.0, 0.0), (0.0, 0.0)
    if unseen.any():
        rest, truth = parts.take(unseen), latency_ns[unseen]
        before, after = _errors(rest.total / truth), _errors(rest.rescaled(rescaling) / truth)
    return RescaledPack(request, rescaling, int(unseen.sum()), before, after, report, compiled)


def write_rescaled(rescaled: RescaledPack, directory: Path, *, created: datetime | None = None) -> str:
    """Writes the pack into `directory`, which must not exist, and returns its digest."""
    rescaling, old = rescaled.rescaling, rescaled.report.manifest
    composed = old.latency.composed
    if composed is None:
        raise InvalidArgument("only composed packs are rescaled", field="pack")
    changes: dict[str, Any] = {
        "launch_floor_ns": composed.launch_floor_ns * rescaling.attention.value,
    }
    if not rescaling.host_ns.held:
        changes |= {"host_ns_per_step": rescaling.host_ns.value, "host_ns_per_sequence": 0.0}
    manifest = msgspec.structs.replace(
        old,
        name=rescaled.request.name or f"{old.name}-rescaled",
        created=(created or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ"),
        kv_cache=_kv_cache(rescaled),
        latency=msgspec.structs.replace(old.latency, composed=msgspec.structs.replace(composed, **changes)),
        files=(),
        corrections=(*old.corrections, *_corrections(rescaled)),
        # It was that of the operators as they were.
        uncertainty=None,
        provenance=old.provenance
        | {
            "rescaled_from": rescaled.report.digest,
            "rescaled_on": f"{rescaled.request.trace.name}, sha256 "
            + hashlib.sha256(rescaled.request.trace.read_bytes()).hexdigest(),
        },
    )
    residuals = rescaled.compiled.arrays["residuals"]
    return pack.write_pack(
        directory, manifest, operators=_operators(rescaled), residuals={"ratio": np.array(residuals, dtype=np.float32)}
    )


def _evenly(samples: StepSamples, most: int) -> NDArray[np.bool_]:
    chosen = np.zeros(len(samples), dtype=bool)
    chosen[np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(np.int64)] = True
    return chosen


def _errors(ratio: NDArray[np.float64]) -> tuple[float, float]:
    return 100.0 * float((ratio - 1.0).mean()), 100.0 * float(np.abs(ratio - 1.0).mean())


def _kv_cache(rescaled: RescaledPack) -> pack.KvCache:
    cache = rescaled.report.manifest.kv_cache
    if rescaled.request.kv_blocks is None:
        return cache
    return msgspec.structs.replace(
        cache, blocks=rescaled.request.kv_blocks, basis="measured", source="logged by the measured engine"
    )


def _corrections(rescaled: RescaledPack) -> list[pack.Correction]:
    rescaling = rescaled.rescaling

    def correction(name: str, estimate: Estimate, what: str) -> pack.Correction:
        told = (
            "held: the steps do not tell it"
            if estimate.held
            else f"90 % between {estimate.low:.4g} and {estimate.high:.4g}"
        )
        return pack.Correction(
            name=name,
            value=estimate.value,
            reason=f"{what}; {told}",
            source=f"{rescaling.steps} steps of {rescaled.request.trace.name}",
        )

    return [
        correction("dense_scale", rescaling.dense, "factor of all operators but attention and communication"),
        correction("attention_scale", rescaling.attention, "factor of the attention operators"),
        correction("host_scale_ns_per_step", rescaling.host_ns, "host time of a step, instead of the pack's"),
    ]


def _operators(rescaled: RescaledPack) -> Mapping[str, NDArray[Any]]:
    """operators.parquet in the order of the manifest. A scaled value is a model's, however the first was known."""
    arrays, rescaling = rescaled.compiled.arrays, rescaled.rescaling
    factors = dict.fromkeys(DENSE, rescaling.dense.value) | dict.fromkeys(ATTENTION, rescaling.attention.value)
    grid, layout = scaled_grid(arrays, factors), arrays["layout"]
    composed = rescaled.report.manifest.latency.composed
    found = []
    for operator in sorted(composed.operators if composed else (), key=lambda one: one.id):
        slot = list(OPERATOR_AXES).index(operator.name)
        axes = axes_of(layout, grid, operator.name)
        shape = tuple(axis.size for axis in axes)
        begin = int(layout[slot, VALUES])
        size = int(np.prod(layout[slot, AXIS0_SIZE:VALUES:2]))
        known = np.array(arrays["knowledge"][begin : begin + size], dtype=np.int8)
        if factors.get(operator.name, 1.0) != 1.0:
            known = np.maximum(known, np.int8(KNOWLEDGE_MODELLED))
        points = tuple(tuple(int(x) for x in axis) for axis in axes)
        found.append(
            Operator(
                operator.name,
                operator.axes,
                operator.group,
                points,
                grid[begin : begin + size].reshape(shape),
                known.reshape(shape),
            )
        )
    columns = dict(columns_of(found))
    ids = np.array([operator.id for operator in sorted(composed.operators if composed else (), key=lambda one: one.id)])
    columns["operator"] = ids[columns["operator"]].astype(np.int16)
    return columns
