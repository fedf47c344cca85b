"""Drives a captured engine through its plan, over its own OpenAI API, and watches what its capture has learned.

What is known of each region is read from the capture's files and from nowhere else: a plan that was interrupted goes on
where the runs in its folder end.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oracle_server.errors import InvalidArgument
from profiler.capture.engine import CapturedEngine
from profiler.capture.launch import runs_of
from profiler.capture.plan import (
    FEWEST_STEPS,
    EngineLimits,
    Visit,
    is_tight,
    standard_error_percent,
    visits,
)
from profiler.capture.steps import PLAN_FILE, CapturedStep, RunTail, read_run

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_SEED = 20260921
_DECODE_STEPS = 20
_INJECTIONS = 8
_BACKGROUND_PROMPT = 128
# A region that takes more of the plan's time than this is left to a longer plan.
_DEAREST = 0.1
# A visit ends here even if steps are missing.
_LONGEST = 0.15
_WARM_UP_ROUNDS = 3
_MOST_PASSES = 4
# Ids of ordinary tokens in any vocabulary: special ones lie at its ends.
_FIRST_TOKEN, _LAST_TOKEN = 300, 4000


@dataclass(frozen=True)
class PlanOptions:
    """How long, and how well a region has to be known: standard error of its mean in percent."""

    minutes: float
    target_percent: float


@dataclass
class Coverage:
    """What the capture has measured of each visit's region, in milliseconds. Owned by the driver's thread."""

    plan: Sequence[Visit]
    latencies: dict[Visit, list[float]] = field(default_factory=lambda: defaultdict(list))
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
                    self.latencies[visit].append(step.latency_ns / 1e6)

    def makes_a_pack(self) -> bool:
        """Whether a fit has the few steps of either kind without which it is refused."""
        return min(self.decode_steps, self.mixed_steps) >= 2 * FEWEST_STEPS

    def tight(self, target_percent: float) -> int:
        """Regions that need no further visit."""
        return sum(is_tight(self.latencies[visit], target_percent) for visit in self.plan)

    def seconds(self, visit: Visit) -> float:
        """What its prompts will take, as prompts have taken so far; 0 as long as nothing is known."""
        repeats = _INJECTIONS if visit.chunk else 1
        tokens = visit.requests * (_BACKGROUND_PROMPT if visit.chunk else visit.context)
        tokens += visit.chunk * visit.chunks * repeats
        return tokens * self.prefill_seconds / self.prefill_tokens if self.prefill_tokens else 0.0


def drive(engine: CapturedEngine, run: Path, options: PlanOptions) -> None:
    """Visit the plan's regions until each is tight or the time is over."""
    try:
        import openai
    except ModuleNotFoundError:
        raise InvalidArgument("--plan talks to the engine with openai: pip install openai", field="command") from None
    facts = json.loads((run / "engine.json").read_text(encoding="utf-8"))["engine"]
    client = openai.AsyncOpenAI(base_url=f"{engine.base_url}/v1", api_key="none", max_retries=0, timeout=600)
    driver = _Driver(client, run, _limits(facts), options, facts)
    try:
        asyncio.run(driver.drive())
    except openai.OpenAIError as error:
        raise InvalidArgument(f"the engine does not answer any more ({error}); its output says why") from None


class _Driver:
    """One plan over one engine; everything runs on one event loop."""

    def __init__(
        self, client: AsyncOpenAI, run: Path, limits: EngineLimits, options: PlanOptions, facts: dict[str, Any]
    ) -> None:
        self._client, self._run, self._limits, self._options = client, run, limits, options
        self._tokens = random.Random(_SEED)  # noqa: S311
        vocabulary = re.search(r"vocab=(\d+)", facts["model_shape"])
        self._last_token = min(_LAST_TOKEN, int(vocabulary[1]) - 100 if vocabulary else _LAST_TOKEN)
        self._model = ""
        self._coverage = Coverage(visits(limits))
        self._seconds = options.minutes * 60
        self._tail = RunTail(run)
        self._begin = time.monotonic()

    async def drive(self) -> None:
        self._model = (await self._client.models.list()).data[0].id
        for run in runs_of(self._run.parent):
            if run != self._run and (run / "engine.capture").exists():
                self._coverage.take(read_run(run, run / "engine.capture").steps)
        known = self._coverage.tight(self._options.target_percent)
        plan = self._coverage.plan
        self._say(f"plan: {len(plan)} regions, {known} known from earlier runs, {self._options.minutes:g} minutes")
        await self._warm_up()
        self._begin = time.monotonic()
        for number in range(_MOST_PASSES):
            if not await self._pass(number):
                break
        self._take_up()
        tight = self._coverage.tight(self._options.target_percent)
        seen = sum(len(self._coverage.latencies[visit]) >= FEWEST_STEPS for visit in plan)
        self._event("plan ends", tight=tight, measured=seen, regions=len(plan))
        self._say(f"plan: {tight} of {len(plan)} regions tight, {seen} measured, {self._spent():.0f} s")
        await self._client.close()

    async def _pass(self, number: int) -> bool:
        """Every region once that is not tight yet; whether another pass is worth it."""
        left = 0
        for at, visit in enumerate(self._coverage.plan, start=1):
            self._take_up()
            known = self._coverage.latencies[visit]
            if is_tight(known, self._options.target_percent):
                continue
            left += 1
            time_left = self._seconds - self._spent()
            if time_left <= 0 and self._coverage.makes_a_pack():
                return False
            dearest = _DEAREST * self._seconds
            if self._coverage.seconds(visit) > (min(dearest, time_left) if time_left > 0 else dearest):
                self._event("left out", visit=visit.label, reason="too dear for the time left")
                continue
            begin = time.monotonic()
            self._event("visit begins", visit=visit.label, level=visit.level)
            await (self._mixed(visit) if visit.chunk else self._decode(visit))
            self._take_up()
            self._tell(f"{number + 1}.{at}/{len(self._coverage.plan)}", visit, time.monotonic() - begin)
        return left > 0

    async def _decode(self, visit: Visit) -> None:
        prefill_steps = -(-visit.requests * visit.context // self._limits.max_num_batched_tokens)
        room = self._limits.max_model_len - visit.context
        tokens = max(1, min(_DECODE_STEPS + prefill_steps + 2, room))
        await asyncio.gather(*(self._request(visit.context, tokens) for _ in range(visit.requests)))

    async def _mixed(self, visit: Visit) -> None:
        """Prompts beside requests that decode; those are cancelled at the end, which vLLM takes as an abort."""
        decoding = [asyncio.Event() for _ in range(visit.requests)]
        background = [asyncio.create_task(self._stream(event)) for event in decoding]
        try:
            started = asyncio.create_task(_all_set(decoding))
            done, _ = await asyncio.wait([started, *background], return_when=asyncio.FIRST_COMPLETED)
            started.cancel()
            for task in done:
                task.result()
            begin = time.monotonic()
            for _ in range(_INJECTIONS):
                await asyncio.gather(*(self._request(visit.chunk, 1) for _ in range(visit.chunks)))
                if time.monotonic() - begin > _LONGEST * self._seconds:
                    break
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)

    async def _warm_up(self) -> None:
        """The first steps of a process wait for pages, caches and clocks: they are marked, and no pack holds them."""
        self._event("warm-up begins")
        limits = self._limits
        for size in sorted({1, min(8, limits.max_num_seqs)}) * _WARM_UP_ROUNDS:
            prompt = min(256, limits.max_model_len // 2, limits.kv_tokens // (2 * size))
            await asyncio.gather(*(self._request(prompt, 16) for _ in range(size)))
        self._event("warm-up ends")

    async def _request(self, prompt_tokens: int, output_tokens: int) -> None:
        await self._client.completions.create(
            model=self._model,
            prompt=self._prompt(prompt_tokens),
            max_tokens=output_tokens,
            extra_body={"ignore_eos": True},
        )

    async def _stream(self, first_token: asyncio.Event) -> None:
        stream = await self._client.completions.create(
            model=self._model,
            prompt=self._prompt(_BACKGROUND_PROMPT),
            max_tokens=self._limits.max_model_len - 2 * _BACKGROUND_PROMPT,
            extra_body={"ignore_eos": True},
            stream=True,
        )
        async for _ in stream:
            first_token.set()

    def _prompt(self, tokens: int) -> list[int]:
        """Random ids: two prompts share no beginning, so the prefix cache answers none of them."""
        return [self._tokens.randint(_FIRST_TOKEN, self._last_token) for _ in range(tokens)]

    def _take_up(self) -> None:
        self._coverage.take(self._tail.new_steps())

    def _tell(self, place: str, visit: Visit, seconds: float) -> None:
        known = self._coverage.latencies[visit]
        told = "nothing measured yet"
        if known:
            error = standard_error_percent(known)
            told = f"{len(known)} steps, {sorted(known)[len(known) // 2]:.3f} ms +- {error:.2f} %"
        left = max(0.0, self._seconds - self._spent())
        self._event("visit ends", visit=visit.label, steps=len(known), seconds=round(seconds, 2))
        self._say(f"[{place}] {visit.label}: {told}; {seconds:.1f} s, at most {left / 60:.1f} min left")

    def _event(self, event: str, **details: Any) -> None:
        line = json.dumps({"event": event, "monotonic_ns": time.monotonic_ns(), **details})
        with (self._run / PLAN_FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _spent(self) -> float:
        return time.monotonic() - self._begin

    def _say(self, line: str) -> None:
        print(f"step-oracle: {line}", flush=True)


async def _all_set(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


def _limits(facts: dict[str, Any]) -> EngineLimits:
    return EngineLimits(
        max_num_seqs=facts["max_num_seqs"],
        max_num_batched_tokens=facts["max_num_batched_tokens"],
        max_model_len=facts["max_model_len"],
        kv_tokens=facts["num_kv_blocks"] * facts["block_size"],
        graph_capture_sizes=tuple(facts["graph_capture_sizes"]),
    )
