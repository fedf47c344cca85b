"""Emulated engines on the shim's own stream, leases included, that keep a trace of every answer."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from oracle_calls import EXPERIMENT, TIMEOUT, Calls, decode, identity, prefill
from oracle_server.rpc.channel import ANONYMOUS, Access
from step_oracle.v1 import oracle_service_pb2, step_pb2, trace_pb2
from vllm_shim.config import ShimConfig
from vllm_shim.lease import message_of
from vllm_shim.step_shape import DecodeStep
from vllm_shim.stream import OracleStream, replicas_of
from vllm_shim.trace import TraceWriter


class WatchedStream(OracleStream):
    """Notes when its engine first knows of each generation, and how often it opens. Written by the reader thread."""

    def __init__(self, *arguments: object) -> None:
        # Before the reader thread starts.
        self.seen: list[tuple[int, float]] = []
        self.opens = 0
        super().__init__(*arguments)  # type: ignore[arg-type]

    def _see(self, generation: int) -> None:
        super()._see(generation)
        if not self.seen or generation > self.seen[-1][0]:
            self.seen.append((generation, time.monotonic()))

    def _open(self) -> Any:
        self.opens += 1
        return super()._open()

    @property
    def moves(self) -> int:
        """How often a stream followed another."""
        return self.opens - 1

    def saw(self, generation: int) -> float | None:
        """When the engine knew of this generation or a later one; None if it does not yet."""
        at = None
        for number, seen_at in reversed(self.seen):
            if number < generation:
                break
            at = seen_at
        return at


class ShimEngine:
    """One engine: decode steps of a batch that grows and shrinks, a prefill now and then, one step each period.

    Its thread writes everything but `stream.seen`; read when it has ended, or as counts that only grow.
    """

    def __init__(
        self,
        target: str,
        engine_id: str,
        traces: Path,
        *,
        seed: int,
        period_seconds: float,
        leases: bool = True,
        experiment: str = EXPERIMENT,
        access: Access = ANONYMOUS,
        budget_seconds: float = 10.0,
    ) -> None:
        self.engine_id = engine_id
        self.steps = 0
        self.leased = 0
        self.went_back = 0
        self.failure: BaseException | None = None
        self.answered_at: list[float] = []
        # How long each answer over the wire took, and the first one after each move, from the step's submission.
        self.waits_ms: list[float] = []
        self.waits_after_move_ms: list[float] = []
        self.period_seconds = period_seconds
        self._draw = random.Random(seed)
        self._stop = threading.Event()
        engine = identity(engine_id, experiment)
        variables = {f"STEP_ORACLE_{name.upper()}": value for name, value in asdict(access).items() if value}
        variables |= {"STEP_ORACLE_TARGET": target, "STEP_ORACLE_BUDGET_SECONDS": str(budget_seconds)}
        config = ShimConfig.from_environment(variables, [])
        with Calls(target, access) as calls:
            incarnation = calls.attach(engine).incarnation
        opening = oracle_service_pb2.StreamOpen(engine=engine, incarnation=incarnation, leases=leases)
        self.stream = WatchedStream(config, replicas_of(config), opening)
        self._trace = TraceWriter(f"{traces}/", trace_pb2.TraceHeader(engine=engine))
        self._thread = threading.Thread(target=self._run, name=engine_id, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it and its stream; its failure stays readable."""
        self._stop.set()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), f"{self.engine_id} waits for an answer that does not come"
        self.stream.close()
        self._trace.close()

    def _run(self) -> None:
        requests, context, generation, moves = 4, 4000, 0, 0
        due = time.monotonic() + self._draw.random() * self.period_seconds
        try:
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                due = max(due + self.period_seconds, time.monotonic() - self.period_seconds)
                if self._draw.random() < 0.1:
                    requests = self._draw.randint(1, 60)
                    context = requests * self._draw.randint(20, 3000)
                    request = prefill(self.steps, (self._draw.randint(1, 900), 16 * self._draw.randrange(7)))
                    pending = self.stream.submit(request)
                else:
                    context += requests
                    longest = -(-context // requests)
                    request = decode(self.steps, requests, context)
                    shape = DecodeStep([], [], [], requests, context, longest, 0)
                    pending = self.stream.submit_decode(self.steps, shape, self._always(request))
                reply = self.stream.wait(pending)
                self.answered_at.append(time.monotonic())
                assert reply.step_index == self.steps, f"step {self.steps} got the answer of {reply.step_index}"
                self.went_back += reply.generation < generation
                generation = reply.generation
                self.leased += pending.lease is not None
                if pending.lease is None:
                    self.waits_ms.append((pending.answer_ns - pending.submit_ns) / 1e6)
                    if self.stream.moves > moves:
                        moves = self.stream.moves
                        self.waits_after_move_ms.append(self.waits_ms[-1])
                self._trace.write(trace_pb2.TraceStep(request=request, reply=message_of(reply)))
                self.steps += 1
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            self.failure = error

    @staticmethod
    def _always(request: step_pb2.StepRequest) -> Callable[[DecodeStep], step_pb2.StepRequest]:
        return lambda _: request


class ShimFleet:
    """Engines that run while the block runs. Owned by the thread that made it."""

    def __init__(self, count: int, make: Callable[[int], ShimEngine]) -> None:
        self.engines = [make(number) for number in range(count)]

    def __enter__(self) -> ShimFleet:
        for engine in self.engines:
            engine.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all engines; what they did stays readable. May be called again."""
        for engine in self.engines:
            engine.stop()

    @property
    def steps(self) -> int:
        return sum(engine.steps for engine in self.engines)

    @property
    def failures(self) -> list[str]:
        """One sentence for each engine that has failed."""
        return [f"{e.engine_id}: {e.failure!r}" for e in self.engines if e.failure is not None]

    def go_on(self, steps: int) -> None:
        """Wait until each engine has taken so many more, or one has failed; AssertionError after a while."""
        before = [engine.steps for engine in self.engines]
        end = time.monotonic() + TIMEOUT + steps * self.engines[0].period_seconds * 4
        while not self.failures and any(e.steps < b + steps for e, b in zip(self.engines, before, strict=True)):
            assert time.monotonic() < end, "the engines do not go on"
            time.sleep(0.005)
