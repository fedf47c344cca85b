"""Imports LLMServingSim bundles as composed packs: measured operators, their skew, and a link between ranks.

A bundle is taken as it is published: `DIR/tpN/*.csv` beside `DIR/meta.yaml`, or `DIR/operators/` with all of them, or
all of them in DIR. Where `DIR/run` holds a measured run, its meta.json gives device and KV blocks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle_server import pack
from oracle_server.errors import FailedPrecondition, InvalidArgument
from profiler.llmservingsim_experts import expert_operator
from profiler.llmservingsim_link import RingLink, all_reduce_operator, bundled_link, expert_exchange_operator
from profiler.llmservingsim_run import MOST_BYTES, device_of, kv_cache_of, positive_count, read_json, sub_mapping
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

_TABLES = ("dense.csv", "per_sequence.csv", "attention.csv")
_EXPERTS = "moe.csv"
_MOST_MEMORY_BYTES = 1 << 50
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


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
    run = read_json(run_folder / "meta.json")
    simulator = read_json(run_folder / "simulator_config.json")
    model = read_model_config_file(request.model_config)
    _check_tensor_parallel(request, folder, meta, run, model)
    _check_model(model, meta, folder)
    experts = _experts_file(request, model, folder)

    effective = sub_mapping(meta, "engine_effective")
    most_tokens = positive_count(effective, "max_num_batched_tokens")
    most_sequences = positive_count(effective, "max_num_seqs")
    operators = dense_operators(
        folder / "dense.csv",
        model.num_layers,
        num_moe_layers=model.num_moe_layers,
        has_qk_norm=True if model.shape.startswith("Qwen3") else None,
        most_tokens=most_tokens,
    )
    link = _link(request, model, simulator)
    operators += _rank_operators(request, model, link, experts, operators[0].points[0], most_tokens)
    operators += sequence_operators(folder / "per_sequence.csv", most_sequences=most_sequences)
    operators += attention_operators(
        folder / "attention.csv", model.num_layers, _declared_grid(meta), most_sequences=most_sequences
    )
    skew_file = folder / "skew.csv"
    skew = skew_coefficients(skew_file) if skew_file.is_file() else None
    files = [folder / name for name in (*_TABLES, "skew.csv")] + [_meta_path(folder), run_folder / "meta.json"]
    files += [experts] if experts else []
    return Bundle(
        request=request,
        model=model,
        meta=meta,
        run=run,
        operators=tuple(operators),
        skew=skew,
        link=link,
        device=device_of(request, meta, run, simulator),
        kv_cache=kv_cache_of(request, model, effective, run),
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
        if request.tensor_parallel == request.data_parallel == 1:
            raise InvalidArgument("a link joins ranks; with --tp 1 and --dp 1 there is one only", field="link")
        if not (request.link.bytes_per_s > 0 and request.link.latency_s >= 0):
            raise InvalidArgument("a link needs a bandwidth above 0 and a latency of at least 0", field="link")
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
    path = _meta_path(folder)
    if not path.is_file():
        raise InvalidArgument(f"the bundle has no meta.yaml ({path})", field="meta.yaml")
    try:
        import yaml  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise FailedPrecondition("meta.yaml needs PyYAML: pip install 'step-oracle[profiler]'") from error
    if path.stat().st_size > MOST_BYTES:
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


def _experts_file(request: ImportRequest, model: ModelConfig, folder: Path) -> Path | None:
    """moe.csv of a model with experts; those are whole, so the table of one tensor-parallel rank is that of all."""
    places = [folder / _EXPERTS, folder.parent / "tp1" / _EXPERTS]
    found = next((path for path in places if path.is_file()), None)
    ranks = request.tensor_parallel * request.data_parallel
    if not model.num_experts:
        if found is not None:
            raise InvalidArgument(
                f"the bundle has {_EXPERTS}, but the config of {model.directory.name} names no experts",
                field="model_config",
            )
        if request.expert_parallel > 1:
            raise InvalidArgument(f"--ep {request.expert_parallel}, but the model has no experts", field="ep")
        return None
    if found is None:
        raise InvalidArgument(
            f"the model has {model.num_experts} experts, but the bundle has no {_EXPERTS} ({places[0]})", field=_EXPERTS
        )
    if not 0 < model.experts_per_token <= model.num_experts or not model.num_moe_layers:
        raise InvalidArgument(
            f"the config of {model.directory.name} does not say which of {model.num_experts} experts run: "
            f"{model.experts_per_token} a token in {model.num_moe_layers} layers",
            field="model_config",
        )
    if request.expert_parallel != ranks:
        raise InvalidArgument(
            f"--ep {request.expert_parallel} with --tp {request.tensor_parallel} --dp {request.data_parallel}: "
            f"{_EXPERTS} times whole experts, which --enable-expert-parallel spreads over all ranks; give --ep {ranks}",
            field="ep",
        )
    if model.num_experts % ranks:
        raise InvalidArgument(f"{model.num_experts} experts cannot be spread over --ep {ranks}", field="ep")
    if model.has_shared_experts and ranks > 1:
        raise InvalidArgument(
            f"the model has shared experts, which every rank runs on its own tokens; {_EXPERTS} times them together "
            "with the others, which stands for one rank only: give --tp 1 --dp 1",
            field="model_config",
        )
    return found


def _link(request: ImportRequest, model: ModelConfig, simulator: Mapping[str, Any]) -> RingLink | None:
    """The link between ranks, where any exchange something: those of a dense model do within tensor parallelism."""
    if request.tensor_parallel > 1 or (request.data_parallel > 1 and model.num_experts):
        return request.link or bundled_link(simulator)
    if request.link is not None:
        raise InvalidArgument(
            "data-parallel ranks of a dense model exchange nothing: leave the link away", field="link"
        )
    return None


def _rank_operators(
    request: ImportRequest,
    model: ModelConfig,
    link: RingLink | None,
    experts: Path | None,
    tokens: tuple[int, ...],
    most_tokens: int,
) -> list[Operator]:
    """What ranks do together: all-reduce, experts, and the exchange of tokens around them."""
    tensor, data = request.tensor_parallel, request.data_parallel
    operators = []
    if link is not None and tensor > 1:
        operators.append(all_reduce_operator(link, model, tensor, data, tokens))
    if experts is not None:
        operators.append(
            expert_operator(experts, model, tensor_parallel=tensor, data_parallel=data, most_tokens=most_tokens)
        )
    if link is not None and experts is not None and data > 1:
        operators.append(expert_exchange_operator(link, model, tensor, data, tokens))
    return operators


def _declared_grid(meta: Mapping[str, Any]) -> DeclaredGrid:
    grid = sub_mapping(meta, "attention_grid")
    chunks, requests, contexts = (
        parse_axis(str(grid[name])) if grid.get(name) else () for name in ("chunks", "n_decode", "kv")
    )
    return DeclaredGrid(chunks, requests, contexts)
