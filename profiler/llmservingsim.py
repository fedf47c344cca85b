"""Imports LLMServingSim bundles as composed packs: measured operators, their skew, and a link between ranks.

A bundle is taken as it is published: `DIR/tpN/*.csv` beside `DIR/meta.yaml`, or `DIR/operators/` with all of them, or
all of them in DIR. Where `DIR/run` holds a measured run, its meta.json gives device and KV blocks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from oracle_server import pack
from oracle_server.errors import FailedPrecondition, InvalidArgument
from oracle_server.sampling.answer import KNOWLEDGE_MODELLED
from oracle_server.sampling.grids import OPERATOR_AXES
from profiler.llmservingsim_tables import (
    DeclaredGrid,
    Skew,
    attention_operators,
    dense_operators,
    parse_axis,
    sequence_operators,
    skew_coefficients,
)
from profiler.model_config import ModelConfig, read_model_config_file
from profiler.operators import Operator

_MOST_BYTES = 16 << 20
_TABLES = ("dense.csv", "per_sequence.csv", "attention.csv")
_MOST_MEMORY_BYTES = 1 << 50
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class RingLink:
    """One link of a ring of devices: its bandwidth in one direction and the latency of one hop."""

    bytes_per_s: float
    latency_s: float
    source: str

    def all_reduce_ns(self, ranks: int, message_bytes: int) -> float:
        """2 (p - 1) hops, each with a p-th of the message (Patarasuk and Yuan 2009)."""
        hops = 2 * (ranks - 1)
        return 1e9 * hops * (self.latency_s + message_bytes / ranks / self.bytes_per_s)


@dataclass(frozen=True)
class ImportRequest:
    """What the user asks for; None and 0 leave it to the bundle."""

    directory: Path
    model_config: Path
    tensor_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: int = 1
    link: RingLink | None = None
    # A count that the user's engine logged.
    kv_blocks: int | None = None
    # A count that nobody measured.
    kv_blocks_assumed: int | None = None
    device_memory_bytes: float | None = None
    # Decode-only steps are padded to the next of these.
    graph_capture_sizes: tuple[int, ...] = ()
    host_ns_per_step: float = 0.0
    host_ns_per_sequence: float = 0.0
    licence: str = "unknown"
    name: str | None = None


@dataclass(frozen=True)
class Bundle:
    """A bundle read and checked, ready to be written as a pack."""

    request: ImportRequest
    model: ModelConfig
    meta: Mapping[str, Any]
    run: Mapping[str, Any]
    operators: tuple[Operator, ...]
    skew: tuple[Skew, Skew] | None
    link: RingLink | None
    device: pack.Device
    kv_cache: pack.KvCache
    digests: Mapping[str, str]


def read_bundle(request: ImportRequest) -> Bundle:
    """Reads and checks a bundle. Raises InvalidArgument that names the file and line, or the option, at fault."""
    _check_sizes(request)
    folder, meta = _folder(request)
    run_folder = request.directory / "run"
    run = _json(run_folder / "meta.json")
    simulator = _json(run_folder / "simulator_config.json")
    model = read_model_config_file(request.model_config)
    _check_tensor_parallel(request, folder, meta, run, model)
    _check_model(model, meta, folder)

    effective = sub_mapping(meta, "engine_effective")
    most_tokens = positive_count(effective, "max_num_batched_tokens")
    most_sequences = positive_count(effective, "max_num_seqs")
    operators = dense_operators(
        folder / "dense.csv",
        model.num_layers,
        has_qk_norm=True if model.shape.startswith("Qwen3") else None,
        most_tokens=most_tokens,
    )
    link = None
    if request.tensor_parallel > 1:
        link = request.link or _bundled_link(simulator)
        operators.append(_all_reduce(link, model, request.tensor_parallel, operators[0].points[0]))
    operators += sequence_operators(folder / "per_sequence.csv", most_sequences=most_sequences)
    operators += attention_operators(
        folder / "attention.csv", model.num_layers, _declared_grid(meta), most_sequences=most_sequences
    )
    skew_file = folder / "skew.csv"
    skew = skew_coefficients(skew_file) if skew_file.is_file() else None
    files = [folder / name for name in (*_TABLES, "skew.csv")] + [_meta_path(folder), run_folder / "meta.json"]
    return Bundle(
        request=request,
        model=model,
        meta=meta,
        run=run,
        operators=tuple(operators),
        skew=skew,
        link=link,
        device=_device(request, meta, run, simulator),
        kv_cache=_kv_cache(request, model, effective, run),
        digests={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()},
    )


def _check_sizes(request: ImportRequest) -> None:
    for field, value in (
        ("tp", request.tensor_parallel),
        ("dp", request.data_parallel),
        ("ep", request.expert_parallel),
    ):
        if value < 1:
            raise InvalidArgument(f"--{field} is {value}; it has to be at least 1", field=field)
    if request.link is not None:
        if request.tensor_parallel == 1:
            raise InvalidArgument("a link joins tensor-parallel ranks; with --tp 1 there is none", field="link")
        if not (request.link.bytes_per_s > 0 and request.link.latency_s >= 0):
            raise InvalidArgument("a link needs a bandwidth above 0 and a latency of at least 0", field="link")
    if request.expert_parallel > 1:
        raise InvalidArgument(
            "expert parallelism needs tables of experts; this import reads dense models only", field="ep"
        )
    memory = request.device_memory_bytes
    if memory is not None and not 1 <= memory <= _MOST_MEMORY_BYTES:
        raise InvalidArgument(
            f"a device with {memory:g} bytes of memory; 1 to 2^50 are possible", field="device_memory"
        )
    if any(size < 1 for size in request.graph_capture_sizes):
        raise InvalidArgument("graph capture sizes are at least 1", field="graph_capture_sizes")
    if request.kv_blocks is not None and request.kv_blocks_assumed is not None:
        raise InvalidArgument(
            "--kv-blocks is a measured count and --kv-blocks-assumed is not: give one", field="kv_blocks"
        )


def _folder(request: ImportRequest) -> tuple[Path, Mapping[str, Any]]:
    """Where the tables lie, and meta.yaml."""
    directory = request.directory
    for folder in (
        directory / f"tp{request.tensor_parallel}",
        directory / "operators" / f"tp{request.tensor_parallel}",
        directory / "operators",
        directory,
    ):
        if any((folder / name).is_file() for name in _TABLES):
            break
    else:
        others = sorted(path.name for path in directory.glob("tp*") if path.is_dir())
        raise InvalidArgument(
            f"{directory} holds no operator tables ({', '.join(_TABLES)}) for --tp {request.tensor_parallel}"
            + (f"; there is {', '.join(others)}" if others else ""),
            field="directory",
        )
    if (folder / "moe.csv").is_file():
        raise InvalidArgument(
            "the bundle has moe.csv: mixture-of-experts tables are not imported, because how a step uses them is not "
            "documented with the data",
            field="moe.csv",
        )
    path = _meta_path(folder)
    if not path.is_file():
        raise InvalidArgument(f"the bundle has no meta.yaml ({path})", field="meta.yaml")
    try:
        import yaml  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise FailedPrecondition("meta.yaml needs PyYAML: pip install 'step-oracle[profiler]'") from error
    if path.stat().st_size > _MOST_BYTES:
        raise InvalidArgument(f"{path} is larger than 16 MiB", field="meta.yaml")
    try:
        meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"{path} is not YAML: {error}", field="meta.yaml") from error
    if not isinstance(meta, dict):
        raise InvalidArgument(f"{path} is not a mapping", field="meta.yaml")
    return folder, meta


def _meta_path(folder: Path) -> Path:
    beside = folder / "meta.yaml"
    return beside if beside.is_file() or not re.fullmatch(r"tp\d+", folder.name) else folder.parent / "meta.yaml"


def _check_model(model: ModelConfig, meta: Mapping[str, Any], folder: Path) -> None:
    """The config is that of the profiled model: the profiler states a rank's dimensions, which scale with its TP."""
    if model.num_experts:
        raise InvalidArgument(
            f"the model has {model.num_experts} experts; this import reads dense models only", field="model_config"
        )
    variant = str(meta.get("variant", ""))
    if _DTYPES.get(variant, model.dtype) != model.dtype:
        raise InvalidArgument(
            f"meta.yaml says the tables are of variant {variant}; the config says {model.dtype}", field="model_config"
        )
    overrides = sub_mapping(sub_mapping(meta, "engine_effective"), "hf_overrides")
    heads = positive_count(overrides, "num_attention_heads")
    if not heads:
        return
    ranks, rest = divmod(model.num_heads, heads)
    degrees = meta.get("tp_degrees")
    expected = {
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
    }
    wrong = [
        f"{name} {overrides[name]} instead of {value / max(ranks, 1):g}"
        for name, value in expected.items()
        # What a rank gets of a size that does not divide is rounded.
        if positive_count(overrides, name) and abs(positive_count(overrides, name) * ranks - value) >= max(ranks, 1)
    ]
    if rest or wrong or (isinstance(degrees, list) and ranks not in degrees):
        raise InvalidArgument(
            f"meta.yaml in {folder.name} is of another model than {model.directory.name}'s config: "
            f"{', '.join(wrong) or f'{heads} attention heads a rank of {model.num_heads}'}",
            field="model_config",
        )


def _check_tensor_parallel(
    request: ImportRequest, folder: Path, meta: Mapping[str, Any], run: Mapping[str, Any], model: ModelConfig
) -> None:
    """The tables are of the asked TP. They do not say so themselves; their folder, the run and meta.yaml do."""
    asked = request.tensor_parallel
    if model.num_heads % asked:
        raise InvalidArgument(f"{model.num_heads} attention heads cannot be split over --tp {asked}", field="tp")
    degrees = meta.get("tp_degrees")
    known = [degree for degree in degrees if isinstance(degree, int)] if isinstance(degrees, list) else []
    if known and asked not in known:
        raise InvalidArgument(
            f"--tp {asked}, but the bundle was profiled for tensor parallel {', '.join(map(str, known))} (tp_degrees "
            "of meta.yaml)",
            field="tp",
        )
    if folder.name == f"tp{asked}":
        return
    told = {}
    if found := re.search(r"(?:^|[-_])tp(\d+)\Z", request.directory.resolve().name, re.IGNORECASE):
        told[f"the folder {request.directory.resolve().name}"] = int(found[1])
    if ran := positive_count(sub_mapping(run, "engine_kwargs"), "tensor_parallel_size"):
        told["run/meta.json"] = ran
    if len(known) == 1:
        told["tp_degrees of meta.yaml"] = known[0]
    for place, degree in told.items():
        if degree != asked:
            raise InvalidArgument(f"--tp {asked}, but the tables are of tensor parallel {degree} ({place})", field="tp")
    if not told:
        raise InvalidArgument(
            f"whether the tables are of tensor parallel {asked} cannot be told: put them into a folder tp{asked} "
            "beside meta.yaml",
            field="tp",
        )


def _declared_grid(meta: Mapping[str, Any]) -> DeclaredGrid:
    grid = sub_mapping(meta, "attention_grid")
    chunks, requests, contexts = (
        parse_axis(str(grid[name])) if grid.get(name) else () for name in ("chunks", "n_decode", "kv")
    )
    return DeclaredGrid(chunks, requests, contexts)


def _bundled_link(simulator: Mapping[str, Any]) -> RingLink:
    """The link the bundle's own simulation used: gigabytes per second and nanoseconds."""
    bandwidth, latency = simulator.get("link_bw"), simulator.get("link_latency")
    if not (isinstance(bandwidth, int | float) and isinstance(latency, int | float) and bandwidth > 0 <= latency):
        raise InvalidArgument(
            "the tables hold no communication between tensor-parallel ranks, and the bundle names no link: give "
            "--link-gbytes-per-s and --link-latency-us",
            field="link",
        )
    return RingLink(bandwidth * 1e9, latency * 1e-9, "link_bw and link_latency of the bundle's simulator_config.json")


def _all_reduce(link: RingLink, model: ModelConfig, ranks: int, tokens: Sequence[int]) -> Operator:
    """Two in each layer, after attention and after the feed-forward part; activations are 16 bit."""
    ends = (tokens[0], tokens[-1])
    values = [2 * model.num_layers * link.all_reduce_ns(ranks, count * model.hidden_size * 2) for count in ends]
    return Operator(
        "all_reduce",
        OPERATOR_AXES["all_reduce"],
        "communication",
        (ends,),
        np.array(values),
        np.full(2, KNOWLEDGE_MODELLED, dtype=np.int8),
    )


def _device(
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


def _kv_cache(
    request: ImportRequest, model: ModelConfig, effective: Mapping[str, Any], run: Mapping[str, Any]
) -> pack.KvCache:
    """The count of a run of this very configuration is measured; a given one is what the user says it is."""
    ranks = positive_count(sub_mapping(run, "engine_kwargs"), "tensor_parallel_size") or request.tensor_parallel
    if ranks != request.tensor_parallel:
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
            "the bundle does not say how many KV blocks an engine had, and without them a run's queueing is wrong (31 "
            "% too many: TPOT +18 %); give --kv-blocks, vLLM logs the count at its start, or --kv-blocks-assumed",
            field="kv_blocks",
        )
    if blocks < 1:
        raise InvalidArgument(f"{blocks} KV blocks; at least 1 is needed", field="kv_blocks")
    return pack.KvCache(blocks=blocks, block_size=block_size, bytes_per_token=per_token, basis=basis, source=source)


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _MOST_BYTES:
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
