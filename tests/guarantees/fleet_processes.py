"""Emulated engines shared out over processes, as real ones are: threads of one process wait for each other's Python."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from guarantees.shim_engines import ShimEngine, ShimFleet
from oracle_calls import TIMEOUT

# What a process takes to start, beside others that start.
START_SECONDS = 120


@dataclass(frozen=True)
class Done:
    """What the engines of a process have done."""

    steps: int
    leased: int
    went_back: int
    failures: list[str]


class FleetProcesses:
    """Runs while the block runs. Times are of the monotonic clock, which is one for all processes. One thread's."""

    def __init__(self, count: int, processes: int, make: Callable[[int], ShimEngine]) -> None:
        """`make` is called in the processes, so it has to be picklable."""
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection[Any, Any]] = []
        self._processes = []
        for number in range(processes):
            here, there = context.Pipe()
            self._connections.append(here)
            numbers = range(number, count, processes)
            self._processes.append(context.Process(target=_run, args=(there, numbers, make), daemon=True))

    def __enter__(self) -> FleetProcesses:
        for process in self._processes:
            process.start()
        self._answers(START_SECONDS)
        return self

    def __exit__(self, *error: object) -> None:
        for connection in self._connections:
            with suppress(OSError):
                connection.send(None)
        for process in self._processes:
            process.join(TIMEOUT)
            process.kill()

    @property
    def done(self) -> Done:
        """Of all; final once each engine has been stopped."""
        parts: list[Done] = self._ask("done")
        return Done(
            sum(part.steps for part in parts),
            sum(part.leased for part in parts),
            sum(part.went_back for part in parts),
            [failure for part in parts for failure in part.failures],
        )

    def go_on(self, steps: int) -> None:
        """As ShimFleet.go_on, of all at once."""
        self._ask("go_on", steps)

    def stop(self) -> None:
        """End the engines; what they did can still be asked."""
        self._ask("stop")

    def saw(self, generation: int, until: float) -> float | None:
        """When the last engine knew of this generation, or a later one; None where one does not before `until`."""
        seen: list[float | None] = self._ask("saw", generation, until)
        return None if None in seen else max(at for at in seen if at is not None)

    def _ask(self, name: str, *arguments: Any) -> list[Any]:
        for connection in self._connections:
            connection.send((name, *arguments))
        return self._answers(TIMEOUT * 4)

    def _answers(self, seconds: float) -> list[Any]:
        answers = []
        for connection in self._connections:
            assert connection.poll(seconds), "a process of the fleet does not answer"
            answer = connection.recv()
            if isinstance(answer, BaseException):
                raise answer
            answers.append(answer)
        return answers


def _run(connection: Connection[Any, Any], numbers: Sequence[int], make: Callable[[int], ShimEngine]) -> None:
    """One process: does what it is asked until told to end, or until whoever asked has gone."""
    fleet = ShimFleet(len(numbers), lambda at: make(numbers[at]))
    with fleet:
        connection.send("ready")
        with suppress(EOFError):
            while (asked := connection.recv()) is not None:
                name, *arguments = asked
                try:
                    connection.send(_ASKED[name](fleet, *arguments))
                except AssertionError as error:
                    connection.send(error)


def _saw(fleet: ShimFleet, generation: int, until: float) -> float | None:
    while True:
        seen = [engine.stream.saw(generation) for engine in fleet.engines]
        if None not in seen:
            return max(at for at in seen if at is not None)
        if time.monotonic() > until or fleet.failures:
            return None
        time.sleep(0.005)


def _done(fleet: ShimFleet) -> Done:
    engines = fleet.engines
    return Done(fleet.steps, sum(e.leased for e in engines), sum(e.went_back for e in engines), fleet.failures)


_ASKED: dict[str, Callable[..., Any]] = {"go_on": ShimFleet.go_on, "stop": ShimFleet.stop, "saw": _saw, "done": _done}
