"""A pack is swapped under streaming engines: no failed step, and every answer is that of one generation."""

from __future__ import annotations

import threading
from pathlib import Path

from oracle_calls import Calls, decode, identity, mixed_steps
from oracle_process import OracleProcess
from step_oracle.v1 import step_pb2

ENGINES = 6
STEPS = 400
SWAPS = 12


def test_every_answer_during_swaps_recomputes_from_the_generation_it_names(
    server: OracleProcess, calls: Calls, pack_dirs: dict[str, Path]
) -> None:
    digests = [calls.upload(pack_dirs["composed"]), calls.upload(pack_dirs["sampled"])]
    calls.create(digests[0], seed=1)
    answered: dict[str, list[step_pb2.StepReply]] = {f"e{i}": [] for i in range(ENGINES)}
    failures: list[BaseException] = []

    def stream_steps(engine_id: str) -> None:
        try:
            with Calls(server.target) as own:
                stream = own.join(engine_id)
                for step in mixed_steps(STEPS):
                    seen = answered[engine_id][-1].generation if answered[engine_id] else 0
                    answered[engine_id] += stream.ask(step, min_generation=seen)
                stream.close()
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            failures.append(error)

    threads = [threading.Thread(target=stream_steps, args=(engine_id,)) for engine_id in answered]
    for thread in threads:
        thread.start()
    swaps = 0
    while swaps < SWAPS or any(thread.is_alive() for thread in threads):
        swaps += 1
        calls.activate(digests[swaps % 2], seed=1 + swaps)
    for thread in threads:
        thread.join()

    assert not failures
    seen = set()
    by_generation: dict[int, dict[str, list[step_pb2.StepReply]]] = {}
    for engine_id, replies in answered.items():
        generations = [reply.generation for reply in replies]
        assert generations == sorted(generations)
        assert len(replies) == STEPS
        seen |= set(generations)
        for reply in replies:
            by_generation.setdefault(reply.generation, {}).setdefault(engine_id, []).append(reply)
    assert len(seen) > 3
    steps = {step.step_index: step for step in mixed_steps(STEPS)}
    for generation, engines in by_generation.items():
        # The binding of a generation, activated again, answers the same but for the generation it names.
        calls.activate(digests[(generation - 1) % 2], seed=generation)
        for engine_id, replies in engines.items():
            again = calls.sample(identity(engine_id), [steps[reply.step_index] for reply in replies])
            for reply, recomputed in zip(replies, again, strict=True):
                recomputed.generation = generation
                assert recomputed == reply


def test_steps_go_on_while_a_pack_is_checked(server: OracleProcess, calls: Calls, pack_dirs: dict[str, Path]) -> None:
    calls.create(calls.upload(pack_dirs["constant"]))
    stream = calls.join("e")
    uploads = [threading.Thread(target=calls.upload, args=(pack_dirs[name],)) for name in ("composed", "sampled")]
    for thread in uploads:
        thread.start()
    index = 0
    while any(thread.is_alive() for thread in uploads) or index == 0:
        assert stream.ask(decode(index))
        index += 1
    assert index > 20
    stream.close()
