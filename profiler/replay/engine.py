"""One vLLM engine core on a virtual clock."""

from __future__ import annotations

from collections import deque
from typing import Any

from oracle_server.errors import FailedPrecondition
from profiler.replay.executor import ReplayContext, ReplayExecutor
from profiler.replay.job import Request
from profiler.replay.local_oracle import LocalOracle
from profiler.replay.prompts import prompt_token_ids
from profiler.replay.times import RequestTimes

# Steps without a token and without a move of the clock after which an engine counts as stuck: vLLM would try for ever.
_STALLED_STEPS = 10_000


class ReplayStalled(FailedPrecondition):
    """The scheduler makes no progress: a request fits into no step."""


class ReplayEngine:
    """Owns an EngineCore and its executor. One thread."""

    def __init__(self, index: int, vllm_config: Any, context: ReplayContext) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.core import EngineCore

        self.index = index
        self.context = context
        self._sampling_params = SamplingParams
        self._core_request = EngineCoreRequest
        self._core = EngineCore(vllm_config, ReplayExecutor.for_engine(context), log_stats=False)
        self.executor: ReplayExecutor = self._core.model_executor
        self.max_model_len = int(vllm_config.model_config.max_model_len)
        self._vocab_size = int(vllm_config.model_config.get_vocab_size())
        self._stalled = 0
        self._open = 0
        # When requests finished, ascending; those a router has yet to learn of.
        self._finish_ns: deque[int] = deque()

    @property
    def now_ns(self) -> int:
        return self.context.clock.now_ns()

    @property
    def is_busy(self) -> bool:
        """Whether a call of `step` does anything; the step after the last finish clears the scheduler."""
        return bool(self._core.scheduler.has_requests() or self._core.batch_queue)

    @property
    def has_unfinished(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._core.scheduler.has_unfinished_requests())

    def begin_run(self, oracle: LocalOracle, trace_prefix: str) -> None:
        """The engine as after its start: nothing cached, time 0."""
        if not self._core.reset_prefix_cache():
            raise FailedPrecondition("the engine still holds KV blocks of the run before")
        self.context.clock.reset()
        self.context.times.clear()
        self._finish_ns.clear()
        self._stalled = self._open = 0
        self.executor.begin_run(oracle, trace_prefix)

    def in_flight(self, time_ns: int) -> int:
        """Requests routed here whose last token was not out at that time. Times of calls never decrease."""
        while self._finish_ns and self._finish_ns[0] <= time_ns:
            self._finish_ns.popleft()
        return self._open + len(self._finish_ns)

    def add(self, request: Request, arrival_ns: int, ordinal: int) -> None:
        """Takes a request; an idle engine takes it at its arrival, a busy one when it looks again."""
        clock = self.context.clock
        if not self.is_busy:
            clock.wait_until(arrival_ns)
        prompt = prompt_token_ids(request, ordinal, self._vocab_size)
        times = RequestTimes(request.request_id, self.index, arrival_ns, len(prompt), queued_ns=clock.now_ns())
        self.context.times[request.request_id] = times
        sampling = self._sampling_params(max_tokens=request.output_tokens, ignore_eos=True, temperature=0.0)
        core_request = self._core_request(
            request_id=request.request_id,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=arrival_ns * 1e-9,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        # Computes the hashes of the prompt's blocks: without it nothing would ever be found in the prefix cache.
        self._core.add_request(*self._core.preprocess_add_request(core_request))
        self._open += 1

    def step(self) -> list[RequestTimes]:
        """One turn of the engine core's loop; the requests that finished in it."""
        return self.turn()[0]

    def turn(self) -> tuple[list[RequestTimes], bool]:
        """As `step`, and whether it handed a step to the device. Nothing happens where there is nothing to do."""
        if not self.is_busy:
            return [], False
        before_ns = self.now_ns
        outputs, executed = self._core.step_fn()
        self._core.post_step(executed)
        now_ns = self.now_ns
        finished: list[RequestTimes] = []
        for output in (outputs or {}).values():
            for part in output.outputs:
                times = self.context.times[part.request_id]
                if part.new_token_ids:
                    if times.first_token_ns < 0:
                        times.first_token_ns = now_ns
                    times.last_token_ns = now_ns
                    times.output_tokens += len(part.new_token_ids)
                if part.finished:
                    self._open -= 1
                    self._finish_ns.append(now_ns)
                    finished.append(times)
        if executed or finished or now_ns > before_ns:
            self._stalled = 0
        else:
            self._stalled += 1
            if self._stalled > _STALLED_STEPS:
                raise ReplayStalled(
                    f"engine {self.index} makes no progress at {now_ns * 1e-9:.3f} s with {self._open} requests: one "
                    f"of them fits into no step (KV blocks: {self.executor.kv_blocks}, longest: {self.max_model_len})"
                )
        return finished, executed

    def shutdown(self) -> None:
        """The executor's end only: vLLM's own clears an accelerator, which 0.33.0 insists on having."""
        self.executor.shutdown()
