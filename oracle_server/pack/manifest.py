"""manifest.json: what a pack says about itself. The field comments are the specification; README.md has the columns."""

from __future__ import annotations

import hashlib
import json
import math
import re
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from oracle_server.errors import PackInvalid
from oracle_server.sampling.wake import WakeCurve

SCHEMA: Final = "step_oracle.pack/1"
KINDS: Final = ("sampled", "composed", "hybrid")
MANIFEST_FILE: Final = "manifest.json"
MANIFEST_BYTES_LIMIT: Final = 1 << 20
DEPTH_LIMIT: Final = 32
FILE_BYTES_LIMIT: Final = 256 << 20
ROWS_LIMIT: Final = 20_000_000

Name = Annotated[str, Meta(min_length=1, max_length=512)]
Text = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=1, le=2**53)]
Whole = Annotated[int, Meta(ge=0, le=2**53)]
Amount = Annotated[float, Meta(ge=0.0, le=6e11)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Scalar = str | int | float | bool


class Model(Struct, frozen=True, kw_only=True):
    """Cold. Empty strings are unknown and compared with nothing."""

    id: Name
    # One line as EngineConfig.model_shape of oracle_service.proto.
    shape: Text = ""
    dtype: Text = ""
    quantization: Text = ""
    kv_cache_dtype: Text = ""


class Device(Struct, frozen=True, kw_only=True):
    """The accelerator, as GetDevice tells it to engines. Capability 0.0: none or unknown."""

    name: Name
    memory_bytes: Count
    capability_major: Whole = 0
    capability_minor: Whole = 0
    count: Count = 1


class Parallel(Struct, frozen=True, kw_only=True):
    """Cold: sizes of the parallel groups the latencies belong to."""

    tensor: Count = 1
    pipeline: Count = 1
    data: Count = 1


class Engine(Struct, frozen=True, kw_only=True):
    """Cold: vLLM's resolved configuration. None: the latencies are not tied to this field."""

    vllm_version: Text | None = None
    attention_backend: Text | None = None
    model_runner: Text | None = None
    max_model_len: Count | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    # Ascending; empty: no graphs.
    graph_capture_sizes: tuple[Count, ...] | None = None
    async_scheduling: bool | None = None
    prefix_caching: bool | None = None
    chunked_prefill: bool | None = None
    gpu_memory_utilization: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None


class KvCache(Struct, frozen=True, kw_only=True):
    """Cold: the KV-cache pool of one rank. A pack without it is not a pack."""

    blocks: Count
    # Tokens per block.
    block_size: Count
    # Of one rank; 0 unknown.
    bytes_per_token: Whole = 0
    basis: Literal["measured", "estimated", "assumed"]
    # A sentence: where the count is from.
    source: Name


class SampledLatency(Struct, frozen=True, kw_only=True):
    """Options of the sampled model (README.md of oracle_server/sampling)."""

    tokens_bucket_width: Annotated[int, Meta(ge=1, le=65536)] = 1
    concurrency_bucket_width: Annotated[int, Meta(ge=1, le=65536)] = 1
    min_samples: Annotated[int, Meta(ge=1, le=1_000_000)] = 30
    max_buckets: Annotated[int, Meta(ge=1, le=1024)] = 32
    # When a step reads the prefill table: it has a prefill chunk, or (LLM-Emu's packs) a request scheduled for the
    # first time.
    table_rule: Literal["prefill_tokens", "new_requests"] = "prefill_tokens"
    # The next three stand in the file only where they are given.
    # How buckets near a step are found: by one distance (absent: this; LLM-Emu's K = auto or n), the nearest tokens and
    # then the nearest concurrency (its K = 1), or axis by axis with mixing between neighbours.
    neighbors: Literal["joint", "nearest", "hierarchical"] | UnsetType = UNSET
    # joint only, LLM-Emu's K = n: pool exactly so many buckets, whatever min_samples and max_buckets.
    fixed_buckets: Annotated[int, Meta(ge=1, le=1024)] | UnsetType = UNSET
    # hierarchical only: context_tokens is the third axis, in buckets of so many tokens.
    context_bucket_width: Annotated[int, Meta(ge=1, le=2**31)] | UnsetType = UNSET


class Operator(Struct, frozen=True, kw_only=True):
    """One operator of operators.parquet."""

    id: Annotated[int, Meta(ge=0, le=32767)]
    # One of sampling.grids.OPERATOR_AXES, with exactly its axes.
    name: Name
    axes: tuple[Name, ...]
    # What can be replaced or re-scaled together: for example dense, attention, communication.
    group: Text = ""
    # A summary for people; each grid point has its own.
    knowledge: Text = ""


class ComposedLatency(Struct, frozen=True, kw_only=True):
    """Options of the composed model (README.md of oracle_server/sampling)."""

    operators: tuple[Operator, ...]
    skew_decode: Share = 0.0
    skew_mixed: Share = 0.0
    # Multiplies decode attention in mixed steps; at least skew_mixed, so that no step has a negative cost.
    mixed_decode_factor: Annotated[float, Meta(ge=0.0, le=10.0)] = 1.0
    launch_floor_ns: Amount = 0.0
    host_ns_per_step: Amount = 0.0
    host_ns_per_sequence: Amount = 0.0
    # Decode-only steps are padded to the next of these; empty: no padding.
    graph_capture_sizes: tuple[Count, ...] = ()


class HybridTerm(Struct, frozen=True, kw_only=True):
    """One physics term: coefficient_ns * max(0, amount - above)."""

    # One of sampling.hybrid_tables.TERM_UNITS.
    name: Name
    # Nanoseconds per unit of the amount.
    coefficient_ns: Amount
    above: Annotated[float, Meta(ge=0.0, le=1e18)] = 0.0


class HybridLatency(Struct, frozen=True, kw_only=True):
    """Options of the hybrid model (README.md of oracle_server/sampling)."""

    terms: tuple[HybridTerm, ...]
    # Distances in natural logarithms of the shape's numbers: 0.7 is a factor of 2.
    shrink_distance: Annotated[float, Meta(ge=0.01, le=10.0)] = 0.7
    exact_distance: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.1
    neighbors: Annotated[int, Meta(ge=1, le=16)] = 8
    # A decode-only step whose longest context reaches it is extrapolated, where the longest context costs anything.
    max_context_edge: Count = 2**53
    # Decode-only steps are padded to the next of these; empty: no padding.
    graph_capture_sizes: tuple[Count, ...] = ()
    # A step without prefill tokens right after one with some takes so many times as long; stands in the file only where
    # the pack knows it.
    after_prefill_factor: Annotated[float, Meta(ge=0.1, le=10.0)] | UnsetType = UNSET


class WakePoint(Struct, frozen=True, kw_only=True):
    """What a step takes longer after so long without one; linear between points, that of the last one beyond it."""

    idle_ns: Annotated[int, Meta(ge=1, le=3_600_000_000_000)]
    extra_ns: Annotated[int, Meta(ge=0, le=600_000_000_000)]


class HostTime(Struct, frozen=True, kw_only=True):
    """What the engine core takes from one result to the next step: `step_ns` + `request_ns` * requests of the step."""

    step_ns: Annotated[int, Meta(ge=1, le=600_000_000_000)]
    request_ns: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 0


class Latency(Struct, frozen=True, kw_only=True):
    """Hot: how steps are timed. Exactly the options of the pack's kind are given."""

    # Executor entry to first kernel on an idle device; 0 unknown.
    prep_ns: Annotated[int, Meta(ge=0, le=600_000_000_000)] = 0
    # Last kernel to visible result; 0 unknown.
    copy_ns: Annotated[int, Meta(ge=0, le=600_000_000_000)] = 0
    # Rising in both numbers; stands in the file only where the pack knows it.
    wake: Annotated[tuple[WakePoint, ...], Meta(max_length=32)] | UnsetType = UNSET
    # Stands in the file only where the pack knows it.
    host: HostTime | UnsetType = UNSET
    # Sampled only: decode steps right after prefill work have samples of their own.
    transition: bool = False
    sampled: SampledLatency | None = None
    composed: ComposedLatency | None = None
    # Stands in the file of hybrid packs only.
    hybrid: HybridLatency | UnsetType | None = UNSET


class PackFile(Struct, frozen=True, kw_only=True):
    """One file of the pack beside the manifest."""

    name: Name
    # 64 lower-case hex digits.
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    size_bytes: Annotated[int, Meta(ge=1, le=FILE_BYTES_LIMIT)]
    rows: Annotated[int, Meta(ge=1, le=ROWS_LIMIT)]


class Correction(Struct, frozen=True, kw_only=True):
    """A number that was changed after measuring, and why."""

    name: Name
    value: float
    reason: Text
    source: Text


class Uncertainty(Struct, frozen=True, kw_only=True):
    """Where the truth is expected to lie, relative to the answers, in percent."""

    low_percent: float
    high_percent: float
    basis: Text


class Manifest(Struct, frozen=True, kw_only=True):
    """The whole of manifest.json. Fields a newer minor version adds stay in the file and are ignored."""

    schema: str = SCHEMA
    name: Name
    kind: Literal["sampled", "composed", "hybrid"]
    # RFC 3339; given by whoever builds the pack.
    created: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)\Z")]
    # SPDX expression of the data.
    licence: Name
    model: Model
    device: Device
    parallel: Parallel = field(default_factory=Parallel)
    engine: Engine = field(default_factory=Engine)
    kv_cache: KvCache
    latency: Latency
    files: tuple[PackFile, ...] = ()
    # Column -> unit.
    units: dict[str, str] = field(default_factory=dict)
    coverage: dict[str, Scalar] = field(default_factory=dict)
    corrections: tuple[Correction, ...] = ()
    uncertainty: Uncertainty | None = None
    provenance: dict[str, str] = field(default_factory=dict)


# What msgspec knows of a type is worked out on first use, and with two threads at once that ends the process (0.22.0,
# SIGSEGV seen). A decoder has it worked out here, under the lock of the import.
msgspec.json.Decoder(Manifest)


def parse_manifest(data: bytes) -> Manifest:
    """Parse manifest.json, any JSON layout; raises PackInvalid naming the field."""
    document = _document(data)
    schema = document.get("schema")
    if not (isinstance(schema, str) and re.fullmatch(re.escape(SCHEMA) + r"(\.\d{1,6})?", schema)):
        raise PackInvalid(f"schema is {_short(schema)}; this version reads {SCHEMA!r}", where="manifest.json: schema")
    if document.get("kind") not in KINDS:
        raise PackInvalid(
            f"kind is {_short(document.get('kind'))}; this version answers from {', '.join(KINDS)} packs",
            where="manifest.json: kind",
        )
    try:
        manifest = msgspec.convert(document, Manifest)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        raise PackInvalid(
            message, where=f"manifest.json: {path.rstrip('`').removeprefix('$').lstrip('.') or '(root)'}"
        ) from None
    _check_consistency(manifest)
    return manifest


def composed_latency(manifest: Manifest) -> ComposedLatency:
    """Options of a composed pack; `parse_manifest` makes sure that one has them."""
    if manifest.latency.composed is None:
        raise PackInvalid("a composed pack gives latency.composed", where="manifest.json: latency.composed")
    return manifest.latency.composed


def hybrid_latency(manifest: Manifest) -> HybridLatency:
    """Options of a hybrid pack; `parse_manifest` makes sure that one has them."""
    if not isinstance(manifest.latency.hybrid, HybridLatency):
        raise PackInvalid("a hybrid pack gives latency.hybrid", where="manifest.json: latency.hybrid")
    return manifest.latency.hybrid


def wake_curve(latency: Latency) -> WakeCurve:
    """What steps after a pause cost more; nothing where the pack does not know it."""
    points = () if latency.wake is UNSET else latency.wake
    return WakeCurve([(point.idle_ns, point.extra_ns) for point in points])


def host_time(latency: Latency) -> tuple[int, int]:
    """HostTime's (step_ns, request_ns); zeros where the pack does not know it."""
    return (0, 0) if latency.host is UNSET else (latency.host.step_ns, latency.host.request_ns)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest."""
    return _canonical(msgspec.to_builtins(manifest))


def canonical_manifest(data: bytes) -> bytes:
    """manifest.json as read, unknown fields too, with sorted keys, no white space, UTF-8 and shortest numbers."""
    return _canonical(_document(data))


def digest_of(data: bytes) -> str:
    """ "sha256:" + hex digest of the canonical form of manifest.json."""
    return "sha256:" + hashlib.sha256(canonical_manifest(data)).hexdigest()


def unknown_fields(data: bytes) -> tuple[str, ...]:
    """Top-level fields this version does not know."""
    return tuple(sorted(set(_document(data)) - set(Manifest.__struct_fields__)))


def _document(data: bytes) -> dict[str, Any]:
    if len(data) > MANIFEST_BYTES_LIMIT:
        raise PackInvalid(f"the manifest has {len(data)} bytes; at most 1 MiB is allowed", where="manifest.json")
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_number,
        )
    except RecursionError:
        raise PackInvalid(f"nested deeper than {DEPTH_LIMIT} levels", where="manifest.json") from None
    except ValueError as error:
        raise PackInvalid(f"not JSON: {error}", where="manifest.json") from None
    if not isinstance(document, dict):
        raise PackInvalid("the manifest has to be a JSON object", where="manifest.json")
    level: list[Any] = [document]
    for _ in range(DEPTH_LIMIT):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return document
    raise PackInvalid(f"nested deeper than {DEPTH_LIMIT} levels", where="manifest.json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PackInvalid(f"the key {_short(twice)} stands twice in one object", where="manifest.json")
    return result


def _constant(text: str) -> float:
    raise PackInvalid(f"{text} is not a JSON number", where="manifest.json")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise PackInvalid(f"the number {text[:40]} is out of range", where="manifest.json")
    return value


def _canonical(document: Any) -> bytes:
    try:
        text = json.dumps(
            _shortest(document), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode("utf-8")
    except ValueError as error:
        raise PackInvalid(f"no canonical form: {error}", where="manifest.json") from None


def _shortest(document: Any) -> Any:
    """Floats that are whole become integers, as RFC 8785 writes them: 1, 1.0 and 1e0 are one value, so one digest."""
    if isinstance(document, float):
        return int(document) if document.is_integer() and abs(document) < 1e21 else document
    if isinstance(document, dict):
        return {key: _shortest(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [_shortest(value) for value in document]
    return document


def _check_consistency(manifest: Manifest) -> None:
    """What types alone cannot say."""
    latency = manifest.latency
    for kind in KINDS:
        given = getattr(latency, kind) not in (None, UNSET)
        if given != (kind == manifest.kind):
            raise PackInvalid(
                f"a {manifest.kind} pack gives latency.{manifest.kind} and no other options",
                where=f"manifest.json: latency.{kind}",
            )
    if latency.transition and manifest.kind != "sampled":
        raise PackInvalid("only sampled packs have a transition term", where="manifest.json: latency.transition")
    if latency.wake is not UNSET:
        _check_wake(latency.wake)
    if latency.sampled is not None:
        _check_neighbors(latency.sampled)
    composed = latency.composed
    if composed is not None:
        if composed.mixed_decode_factor < composed.skew_mixed:
            raise PackInvalid(
                f"mixed_decode_factor {composed.mixed_decode_factor} is below skew_mixed {composed.skew_mixed}: "
                "a step could cost less than nothing",
                where="manifest.json: latency.composed.mixed_decode_factor",
            )
        if len({operator.id for operator in composed.operators}) != len(composed.operators):
            raise PackInvalid("two operators have one id", where="manifest.json: latency.composed.operators")
        _check_ascending(composed.graph_capture_sizes, "latency.composed.graph_capture_sizes")
    if isinstance(latency.hybrid, HybridLatency):
        _check_ascending(latency.hybrid.graph_capture_sizes, "latency.hybrid.graph_capture_sizes")
    _check_ascending(manifest.engine.graph_capture_sizes or (), "engine.graph_capture_sizes")
    uncertainty = manifest.uncertainty
    if uncertainty is not None and not uncertainty.low_percent <= uncertainty.high_percent:
        raise PackInvalid("low_percent is above high_percent", where="manifest.json: uncertainty")


def _check_wake(points: tuple[WakePoint, ...]) -> None:
    if any(b.idle_ns <= a.idle_ns or b.extra_ns < a.extra_ns for a, b in pairwise(points)):
        raise PackInvalid(
            "points ascend in idle_ns, and extra_ns never falls: who rests longer does not wake sooner",
            where="manifest.json: latency.wake",
        )


def _check_neighbors(sampled: SampledLatency) -> None:
    for name, needed in (("fixed_buckets", "joint"), ("context_bucket_width", "hierarchical")):
        if getattr(sampled, name) is not UNSET and (sampled.neighbors or "joint") != needed:
            raise PackInvalid(f"{name} belongs to {needed} neighbors", where=f"manifest.json: latency.sampled.{name}")


def _check_ascending(sizes: tuple[int, ...], where: str) -> None:
    if any(b <= a for a, b in pairwise(sizes)):
        raise PackInvalid("sizes have to ascend", where=f"manifest.json: {where}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
