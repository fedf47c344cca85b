"""From checked columns to the flat arrays that serving processes map."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from oracle_server.pack.columns import MODEL_FILE, OPERATORS_FILE, RESIDUALS_FILE, SAMPLES_FILE, Columns
from oracle_server.pack.durable import write_synced
from oracle_server.pack.manifest import MANIFEST_FILE, Manifest, composed_latency, hybrid_latency
from oracle_server.sampling.buckets import build_index
from oracle_server.sampling.grids import build_arrays as build_grids
from oracle_server.sampling.hybrid_tables import Term, build_model

# Grows whenever a kernel needs other arrays. Compiled packs of another version are compiled anew, never converted.
LAYOUT_VERSION: Final = 3
LAYOUT_FILE: Final = "layout.json"


def build_arrays(manifest: Manifest, files: Mapping[str, Columns]) -> dict[str, NDArray[Any]]:
    """The arrays of the pack's latency model, from columns that passed `columns.check_columns`."""
    latency = manifest.latency
    if latency.sampled is not None:
        return build_index(
            files[SAMPLES_FILE],
            tokens_width=latency.sampled.tokens_bucket_width,
            concurrency_width=latency.sampled.concurrency_bucket_width,
            transition=latency.transition,
            neighbors=latency.sampled.neighbors or "joint",
            context_width=latency.sampled.context_bucket_width or 0,
            min_samples=latency.sampled.min_samples,
        )
    ratios = files[RESIDUALS_FILE]["ratio"] if RESIDUALS_FILE in files else np.ones(1, dtype=np.float32)
    residuals = {"residuals": ratios.astype(np.float32)}
    if manifest.kind == "hybrid":
        terms = [Term(term.name, term.above, term.coefficient_ns) for term in hybrid_latency(manifest).terms]
        return {**build_model(files[MODEL_FILE], terms), **residuals}
    composed = composed_latency(manifest)
    arrays = build_grids(files[OPERATORS_FILE], {operator.id: operator.name for operator in composed.operators})
    return {**arrays, **residuals}


def write_arrays(directory: Path, digest: str, manifest_json: bytes, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a compiled pack into an existing empty directory: a .npy per array, the manifest, layout.json last."""
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
        write_synced(directory / f"{name}.npy", buffer.getvalue())
    write_synced(directory / MANIFEST_FILE, manifest_json)
    layout = {
        "layout_version": LAYOUT_VERSION,
        "digest": digest,
        "arrays": {name: {"dtype": array.dtype.str, "shape": list(array.shape)} for name, array in arrays.items()},
    }
    write_synced(directory / LAYOUT_FILE, json.dumps(layout, sort_keys=True).encode())
