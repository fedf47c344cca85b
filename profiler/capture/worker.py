"""The device's side of a capture: `--worker-cls profiler.capture.worker.CaptureWorker`.

The worker this platform has, with clock readings (CPU) or events (CUDA, ROCm) around each step. Each rank writes a file
of its own, so any executor and any tensor-parallel size will do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from profiler.capture.device_times import CudaEventClock, HostClock
from profiler.capture.facts import worker_facts, write_facts
from profiler.capture.launch import CAPTURE, WORKER
from profiler.capture.recording import WorkerRecording


def _worker_class() -> Any:
    if own := os.environ.get(WORKER):
        return resolve_obj_by_qualname(own)
    if current_platform.is_cpu():
        return resolve_obj_by_qualname("vllm.v1.worker.cpu_worker.CPUWorker")
    if current_platform.is_cuda_alike():
        return resolve_obj_by_qualname("vllm.v1.worker.gpu_worker.Worker")
    raise RuntimeError(
        f"step-oracle capture times steps on CPU, CUDA and ROCm; vLLM runs on {type(current_platform).__name__}"
    )


class CaptureWorker(_worker_class()):  # type: ignore[misc]
    """Observes execute_model and sample_tokens; everything else is the platform's worker."""

    _recording: WorkerRecording | None = None

    def compile_or_warm_up_model(self) -> Any:
        """Steps count from here: warming up calls execute_model itself (model runner V2)."""
        result = super().compile_or_warm_up_model()
        run = Path(os.environ[CAPTURE])
        data_parallel_rank = self.vllm_config.parallel_config.data_parallel_index
        name = f"rank-{self.rank}" + (f"-dp{data_parallel_rank}" if data_parallel_rank else "")
        write_facts(run / f"{name}.json", worker_facts(self))
        self._recording = WorkerRecording(
            run / f"{name}.capture",
            _clock(),
            rank=self.rank,
            data_parallel_rank=data_parallel_rank,
            begin_thread=_device_setter(self.device),
        )
        return result

    def execute_model(self, scheduler_output: Any, *args: Any) -> Any:
        recording = self._recording
        if recording is None:
            return super().execute_model(scheduler_output, *args)
        recording.begin(scheduler_output.total_num_scheduled_tokens)
        output = super().execute_model(scheduler_output, *args)
        if output is not None:
            # Pooling, or nothing to do: sample_tokens is not called.
            recording.end()
        return output

    def sample_tokens(self, *args: Any) -> Any:
        output = super().sample_tokens(*args)
        if self._recording is not None:
            self._recording.end()
        return output

    def shutdown(self) -> None:
        if self._recording is not None:
            self._recording.close()
        super().shutdown()


def _device_setter(device: Any) -> Callable[[], None]:
    """Makes a thread use this device. A new thread uses the first one: an event that it asks would open another context
    there, which takes memory of that device from the rank it belongs to (multiproc_executor.py of vLLM 0.33.0)."""
    if current_platform.is_cpu():
        return lambda: None
    import torch

    return partial(torch.cuda.set_device, device)


def _clock() -> HostClock | CudaEventClock:
    if current_platform.is_cpu():
        return HostClock()
    import torch

    return CudaEventClock(partial(torch.cuda.Event, enable_timing=True))
