"""A stable fraction over a real channel, and watchers while an experiment changes quickly."""

from __future__ import annotations

import math
import random
import threading
from pathlib import Path

import grpc

from oracle_calls import EXPERIMENT, TIMEOUT, Calls, identity
from oracle_process import OracleProcess
from step_oracle.v1 import experiment_pb2 as pb
from step_oracle.v1 import oracle_service_pb2

Dirs = dict[str, Path]
SERVERS = 2000


def arm_of(calls: Calls, engine_id: str) -> str:
    request = oracle_service_pb2.GetDeviceRequest(engine=identity(engine_id))
    return str(calls.oracle.GetDevice(request, timeout=TIMEOUT).pack_digest)


def test_half_of_2000_servers_is_within_its_binomial_bound_and_stays_where_it_is(
    calls: Calls, server: OracleProcess, pack_dirs: Dirs
) -> None:
    """Half of 2,000: 1,000 servers, five standard deviations are 112 (false alarm 6e-7)."""
    one, other = calls.upload(pack_dirs["constant"]), calls.upload(pack_dirs["constant20"])
    half = pb.Rule(fraction=0.5, fraction_salt="a/b", pack_digest=one)
    calls.create(other, rules=[half])
    engines = [f"vllm-{i}.fleet:8000" for i in range(SERVERS)]
    arms = {engine: arm_of(calls, engine) for engine in engines[:1000]}
    # Later ones move nobody, and a server's ranks go where it goes.
    arms |= {engine: arm_of(calls, engine) for engine in engines[1000:]}
    taken = sum(arm == one for arm in arms.values())
    print(f"{taken} of {SERVERS} servers in the arm of one half")
    assert abs(taken - SERVERS / 2) <= 5 * math.sqrt(SERVERS / 4)
    assert [arm_of(calls, engine) for engine in engines[:300]] == [arms[engine] for engine in engines[:300]]
    for engine in engines[:50]:
        assert {arm_of(calls, f"{engine}/dp{rank}") for rank in range(4)} == {arms[engine]}
    # Whatever else changes, and whichever process answers.
    calls.activate(other, rules=[half], seed=99, time_scale=2.0, overlays=[pb.Overlay(slow_down_factor=2)])
    server.kill()
    server.start()
    with Calls(server.target) as again:
        assert [arm_of(again, engine) for engine in engines[:300]] == [arms[engine] for engine in engines[:300]]


def test_watchers_that_hop_see_every_change_once_and_end_at_the_present(calls: Calls, pack_dirs: Dirs) -> None:
    """Generation g has the seed 10 g: a state that mixes two would show."""
    digest = calls.upload(pack_dirs["constant"])
    calls.create(digest, seed=10)
    last = 151
    seen: dict[int, list[int]] = {}
    failures: list[str] = []

    def watch(watcher: int) -> None:
        draw, generations = random.Random(watcher), seen.setdefault(watcher, [])
        try:
            while not generations or generations[-1] < last:
                after = generations[-1] if generations else 0
                request = pb.WatchExperimentRequest(name=EXPERIMENT, after_generation=after)
                call = calls.experiments.WatchExperiment(request, timeout=60)
                is_first = True
                for _ in range(draw.choice((1, 3, 20, 1000))):
                    experiment = next(call).experiment
                    generation = experiment.generation
                    if experiment.binding.seed != 10 * generation:
                        failures.append(f"generation {generation} has the seed {experiment.binding.seed}")
                    expected = generation > after if is_first else generation == generations[-1] + 1
                    if not expected:
                        failures.append(f"{generation} follows {generations[-3:]}")
                    generations.append(generation)
                    is_first = False
                    if generation == last:
                        break
                call.cancel()
        except (grpc.RpcError, StopIteration) as error:
            failures.append(repr(error))

    watchers = [threading.Thread(target=watch, args=(watcher,)) for watcher in range(6)]
    for thread in watchers:
        thread.start()
    for generation in range(2, last + 1):
        calls.activate(digest, seed=10 * generation)
    for thread in watchers:
        thread.join(60)
    assert not failures
    assert all(generations[-1] == last for generations in seen.values())
    # The present state comes first, so a hop may pass over what changed meanwhile; within a call nothing is missed.
    assert max(len(generations) for generations in seen.values()) > last / 2
