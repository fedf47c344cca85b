"""vLLM's CPU worker on a device that holds to a law: `make closed-loop ARGS="--steady"`.

Each step is computed as always, and ends when the law says it does. So capture, pack and emulation are set beside a
device that does not drift, on a machine that does, and the error that is left is theirs. Runs in vLLM's environment.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker

from .law import WEIGHTS_VARIABLE, requests_of, step_ms

logger = init_logger("vllm.step_oracle")

# Spread of a step about the law, as a share of it.
SIGMA = 0.02
_TOLD_EVERY = 100


class SteadyWorker(CPUWorker):  # type: ignore[misc]
    """Holds each step to its time. Of `steps`, `overrun` took longer to compute than the law allows."""

    steps = 0
    overrun = 0
    _end = 0.0
    _weights_ms = float(os.environ[WEIGHTS_VARIABLE])
    # Another sequence at each start of an engine.
    _draw = random.Random()  # noqa: S311

    def execute_model(self, scheduler_output: Any, *args: Any) -> Any:
        begin = time.monotonic()
        self._end = 0.0
        if scheduler_output.total_num_scheduled_tokens:
            milliseconds = step_ms(requests_of(scheduler_output), self._weights_ms)
            self._end = begin + 1e-3 * milliseconds * self._draw.lognormvariate(0.0, SIGMA)
        return super().execute_model(scheduler_output, *args)

    def sample_tokens(self, *args: Any) -> Any:
        output = super().sample_tokens(*args)
        if self._end:
            self.steps += 1
            self.overrun += time.monotonic() > self._end
            # vLLM may kill a worker before it has said anything at its end (0.32.0, seen).
            if self.steps % _TOLD_EVERY == 0:
                logger.info("steady device: %d of %d steps took longer than they should", self.overrun, self.steps)
            time.sleep(max(0.0, self._end - time.monotonic()))
        return output
