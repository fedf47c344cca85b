"""vllm-check on the vLLM of the cached environments: they serve, so they fit; what is taken away is missed."""

from __future__ import annotations

import dataclasses

import pytest

from environments import VllmEnvironment
from profiler.vllm_check.finding import Finding
from profiler.vllm_check.fit import findings_of
from profiler.vllm_check.interfaces import VllmSource
from profiler.vllm_check.ours import Ours
from profiler.vllm_check.own_source import OwnSource
from profiler.vllm_check.releases import open_release

pytestmark = pytest.mark.vllm

# (file, old, new, what is then said): each is a change that would stop an engine or falsify its times.
_CHANGES = [
    (
        "v1/core/sched/output.py",
        "finished_req_ids: set",
        "ended_req_ids: set",
        "SchedulerOutput has no finished_req_ids",
    ),
    ("v1/core/sched/output.py", "    num_output_tokens: list", "    output_tokens: list", "has no num_output_tokens"),
    ("v1/outputs.py", "    sampled_token_ids: list", "    token_ids: list", "has no parameter sampled_token_ids"),
    ("v1/executor/abstract.py", "    def determine_available_memory", "    def available_memory", "is never called"),
    ("v1/executor/abstract.py", '"get_supported_tasks"', '"list_tasks"', "asks the worker for list_tasks"),
    ("v1/executor/abstract.py", "    def check_health(", "    def check(", "Executor.check is abstract"),
    ("v1/engine/core.py", "model_output = future.result()", "model_output = future.exception()", "calls exception()"),
    ("v1/request.py", "import time\n", "from time import time\n", "imports clock functions by name"),
    ("v1/kv_cache_interface.py", "    num_blocks: int", "    blocks: int", "KVCacheConfig has no num_blocks"),
    ("v1/worker/gpu_worker.py", "    def sample_tokens(", "    def sample(", "Worker has no sample_tokens"),
    ("plugins/__init__.py", '"vllm.platform_plugins"', '"vllm.device_plugins"', "vllm.platform_plugins"),
    (
        "config/cache.py",
        "num_gpu_blocks_override: int",
        "gpu_blocks: int",
        "has no num_gpu_blocks_override",
    ),
]


def test_an_engine_that_serves_fits_and_every_change_of_it_is_found(vllm: VllmEnvironment) -> None:
    ours = Ours(OwnSource())
    with open_release(str(vllm.python.parent.parent), print) as source:
        assert source.version == vllm.version
        assert _broken(findings_of(source, ours)) == []
        changed = source
        for file, old, new, _ in _CHANGES:
            changed = _changed(changed, f"vllm/{file}", old, new)
        # The base class of all workers has the method too, only to say that it is missing.
        changed = _changed(changed, "vllm/v1/worker/worker_base.py", "    def sample_tokens(", "    def sample(")
        broken = _broken(findings_of(changed, ours))

    missed = [sentence for *_, sentence in _CHANGES if not any(sentence in what for what in broken)]
    assert missed == [], broken


def _broken(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if finding.severity == "breaks"]


def _changed(source: VllmSource, path: str, old: str, new: str) -> VllmSource:
    def read(asked: str) -> str | None:
        text = source.read(asked)
        if asked != path or text is None:
            return text
        assert old in text, f"{path} of {source.version} has no {old!r}"
        return text.replace(old, new)

    return dataclasses.replace(source, read=read, _trees={}, _found={}, _lineages={}, _bodies={})
