"""The hooks inside an engine, on stand-ins for vLLM and for a GPU: what they call, what they leave alone."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from profiler.capture.launch import CAPTURE, SCHEDULER
from profiler.capture.trace_file import read_capture_file
from schedules import new, output
from step_oracle.v1 import capture_pb2 as pb


class FakeEvent:
    """A CUDA event of a device that is done with everything as soon as somebody asks."""

    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        type(self).made += 1

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 4.0


class FakeWorker:
    """vLLM's GPU worker with model runner V2, whose warm-up steps the worker itself."""

    rank = 3
    device = "cuda:0"
    use_v2_model_runner = True

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=0))
        backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
        self.model_runner = SimpleNamespace(attn_groups=[[SimpleNamespace(backend=backend)]])
        self.calls: list[str] = []

    def compile_or_warm_up_model(self) -> float:
        self.execute_model(output({"warm": 8}, new_requests=(new("warm", 8),)))
        self.sample_tokens(None)
        return 1.5

    def execute_model(self, scheduler_output: Any) -> Any:
        self.calls.append("execute_model")
        return None if scheduler_output.total_num_scheduled_tokens else "empty"

    def sample_tokens(self, _: Any) -> str:
        self.calls.append("sample_tokens")
        return "tokens"

    def shutdown(self) -> None:
        self.calls.append("shutdown")


class FakeScheduler:
    """vLLM's scheduler, which hands out what it is given."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, **_: Any) -> None:
        self.kv_cache_config = kv_cache_config
        self.outputs: list[Any] = []
        self.ended = False

    def schedule(self, throttle_prefills: bool = False) -> Any:
        return self.outputs.pop(0)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> str:
        return "outputs"

    def shutdown(self) -> None:
        self.ended = True


class FakeAsyncScheduler(FakeScheduler):
    pass


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of vLLM and torch as far as the hooks reach into them."""
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda_alike=lambda: True)
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0)
    cuda = SimpleNamespace(Event=FakeEvent, get_device_properties=lambda _: properties)
    classes = {
        "vllm.v1.worker.gpu_worker.Worker": FakeWorker,
        "vllm.v1.core.sched.scheduler.Scheduler": FakeScheduler,
        "vllm.v1.core.sched.async_scheduler.AsyncScheduler": FakeAsyncScheduler,
    }
    modules: dict[str, dict[str, Any]] = {
        "torch": {"cuda": cuda, "version": SimpleNamespace(cuda="13.0", hip=None)},
        "vllm": {},
        "vllm.platforms": {"current_platform": platform},
        "vllm.utils": {},
        "vllm.utils.import_utils": {"resolve_obj_by_qualname": classes.__getitem__},
        "vllm.v1.core.sched.scheduler": {"Scheduler": FakeScheduler},
        "vllm.v1.core.sched.async_scheduler": {"AsyncScheduler": FakeAsyncScheduler},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    yield
    for name in ("profiler.capture.worker", "profiler.capture.scheduler"):
        sys.modules.pop(name, None)


def test_a_gpu_worker_is_timed_by_events_from_the_end_of_its_warm_up(
    fake_vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CAPTURE, str(tmp_path))
    worker = importlib.import_module("profiler.capture.worker").CaptureWorker()
    assert worker.compile_or_warm_up_model() == 1.5
    first = output({"a": 10}, new_requests=(new("a", 10),))
    assert worker.execute_model(first) is None
    assert worker.sample_tokens(None) == "tokens"
    assert worker.execute_model(output({})) == "empty"
    assert worker.execute_model(output({"a": 1}, cached=(("a", 10, 1),))) is None
    assert worker.sample_tokens(None) == "tokens"
    worker.shutdown()
    found = read_capture_file(tmp_path / "rank-3.capture")
    steps = [step for record in found.records for step in record.device.steps]
    facts = json.loads((tmp_path / "rank-3.json").read_text())

    assert found.header.timing == pb.CAPTURE_TIMING_CUDA_EVENTS
    assert [(step.step_index, step.total_tokens) for step in steps] == [(0, 10), (2, 1)]
    assert [step.end_ns - step.start_ns for step in steps] == [4_000_000, 4_000_000]
    assert worker.calls[-1] == "shutdown"
    assert facts["device"] == {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 << 30, "capability": [9, 0]}
    assert (facts["attention_backends"], facts["model_runner"], facts["cuda"]) == (["FLASH_ATTN"], "v2", "13.0")


@pytest.mark.parametrize(
    ("asynchronous", "own", "expected"),
    [
        (False, "", FakeScheduler),
        (True, "", FakeAsyncScheduler),
        (True, "vllm.v1.core.sched.scheduler.Scheduler", FakeScheduler),
    ],
)
def test_the_scheduler_is_the_one_the_engine_would_have_had(
    fake_vllm: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
    own: str,
    expected: type[FakeScheduler],
) -> None:
    monkeypatch.setenv(CAPTURE, str(tmp_path))
    monkeypatch.setenv(SCHEDULER, own)
    module = importlib.import_module("profiler.capture.scheduler")
    monkeypatch.setattr(module, "engine_facts", lambda config, kv: {"engine": {"blocks": kv.num_blocks}})
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
        parallel_config=SimpleNamespace(data_parallel_index=2),
    )
    scheduler = module.capture_scheduler(
        vllm_config=config, kv_cache_config=SimpleNamespace(num_blocks=7), structured_output_manager=None
    )
    scheduled = output({"a": 10}, new_requests=(new("a", 10),))
    scheduler.outputs = [scheduled]

    assert type(scheduler).__mro__[1] is expected
    assert scheduler.schedule(True) is scheduled
    result = SimpleNamespace(sampled_token_ids=[[5]])
    assert scheduler.update_from_output(scheduled, result) == "outputs"
    scheduler.shutdown()
    assert scheduler.ended
    found = read_capture_file(tmp_path / "engine-dp2.capture")
    assert found.header.data_parallel_rank == 2
    assert [step.generated_tokens for record in found.records for step in record.scheduled.steps] == [1]
    assert json.loads((tmp_path / "engine-dp2.json").read_text()) == {"engine": {"blocks": 7}}
