"""The fleet between two polls: what `step-oracle top` shows, as plain values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from oracle_server.rpc.metrics import LATENESS_BOUNDS_SECONDS

# How long an engine that is gone stays in sight.
GONE_SECONDS = 15.0

# What is wrong with an engine, worst first.
STATES = ("gone", "late", "starting", "degraded", "ok")


@dataclass(frozen=True, slots=True)
class Counts:
    """What an engine did so far; the same fields of two polls differ by what it did in between."""

    steps: int = 0
    extrapolated_steps: int = 0
    leased_steps: int = 0
    late_answers: int = 0
    reconnects: int = 0
    lateness_buckets: tuple[int, ...] = ()

    def since(self, before: Counts) -> Counts | None:
        """The difference; None where a count fell: they began anew."""
        numbers = {name: getattr(self, name) - getattr(before, name) for name in _NUMBERS}
        known = before.lateness_buckets
        missing = len(self.lateness_buckets) - len(known)
        buckets = [now - then for now, then in zip(self.lateness_buckets, (*known, *[0] * missing), strict=False)]
        if missing < 0 or min(*numbers.values(), *buckets) < 0:
            return None
        return Counts(**numbers, lateness_buckets=tuple(buckets))


_NUMBERS = ("steps", "extrapolated_steps", "leased_steps", "late_answers", "reconnects")


@dataclass(frozen=True, slots=True)
class EnginePoll:
    """One engine at one moment."""

    experiment: str
    engine_id: str
    incarnation: int
    pack: str
    generation: int
    streaming: bool
    counts: Counts
    # Its tenant is over its step rate, and it takes steps.
    over_rate: bool = False


# An engine, what it did, and in how many seconds: None where that is all it did so far.
_Done = tuple[EnginePoll, Counts, float | None]


@dataclass(frozen=True, slots=True)
class ExperimentPoll:
    """One experiment at one moment."""

    name: str
    generation: int
    packs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Poll:
    """What the server said at one moment; `at` in seconds of a monotonic clock."""

    at: float
    health: str
    experiments: tuple[ExperimentPoll, ...]
    engines: tuple[EnginePoll, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of an interval, for one engine or the sum of several. None: nothing to say it from."""

    steps_per_second: float | None
    extrapolated_share: float | None
    lease_share: float | None
    lateness_p50_seconds: float | None
    lateness_p99_seconds: float | None
    # In the interval; the others below since the server knows the engine.
    new_late_answers: int
    late_answers: int
    reconnects: int


@dataclass(frozen=True, slots=True)
class EngineLine:
    """One engine as shown; `state` is one of STATES."""

    engine: EnginePoll
    state: str
    figures: Figures


@dataclass(frozen=True, slots=True)
class ExperimentLine:
    """One experiment with the sums of its engines."""

    experiment: ExperimentPoll
    engines: int
    streaming: int
    degraded: int
    figures: Figures


@dataclass(frozen=True, slots=True)
class View:
    """Everything of one frame."""

    health: str
    interval_seconds: float | None
    total: ExperimentLine
    experiments: tuple[ExperimentLine, ...]
    engines: tuple[EngineLine, ...]


@dataclass(slots=True)
class Fleet:
    """Compares each poll with the one before. Owned by the loop that polls."""

    _last_at: float | None = None
    # Every engine as it was seen last, and when.
    _seen: dict[tuple[str, str], tuple[float, EnginePoll]] = field(default_factory=dict)

    def advance(self, poll: Poll) -> tuple[View, bool]:
        """(the frame of this poll, whether the server's counts began anew since the last one)."""
        restarted = False
        done: list[_Done] = []
        for engine in poll.engines:
            at, known = self._seen.get(_key(engine), (poll.at, None))
            difference = None
            if known is not None and known.incarnation == engine.incarnation:
                difference = engine.counts.since(known.counts)
                restarted |= difference is None
            # Without a poll to compare with, its shares are of all it did so far and its rate is unknown.
            if difference is None:
                done.append((engine, engine.counts, None))
            else:
                done.append((engine, difference, poll.at - at))
        present = {_key(engine) for engine in poll.engines}
        gone = {
            key: seen for key, seen in self._seen.items() if poll.at - seen[0] < GONE_SECONDS and key not in present
        }
        self._seen = gone | {_key(engine): (poll.at, engine) for engine in poll.engines}
        seconds = None if self._last_at is None else poll.at - self._last_at
        self._last_at = poll.at
        lines = [_line(engine, counts, over) for engine, counts, over in done]
        lines += [_gone_line(engine) for _, engine in gone.values()]
        experiments = []
        for experiment in poll.experiments:
            theirs = [each for each in done if each[0].experiment == experiment.name]
            experiments.append(_sum_line(experiment, theirs, lines))
        total = _sum_line(ExperimentPoll("", 0, ()), done, lines)
        return View(poll.health, seconds, total, tuple(experiments), tuple(lines)), restarted


def sort_lines(lines: Iterable[EngineLine], order: str) -> list[EngineLine]:
    """By `trouble` (the state, worst first), `steps` or `lateness` (largest first), `engine` (its id)."""

    def place(line: EngineLine) -> tuple[float, str, list[str | int]]:
        first = {
            "trouble": float(STATES.index(line.state)),
            "steps": -(line.figures.steps_per_second or 0.0),
            "lateness": -(line.figures.lateness_p99_seconds or 0.0),
            "engine": 0.0,
        }[order]
        return first, line.engine.experiment, _natural(line.engine.engine_id)

    return sorted(lines, key=place)


def quantile(buckets: Sequence[int], q: float) -> float | None:
    """Seconds at quantile `q`, linear inside its bucket as Prometheus does; None without any count.

    The last bucket has no upper bound: inside it the answer is infinity.
    """
    total = sum(buckets)
    if not total:
        return None
    rank, below = q * total, 0
    for i, count in enumerate(buckets):
        if count and below + count >= rank:
            if i >= len(LATENESS_BOUNDS_SECONDS):
                return float("inf")
            begin = LATENESS_BOUNDS_SECONDS[i - 1] if i else 0.0
            return begin + (LATENESS_BOUNDS_SECONDS[i] - begin) * (rank - below) / count
        below += count
    return float("inf")


def _natural(text: str) -> list[str | int]:
    """Orders engine-9 before engine-10: texts and numbers take turns."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", text)]


def _key(engine: EnginePoll) -> tuple[str, str]:
    return engine.experiment, engine.engine_id


def _line(engine: EnginePoll, done: Counts, seconds: float | None) -> EngineLine:
    if not engine.streaming:
        state = "starting"
    elif seconds is not None and done.late_answers:
        state = "late"
    else:
        state = "degraded" if engine.counts.late_answers or engine.over_rate else "ok"
    return EngineLine(engine, state, _figures([(engine, done, seconds)]))


def _gone_line(engine: EnginePoll) -> EngineLine:
    totals = engine.counts
    return EngineLine(engine, "gone", Figures(None, None, None, None, None, 0, totals.late_answers, totals.reconnects))


def _sum_line(experiment: ExperimentPoll, done: Sequence[_Done], lines: Iterable[EngineLine]) -> ExperimentLine:
    states = [line.state for line in lines if line.engine.experiment == experiment.name or not experiment.name]
    return ExperimentLine(
        experiment,
        engines=len(done),
        streaming=sum(engine.streaming for engine, _, _ in done),
        degraded=sum(state in ("late", "degraded") for state in states),
        figures=_figures(done),
    )


def _figures(done: Sequence[_Done]) -> Figures:
    steps = sum(counts.steps for _, counts, _ in done)
    rates = [counts.steps / seconds for _, counts, seconds in done if seconds]
    buckets = [0] * max((len(counts.lateness_buckets) for _, counts, _ in done), default=0)
    for _, counts, _ in done:
        for i, count in enumerate(counts.lateness_buckets):
            buckets[i] += count
    return Figures(
        steps_per_second=sum(rates) if rates else None,
        extrapolated_share=sum(c.extrapolated_steps for _, c, _ in done) / steps if steps else None,
        lease_share=sum(c.leased_steps for _, c, _ in done) / steps if steps else None,
        lateness_p50_seconds=quantile(buckets, 0.5),
        lateness_p99_seconds=quantile(buckets, 0.99),
        new_late_answers=sum(c.late_answers for _, c, seconds in done if seconds),
        late_answers=sum(engine.counts.late_answers for engine, _, _ in done),
        reconnects=sum(engine.counts.reconnects for engine, _, _ in done),
    )
