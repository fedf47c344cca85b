"""Drives a captured engine through its plan, over its own OpenAI API, and watches what its capture has learned.

What is known of each region is read from the capture's files and from nowhere else: a plan that was interrupted goes on
where the runs in its folder end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from oracle_server.errors import InvalidArgument
from profiler.capture.launch import runs_of
from profiler.capture.plan import (
    FEWEST_STEPS,
    EngineLimits,
    Visit,
    standard_error_percent,
    visits,
)
from profiler.capture.requests import PlanRequests, RequestRefused
from profiler.capture.steps import PLAN_FILE, CapturedStep, RunTail, read_capture

# A decode step gets cheaper over the first ones of a request; workloads see few of those.
_DECODE_STEPS = 32
_INJECTIONS = 8
# A region that takes more of the plan's time than this is left to a longer plan.
_DEAREST = 0.1
# A visit ends here even if steps are missing.
_LONGEST = 0.15
_WARM_UP_ROUNDS = 3
_MOST_PASSES = 4
# A region that so many visits did not reach is out of this engine's reach.
_MOST_IN_VAIN = 2
# Both kinds of step are worth more than the time that was asked for, but not more than so many times of it.
_OVERTIME = 2.0
# Seconds without a step, in rounds of which a plan makes what this share of its time allows; the prompt that ends one.
_PAUSES = (0.1, 0.4, 1.6, 6.4)
_PAUSE_ROUNDS = 4
_PAUSES_SHARE = 0.1
_PAUSE_PROMPT = 64
# Writers write four times a second.
_FIRST_STEPS_SECONDS = 10.0
_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class PlanOptions:
    """How long, and how well a region has to be known: standard error of its mean in percent."""

    minutes: float
    target_percent: float
    # The engine was driven before in this run: it is warm, and nothing that was measured before counts, here or in
    # earlier runs. Each part of a plan visits what the parts before it visited.
    is_further_part: bool = False
    # Place in the plan of the first visit; those before it come last.
    first_visit: int = 0


@dataclass(frozen=True)
class PlanResult:
    """Regions of a plan: known to the target, measured at all, and how many there are; and the place of the visit that
    would have been next, where another part goes on."""

    tight: int
    measured: int
    regions: int
    next_visit: int = 0


@dataclass
class Coverage:
    """What the capture has measured of each visit's region, in milliseconds. Owned by the driver's thread."""

    plan: Sequence[Visit]
    latencies: dict[Visit, list[float]] = field(default_factory=lambda: defaultdict(list))
    # The same as if all chunks had the visit's tokens and latency grew with them.
    _scaled: dict[Visit, list[float]] = field(default_factory=lambda: defaultdict(list))
    decode_steps: int = 0
    mixed_steps: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0

    def take(self, steps: Iterable[CapturedStep]) -> None:
        """Count steps, each once; those of a warm-up are no measurement."""
        for step in steps:
            if step.warm_up:
                continue
            self.mixed_steps += bool(step.chunk_tokens)
            self.decode_steps += not step.chunk_tokens
            if step.chunk_tokens:
                self.prefill_tokens += sum(step.chunk_tokens)
                self.prefill_seconds += step.latency_ns / 1e9
            for visit in self.plan:
                if bool(visit.chunk) == bool(step.chunk_tokens) and visit.holds(step):
                    latency_ms = step.latency_ns / 1e6
                    self.latencies[visit].append(latency_ms)
                    if visit.chunk:
                        scale = visit.chunk * visit.chunks / sum(step.chunk_tokens)
                        self._scaled[visit].append(latency_ms * scale)

    def makes_a_pack(self) -> bool:
        """Whether a fit has the few steps of either kind without which it is refused."""
        return min(self.decode_steps, self.mixed_steps) >= 2 * FEWEST_STEPS

    def error_percent(self, visit: Visit) -> float:
        """Standard error of the region's mean. Chunks of different lengths differ by that too: their spread is told
        as if latency grew with the tokens or not at all, whichever fits better."""
        error = standard_error_percent(self.latencies[visit])
        return min(error, standard_error_percent(self._scaled[visit])) if visit.chunk else error

    def is_tight(self, visit: Visit, target_percent: float) -> bool:
        """Whether a region needs no further visit."""
        return len(self.latencies[visit]) >= FEWEST_STEPS and self.error_percent(visit) <= target_percent

    def tight(self, target_percent: float) -> int:
        """Regions that need no further visit."""
        return sum(self.is_tight(visit, target_percent) for visit in self.plan)

    def measured(self) -> int:
        """Regions with as many steps as a mean needs, whatever their spread."""
        return sum(len(self.latencies[visit]) >= FEWEST_STEPS for visit in self.plan)

    def seconds(self, visit: Visit) -> float:
        """What its prompts will take, as prompts have taken so far; 0 as long as nothing is known."""
        repeats = _INJECTIONS if visit.chunk else 1
        tokens = visit.requests * visit.context + visit.prompt * visit.chunks * repeats
        return tokens * self.prefill_seconds / self.prefill_tokens if self.prefill_tokens else 0.0


class Engine(Protocol):
    """A captured engine that is ready: CapturedEngine, or whatever else knows where it answers."""

    @property
    def base_url(self) -> str: ...
    @property
    def api_key(self) -> str: ...


class Requests(Protocol):
    """What the driver asks of an engine: PlanRequests."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def complete(self, prompts: int, prompt_tokens: int, output_tokens: int) -> None: ...
    async def generate(
        self, prompts: int, prompt_tokens: int, output_tokens: int, all_generate: asyncio.Event
    ) -> None: ...


def drive(engine: Engine, run: Path, options: PlanOptions) -> PlanResult:
    """Visit the plan's regions until each is tight or the time is over. `run`: the folder the engine is captured into.

    Raises InvalidArgument where the engine fails, or where its steps do not reach the capture.
    """
    path = run / "engine.json"
    if not path.exists():
        message = (
            f"{engine.base_url} answers, but not the captured engine, which has not written {path}: another server has "
            "its address; end that one, or give --port to the engine"
        )
        raise InvalidArgument(message, field="engine")
    facts = json.loads(path.read_text(encoding="utf-8"))["engine"]
    vocabulary = re.search(r"vocab=(\d+)", facts["model_shape"])
    requests = PlanRequests(engine.base_url, engine.api_key, int(vocabulary[1]) if vocabulary else None)
    return asyncio.run(PlanDriver(requests, run, limits_of(facts), options).drive())


class PlanDriver:
    """One plan over one engine; everything runs on one event loop.

    Of an engine with several data-parallel ranks each is sent its share by vLLM's own balancer, and the first is
    watched: so many times the requests are sent.
    """

    def __init__(
        self,
        requests: Requests,
        run: Path,
        limits: EngineLimits,
        options: PlanOptions,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._requests, self._run, self._limits, self._options = requests, run, limits, options
        self._sleep = sleep
        self._ranks = max(1, len(list(run.glob("engine*.json"))))
        plan = visits(limits)
        self._first = options.first_visit % max(1, len(plan))
        self._coverage = Coverage([*plan[self._first :], *plan[: self._first]])
        # Visits of the pass that have been made or left out.
        self._done = 0
        self._seconds = options.minutes * 60
        self._tail = RunTail(run)
        self._refused: set[Visit] = set()
        self._in_vain: Counter[Visit] = Counter()
        # A later pass goes on where the one before ended.
        self._lengths: dict[Visit, Iterator[int]] = {}
        self._begin = time.monotonic()

    async def drive(self) -> PlanResult:
        """Raises InvalidArgument where the engine fails, or where its steps do not reach the capture."""
        await self._requests.open()
        if self._options.is_further_part:
            self._tail.new_steps()
        else:
            self._take_earlier_runs()
        known = self._coverage.tight(self._options.target_percent)
        plan = self._coverage.plan
        measured = self._coverage.measured()
        self._event("plan begins", regions=len(plan), known=known, measured=measured, minutes=self._options.minutes)
        self._say(f"plan: {len(plan)} regions, {known} known from earlier runs, {self._options.minutes:g} minutes")
        if not self._options.is_further_part:
            await self._warm_up()
        self._begin = time.monotonic()
        await self._pauses()
        for number in range(_MOST_PASSES):
            if not await self._pass(number):
                break
        self._take_up()
        tight, seen = self._coverage.tight(self._options.target_percent), self._coverage.measured()
        self._event("plan ends", tight=tight, measured=seen, regions=len(plan))
        self._say(f"plan: {tight} of {len(plan)} regions tight, {seen} measured, {self._spent():.0f} s")
        await self._requests.close()
        return PlanResult(tight, seen, len(plan), (self._first + self._done) % max(1, len(plan)))

    def _take_earlier_runs(self) -> None:
        for run in runs_of(self._run.parent):
            if run == self._run:
                continue
            try:
                earlier = read_capture(run)[0]
            except InvalidArgument as error:
                self._say(f"{run.name} is not taken into account: {error.message}")
            else:
                self._coverage.take(earlier.steps)

    async def _pass(self, number: int) -> bool:
        """Every region once that is not tight yet; whether another pass is worth it."""
        left = 0
        for at, visit in enumerate(self._coverage.plan, start=1):
            self._done = at - 1
            self._take_up()
            known = len(self._coverage.latencies[visit])
            if self._is_settled(visit):
                continue
            left += 1
            place = f"{number + 1}.{at}/{len(self._coverage.plan)}"
            time_left = self._seconds - self._spent()
            if time_left <= 0 and (self._coverage.makes_a_pack() or self._spent() > _OVERTIME * self._seconds):
                return False
            dearest = _DEAREST * self._seconds
            if self._coverage.seconds(visit) > (min(dearest, time_left) if time_left > 0 else dearest):
                self._event("left out", visit=visit.label, reason="too dear for the time left")
                self._say(f"[{place}] {visit.label}: left out, too dear for the time left")
                continue
            begin = time.monotonic()
            self._event("visit begins", visit=visit.label, level=visit.level)
            try:
                await (self._mixed(visit) if visit.chunk else self._decode(visit))
            except RequestRefused as refusal:
                self._refused.add(visit)
                self._event("left out", visit=visit.label, reason=f"refused: {refusal}")
                self._say(f"[{place}] {visit.label}: left out, the engine refuses it: {refusal}")
                continue
            self._take_up()
            self._in_vain[visit] += len(self._coverage.latencies[visit]) == known
            self._tell(place, visit, time.monotonic() - begin)
        self._done = len(self._coverage.plan)
        return left > 0

    def _is_settled(self, visit: Visit) -> bool:
        if visit in self._refused or self._in_vain[visit] >= _MOST_IN_VAIN:
            return True
        return self._coverage.is_tight(visit, self._options.target_percent)

    async def _decode(self, visit: Visit) -> None:
        prefill_steps = -(-visit.requests * visit.context // self._limits.max_num_batched_tokens)
        room = self._limits.max_model_len - visit.context
        tokens = max(1, min(_DECODE_STEPS + prefill_steps + 2, room))
        await self._requests.complete(visit.requests * self._ranks, visit.context, tokens)

    async def _mixed(self, visit: Visit) -> None:
        """Prompts beside requests that decode; those are cancelled at the end, which vLLM takes as an abort."""
        begin = time.monotonic()
        lengths = self._lengths.setdefault(visit, visit.prompts(self._limits.max_num_batched_tokens))
        async with self._decoding(visit):
            for _ in range(_INJECTIONS):
                await self._requests.complete(visit.chunks * self._ranks, next(lengths), 1)
                if time.monotonic() - begin > _LONGEST * self._seconds:
                    break

    @contextlib.asynccontextmanager
    async def _decoding(self, visit: Visit) -> AsyncIterator[None]:
        """While the visit's requests decode, where it has any."""
        if not visit.requests:
            yield
            return
        prompts, room = visit.requests * self._ranks, self._limits.max_model_len - visit.context
        all_generate = asyncio.Event()
        decoding = asyncio.create_task(self._requests.generate(prompts, visit.context, room, all_generate))
        begun = asyncio.create_task(all_generate.wait())
        try:
            await asyncio.wait([begun, decoding], return_when=asyncio.FIRST_COMPLETED)
            if decoding.done():
                # It failed, or ended before the first chunk came: a model of few tokens.
                decoding.result()
            yield
        finally:
            begun.cancel()
            decoding.cancel()
            await asyncio.gather(begun, decoding, return_exceptions=True)

    async def _warm_up(self) -> None:
        """The first steps of a process wait for pages, caches and clocks: they are marked, and no pack holds them."""
        self._event("warm-up begins")
        limits = self._limits
        try:
            for size in sorted({1, min(8, limits.max_num_seqs)}) * _WARM_UP_ROUNDS:
                prompt = max(1, min(256, limits.max_model_len // 2, limits.kv_tokens // (2 * size)))
                output = max(1, min(16, limits.max_model_len - prompt))
                await self._requests.complete(size * self._ranks, prompt, output)
        except RequestRefused as refusal:
            raise InvalidArgument(f"the engine refuses the plan's warm-up: {refusal}", field="engine") from None
        await self._first_steps()
        self._event("warm-up ends")

    async def _pauses(self) -> None:
        """A short prompt after each of some pauses: what a device that has rested takes longer."""
        slept, most = 0.0, _PAUSES_SHARE * self._seconds
        prompt = max(1, min(_PAUSE_PROMPT, self._limits.max_model_len // 2))
        for pause in _PAUSES * _PAUSE_ROUNDS:
            if slept + pause <= most:
                await self._sleep(pause)
                slept += pause
                await self._requests.complete(self._ranks, prompt, 1)
        self._event("pauses end", seconds=round(slept, 1))

    async def _first_steps(self) -> None:
        """Until a step of the warm-up is in every file: where none comes, none ever will."""
        end = time.monotonic() + _FIRST_STEPS_SECONDS
        while not self._take_up():
            if time.monotonic() > end:
                message = (
                    "the engine served requests, but no step reached a rank's file: its executor does not call the "
                    "captured worker, or the workers are on another machine"
                )
                raise InvalidArgument(message, field="engine")
            await asyncio.sleep(_LOOK_SECONDS)

    def _take_up(self) -> int:
        steps = self._tail.new_steps()
        self._coverage.take(steps)
        return len(steps)

    def _tell(self, place: str, visit: Visit, seconds: float) -> None:
        known = self._coverage.latencies[visit]
        told = "nothing measured yet"
        if known:
            error = self._coverage.error_percent(visit)
            told = f"{len(known)} steps, {sorted(known)[len(known) // 2]:.3f} ms +- {error:.2f} %"
        left = max(0.0, self._seconds - self._spent())
        tight = self._coverage.is_tight(visit, self._options.target_percent)
        # Steps of one region's visit count for others too.
        regions = {
            "regions_tight": self._coverage.tight(self._options.target_percent),
            "regions_measured": self._coverage.measured(),
        }
        self._event(
            "visit ends", visit=visit.label, steps=len(known), seconds=round(seconds, 2), tight=tight, **regions
        )
        self._say(f"[{place}] {visit.label}: {told}; {seconds:.1f} s, at most {left / 60:.1f} min left")

    def _event(self, event: str, **details: Any) -> None:
        line = json.dumps({"event": event, "monotonic_ns": time.monotonic_ns(), **details})
        with (self._run / PLAN_FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _spent(self) -> float:
        return time.monotonic() - self._begin

    def _say(self, line: str) -> None:
        print(f"step-oracle: {line}", flush=True)


def limits_of(facts: dict[str, Any]) -> EngineLimits:
    return EngineLimits(
        max_num_seqs=facts["max_num_seqs"],
        max_num_batched_tokens=facts["max_num_batched_tokens"],
        max_model_len=facts["max_model_len"],
        kv_tokens=facts["num_kv_blocks"] * facts["block_size"],
        graph_capture_sizes=tuple(facts["graph_capture_sizes"]),
    )
