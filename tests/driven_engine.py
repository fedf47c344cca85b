"""An engine for the driver of a plan: no process and no waiting, but the files a captured engine writes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import captures
from profiler.capture.plan import EngineLimits
from profiler.capture.requests import RequestRefused
from profiler.capture.steps import CapturedStep

_LATENCY_NS = 5000


class DrivenEngine:
    """Schedules chunked prefill as vLLM does: what decodes first, then prompts as far as the step has room.

    `refuses` is asked with (prompt tokens, output tokens); `writes` says whether steps reach the capture's files.
    """

    def __init__(
        self,
        run: Path,
        limits: EngineLimits,
        *,
        refuses: Callable[[int, int], bool] = lambda prompt, output: False,
        worker_offset: int = 0,
    ) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self.writes = True
        self._run, self._limits, self._refuses, self._worker_offset = run, limits, refuses, worker_offset
        # Contexts of the requests that decode in the background.
        self._background: list[int] = []
        self._index, self._free_ns = 0, 0

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def rest(self, seconds: float) -> None:
        """Nothing to do for so long, in the times of its steps alone."""
        self._free_ns = max(self._free_ns, time.monotonic_ns()) + round(seconds * 1e9)

    async def complete(self, prompts: int, prompt_tokens: int, output_tokens: int) -> None:
        await asyncio.sleep(0)
        self.asked.append((prompts, prompt_tokens, output_tokens))
        if prompt_tokens + output_tokens > self._limits.max_model_len or self._refuses(prompt_tokens, output_tokens):
            raise RequestRefused(f"{prompt_tokens} + {output_tokens} tokens are too many")
        self._serve(prompts, prompt_tokens, output_tokens)

    async def generate(self, prompts: int, prompt_tokens: int, output_tokens: int, all_generate: asyncio.Event) -> None:
        await self.complete(prompts, prompt_tokens, 1)
        self._background = [prompt_tokens + 1] * prompts
        all_generate.set()
        try:
            await asyncio.Event().wait()
        finally:
            self._background = []

    def _serve(self, prompts: int, prompt_tokens: int, output_tokens: int) -> None:
        computed, left, steps = [0] * prompts, [output_tokens] * prompts, []
        while any(left):
            decoding = [at for at in range(prompts) if computed[at] >= prompt_tokens and left[at]]
            contexts = [*self._background, *(computed[at] + 1 for at in decoding)]
            room, chunks = self._limits.max_num_batched_tokens - len(contexts), []
            for at in range(prompts):
                if computed[at] < prompt_tokens and room:
                    chunks.append((at, min(room, prompt_tokens - computed[at]), computed[at]))
                    room -= chunks[-1][1]
            steps.append(self._step(contexts, [chunk for _, chunk, _ in chunks], [before for *_, before in chunks]))
            for at, chunk, _ in chunks:
                computed[at] += chunk
                left[at] -= computed[at] == prompt_tokens
            for at in decoding:
                computed[at] += 1
                left[at] -= 1
        if self.writes:
            captures.append(self._run, steps, worker_offset=self._worker_offset)

    def _step(self, contexts: list[int], chunks: list[int], before: list[int]) -> CapturedStep:
        dispatch_ns = max(self._free_ns, time.monotonic_ns())
        self._index, self._free_ns = self._index + 1, dispatch_ns + _LATENCY_NS + 2
        return CapturedStep(
            step_index=self._index,
            chunk_tokens=tuple(chunks),
            chunk_context=tuple(before),
            num_decode_requests=len(contexts),
            num_decode_tokens=len(contexts),
            decode_context_tokens=sum(contexts),
            max_decode_context_tokens=max(contexts, default=0),
            previous_prefill_tokens=0,
            num_new_requests=0,
            generated_tokens=len(contexts) + len(chunks),
            dispatch_ns=dispatch_ns,
            device_start_ns=dispatch_ns + 1,
            device_end_ns=dispatch_ns + 1 + _LATENCY_NS,
            result_ns=dispatch_ns + 2 + _LATENCY_NS,
            was_idle=True,
            warm_up=False,
        )
