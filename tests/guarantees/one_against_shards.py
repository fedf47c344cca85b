"""One process and four shards answer the same steps of a pinned generation: byte for byte alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from guarantees.hot_swaps import binding_of, build_packs
from guarantees.row import Guarantee, Row, judged
from oracle_calls import Calls, Stream, identity, mixed_steps
from oracle_process import OracleProcess
from sharded_server import shard_pids, wait_for
from step_oracle.v1 import step_pb2

SHARDS = 4
# Has an overlay, so that schedules are compared as well.
GENERATION_LIKE = 8


@dataclass(frozen=True)
class Sizes:
    steps: int
    # Of one message; every tenth goes over the engine's stream, the others are SampleStep calls.
    batch: int = 500
    engines: int = 5


LONG = Sizes(steps=200_000)
QUICK = Sizes(steps=12_000)


def batches(sizes: Sizes) -> Iterator[tuple[int, list[step_pb2.StepRequest]]]:
    """(Number, steps): shapes repeat every few thousand steps, indices never do, so every draw is another."""
    shapes = mixed_steps(4 * sizes.batch)
    for number in range(-(-sizes.steps // sizes.batch)):
        begin = number * sizes.batch
        steps = [
            step_pb2.StepRequest(step_index=i, device_time_ns=i * 10_000_000, shape=shapes[i % len(shapes)].shape)
            for i in range(begin, min(begin + sizes.batch, sizes.steps))
        ]
        yield number, steps


def run(folder: Path, sizes: Sizes) -> list[Row]:
    listen = ("127.0.0.1:0", f"unix:{folder}/s")
    packs = build_packs(folder)
    with (
        OracleProcess(folder / "one") as one,
        OracleProcess(folder / "many", listen=listen, arguments=("--shards", str(SHARDS))) as many,
        Calls(one.target) as alone,
    ):
        wait_for(lambda: len(shard_pids(many)) == SHARDS)
        shards = [Calls(target) for target in many.targets[1:]]
        names = []
        for pack in packs:
            for calls in (alone, shards[0]):
                name = str(calls.create(calls.upload(pack), pack.name, **binding_of(GENERATION_LIKE)).name)
            names.append(name)
        compared, different = compare(alone, shards, names, sizes)
    return [
        judged(
            "one process and four shards answer alike",
            f"{compared:,} steps at a pinned generation of three packs, overlays included, each shard a quarter",
            f"{different} differences",
            "0",
            holds=different == 0 and compared == sizes.steps,
        )
    ]


def compare(alone: Calls, others: Sequence[Calls], experiments: Sequence[str], sizes: Sizes) -> tuple[int, int]:
    """(Steps, differences) of one server and of others, whose connections are closed. Each of them gets its share."""
    compared = different = 0
    streams: dict[tuple[int, int], Stream] = {}
    for number, steps in batches(sizes):
        experiment, other = number % len(experiments), number % len(others)
        engine = identity(f"vllm-{number % sizes.engines}", experiments[experiment])
        expected = alone.sample(engine, steps, min_generation=1)
        if number % 10:
            replies = others[other].sample(engine, steps, min_generation=1)
        else:
            own = identity(f"stream-{other}-{experiment}", experiments[experiment])
            expected = alone.sample(own, steps, min_generation=1)
            key = (other, experiment)
            if key not in streams:
                streams[key] = others[other].open(own, others[other].attach(own).incarnation)
            replies = streams[key].ask(*steps, min_generation=1)
        compared += len(steps)
        different += len(expected) != len(replies)
        different += sum(a != b for a, b in zip(expected, replies, strict=False))
    for stream in streams.values():
        stream.close()
    for calls in others:
        calls.__exit__(None, None, None)
    return compared, different


GUARANTEE = Guarantee(run, LONG, QUICK)
