"""Maps compiled packs into a serving process."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from oracle_server.errors import PackInvalid
from oracle_server.pack.compile import LAYOUT_FILE, LAYOUT_VERSION
from oracle_server.pack.durable import read_regular_file
from oracle_server.pack.manifest import (
    MANIFEST_BYTES_LIMIT,
    MANIFEST_FILE,
    Manifest,
    composed_latency,
    hybrid_latency,
    parse_manifest,
)

if TYPE_CHECKING:
    from oracle_server.sampling.oracle import Oracle


@dataclass(frozen=True, slots=True)
class CompiledPack:
    """A pack ready to map: read-only arrays whose pages are shared by all processes."""

    digest: str
    manifest: Manifest
    # manifest.json, byte for byte as the pack has it.
    manifest_json: bytes
    arrays: Mapping[str, NDArray[Any]]


def load_compiled(out: Path) -> CompiledPack:
    """Map what `compile_pack` wrote; raises PackInvalid if it is of another layout version or damaged: compile it anew.

    The directory is private to the server: it is trusted to be what `compile_pack` wrote, and only its form is checked.
    """
    try:
        layout = json.loads(read_regular_file(out / LAYOUT_FILE, MANIFEST_BYTES_LIMIT))
        version = layout["layout_version"]
        if version != LAYOUT_VERSION:
            raise PackInvalid(
                f"compiled with layout version {version!r}, this version reads {LAYOUT_VERSION}: compile it again",
                where=f"{out.name}/{LAYOUT_FILE}: layout_version",
            )
        digest = layout["digest"]
        described: dict[str, dict[str, Any]] = layout["arrays"]
        arrays: dict[str, NDArray[Any]] = {}
        for name, form in described.items():
            if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)?", name):
                raise ValueError(f"array name {name!r}")
            array = np.asarray(np.load(out / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            if array.dtype.str != form["dtype"] or list(array.shape) != form["shape"]:
                raise ValueError(f"{name}.npy is {array.dtype.str}{list(array.shape)}, expected {form}")
            arrays[name] = array
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError) as error:
        raise PackInvalid(f"the compiled pack is damaged ({error}): compile it again", where=out.name) from None
    manifest_json = read_regular_file(out / MANIFEST_FILE, MANIFEST_BYTES_LIMIT)
    return CompiledPack(digest, parse_manifest(manifest_json), manifest_json, arrays)


def open_oracle(compiled: CompiledPack) -> Oracle:
    """The latency model of a compiled pack. Imports numba; `warm()` compiles."""
    from oracle_server.sampling.composed import ComposedOptions, ComposedOracle
    from oracle_server.sampling.hybrid import HybridOptions, HybridOracle
    from oracle_server.sampling.sampled import SampledOptions, SampledOracle

    latency = compiled.manifest.latency
    if latency.sampled is not None:
        return SampledOracle(
            compiled.arrays,
            SampledOptions(
                tokens_bucket_width=latency.sampled.tokens_bucket_width,
                concurrency_bucket_width=latency.sampled.concurrency_bucket_width,
                min_samples=latency.sampled.min_samples,
                max_buckets=latency.sampled.max_buckets,
                prefill_by_new_requests=latency.sampled.table_rule == "new_requests",
                transition=latency.transition,
                neighbors=latency.sampled.neighbors or "joint",
                fixed_buckets=latency.sampled.fixed_buckets or 0,
                context_bucket_width=latency.sampled.context_bucket_width or 0,
            ),
            prep_ns=latency.prep_ns,
            copy_ns=latency.copy_ns,
        )
    if compiled.manifest.kind == "hybrid":
        hybrid = hybrid_latency(compiled.manifest)
        return HybridOracle(
            compiled.arrays,
            HybridOptions(
                shrink_distance=hybrid.shrink_distance,
                exact_distance=hybrid.exact_distance,
                neighbors=hybrid.neighbors,
                max_context_edge=hybrid.max_context_edge,
                graph_capture_sizes=hybrid.graph_capture_sizes,
                after_prefill_factor=1.0 if hybrid.after_prefill_factor is UNSET else hybrid.after_prefill_factor,
            ),
            prep_ns=latency.prep_ns,
            copy_ns=latency.copy_ns,
        )
    composed = composed_latency(compiled.manifest)
    return ComposedOracle(
        compiled.arrays,
        ComposedOptions(
            skew_decode=composed.skew_decode,
            skew_mixed=composed.skew_mixed,
            mixed_decode_factor=composed.mixed_decode_factor,
            launch_floor_ns=composed.launch_floor_ns,
            host_ns_per_step=composed.host_ns_per_step,
            host_ns_per_sequence=composed.host_ns_per_sequence,
            graph_capture_sizes=composed.graph_capture_sizes,
        ),
        prep_ns=latency.prep_ns,
        copy_ns=latency.copy_ns,
    )
