"""The hooks inside an engine, on stand-ins for vLLM and for a GPU: what they call, what they leave alone."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from profiler.capture import facts
from profiler.capture.launch import CAPTURE, SCHEDULER
from profiler.capture.trace_file import read_capture_file
from schedules import new, output
from step_oracle.v1 import capture_pb2 as pb


class FakeCuda(threading.local):
    """Each thread has its device; a new one has none, where the real one would open a context on the first device."""

    device: str | None = None


CUDA = FakeCuda()


class FakeEvent:
    """A CUDA event of a device that is done with everything as soon as a thread with that device asks."""

    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        type(self).made += 1

    def record(self) -> None:
        pass

    def query(self) -> bool:
        assert CUDA.device == FakeWorker.device, "a thread without the worker's device asks"
        return True

    def elapsed_time(self, _: Any) -> float:
        return 4.0


class FakeWorker:
    """vLLM's GPU worker with model runner V2, whose warm-up steps the worker itself."""

    rank = 3
    device = "cuda:3"
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

    def get_grammar_bitmask(self, scheduler_output: Any) -> Any:
        return scheduler_output, "bitmask"

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> str:
        return "outputs"

    def shutdown(self) -> None:
        self.ended = True


class FakeAsyncScheduler(FakeScheduler):
    pass


class FakeDiffusionScheduler(FakeScheduler):
    pass


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of vLLM and torch as far as the hooks reach into them."""
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda_alike=lambda: True)
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0)
    cuda = SimpleNamespace(
        Event=FakeEvent,
        get_device_properties=lambda _: properties,
        set_device=lambda device: setattr(CUDA, "device", device),
    )
    monkeypatch.setattr(CUDA, "device", FakeWorker.device)
    classes = {
        "vllm.v1.worker.gpu_worker.Worker": FakeWorker,
        "vllm.v1.core.sched.scheduler.Scheduler": FakeScheduler,
        "vllm.v1.core.sched.async_scheduler.AsyncScheduler": FakeAsyncScheduler,
        "vllm.v1.core.sched.diffusion_scheduler.DiffusionAsyncScheduler": FakeDiffusionScheduler,
    }
    modules: dict[str, dict[str, Any]] = {
        "torch": {"cuda": cuda, "version": SimpleNamespace(cuda="13.0", hip=None)},
        "vllm": {},
        "vllm.platforms": {"current_platform": platform},
        "vllm.utils": {},
        "vllm.utils.import_utils": {"resolve_obj_by_qualname": classes.__getitem__},
        "vllm.v1.core.sched.scheduler": {"Scheduler": FakeScheduler},
        "vllm.v1.core.sched.async_scheduler": {"AsyncScheduler": FakeAsyncScheduler},
        "vllm.v1.executor.abstract": {"Executor": SimpleNamespace(get_class=lambda config: config.executor)},
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
    told = json.loads((tmp_path / "rank-3.json").read_text())

    assert found.header.timing == pb.CAPTURE_TIMING_CUDA_EVENTS
    assert [(step.step_index, step.total_tokens) for step in steps] == [(0, 10), (2, 1)]
    assert [step.end_ns - step.start_ns for step in steps] == [4_000_000, 4_000_000]
    assert worker.calls[-1] == "shutdown"
    assert told["device"] == {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 << 30, "capability": [9, 0]}
    assert (told["attention_backends"], told["model_runner"], told["cuda"]) == (["FLASH_ATTN"], "v2", "13.0")


@pytest.mark.parametrize(
    ("asynchronous", "own", "diffusion", "expected"),
    [
        (False, "", None, FakeScheduler),
        (True, "", None, FakeAsyncScheduler),
        (True, "vllm.v1.core.sched.scheduler.Scheduler", None, FakeScheduler),
        (True, "", object(), FakeDiffusionScheduler),
    ],
)
def test_the_scheduler_is_the_one_the_engine_would_have_had(
    fake_vllm: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
    own: str,
    diffusion: object,
    expected: type[FakeScheduler],
) -> None:
    monkeypatch.setenv(CAPTURE, str(tmp_path))
    monkeypatch.setenv(SCHEDULER, own)
    module = importlib.import_module("profiler.capture.scheduler")
    monkeypatch.setattr(module, "engine_facts", lambda config, kv: {"engine": {"blocks": kv.num_blocks}})
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
        parallel_config=SimpleNamespace(data_parallel_index=2, distributed_executor_backend="ray"),
        diffusion_config=diffusion,
        executor=type("RayExecutorV2", (), {"__module__": "vllm.v1.executor.ray_executor_v2"}),
    )
    scheduler = module.capture_scheduler(
        vllm_config=config, kv_cache_config=SimpleNamespace(num_blocks=7), structured_output_manager=None
    )
    scheduled = output({"a": 10}, new_requests=(new("a", 10),))
    scheduler.outputs = [scheduled]

    assert type(scheduler).__mro__[1] is expected
    assert scheduler.schedule(True) is scheduled
    result = SimpleNamespace(sampled_token_ids=[[5]])
    assert scheduler.get_grammar_bitmask(scheduled) == (scheduled, "bitmask")
    assert scheduler.update_from_output(scheduled, result) == "outputs"
    scheduler.shutdown()
    assert scheduler.ended
    found = read_capture_file(tmp_path / "engine-dp2.capture")
    assert found.header.data_parallel_rank == 2
    assert [step.generated_tokens for record in found.records for step in record.scheduled.steps] == [1]
    assert json.loads((tmp_path / "engine-dp2.json").read_text()) == {"engine": {"blocks": 7}}


def test_an_executor_that_does_not_call_the_worker_is_refused(
    fake_vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CAPTURE, str(tmp_path))
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_index=0, distributed_executor_backend="ray"),
        executor=type("RayDistributedExecutor", (), {"__module__": "vllm.v1.executor.ray_executor"}),
    )
    with pytest.raises(RuntimeError, match="use mp on one machine"):
        importlib.import_module("profiler.capture.scheduler").capture_scheduler(config)


@dataclass
class StridedTensor:
    """As of 0.33.0: a place in the allocation of `size` bytes that all groups share."""

    size: int
    layers: list[str]
    layer_stride: int
    host_resident: bool = False


@dataclass
class OwnTensor:
    """As of 0.18.1: an allocation of its own."""

    size: int
    shared_by: list[str]


@pytest.mark.parametrize(
    ("tensors", "pool_bytes"),
    [
        ([OwnTensor(6144, ["a"]), OwnTensor(6144, ["b"])], 12288),
        ([StridedTensor(12288, ["a", "b"], 16), StridedTensor(12288, ["c"], 16)], 12288),
        ([StridedTensor(12288, ["a"], 16), StridedTensor(99999, ["a"], 16, host_resident=True)], 12288),
    ],
)
def test_bytes_of_a_token_are_those_of_the_pool_once(
    monkeypatch: pytest.MonkeyPatch, tensors: list[Any], pool_bytes: int
) -> None:
    monkeypatch.setattr(
        facts,
        "engine_config",
        lambda _, bytes_per_token: SimpleNamespace(
            kv_bytes_per_token=bytes_per_token, num_kv_blocks=0, graph_capture_sizes=[]
        ),
    )
    monkeypatch.setattr(facts, "_fields", vars)
    parts: dict[str, Any] = dict.fromkeys(facts._PARTS)
    config = SimpleNamespace(**parts | {"cache_config": SimpleNamespace(block_size=16)})
    found = facts.engine_facts(config, SimpleNamespace(num_blocks=4, kv_cache_tensors=tensors))

    assert (found["kv_cache_bytes"], found["engine"]["kv_bytes_per_token"]) == (pool_bytes, pool_bytes // 64)
