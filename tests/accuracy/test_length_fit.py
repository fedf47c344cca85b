"""Output lengths fitted on the first half of a real trace, drawn for the second half given only its prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gates import Gates
from oracle_server.sampling.draws import request_draw
from oracle_server.sampling.lengths import LengthClass, LengthTables
from profiler.lengths import Trace, fit_lengths, read_trace

pytestmark = pytest.mark.accuracy


def _ks(left: NDArray[np.int64], right: NDArray[np.int64]) -> float:
    points = np.union1d(left, right)
    cdfs = [np.searchsorted(np.sort(sample), points, side="right") / sample.size for sample in (left, right)]
    return float(np.abs(cdfs[0] - cdfs[1]).max())


# Bounds: about 1.5 times what a drift of the trace itself leaves (fit on the first half, test on the second).
@pytest.mark.parametrize(
    ("file", "ks_bound", "quartile_bound"),
    [
        ("azure2023_conv.csv", 0.08, 0.20),
        ("azure2023_code.csv", 0.05, 0.10),
        ("mooncake_conversation_lengths.csv", 0.04, 0.08),
    ],
)
def test_lengths_of_the_second_half_follow_the_table_of_the_first(
    file: str, ks_bound: float, quartile_bound: float, data_folder: Path, gates: Gates
) -> None:
    trace = read_trace(data_folder / "workloads" / file)
    half = trace.output_tokens.size // 2
    fit = fit_lengths(Trace(trace.name, trace.prompt_tokens[:half], trace.output_tokens[:half], 0))
    item = fit.table["classes"][0]
    tables = LengthTables(
        [LengthClass(item["name"], item["prompt_bin_begin"], item["quantile_tokens"], item["quantiles_per_bin"])]
    )
    prompts, truth = trace.prompt_tokens[half:], trace.output_tokens[half:]
    drawn = np.array(
        [tables.draw(request_draw(7, f"request-{i}"), int(prompt)) for i, prompt in enumerate(prompts)], dtype=np.int64
    )
    ks = _ks(drawn, truth)
    quartile = np.searchsorted(np.quantile(prompts, [0.25, 0.5, 0.75]), prompts)
    ks_quartile = max(_ks(drawn[quartile == q], truth[quartile == q]) for q in range(4))
    total = drawn.sum() / truth.sum() - 1
    print(f"\n{file}: KS {ks:.3f}, worst prompt quartile {ks_quartile:.3f}, total tokens {100 * total:+.1f} %")
    gate, name = "output lengths, fitted to the first half", file.removesuffix(".csv").removesuffix("_lengths")
    gates.source(gate, "Azure/AzurePublicDataset 2023 and kvcache-ai/Mooncake: the second half of each trace")
    fixed = _ks(np.full(truth.size, round(float(trace.output_tokens[:half].mean()))), truth)
    gates.check(gate, f"{name}: all requests", ks, at_most=ks_bound, unit="KS", controls={"fixed mean": fixed})
    gates.check(gate, f"{name}: worst quartile of prompts", ks_quartile, at_most=quartile_bound, unit="KS")
    gates.check(gate, f"{name}: tokens in all", 100 * total)
    for series, values in (("measured", truth), ("drawn", drawn)):
        gates.curve(gate, f"output of {name}", values.tolist(), series=series, unit="tokens")
