"""Which engine takes a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Routed(Protocol):
    """What a router knows of an engine."""

    index: int

    def in_flight(self, time_ns: int) -> int: ...


_Engine = TypeVar("_Engine", bound=Routed)


class Router:
    """Takes turns, or takes the engine with the fewest requests in flight; ties go to the lower index."""

    def __init__(self, name: str) -> None:
        self._takes_turns = name == "round_robin"
        self.routed = 0

    def begin_run(self) -> None:
        self.routed = 0

    def choose(self, engines: Sequence[_Engine], arrival_ns: int) -> _Engine:
        self.routed += 1
        if self._takes_turns:
            return engines[(self.routed - 1) % len(engines)]
        return min(engines, key=lambda engine: (engine.in_flight(arrival_ns), engine.index))
