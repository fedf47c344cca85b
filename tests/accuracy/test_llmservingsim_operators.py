"""Packs imported from the two published bundles answer the sum of the bundle's own CSV rows."""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from builders import mixed_query
from gates import Gates
from oracle_server.pack import open_oracle
from oracle_server.sampling.answer import SUPPORT_EXTRAPOLATED
from profiler.llmservingsim import ImportRequest, read_bundle
from profiler.llmservingsim_pack import write_bundle
from profiler.surface import read_pack

pytestmark = pytest.mark.accuracy

BUNDLES = ("RTX4090-Llama-3.1-8B-tp1", "RTXPRO6000-Llama-3.1-8B-tp1")
LAYERS = 32
# The grid of meta.yaml: powers of two.
CHUNKS = [2**i for i in range(4, 12)]
CONTEXTS = [2**i for i in range(4, 15)]
REQUESTS = [2**i for i in range(8)]
Table = Mapping[tuple[int, ...], float]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_random_steps_cost_the_sum_of_the_csv_rows(
    bundle: str, gates: Gates, data_folder: Path, tmp_path: Path
) -> None:
    source = data_folder / "llmservingsim"
    tables = Tables(source / bundle / "operators")
    request = ImportRequest(source / bundle, source / "Llama-3.1-8B.config.json", kv_blocks_assumed=2588)
    write_bundle(read_bundle(request), tmp_path / "pack")
    oracle = open_oracle(read_pack(tmp_path / "pack")[1])
    random = np.random.default_rng(11)
    worst = {}
    for kind, chunks_of_kind in (("decode", 0), ("prefill", 1), ("mixed", 1), ("several-chunk", 4)):
        errors = []
        for step in range(500):
            # Inside the grids; the shim's sum and maximum is all a step says about its contexts.
            decodes = [] if kind == "prefill" else logarithmic(random, 16, 16_384, int(random.integers(1, 128)))
            chunks = [
                (int(random.integers(16, 480)), int(random.integers(0, 4_000)))
                for _ in range(int(random.integers(min(2, chunks_of_kind), chunks_of_kind + 1)))
            ]
            query = mixed_query(chunks, len(decodes), sum(decodes), max(decodes, default=0))
            answer = oracle.answer(query, 1, step)
            assert answer.support != SUPPORT_EXTRAPOLATED
            errors.append(answer.latency_ns / (1e3 * tables.step_us(chunks, decodes)) - 1.0)
        worst[kind] = max(map(abs, errors))
    for kind, largest in worst.items():
        # Steps last 8 ms and more, so that rounding to a nanosecond is below 0.1 ppm.
        what = f"{bundle}, 500 {kind} steps, largest difference"
        gates.check("imported bundle against its CSV rows", what, 1e6 * largest, at_most=0.1, unit="ppm")


def test_every_measured_attention_point_is_served_as_measured(data_folder: Path, tmp_path: Path) -> None:
    source = data_folder / "llmservingsim"
    tables = Tables(source / BUNDLES[0] / "operators")
    request = ImportRequest(source / BUNDLES[0], source / "Llama-3.1-8B.config.json")
    bundle = read_bundle(request)
    assert (bundle.kv_cache.blocks, bundle.kv_cache.basis) == (2588, "measured")
    by_name = {operator.name: operator for operator in bundle.operators}
    mixed = by_name["mixed_attention"]
    assert mixed.latency_ns.size == 8448
    for point, value in zip(product(*mixed.points), mixed.latency_ns.ravel(), strict=True):
        assert value == pytest.approx(1e3 * LAYERS * tables.attention[point], rel=1e-12)


class Tables:
    """The CSV files as they are; microseconds."""

    def __init__(self, folder: Path) -> None:
        self.dense = layers(folder / "dense.csv")
        self.per_sequence = layers(folder / "per_sequence.csv")
        self.attention: dict[tuple[int, ...], float] = {
            tuple(map(int, row[:4])): float(row[4]) for row in rows(folder / "attention.csv")
        }
        self.decode_contexts = sorted({point[3] for point in self.attention if not point[0]})
        self.share = {regime: skew_share(folder / "skew.csv", regime) for regime in ("pure", "mixed")}

    def step_us(self, chunks: Sequence[tuple[int, int]], decodes: Sequence[int]) -> float:
        """One step of `chunks` (tokens, history) beside requests that read `decodes` context tokens."""
        tokens, rows_of_logits = sum(c for c, _ in chunks) + len(decodes), len(chunks) + len(decodes)
        total = self.at("dense", "embedding", tokens) + self.at("dense", "final_layernorm", tokens)
        for layer in "layernorm layernorm qkv_proj rotary_emb o_proj gate_up_proj act_fn down_proj".split():
            total += LAYERS * self.at("dense", layer, tokens)
        total += self.at("per_sequence", "lm_head", rows_of_logits) + self.at("per_sequence", "sampler", rows_of_logits)
        return total + LAYERS * self.attention_us(chunks, decodes)

    def attention_us(self, chunks: Sequence[tuple[int, int]], decodes: Sequence[int]) -> float:
        first, *others = sorted(chunks, key=lambda c: -c[0] * (c[0] + 2 * c[1])) or [(0, 0)]
        n, mean, longest = len(decodes), sum(decodes) / max(len(decodes), 1), max(decodes, default=0)
        extra = sum(
            max(multilinear(self.attention, [CHUNKS, [0, *CONTEXTS], [0], [0]], (*chunk, 0, 0)) - self.floor, 0.0)
            for chunk in others
        )
        if not n:
            return multilinear(self.attention, [CHUNKS, [0, *CONTEXTS], [0], [0]], (*first, 0, 0)) + extra
        if first[0]:
            axes, share = [CHUNKS, [0, *CONTEXTS], REQUESTS, CONTEXTS], self.share["mixed"]
        else:
            axes, share = [[0], [0], [*REQUESTS, 256], self.decode_contexts], self.share["pure"]
        at_mean = multilinear(self.attention, axes, (*first, n, mean))
        at_longest = multilinear(self.attention, axes, (*first, n, longest))
        added = share * (at_longest - at_mean)
        return at_mean + (max(added, 0.0) if first[0] else added) + extra

    @property
    def floor(self) -> float:
        return self.attention[16, 0, 0, 0]

    def at(self, table: str, layer: str, x: int) -> float:
        values = getattr(self, table)[layer]
        return multilinear({(key,): value for key, value in values.items()}, [sorted(values)], (x,))


def multilinear(table: Table, axes: Sequence[Sequence[int]], point: Sequence[float]) -> float:
    """Weighted sum over the corners of the cell around `point`."""
    corners = []
    for axis, x in zip(axes, point, strict=True):
        at = min(bisect_right(axis, x) - 1, len(axis) - 2)
        if len(axis) == 1:
            corners.append([(axis[0], 1.0)])
        else:
            share = (x - axis[at]) / (axis[at + 1] - axis[at])
            corners.append([(axis[at], 1.0 - share), (axis[at + 1], share)])
    total = 0.0
    for corner in product(*corners):
        weight = float(np.prod([part for _, part in corner]))
        total += weight * table[tuple(x for x, _ in corner)]
    return total


def skew_share(path: Path, regime: str) -> float:
    """Least squares over the rows of a regime, each divided by its time at the mean context."""
    measured = np.array([[float(x) for x in row[10:13]] for row in rows(path) if row[0] == regime])
    mean, longest, skewed = measured.T
    usable = longest > mean
    spread, added = ((longest - mean) / mean)[usable], ((skewed - mean) / mean)[usable]
    return float(np.linalg.lstsq(spread[:, None], added, rcond=None)[0][0])


def layers(path: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for layer, x, time_us in rows(path):
        found[layer][int(x)] = float(time_us)
    return found


def rows(path: Path) -> Iterable[list[str]]:
    with path.open(newline="") as file:
        yield from list(csv.reader(file))[1:]


def logarithmic(random: np.random.Generator, low: int, high: int, count: int) -> list[int]:
    return [int(x) for x in np.exp(random.uniform(np.log(low), np.log(high), count))]
