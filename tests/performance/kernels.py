"""Our kernels beside the libraries one would take: a single call, and items of a batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from sklearn.neighbors import KDTree

from builders import build_hybrid_pack
from oracle_server.pack import compile_pack
from oracle_server.pack.load import load_compiled, open_oracle
from oracle_server.rpc.wire import read_step
from oracle_server.sampling.joint import draw_sample
from oracle_server.sampling.oracle import Oracle
from oracle_server.sampling.sampled import SampledOracle
from oracle_server.sampling.shape import StepQuery
from performance.load.leased import is_leasable
from performance.measure import Spread, interleaved, nanoseconds_per_call
from performance.packs import CONCURRENCY_WIDTH, build_large_sampled_pack, build_leasable_pack, sample_columns
from performance.servers import SEQUENCES, steps_of
from performance.straightforward import Straightforward
from step_oracle.v1 import step_pb2

KEY = 0x1234567
BATCH = 1024
_SINGLE_CALLS = 2000


def measure(folder: Path, *, rounds: int) -> dict[str, Any]:
    """ns per call, ns per item of a batch."""
    oracles: dict[str, Oracle] = {}
    build_large_sampled_pack(folder / "sampled")
    build_leasable_pack(folder / "composed")
    build_hybrid_pack(folder / "hybrid", ratios=[0.95, 1.0, 1.05])
    for name in ("sampled", "composed", "hybrid"):
        compile_pack(folder / name, folder / f"{name}-compiled")
        oracles[name] = open_oracle(load_compiled(folder / f"{name}-compiled"))
        oracles[name].warm()
    steps = [step for number in range(SEQUENCES) for step in steps_of(number, 500)]
    decode = [step for step in steps if is_leasable(step.shape)]
    mixed = [step for step in steps if step.shape.prefill_chunks]
    return {
        "single_ns": _spreads(interleaved(rounds, _singles(oracles, decode, mixed, folder / "sampled"))),
        "batch_ns": _spreads(interleaved(rounds, _batches(oracles["sampled"], decode, mixed))),
    }


def _spreads(found: dict[str, list[float]]) -> dict[str, Spread]:
    return {name: Spread.of(values) for name, values in found.items()}


def _singles(
    oracles: dict[str, Oracle], decode: list[step_pb2.StepRequest], mixed: list[step_pb2.StepRequest], pack: Path
) -> dict[str, Callable[[], float]]:
    python = Straightforward(pack)
    trees = {kind: _Trees(kind == "mixed") for kind in ("decode", "mixed")}
    measures: dict[str, Callable[[], float]] = {}
    for kind, steps in (("decode", decode), ("mixed", mixed)):
        queries = [read_step(step)[0] for step in steps]
        for name, oracle in oracles.items():
            measures[f"{name}, {kind}"] = _timed(_ask(oracle, queries), _SINGLE_CALLS)
        measures[f"the kernel of sampled alone, {kind}"] = _timed(
            _draw(oracles["sampled"], kind, queries), _SINGLE_CALLS
        )
        tree, points = trees[kind], _points(queries)
        measures[f"scipy cKDTree, {kind}"] = _timed(_nearest(tree.scipy, points), 200)
        measures[f"scikit-learn KDTree, {kind}"] = _timed(_sklearn(tree.sklearn, points), 100)
        measures[f"numpy argpartition, {kind}"] = _timed(tree.numpy(points), 100)
        measures[f"Python dict and sorted(), {kind}"] = _timed(_python(python, steps), 20 if kind == "mixed" else 500)
    return measures


def _batches(
    oracle: Oracle, decode: list[step_pb2.StepRequest], mixed: list[step_pb2.StepRequest]
) -> dict[str, Callable[[], float]]:
    assert isinstance(oracle, SampledOracle)
    measures: dict[str, Callable[[], float]] = {}
    for kind, steps in (("decode", decode), ("mixed", mixed)):
        queries = [read_step(step)[0] for step in steps[:BATCH]]
        tokens = np.array([sum(query.chunk_tokens) + query.num_decode_tokens for query in queries])
        concurrency = np.array([query.concurrency for query in queries])
        indices = np.arange(len(queries))
        tree, points = _Trees(kind == "mixed"), _points(queries)

        table = "decode" if kind == "decode" else "prefill"
        columns = table, tokens, concurrency, np.zeros_like(tokens), KEY, indices

        def ours(columns: Any = columns) -> float:
            return nanoseconds_per_call(lambda _: oracle.answer_many(*columns), 10) / len(columns[1])

        def scipy(tree: _Trees = tree, points: NDArray[Any] = points) -> float:
            return nanoseconds_per_call(lambda _: tree.scipy.query(points, k=32), 2) / len(points)

        def sklearn(tree: _Trees = tree, points: NDArray[Any] = points) -> float:
            return nanoseconds_per_call(lambda _: tree.sklearn.query(points, k=32), 2) / len(points)

        measures[f"sampled, {kind}"] = ours
        measures[f"scipy cKDTree, {kind}"] = scipy
        measures[f"scikit-learn KDTree, {kind}"] = sklearn
    return measures


class _Trees:
    """The buckets of one table as the libraries take them; they find neighbours and draw nothing."""

    def __init__(self, prefill: bool) -> None:
        columns = sample_columns()
        chosen = columns["table"] == prefill
        cells = np.stack((columns["total_tokens"], columns["concurrency"] // CONCURRENCY_WIDTH), axis=1)[chosen]
        points = np.unique(cells, axis=0).astype(np.float64)
        self.points = points / np.maximum(1, np.ptp(points, axis=0))
        self.scipy = cKDTree(self.points)
        self.sklearn = KDTree(self.points)

    def numpy(self, points: NDArray[Any]) -> Callable[[int], object]:
        return lambda i: np.argpartition(((self.points - points[i % len(points)]) ** 2).sum(axis=1), 32)[:32]


def _points(queries: list[StepQuery]) -> NDArray[np.float64]:
    tokens = [(sum(q.chunk_tokens) + q.num_decode_tokens) / 8192 for q in queries]
    return np.column_stack((tokens, [q.concurrency / 256 for q in queries]))


def _timed(call: Callable[[int], object], calls: int) -> Callable[[], float]:
    return lambda: nanoseconds_per_call(call, calls)


def _ask(oracle: Oracle, queries: list[StepQuery]) -> Callable[[int], object]:
    return lambda i: oracle.answer(queries[i % len(queries)], KEY, i)


def _draw(oracle: Oracle, kind: str, queries: list[StepQuery]) -> Callable[[int], object]:
    """The compiled function with its dispatch, without what `answer` does around it."""
    assert isinstance(oracle, SampledOracle)
    table = oracle._tables["decode" if kind == "decode" else "prefill"]
    width = CONCURRENCY_WIDTH
    centers = [
        (sum(q.chunk_tokens) + q.num_decode_tokens, q.concurrency // width * width + width // 2) for q in queries
    ]
    return lambda i: draw_sample(*table, *centers[i % len(centers)], 30, 32, KEY, i)


def _nearest(tree: Any, points: NDArray[Any]) -> Callable[[int], object]:
    return lambda i: tree.query(points[i % len(points)], k=32)


def _sklearn(tree: Any, points: NDArray[Any]) -> Callable[[int], object]:
    return lambda i: tree.query(points[i % len(points)].reshape(1, 2), k=32)


def _python(python: Straightforward, steps: list[step_pb2.StepRequest]) -> Callable[[int], object]:
    return lambda i: python.latency_ns(steps[i % len(steps)].shape)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for group, found in measure(Path(name), rounds=3).items():
            for kernel, spread in found.items():
                print(f"{group:10} {kernel:40} {spread.text()}")
