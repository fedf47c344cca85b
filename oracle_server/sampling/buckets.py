"""The sampled model's data: samples grouped by bucket, buckets in rows of equal concurrency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import PackInvalid
from oracle_server.sampling.levels import SPAN, SPAN_AFTER_PREFILL, bucket_center, build_levels

TABLES: Final = ("decode", "after_prefill", "prefill")
ROW_FIELDS: Final = ("row_concurrency", "row_begin", "bucket_tokens", "sample_begin", "latency_ns")

_DECODE_ROW: Final = 0
_PREFILL_ROW: Final = 1


def build_index(
    samples: Mapping[str, NDArray[Any]],
    *,
    tokens_width: int,
    concurrency_width: int,
    transition: bool,
    neighbors: str = "joint",
    context_width: int = 0,
    min_samples: int = 1,
) -> dict[str, NDArray[Any]]:
    """Group samples into the tables of the sampled model.

    `samples` are the columns of samples.parquet. The result holds, per table of TABLES (`after_prefill` only with
    `transition`), the arrays "<table>.<field>", all int64:
        row_concurrency[R]    ascending bucket centers in concurrency
        row_begin[R + 1]      buckets of row r: [row_begin[r], row_begin[r + 1])
        bucket_tokens[B]      bucket centers in total tokens, ascending within a row
        sample_begin[B + 1]   samples of bucket b: [sample_begin[b], sample_begin[b + 1])
        latency_ns[N]         samples of one bucket in the order of the file
    and, unless `neighbors` is "joint", those of `levels.build_levels`: "nearest" keeps every center apart,
    "hierarchical" pools by `min_samples` and has context as an axis where `context_width` is not 0.
    Without `transition` all decode samples are one table; with it those with previous_prefill_tokens > 0 are apart.
    Raises PackInvalid where a table the model needs is empty: nothing stands in for it.
    """
    table = samples["table"]
    chosen: dict[str, NDArray[np.bool_]] = {"prefill": table == _PREFILL_ROW}
    decode = table == _DECODE_ROW
    if transition:
        after = samples["previous_prefill_tokens"] > 0
        chosen["after_prefill"] = decode & after
        decode = decode & ~after
    chosen["decode"] = decode
    arrays: dict[str, NDArray[Any]] = {}
    for name, mask in chosen.items():
        if not mask.any():
            raise PackInvalid(
                f"no sample for the table {name!r}: the pack could not answer such a step. A sampled pack needs decode "
                "samples, prefill samples, and where latency.transition is true decode samples with "
                "previous_prefill_tokens > 0",
                where="samples.parquet: table",
            )
        arrays.update(
            {f"{name}.{field}": array for field, array in _group(samples, mask, tokens_width, concurrency_width)}
        )
        if neighbors != "joint":
            levels = build_levels(
                samples,
                mask,
                tokens_width=tokens_width,
                concurrency_width=concurrency_width,
                context_width=context_width,
                min_samples=min_samples if neighbors == "hierarchical" else 1,
                spans=SPAN_AFTER_PREFILL if name == "after_prefill" else SPAN,
            )
            arrays.update({f"{name}.{field}": array for field, array in levels.items()})
    return arrays


def _group(
    samples: Mapping[str, NDArray[Any]], mask: NDArray[np.bool_], tokens_width: int, concurrency_width: int
) -> list[tuple[str, NDArray[np.int64]]]:
    tokens = bucket_center(samples["total_tokens"][mask].astype(np.int64), tokens_width)
    concurrency = bucket_center(samples["concurrency"][mask].astype(np.int64), concurrency_width)
    # Both are below 2^31, so one integer orders by (concurrency, tokens); a stable sort keeps the capture order.
    cell = (concurrency << np.int64(32)) | tokens
    order = np.argsort(cell, kind="stable")
    cell = cell[order]
    first = np.flatnonzero(np.concatenate((np.ones(1, dtype=bool), cell[1:] != cell[:-1])))
    bucket_concurrency = cell[first] >> np.int64(32)
    row_first = np.flatnonzero(
        np.concatenate((np.ones(1, dtype=bool), bucket_concurrency[1:] != bucket_concurrency[:-1]))
    )
    return [
        ("row_concurrency", bucket_concurrency[row_first]),
        ("row_begin", np.append(row_first, first.size).astype(np.int64)),
        ("bucket_tokens", cell[first] & np.int64(0xFFFFFFFF)),
        ("sample_begin", np.append(first, cell.size).astype(np.int64)),
        ("latency_ns", samples["latency_ns"][mask][order].astype(np.int64)),
    ]
