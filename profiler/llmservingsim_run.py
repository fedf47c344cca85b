"""What a bundle's measured run and simulation say: device and KV blocks; and how its JSON and YAML are read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from oracle_server import pack
from oracle_server.errors import InvalidArgument
from profiler.model_config import ModelConfig

if TYPE_CHECKING:
    from profiler.llmservingsim import ImportRequest

MOST_BYTES: Final = 16 << 20


def device_of(
    request: ImportRequest, meta: Mapping[str, Any], run: Mapping[str, Any], simulator: Mapping[str, Any]
) -> pack.Device:
    hardware = sub_mapping(run, "hardware")
    memory = (
        request.device_memory_bytes
        or positive_count(hardware, "device_total_memory_bytes")
        or _nominal_memory_bytes(simulator)
    )
    if not memory:
        raise InvalidArgument(
            "the bundle does not say how much memory the device has; give --device-memory-gib", field="device_memory"
        )
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(hardware.get("device_capability") or ""))
    return pack.Device(
        name=str(hardware.get("device_name") or meta.get("gpu") or meta.get("hardware") or "unknown"),
        memory_bytes=int(memory),
        capability_major=int(capability[1]) if capability else 0,
        capability_minor=int(capability[2]) if capability else 0,
        count=request.tensor_parallel,
    )


def _nominal_memory_bytes(simulator: Mapping[str, Any]) -> int:
    """npu_mem.mem_size of the first instance, in GiB."""
    try:
        size = simulator["nodes"][0]["instances"][0]["npu_mem"]["mem_size"]
    except (KeyError, IndexError, TypeError):
        return 0
    return int(size * 2**30) if isinstance(size, int | float) and 0 < size < 2**20 else 0


def kv_cache_of(
    request: ImportRequest, model: ModelConfig, effective: Mapping[str, Any], run: Mapping[str, Any]
) -> pack.KvCache:
    """The count of a run of this very configuration is measured; a given one is what the user says it is."""
    differs = _other_ranks(request, model, run)
    if differs:
        run = {}
    ran = sub_mapping(run, "kv_cache")
    measured = positive_count(ran, "num_gpu_blocks") or positive_count(
        sub_mapping(sub_mapping(run, "resolved_config"), "cache_config"), "num_gpu_blocks"
    )
    block_size = positive_count(ran, "block_size") or positive_count(effective, "block_size") or 16
    per_token = model.kv_bytes_per_token_of_rank(request.tensor_parallel)
    basis: Literal["measured", "assumed"] = "measured"
    if request.kv_blocks_assumed is not None:
        blocks, basis, source = request.kv_blocks_assumed, "assumed", "assumed by whoever imported the bundle"
    elif request.kv_blocks is not None:
        if measured and measured != request.kv_blocks:
            raise InvalidArgument(
                f"--kv-blocks {request.kv_blocks}, but the bundle's run had {measured}; to try another count give "
                "--kv-blocks-assumed",
                field="kv_blocks",
            )
        blocks, source = request.kv_blocks, "logged by an engine, given to the import"
    elif measured:
        blocks, source = measured, "kv_cache of the bundle's run/meta.json"
    else:
        raise InvalidArgument(
            f"the bundle does not say how many KV blocks an engine had{differs and f' (its run was {differs})'}, and "
            "without them a run's queueing is wrong (31 % too many: TPOT +18 %); give --kv-blocks, vLLM logs the count "
            "at its start, or --kv-blocks-assumed",
            field="kv_blocks",
        )
    if blocks < 1:
        raise InvalidArgument(f"{blocks} KV blocks; at least 1 is needed", field="kv_blocks")
    return pack.KvCache(blocks=blocks, block_size=block_size, bytes_per_token=per_token, basis=basis, source=source)


def _other_ranks(request: ImportRequest, model: ModelConfig, run: Mapping[str, Any]) -> str:
    """In what the run's ranks are not the ones asked for, so that its count is none of theirs; empty where they are.

    Data-parallel ranks of a dense model are engines of their own: each has what a run of one has.
    A count beside several data-parallel ranks is never taken: vLLM's front end adds up those of its engines (0.18.1 and
    0.33.0, read), and a record does not say whether it is that sum.
    """
    ran = sub_mapping(run, "engine_kwargs")
    tensor = positive_count(ran, "tensor_parallel_size") or request.tensor_parallel
    data = positive_count(ran, "data_parallel_size") or 1
    if tensor != request.tensor_parallel:
        return f"of tensor parallel {tensor}"
    if data > 1 or (model.num_experts and data != request.data_parallel):
        return f"of data parallel {data}"
    experts = tensor * data if ran.get("enable_expert_parallel") is True else 1
    if model.num_experts and experts != request.expert_parallel:
        return f"of expert parallel {experts}"
    return ""


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MOST_BYTES:
        raise InvalidArgument(f"{path} is larger than 16 MiB", field=path.name)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path} is not JSON: {error}", field=path.name) from error
    if not isinstance(document, dict):
        raise InvalidArgument(f"{path} is not a JSON object", field=path.name)
    return document


def sub_mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def positive_count(values: Mapping[str, Any], key: str) -> int:
    """A positive integer; 0 where it is absent or something else."""
    value = values.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
