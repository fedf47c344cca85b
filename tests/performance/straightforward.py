"""The service one would write first: sync unary gRPC, a dict of buckets, all of them sorted on a miss.

    python tests/performance/straightforward.py PACK TARGET

It is what our server is measured against: the same wire messages, the same pack, LLM-Emu's rule of neighbours.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pyarrow.parquet as parquet

from step_oracle.v1 import oracle_service_pb2 as pb
from step_oracle.v1 import oracle_service_pb2_grpc

CONCURRENCY_WIDTH, MIN_SAMPLES, MAX_BUCKETS = 5, 30, 32


class Straightforward(oracle_service_pb2_grpc.OracleServiceServicer):
    """Answers SampleStep and nothing else."""

    def __init__(self, pack: Path) -> None:
        rows = parquet.read_table(pack / "samples.parquet").to_pydict()
        self.tables: tuple[dict[tuple[int, int], list[int]], ...] = (defaultdict(list), defaultdict(list))
        for table, tokens, concurrency, latency in zip(
            rows["table"], rows["total_tokens"], rows["concurrency"], rows["latency_ns"], strict=True
        ):
            self.tables[table][tokens, concurrency // CONCURRENCY_WIDTH].append(latency)
        self.ranges: list[list[int]] = [
            [max(1, max(axis) - min(axis)) for axis in zip(*table, strict=True)] for table in self.tables
        ]

    def SampleStep(self, request: pb.SampleStepRequest, context: Any) -> pb.SampleStepResponse:
        response = pb.SampleStepResponse()
        for step in request.steps:
            response.replies.add(step_index=step.step_index, latency_ns=[self.latency_ns(step.shape)])
        return response

    def latency_ns(self, shape: Any) -> int:
        prefill = bool(shape.prefill_chunks)
        table, (tokens_range, concurrency_range) = self.tables[prefill], self.ranges[prefill]
        tokens: int = sum(chunk.num_tokens for chunk in shape.prefill_chunks) + shape.num_decode_tokens
        concurrency: int = shape.concurrency // CONCURRENCY_WIDTH
        if (tokens, concurrency) in table:
            return random.choice(table[tokens, concurrency])

        def distance(bucket: tuple[int, int]) -> float:
            dt, dc = (bucket[0] - tokens) / tokens_range, (bucket[1] - concurrency) / concurrency_range
            return dt * dt + dc * dc

        chosen: list[tuple[int, int]] = []
        weights: list[float] = []
        samples = 0
        for d2, bucket in sorted((distance(bucket), bucket) for bucket in table):
            if samples >= MIN_SAMPLES or len(chosen) >= MAX_BUCKETS:
                break
            chosen.append(bucket)
            weights.append(1.0 / d2)
            samples += len(table[bucket])
        return random.choice(table[random.choices(chosen, weights)[0]])


def main() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=10))
    oracle_service_pb2_grpc.add_OracleServiceServicer_to_server(Straightforward(Path(sys.argv[1])), server)
    server.add_insecure_port(sys.argv[2])
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
