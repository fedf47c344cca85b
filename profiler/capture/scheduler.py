"""The engine core's side of a capture: `--scheduler-cls profiler.capture.scheduler.capture_scheduler`.

vLLM's own scheduler, with a look at what `schedule` returns and at what `update_from_output` is given: the two ends of
a step wherever its workers run, under any executor, with and without asynchronous scheduling. `get_grammar_bitmask`
comes between them, when the executor has the step (0.18.1 to 0.33.0, read); where it does not come nothing is lost.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiler.capture.facts import engine_facts, write_facts
from profiler.capture.launch import CAPTURE, SCHEDULER
from profiler.capture.recording import SchedulerRecording

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def capture_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
    """The scheduler this engine would have had, observed. vLLM calls it as it would call a scheduler class."""
    _refuse_uncalled_workers(vllm_config)
    base = _scheduler_class(vllm_config)

    class CaptureScheduler(base):  # type: ignore[misc, valid-type]
        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            output = super().schedule(*args, **kwargs)
            recording.dispatched(output)
            return output

        def get_grammar_bitmask(self, *args: Any, **kwargs: Any) -> Any:
            # What the engine core calls right after the executor has taken the step.
            recording.executing()
            return super().get_grammar_bitmask(*args, **kwargs)

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any, *args: Any) -> Any:
            recording.finished(scheduler_output, model_runner_output)
            return super().update_from_output(scheduler_output, model_runner_output, *args)

        def shutdown(self) -> None:
            recording.close()
            super().shutdown()

    scheduler = CaptureScheduler(vllm_config, *args, **kwargs)
    run, rank = Path(os.environ[CAPTURE]), vllm_config.parallel_config.data_parallel_index
    suffix = f"-dp{rank}" if rank else ""
    write_facts(run / f"engine{suffix}.json", engine_facts(vllm_config, scheduler.kv_cache_config))
    recording = SchedulerRecording(run / f"engine{suffix}.capture", rank)
    return scheduler


def _scheduler_class(vllm_config: VllmConfig) -> Any:
    if own := os.environ.get(SCHEDULER):
        from vllm.utils.import_utils import resolve_obj_by_qualname

        return resolve_obj_by_qualname(own)
    asynchronous = vllm_config.scheduler_config.async_scheduling
    if getattr(vllm_config, "diffusion_config", None) is not None:
        # vLLM chooses it itself only where no class is given (config/vllm.py of 0.33.0).
        from vllm.utils.import_utils import resolve_obj_by_qualname

        name = "DiffusionAsyncScheduler" if asynchronous else "DiffusionScheduler"
        return resolve_obj_by_qualname(f"vllm.v1.core.sched.diffusion_scheduler.{name}")
    if asynchronous:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        return AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    return Scheduler


def _refuse_uncalled_workers(vllm_config: VllmConfig) -> None:
    """Ray's first executor steps the model runner itself and never calls the worker (ray_utils.py of 0.18.1)."""
    if vllm_config.parallel_config.distributed_executor_backend != "ray":
        return
    from vllm.v1.executor.abstract import Executor

    if Executor.get_class(vllm_config).__module__ == "vllm.v1.executor.ray_executor":
        raise RuntimeError(
            "step-oracle capture cannot time steps of this vLLM under --distributed-executor-backend ray, which does "
            "not call the worker; use mp on one machine, or a vLLM whose Ray executor does"
        )
